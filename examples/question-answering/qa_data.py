"""The questions that run_qa.py trains and evaluates on, as windows of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qa_options import Options

from ipu_pipeline.errors import DatasetError
from ipu_pipeline.tasks.question_answering import (
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
    training = split == "train"
    path = options.train_file if training else options.validation_file
    limit = options.max_train_samples if training else options.max_eval_samples
    if path is not None:
        return read_squad(path)[:limit]
    if split not in hub:
        raise DatasetError(
            f"data set {options.dataset_name!r} has no split {split!r}, only {', '.join(hub)}; "
            f"write that part to a SQuAD v1.1 file and pass both by --train_file and "
            "--validation_file"
        )
    return hub[split][:limit]


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
