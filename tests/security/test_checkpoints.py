"""Checkpoints with one thing wrong and right checksums: refused, and nothing is changed."""

from __future__ import annotations

import contextlib
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ipu_pipeline.checkpoint import MANIFEST, read_checkpoint, write_checkpoint
from ipu_pipeline.checkpoint.directory import AtomicDirectory
from ipu_pipeline.checkpoint.manifest import _digest, describe
from ipu_pipeline.errors import CheckpointError
from ipu_pipeline.train.output_folder import locked
from tests.security.mutations import mutated


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a small model after a step of an optimizer with state."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Return all that loading may change, as text."""
    state = {name: value.tolist() for name, value in model.state_dict().items()}
    kept = optimizer.state_dict()
    numbers = torch.get_rng_state().sum(), random.getstate()[1][:3], np.random.get_state()[1][:3]
    return repr((state, kept, numbers))


def sign(folder: Path) -> None:
    """Make the checksums right again, as whoever tampers with a checkpoint would."""
    path = folder / MANIFEST
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        body.pop("sha256", None)
        for name in body.get("files", {}):
            if (folder / name).is_file():
                body["files"][name] = describe(folder / name)
        text = json.dumps(body | {"sha256": _digest(body)})
    except (ValueError, TypeError, AttributeError, RecursionError, OSError):
        return  # too broken to be signed
    path.write_text(text, encoding="utf-8", errors="surrogatepass")


def damage_json(name: str) -> Callable[[Path, random.Random], None]:
    def damage(folder: Path, draw: random.Random) -> None:
        path = folder / name
        path.write_bytes(mutated(path.read_bytes(), ".json", draw))

    return damage


