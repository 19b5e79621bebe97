"""What tensor parallelism cuts of a model, by transformers' plan, and what it refuses to cut."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from ipu_pipeline.capture.block_graph import expanded_plan
from ipu_pipeline.capture.leaves import choose_leaves
from ipu_pipeline.capture.patches import configs_of
from ipu_pipeline.checkpoint.slices import Slices
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.ir.plan import Granularity, Plan
from ipu_pipeline.stages.executable import ExecutionOptions
from ipu_pipeline.stages.stage import Stage
from ipu_pipeline.stages.tables import serialized


class _Style(NamedTuple):
    """What a style of transformers does to a module.

    Attributes:
        dim: Where its weights are cut; ``None``: nowhere.
        takes_slices: It is given slices.
        gives_slices: It returns slices.
        inside: It computes slices in itself, and puts them together.
        parts: Its weights are joined of so many, each of which is cut.
    """

    dim: int | None
    takes_slices: bool = False
    gives_slices: bool = False
    inside: bool = False
    parts: int = 1

    @property
    def is_closed(self) -> bool:
        """Whether all around it is whole, so that it may as well stay whole."""
        return not (self.takes_slices or self.gives_slices or self.inside)


STYLES: Mapping[str, _Style] = {
    "colwise": _Style(-2, gives_slices=True),
    "colwise_gather_output": _Style(-2),
    "colwise_rep": _Style(-2),
    "embedding_colwise": _Style(-1),
    "embedding_rowwise": _Style(-2),
    "moe_tp_experts": _Style(None, inside=True),
    "packed_colwise": _Style(-2, gives_slices=True, parts=2),
    "packed_rowwise": _Style(-1, takes_slices=True, parts=2),
    "replicated_with_grad_allreduce": _Style(None),
    "rowwise": _Style(-1, takes_slices=True),
    "rowwise_rep": _Style(-1),
    "rowwise_split_input": _Style(-1),
}
# What the modules that cut heads call the size of one.
_HEAD_SIZES = ("head_dim", "attention_head_size", "head_size")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Use(NamedTuple):
    """A parameter as a module has it; ``around`` is what the module is part of."""

    path: str
    module: nn.Module
    name: str
    style: str
    around: nn.Module


class Cuts(Protocol):
    """Which parameters ranks have slices of, why, and how that is avoided."""

    what: str
    remedy: str

    def is_cut(self, parameter: nn.Parameter) -> bool:
        """Whether ranks get slices of ``parameter``."""


@dataclass(frozen=True)
class CutPlan(Cuts):
    """What is cut of the products of matrices.

    Attributes:
        parameters: Module, name of the parameter in it, and style.
        modules: Module and style of those whose calls are wrapped.
        blocks: Blocks that are cut inside, by their names.
    """

    what = "tensor parallelism"
    remedy = "plan with tp 1"
    parameters: tuple[tuple[nn.Module, str, str], ...] = ()
    modules: tuple[tuple[nn.Module, str], ...] = ()
    blocks: Mapping[str, nn.Module] = field(default_factory=dict)

    def is_cut(self, parameter: nn.Parameter) -> bool:
        """Whether ranks get slices of ``parameter``."""
        return any(module._parameters[name] is parameter for module, name, _ in self.parameters)


def cut_plan(model: nn.Module, plan: Plan, tp: int) -> CutPlan:
    """Return what is cut of ``model`` for ``tp`` ranks; nothing for one.

    Raises:
        LoweringError: The model has no plan, or it cuts what cannot be cut, or not into so many.
    """
    if tp == 1:
        return CutPlan()
    if not _has_styles():
        raise LoweringError(
            "tensor parallelism needs the styles of transformers 5.21, and this is "
            f"{transformers.__version__}; update it, or plan with tp 1"
        )
    styles = _expanded(model)
    unknown = sorted(set(styles.values()) - set(STYLES))
    if not styles or unknown:
        why = (
            f"uses {', '.join(unknown)}, which is not supported: the styles are {', '.join(STYLES)}"
            if unknown
            else "is empty"
        )
        raise LoweringError(
            f"{type(model).__name__}.tp_plan {why}, so that its weights cannot be cut for tp "
            f"{tp}; set model.tp_plan, or plan with tp 1"
        )
    sliced = [*serialized(plan), *(name for s in plan.stages for name in s.table_slices)]
    if sliced:
        raise LoweringError(
            f"the plan runs {sliced[0]} in slices one after another or over stages, and tp {tp} "
            "cuts weights already; plan without serialize_ and spread_ passes, or with tp 1"
        )
    for config in configs_of(model):
        refuse_attentions(getattr(config, "output_attentions", False))
    modules = dict(model.named_modules())
    for path in styles.keys() & modules.keys():
        _check_module(path, modules[path], styles[path], tp)
    uses = list(_whole_where_shared(model, _uses(modules, styles)))
    for use in uses:
        _check_parameter(use, tp)
    cut = {use.path for use in uses}
    called = {
        path: style
        for path, style in styles.items()
        if path in modules and (path in cut or STYLES[style].dim is None)
    }
    for use in uses:
        if use.path not in called:
            raise LoweringError(
                f"model.tp_plan cuts {use.path}.{use.name} and does not name {use.path!r}, whose "
                "code would meet a slice; name the module as well"
            )
    return CutPlan(
        tuple((use.module, use.name, use.style) for use in uses),
        tuple((modules[path], style) for path, style in called.items()),
        _blocks(model, plan.granularity, called),
    )


def refuse_attentions(wish: object) -> None:
    """Refuse to return attention weights.

    Raises:
        LoweringError: They are wanted.
    """
    if wish:
        raise LoweringError(
            "output_attentions returns weights by head, and with tensor parallelism a rank has its "
            "own heads only; leave it out (config and batch), or plan with tp 1"
        )


def refuse_whole_tensors(
    optimizer: torch.optim.Optimizer, plan: Cuts, *, master_weights: bool = False
) -> None:
    """Refuse an optimizer that updates an element by others of its tensor: two small runs tell.

    ``master_weights``: it steps float32 copies.

    Raises:
        LoweringError: It does, or it cannot be made from its settings to find out.
    """
    for group in optimizer.param_groups:
        cut = [p for p in group["params"] if plan.is_cut(p)]
        dtypes = {torch.float32 if master_weights else p.dtype for p in cut}
        for dtype in sorted(dtypes, key=str):
            whole, parts = (
                _updated(optimizer, group, dtype, 1),
                _updated(optimizer, group, dtype, 2),
            )
            if whole is None or parts is None or not torch.equal(whole, parts):
                raise LoweringError(
                    f"{type(optimizer).__name__} does not update every element of a {dtype} weight "
                    f"by itself (or cannot be tried from its settings), and with {plan.what} "
                    f"a rank has a slice of it only; use AdamW, Adam or SGD, or {plan.remedy}"
                )


def _updated(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], dtype: torch.dtype, count: int
) -> Tensor | None:
    """Return what two steps make of a small matrix that is updated in ``count`` parts each way."""
    numbers = torch.Generator().manual_seed(0)
    whole, *gradients = (torch.randn(32, 32, generator=numbers).to(dtype) for _ in range(3))

    def parts(of: Tensor) -> list[Tensor]:
        return [c.contiguous() for row in of.chunk(count) for c in row.chunk(count, dim=1)]

    own = [nn.Parameter(each) for each in parts(whole)]
    known = inspect.signature(type(optimizer)).parameters
    alike = {**optimizer.defaults, **group, "params": own, "fused": None, "foreach": None}
    settings = {k: v for k, v in alike.items() if k in known and k != "params"}
    try:
        twin = type(optimizer)([alike], **settings)
        for gradient in gradients:
            for parameter, each in zip(own, parts(gradient), strict=True):
                parameter.grad = each
            twin.step()
    except Exception:  # a setting is wrong, it needs more than settings, or a closure
        return None
    rows = [torch.cat([*own[i : i + count]], dim=1) for i in range(0, len(own), count)]
    return torch.cat(rows).detach()


def refuse_with_slices(options: ExecutionOptions, offloaded: Collection[str], tp: int) -> None:
    """Refuse what does not know of slices: compiled blocks, and blocks that are offloaded.

    Raises:
        LoweringError: One is wanted.
    """
    wanted = {"compile_blocks": options.compile_blocks, "offload_activations": offloaded}
    found = [name for name, wish in wanted.items() if wish]
    if tp > 1 and found:
        raise LoweringError(
            f"{found[0]} works on whole blocks, and with tp {tp} ranks meet inside of them; leave "
            "it out, or plan with tp 1"
        )


def refuse_between_blocks(stages: Iterable[Stage], slices: Slices) -> None:
    """Refuse code between the blocks that uses a weight that is cut.

    Raises:
        LoweringError: There is some.
    """
    for stage in stages:
        for program in (stage.prelude, *stage.programs):
            if any(slices.is_cut(p) for p in program.module.parameters(recurse=False)):
                raise LoweringError(
                    f"the code around block {program.name!r} uses a weight itself that "
                    "model.tp_plan cuts, and would see a slice; use it in a block only, or take it "
                    "out of model.tp_plan"
                )


def _has_styles() -> bool:
    return find_spec("transformers.distributed.expert_parallel") is not None


def _expanded(model: nn.Module) -> dict[str, str]:
    """Return the style of every module and parameter, by the plans of transformers' models."""
    found: dict[str, str] = {}
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and not f"{path}.".startswith(inside or "\0"):
            inside = (*inside, f"{path}." if path else "")
            own = expanded_plan(module)
            found |= {f"{path}.{name}".lstrip("."): style for name, style in own.items()}
    return {name: style for name, style in found.items() if style != "replicate"}


