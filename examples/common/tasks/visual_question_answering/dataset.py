"""Questions about images as tensors: tokens, region features, boxes, labels, all of one length.

Shapes are static, as IPUs and captured graphs need. Axes: ``N`` questions, ``L`` tokens, ``R``
regions of an image, ``F`` features of a region, ``A`` answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ipu_pipeline.errors import DatasetError
from tasks.visual_question_answering.answers import AnswerSet, GivenLabel, Labels

BOX_NUMBERS = 4


class Regions(Protocol):
    """Where the regions of a question's image are read."""

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        """Return features ``RF`` and boxes ``R4`` (float32) of the image of a question."""
        ...


@dataclass(frozen=True)
class RegionTable:
    """Regions in memory, once per image.

    Attributes:
        features_IRF: Features of every image ``I``.
        boxes_R4: Boxes, the same in every image.
        images: The image of each question.
    """

    features_IRF: Tensor
    boxes_R4: Tensor
    images: Sequence[int]

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        """Return features and boxes of the image of question ``row``."""
        return self.features_IRF[self.images[row]], self.boxes_R4


@dataclass(frozen=True)
class Questions:
    """What one split of a data set holds, before a model is known.

    Attributes:
        where: Names it in messages.
        questions: The texts.
        labels: One per question.
        regions: One image's regions per question.
        ids: One per question, unique.
        answers: The texts of numbered answers, where the data names them.
    """

    where: str
    questions: Sequence[str]
    labels: Sequence[GivenLabel]
    regions: Regions
    ids: Sequence[int | str]
    answers: AnswerSet | None = None

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def region_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the first question's features and boxes."""
        features, boxes = self.regions[0]
        return tuple(features.shape), tuple(boxes.shape)


class VisualQuestionAnsweringDataset(Dataset[dict[str, Tensor]]):
    """Questions, ready for a model; an item is a dict of tensors without batch axis.

    Attributes:
        tokens: ``input_ids``, ``attention_mask``, ``token_type_ids``, shape ``NL``, int64.
        regions: Of every question.
        labels: Of every question.
        ids: Of every question.
    """

    def __init__(
        self,
        tokens: dict[str, Tensor],
        regions: Regions,
        labels: Labels,
        ids: Sequence[int | str],
        where: str,
    ) -> None:
        self.tokens = tokens
        self.regions = regions
        self.labels = labels
        self.ids = ids
        self._where = where
        self._shapes = [tuple(part.shape) for part in regions[0]]

    def __len__(self) -> int:
        """Return the number of questions."""
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one question.

        Raises:
            DatasetError: Its image has other numbers of regions or features than the first one.
        """
        features, boxes = self.regions[index]
        shapes = [tuple(features.shape), tuple(boxes.shape)]
        if shapes != self._shapes:
            raise DatasetError(
                f"{self._where} row {index} has regions and boxes of shapes {shapes}, row 0 of "
                f"{self._shapes}; give every image the same number of regions"
            )
        item = {name: column[index] for name, column in self.tokens.items()}
        return {
            **item,
            "visual_feats": features,
            "visual_pos": boxes,
            "labels": self.labels[index],
        }

    def head(self, size: int) -> dict[str, Tensor]:
        """Return the first ``size`` questions as one batch."""
        items = [self[index] for index in range(min(size, len(self)))]
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def build_dataset(
    split: Questions,
    tokenizer: Any,
    answers: AnswerSet,
    *,
    max_seq_length: int,
    region_features: int,
) -> VisualQuestionAnsweringDataset:
    """Tokenise the questions, number the answers, and check that the regions fit the model.

    Args:
        split: At least one question.
        tokenizer: Of transformers; questions are cut and padded to one length.
        answers: What the model chooses from.
        max_seq_length: Tokens of a question, special ones included.
        region_features: Features of a region that the model reads (its ``visual_feat_dim``).

    Raises:
        DatasetError: The data holds no question, its regions have another number of features, or
            a label does not fit the answers.
        ValueError: The length exceeds what the tokenizer says that the model takes.
    """
    if not len(split):
        raise DatasetError(f"{split.where} holds no question; give at least one")
    if max_seq_length > tokenizer.model_max_length:
        raise ValueError(
            f"max_seq_length {max_seq_length} exceeds the {tokenizer.model_max_length} tokens "
            "that the model takes; lower --max_seq_length"
        )
    _check_regions(split, region_features)
    encoded = tokenizer(
        list(split.questions),
        truncation=True,
        max_length=max_seq_length,
        padding="max_length",
        return_tensors="pt",
    )
    return VisualQuestionAnsweringDataset(
        dict(encoded),
        split.regions,
        Labels.of(split.labels, answers, split.where),
        split.ids,
        split.where,
    )


def _check_regions(split: Questions, region_features: int) -> None:
    features, boxes = split.region_shapes
    if len(features) != 2 or boxes != (features[0], BOX_NUMBERS):
        raise DatasetError(
            f"{split.where} has region features of shape {features} and boxes of shape {boxes}; "
            "each image needs (regions, features) and (regions, 4)"
        )
    if features[1] != region_features:
        raise DatasetError(
            f"{split.where} has {features[1]} features per region, the model reads "
            f"{region_features} (visual_feat_dim of its config.json); use features of the "
            "detector that the model was trained with, or train a model without weights, which "
            "takes the width from the data"
        )
