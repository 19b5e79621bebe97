"""Runs the scripts under ``scripts/`` with either trainer class: one import line is changed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import TrainingArguments

from ipu_pipeline.train.trainer import PipelineSeq2SeqTrainer, PipelineTrainer

# Its name in older transformers is the second.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)

SCRIPTS = Path(__file__).parent / "scripts"
THEIRS = "from transformers import Trainer  # isort: skip\n"
OURS = "from ipu_pipeline.train.trainer import PipelineTrainer as Trainer\n"
TWO_STAGES = "from tests.train.helpers import TwoStagesTrainer as Trainer\n"
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


class _TwoStages:
    """What a user writes as ``num_stages=2``: the tiny models are fastest in one stage."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"num_stages": 2} | kwargs)


class TwoStagesTrainer(_TwoStages, PipelineTrainer):
    pass


class TwoStagesSeq2SeqTrainer(_TwoStages, PipelineSeq2SeqTrainer):
    pass


def load_script(name: str, line: str = THEIRS) -> ModuleType:
    """Return the script as a module, with ``line`` in place of its import of the trainer."""
    source = (SCRIPTS / f"{name}.py").read_text()
    assert source.count(THEIRS) == 1
    module = ModuleType(f"script_{name}")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(compile(source.replace(THEIRS, line), name, "exec"), module.__dict__)
    return module


def run_script(name: str, output_dir: Path, line: str = THEIRS, **options: Any) -> Any:
    """Run the script's ``main`` with these command line options; return its trainer."""
    argv = ["--output_dir", str(output_dir)]
    for option, value in {**QUIET, **options}.items():
        argv += [f"--{option}", str(value)]
    return load_script(name, line).main(argv)


def losses(trainer: Any, name: str = "loss") -> list[float]:
    """Return the logged values of one name."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]
