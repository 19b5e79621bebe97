"""Calls of the model's own code on all ranks of a pipeline: ``generate``, ``forward``."""

from __future__ import annotations

import hashlib
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.utils.generic import ModelOutput

from ipu_pipeline.backends.cluster.groups import Groups
from ipu_pipeline.backends.cluster.layout import Layout
from ipu_pipeline.backends.cluster.placed import PlacedTensor, RankProgram, placed_in
from ipu_pipeline.backends.cluster.ranks.waiting import POLL_S, GivenUp, Waiter
from ipu_pipeline.capture.values import tensors_in
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.stages.calls import (
    Call,
    called,
    generator_states,
    set_generators,
)
from ipu_pipeline.stages.executable import ExecutionOptions

_CACHES = ("past_key_values", "cache_params", "past_buckets_states", "mems")
# Objects that change while tokens are drawn: calls that share one run in turn.
_CHANGING = ("streamer", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn",
             "assistant_model")  # fmt: skip
# What users write of them may draw otherwise on every rank, and with it stop at another length.
_DRAWING = ("logits_processor", "prefix_allowed_tokens_fn")
# They decide by tokens alone, which all ranks have.
_BY_TOKENS = (MaxLengthCriteria, EosTokenCriteria, StopStringCriteria)


def refuse(
    plan: Plan, options: ExecutionOptions, layout: Layout, given: Sequence[Mapping[str, Any]]
) -> None:
    """Refuse what ranks cannot run together.

    Raises:
        LoweringError: Ranks share products or tables, the precision is that of autocast, or a
            cache of another call is given.
    """
    if layout.tp > 1:
        raise LoweringError(
            f"the plan has tp {layout.tp}, and generate and forward run each operation on whole "
            "weights; plan with tp 1, or use eval_step"
        )
    sliced = [name for stage in plan.stages for name in stage.table_slices]
    if sliced:
        raise LoweringError(
            f"the plan spreads the table of {sliced[0]} over stages, and generate and forward look "
            "up whole tables; plan without the spread_ passes, or use eval_step"
        )
    if layout.num_ranks == 1:
        return
    if plan.vocabulary is not None:
        raise LoweringError(
            "the plan spreads the vocabulary over stages, and generate and forward look up and "
            "multiply with whole tables; plan without vocabulary, or use eval_step"
        )
    if options.precision != "float32":
        raise LoweringError(
            f"precision={options.precision!r} is autocast, which does not know the shapes that "
            "other ranks have; load the model in that dtype and leave precision out, or use "
            "target='local'"
        )
    names = [name for call in given for name in _CACHES if call.get(name) is not None]
    if names:
        raise LoweringError(
            f"{names[0]} is given, and every stage keeps the cache of its own layers during one "
            "call only; leave it out and pass the whole sequence, or use target='local'"
        )


def agreed(model: nn.Module, changing: Sequence[Tensor], groups: Groups) -> dict[Tensor, int]:
    """Give all ranks the first one's random numbers; return buffers that are one stage's.

    Args:
        model: The model.
        changing: Buffers that training changes in the stages of this rank.
        groups: Of the processes, which all call this.

    Returns:
        Buffers that training changes on some ranks, and the positions of these as bits.
    """
    buffers = dict(model.named_buffers())
    own = {id(tensor) for tensor in changing}
    names = [name for name, buffer in buffers.items() if id(buffer) in own]
    states = [state.numpy().tobytes() for state in generator_states(groups.device)]
    found = groups.ranks.gather([states, names])
    first = [torch.frombuffer(bytearray(state), dtype=torch.uint8) for state in found[0][0]]
    set_generators(first, groups.device)
    layout = groups.layout
    held: defaultdict[Tensor, int] = defaultdict(int)
    for rank, (_, theirs) in enumerate(found):
        for name in theirs:
            held[buffers[name]] |= 1 << rank // layout.tp % layout.num_ranks
    return held


