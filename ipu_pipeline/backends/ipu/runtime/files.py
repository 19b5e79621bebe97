"""The files of a bundle, checked: they may have been edited by hand, or be damaged."""

from __future__ import annotations

import hashlib
import json
import runpy
from pathlib import Path
from typing import Any, Mapping

from .checks import BundleError
from .messages import Test, is_text, or_none

_DTYPES = ("float16", "float32")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def _number(value: Any) -> bool:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return plain and 0 <= value <= 1e30  # no NaN is


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _each(test: Test) -> Test:
    return lambda value: isinstance(value, list) and all(map(test, value))


def _one_of(*names: str) -> Test:
    return lambda value: value in names


# Names of fields by what they must be.
_FIELDS: dict[str, tuple[Test, str]] = {
    "micro_batch_size num_stages ipus_per_replica replication_factor gradient_accumulation_steps "
    "device_iterations inference_device_iterations inference_replication_factor "
    "inference_num_stages inference_ipus_per_replica": (
        _whole,
        "a whole number from 1 on",
    ),
    "recompute recompute_checkpoint_every_layer optimizer_state_offchip replicated_tensor_sharding "
    "enable_half_partials decompose_grad_sum auto_loss_scaling explicit_ir_inference half": (
        _flag,
        "true or false",
    ),
    "num_io_tiles": (or_none(_whole), "a whole number from 1 on, or null"),
    "learning_rate eps momentum weight_decay loss_scaling": (_number, "a number from 0 on"),
    "max_grad_norm": (or_none(_number), "a number from 0 on, or null"),
    "seed": (lambda seed: seed in (None, 0) or _whole(seed), "a whole number from 0 on, or null"),
    "memory_proportions inference_memory_proportions": (_each(_number), "a list of numbers"),
    "betas": (lambda betas: _each(_number)(betas) and len(betas) == 2, "a list of two numbers"),
    "annotated_blocks": (_each(is_text), "a list of names"),
    "output_mode": (_one_of("final", "all", "sum", "default"), "final, all, sum or default"),
    "optimizer": (
        _one_of("AdamW", "Adam", "LAMB", "SGD", "RMSprop"),
        "AdamW, Adam, LAMB, SGD or RMSprop",
    ),
    "accum_dtype first_order_momentum_dtype second_order_momentum_dtype": (
        _one_of(*_DTYPES),
        "float16 or float32",
    ),
    "executable_cache_dir plan_sha256": (is_text, "a text"),
}
_TESTS = {name: test for names, test in _FIELDS.items() for name in names.split()}


def read_files(folder: Path) -> tuple[Any, Mapping[str, Any], Any]:
    """Return the plan, the settings and the blocks of a bundle.

    Raises:
        BundleError: A file cannot be read, a setting is wrong, or the plan was changed.
    """
    settings = _json(folder / "settings.json")
    if not isinstance(settings, dict) or set(settings) != set(_TESTS):
        names = set(settings) if isinstance(settings, dict) else set()
        wrong = ", ".join(sorted(map(str, names ^ set(_TESTS)))[:5])
        raise BundleError(f"settings.json: missing or unknown: {wrong:.200}; {_REMEDY}")
    for name, (test, wanted) in _TESTS.items():
        if not test(settings[name]):
            raise BundleError(f"settings.json: {name} is {settings[name]!r:.80}, must be {wanted}")
    plan = _json(folder / "plan.json")
    if hashlib.sha256((folder / "plan.json").read_bytes()).hexdigest() != settings["plan_sha256"]:
        raise BundleError(
            "plan.json is not the plan that this bundle was written from (plan_sha256 in "
            f"settings.json); move blocks in model_parallel.py, or {_REMEDY}"
        )
    return plan, settings, _blocks(folder)


_REMEDY = "write the bundle anew with ipu-pipeline emit"


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path.name} cannot be read: {error}; {_REMEDY}") from error


def _blocks(folder: Path) -> Any:
    try:
        blocks = runpy.run_path(str(folder / "model_parallel.py"))["BLOCKS"]
    except Exception as error:  # it is Python that somebody edits
        raise BundleError(
            f"model_parallel.py cannot be read: {type(error).__name__}: {error}"
        ) from error
    for block in blocks:
        for name in ("stage", "ipu"):
            if not isinstance(block[name], int) or block[name] < 0:
                raise BundleError(
                    f"model_parallel.py: {name} of block {block['block']!r} is "
                    f"{block[name]!r:.80}; give a whole number from 0 on"
                )
        rows = block.get("rows")
        if rows is not None and not (
            isinstance(rows, tuple)
            and len(rows) == 2
            and all(isinstance(n, int) for n in rows)
            and 0 <= rows[0] < rows[1]
        ):
            raise BundleError(
                f"model_parallel.py: rows of block {block['block']!r} are {rows!r:.80}; give "
                "(first, end), or leave them out"
            )
        other = block.get("inference")
        numbers = other is None or (
            isinstance(other, tuple)
            and len(other) == 3
            and all(isinstance(n, int) and n >= 0 for n in other)
            and other[2] > 0
        )
        if not numbers:
            raise BundleError(
                f"model_parallel.py: inference of block {block['block']!r} is {other!r:.80}; give "
                "(stage, ipu, serialize), whole numbers, or leave it out"
            )
    return blocks
