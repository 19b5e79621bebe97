"""Bundles: pinned text, the same bytes twice, Python 3.8, edits by hand, and running them."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file

import ipu_pipeline as ipp
from ipu_pipeline.backends.ipu.annotations import annotate
from ipu_pipeline.backends.ipu.bundle import RUNTIME, emit, model_parallel_text
from ipu_pipeline.backends.ipu.config import IPUConfig
from ipu_pipeline.backends.ipu.settings import OptimizerSettings, settings_for
from ipu_pipeline.capture.from_config import from_config
from ipu_pipeline.cli.bundle import _run
from ipu_pipeline.errors import LoweringError, OutputError
from tests.backends.ipu.emulated import ALL, Case, case

_PYENV = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
PYTHON38 = next(iter(_PYENV.glob("versions/3.8.*/bin/python")), Path("no-python-3.8"))
ALLOWED = {"torch", "transformers", "poptorch", "runtime", "__future__"}
GOLDEN = {
    "bert-qa": {"layers_per_ipu": (1, 3), "recompute_checkpoint_every_layer": True},
    "bert-mlm": {"layers_per_ipu": (0, 2, 2), "embedding_serialization_factor": 3},
    "lxmert-qa": {"layers_per_ipu": (-1, -1)},
    "gpt2-lm": {"layers_per_ipu": (0, 2, 2)},
    "t5": {"layers_per_ipu": (2, 2)},
    "vit": {"layers_per_ipu": (2, 2)},
}


@pytest.mark.parametrize("name", GOLDEN)
def test_model_parallel_is_pinned(name: str, golden: Callable[[str, str], None]) -> None:
    tiny = ALL[name]
    changes = {"vocab_size": 4098} if name == "bert-mlm" else {}
    model, batch = from_config(tiny.config(**changes), tiny.task, batch_size=2, seq_length=16)
    config = IPUConfig(gradient_accumulation_steps=16, **GOLDEN[name])
    plan = ipp.plan(model, batch, machine="pod16", config=config)
    text = model_parallel_text(plan, annotate(plan))
    golden(f"model_parallel_{name}.py.txt", text)


def _emit(made: Case, folder: Path, **optimizer: Any) -> Path:
    settings = settings_for(
        made.plan, made.config, optimizer=OptimizerSettings(**optimizer), seed=1
    )
    text = made.model.config.to_json_string()  # type: ignore[union-attr,operator]
    return emit(made.plan, settings, folder, model_config=str(text))


def _bytes(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_same_plan_gives_the_same_bytes(tmp_path: Path) -> None:
    made = case("bert-mlm", gradient_accumulation_steps=8)
    first = _bytes(_emit(made, tmp_path / "a"))
    assert set(first) == {
        *("model_parallel.py", "run.py", "settings.json", "ipu_config.json", "plan.json"),
        *("config.json", "requirements.txt"),
        *(f"runtime/{name}" for name in RUNTIME),
    }
    assert _bytes(_emit(made, tmp_path / "b")) == first
    assert _bytes(_emit(case("bert-mlm", gradient_accumulation_steps=8), tmp_path / "c")) == first
    assert _bytes(_emit(made, tmp_path / "a")) == first  # over an older one


def test_files_are_python_38_and_import_nothing_else(tmp_path: Path) -> None:
    folder = _emit(case(), tmp_path / "b")
    files = sorted(folder.rglob("*.py"))
    standard = set(sys.stdlib_module_names)
    for path in files:
        tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] in standard | ALLOWED, (path, name)
        assert "ipu_pipeline" not in path.read_text(encoding="utf-8").replace(
            "Nothing here imports ipu_pipeline", ""
        ).replace("nothing here imports ipu_pipeline", ""), path
    if PYTHON38.exists():
        command = [str(PYTHON38), "-m", "py_compile", *map(str, files)]
        subprocess.run(command, check=True, capture_output=True, text=True)


def test_json_files_say_everything(tmp_path: Path) -> None:
    made = case(replication_factor=2)
    folder = _emit(made, tmp_path / "b", learning_rate=0.5, loss_scaling=64.0)
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["replication_factor"] == 2
    assert settings["learning_rate"] == 0.5
    assert settings["loss_scaling"] == 64.0
    assert settings["annotated_blocks"][0] == "bert.embeddings"
    assert IPUConfig.load(folder) == settings_for(made.plan, made.config).config
    assert ipp.Plan.load(folder / "plan.json").decision_digest == made.plan.decision_digest


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("x")
    with pytest.raises(OutputError, match=r"the bundle's folder .*: it is a file; give a folder"):
        _emit(case(), tmp_path / "b")


def test_what_poptorch_refuses_is_not_written(tmp_path: Path) -> None:
    made = case()
    made.plan = replace(made.plan, num_microbatches=2)  # edited: it would not be planned so
    made.config = replace(made.config, gradient_accumulation_steps=2)
    with pytest.raises(LoweringError, match=r"gradient accumulation 2 is below 3"):
        _emit(made, tmp_path / "b")
    assert not (tmp_path / "b").exists()


# ---- running --------------------------------------------------------------------------------


def _run_here(folder: Path, *arguments: str) -> None:
    _run([str(folder / "run.py"), *arguments])


def _save_rows(made: Case, path: Path, calls: int) -> list[dict[str, torch.Tensor]]:
    batches = [made.batch(seed) for seed in range(calls)]
    rows = {name: torch.cat([b[name] for b in batches]) for name in batches[0]}
    torch.save(rows, path)
    return batches


@pytest.mark.parametrize("name", ["bert-qa", "gpt2-lm"])
def test_a_bundle_trains_as_the_executable_in_process(
    name: str, tmp_path: Path, poptorch: Any
) -> None:
    made = case(name, replication_factor=2, gradient_accumulation_steps=8, output_mode="sum")
    rate = {"learning_rate": 1e-3, "eps": 1e-3}
    folder = _emit(made, tmp_path / "b", weight_decay=0.0, **rate)
    batches = _save_rows(made, tmp_path / "rows.pt", 3)
    weights = tmp_path / "weights"
    made.model.save_pretrained(weights)  # type: ignore[operator]
    _run_here(
        folder,
        *("--model", str(weights), "--data", str(tmp_path / "rows.pt")),
        *("--steps", "3", "--output", str(tmp_path / "out")),
    )

    def make(model: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3, weight_decay=0.0)

    with made.compile(make) as device:
        losses = [device.train_step(batch).loss for batch in batches]
    found = load_file(tmp_path / "out" / "model.safetensors")
    mine = made.model.state_dict()
    assert max(float((value - mine[n]).abs().max()) for n, value in found.items()) <= 1e-6
    assert json.loads((tmp_path / "out" / "losses.json").read_text()) == pytest.approx(
        losses, abs=1e-6
    )


def test_half_precision(tmp_path: Path, poptorch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    made = case("vit")
    settings = settings_for(made.plan, made.config, half=True, seed=1)
    text = made.model.config.to_json_string()  # type: ignore[union-attr,operator]
    _run_here(emit(made.plan, settings, tmp_path / "b", model_config=str(text)), "--steps", "2")
    assert "step 2: loss" in capsys.readouterr().out


def test_checking_only_and_made_up_rows(
    tmp_path: Path, poptorch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _emit(case(), tmp_path / "b")
    _run_here(folder, "--check-only")
    assert capsys.readouterr().out == "checked: 6 blocks, 2 stages\n"
    _run_here(folder, "--steps", "1", "--shuffle")
    assert "samples/s, compilation included" in capsys.readouterr().out


def _edit(folder: Path, before: str, after: str, file: str = "model_parallel.py") -> None:
    path = folder / file
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))


LAYER1 = '"bert.encoder.layer.1", stage=0, ipu=0'
LAYER2 = '"bert.encoder.layer.2", stage=1, ipu=1'
EDITS = {
    "order": (
        [(LAYER1, '"bert.encoder.layer.2", stage=0, ipu=0'), (LAYER2, LAYER1.replace("0", "1"))],
        r"'bert\.encoder\.layer\.2' \(stage 0\) runs after 'bert\.encoder\.layer\.1' \(stage 1\)",
    ),
    "back": (
        [('"qa_outputs", stage=1, ipu=1', '"qa_outputs", stage=0, ipu=0')],
        r"'qa_outputs' is in stage 0 after one in stage 1; stages must be 0, 1, 2",
    ),
    "first": (
        [("stage=1", "stage=2")] * 3 + [("stage=0", "stage=1")] * 3,
        r"the first stage is 1; begin with 0",
    ),
    "unknown block": (
        [('"bert.encoder.layer.1"', '"bert.encoder.layer.7"')],
        r"missing: bert\.encoder\.layer\.1; the plan has 6 blocks",
    ),
    "twice": (
        [('"bert.encoder.layer.1"', '"bert.encoder.layer.0"')],
        r"listed twice: bert\.encoder\.layer\.0",
    ),
    "two IPUs": (
        [(LAYER1, LAYER1.replace("ipu=0", "ipu=1"))],
        r"'bert\.encoder\.layer\.1' is on IPU 1, its stage 0 on IPU 0; a stage has one IPU",
    ),
    "beyond": (
        [("ipu=1", "ipu=2")] * 3,
        r"IPU 2 is used, a replica has 2 \(ipus_per_replica in settings\.json\)",
    ),
    "missing IPU": (
        [("ipu=1", "ipu=0")] * 3,
        r"no block is on IPU 1; a replica has 2 IPUs: place a block there",
    ),
    "evaluation": (
        [('"qa_outputs", stage=1, ipu=1)', '"qa_outputs", stage=1, ipu=1, inference=(0, 0, 1))')],
        r"inference: block 'qa_outputs' is in stage 0 after one in stage 1; stages must be 0, 1",
    ),
    "slices": (
        [('stage=0, ipu=0)', "stage=0, ipu=0, serialize=2)")],
        r"serialization factor 2 of 'bert\.embeddings' does not divide its 99 rows; divisors up "
        r"to 64: \[3, 9, 11, 33\]",
    ),
    "module": (
        [('"qa_outputs", stage=1, ipu=1)', '"qa_output", stage=1, ipu=1, name="qa_outputs")')],
        r"has no module 'qa_output'.*close names: qa_outputs",
    ),
    "not run": (
        [('"qa_outputs", stage=1, ipu=1)', '"bert.encoder", stage=1, ipu=1, name="qa_outputs")')],
        r"'qa_outputs' \(stage 1\)|does not run",
    ),
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_wrong_edits_are_caught_before_compiling(
    edit: str,
    tmp_path: Path,
    poptorch: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = _emit(case(), tmp_path / "b")
    changes, message = EDITS[edit]
    for before, after in changes:
        _edit(folder, before, after)
    _expect_refusal(folder, message, poptorch, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            '"gradient_accumulation_steps": 4',
            '"gradient_accumulation_steps": 2',
            r"gradient_accumulation_steps 2 is below 3 = 2 x 2 forward stages - 1",
        ),
        ('"ipus_per_replica": 2', '"ipus_per_replica": 4', r"no block is on IPU 2"),
    ],
)
def test_wrong_edits_of_the_settings(
    before: str,
    after: str,
    message: str,
    tmp_path: Path,
    poptorch: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = _emit(case(), tmp_path / "b")
    _edit(folder, before, after, "settings.json")
    _expect_refusal(folder, message, poptorch, monkeypatch, capsys)


def test_a_deleted_line(
    tmp_path: Path,
    poptorch: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = _emit(case(), tmp_path / "b")
    path = folder / "model_parallel.py"
    lines = [line for line in path.read_text().splitlines() if "layer.2" not in line]
    path.write_text("\n".join(lines))
    _expect_refusal(
        folder, r"missing: bert\.encoder\.layer\.2; the plan", poptorch, monkeypatch, capsys
    )


def test_a_right_edit_runs_on_the_other_ipu(tmp_path: Path, poptorch: Any) -> None:
    folder = _emit(case(), tmp_path / "b")
    _edit(folder, LAYER2, LAYER2.replace("stage=1, ipu=1", "stage=0, ipu=0"))
    _run_here(folder, "--steps", "1")


def _expect_refusal(
    folder: Path,
    message: str,
    poptorch: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(poptorch, "trainingModel", lambda *_: pytest.fail("it was compiled"))
    with pytest.raises(typer.Exit):
        _run_here(folder, "--steps", "1")
    said = capsys.readouterr().err
    assert said.startswith("error: "), said
    assert re.search(message, said), said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], r"must hold a dict of tensors by the model's input names"),
        ({"ids": torch.tensor(1)}, r"must hold a dict of tensors by the model's input names"),
        (
            {"a": torch.ones(3), "b": torch.ones(2)},
            r"different numbers of rows: \{'a': 3, 'b': 2\}",
        ),
        ({"input_ids": torch.ones(3, 16)}, r"has 3 rows, one call of the device takes 8 = micro"),
    ],
)
def test_wrong_data_files(
    content: Any,
    message: str,
    tmp_path: Path,
    poptorch: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.save(content, tmp_path / "rows.pt")
    folder = _emit(case(), tmp_path / "b")
    with pytest.raises(typer.Exit):
        _run_here(folder, "--data", str(tmp_path / "rows.pt"))
    assert re.search(message, capsys.readouterr().err)


def test_a_model_class_that_transformers_has_not(
    tmp_path: Path, poptorch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _emit(case(), tmp_path / "b")
    before = sha256((folder / "plan.json").read_bytes()).hexdigest()
    _edit(folder, '"BertForQuestionAnswering"', '"BertForNothing"', "plan.json")
    with pytest.raises(typer.Exit):
        _run_here(folder)
    assert "plan.json is not the plan that this bundle was written" in capsys.readouterr().err
    after = sha256((folder / "plan.json").read_bytes()).hexdigest()
    _edit(folder, before, after, "settings.json")
    with pytest.raises(typer.Exit):
        _run_here(folder)
    assert re.search(r"transformers .* has no BertForNothing", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("before", "after", "file", "message"),
    [
        ('"half": false', '"half": 0', "settings.json", "half is 0, must be true or false"),
        (": 5e-05", ": 1" + "0" * 400, "settings.json", "must be a number from 0 on"),
        ('"seed"', '"sed"', "settings.json", "settings.json: missing or unknown: sed, seed"),
        ("{", "[", "settings.json", "settings.json cannot be read: "),
        ("BLOCKS", "BLCKS", "model_parallel.py", "model_parallel.py cannot be read: KeyError"),
        ("stage=0", "stage=0.5", "model_parallel.py", "is 0.5; give a whole number from 0 on"),
        (
            "stage=0,",
            "stage=0, inference=(0, 1.5, 1),",
            "model_parallel.py",
            "inference of block 'bert.embeddings' is (0, 1.5, 1); give (stage, ipu, serialize)",
        ),
        ("{", "[", "config.json", "no model can be made of"),
    ],
)
def test_damaged_files_of_a_bundle_are_named(
    tmp_path: Path,
    poptorch: Any,
    capsys: pytest.CaptureFixture[str],
    before: str,
    after: str,
    file: str,
    message: str,
) -> None:
    folder = _emit(case(), tmp_path / "b")
    _edit(folder, before, after, file)
    with pytest.raises(typer.Exit):
        _run_here(folder)
    assert message in capsys.readouterr().err


def test_a_folder_for_weights_is_checked_first(
    tmp_path: Path, poptorch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _emit(case(), tmp_path / "b")
    (folder / "plan.json").write_text("damaged")
    for output, message in (("b", "is not empty; choose another"), ("b/run.py", "File exists")):
        with pytest.raises(typer.Exit):
            _run_here(folder, "--output", str(tmp_path / output))
        assert message in capsys.readouterr().err
