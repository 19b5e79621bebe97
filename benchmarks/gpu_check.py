"""Predicted against measured on one GPU: ``python -m benchmarks.gpu_check [--json F] [--dry-run]``.

Trains BERT-large, GPT-2 and a model with Llama-1B's shape in bfloat16 (from configs, with random
weights, nothing is downloaded): block times by CUDA events around the model's own modules, peak of
allocated memory, seconds of a step with its update. The predictions are those of ``plan`` on one
such GPU. It takes a few minutes; ``--dry-run`` runs all of it on the CPU with tiny models, and then
NOTHING IS MEASURED ON A GPU: its figures say only that the program works.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

import ipu_pipeline as ipp
from benchmarks.gpu_rows import machine_of
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.planner.backend import backend_of
from ipu_pipeline.planner.price import workload_of

MICROBATCHES = 4
WARM_UP, STEPS = 3, 10
DRY_MACHINE = "h200"
DRY_NOTE = "DRY RUN on the CPU with tiny models: nothing was measured on a GPU"


@dataclass(frozen=True)
class Case:
    """A model to train.

    Attributes:
        name: Shown in the table.
        config: Fields of its config; ``model_type`` is one.
        tiny: Fields that a dry run changes.
        micro_batch: Samples of a microbatch.
        length: Tokens of a sample.
    """

    name: str
    config: Mapping[str, Any]
    tiny: Mapping[str, Any]
    micro_batch: int
    length: int


CASES = (
    Case(
        "BERT-large",
        {"model_type": "bert", "hidden_size": 1024, "num_hidden_layers": 24,
         "num_attention_heads": 16, "intermediate_size": 4096},
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 64, "vocab_size": 128},
        16, 512,
    ),
    Case(
        "GPT-2",
        {"model_type": "gpt2"},
        {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 128},
        16, 1024,
    ),
    Case(
        "Llama-1B shape",
        {"model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16,
         "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 8192,
         "vocab_size": 128256, "max_position_embeddings": 4096, "tie_word_embeddings": True},
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "intermediate_size": 64, "vocab_size": 128},
        4, 2048,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """One number, predicted and measured.

    Attributes:
        model: Of which model.
        what: ``layer forward``, ``step``, ``peak memory``, ...
        unit: ``ms`` or ``GB``.
        predicted: By the plan.
        measured: Here; ``None``: this device does not say it.
    """

    model: str
    what: str
    unit: str
    predicted: float
    measured: float | None

    @property
    def error(self) -> float | None:
        """Relative error of the prediction."""
        return self.predicted / self.measured - 1 if self.measured else None


def built(case: Case, device: str, *, dry: bool) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a model in bfloat16 and one microbatch for it."""
    fields = {**case.config, **(case.tiny if dry else {})}
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    made: Any = AutoModelForMaskedLM if config.model_type == "bert" else AutoModelForCausalLM
    size = (1, 16) if dry else (case.micro_batch, case.length)
    torch.manual_seed(0)
    with torch.device(device):
        model = made.from_config(config, dtype=torch.bfloat16).train()
        ids = torch.zeros(size, dtype=torch.long) + 1
    return model, {"input_ids": ids, "labels": ids.clone()}


def predicted(model: nn.Module, batch: Mapping[str, Tensor], machine: str) -> Plan:
    """Return the plan of one GPU that runs the whole model."""
    return ipp.plan(model, batch, machine=f"{machine}-x1", num_stages=1, microbatches=MICROBATCHES)


