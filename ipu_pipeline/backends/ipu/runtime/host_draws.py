"""What a model draws on the host while it runs: drawn before every step, and given as an input.

LayerDrop compares one number per layer with a probability, in Python. In the program every layer
runs, and keeps its input where the host drew that it is dropped. SpecAugment makes masks with
numpy's generator, in a function of the model's file; the program is given the masks. The host draws
for every microbatch what the model would have drawn, from the same generators, in the same order.

A model draws from these generators in no other way: the program would repeat what it drew.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import random
import sys
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from .host_values import HostValues, map_leaves, node, tensors_of
from .static_errors import StaticGraphError, refuse

PREFIX = "host_draw_"


class _Recipe:
    """One draw: ``make`` gives its value for a microbatch; without ``needed`` it is only drawn."""

    def __init__(self, make: Callable[[HostValues, Mapping[str, Any]], Any]) -> None:
        self.make = make
        self.needed = False


class HostDraws:
    """The draws of a model's forward pass, in order.

    Attributes:
        names: Of the inputs that the program gets for them.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self._recipes: list[_Recipe] = []
        self._learning = False
        self._given: List[Tensor] = []
        self._used = 0
        self._arrays: dict[int, tuple[Any, Tensor]] = {}
        self._dropping: Optional[tuple[Tensor, Exception]] = None
        self._running: list[tuple[nn.Module, Tensor, Tensor]] = []
        self._mode: Any = None

    # ---- before a step ------------------------------------------------------------------

    def make(self, values: HostValues, parts: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Draw for all microbatches of a call.

        Returns:
            The inputs by name; axis 0 as that of the batch.
        """
        if not self.names:
            return {}
        drawn: list[list[Tensor]] = [[] for _ in self.names]
        for part in parts:
            made = [(r.needed, r.make(values, part)) for r in self._recipes]
            needed = [value for wanted, value in made if wanted]
            for column, value in zip(drawn, needed):
                column.append(torch.as_tensor(value, dtype=torch.float32))
        return {name: torch.cat(column) for name, column in zip(self.names, drawn)}

    # ---- while the model runs -----------------------------------------------------------

    @contextlib.contextmanager
    def running(self, model: nn.Module, given: Sequence[Tensor], *, learn: bool) -> Iterator[None]:
        """While it lasts, the model's draws are what ``given`` holds.

        Args:
            model: The model.
            given: Inputs of the program, in the order of :attr:`names`.
            learn: Find out what is drawn; nothing is given.

        Raises:
            StaticGraphError: The model draws in a way that no input can stand for.
        """
        self._learning, self._given, self._used = learn, list(given), 0
        self._arrays, self._dropping, self._running = {}, None, []
        if learn:
            self._recipes, self.names = [], []
        before = _states()
        with self._patched(model):
            yield
        self._settled()
        if _states() != before:
            raise StaticGraphError(
                f"{type(model).__name__} draws random numbers with numpy or random in its forward "
                "pass, and not to drop a layer; the program would repeat them: draw with torch, or "
                "in a function of the model's file that returns the array"
            )

    def attach(self, mode: Any) -> None:
        """Say which mode marks the tensors."""
        self._mode = mode

    def draw(self, source: Callable[[], float]) -> float:
        """Return a number that may be compared, once."""
        recipe = self._new(lambda _values, _part: [float(source())])
        return _Draw(functools.partial(self._compare, recipe, source))

    def drawn(self, array: Any) -> Optional[Tensor]:
        """Return the input that stands for an array; ``None`` when it was not drawn."""
        found = self._arrays.get(id(array))
        return None if found is None else found[1]

    def _compare(
        self,
        recipe: _Recipe,
        source: Callable[[], float],
        compare: Callable[[Any, Any], bool],
        bound: float,
    ) -> bool:
        """Answer that the layer is kept; the layer that is called next drops itself."""
        kept = compare(1.0, 0.0)
        if bound <= 0.0 or recipe.needed:
            return kept
        self._settled()
        recipe.make = lambda _values, _part: [float(compare(source(), bound) != kept)]
        dropped = self._take(recipe, _zero())
        error = refuse(
            "compares a number drawn on the host, and calls no layer next that can be dropped",
            "draw with torch, and use torch.where",
        )
        self._dropping = dropped, error
        return kept

    def _take(self, recipe: _Recipe, example: Tensor) -> Tensor:
        """Return the next input of the program."""
        recipe.needed = True
        if self._learning:
            self.names.append(f"{PREFIX}{len(self.names)}")
            with torch._C.DisableTorchFunction():
                made = example.float().to(self._mode.device)
            return self._mode.mark(made)
        if self._used == len(self._given):
            raise refuse(
                "draws random numbers on the host (LayerDrop, SpecAugment), and the program has no "
                "input for them",
                "rehearse the model first (StaticProgram.rehearse), or set layerdrop and "
                "mask_time_prob to 0",
            )
        self._used += 1
        return self._given[self._used - 1]

    def _new(self, make: Callable[[HostValues, Mapping[str, Any]], Any]) -> _Recipe:
        recipe = _Recipe(make)
        if self._learning:
            self._recipes.append(recipe)
        return recipe

    def _settled(self) -> None:
        if self._dropping is not None:
            raise self._dropping[1]

    # ---- patches ------------------------------------------------------------------------

    @contextlib.contextmanager
    def _patched(self, model: nn.Module) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for owner, name, function in _scalar_draws():
                stack.enter_context(_replaced(owner, name, self._scalar(function)))
            for owner, name, function in _array_draws(model):
                stack.enter_context(_replaced(owner, name, self._array(function)))
            for handle in (
                torch_modules.register_module_forward_pre_hook(self._begin_layer),
                torch_modules.register_module_forward_hook(self._end_layer),
            ):
                stack.callback(handle.remove)
            yield

    def _scalar(self, function: Any) -> Any:
        def changed(*args: Any, **kwargs: Any) -> Any:
            bounds = 2 if function.__name__ == "uniform" else 0  # of others: sizes of an array
            if "size" in kwargs or len(args) > bounds:
                return function(*args, **kwargs)
            return self.draw(functools.partial(function, *args, **kwargs))

        return changed

    def _array(self, function: Any) -> Any:
        @functools.wraps(function)
        def changed(*args: Any, **kwargs: Any) -> Any:
            with torch._C.DisableTorchFunction():
                return self._drawn_array(function, args, kwargs)

        return changed

    def _drawn_array(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Return an array like that of ``function``, for which an input stands."""
        mode = self._mode

        def kept(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            number = mode.number(value)
            if number is None and mode.is_program(value):
                raise refuse(
                    f"{function.__name__} draws with a tensor that only the device has",
                    "give it tensors that depend on the inputs alone",
                )
            return value.detach().clone() if number is None else node(number)

        wanted = map_leaves(kept, (args, kwargs))

        def make(values: HostValues, part: Mapping[str, Any]) -> Any:
            given, named = values.compute(part, wanted)
            return function(*given, **named)

        recipe = self._new(make)
        with _kept_states(), _own_functions():
            given, named = map_leaves(mode.values.filled, wanted)
            array = function(*given, **named)
        self._arrays[id(array)] = array, self._take(recipe, torch.tensor(array))
        return array

    def _begin_layer(self, module: nn.Module, args: Any) -> None:
        if self._dropping is None:
            return
        dropped, error = self._dropping
        state = next(tensors_of(args), None)
        if state is None:
            raise error
        self._dropping = None
        self._running.append((module, state, dropped))

    def _end_layer(self, module: nn.Module, _args: Any, output: Any) -> Any:
        if not self._running or self._running[-1][0] is not module:
            return None
        _, before, dropped = self._running.pop()
        first = output[0] if isinstance(output, tuple) else output
        if not isinstance(first, Tensor) or first.shape != before.shape:
            raise refuse(
                f"drops a {type(module).__name__} whose output has another shape than its input",
                "set layerdrop to 0",
            )
        chosen = torch.where(dropped > 0.5, before, first)
        return (chosen, *output[1:]) if isinstance(output, tuple) else chosen


class _Draw(float):
    """A number that stands for one drawn anew in every step; it may be compared, and no more."""

    def __new__(cls, compare: Callable[..., bool]) -> _Draw:
        made = float.__new__(cls, 1.0)
        made._compare = compare  # type: ignore[attr-defined]
        return made

    def __lt__(self, other: float) -> bool:
        return self._compare(operator.lt, other)  # type: ignore[attr-defined]

    def __le__(self, other: float) -> bool:
        return self._compare(operator.le, other)  # type: ignore[attr-defined]

    def __gt__(self, other: float) -> bool:
        return self._compare(operator.gt, other)  # type: ignore[attr-defined]

    def __ge__(self, other: float) -> bool:
        return self._compare(operator.ge, other)  # type: ignore[attr-defined]

    def _refused(self, *_: Any) -> Any:
        raise refuse(
            "computes with a number drawn on the host, which the program would repeat",
            "draw it with torch, on the device",
        )

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refused
    __truediv__ = __rtruediv__ = __int__ = __round__ = __neg__ = _refused


def seed_host(seed: Optional[int], instance: int = 0) -> None:
    """Seed the generators that the host draws from; without a seed they stay as they are.

    Args:
        seed: Of the run. torch's generator gets it as it is: all processes shuffle alike.
        instance: Number of this process.
    """
    if seed is None:
        return
    torch.manual_seed(seed)
    random.seed(seed + instance)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed + instance)


def host_random() -> Dict[str, Tensor]:
    """Return the states of the generators that the host draws from."""
    found = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(random.getstate()[1], dtype=torch.int64),
    }
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        _, keys, position, *_ = numpy.random.get_state()
        found["numpy"] = torch.tensor([*map(int, keys), position], dtype=torch.int64)
    return found


