"""The command line of run_qa.py: what every script has, and what answering questions needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from common.options import CommonOptions


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """Everything that run_qa.py can be told; see ``run_qa.py --help``."""

    file_format: ClassVar[str] = "SQuAD v1.1 JSON"

    max_seq_length: Annotated[int, "Tokens of a window: question and context."] = 384
    doc_stride: Annotated[int, "Tokens by which windows of a long context overlap."] = 128
    n_best_size: Annotated[int, "Answers kept per question in nbest_predictions.json."] = 20
    max_answer_length: Annotated[int, "Longest answer, in tokens."] = 30
