"""Every patch of torch and transformers, in one place; each is undone, also after an error.

``tests/capture/test_patches.py`` lists them with the version that they were written against, and
names the one that does not fit any more after an update of either library.

Functions of the user whose results functools keeps (``lru_cache``) are called anew meanwhile. A
table that one of them made before, or that it keeps from a trace, would be a constant without an
origin: a graph would repeat it for every batch, and the user's next run would get a stand-in.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._functorch import apis
from torch.nn import functional
from torch.utils.checkpoint import CheckpointFunction

from ipu_pipeline.capture.places import INSTALLED, Places
from ipu_pipeline.capture.python_state import Generators, PythonState
from ipu_pipeline.capture.values import tensors_in
from ipu_pipeline.errors import CaptureError

# Methods of transformers' models that compute tensors from inputs alone, reading values in Python:
# positions of text and images, from where the padding and the images are.
WHOLE_METHODS = ("get_rope_index",)
SDPA = functional.scaled_dot_product_attention
GROUPED = functional.grouped_mm
# nn.Module and transformers are patched for all threads: one capture at a time.
_ONE_AT_A_TIME = threading.RLock()


# Whoever draws a seed (torch.seed, for a second pass over the same masks) gets 64 bits.
_SEEDS_BY_CHANCE = 1 << 32
# What torch.vmap hands on before the arguments: function, in_dims, out_dims, randomness, chunks.
_VMAP_SETTINGS = 5


@contextlib.contextmanager
def tracing_patches(model: nn.Module) -> Iterator[None]:
    """Make ``model`` traceable for the duration of the block.

    Key-value caches are switched off in every (sub)config, and transformers is told that it is
    being traced, so that it does not choose its masks by looking at the example's values. Rows
    are taken for packed ones (their position ids start over) where the model itself does that:
    only without a cache, so not where a cache was switched off here.
    """
    with _ONE_AT_A_TIME, not_compiled(model), called_anew(model), contextlib.ExitStack() as stack:
        for config in configs_of(model):
            if getattr(config, "use_cache", False):
                stack.callback(setattr, config, "use_cache", config.use_cache)
                vars(config)["use_cache"] = _NoCache()  # assigned, it would have to be a bool
        masking = sys.modules.get("transformers.masking_utils")
        if masking is not None:
            find = functools.partial(_packed_unless_cached, masking.find_packed_sequence_indices)
            stack.enter_context(mock.patch.object(masking, "find_packed_sequence_indices", find))
        for module in _modules_that_ask(len(sys.modules)):
            stack.enter_context(mock.patch.object(module, "is_tracing", _always_tracing))
        yield


@contextlib.contextmanager
def fused_sinks(model: nn.Module) -> Iterator[None]:
    """Let attention with sinks, which transformers writes out, be one operation as in GPU kernels.

    For prices only: the sinks, one number a head, are left out.
    """
    module = sys.modules[type(model).__module__]
    plain = getattr(module, "eager_attention_forward", None)
    if plain is None or getattr(model, "_supports_sdpa", True):
        yield
        return
    with mock.patch.object(
        module, "eager_attention_forward", functools.partial(_without_sinks, plain)
    ):
        yield


def _without_sinks(plain: Any, layer: nn.Module, *tensors: Any, **named: Any) -> Any:
    if not hasattr(layer, "sinks"):
        return plain(layer, *tensors, **named)
    query, key, value, mask = tensors
    windowed = named.get("sliding_window") is not None
    found = functional.scaled_dot_product_attention(
        query, key, value, mask if windowed else None, is_causal=not windowed,
        scale=named["scaling"], enable_gqa=True,
    )  # fmt: skip
    return found.transpose(1, 2).contiguous(), None


def original_model(model: nn.Module) -> nn.Module:
    """Return the model that ``torch.compile`` wrapped, or ``model`` itself."""
    found = getattr(model, "_orig_mod", model)
    assert isinstance(found, nn.Module)
    return found


def not_compiled(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Return a region in which compiled parts of ``model`` run as they were written."""
    if not any(
        hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None
        for m in model.modules()
    ):
        return contextlib.nullcontext()
    region: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return region


