"""Calls of a model's own methods, ``generate`` and ``forward``, and the KV cache that they fill.

How large that becomes follows from the config and transformers' cache classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ipu_pipeline.errors import LoweringError
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.stages.devices import on_device

States = list[Tensor]
Call = tuple[tuple[Any, ...], Mapping[str, Any]]


def check_call(model: nn.Module, name: str) -> None:
    """Refuse to generate with a model that does not.

    Raises:
        LoweringError: It has no ``generate``.
    """
    can_generate = getattr(model, "can_generate", None)
    if name == "generate" and (can_generate is None or not can_generate()):
        raise LoweringError(
            f"{type(model).__name__} does not generate: transformers has no generate for it; use "
            "a class with a language model's head, or forward and eval_step"
        )


def called(model: nn.Module, name: str, call: Call, device: torch.device) -> Any:
    """Call ``forward`` (with its hooks) or another method of a model, inputs on its device."""
    method = model if name == "forward" else getattr(model, name)
    args, kwargs = call
    given = [a.to(device) if isinstance(a, Tensor) else a for a in args]
    return method(*given, **on_device(kwargs, device))


def called_in_turn(
    model: nn.Module, name: str, calls: Sequence[Call], device: torch.device
) -> list[Any]:
    """Return the results of calls, each of which draws as if it were alone."""
    states = generator_states(device)
    results = []
    for call in calls:
        set_generators(states, device)
        results.append(called(model, name, call, device))
    return results


def generator_states(device: torch.device) -> States:
    """Return the states of torch's generators, of the CPU and of a device."""
    on_gpu = device.type == "cuda"
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if on_gpu else [])]


def set_generators(states: States, device: torch.device) -> None:
    """Set the states of torch's generators."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


# ---- how large the KV cache of every stage becomes --------------------------------------------


def kv_cache_bytes(
    model: nn.Module, plan: Plan, batch_size: int, length: int, encoder_length: int = 0
) -> tuple[int, ...]:
    """Return the bytes of every stage's cache behind ``length`` tokens, prompt included.

    Keys are ``[batch_size, key-value heads, length, head size]``, values alike; a layer with a
    sliding window keeps the end of them, as transformers' cache decides. A decoder's layer keeps
    keys and values of the encoder, too.

    Args:
        model: Its config, dtype and layers count; it may live on ``meta``.
        plan: Which layers are in which stage.
        batch_size: Sequences (samples x beams).
        length: Tokens of each, in the cache.
        encoder_length: Positions of the encoder's output, of models that have one.

    Raises:
        LoweringError: Layers keep something else than keys and values of their heads.
    """
    known: Any = model
    config, dtype = known.config, known.dtype

    def made(positions: int) -> list[Tensor]:
        kept = _kept(model, config.get_text_config(decoder=True))
        shapes = [(batch_size, kept.heads, positions, size) for size in (kept.key, kept.value)]
        return [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]

    layers = _layer_bytes(config, partial(made, length))
    crossed = sum(t.nbytes for t in made(encoder_length)) if config.is_encoder_decoder else 0
    sizes: list[int] = []
    for stage in plan.stages:
        paths = [plan.graph[block].module for block in stage.blocks]
        modules = [m for path in paths if path is not None
                   for m in model.get_submodule(path).modules()]  # fmt: skip
        numbers = {getattr(m, "layer_idx", None) for m in modules if getattr(m, "is_decoder", True)}
        own = [index for index in numbers if isinstance(index, int) and index < len(layers)]
        sizes.append(sum(layers[index] for index in own) + crossed * len(own))
    return tuple(sizes)


def _layer_bytes(config: Any, made: Callable[[], list[Tensor]]) -> list[int]:
    """Return what every layer keeps, in bytes, of the keys and values of all positions."""
    layers: list[Any] = DynamicCache(config=config).layers
    if not layers:  # made as they are filled
        number = config.get_text_config(decoder=True).num_hidden_layers
        layers += [DynamicLayer() for _ in range(number)]
    for index, layer in enumerate(layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise LoweringError(
                f"layer {index} of {type(config).__name__} keeps a {type(layer).__name__}, which "
                "is not made of keys and values alone; measure it: generate once and look at the "
                "cache (return_dict_in_generate=True)"
            )
        layer.update(*made())
    return [layer.keys.nbytes + layer.values.nbytes for layer in layers]


class _Kept(NamedTuple):
    """What a layer keeps of a position: heads, and the sizes of their keys and values."""

    heads: int
    key: int
    value: int


def _kept(model: nn.Module, text: Any) -> _Kept:
    if any(
        hasattr(module, "expand_kv") for module in model.modules()
    ):  # latents, and a rotated key
        return _Kept(1, text.kv_lora_rank, text.qk_rope_head_dim)
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or getattr(text, "d_kv", None)
    size = size or text.hidden_size // heads
    shared = getattr(text, "multi_query", False) and not getattr(
        text, "new_decoder_architecture", False
    )  # Falcon's
    return _Kept(
        1 if shared else getattr(text, "num_key_value_heads", None) or heads,
        getattr(text, "qk_head_dim", None) or size,
        getattr(text, "v_head_dim", None) or size,
    )