def _uses(modules: Mapping[str, nn.Module], styles: Mapping[str, str]) -> Iterator[_Use]:
    for path, module in modules.items():
        for name, parameter in module._parameters.items():
            style = styles.get(f"{path}.{name}".lstrip("."), "")
            if not style or parameter is None or STYLES[style].dim is None:
                continue
            if parameter.ndim > 1 or STYLES[style].dim == -2:  # else added to the sum, once
                yield _Use(path, module, name, style, modules[path.rpartition(".")[0]])


def _whole_where_shared(model: nn.Module, uses: Iterator[_Use]) -> Iterator[_Use]:
    """Leave tables whole that not all of their users cut alike, and those that change in use.

    Raises:
        LoweringError: One of them has to be cut.
    """
    found: dict[int, list[_Use]] = {}
    for use in uses:
        parameter = use.module._parameters[use.name]
        found.setdefault(id(parameter), []).append(use)
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            owners.setdefault(id(parameter), []).append(f"{path}.{name}")
    for key, own in found.items():
        styles = {STYLES[use.style][:1] + STYLES[use.style][-1:] for use in own}
        renormed = any(getattr(use.module, "max_norm", None) is not None for use in own)
        if len(own) == len(owners[key]) and len(styles) == 1 and not renormed:
            yield from own
        elif not all(STYLES[use.style].is_closed for use in own):
            raise LoweringError(
                f"{' and '.join(owners[key])} are one tied weight, and model.tp_plan does not cut "
                "all of them alike; let it, or plan with tp 1"
            )