def call_on_ranks(
    model: nn.Module,
    plan: Plan,
    groups: Groups,
    changing: Mapping[Tensor, int],
    name: str,
    calls: Sequence[Call],
) -> list[Any]:
    """Call a method of the model on all ranks; of several calls all are in flight at once.

    Each draws as if it were alone. On GPUs, whose messages have no tags, they run in turn, as where
    calls share what changes with every token.
    """
    device = groups.device
    share = any(given.get(name) is not None for _, given in calls for name in _CHANGING)
    drawing = any(given.get(name) is not None for _, given in calls for name in _DRAWING)
    check = partial(check_same_tokens, groups=groups) if drawing else None
    held = {**positions_of_weights(model, plan, groups.layout), **changing}
    with entering_stages(model, plan, groups.layout, check) as begun:
        in_flight = len(calls) > 1 and device.type == "cpu" and not share
        if in_flight and groups.layout.num_ranks > 1:
            return _in_flight(model, groups, held, begun, name, calls)
        states, results = generator_states(device), []
        for call in calls:
            set_generators(states, device)
            with begun(RankProgram(groups, held)) as whole:
                results.append(whole(called(model, name, call, device)))
        return results


def check_same_tokens(results: Sequence[Any], groups: Groups) -> None:
    """Refuse tokens that are not those of the other ranks; all of them call this.

    Raises:
        LoweringError: Something has drawn or decided otherwise in another process.
    """
    drawn = [t.tolist() for t in tensors_in(results) if not t.is_floating_point()]
    found = groups.ranks.gather(hashlib.blake2b(repr(drawn).encode()).hexdigest(), str)
    if len(set(found)) > 1:
        raise LoweringError(
            "the ranks have drawn different tokens, so that none of them is right: a logits "
            "processor or a function that is given looks at a clock, or draws from generators of "
            "its own; seed random and numpy alike on all ranks (transformers.set_seed), or use "
            "target='local'"
        )


# ---- several calls -------------------------------------------------------------------------------


class _Turn:
    """Which call runs; it has torch's generators to itself, and lets go while it waits."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._states = generator_states(device)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Run inside, from the generators' states at the start."""
        with self._lock:
            set_generators(self._states, self._device)
            yield

    @contextmanager
    def passed_on(self) -> Iterator[None]:
        """Let others run while what is inside waits."""
        states = generator_states(self._device)
        self._lock.release()
        try:
            yield
        finally:
            self._lock.acquire()
            set_generators(states, self._device)


class _CallLinks:
    """The messages of one of several calls: tagged, and waited for while others run."""

    def __init__(self, groups: Groups, tag: int, turn: _Turn, failed: Callable[[], bool]) -> None:
        self.layout, self.device = groups.layout, groups.device
        self._groups, self._tag, self._turn = groups, tag, turn
        self.waiter = Waiter(groups.waiter.activity, failed)

    def start_send(self, wire: Tensor, position: int) -> Callable[[], object]:
        """Begin to send bytes to a position; return what waits for that."""
        return self._groups.start_send(wire, position, self._tag)

    def receive(self, wire: Tensor, position: int) -> None:
        """Overwrite ``wire`` with the next bytes from a position."""
        wait = self._groups.start_receive(wire, position, self._tag)
        with self._turn.passed_on():
            self.waiter.run(wait)


def _in_flight(
    model: nn.Module,
    groups: Groups,
    held: Mapping[Tensor, int],
    begun: Callable[[RankProgram], Any],
    name: str,
    calls: Sequence[Call],
) -> list[Any]:
    """Run calls in threads, one at a time: while one waits for another rank, the next one runs."""
    turn = _Turn(groups.device)
    errors: list[BaseException] = []
    results: list[Any] = [None] * len(calls)
    links = [
        _CallLinks(groups, tag + 1, turn, lambda: bool(errors) or groups.waiter.failed())
        for tag in range(len(calls))
    ]

    def run(index: int) -> None:
        try:
            with turn.taken(), torch.no_grad(), begun(RankProgram(links[index], held)) as whole:
                results[index] = whole(called(model, name, calls[index], groups.device))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            with groups.waiter.activity.waits():
                thread.join(POLL_S)
    for link in links:
        link.waiter.close()
    if errors:
        raise min(errors, key=lambda error: isinstance(error, GivenUp))
    return results


# ---- one call ------------------------------------------------------------------------------------


