"""Pictures and sounds that rows name or hold, read when they are needed.

Axes: ``T`` samples of a sound.
"""

from __future__ import annotations

import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from ipu_pipeline.errors import DatasetError, first_line
from tasks.samples import Row, Rows, in_data

Sound_T = npt.NDArray[np.float32]


class MediaDataset(Dataset[dict[str, Any]]):
    """Rows whose features are made when they are read.

    Args:
        rows: The samples.
        where: Name of their file or data set, for messages.
        features: Makes those of a row.
    """

    def __init__(self, rows: Rows, where: str, features: Callable[[Row], dict[str, Any]]) -> None:
        self.rows, self.where, self.features = rows, where, features

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the features of one sample."""
        with in_data(f"{self.where}, row {index}"):
            return self.features(self.rows[index])


def read_picture(value: Any, folder: Path) -> Any:
    """Return a picture in three colours.

    Args:
        value: A picture of PIL, or the name of its file.
        folder: Where a relative name begins.

    Raises:
        DatasetError: It cannot be read.
    """
    from PIL import Image

    try:
        picture = Image.open(folder / value) if isinstance(value, str) else value
        return picture.convert("RGB")
    except (OSError, AttributeError) as error:
        raise DatasetError(
            f"picture {str(value)[:80]} cannot be read ({first_line(error)[:200]}); a row holds "
            "the name of a picture's file, as seen from its own"
        ) from error


def read_sound(value: Any, folder: Path, rate: int) -> Sound_T:
    """Return a sound as samples within -1 and 1; several channels as their mean.

    Args:
        value: The name of a wav file of 16 bits, or a dict of ``array`` and ``sampling_rate``.
        folder: Where a relative name begins.
        rate: Samples per second that the model was made for.

    Raises:
        DatasetError: It cannot be read, or has another rate.
    """
    try:
        if isinstance(value, str):
            with wave.open(str(folder / value), "rb") as file:
                found, width = file.getframerate(), file.getsampwidth()
                stored = np.frombuffer(file.readframes(file.getnframes()), "<i2")
                sound_T = stored.reshape(-1, file.getnchannels()).mean(axis=1) / 32768
        else:
            found, width = value["sampling_rate"], 2
            sound_T = np.asarray(value["array"])
    except (OSError, EOFError, ValueError, TypeError, KeyError, wave.Error) as error:
        raise DatasetError(
            f"sound {str(value)[:80]} cannot be read ({first_line(error)[:200]}); a row names a "
            "name of a wav file of 16 bits, as seen from its own"
        ) from error
    if found != rate or width != 2:
        raise DatasetError(
            f"sound {str(value)[:80]} has {found} samples per second of {8 * width} bits, the "
            f"model takes {rate} of 16; convert it, as by 'sox IN.wav -r {rate} -b 16 OUT.wav'"
        )
    return sound_T.astype(np.float32)