def _check_parameter(use: _Use, tp: int) -> None:
    """Refuse a parameter that cannot be cut into so many slices."""
    style, parameter = STYLES[use.style], use.module._parameters[use.name]
    assert parameter is not None
    assert style.dim is not None
    name = f"{use.path}.{use.name}"
    size = parameter.shape[max(style.dim, -parameter.ndim)]
    if size < tp or (style.parts > 1 and size % (style.parts * tp)):
        joined = f"{style.parts} joined parts of " if style.parts > 1 else ""
        raise LoweringError(
            f"{name} has {joined}{size // style.parts} rows or columns, which cannot be cut for tp "
            f"{tp}; plan with a smaller tp"
        )
    sizes = [getattr(use.around, n, None) for n in _HEAD_SIZES]
    head = next((found for found in sizes if isinstance(found, int) and found), 0)
    if head and not style.is_closed and style.parts == 1 and size % (head * tp):
        raise LoweringError(
            f"{name} has {size / head:g} heads, which tp {tp} does not divide; plan with a tp that "
            "divides the heads of queries and of keys"
        )
    if parameter._backward_hooks:
        raise LoweringError(
            f"{name!r} has a hook on its gradient (register_hook), and with tp {tp} a rank has a "
            "slice of it only; remove it, or plan with tp 1"
        )


def _check_module(path: str, module: nn.Module, style: str, tp: int) -> None:
    """Refuse a module whose calls cannot be wrapped."""
    rule = STYLES[style]
    if rule.dim is not None and any(True for _ in module.children()):
        raise LoweringError(
            f"model.tp_plan cuts {path!r}, a {type(module).__name__} with parts of its own (an "
            "adapter?), which would meet slices; merge them into one layer, or plan with tp 1"
        )
    if not rule.is_closed and any(getattr(module, name, None) for name in _HOOKS):
        raise LoweringError(
            f"{path!r} has a hook, which would see slices with tp {tp}; put it on the layer "
            "around it, or plan with tp 1"
        )


def _blocks(
    model: nn.Module, granularity: Granularity, called: Mapping[str, str]
) -> dict[str, nn.Module]:
    """Return the blocks inside of which values are cut.

    Raises:
        LoweringError: Values would be cut between blocks.
    """
    leaves, found = choose_leaves(model, granularity), dict[str, nn.Module]()
    for path, style in called.items():
        if STYLES[style].is_closed:
            continue
        parts = path.split(".")
        around = (".".join(parts[:end]) for end in range(1, len(parts)))
        block = next((own for own in around if leaves.is_leaf(model.get_submodule(own))), "")
        if not block:
            raise LoweringError(
                f"{path!r} is no part of a larger block at granularity {granularity!r}, so that "
                "slices would cross from block to block; plan with granularity='layer', or tp 1"
            )
        found[block] = model.get_submodule(block)
    return found
