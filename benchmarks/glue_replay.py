"""What it costs that the model's own glue runs again before every microbatch (local target).

    python -m benchmarks.glue_replay

BERT-base for question answering, 2 stages, 4 microbatches of 2 x 128 tokens, training. Medians over
steps: seconds in which the glue is replayed and compared, and seconds of the whole step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
import transformers

import ipu_pipeline as ipp

STEPS, MICROBATCHES, MICRO, LENGTH = 3, 4, 2, 128


def main() -> None:
    """Print both figures and their ratio."""
    model = transformers.BertForQuestionAnswering(transformers.BertConfig()).train()
    ids = torch.randint(1000, 20000, (MICROBATCHES * MICRO, LENGTH))
    positions = torch.randint(0, LENGTH, (2, len(ids)))
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "start_positions": positions[0],
        "end_positions": positions[1],
    }
    example = {name: value[:MICRO] for name, value in batch.items()}
    plan = ipp.plan(model, example, num_stages=2, microbatches=MICROBATCHES)
    replayed: list[float] = []
    steps: list[float] = []
    with ipp.compile(model, plan, self_check=False) as executable:
        cache: Any = executable._cache  # type: ignore[attr-defined]
        groups = cache.groups

        def timed(parts: Any) -> Iterator[Any]:
            found, seconds = groups(parts), 0.0
            while True:
                started = time.perf_counter()
                group = next(found, None)
                seconds += time.perf_counter() - started
                if group is None:
                    break
                yield group
            replayed.append(seconds)

        cache.groups = timed
        for _ in range(STEPS + 1):
            started = time.perf_counter()
            executable.forward_backward(batch)
            steps.append(time.perf_counter() - started)
    replay_s, step_s = median(replayed[1:]), median(steps[1:])
    print(
        f"replay {1e3 * replay_s:.2f} ms of a step of {1e3 * step_s:.0f} ms: "
        f"{100 * replay_s / step_s:.3f} %, {MICROBATCHES} microbatches"
    )


if __name__ == "__main__":
    main()
