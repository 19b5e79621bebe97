import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    BertForMaskedLM,
    MarianConfig,
    MarianMTModel,
    MixtralConfig,
    MixtralForCausalLM,
)

from ipu_pipeline import checkpoint
from ipu_pipeline.checkpoint import read_checkpoint, write_checkpoint
from ipu_pipeline.checkpoint.writer import CheckpointWriter, take_shard, write_shard
from ipu_pipeline.errors import CheckpointError
from tests.checkpoint.models import SIZES, Tied, adamw, bert, one_step, reseal
from tests.tiny_models import TINY


def test_round_trip_continues_bit_for_bit(trained, saved):
    model, optimizer = trained
    other = bert(seed=9)
    identities = [id(p) for p in other.parameters()]
    restored = adamw(other, groups=2)
    info = read_checkpoint(saved, model=other, optimizer=restored)
    assert (info.global_step, info.extra) == (7, {"note": [1, "a"]})
    assert [id(p) for p in other.parameters()] == identities
    for seed in range(3):
        assert one_step(model, optimizer, seed) == one_step(other, restored, seed)


def test_another_grouping_of_the_parameters_loads_it(trained, saved):
    model, optimizer = trained
    other = bert(seed=9)
    restored = adamw(other, groups=5)
    read_checkpoint(saved, model=other, optimizer=restored)
    for seed in range(3):
        assert one_step(model, optimizer, seed) == one_step(other, restored, seed)


def test_settings_come_back_and_the_loading_side_chooses_the_kernel(trained, saved):
    other = bert(seed=9)
    restored = torch.optim.AdamW(other.parameters(), lr=5.0, betas=(0.5, 0.5), foreach=True)
    read_checkpoint(saved, model=other, optimizer=restored)
    group = restored.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"]) == (1e-2, 0.1, (0.9, 0.999))
    assert group["foreach"] is True


def test_tensor_learning_rate_stays_a_tensor(saved):
    other = bert(seed=9)
    restored = torch.optim.AdamW(other.parameters(), lr=torch.tensor(5.0))
    read_checkpoint(saved, model=other, optimizer=restored)
    assert torch.equal(restored.param_groups[0]["lr"], torch.tensor(1e-2))


def test_random_states_come_back(saved, trained):
    model, _ = trained
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    random.gauss(0, 1)
    write_checkpoint(saved, model=model, optimizer=None, global_step=8)
    draws = [(torch.rand(3).tolist(), np.random.rand(), random.gauss(0, 1)) for _ in range(2)]
    read_checkpoint(saved, model=model, optimizer=None)
    assert [
        (torch.rand(3).tolist(), np.random.rand(), random.gauss(0, 1)) for _ in range(2)
    ] == draws


def test_from_pretrained_loads_the_weights(trained, saved):
    model, _ = trained
    loaded, info = BertForMaskedLM.from_pretrained(saved, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight


def test_from_pretrained_loads_what_the_only_one_of_several_ranks_wrote(trained, tmp_path):
    """The others may have had optimizer state only."""
    model, _ = trained
    new = CheckpointWriter(tmp_path / "a", model=model, optimizer=None, global_step=0)
    files = write_shard(new.folder, take_shard(model, None, copy=False), index=1, count=2)
    path = new.finish(files, {})
    loaded, info = BertForMaskedLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    read_checkpoint(path, model=loaded, optimizer=None)


def marian():
    config = MarianConfig(
        vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, pad_token_id=39,
        max_position_embeddings=8, decoder_start_token_id=39, eos_token_id=0,
    )  # fmt: skip
    return MarianMTModel(config)


def mixtral():
    return MixtralForCausalLM(
        MixtralConfig(**SIZES, num_hidden_layers=1, num_key_value_heads=1, num_local_experts=2)
    )


@pytest.mark.parametrize("build", [marian, mixtral])
def test_models_whose_own_files_differ_from_their_state(build, tmp_path):
    """Marian leaves parameters out of its file; Mixtral's hub format renames the experts."""
    model, other = build(), build()
    path = write_checkpoint(tmp_path / "c", model=model, optimizer=None, global_step=0)
    read_checkpoint(path, model=other, optimizer=None)
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
    again = type(model).from_pretrained(path)
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_plain_module_with_tied_weights(tmp_path):
    model, other = Tied(), Tied()
    path = write_checkpoint(
        tmp_path / "c", model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1),
        global_step=1,
    )  # fmt: skip
    assert sorted(p.name for p in path.iterdir()) == [
        "checkpoint.json", "model.safetensors", "optimizer.json",
    ]  # fmt: skip
    optimizer = torch.optim.SGD(other.parameters(), lr=9.0)
    read_checkpoint(path, model=other, optimizer=optimizer)
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert other.second.weight is other.first.weight
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_frozen_parameters_have_no_optimizer_state(tmp_path):
    model = Tied()
    model.first.bias.requires_grad_(requires_grad=False)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable)
    path = write_checkpoint(tmp_path / "c", model=model, optimizer=optimizer, global_step=1)
    read_checkpoint(path, model=model, optimizer=optimizer)
    other = Tied()
    message = r"covers other parameters: only there \[\], only here \['first.bias'\]"
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path, model=other, optimizer=torch.optim.AdamW(other.parameters()))


@pytest.mark.parametrize("name", list(TINY))
def test_tied_weights_have_the_names_that_save_pretrained_gives_them(name, tmp_path):
    model, _ = TINY[name].build()
    model.save_pretrained(tmp_path, save_original_format=False)
    kept, _ = checkpoint.weights.weights_to_save(model)
    assert set(kept) == set(load_file(tmp_path / "model.safetensors"))


def test_checkpoints_of_the_first_schema_load(trained, tmp_path, monkeypatch):
    """Written as version 0.1 did, by save_pretrained; the format has not changed for one file."""
    model, optimizer = trained
    path = write_checkpoint(tmp_path / "c", model=model, optimizer=optimizer, global_step=7)
    model.save_pretrained(path, save_original_format=False)
    monkeypatch.setattr(checkpoint.manifest, "SCHEMA_VERSION", 1)
    reseal(path, lambda body: None)
    monkeypatch.undo()
    other = bert(seed=9)
    restored = adamw(other)
    assert read_checkpoint(path, model=other, optimizer=restored).global_step == 7
    assert one_step(model, optimizer) == one_step(other, restored)


class Sharing(torch.nn.Module):
    def __init__(self):
        super().__init__()
        whole = torch.rand(4, 6)
        self.register_buffer("first", whole[:2])
        self.register_buffer("second", whole[2:])
        self.register_buffer("again", whole.view(6, 4))
        self.register_buffer("turned", torch.rand(3, 2).t())


def test_tensors_that_share_memory(tmp_path):
    model, other = Sharing(), Sharing()
    path = write_checkpoint(tmp_path / "c", model=model, optimizer=None, global_step=0)
    read_checkpoint(path, model=other, optimizer=None)
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
