"""The recipes for Lightning and accelerate: they learn, agree, and resume as if nothing was."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch


def recipe(root: Path, name: str) -> ModuleType:
    path = root / "examples" / name / f"train_{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def reference_losses(module: ModuleType, steps: int, schedule_of: int) -> list[float]:
    """The unsplit model, without dropout, in a plain loop."""
    torch.manual_seed(42)
    model = module.small_model(0.0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = module.get_linear_schedule_with_warmup(optimizer, 0, schedule_of)
    loader = module.DataLoader(
        module.rows(256, seed=1), batch_size=module.MICRO_BATCH * module.MICROBATCHES
    )
    losses = []
    for _, batch in zip(range(steps), loader, strict=False):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ["accelerate", "lightning"])
@pytest.mark.parametrize(
    ("option", "wrong", "message"),
    [
        ("--max_steps", "-5", "max_steps must be at least 1, got -5"),
        ("--max_steps", "1" + "0" * 30, "max_steps may be 1000000000 at most, got more"),
        ("--num_stages", "0", "num_stages must be at least 1, got 0"),
        ("--dropout", "nan", "dropout must be at least 0 and below 1, got nan"),
        ("--output_dir", "a" * 300, "choose a shorter one"),
    ],
)
def test_wrong_options_are_refused_at_once(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    option: str,
    wrong: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        recipe(root, name).main([option, wrong])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["accelerate", "lightning"])
def test_several_processes_are_refused(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        recipe(root, name).main([])
    assert "this recipe runs all stages in one process, and 2 were" in capsys.readouterr().err


# ---- accelerate ---------------------------------------------------------------------------


def accelerated(root: Path, folder: Path, *options: str) -> list[float]:
    return recipe(root, "accelerate").main(
        ["--output_dir", str(folder), "--max_steps", "12", "--save_steps", "5", *options]
    )


def test_accelerate_trains_as_the_unsplit_model(root: Path, tmp_path: Path) -> None:
    expected = reference_losses(recipe(root, "accelerate"), 12, 12)
    found = accelerated(root, tmp_path, "--dropout", "0.0")
    assert found == pytest.approx(expected, rel=1e-4)
    assert found[-1] < found[0]


def test_accelerate_resumes_with_dropout(root: Path, tmp_path: Path) -> None:
    whole = accelerated(root, tmp_path)
    rest = accelerated(root, tmp_path / "rest", "--resume_from", str(tmp_path / "step-5"))
    assert rest == whole[5:]


class Attack:
    """What runs code where it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("PWNED"),)


@pytest.mark.parametrize("name", ["accelerate", "lightning"])
def test_what_cannot_be_resumed_is_named(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "step-5"
    folder.mkdir()
    for file in ("pytorch_model.bin", "optimizer.bin"):
        torch.save({"state_dict": Attack()}, folder / file)
    option, inner = {
        "accelerate": ("--resume_from", ""),
        "lightning": ("--ckpt_path", "/optimizer.bin"),
    }[name]
    for path in ("/etc", f"{folder}{inner}"):
        with pytest.raises(SystemExit):
            recipe(root, name).main([option, path, "--output_dir", "out"])
        said = capsys.readouterr().err
        assert f"error: cannot resume from {path} (" in said
        assert len(said.splitlines()[-1]) < 500
    assert not Path("PWNED").exists()


# ---- Lightning ----------------------------------------------------------------------------

# Lightning's own: about itself under this torch, loaders without workers, and folders in use.
lightning_warnings = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec:FutureWarning",
    "ignore:.*does not have many workers",
    "ignore:Checkpoint directory .* is not empty",
)


def lightning_losses(root: Path, folder: Path, *options: str) -> tuple[list[float], object]:
    pytest.importorskip("lightning")
    module = recipe(root, "lightning")
    losses: list[float] = []
    step = module.PipelineModule.log

    def log(self, name, value, **rest):
        if name == "train_loss":
            losses.append(value)
        step(self, name, value, **rest)

    module.PipelineModule.log = log
    argv = ["--output_dir", str(folder), "--max_steps", "19", *options]
    return losses, module.main(argv)


@lightning_warnings
def test_lightning_trains_as_the_unsplit_model(root: Path, tmp_path: Path) -> None:
    found, trainer = lightning_losses(root, tmp_path, "--dropout", "0.0")
    expected = reference_losses(recipe(root, "lightning"), 16, 19)
    assert found[:16] == pytest.approx(expected, rel=1e-4)
    assert trainer.global_step == 19
    assert {"val_loss", "accuracy"} <= trainer.callback_metrics.keys()


@pytest.mark.acceptance
@lightning_warnings
def test_lightning_resumes_with_dropout(root: Path, tmp_path: Path) -> None:
    whole, _ = lightning_losses(root, tmp_path)
    checkpoint = next(tmp_path.rglob("*step=16.ckpt"))
    rest, _ = lightning_losses(root, tmp_path, "--ckpt_path", str(checkpoint))
    assert rest == whole[16:]
