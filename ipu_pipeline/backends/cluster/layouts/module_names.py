"""The modules of stages by the names of torchtitan's models and of transformers' own.

Both frameworks take ``module_fqns_per_model_part``: the names of the modules that every virtual
stage keeps. Their models are an embedding, layers, a norm and a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ipu_pipeline.backends.cluster.layouts.megatron_layout import LayerLayout, layout_of, letters_of
from ipu_pipeline.errors import PlanError, shown
from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.ir.limits import count_of
from ipu_pipeline.ir.plan import Plan

MODULES = "module_fqns_per_model_part"
_OWN_NAMES = ("embed_tokens", "norm", "lm_head")
Stages = tuple[tuple[str, ...], ...]


def checked_layout(plan: Plan) -> LayerLayout:
    """Return the layout of a plan, one that Megatron trains."""
    layout = layout_of(plan.graph, [stage.blocks for stage in plan.stages])
    layout.check()
    return layout


def module_names(plan: Plan, framework: str) -> Stages:
    """Return the modules of every stage by the names of a framework's own models."""
    checked_layout(plan)
    named = _names(plan.graph, framework)
    prefix = _prefix(plan.graph)
    everywhere = (f"{prefix}rotary_emb",) if framework == "automodel" else ()
    return tuple(
        (*(name for block in stage.blocks for name in named.get(block, ())), *everywhere)
        for stage in plan.stages
    )


def _prefix(graph: BlockGraph) -> str:
    layer = next(block for block in graph.blocks if block.kind == "layer")
    return str(layer.module).rpartition("layers.")[0]


def _names(graph: BlockGraph, framework: str) -> dict[str, tuple[str, ...]]:
    """Return a framework's names of the modules of every block.

    Raises:
        PlanError: The model is not an embedding, layers, a norm and a head.
    """
    letters = letters_of(graph)
    if "m" in letters:
        raise PlanError(
            f"{framework} names no multi-token prediction layers; write the layout without m"
        )
    owned = {block.module for block in graph.blocks if block.module}
    roles: dict[str, list[tuple[str, str]]] = {}
    number = 0
    for block, letter in zip(graph.blocks, letters, strict=True):
        role = {"E": "tok_embeddings", "t": f"layers.{number}", "L": "lm_head"}[letter]
        own = [(block.module, role)] if block.module else []
        number += letter == "t"
        owners = dict.fromkeys(fqn.rpartition(".")[0] for fqn in block.parameters)
        own += [(fqn, "norm") for fqn in owners
                if not any(f"{fqn}.".startswith(f"{module}.") for module in owned)]  # fmt: skip
        roles[block.name] = own
    _check_structure(graph, framework, [pair for own in roles.values() for pair in own], number)
    kept = 1 if framework == "torchtitan" else 0
    return {name: tuple(pair[kept] for pair in own) for name, own in roles.items()}


def _check_structure(
    graph: BlockGraph, framework: str, found: list[tuple[str, str]], number: int
) -> None:
    wanted = ["tok_embeddings", *(f"layers.{n}" for n in range(number)), "norm", "lm_head"]
    others = [fqn for fqn, role in found if not role.startswith("layers.")]
    strange = [fqn for fqn in others if fqn.rpartition(".")[2] not in _OWN_NAMES]
    if [role for _, role in found] != wanted or (framework != "torchtitan" and strange):
        raise PlanError(
            f"{graph.model_class} has {count_of(number, 'layer')} and {', '.join(others)[:200]}; "
            f"{framework} pipelines have layers and one each of {', '.join(_OWN_NAMES)}: use "
            "format megatron, or such a model"
        )


def stages_of_modules(own: Mapping[str, Any], framework: str) -> Callable[[BlockGraph], Stages]:
    """Return what finds the blocks of every stage that a file names.

    Raises:
        PlanError: It holds no list of names for every stage.
    """
    raw = own.get(MODULES)
    if not isinstance(raw, list) or not all(
        isinstance(part, list) and all(isinstance(name, str) for name in part) for part in raw
    ):
        raise PlanError(f"{MODULES} must hold a list of names for every stage, got {shown(raw)}")
    return partial(_stages_of, raw, framework)


def _stages_of(raw: list[list[str]], framework: str, graph: BlockGraph) -> Stages:
    """Return the blocks of every stage; one without a module of its own follows the one before."""
    named = _names(graph, framework)
    block_of = {names[0]: block for block, names in named.items() if names}
    placed: dict[str, int] = {}
    for number, part in enumerate(raw):
        for name in part:
            if name in block_of and placed.setdefault(block_of[name], number) != number:
                raise PlanError(
                    f"{MODULES} has {name} in stages {placed[block_of[name]]} and {number}; keep "
                    "one"
                )
            if name not in block_of and name.rpartition(".")[2] not in ("rotary_emb", "norm"):
                raise PlanError(
                    f"{MODULES} names {shown(name)}, which {graph.model_class} has not; its "
                    f"modules are {', '.join(list(block_of)[:3])}, ..."
                )
    missing = [name for name, block in block_of.items() if block not in placed]
    if missing:
        raise PlanError(f"{MODULES} lacks {missing[0]}; put it into a stage")
    stages: list[list[str]] = [[] for _ in raw]
    at = 0
    for block in graph.block_index:
        at = placed.get(block, at)
        stages[at].append(block)
    return tuple(map(tuple, stages))
