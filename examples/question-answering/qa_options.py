"""The command line of run_qa.py: what the scripts share, and what is particular to windows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from script_options import CommonOptions


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """Everything that run_qa.py can be told; see ``run_qa.py --help``."""

    file_format: ClassVar[str] = "SQuAD v1.1 JSON"

    model_name_or_path: Annotated[str, "Hub name, local folder, or 'minilm' (installed)."]
    dataset_name: Annotated[str | None, "SQuAD-like data set of the hub, such as squad."] = None
    train_file: Annotated[Path | None, "SQuAD v1.1 JSON file to train on."] = None
    validation_file: Annotated[Path | None, "SQuAD v1.1 JSON file to evaluate on."] = None
    max_seq_length: Annotated[int, "Tokens of a window: question and context."] = 384
    doc_stride: Annotated[int, "Tokens by which windows of a long context overlap."] = 128
    n_best_size: Annotated[int, "Answers kept per question in nbest_predictions.json."] = 20
    max_answer_length: Annotated[int, "Longest answer, in tokens."] = 30