def set_host_random(states: Mapping[str, Tensor]) -> None:
    """Put back what :func:`host_random` returned; a second normal number kept aside is lost."""
    if "torch" in states:
        torch.set_rng_state(states["torch"])
    if "python" in states:
        random.setstate((3, tuple(states["python"].tolist()), None))
    numpy = sys.modules.get("numpy")
    if numpy is not None and "numpy" in states:
        *keys, position = states["numpy"].tolist()
        numpy.random.set_state(("MT19937", keys, position))


def _zero() -> Tensor:
    with torch._C.DisableTorchFunction():
        return torch.zeros(1, device="cpu")


def _scalar_draws() -> list[tuple[Any, str, Any]]:
    """Return owner, name and function of what draws one number from a host generator."""
    found: list[tuple[Any, str, Any]] = [
        (random, name, getattr(random, name)) for name in ("random", "uniform")
    ]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        names = ("random", "random_sample", "uniform", "rand")
        found += [(numpy.random, name, getattr(numpy.random, name)) for name in names]
    return found


def _array_draws(model: nn.Module) -> list[tuple[Any, str, Any]]:
    """Return the functions of the model's files whose own code draws with numpy."""
    files = {type(module).__module__ for module in model.modules()}
    found = []
    for file in sorted(files):
        owner = sys.modules.get(file)
        for name, value in sorted(vars(owner).items() if owner is not None else ()):
            code = getattr(value, "__code__", None)
            names = () if code is None else code.co_names
            if "random" in names and ("np" in names or "numpy" in names):
                found.append((owner, name, value))
    return found


_ORIGINALS = {(id(owner), name): function for owner, name, function in _scalar_draws()}


@contextlib.contextmanager
def _own_functions() -> Iterator[None]:
    """While it lasts, draws of one number are what they were."""
    with contextlib.ExitStack() as stack:
        for owner, name, function in _scalar_draws():
            own = _ORIGINALS.get((id(owner), name), function)
            stack.enter_context(_replaced(owner, name, own))
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, own)


def _states() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return (random.getstate(),)
    kind, keys, *rest = numpy.random.get_state()
    return (random.getstate(), kind, keys.tobytes(), tuple(rest))


@contextlib.contextmanager
def _kept_states() -> Iterator[None]:
    numpy = sys.modules.get("numpy")
    state = None if numpy is None else numpy.random.get_state()
    own = random.getstate()
    try:
        yield
    finally:
        random.setstate(own)
        if numpy is not None:
            numpy.random.set_state(state)
