"""Executables in files: ``save``, ``load`` and ``loadExecutable``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .enums import ConnectionType
from .errors import createPoptorchError
from .structure import map_leaves
from .version import __version__

_MAGIC = "poptorch-standin"


class _Example:
    """Shape and type of an input tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape = tuple(tensor.shape)
        self.dtype = tensor.dtype

    def tensor(self) -> Tensor:
        """Return zeros."""
        return torch.zeros(self.shape, dtype=self.dtype)


def examples_of(inputs: Any) -> Any:
    """Return the inputs with every tensor replaced by its shape and type."""
    return map_leaves(lambda v: _Example(v) if isinstance(v, Tensor) else v, inputs)


def inputs_like(examples: Any) -> Any:
    """Return inputs of zeros in the shapes that were compiled for."""
    return map_leaves(lambda v: v.tensor() if isinstance(v, _Example) else v, examples)


def write(content: dict[str, Any], filename: str) -> None:
    """Write an executable to a file; a folder gets ``model.poptorch``.

    The options are always written, the model only on request: what cannot be pickled of them
    raises what ``pickle`` raises.
    """
    target = Path(filename)
    if target.is_dir():
        target = target / "model.poptorch"
    torch.save({**content, "magic": _MAGIC, "version": __version__}, target)


def read(filename: str) -> dict[str, Any]:
    """Read an executable; it may run offline-compiled programs, so Never becomes Always.

    Raises:
        Error: Not an executable of this version of the stand-in.
    """
    target = Path(filename)
    if target.is_dir():
        target = target / "model.poptorch"
    # An executable holds the pickled model: only files of your own may be loaded, as upstream.
    content = torch.load(target, weights_only=False)
    if not isinstance(content, dict) or content.get("magic") != _MAGIC:
        raise createPoptorchError(f"{target} is not an executable of the poptorch stand-in")
    if content["version"] != __version__:
        raise createPoptorchError(
            f"{target} was written by version {content['version']}, this is {__version__}: the "
            "versions must match exactly"
        )
    options = content["options"]
    options._values.pop("ipu_version", None)
    if options.connection_type is ConnectionType.Never:
        options.connectionType(ConnectionType.Always)
    return content
