"""The questions that run_qa.py trains and evaluates on, as windows of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qa_options import Options
from script_run import split_of

from tasks.question_answering import (
    QuestionAnsweringDataset,
    SquadExample,
    build_features,
    load_hub_squad,
    read_squad,
)


def read_split(
    options: Options, split: str, hub: Mapping[str, Sequence[SquadExample]]
) -> Sequence[SquadExample]:
    """Return the questions of ``train`` or ``validation``.

    Raises:
        DatasetError: The data set of the hub has no such split, or the file cannot be read.
    """
    path, limit = options.source(split)
    if path is not None:
        return read_squad(path)[:limit]
    return split_of(hub, split, options, "SQuAD v1.1 file")[:limit]


def load_windows(
    options: Options, tokenizer: Any
) -> tuple[QuestionAnsweringDataset | None, QuestionAnsweringDataset | None]:
    """Return the windows to train on and to evaluate on, ``None`` where there is no need.

    Raises:
        DatasetError: The data cannot be read.
        ValueError: It cannot be cut into windows of the given length.
    """
    hub = {}
    if options.dataset_name is not None:
        hub = load_hub_squad(options.dataset_name, options.dataset_config_name)

    def build(split: str) -> QuestionAnsweringDataset:
        return build_features(
            read_split(options, split, hub),
            tokenizer,
            max_seq_length=options.max_seq_length,
            doc_stride=options.doc_stride,
        )

    train = build("train") if options.do_train else None
    return train, build("validation") if options.evaluates else None
