"""Small models to save, and what every refusal has to leave alone."""

import copy
import json

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
)

from ipu_pipeline import checkpoint
from ipu_pipeline.checkpoint import read_checkpoint
from ipu_pipeline.errors import CheckpointError

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 40}


def bert(seed=0, layers=2, cls=BertForMaskedLM):
    torch.manual_seed(seed)
    return cls(BertConfig(**SIZES, num_hidden_layers=layers, max_position_embeddings=8))


def adamw(model, groups=1):
    parameters = list(model.parameters())
    split = [parameters[i::groups] for i in range(groups)]
    return torch.optim.AdamW([{"params": g} for g in split], lr=1e-2, weight_decay=0.1)


def one_step(model, optimizer, seed=0):
    torch.manual_seed(seed)
    ids = torch.randint(0, 40, (2, 8))
    model.eval()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(3, 3)
        self.second = torch.nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.register_buffer("count", torch.rand(2))


def assert_untouched(path, message, model=None, optimizer=None):
    """Reading fails with ``message`` and changes neither model, optimizer nor random state."""
    model = model or bert(seed=5)
    optimizer = optimizer or adamw(model)
    weights = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict())
    rng = torch.get_rng_state()
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path, model=model, optimizer=optimizer)
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
    torch.testing.assert_close(optimizer.state_dict()["state"], state["state"], rtol=0, atol=0)
    assert optimizer.state_dict()["param_groups"] == state["param_groups"]
    assert torch.equal(torch.get_rng_state(), rng)


def reseal(path, change):
    """Rewrite the manifest with a valid checksum of its own."""
    body = json.loads((path / "checkpoint.json").read_text())
    del body["sha256"], body["files"], body["schema_version"], body["library_version"]
    (path / "checkpoint.json").unlink()
    change(body)
    checkpoint.manifest.write_manifest(path, body)
