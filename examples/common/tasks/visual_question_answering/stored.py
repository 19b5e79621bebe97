"""Data sets with region features: from the hub, a folder that ``datasets`` saved, or a file.

Columns (other names that published data sets use in brackets): ``question``, ``visual_feats``
(``features``), ``visual_pos`` (``normalized_boxes``), ``label``; ``question_id`` if there is one.
Features stay on disk (VQA v2 has 130 GB of them) and are read question by question.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ipu_pipeline.errors import DatasetError
from tasks import samples
from tasks.samples import loading_data
from tasks.visual_question_answering.answers import AnswerSet, read_label
from tasks.visual_question_answering.dataset import Questions

COLUMNS = {
    "question": ("question",),
    "visual_feats": ("visual_feats", "features"),
    "visual_pos": ("visual_pos", "normalized_boxes"),
    "label": ("label", "labels"),
}
_IDS = "question_id"


@dataclass(frozen=True)
class StoredRegions:
    """Regions that are read from a table on disk when they are asked for.

    Attributes:
        rows: A ``datasets.Dataset`` that gives numpy arrays.
        features: Name of the column of features.
        boxes: Name of the column of boxes.
    """

    rows: Any
    features: str
    boxes: str

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        """Return features and boxes of the image of question ``row``."""
        found = self.rows[row]
        return _tensor(found[self.features]), _tensor(found[self.boxes])


def load_splits(name: str, config_name: str | None = None) -> dict[str, Any]:
    """Load every split of a data set through the ``datasets`` library.

    Args:
        name: Hub name, a folder that ``save_to_disk`` wrote, or one that ``datasets`` can load.
        config_name: Its configuration, if it has several.

    Returns:
        The rows of every split, under the split's name; a saved single split is ``train``.

    Raises:
        DatasetError: It cannot be loaded: offline and not cached, or unknown.
    """
    import datasets

    instead = (
        "'easy-vqa' (installed), a folder that datasets saved, or --train_file and "
        "--validation_file"
    )
    with loading_data(name, instead):
        if Path(name, "dataset_dict.json").is_file() or Path(name, "state.json").is_file():
            found = datasets.load_from_disk(name)
        else:
            found = datasets.load_dataset(name, config_name)
    return dict(found) if isinstance(found, Mapping) else {"train": found}


def load_file(path: Path) -> Any:
    """Load the rows of a Parquet file, or of JSON: a list, ``{"data": [...]}``, or lines.

    Raises:
        DatasetError: It is missing, of another kind, damaged or empty.
    """
    import datasets

    if not path.is_file():
        raise DatasetError(f"{path} does not exist; pass a Parquet or JSON file")
    if path.suffix == ".parquet":
        try:
            return datasets.Dataset.from_parquet(str(path))
        except (OSError, ValueError, RuntimeError) as error:
            raise DatasetError(f"{path} cannot be read as Parquet ({error})") from error
    if path.suffix not in (".json", ".jsonl"):
        raise DatasetError(f"{path} is no .parquet, .json or .jsonl file; write one of these")
    return datasets.Dataset.from_list(samples.read_rows(path))


def read_rows(rows: Any, where: str, limit: int | None = None) -> Questions:
    """Return the questions of a table.

    Args:
        rows: A ``datasets.Dataset`` with the columns at the top of this file.
        where: Names it in messages.
        limit: Use only so many of the first rows.

    Raises:
        DatasetError: A column is missing, there is no row, or a label is not understood.
    """
    names = {meant: _column(rows, meant, where) for meant in COLUMNS}
    rows = rows if limit is None else rows.select(range(min(limit, len(rows))))
    if not len(rows):
        raise DatasetError(f"{where} holds no question; give at least one")
    labels = [read_label(v, f"{where} row {i}") for i, v in enumerate(rows[names["label"]])]
    visual = [names["visual_feats"], names["visual_pos"]]
    ids = list(rows[_IDS]) if _IDS in rows.column_names else list(range(len(rows)))
    return Questions(
        where,
        list(rows[names["question"]]),
        labels,
        StoredRegions(rows.with_format("numpy", columns=visual), *visual),
        ids,
        _named_answers(rows.features[names["label"]]),
    )


def _column(rows: Any, meant: str, where: str) -> str:
    for name in COLUMNS[meant]:
        if name in rows.column_names:
            return name
    raise DatasetError(
        f"{where} has no column {' or '.join(map(repr, COLUMNS[meant]))}, only "
        f"{', '.join(rows.column_names)}; rename or add it"
    )


def _named_answers(feature: Any) -> AnswerSet | None:
    """Return the texts of numbered answers, from a class label or a list of class labels."""
    if isinstance(feature, Mapping):
        feature = feature.get("ids")
    while hasattr(feature, "feature"):
        feature = feature.feature
    names = getattr(feature, "names", None)
    return AnswerSet(tuple(names)) if names else None


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.asarray(array, dtype=np.float32)))
