"""A model on meta gets the tensors of its own stages: read from files, or initialised by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim import SGD

import ipu_pipeline as ipp
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.stages.materialize import is_on_meta, materialize
from tests.tiny_models import TINY

# Tied tables, experts that are merged on the way, buffers that are computed, relative positions.
MODELS = ("gpt2-lm", "mixtral", "llama", "t5")


def on_meta(name: str) -> nn.Module:
    return TINY[name].build(device="meta")[0]


def half(model: nn.Module) -> set[str]:
    names = [name for name, _ in model.named_parameters()]
    return set(names[: len(names) // 2])


@pytest.mark.parametrize("name", MODELS)
def test_files_give_what_was_saved(name: str, tmp_path: Path) -> None:
    real, _ = TINY[name].build()
    real.save_pretrained(tmp_path, max_shard_size="50KB")
    whole, part = on_meta(name), on_meta(name)
    before = list(map(id, whole.parameters()))
    materialize(whole, tmp_path)
    assert list(map(id, whole.parameters())) == before  # an optimizer has them still
    materialize(part, tmp_path, held=half(part))
    expected = {**dict(real.named_parameters()), **dict(real.named_buffers())}
    for model, held in ((whole, expected.keys()), (part, half(part))):
        own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        assert all(torch.equal(own[n], expected[n]) for n in held)
        assert all(torch.equal(own[n], b) for n, b in real.named_buffers())


@pytest.mark.parametrize("name", MODELS)
def test_initial_values_do_not_depend_on_what_is_held(name: str) -> None:
    whole, part, other = (on_meta(name) for _ in range(3))
    materialize(whole, seed=3)
    materialize(part, seed=3, held=half(part))
    materialize(other, seed=4)
    own, same, differs = (dict(m.named_parameters()) for m in (whole, part, other))
    assert all(torch.equal(own[n], same[n]) for n in half(whole))
    random = [n for n, p in own.items() if p.std() > 0]
    assert random
    assert not any(torch.equal(own[n], differs[n]) for n in random)


def test_they_are_spread_as_those_of_a_model_with_values() -> None:
    real, _ = TINY["gpt2-lm"].build()
    made = on_meta("gpt2-lm")
    materialize(made)
    for (name, own), expected in zip(made.named_parameters(), real.parameters(), strict=True):
        assert own.std().item() == pytest.approx(expected.std().item(), rel=0.2), name


def test_what_is_not_held_takes_little_memory() -> None:
    model = nn.Sequential(nn.Linear(500, 300), nn.Linear(300, 200)).to("meta")
    materialize(model, held={"0.weight", "0.bias"})
    own, other = model[0].weight, model[1].weight
    assert own.untyped_storage().nbytes() == 500 * 300 * 4
    assert other.untyped_storage().nbytes() == (300 + 200 - 1) * 4
    assert torch.linalg.matrix_rank(other) == 200  # no two rows are alike
    assert not is_on_meta(model)


def test_a_local_executable_trains_a_model_that_came_from_meta(tmp_path: Path) -> None:
    real, batch = TINY["bert-qa"].build()
    real.save_pretrained(tmp_path)
    model = on_meta("bert-qa")
    plan = ipp.plan(model, batch, num_stages=2, microbatches=2)
    whole = TINY["bert-qa"].batch(batch_size=4)
    losses = []
    for one, options in ((real, {}), (model, {"weights": tmp_path})):
        optimizer = SGD(one.parameters(), lr=0.1)
        with ipp.compile(one, plan, optimizer=optimizer, **options) as made:
            losses.append([made.train_step(whole).loss for _ in range(2)])
    assert losses[0] == losses[1]


def test_parameters_that_no_file_has_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(nn.Linear(3, 2)).to("meta")
    save_file({"0.weight": torch.ones(2, 3)}, tmp_path / "model.safetensors")
    materialize(model, tmp_path)
    assert torch.equal(model[0].weight, torch.ones(2, 3))
    assert "1 parameters are not in" in caplog.text
    assert "0.bias" in caplog.text


def test_a_rank_may_hold_only_what_no_file_has(tmp_path: Path) -> None:
    """The new head of a pretrained model, in a stage of its own."""
    TINY["bert-mlm"].build()[0].save_pretrained(tmp_path)
    model = on_meta("bert-qa")
    materialize(model, tmp_path, held={"qa_outputs.weight", "qa_outputs.bias"})
    assert dict(model.named_parameters())["qa_outputs.weight"].std() > 0


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(3, 2, device="meta"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"neither model.safetensors nor model.safetensors.index.json in"),
        ({"model.safetensors.index.json": b'{"weight_map": {"table": "../x"}}'},
         "no weight_map of names of files beside it"),
        ({"model.safetensors.index.json": b'{"weight_map": {"table": "x.safetensors"}}'},
         r"x.safetensors, which .* names, cannot be read"),
        ({"model.safetensors": b"no tensors"}, "model.safetensors cannot be read"),
        ({"model.safetensors": {"table": torch.ones(2, 2)}}, r"table is \(2, 2\) in .*\(3, 2\)"),
        ({"model.safetensors": {"other": torch.ones(2)}},
         r"none of the parameters of Own \(table, ...\) is in .*, which has other"),
    ],
)  # fmt: skip
def test_wrong_files_are_refused(
    files: dict[str, bytes | dict[str, torch.Tensor]], message: str, tmp_path: Path
) -> None:
    for name, content in files.items():
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            save_file(content, tmp_path / name)
    with pytest.raises(LoweringError, match=message):
        materialize(Own(), tmp_path)


def test_what_nothing_initialises_is_named() -> None:
    with pytest.raises(LoweringError, match="Own has no code that gives table a value"):
        materialize(Own())


def test_weights_are_for_models_on_meta(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({}))
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(LoweringError, match="is for a model without values, and this one has"):
        materialize(model, tmp_path)
    model.append(nn.Linear(2, 2, device="meta"))
    with pytest.raises(LoweringError, match=r"'0\.weight' has values and others have none"):
        materialize(model)
