"""The command line of run_vqa.py: what the scripts share, and what is particular to images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from script_options import CommonOptions

from ipu_pipeline.train.arguments import option

EASY_VQA = "easy-vqa"


@dataclass(kw_only=True)
class Options(CommonOptions):
    """Everything that run_vqa.py can be told; see ``run_vqa.py --help``."""

    file_format: ClassVar[str] = "Parquet or JSON with region features"

    model_name_or_path: str = option(
        help="LXMERT: hub name, local folder (with or without weights), or 'small' (new weights)."
    )
    dataset_name: str | None = option(
        default=None, help="'easy-vqa' (installed), a hub name, or a folder that datasets saved."
    )
    train_file: Path | None = option(default=None, help="Parquet or JSON file to train on.")
    validation_file: Path | None = option(default=None, help="Parquet or JSON file to evaluate on.")
    max_seq_length: int = option(default=20, help="Tokens of a question.")
    image_grid: int = option(default=4, help="Regions along each side of an image of easy-vqa.")
    replace_qa_head: bool = option(
        default=False, help="Give the model a new head for the data's answers."
    )
    unsplit: bool = option(
        default=False, help="Train the unsplit model in transformers' Trainer, to compare."
    )

    def _mistakes(self) -> tuple[tuple[bool, str], ...]:
        unused = [
            name
            for name in ("num_stages", "plan", "schedule", "ipu_config_name", "pod_type", "fp16",
                         "bf16", "resume_from_checkpoint", "ipu_config_overrides", "machine")
            if getattr(self, name)
        ]  # fmt: skip
        named = ", ".join(f"--{name}" for name in unused)
        return (
            *super()._mistakes(),
            (
                self.unsplit and (bool(unused) or self.target != "local"),
                f"--unsplit runs the whole model in float32 in this process, without a plan and "
                f"without checkpoints; leave out {named or '--target'}",
            ),
            (
                self.replace_qa_head and not self.do_train,
                "--replace_qa_head makes a new head, which has to be trained; add --do_train, or "
                "leave it out to evaluate the head that the model has",
            ),
        )
