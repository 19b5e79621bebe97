"""The command line of run_qa.py: what the scripts share, and what is particular to windows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from script_options import CommonOptions

from ipu_pipeline.train.arguments import option
from tasks.features import PACK_HELP


@dataclass(kw_only=True)
class Options(CommonOptions):
    """Everything that run_qa.py can be told; see ``run_qa.py --help``."""

    file_format: ClassVar[str] = "SQuAD v1.1 JSON"

    model_name_or_path: str = option(help="Hub name, local folder, or 'minilm' (installed).")
    dataset_name: str | None = option(
        default=None, help="SQuAD-like data set of the hub, such as squad."
    )
    train_file: Path | None = option(default=None, help="SQuAD v1.1 JSON file to train on.")
    validation_file: Path | None = option(default=None, help="SQuAD v1.1 JSON file to evaluate on.")
    max_seq_length: int = option(default=384, help="Tokens of a window: question and context.")
    doc_stride: int = option(default=128, help="Tokens by which windows of a long context overlap.")
    pack: bool = option(default=False, help=PACK_HELP)
    n_best_size: int = option(
        default=20, help="Answers kept per question in nbest_predictions.json."
    )
    max_answer_length: int = option(default=30, help="Longest answer, in tokens.")
