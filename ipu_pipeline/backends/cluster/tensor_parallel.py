"""Tensor parallelism: a rank computes with its slices of the weights of the model's own modules.

What is cut, and how, is transformers' plan of the model (``model.tp_plan``); its styles make the
collectives around the modules that it names. A parameter stays the same object and becomes a plain
tensor, this rank's slice: optimizers, sums over replicas and messages need not know. While its
module runs, it is part of a DTensor. Both ends of a block are whole on every rank.

Source: Shoeybi et al., Megatron-LM, 2019.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, distribute_tensor
from torch.overrides import TorchFunctionMode

from ipu_pipeline.backends.cluster.cut_plan import STYLES, CutPlan
from ipu_pipeline.checkpoint.slices import Slices
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.ops.random import is_random


@dataclass(frozen=True)
class Cut:
    """How a parameter is cut: the placement of its slices, and what it is as a whole."""

    placement: Placement
    shape: torch.Size
    stride: tuple[int, ...]


class TensorParallel(Slices):
    """The slices that this rank has of a model's parameters.

    Its modules run on them from :meth:`install` to :meth:`undo`.

    Args:
        model: Its parameters become slices.
        optimizer: What it keeps already becomes slices, too.
        plan: What is cut, and how.
        mesh: The ranks that share every product, one of them this one.
    """

    # A call without values is a capture, which computes shapes of whole tensors.
    only_shapes = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        plan: CutPlan,
        mesh: DeviceMesh,
    ) -> None:
        self.index, self.size = mesh.get_local_rank(), mesh.size()
        self._mesh = mesh
        self._model = model
        self._plan = plan
        self._cuts: dict[int, Cut] = {}
        self._forwards: list[tuple[nn.Module, Any]] = []
        self._open = False  # what modules compute now is a slice
        self.cut(optimizer)

    def cut(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Cut the model's parameters, and what an optimizer keeps of them, where they are whole."""
        for module, name, style in self._plan.parameters:
            self._cut(module, name, style)
        cut = [p for p in self._model.parameters() if self.is_cut(p)]
        for parameter, state, key in [] if optimizer is None else _states(optimizer, cut):
            state[key] = self.part(parameter, state[key])

    def install(self) -> None:
        """Let the model's modules run on slices."""
        if self._forwards:
            return
        for path, module in self._plan.blocks.items():
            self._replace(module, partial(self._block, path, module.forward))
        for module, style in self._plan.modules:
            self._install(module, style)

    # ---- whole tensors and slices -----------------------------------------------------------

    def is_cut(self, tensor: Tensor) -> bool:
        """Whether a slice of a parameter is here, and not all of it."""
        return id(tensor) in self._cuts

    def shape(self, tensor: Tensor) -> torch.Size:
        """Return the shape of a parameter or buffer as a whole."""
        cut = self._cuts.get(id(tensor))
        return tensor.shape if cut is None else cut.shape

    def part(self, of: Tensor, whole: Tensor) -> Tensor:
        """Return this rank's slice of ``whole``, in memory of its own."""
        cut = self._cuts.get(id(of))
        if cut is None or whole.shape != cut.shape:
            return whole
        return _part(whole, cut.placement, self._mesh)

    def whole(self, of: Tensor, part: Tensor) -> Tensor:
        """Join the slices of all ranks of the mesh, which all call this."""
        cut = self._cuts.get(id(of))
        if cut is None or part.shape != of.shape:
            return part
        return _joined(part.detach(), cut, self._mesh).full_tensor()

    def placeholder(self, of: Tensor) -> Tensor:
        """Return what transformers reads this rank's slice of a parameter for."""
        cut = self._cuts.get(id(of))
        return of if cut is None else _joined(of.detach().to("meta"), cut, self._mesh)

    def read(self, value: Tensor) -> Tensor:
        """Return this rank's slice of what was read for a placeholder."""
        if not isinstance(value, DTensor):
            return value
        local = value.to_local()
        is_part = local.untyped_storage().nbytes() != local.nbytes  # of the file's memory
        return local.clone(memory_format=torch.contiguous_format) if is_part else local

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """Return a state dict of whole tensors; all ranks of the mesh call this."""
        state = model.state_dict(keep_vars=True)
        return {
            n: self.whole(t, t).detach() if isinstance(t, Tensor) else t for n, t in state.items()
        }

    def undo(self, optimizer: torch.optim.Optimizer | None, *, gather: bool) -> None:
        """Give the modules their own code back, and parameters and states their whole values.

        Without ``gather`` these stay slices, and the modules refuse to run.
        """
        cut = [p for p in self._model.parameters() if gather and self.is_cut(p)]
        values = [self.whole(p, p.data) for p in cut]
        gradients = [None if p.grad is None else self.whole(p, p.grad) for p in cut]
        states = [] if optimizer is None else _states(optimizer, cut)
        found = [self.whole(parameter, state[key]) for parameter, state, key in states]
        for module, forward in reversed(self._forwards):
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward
        for module, _ in () if gather else self._forwards:
            module.forward = _refuse_slices
        for (_, state, key), value in zip(states, found, strict=True):
            state[key] = value
        for parameter, value, gradient in zip(cut, values, gradients, strict=True):
            parameter.grad = None
            parameter.data = value
            parameter.grad = gradient
        self._forwards.clear()
        self._cuts.clear()

    # ---- modules ----------------------------------------------------------------------------

    def _cut(self, module: nn.Module, name: str, style: str) -> None:
        parameter = module._parameters[name]
        assert parameter is not None
        if id(parameter) in self._cuts:
            return
        # Their own code says how, for a parameter of the same shape.
        twin = nn.Module()
        twin.register_parameter(name, nn.Parameter(torch.empty_like(parameter, device="meta")))
        _style(style).shard_param(twin, name, self._mesh)
        made: Any = twin._parameters[name]
        if not isinstance(made, DTensor) or made.placements[0].is_replicate():
            return
        placement = made.placements[0]
        whole, gradient = parameter.data, parameter.grad
        self._cuts[id(parameter)] = Cut(placement, whole.shape, whole.stride())
        parameter.grad = None
        parameter.data = _part(whole, placement, self._mesh)
        if gradient is not None:
            parameter.grad = _part(gradient, placement, self._mesh)

    def _replace(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._forwards.append((module, vars(module).get("forward")))
        module.forward = forward

    def _install(self, module: nn.Module, name: str) -> None:
        from transformers.distributed import tensor_parallel as styles
        from transformers.distributed.parallel_utils import _AllReduceBackward

        style, original = _style(name), module.forward
        cuts = {n: cut for n, p in module._parameters.items() if (cut := self._cuts.get(id(p)))}
        summed = isinstance(style, styles.ReplicatedWithGradAllReduce)
        as_dtensors = isinstance(
            style, styles.ColwiseParallel | styles.RowwiseParallel | styles.EmbeddingParallel
        )

        def seen(parameter: Tensor) -> Tensor:
            """Return what the module sees of a parameter."""
            if summed:  # transformers' hook on the parameter would count microbatches again
                found: Tensor = _AllReduceBackward.apply(parameter, self._mesh.get_group())
                return found
            cut = self._cuts.get(id(parameter))
            if cut is None:
                return DTensor.from_local(parameter, self._mesh, [Replicate()], run_check=False)
            return _joined(parameter, cut, self._mesh)

        def with_slices(*args: Any, **kwargs: Any) -> Any:
            if not summed and (not as_dtensors or style.should_use_local_tensors(module)):
                return original(*args, **kwargs)
            with _instead(module, seen):
                return original(*args, **kwargs)

        self._replace(module, with_slices)
        if not summed:
            style.install_forward(module, self._mesh)
        parallel, rule = module.forward, STYLES[name]

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = (*args, *kwargs.values())
            if self.only_shapes and any(isinstance(a, Tensor) and a.is_meta for a in given):
                with _without_values(module, cuts):  # only shapes are computed: nothing is sent
                    return original(*args, **kwargs)
            self._open = (self._open and not rule.takes_slices) or rule.inside
            result = parallel(*args, **kwargs)
            self._open = (self._open and not rule.inside) or rule.gives_slices
            return result

        module.forward = forward

    def _block(self, path: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a block; nothing may be drawn for a slice, and no slice may leave it."""
        self._open = False
        with _NothingDrawn(lambda: self._open, path):
            result = original(*args, **kwargs)
        if self._open:
            raise LoweringError(
                f"block {path!r} ends where its model's tp_plan has cut its values; plan with "
                "granularity='layer', or name in model.tp_plan what puts them together again"
            )
        return result


def _style(name: str) -> Any:
    """Return a style of transformers, of versions that have them (see :func:`cut_plan`)."""
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES

    return ALL_PARALLEL_STYLES[name]


class _NothingDrawn(TorchFunctionMode):
    """Refuses random numbers for slices: their masks would be others than those of the whole."""

    def __init__(self, is_open: Callable[[], bool], path: str) -> None:
        super().__init__()
        self._is_open = is_open
        self._path = path

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._is_open() and is_random(func, args, kwargs or {}):
            raise LoweringError(
                f"block {self._path!r} drops out ({getattr(func, '__name__', func)}) what tensor "
                "parallelism has cut, and the masks of slices are not those of the whole; set that "
                "dropout to 0 in the config (attention_dropout, ...), or plan with tp 1"
            )
        return func(*args, **(kwargs or {}))


def _part(whole: Tensor, placement: Placement, mesh: DeviceMesh) -> Tensor:
    made = distribute_tensor(whole.detach(), mesh, [placement], src_data_rank=None).to_local()
    return made.clone(memory_format=torch.contiguous_format)


def _joined(part: Tensor, cut: Cut, mesh: DeviceMesh) -> DTensor:
    return DTensor.from_local(
        part, mesh, [cut.placement], run_check=False, shape=cut.shape, stride=cut.stride
    )


@contextmanager
def _instead(module: nn.Module, seen: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Put something else in the place of a module's own parameters."""
    own: dict[str, Any] = module._parameters
    before = {name: parameter for name, parameter in own.items() if parameter is not None}
    own.update({name: seen(parameter) for name, parameter in before.items()})
    try:
        yield
    finally:
        own.update(before)


@contextmanager
def _without_values(module: nn.Module, cuts: Mapping[str, Cut]) -> Iterator[None]:
    own: dict[str, Any] = module._parameters
    before = {name: own[name] for name in cuts}
    own.update(
        {
            name: torch.empty(cut.shape, dtype=before[name].dtype, device="meta")
            for name, cut in cuts.items()
        }
    )
    try:
        yield
    finally:
        own.update(before)


def _states(
    optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]
) -> list[tuple[nn.Parameter, dict[str, Any], str]]:
    """Return where an optimizer keeps tensors of these parameters."""
    return [
        (parameter, state, key)
        for parameter in parameters
        if (state := optimizer.state.get(parameter))
        for key, value in state.items()
        if isinstance(value, Tensor)
    ]


def _refuse_slices(*_: Any, **__: Any) -> Any:
    raise LoweringError(
        "this process has slices of the model's weights only (tensor parallelism), and its "
        "executable is closed; load a checkpoint into a new model"
    )
