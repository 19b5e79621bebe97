"""What the front end refuses while it builds a program; each function returns a message, or ""."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch

from .graph import tensors_of

_NOT_THE_MODEL = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<")
_STANDARD = str(Path(copy.__file__).parent)
_HOST_READS = ("tolist", "numpy", "__array__", "equal", "allclose")
# Operations whose result has a shape that depends on values.
_DYNAMIC = (
    "nonzero nonzero_numpy masked_select _unique _unique2 unique_dim unique_consecutive "
    "unique_dim_consecutive"
)


def refused_call(name: str, args: Any, kwargs: Any) -> str:
    """Look at a call of the model before it is made."""
    if not any(value.is_meta for value in tensors_of((args, kwargs))):
        return ""
    copies_values = name in ("tensor", "as_tensor") and isinstance(args[0], (list, tuple))
    if name in _HOST_READS or copies_values:
        return _host_read(name)
    if name == "repeat_interleave" and kwargs.get("output_size") is None:
        return _dynamic_shape("aten::repeat_interleave without output_size")
    if name == "one_hot" and (args[1] if len(args) > 1 else kwargs.get("num_classes", -1)) < 0:
        return _dynamic_shape("aten::one_hot without num_classes")
    return ""


def refused_operation(name: str, calling: str, args: Any, kwargs: Any) -> str:
    """Look at an ``aten`` operation before its types are inferred.

    Args:
        name: Of the operation.
        calling: Name of the function that the model called.
        args: Of the operation.
        kwargs: Of the operation.
    """
    tensors = tensors_of((args, kwargs))
    on_host = [value for value in tensors if not value.is_meta]
    if len(on_host) == len(tensors):
        return ""
    if name in ("aten::_local_scalar_dense", "aten::equal", "aten::item"):
        return _host_read(calling)
    if _moves_to_host(name, args, kwargs):
        return (
            'A tensor was moved with .to("cpu") or .cpu() inside forward(): host operations '
            "cannot be part of the program; return it, or use poptorch.CPU"
        )
    if on_host and name != "aten::copy_":
        value = on_host[0]
        return (
            f"Expected an IPU tensor but got tensor(device=cpu, shape={list(value.shape)}, "
            f"dtype={value.dtype}) as an operand of {name}: make it a buffer or a parameter, "
            "or move it with .to() to the device of another tensor"
        )
    if name.split("::")[-1] in _DYNAMIC.split() or (name == "aten::index" and _has_mask(args[1])):
        return _dynamic_shape(name)
    if name == "aten::bincount" and not (args[2] if len(args) > 2 else kwargs.get("minlength")):
        return _dynamic_shape("aten::bincount without minlength")
    return ""


def _moves_to_host(name: str, args: Any, kwargs: Any) -> bool:
    if name == "aten::copy_":
        return not args[0].is_meta
    target = kwargs.get("device") if name == "aten::_to_copy" else None
    return target is not None and target.type != "meta"


def _host_read(name: str) -> str:
    return (
        f"aten::item is only supported in eager mode, but was intercepted in {name}(): forward() "
        "reads a tensor's value on the host"
    )


def _dynamic_shape(what: str) -> str:
    return (
        f"Type inference failed for {what}: the shape of the result depends on the values of a "
        "tensor, and a program has only static shapes"
    )


def _has_mask(indices: Any) -> bool:
    return any(value.dtype in (torch.bool, torch.uint8) for value in tensors_of(indices))


def called_by_torch() -> bool:
    """Tell whether Python code of torch itself, not the model's, asks for an attribute."""
    frame: Any = sys._getframe(1)
    while frame.f_code.co_filename.startswith(_NOT_THE_MODEL[1]):
        frame = frame.f_back
    return bool(frame.f_code.co_filename.startswith(_NOT_THE_MODEL[0]))


def place_in_model() -> str:
    """Return file and line of the innermost frame that is no library's of ours or Python's."""
    frame: Any = sys._getframe(1)
    while frame is not None and not _is_the_model(frame.f_code.co_filename):
        frame = frame.f_back
    return "the model" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _is_the_model(path: str) -> bool:
    standard = path.startswith(_STANDARD) and "site-packages" not in path
    return not standard and not path.startswith(_NOT_THE_MODEL)