@functools.lru_cache(maxsize=1)
def _modules_that_ask(_: int) -> list[Any]:
    """Return transformers' modules that ask whether they are traced; a scan of thousands."""
    return [
        module
        for module in list(sys.modules.values())
        if getattr(module, "__name__", "").startswith("transformers")
        and "is_tracing" in vars(module)
    ]


def patched_module_calls(
    model: nn.Module, make: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> contextlib.AbstractContextManager[Any]:
    """Replace the call of any module by what ``make`` returns for the original.

    Setting ``Module.__call__`` renews all classes of modules that are imported, hundreds of
    microseconds; setting what it calls does not, but compiled modules do not call that.
    """
    compiled = any(getattr(m, "_compiled_call_impl", None) is not None for m in model.modules())
    name = "__call__" if compiled else "_call_impl"
    return mock.patch.object(nn.Module, name, make(getattr(nn.Module, name)))


@contextlib.contextmanager
def patched_calls(
    model: nn.Module,
    module_call: Callable[[Callable[..., Any], nn.Module, tuple[Any, ...], dict[str, Any]], Any],
    function_apply: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any],
    vmapped_call: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any],
) -> Iterator[None]:
    """Route module calls, ``autograd.Function.apply`` and calls of ``vmap(f)`` through hooks.

    Each gets the original, bound to its class or to what ``vmap`` was given, and the arguments.

    Raises:
        CaptureError: Within it, a reentrant checkpoint is called.
    """
    original_vmap = vars(apis)["vmap_impl"]
    original_apply = torch.autograd.Function.__dict__["apply"]

    def made(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda module, *args, **kwargs: module_call(original, module, args, kwargs)

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if cls is CheckpointFunction and torch.is_grad_enabled():
            raise CaptureError(
                "the model calls torch.utils.checkpoint with use_reentrant=True, whose second "
                "forward pass would draw other numbers than the first one; call it with "
                "use_reentrant=False, or leave recomputation to the plan"
            )
        return function_apply(original_apply.__get__(None, cls), args, kwargs)

    def vmapped(*settings_and_args: Any, **kwargs: Any) -> Any:
        settings, args = settings_and_args[:_VMAP_SETTINGS], settings_and_args[_VMAP_SETTINGS:]
        return vmapped_call(functools.partial(original_vmap, *settings), args, kwargs)

    with (
        patched_module_calls(model, made),
        mock.patch.object(torch.autograd.Function, "apply", classmethod(apply)),
        mock.patch.object(apis, "vmap_impl", vmapped),
        mock.patch.object(torch, "from_numpy", torch.as_tensor),  # a call that modes see
    ):
        yield


@contextlib.contextmanager
def refused_seeds() -> Iterator[None]:
    """Refuse that this thread seeds torch's generator, or gives it a state that it had.

    Stages draw numbers of their own (decision 8), so that neither would do what it does without.

    Raises:
        CaptureError: It does.
    """
    with mock.patch.object(torch.random, "default_generator", _SeededByNobody()):
        yield


class _SeededByNobody:
    """torch's generator of the CPU, as ``torch.manual_seed`` and ``torch.set_rng_state`` see it."""

    def __init__(self) -> None:
        self._generator, self._thread = torch.default_generator, threading.get_ident()
        self._refused: CaptureError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generator, name)

    def manual_seed(self, seed: int) -> torch.Generator:
        if seed < _SEEDS_BY_CHANCE:
            self._refuse(f"seeds torch (torch.manual_seed({seed}))")
        return self._generator.manual_seed(seed)

    def set_state(self, state: torch.Tensor) -> torch.Generator:
        self._refuse("puts back a state of torch's random numbers (fork_rng, set_rng_state)")
        return self._generator.set_state(state)

    def _refuse(self, what: str) -> None:
        if threading.get_ident() != self._thread:
            return
        self._refused = self._refused or CaptureError(  # not what fork_rng does at its end
            f"the model {what} in its forward pass; stages draw numbers of their own, by step, "
            "microbatch and block, so that those after it would be others than in plain torch: "
            "draw what is to stay the same once, into a buffer, or inside a block from a "
            "torch.Generator of its own"
        )
        raise self._refused


