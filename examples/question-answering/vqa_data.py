"""The questions that run_vqa.py trains and evaluates on, before and after the model is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from easy_vqa_data import read_easy_vqa
from script_run import split_of
from vqa_options import EASY_VQA, Options

from tasks.visual_question_answering import (
    AnswerSet,
    Questions,
    VisualQuestionAnsweringDataset,
    build_dataset,
    load_file,
    load_splits,
    read_rows,
)


@dataclass(frozen=True)
class Splits:
    """What is trained and evaluated on; ``None`` where there is no need for it."""

    train: Questions | None
    validation: Questions | None

    @property
    def any(self) -> Questions:
        """A split that is there."""
        found = self.train or self.validation
        assert found is not None  # the options refuse to do neither training nor evaluation
        return found

    @property
    def soft(self) -> bool:
        """Whether the labels are soft."""
        return any(label.soft for label in self.any.labels)

    def answers(self) -> AnswerSet:
        """Return the answers of the data: those that it names, else all that its labels do."""
        if self.any.answers is not None:
            return self.any.answers
        splits = [split for split in (self.train, self.validation) if split is not None]
        return AnswerSet.of_labels(label for split in splits for label in split.labels)

    def build(
        self, options: Options, tokenizer: Any, answers: AnswerSet, region_features: int
    ) -> tuple[VisualQuestionAnsweringDataset | None, VisualQuestionAnsweringDataset | None]:
        """Return both splits as tensors for a model."""

        def one(split: Questions | None) -> VisualQuestionAnsweringDataset | None:
            if split is None:
                return None
            return build_dataset(
                split,
                tokenizer,
                answers,
                max_seq_length=options.max_seq_length,
                region_features=region_features,
            )

        return one(self.train), one(self.validation)


def read_splits(options: Options) -> Splits:
    """Read the questions of ``--dataset_name``, or of the files.

    Raises:
        DatasetError: They cannot be read.
    """
    stored = {}
    if options.dataset_name not in (None, EASY_VQA):
        stored = load_splits(str(options.dataset_name), options.dataset_config_name)
    return Splits(
        _read(options, "train", stored) if options.do_train else None,
        _read(options, "validation", stored) if options.evaluates else None,
    )


def _read(options: Options, split: str, stored: Mapping[str, Any]) -> Questions:
    path, limit = options.source(split)
    if options.dataset_name == EASY_VQA:
        return read_easy_vqa(split, limit, options.image_grid)
    if path is not None:
        return read_rows(load_file(path), str(path), limit)
    rows = split_of(stored, split, options)
    return read_rows(rows, f"{options.dataset_name}[{split}]", limit)