def damage_bytes(name: str) -> Callable[[Path, random.Random], None]:
    def damage(folder: Path, draw: random.Random) -> None:
        data = bytearray((folder / name).read_bytes())
        data[draw.randrange(min(len(data), 400))] = draw.randrange(256)
        (folder / name).write_bytes(data[: draw.choice((len(data), len(data) // 2, 0))])

    return damage


def rename_tensors(folder: Path, draw: random.Random) -> None:
    path = folder / draw.choice(("model.safetensors", "optimizer.safetensors"))
    tensors = load_file(path)
    name = draw.choice(sorted(tensors))
    change: Any = draw.choice(("name", "shape", "drop"))
    value = tensors.pop(name)
    if change == "name":
        tensors[draw.choice((f"{name}_", "x", f"x/{name}"))] = value
    if change == "shape":
        tensors[name] = value.reshape(-1)[:1].repeat(7)
    save_file(tensors, path)


DAMAGES = {
    "manifest": damage_json(MANIFEST),
    "optimizer settings": damage_json("optimizer.json"),
    "weights": damage_bytes("model.safetensors"),
    "optimizer state": damage_bytes("optimizer.safetensors"),
    "names of tensors": rename_tensors,
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_tampered_checkpoint_is_read_whole_or_changes_nothing(tmp_path: Path, name: str) -> None:
    tamper(tmp_path, name, range(40))


@pytest.mark.acceptance
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", DAMAGES)
def test_many_tampered_checkpoints(tmp_path: Path, name: str) -> None:
    tamper(tmp_path, name, range(100_000, 101_000))


def tamper(tmp_path: Path, name: str, numbers: range) -> None:
    """Load checkpoints with one thing wrong, by number."""
    model, optimizer = trained()
    write_checkpoint(tmp_path / "good", model=model, optimizer=optimizer, global_step=3)
    good = {path.name: path.read_bytes() for path in (tmp_path / "good").iterdir()}
    model, optimizer = trained()
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    before = everything(model, optimizer)
    for number in numbers:
        for file, data in good.items():
            (folder / file).write_bytes(data)
        DAMAGES[name](folder, random.Random(number))
        sign(folder)
        try:
            read_checkpoint(folder, model=model, optimizer=optimizer)
        except CheckpointError as error:
            text = str(error)
            assert everything(model, optimizer) == before, f"damage {number}: {text}"
            assert len(text) < 1500
        else:
            optimizer.step()  # what was loaded is of use
            model, optimizer = trained()
            before = everything(model, optimizer)


def test_a_file_outside_of_the_checkpoint_is_not_read(tmp_path: Path) -> None:
    model, optimizer = trained()
    write_checkpoint(tmp_path / "a", model=model, optimizer=optimizer, global_step=3)
    path = tmp_path / "a" / MANIFEST
    body = json.loads(path.read_text(encoding="utf-8"))
    body["files"]["../../etc/passwd"] = {"size": 1, "sha256": ""}
    path.write_text(json.dumps(body), encoding="utf-8")
    sign(tmp_path / "a")
    with pytest.raises(CheckpointError, match="is no file in it"):
        read_checkpoint(tmp_path / "a", model=model, optimizer=optimizer)


def edit(name: str, *keys: Any, value: Any) -> Callable[[Path], None]:
    def edited(folder: Path) -> None:
        body = json.loads((folder / name).read_text(encoding="utf-8"))
        place = body
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        (folder / name).write_text(json.dumps(body), encoding="utf-8")

    return edited


def retype(name: str, dtype: torch.dtype) -> Callable[[Path], None]:
    def retyped(folder: Path) -> None:
        tensors = load_file(folder / name)
        save_file({key: value.to(dtype) for key, value in tensors.items()}, folder / name)

    return retyped


def add_state_of_a_stranger(folder: Path) -> None:
    tensors = load_file(folder / "optimizer.safetensors")
    save_file({**tensors, "exp_avg/none.weight": torch.ones(2)}, folder / "optimizer.safetensors")


SCALER = torch.amp.GradScaler("cpu")
SETTINGS = ("optimizer.json", "groups", 0, "settings")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit(MANIFEST, "extra_state", value={"0.weight": [1]}), "has the extra state '0.weight'"),
        (edit(MANIFEST, "extra_state", value={"0._extra_state": 1}), "state '0._extra_state'"),
        (edit(MANIFEST, "rng", "numpy", 2, value=10**6), "numpy's random state stands at 1000000"),
        (edit(MANIFEST, "schema_version", value=-5), "schema_version is -5"),
        (edit(MANIFEST, "global_step", value=True), "global_step is True"),
        (edit(MANIFEST, "loss_scaling", value={"scale": 2.0}), "loss_scaling has scale: 2.0"),
        (
            edit(MANIFEST, "loss_scaling", value={**SCALER.state_dict(), "scale": -1.0}),
            "loss_scaling has scale: -1.0",
        ),
        (edit(*SETTINGS, "lr", value=True), "a setting of the optimizer is 0.1 here and True"),
        (retype("model.safetensors", torch.complex64), "is torch.complex64 in the checkpoint and"),
        (retype("model.safetensors", torch.bool), "is torch.bool in the checkpoint and"),
        (add_state_of_a_stranger, "no group has the parameter of 'exp_avg/none.weight'"),
        (retype("optimizer.safetensors", torch.int32), "has exp_avg of torch.int32"),
    ],
)
def test_what_fits_in_form_only_is_refused(
    tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    model, optimizer = trained()
    folder = write_checkpoint(tmp_path / "a", model=model, optimizer=optimizer, global_step=3)
    change(folder)
    sign(folder)
    model, optimizer = trained()
    before = everything(model, optimizer)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read_checkpoint(folder, model=model, optimizer=optimizer)
    assert everything(model, optimizer) == before


@pytest.mark.parametrize("step", [-5, 10**30])
def test_a_step_is_a_count(tmp_path: Path, step: int) -> None:
    model, optimizer = trained()
    write_checkpoint(tmp_path / "a", model=model, optimizer=optimizer, global_step=step)
    with pytest.raises(CheckpointError, match=rf"is damaged: ValueError: global_step is {step};"):
        read_checkpoint(tmp_path / "a", model=model, optimizer=optimizer)


@pytest.mark.parametrize("name", [".run.lock", ".checkpoint-1.previous", "checkpoint-1"])
def test_a_planted_link_leads_nowhere(tmp_path: Path, name: str) -> None:
    """Locking and saving in a folder touch nothing that links in it lead to."""
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "mine.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "out").mkdir()
    target = kept / "mine.txt" if name == ".run.lock" else kept
    (tmp_path / "out" / name).symlink_to(target)
    with contextlib.suppress(CheckpointError), locked(tmp_path / "out"):
        saved = AtomicDirectory(tmp_path / "out" / "checkpoint-1")
        saved.publish()
    assert [path.name for path in kept.iterdir()] == ["mine.txt"]
    assert (kept / "mine.txt").read_text(encoding="utf-8") == "mine"
