"""Ways to run one block: recomputed, through ``torch.compile``, with activations in host memory.

*Recomputation* changes nothing twice. The second forward pass of a block starts from what its first
one started from: values of the buffers that it changes (running statistics, the vectors of a
spectral norm, queues), plain attributes of its modules (counters), and the generators of Python
that it draws from. Afterwards they are again what they were before it.

*Compiled* blocks are compiled one by one, so that stages and schedules stay what they are. They
compute what they computed; kernels are fused, so that sums are rounded in another order. A block
that draws random numbers is refused: inside a compiled block they would come from torch's global
generator, and depend on the split.

*In host memory* waits what a block keeps for its backward pass. As
``torch.autograd.graph.save_on_cpu``, which would take the weights along that a block saves, too:
they stay where they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from ipu_pipeline.capture.calls import OtherTensors, set_modes
from ipu_pipeline.capture.programs import Program
from ipu_pipeline.capture.python_state import Generators
from ipu_pipeline.capture.state import PlainState, key_of, values_of
from ipu_pipeline.errors import LoweringError, first_line, listed
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.ir.select import select_all, unmatched
from ipu_pipeline.ops.random import is_random


def running_statistics(modules: Iterable[nn.Module]) -> Iterator[_NormBase]:
    """Yield the normalisations whose forward pass in training changes running statistics."""
    for module in modules:
        if isinstance(module, _NormBase) and module.track_running_stats:
            yield module


@dataclass
class ReplayedBlock:
    """What the forward passes of one recomputed block change.

    Tensors that none was seen to change have one copy, made when a value is new, so that the
    first change of one is no surprise: in a block that updates an average every tenth step.

    Args:
        program: The block.
    """

    program: Program

    def __post_init__(self) -> None:
        self.modules = list(self.program.module.modules())
        self._generators = Generators(self.modules) if self.program.draws else None
        changing = list(self.program.changing.values())
        for module in running_statistics(self.modules):  # torch does not count these writes
            changing += [t for t in (module.running_mean, module.running_var) if t is not None]
        self._changing = {id(tensor): tensor for tensor in changing}
        self._copies: dict[int, tuple[Tensor, int, Tensor]] = {}
        self._first_copies: dict[int, tuple[Tensor, Tensor]] = {}

    def passes(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``call`` of one microbatch: its first call is the first pass, others replay it."""
        start: list[Callable[[], AbstractContextManager[None]]] = []

        def run(*inputs: Any) -> Any:
            if start:
                with start[0]():
                    return call(*inputs)
            plain = PlainState(self.modules)
            random = self._generators.states() if self._generators else []
            before = [(tensor, tensor.detach().clone()) for tensor in self._changing.values()]
            self._copy_others()
            result = call(*inputs)
            start.append(partial(self._as_before, plain, random, [*before, *self._surprises()]))
            return result

        return run

    def unshared(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return ``inputs`` with copies of those that are views of what passes change."""
        changing = {key_of(tensor) for tensor in self.program.changing.values()}
        return tuple(
            value.clone() if isinstance(value, Tensor) and key_of(value) in changing else value
            for value in inputs
        )

    @contextmanager
    def _as_before(
        self, plain: PlainState, random: list[Any], values: list[tuple[Tensor, Tensor]]
    ) -> Iterator[None]:
        newest = PlainState(self.modules)
        drawn = self._generators.states() if self._generators else []
        plain.put_back()
        if self._generators:
            self._generators.put_back(random)
        # Passes that were before the first change of a tensor all saw what it was before that.
        values = list({**self._first_copies, **{id(t): (t, v) for t, v in values}}.values())
        try:
            with values_of([t for t, _ in values], [v.clone() for _, v in values]):
                # Autograd keeps aliases: the tensors themselves get their newest values back.
                aliases = {id(t): t.detach() for t, _ in values if not t.requires_grad}
                with OtherTensors(aliases):
                    yield
        finally:
            newest.put_back()
            if self._generators:
                self._generators.put_back(drawn)

    def _surprises(self) -> list[tuple[Tensor, Tensor]]:
        """Return tensors that were changed for the first time, with their values before."""
        changed = [entry for entry in self._copies.values() if entry[0]._version != entry[1]]
        found = {id(tensor): (tensor, copy) for tensor, _, copy in changed}
        self._changing.update((key, tensor) for key, (tensor, _) in found.items())
        self._first_copies.update(found)
        return list(found.values())

    def _copy_others(self) -> None:
        known, self._copies = self._copies, {}
        for tensor in self.program.module.buffers():
            key, version = id(tensor), tensor._version
            if key not in self._changing:
                entry = known.get(key)
                if entry is None or entry[1] != version:
                    entry = (tensor, version, tensor.detach().clone())
                self._copies[key] = entry


# ---- through torch.compile --------------------------------------------------------------------


# The compiler of torch.compile unless something else is asked for.
_BACKEND = "inductor"
# Where a program's module keeps what was compiled of it: both end together.
_FORMS = "ipu_pipeline_compiled"


def run_compiled(program: Program, inputs: Sequence[Any], *, recompute: bool) -> Any:
    """Return the outputs of ``program``, compiled when it first runs.

    Args:
        program: A block.
        inputs: What it takes.
        recompute: Keep no activations, and compute them again in the backward pass.

    Raises:
        LoweringError: ``torch.compile`` cannot do it, or the block draws random numbers or
            changes a buffer.
    """
    from torch._dynamo.exc import TorchDynamoException  # slow to import

    forms: dict[bool, Callable[..., Any]] = vars(program.module).setdefault(_FORMS, {})
    if recompute not in forms:
        code = partial(_recomputed, program.module) if recompute else program.module
        forms[recompute] = torch.compile(code, fullgraph=True, backend=_checked)
    set_modes(program.modes)
    before = [(name, buffer, buffer._version) for name, buffer in program.module.named_buffers()]
    try:
        with warnings.catch_warnings():  # dynamo looks at .grad of what other blocks computed
            warnings.filterwarnings("ignore", r".*\.grad attribute of a Tensor that is not a leaf")
            outputs = forms[recompute](*inputs)
    except TorchDynamoException as error:
        cause = getattr(error, "inner_exception", None) or error
        reason = cause if isinstance(cause, LoweringError) else first_line(cause)
        raise LoweringError(
            f"compile_blocks: block {program.name!r} cannot be compiled: {reason}; leave "
            "compile_blocks out"
        ) from error
    changed = [name for name, buffer, version in before if buffer._version != version]
    if changed:
        raise LoweringError(
            f"compile_blocks: block {program.name!r} changes {changed[0]} when it runs, which is "
            "followed in blocks that are not compiled only; leave compile_blocks out"
        )
    return outputs


def _recomputed(module: nn.Module, *inputs: Any) -> Any:
    return checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=False)


def _checked(module: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """Compile a graph that draws no random numbers."""
    for part in module.modules():
        for node in part.graph.nodes if isinstance(part, fx.GraphModule) else ():
            target = getattr(Tensor, node.target, None) if node.op == "call_method" else node.target
            if node.op.startswith("call") and is_random(target, node.args, node.kwargs):
                raise LoweringError(
                    f"it draws random numbers ({getattr(target, '__name__', target)}), which would "
                    "no longer be keyed by microbatch and block; set the model's dropout to 0"
                )
    compiled: Callable[..., Any] = torch._dynamo.lookup_backend(_BACKEND)(module, inputs)
    return compiled


# ---- activations in host memory ---------------------------------------------------------------


def offloaded(program: Program) -> AbstractContextManager[Any]:
    """Within it, autograd saves what ``program`` computes in pinned host memory.

    Copies go over the stream that computes, so that nothing is read before it is there. A block
    that is recomputed saves its inputs only, and they go, too.
    """
    module = program.module
    weights = {key_of(tensor) for tensor in (*module.parameters(), *module.buffers())}

    def pack(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        if _is_on_host(tensor) or key_of(tensor) in weights:
            return tensor
        kept = torch.empty(
            tensor.shape, dtype=tensor.dtype, pin_memory=torch.cuda.is_available()
        )  # fmt: skip
        return tensor.device, kept.copy_(tensor, non_blocking=True)

    def unpack(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, kept = packed
        return kept.to(device, non_blocking=True)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _is_on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" or tensor.layout is not torch.strided


# ---- which blocks -----------------------------------------------------------------------------


def recomputed_blocks(wish: str | Sequence[str] | None, plan: Plan) -> frozenset[str]:
    """Return the names of the blocks to recompute; ``None`` for the plan's choice.

    Raises:
        LoweringError: An entry fits no block.
    """
    if wish is None:
        return frozenset(name for stage in plan.stages for name in stage.recompute)
    return chosen_blocks("recompute", wish, plan)


def chosen_blocks(option: str, wish: str | Sequence[str] | None, plan: Plan) -> frozenset[str]:
    """Return the names of the blocks that an option chooses; ``None`` for none.

    Args:
        option: Its name.
        wish: ``"all"``, ``"none"``, or names of blocks, prefixes of such names
            (``encoder.layer.3`` stands for all blocks inside of it) and patterns with ``*``, ``?``
            and ``[...]``.
        plan: The plan.

    Raises:
        LoweringError: An entry fits no block.
    """
    names = [name for stage in plan.stages for name in stage.blocks]
    if wish is None:
        return frozenset()
    if isinstance(wish, str):
        return frozenset(names if wish == "all" else ())
    unknown = unmatched(wish, names)
    if unknown:
        raise LoweringError(
            f"{option} names {', '.join(map(repr, unknown))}, which is no block, prefix or "
            f"pattern of one; the blocks are {listed(names, 40)}"
        )
    return frozenset(select_all(wish, names))


def offloaded_blocks(
    wish: str | Sequence[str] | None, plan: Plan, device: torch.device
) -> frozenset[str]:
    """Return the names of the blocks that keep their activations in host memory.

    ``None`` is for the plan's choice.

    Raises:
        LoweringError: An entry fits no block, or the stages are on a CPU.
    """
    planned = frozenset(name for stage in plan.stages for name in stage.offload)
    chosen = planned if wish is None else chosen_blocks("offload_activations", wish, plan)
    if chosen and device.type == "cpu":
        raise LoweringError(
            "offload_activations moves what blocks keep to host memory, and on a CPU it is there; "
            "leave it out (also of the plan: 'offload{blocks=none}', offload_activations='none'), "
            "or run on a GPU with device='cuda'"
        )
    return chosen