@contextmanager
def entering_stages(
    model: nn.Module,
    plan: Plan,
    layout: Layout,
    check: Callable[[Sequence[Tensor]], object] | None = None,
) -> Iterator[Callable[[RankProgram], Any]]:
    """Watch where blocks begin and where logits leave, without a trace on the model afterwards.

    ``check`` is called with the tokens whenever some were drawn, at the same time on all ranks.

    Yields:
        A region for a program, which gives what makes of a result what all ranks have; caches,
        which they have not, are left out.
    """
    current = threading.local()

    @contextmanager
    def begun(program: RankProgram) -> Iterator[Callable[[Any], Any]]:
        if layout.num_ranks == 1:
            yield lambda result: result
            return
        current.program, current.counts = program, defaultdict(int)
        try:
            with program:
                yield lambda result: _shared(result, program)
            program.finish()
        finally:
            del current.program

    parts: list[Any] = [] if layout.num_ranks == 1 else [*filter(_generates, model.modules())]
    hooks = [] if layout.num_ranks == 1 else [
        *_block_hooks(model, plan, layout, current),
        *(part.register_forward_hook(_leaves) for part in parts),
    ]  # fmt: skip
    for part in parts:
        part._get_stopping_criteria = _agreed_criteria(part._get_stopping_criteria, current, check)
    try:
        yield begun
    finally:
        for part in parts:
            del part._get_stopping_criteria
        for hook in hooks:
            hook.remove()


def _agreed_criteria(
    made: Callable[..., Any], current: threading.local, check: Any
) -> Callable[..., Any]:
    """Return what makes stopping criteria that decide on all ranks as on the first one."""

    def agreed(*args: Any, **kwargs: Any) -> Any:
        criteria = made(*args, **kwargs)
        by_tokens = all(type(one) in _BY_TOKENS for one in criteria)
        first = None if by_tokens else current.program
        return _OnAllRanks(criteria, first, check) if first or check else criteria

    return agreed


class _OnAllRanks(StoppingCriteriaList):
    """Stopping criteria that decide alike, or of which one would, by tokens that are not the same.

    Args:
        criteria: Their own.
        program: Where one looks at a clock, or at something else of one process.
        check: Refuses tokens that differ.
    """

    def __init__(self, criteria: Any, program: RankProgram | None, check: Any) -> None:
        super().__init__(criteria)
        self._program, self._check = program, check

    def __call__(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return which sequences are done."""
        if self._check is not None:
            self._check([input_ids])
        found = super().__call__(input_ids, *args, **kwargs)
        return found if self._program is None else self._program.of_first(found)


def positions_of_weights(model: nn.Module, plan: Plan, layout: Layout) -> dict[Tensor, int]:
    """Return the positions that hold each parameter as bits, of those that not all hold."""
    found: defaultdict[Tensor, int] = defaultdict(int)
    named = dict(model.named_parameters(remove_duplicate=False))
    for stage, position in zip(plan.stages, layout.positions, strict=True):
        for block in stage.blocks:
            for name in plan.graph[block].parameters:
                found[named[name]] |= 1 << position
    return {p: where for p, where in found.items() if where != (1 << layout.num_ranks) - 1}


def _block_hooks(
    model: nn.Module, plan: Plan, layout: Layout, current: threading.local
) -> Iterator[Any]:
    """Send what a block is given to its stage before its first operation runs where it came from.

    A module that is called several times runs its calls in the stages of its blocks.
    """
    position = {
        block: place
        for stage, place in zip(plan.stages, layout.positions, strict=True)
        for block in stage.blocks
    }
    calls: defaultdict[str, list[int]] = defaultdict(list)
    for block in plan.graph.blocks:
        if block.module is not None and block.name in position:
            calls[block.module].append(position[block.name])

    def enter(path: str, args: Any, kwargs: Any) -> None:
        targets = calls[path]
        target = targets[current.counts[path] % len(targets)]
        current.counts[path] += 1
        for tensor in placed_in((args, kwargs)):
            if tensor.value.is_floating_point():
                current.program.send(tensor, target)

    for path in calls:
        yield model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, kwargs, path=path: enter(path, args, kwargs), with_kwargs=True
        )


def _generates(module: nn.Module) -> bool:
    return isinstance(module, PreTrainedModel) and module.can_generate()


def _leaves(_module: nn.Module, _args: Any, output: Any) -> None:
    """Note that logits leave the model: the code that draws tokens runs on all ranks."""
    given = output.get("logits") if isinstance(output, Mapping) else output
    for tensor in placed_in([given]):
        tensor.leaves = True


def _shared(result: Any, program: RankProgram) -> Any:
    """Return a result of which all ranks have the values."""
    if type(result) is PlacedTensor:
        return program.everywhere(result)
    if isinstance(result, ModelOutput | dict):
        items = {k: _shared(v, program) for k, v in result.items() if not isinstance(v, Cache)}
        return type(result)(**items)
    if isinstance(result, tuple | list) and placed_in([result]):
        return type(result)([_shared(item, program) for item in result])
    return result
