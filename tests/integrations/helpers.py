"""Runs the scripts under ``scripts/`` with either trainer class: one import line is changed."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

SCRIPTS = Path(__file__).parent / "scripts"
THEIRS = "from transformers import Trainer\n"
OURS = "from ipu_pipeline.integrations.transformers import PipelineTrainer as Trainer\n"
QUIET = {
    "disable_tqdm": True,
    "report_to": "none",
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "save_strategy": "no",
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "learning_rate": 3e-3,
    "do_train": True,
    "do_eval": True,
}


def load_script(name: str, *, ours: bool) -> ModuleType:
    """Return the script as a module, with our class in place of transformers' if asked for."""
    source = (SCRIPTS / f"{name}.py").read_text()
    assert source.count(THEIRS) == 1
    module = ModuleType(f"{name}_{'ours' if ours else 'theirs'}")
    import sys

    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(compile(source.replace(THEIRS, OURS) if ours else source, name, "exec"), module.__dict__)
    return module


def run_script(name: str, output_dir: Path, *, ours: bool, **options: Any) -> Any:
    """Run the script's ``main`` with these command line options; return its trainer."""
    merged = {**QUIET, **options}
    argv = ["--output_dir", str(output_dir)]
    for option, value in merged.items():
        argv += [f"--{option}", str(value)]
    return load_script(name, ours=ours).main(argv)


def losses(trainer: Any, name: str = "loss") -> list[float]:
    """Return the logged values of one name."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]
