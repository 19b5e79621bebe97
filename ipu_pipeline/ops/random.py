"""Random numbers that do not depend on the split.

Torch draws dropout masks from one global generator, so a mask would depend on which stage ran
first. Inside :class:`block_scope` every random torch function of the calling thread draws
numbers keyed by (seed, step, microbatch, block) instead; entering the same scope again, as
recomputation does, replays the same numbers.

Dropout masks are counted (:mod:`ipu_pipeline.ops.dropout`): the n-th mask of a scope is stream n
of the scope's seed, and is computed again in the backward pass. Everything else draws from a
``torch.Generator`` of that seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from ipu_pipeline.ops.attention import attention_counter
from ipu_pipeline.ops.dropout import FLOATS, bernoulli_counter_, dropout_counter
from ipu_pipeline.ops.embedding import fast_embedding
from ipu_pipeline.ops.linear import fast_addmm, fast_linear

# Python-level functions that draw random numbers without taking a generator.
_COMPOSITE = frozenset(
    {
        functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d,
        functional.alpha_dropout, functional.feature_alpha_dropout, functional.gumbel_softmax,
        functional.rrelu, functional.fractional_max_pool2d, functional.fractional_max_pool3d,
        functional.scaled_dot_product_attention, functional.multi_head_attention_forward,
        torch.dropout, torch.dropout_, torch.alpha_dropout, torch.alpha_dropout_,
        torch.feature_dropout, torch.feature_dropout_, torch.feature_alpha_dropout,
        torch.feature_alpha_dropout_, torch.native_dropout, torch.rrelu, torch.rrelu_, torch.lstm,
        torch.gru, torch.rnn_tanh, torch.rnn_relu, torch._sample_dirichlet,
        torch.rand_like, torch.randn_like, torch.randint_like,
    }
)  # fmt: skip
# Functions with a ``generator`` argument.
_GENERATOR = frozenset(
    {
        torch.rand, torch.randn, torch.randint, torch.randperm, torch.bernoulli, torch.normal,
        torch.multinomial, torch.poisson, torch.binomial, torch._standard_gamma,
        Tensor.bernoulli, Tensor.bernoulli_, Tensor.normal_, Tensor.uniform_, Tensor.random_,
        Tensor.exponential_, Tensor.geometric_, Tensor.cauchy_, Tensor.log_normal_,
        Tensor.multinomial,
    }
)  # fmt: skip


def is_random(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of ``func`` with these arguments draws random numbers."""
    if func is functional.scaled_dot_product_attention:
        return bool(kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0))
    if func in (functional.dropout, torch.dropout):
        probability = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
        position_of_training = 2
        given = args[position_of_training] if len(args) > position_of_training else True
        return bool(kwargs.get("training", kwargs.get("train", given))) and probability > 0
    return func in _COMPOSITE or func in _GENERATOR


class _Source:
    """Where a scope's numbers come from: streams for masks, a generator for all else."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._generators: dict[str, torch.Generator] = {}
        self._streams = count()

    def generator(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Generator:
        """Return the generator of the device that a call draws on; of meta that of the CPU."""
        given = (a.device for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        device = torch.device(kwargs.get("device") or next(given, "cpu"))
        kind = "cpu" if device.type == "meta" else device.type
        if kind not in self._generators:
            self._generators[kind] = torch.Generator(kind).manual_seed(self.seed)
        return self._generators[kind]

    def mask_key(self) -> tuple[int, int]:
        """Return seed and stream of the next mask."""
        return self.seed, next(self._streams)


class _FromSource(TorchDispatchMode):
    """Gives every ATen operation that draws its numbers from the scope's source."""

    def __init__(self, source: _Source) -> None:
        super().__init__()
        self.source = source

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.aten.bernoulli_.float and kwargs.get("generator") is None:
            return self._bernoulli_(*args)
        if func is torch.ops.aten.native_dropout.default:
            return self._native_dropout(*args, **kwargs)
        if any(argument.name == "generator" for argument in func._schema.arguments):
            kwargs["generator"] = kwargs.get("generator") or self.source.generator(args, kwargs)
            return func(*args, **kwargs)
        with_generator = _generator_overload(func)
        if with_generator is not None:
            return with_generator(*args, **kwargs, generator=self.source.generator(args, kwargs))
        return func(*args, **kwargs)

    def _bernoulli_(self, out: Tensor, p: float = 0.5) -> Tensor:
        return bernoulli_counter_(out, p, *self.source.mask_key())

    def _native_dropout(self, x: Tensor, p: float, train: Any) -> tuple[Tensor, Tensor]:
        if not train:
            return torch.ops.aten.native_dropout.default(x, p, train)
        kept = self._bernoulli_(torch.empty_like(x, dtype=torch.bool), 1 - p)
        return x * kept * (1 / (1 - p) if p < 1 else 0.0), kept


