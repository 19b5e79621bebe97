"""Predicted against measured activation memory: ``python -m benchmarks.memory_accuracy``.

Every row is one fresh process that runs a training step of two or more microbatches on the local
target. Activation memory is the peak without weights, gradients and optimizer state; predicted is
the peak of the simulated timeline over all stages, which share one memory. Measured are allocated
bytes (every allocation of the process, scratch of kernels included) and the growth of the resident
set.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import ipu_pipeline as ipp
from benchmarks.memory_mt5 import untied
from benchmarks.memory_probe import Probe, run_child
from ipu_pipeline.capture.from_config import from_config
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.planner.schedules.simulate import simulate
from ipu_pipeline.planner.search import Constraints

MB = 1e6
MICROBATCHES = 3


@dataclass(frozen=True)
class Case:
    """A model and one microbatch of it.

    Attributes:
        config: Makes its configuration.
        task: Its task.
        batch_size: Samples of a microbatch.
        seq_length: Tokens of a sample; ``None``: the model's own.
        serialize: Slices by block in the serialized plans; empty: it has none.
    """

    config: Callable[[], transformers.PretrainedConfig]
    task: str
    batch_size: int
    seq_length: int | None
    serialize: Mapping[str, int]


CASES = {
    "bert-qa": Case(
        lambda: transformers.BertConfig(num_hidden_layers=4),
        "question-answering", 2, 384, {},
    ),
    "bert-mlm": Case(
        lambda: transformers.BertConfig(num_hidden_layers=4, tie_word_embeddings=False),
        "masked-lm", 4, 128, {"bert.embeddings": 4, "cls": 4},
    ),
    "gpt2": Case(
        lambda: transformers.GPT2Config(n_layer=4, tie_word_embeddings=False),
        "causal-lm", 2, 256, {"transformer.wte": 4, "lm_head": 8},
    ),
    "mt5": Case(
        lambda: transformers.MT5Config(vocab_size=50112, num_layers=4, num_decoder_layers=4),
        "seq2seq-lm", 2, 256, {"encoder.embed_tokens": 4, "decoder.embed_tokens": 4, "lm_head": 8},
    ),
    "vit": Case(
        lambda: transformers.ViTConfig(num_hidden_layers=6), "image-classification", 4, None, {},
    ),
    "lxmert": Case(
        lambda: transformers.LxmertConfig(l_layers=3, x_layers=2, r_layers=2),
        "visual-question-answering", 8, 64, {},
    ),
}  # fmt: skip
WAYS = ("plain", "recompute", "serialize", "serialize+recompute")


def build(case: Case) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model with random weights in training mode, and one microbatch."""
    meta, batch = from_config(
        case.config(),
        case.task,
        batch_size=case.batch_size,
        **({} if case.seq_length is None else {"seq_length": case.seq_length}),
    )
    torch.manual_seed(0)
    model = type(meta)(case.config())
    if model.get_output_embeddings() is not None and case.task == "seq2seq-lm":
        untied(model)
    return model.train(), {name: _values(value) for name, value in batch.items()}


def _values(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.is_floating_point():
        return torch.rand(tuple(value.shape), dtype=value.dtype)
    return torch.ones(tuple(value.shape), dtype=value.dtype)


def plan_for(model: nn.Module, batch: Mapping[str, Any], case: Case, way: str, stages: int) -> Plan:
    """Plan ``way`` over ``stages``."""
    limits = Constraints(
        recompute="always" if "recompute" in way else "never",
        allow_serialize="serialize" in way,
        serialize=case.serialize if "serialize" in way else {},
    )
    return ipp.plan(
        model, batch, num_stages=stages, microbatches=MICROBATCHES, schedule="1f1b",
        constraints=limits,
    )  # fmt: skip


def measure(name: str, way: str, stages: int) -> dict[str, Any]:
    """Run one case in this process."""
    case = CASES[name]
    torch.set_num_threads(1)
    model, batch = build(case)
    plan = plan_for(model, batch, case, way, stages)
    whole = {
        key: torch.cat([value] * MICROBATCHES) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }
    optimizer = torch.optim.AdamW(model.parameters())
    with ipp.compile(model, plan, optimizer=optimizer, self_check=False) as executable:
        executable.forward_backward(whole)  # captures
        model.zero_grad(set_to_none=True)
        started, probe = perf_counter(), Probe()
        executable.forward_backward(whole)
        used = probe.stop()
        seconds = perf_counter() - started
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        update = Probe()
        optimizer.step()
        updated = update.stop()
    return {
        "predicted": simulate(plan).peak_activation_bytes,
        "heap": used.heap_peak - gradients,
        "resident": used.resident_peak - gradients,
        "update": updated.heap_peak - updated.heap_after,
        "seconds": seconds,
        "serialized": sum(len(stage.serialize) for stage in plan.stages),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--child", action="store_true", help="run one case here, print JSON")
    options = parser.parse_args()
    ways = options.ways.split(",")
    if options.child:
        transformers.logging.set_verbosity_error()
        print(json.dumps(measure(options.names[0], ways[0], options.stages)))
        return
    print("model      way                  predicted     heap  error  resident  error   (MB)")
    for name in options.names or CASES:
        for way in ways:
            if "serialize" in way and not CASES[name].serialize:
                continue
            arguments = [name, "--ways", way, "--stages", str(options.stages), "--child"]
            found = run_child("benchmarks.memory_accuracy", arguments)
            row = [found[key] / MB for key in ("predicted", "heap", "resident")]
            errors = [row[0] / other - 1 for other in row[1:]]
            print(
                f"{name:10} {way:20} {row[0]:9.1f} {row[1]:8.1f} {errors[0]:+6.1%} {row[2]:9.1f} "
                f"{errors[1]:+6.1%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
