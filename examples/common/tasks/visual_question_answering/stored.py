"""Data sets with region features: from the hub, a folder that ``datasets`` saved, or a file.

Columns (other names that published data sets use in brackets): ``question``, ``visual_feats``
(``features``), ``visual_pos`` (``normalized_boxes``), ``label``; ``question_id`` if there is one.
Features stay on disk (VQA v2 has 130 GB of them) and are read question by question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ipu_pipeline.errors import DatasetError, shown
from tasks import samples
from tasks.samples import by_datasets, loading_data
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
        where: Names the data in messages.
    """

    rows: Any
    features: str
    boxes: str
    where: str

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        """Return features and boxes of the image of question ``row``.

        Raises:
            DatasetError: They are no finite numbers.
        """
        remedy = "give regions of numbers, all of one length"
        with by_datasets(f"{self.where} row {row}", remedy), np.errstate(over="ignore"):
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

    if path.suffix == ".parquet":
        if not path.is_file():
            raise DatasetError(f"{path} does not exist; pass a Parquet or JSON file")
        with by_datasets(f"{path} as Parquet", "write it with datasets or pyarrow"):
            return datasets.Dataset.from_parquet(str(path))
    if path.suffix not in (".json", ".jsonl"):
        raise DatasetError(f"{path} is no .parquet, .json or .jsonl file; write one of these")
    rows = samples.read_rows(path)
    with by_datasets(str(path), "give the rows columns of one kind"):
        return datasets.Dataset.from_list(rows)


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
    with by_datasets(where, "write its rows anew"):
        columns = {name: list(rows[names[name]]) for name in ("question", "label")}
        ids = list(rows[_IDS]) if _IDS in rows.column_names else list(range(len(rows)))
    labels = [read_label(v, f"{where} row {i}") for i, v in enumerate(columns["label"])]
    _check_each(columns["question"], str, "question", where)
    _check_each(ids, (int, str), _IDS, where)
    visual = [names["visual_feats"], names["visual_pos"]]
    return Questions(
        where,
        columns["question"],
        labels,
        StoredRegions(rows.with_format("numpy", columns=visual), *visual, where),
        ids,
        _named_answers(rows.features[names["label"]]),
    )


def _check_each(
    values: Sequence[Any], kind: type | tuple[type, ...], name: str, where: str
) -> None:
    for row, value in enumerate(values):
        if not isinstance(value, kind) or isinstance(value, bool):
            raise DatasetError(f"{where} row {row} has the {name} {shown(value)}; give each one")


def _column(rows: Any, meant: str, where: str) -> str:
    for name in COLUMNS[meant]:
        if name in rows.column_names:
            return name
    raise DatasetError(
        f"{where} has no column {' or '.join(map(repr, COLUMNS[meant]))}, only "
        f"{shown(list(rows.column_names))}; rename or add it"
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
    numbers = np.ascontiguousarray(np.asarray(array, dtype=np.float32))
    if not np.isfinite(numbers).all():
        raise ValueError("it holds numbers that are not finite")
    return torch.from_numpy(numbers)