def _generator_overload(func: Any) -> Any:
    """Return ``func``'s twin with a generator argument.

    ``rand`` has ``rand.generator``, ``randint.low`` has ``randint.low_generator``, and
    ``randint.low_out`` has ``randint.low_generator_out``.
    """
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return None
    words = [word for word in func._overloadname.split("_") if word != "default"]
    position = len(words) - 1 if words[-1:] == ["out"] else len(words)
    return getattr(
        func.overloadpacket, "_".join([*words[:position], "generator", *words[position:]]), None
    )


class block_scope(TorchFunctionMode):
    """Within it, torch functions of this thread run as those of one block.

    Random ones draw from a keyed generator, products run where they are fast.

    Args:
        *key: Whole numbers and strings that identify the scope: seed, step, microbatch, block.
    """

    def __init__(self, *key: int | str) -> None:
        super().__init__()
        self.key = key
        self._source: _Source | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FASTER:
            result = _FASTER[func](*args, **kwargs)
            return func(*args, **kwargs) if result is None else result
        if func in _COMPOSITE:
            if not is_random(func, args, kwargs):
                return func(*args, **kwargs)
        elif func not in _GENERATOR:
            return func(*args, **kwargs)
        if any(isinstance(mode, _FromSource) for mode in _get_current_dispatch_mode_stack()):
            return func(*args, **kwargs)  # a scope inside this one has already taken the call
        if self._source is None:
            self._source = _Source(derive_seed(*self.key))
        own = _OWN.get(func)
        result = None if own is None else own(self._source, *args, **kwargs)
        if result is not None:
            return result
        with _FromSource(self._source):
            return func(*args, **kwargs)


def _dropout(
    source: _Source,
    input: Tensor,
    p: float = 0.5,
    training: bool = True,  # noqa: FBT001, FBT002
    inplace: bool = False,  # noqa: FBT001, FBT002
    *,
    train: bool = True,  # what torch.dropout calls it
) -> Tensor | None:
    if not (training and train) or not 0 < p <= 1 or input.dtype not in FLOATS:
        return None
    result = dropout_counter(input, p, *source.mask_key())
    return input.copy_(result) if inplace else result


# Functions with a path of our own: products without, others with random numbers. It returns None
# for a call that torch has to take, and has torch's names of arguments.
_FASTER: dict[Any, Callable[..., Tensor | None]] = {
    functional.embedding: fast_embedding,
    functional.linear: fast_linear,
    torch.addmm: fast_addmm,
}
_OWN: dict[Any, Callable[..., Tensor | None]] = {
    functional.dropout: _dropout,
    torch.dropout: _dropout,
    torch.dropout_: partial(_dropout, inplace=True),
    functional.scaled_dot_product_attention: lambda source, *args, **kwargs: attention_counter(
        source.mask_key(), *args, **kwargs
    ),
}


def derive_seed(*key: int | str) -> int:
    """Return a 63-bit seed that depends on every part of ``key``."""
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