@contextlib.contextmanager
def patched_methods(
    model: nn.Module,
    called: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any],
) -> Iterator[None]:
    """Route calls of :data:`WHOLE_METHODS` of ``model``'s modules through ``called``.

    It gets the method, bound to its module, and the arguments.
    """
    classes = {type(module) for module in model.modules()}
    with contextlib.ExitStack() as stack:
        for kind, name in itertools.product(classes, WHOLE_METHODS):
            method = getattr(kind, name, None)
            if method is None:
                continue

            def call(self: Any, *args: Any, method: Any = method, **kwargs: Any) -> Any:
                return called(method.__get__(self), args, kwargs)

            stack.enter_context(mock.patch.object(kind, name, call))
        yield


@contextlib.contextmanager
def patched_attention(attend: Callable[..., Any]) -> Iterator[None]:
    """Route calls of ``scaled_dot_product_attention``, also those by torch's own code."""
    with mock.patch.object(functional, "scaled_dot_product_attention", attend):
        yield


@contextlib.contextmanager
def patched_grouped(grouped: Callable[..., Any]) -> Iterator[None]:
    """Route calls of ``grouped_mm``, the product of a mixture of experts."""
    with mock.patch.object(functional, "grouped_mm", grouped):
        yield


class _FusedGelu:
    """A region in which the GELUs that transformers writes out are torch's one operation.

    Eight passes over memory become one. In bfloat16 and float16 every pass rounds, and they stay
    as they are. Several threads may be in it at the same time.
    """

    _NAMES = ("NewGELUActivation", "FastGELUActivation")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._patches = contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                activations = sys.modules.get("transformers.activations")
                for kind in (getattr(activations, name, None) for name in self._NAMES):
                    if kind is not None:
                        fused = _wide_as_one(kind.forward)
                        self._patches.enter_context(mock.patch.object(kind, "forward", fused))
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._patches.close()


