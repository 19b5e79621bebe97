"""The questions of the installed package ``easy-vqa``, its images as regions of a grid.

5,000 images of 64 x 64 pixels with one coloured shape; 38,575 questions to train and 9,673 to
test, 13 answers (https://github.com/vzhou842/easy-VQA). What was computed from the images is kept
on disk, in the folder of ``IPU_PIPELINE_CACHE`` or the user's cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ipu_pipeline.backends.local.measure.cache import cache_folder
from ipu_pipeline.errors import DatasetError, OutputError, first_line
from ipu_pipeline.ir.files import make_folder, write_bytes
from tasks.visual_question_answering import (
    AnswerSet,
    Questions,
    RegionTable,
    grid_regions,
    read_label,
)
from tasks.visual_question_answering import features as extractor

logger = logging.getLogger(__name__)
_IMAGES_PER_CALL = 500
_Floats = npt.NDArray[np.float32]


def read_easy_vqa(split: str, limit: int | None, cells: int) -> Questions:
    """Return the questions of ``train`` or ``validation`` (the package's test set).

    Args:
        split: Which.
        limit: Use only so many of the first questions.
        cells: Regions along each side of an image.

    Raises:
        DatasetError: The package is not installed.
        ValueError: The images do not divide into such a grid.
    """
    try:
        import easy_vqa
    except ImportError as error:
        raise DatasetError(
            "data set 'easy-vqa' is not installed; run 'pip install easy-vqa pillow'"
        ) from error
    training = split == "train"
    texts, answers, images = (
        easy_vqa.get_train_questions() if training else easy_vqa.get_test_questions()
    )
    paths: Mapping[int, str] = (
        easy_vqa.get_train_image_paths() if training else easy_vqa.get_test_image_paths()
    )
    order = sorted(set(images[:limit]))
    row_of_image = {image: row for row, image in enumerate(order)}
    features_IRF, boxes_R4 = _regions([Path(paths[image]) for image in order], cells)
    where = f"easy-vqa[{split}]"
    return Questions(
        where,
        texts[:limit],
        [read_label(answer, where) for answer in answers[:limit]],
        RegionTable(
            torch.from_numpy(features_IRF),
            torch.from_numpy(boxes_R4),
            [row_of_image[image] for image in images[:limit]],
        ),
        list(range(len(texts[:limit]))),
        AnswerSet(tuple(easy_vqa.get_answers())),
    )


def _regions(paths: Sequence[Path], cells: int) -> tuple[_Floats, _Floats]:
    """Return the regions of image files, from the cache if they were computed before."""
    kept = cache_folder() / f"regions-{_fingerprint(paths, cells)}.npz"
    if kept.is_file():
        try:
            with kept.open("rb") as file, np.load(file) as found:
                return found["features"], found["boxes"]
        except Exception as error:  # numpy and zipfile raise what they like of a damaged file
            logger.warning("%s is damaged, so it is made again: %s", kept, first_line(error))
    parts = []
    for first in range(0, len(paths), _IMAGES_PER_CALL):
        pixels = np.stack([_pixels(path) for path in paths[first : first + _IMAGES_PER_CALL]])
        features, boxes = grid_regions(pixels, cells)
        parts.append(features)
    _store(kept, features=np.concatenate(parts), boxes=boxes)
    return np.concatenate(parts), boxes


def _fingerprint(paths: Sequence[Path], cells: int) -> str:
    """Return a key of the files' names and sizes, of the grid, and of the extractor's code."""
    key = hashlib.sha256(Path(extractor.__file__).read_bytes())
    key.update(str(cells).encode())
    for path in paths:
        key.update(f"{path}|{path.stat().st_size}".encode())
    return key.hexdigest()[:24]


def _store(path: Path, **arrays: Any) -> None:
    """Write arrays whole or not at all; a folder that cannot be written is no error."""
    data = io.BytesIO()
    np.savez(data, **arrays)
    with contextlib.suppress(OutputError):
        write_bytes(make_folder("the cache", path.parent) / path.name, data.getvalue())


def _pixels(path: Path) -> npt.NDArray[np.uint8]:
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
