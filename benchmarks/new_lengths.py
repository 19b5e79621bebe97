"""What a batch of a new length costs (local target): plain torch, a known length, a new one.

    python -m benchmarks.new_lengths [layers] [hidden]

A Llama for training, 2 stages, microbatches of 2 x 256 to 512 tokens; every round is a step of
plain torch, one of ours at a length that is new, and one at a length that is known. Medians.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from statistics import median

import torch
import transformers
from torch import Tensor

import ipu_pipeline as ipp

MICROBATCHES, MICRO, ROUNDS = 2, 2, 8
FIRST, APART = 256, 32


def main() -> None:
    """Print the three figures."""
    layers, hidden = (int(text) for text in sys.argv[1:3] or ("4", "256"))
    config = transformers.LlamaConfig(
        vocab_size=4000,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    model = transformers.LlamaForCausalLM(config).train()
    example = {name: value[:MICRO] for name, value in _batch(FIRST).items()}
    plan = ipp.plan(model, example, num_stages=2, microbatches=MICROBATCHES)
    found: dict[str, list[float]] = {"plain torch": [], "known length": [], "new length": []}
    with ipp.compile(model, plan) as executable:
        _timed(executable.forward_backward, _batch(FIRST))
        _timed(executable.forward_backward, _batch(FIRST + 1))
        for number in range(1, ROUNDS + 1):
            batch = _batch(FIRST + APART * number)
            found["plain torch"].append(_timed(lambda given: _plain(model, given), batch))
            found["new length"].append(_timed(executable.forward_backward, batch))
            found["known length"].append(_timed(executable.forward_backward, batch))
    for name, seconds in found.items():
        print(f"{name:13} {1e3 * median(seconds):7.1f} ms")
    news, knowns, plains = found["new length"], found["known length"], found["plain torch"]
    more = median(new - known for new, known in zip(news, knowns, strict=True))
    print(f"a new length takes {1e3 * more:.1f} ms more, {100 * more / median(plains):.1f} % of it")


def _batch(length: int) -> dict[str, Tensor]:
    ids = torch.randint(0, 4000, (MICROBATCHES * MICRO, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def _plain(model: torch.nn.Module, batch: Mapping[str, Tensor]) -> None:
    for first in range(0, MICROBATCHES * MICRO, MICRO):
        part = {name: value[first : first + MICRO] for name, value in batch.items()}
        (model(**part).loss / MICROBATCHES).backward()


def _timed(step: Callable[[Mapping[str, Tensor]], object], batch: Mapping[str, Tensor]) -> float:
    started = time.perf_counter()
    step(batch)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