class Timer:
    """Seconds of the modules of blocks, forward and backward, in the order of the device's work."""

    def __init__(self, model: nn.Module, plan: Plan, *, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._open: dict[tuple[str, str], Any] = {}
        self._spans: dict[tuple[str, str], list[tuple[Any, Any]]] = defaultdict(list)
        known = dict(model.named_modules())
        self._handles: list[Any] = []
        for block in plan.graph.blocks:
            module = known.get(block.module or "")
            if module is None or block.kind not in ("layer", "head"):
                continue
            passes: dict[str, tuple[Any, Any]] = {
                "forward": (module.register_forward_pre_hook, module.register_forward_hook),
                "backward": (
                    module.register_full_backward_pre_hook,
                    module.register_full_backward_hook,
                ),
            }
            for which, (start, end) in passes.items():
                key = (block.name, which)
                self._handles += [start(self._starts(key)), end(self._ends(key))]

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _starts(self, key: tuple[str, str]) -> Callable[..., None]:
        def start(*_: Any) -> None:
            self._open[key] = self._now()

        return start

    def _ends(self, key: tuple[str, str]) -> Callable[..., None]:
        def end(*_: Any) -> None:
            self._spans[key].append((self._open.pop(key), self._now()))

        return end

    def seconds(self) -> dict[tuple[str, str], float]:
        """Return the median of every block and pass, and take the hooks away."""
        if self._on_gpu:
            torch.cuda.synchronize()
        for handle in self._handles:
            handle.remove()
        return {
            key: median(
                start.elapsed_time(end) / 1e3 if self._on_gpu else end - start
                for start, end in spans
            )
            for key, spans in self._spans.items()
        }


class Training:
    """Trains as the plan says: 16-bit weights, gradients and AdamW's state in float32."""

    def __init__(self, model: nn.Module, batch: Mapping[str, Tensor], *, on_gpu: bool) -> None:
        self._model, self._batch, self._on_gpu = model, batch, on_gpu
        self._pairs = [(p, p.detach().float()) for p in model.parameters() if p.requires_grad]
        for parameter, master in self._pairs:
            master.grad = torch.zeros_like(master)
            parameter.register_post_accumulate_grad_hook(self._adds_to(master))
        self._optimizer = torch.optim.AdamW([m for _, m in self._pairs], fused=on_gpu)

    @staticmethod
    def _adds_to(master: Tensor) -> Callable[[Tensor], None]:
        def add(parameter: Tensor) -> None:
            assert master.grad is not None
            assert parameter.grad is not None
            master.grad += parameter.grad
            parameter.grad = None

        return add

    def step(self) -> float:
        """Do one optimizer step and return its seconds."""
        self._wait()
        begin = time.perf_counter()
        for _ in range(MICROBATCHES):
            (self._model(**self._batch).loss / MICROBATCHES).backward()
        self._optimizer.step()
        with torch.no_grad():
            for parameter, master in self._pairs:
                parameter.copy_(master)
                assert master.grad is not None
                master.grad.zero_()
        self._wait()
        return time.perf_counter() - begin

    def _wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()


def checked(case: Case, machine: str, *, dry: bool, steps: int) -> list[Figure]:
    """Predict and measure one model."""
    device = "cpu" if dry else "cuda"
    plan = predicted(*built(case, "meta", dry=dry), machine)
    model, batch = built(case, device, dry=dry)
    training = Training(model, batch, on_gpu=not dry)
    for _ in range(min(WARM_UP, steps)):
        training.step()
    if not dry:
        torch.cuda.reset_peak_memory_stats()
    step_s = median(training.step() for _ in range(steps))
    peak = None if dry else torch.cuda.max_memory_allocated() / 1e9
    timer = Timer(model, plan, on_gpu=not dry)
    training.step()
    return [
        *_block_figures(case.name, plan, timer.seconds()),
        Figure(case.name, "step", "ms", plan.objective_s * 1e3, step_s * 1e3),
        Figure(case.name, "peak memory", "GB", plan.stages[0].memory_bytes / 1e9, peak),
    ]


def _block_figures(
    name: str, plan: Plan, measured: Mapping[tuple[str, str], float]
) -> list[Figure]:
    """Return the mean block of every kind that was measured."""
    costs = backend_of(plan.machine).costs(workload_of(plan)).blocks
    kinds = {block.name: block.kind for block in plan.graph.blocks}
    groups: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for (block, which), seconds in measured.items():
        one = costs[block].plain
        expected = one.forward_s if which == "forward" else one.backward_s
        groups[kinds[block], which].append((expected, seconds))
    return [
        Figure(name, f"{kind} {which}", "ms", *(1e3 * fmean(x) for x in zip(*pairs, strict=True)))
        for (kind, which), pairs in groups.items()
    ]


def text(report: Mapping[str, Any]) -> str:
    """Return the report as a table."""
    lines = [f"{report['device']}, torch {report['torch']}, priced as {report['machine']}"]
    lines += [f"*** {report['note']} ***"] if report["note"] else []
    lines.append(f"{'model':16s} {'what':16s} {'predicted':>12s} {'measured':>12s} {'error':>8s}")
    for one in report["figures"]:
        measured, error = one["measured"], one["error"]
        lines.append(
            f"{one['model']:16s} {one['what']:16s} {one['predicted']:9.3f} {one['unit']} "
            f"{'-' if measured is None else f'{measured:9.3f} ' + one['unit']:>12s} "
            f"{'-' if error is None else f'{error:+.1%}':>8s}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and write the JSON file; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="the flow on the CPU, tiny models")
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    parser.add_argument("--steps", type=int, default=STEPS, help="measured steps of every model")
    given = parser.parse_args(arguments)
    if given.steps < 1:
        parser.error(f"--steps must be at least 1, got {given.steps}")
    if not given.dry_run and not torch.cuda.is_available():
        print("there is no GPU here; --dry-run runs the flow on the CPU", file=sys.stderr)
        return 2
    device = "CPU" if given.dry_run else torch.cuda.get_device_name()
    machine = DRY_MACHINE if given.dry_run else machine_of(device)
    figures = [
        figure
        for case in CASES
        for figure in checked(case, machine, dry=given.dry_run, steps=given.steps)
    ]
    report = {
        "device": device,
        "machine": f"{machine}-x1",
        "torch": torch.__version__,
        "note": DRY_NOTE if given.dry_run else "",
        "measured_on_gpu": not given.dry_run,
        "figures": [
            {**asdict(one), "error": None if given.dry_run else one.error} for one in figures
        ],
    }
    if given.json is not None:
        given.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(text(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
