"""What run.py checks before it compiles: a bundle may have been edited by hand."""

from __future__ import annotations

from typing import Any, Mapping, Sequence

import torch
from torch import nn

from .placement import calls_of, place


class BundleError(ValueError):
    """The bundle cannot run as it is."""


def check_blocks(
    blocks: Sequence[Mapping[str, Any]],
    planned: Sequence[str],
    settings: Mapping[str, Any],
) -> None:
    """Check the list of ``model_parallel.py`` by itself.

    Args:
        blocks: Its entries, in the order of the file.
        planned: Blocks of the plan, glue left out.
        settings: The object of ``settings.json``.

    Raises:
        BundleError: A block is missing, unknown or listed twice; stages are not 0, 1, 2, ... in
            the order of the file; a stage has two IPUs; an IPU between others is missing; the
            gradient accumulation is too small for the number of stages.
    """
    names = [block["block"] for block in blocks]
    _check_names(names, planned)
    _check_places(blocks, settings["ipus_per_replica"], "")
    if any(block["inference"] for block in blocks):
        there = [
            {
                **block,
                "stage": place(block, training=False)[0],
                "ipu": place(block, training=False)[1],
            }
            for block in blocks
        ]
        _check_places(there, settings["inference_ipus_per_replica"], "inference: ")
    ipus = [block["ipu"] for block in blocks]
    forward = 1 + sum(a != b for a, b in zip(ipus, ipus[1:]))
    least = 2 * forward - 1
    steps = settings["gradient_accumulation_steps"]
    if forward > 1 and steps < least:
        raise BundleError(
            f"settings.json: gradient_accumulation_steps {steps} is below {least} = 2 x {forward} "
            f"forward stages - 1, which the pipeline needs; use {least} or more"
        )


def check_order(
    model: nn.Module,
    blocks: Sequence[Mapping[str, Any]],
    modules: Mapping[str, nn.Module],
    batch: Mapping[str, Any],
) -> list[Mapping[str, Any]]:
    """Run the model once on the host and compare the order of its modules with the stages.

    A module that stands for several blocks runs them in turn, one per call.

    Returns:
        The blocks that run. Some transformers versions read a module's weight instead of calling
        it; such a block goes on in the block before it, if its stage has another one.

    Raises:
        BundleError: A module runs before one of an earlier stage, or no block of a stage runs.
    """
    called: list[str] = []
    of_module: dict[int, list[Mapping[str, Any]]] = {}
    for block in blocks:
        of_module.setdefault(id(modules[block["module"]]), []).append(block)
    turns = {module: calls_of(own) for module, own in of_module.items()}

    def note(module: nn.Module, _args: Any) -> None:
        left = turns[id(module)]
        called.extend(b["block"] for b in (left.pop(0) if len(left) > 1 else left[0]))

    distinct = {id(modules[block["module"]]): modules[block["module"]] for block in blocks}
    handles = [module.register_forward_pre_hook(note) for module in distinct.values()]
    try:
        with torch.no_grad():
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    stage_of = {block["block"]: block["stage"] for block in blocks}
    running = {stage_of[name] for name in called}
    for name, stage in stage_of.items():
        if stage not in running:
            raise BundleError(
                f"model_parallel.py: {name!r} does not run in the model's forward pass, and no "
                f"other block of stage {stage} does; correct its module, or join it to a stage"
            )
    there = {block["block"]: place(block, training=False)[0] for block in blocks}
    for mode, of_block in (("", stage_of), ("inference: ", there)):
        for before, after in zip(called, called[1:]):
            if of_block[after] < of_block[before]:
                raise BundleError(
                    f"model_parallel.py: {mode}{after!r} (stage {of_block[after]}) runs after "
                    f"{before!r} (stage {of_block[before]}); a later module cannot be in an "
                    "earlier stage"
                )
    return [block for block in blocks if block["block"] in called]


def _check_names(names: Sequence[str], planned: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    missing = [name for name in planned if name not in names]
    unknown = [name for name in names if name not in planned]
    for what, found in (
        ("listed twice", twice),
        ("missing", missing),
        ("not in the plan", unknown),
    ):
        if found:
            raise BundleError(
                f"model_parallel.py: {what}: {', '.join(found)}; the plan has {len(planned)} "
                "blocks, each needs one line"
            )


def _check_places(blocks: Sequence[Mapping[str, Any]], num_ipus: int, mode: str) -> None:
    """Check the stages and IPUs of training, or of another placement for evaluation."""
    where = "model_parallel.py: " + mode
    stages = [block["stage"] for block in blocks]
    for before, after, block in zip(stages, stages[1:], blocks[1:]):
        if after not in (before, before + 1):
            raise BundleError(
                f"{where}block {block['block']!r} is in stage {after} after one in stage "
                f"{before}; stages must be 0, 1, 2, ... in the order of execution"
            )
    if stages[0] != 0:
        raise BundleError(f"{where}the first stage is {stages[0]}; begin with 0")
    of_stage: dict[int, int] = {}
    for block in blocks:
        home = of_stage.setdefault(block["stage"], block["ipu"])
        if home != block["ipu"]:
            raise BundleError(
                f"{where}block {block['block']!r} is on IPU {block['ipu']}, its stage "
                f"{block['stage']} on IPU {home}; a stage has one IPU"
            )
    used, wanted = set(of_stage.values()), set(range(num_ipus))
    if used - wanted:
        raise BundleError(
            f"{where}IPU {max(used)} is used, a replica has {num_ipus} (ipus_per_replica in "
            "settings.json)"
        )
    if wanted - used:
        raise BundleError(
            f"{where}no block is on IPU {min(wanted - used)}; a replica has {num_ipus} IPUs: place "
            "a block there, or lower ipus_per_replica in settings.json"
        )