@functools.cache  # the same function in every step: torch.compile looks at it
def _wide_as_one(plain: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    @functools.wraps(plain)
    def forward(module: nn.Module, input: Tensor) -> Tensor:
        if input.dtype in (torch.float32, torch.float64):
            return functional.gelu(input, approximate="tanh")
        return plain(module, input)

    return forward


fused_gelu = _FusedGelu()


@contextlib.contextmanager
def preserved_state(
    model: nn.Module, changed: Iterable[torch.Tensor] = ()
) -> Iterator[Callable[[], None]]:
    """Put back what running ``model`` changes, and what Python keeps; yield what does it at once.

    Buffers (running statistics), gradients, random states, attributes of the modules, what hooks
    hold, configs, and the tensors ``changed``: parameters that a forward pass writes to.
    Transformers' recorders, once installed, stay.
    """
    places = Places(model, with_values=True)
    tensors = [(t, t.data, t.detach().clone()) for t in [*model.buffers(), *changed]]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    state, python = torch.get_rng_state(), PythonState(model.modules())

    def restore() -> None:
        torch.set_rng_state(state)
        python.restore()
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for tensor, memory, value in tensors:
                tensor.data = memory
                tensor.data.copy_(value)  # its version stays: nothing is new
        places.restore()

    try:
        yield restore
    finally:
        recording = [module for module in model.modules() if vars(module).get(INSTALLED)]
        restore()
        for module in recording:  # transformers' recorders, which it installs in a first run
            sys.modules["transformers.utils.output_capturing"].maybe_install_capturing_hooks(module)


@contextlib.contextmanager
def without_gradient_hooks(model: nn.Module) -> Iterator[None]:
    """Take away what the user's code does in backward passes (steps of optimizers, logs)."""
    places = [
        *((p, ("_backward_hooks", "_post_accumulate_grad_hooks")) for p in model.parameters()),
        *((m, ("_backward_hooks", "_backward_pre_hooks")) for m in model.modules()),
    ]
    found = [getattr(owner, name, None) for owner, names in places for name in names]
    kept = [(hooks, dict(hooks)) for hooks in found if hooks]
    for hooks, _ in kept:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, own in kept:
            hooks.update(own)


class _NoCache(int):
    """False, instead of a cache that the model would have made."""

    def __repr__(self) -> str:
        return "False"


def _packed_unless_cached(find: Callable[[Any], Any], position_ids: Any) -> Any:
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        use_cache = frame.f_locals.get("use_cache")
        if use_cache is not None:
            return None if isinstance(use_cache, _NoCache) else find(position_ids)
        frame = frame.f_back
    return find(position_ids)


def _always_tracing(tensor: Any = None) -> bool:  # noqa: ARG001 - transformers' signature
    return True


def configs_of(model: nn.Module) -> list[Any]:
    """Return the distinct configs of ``model`` and its submodules, nested ones included."""
    found: dict[int, Any] = {}

    def add(config: Any) -> None:
        if config is None or id(config) in found or not hasattr(config, "to_dict"):
            return
        found[id(config)] = config
        for value in list(vars(config).values()):
            add(value)

    for module in model.modules():
        add(getattr(module, "config", None))
    return list(found.values())


# ---- functions whose results functools keeps --------------------------------------------------


# Namespace or class, name there, and what stands there during a trace.
_Found = list[tuple[Any, str, Any]]
_FOUND: weakref.WeakKeyDictionary[nn.Module, _Found] = weakref.WeakKeyDictionary()
# Whether what a function returns is a table: tensors that it does not draw.
_IS_TABLE: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def called_anew(model: nn.Module) -> Iterator[None]:
    """Let cached functions of the user that the code of ``model`` names compute tensors anew."""
    if model not in _FOUND:
        cached = PythonState(model.modules()).cached
        _FOUND[model] = [(place, name, _method_anew(value)) for place, name, value in cached]
    with contextlib.ExitStack() as stack:
        for place, name, call in _FOUND[model]:
            put = (
                functools.partial(setattr, place) if isinstance(place, type) else place.__setitem__
            )
            stack.callback(put, name, (vars(place) if isinstance(place, type) else place)[name])
            put(name, call)
        yield


def _method_anew(value: Any) -> Any:
    is_method = isinstance(value, staticmethod | classmethod)
    return type(value)(_anew(value.__func__)) if is_method else _anew(value)


def _anew(wrapper: functools._lru_cache_wrapper[Any]) -> Callable[..., Any]:
    """Return the function itself, or the cached one if it turns out to make no table."""

    @functools.wraps(wrapper.__wrapped__)
    def call(*args: Any, **kwargs: Any) -> Any:
        if wrapper in _IS_TABLE:
            return (wrapper.__wrapped__ if _IS_TABLE[wrapper] else wrapper)(*args, **kwargs)
        generators = Generators()
        generators.add(torch.default_generator)
        before = generators.states()
        result = wrapper.__wrapped__(*args, **kwargs)
        if generators.drawn(before, generators.states()):
            generators.put_back(before)
            _IS_TABLE[wrapper] = False
            return wrapper(*args, **kwargs)
        _IS_TABLE[wrapper] = any(True for _ in tensors_in(result))
        return result

    vars(call).update(
        {n: getattr(wrapper, n) for n in ("cache_info", "cache_clear", "cache_parameters")}
    )
    return call
