"""What the engine does on one GPU, in ten minutes at most: ``python -m benchmarks.gpu_engine``.

    python -m benchmarks.gpu_engine [--limit-s 540] [--json FILE]     on a GPU
    python -m benchmarks.gpu_engine --device cpu --tiny               a dry run of every part

A Llama-shaped model is trained from the same weights on the same batches in plain torch, in plain
torch under ``torch.compile``, and through plans of 2 and 4 stages on one device: the local target
with and without ``compile_blocks``, and the distributed target with one process and interleaved
stages. Weights are bfloat16 with float32 copies in the optimizer, as plans for GPUs assume; two
more runs have float32 weights under bf16 and fp16 autocast, the latter with a ``GradScaler``.

Of every run it prints the largest difference of a loss from plain torch's (relative), samples per
second (median of the later steps), and the peak of allocated memory beside what the plan predicts
for the stages of this device together. A part that fails is printed with its error, the others go
on; a part that would begin after the limit is left out and said so.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import ipu_pipeline as ipp
from ipu_pipeline.errors import PipelineError, first_line
from ipu_pipeline.ops.master_weights import MasterWeights

MACHINE = "h100-x4"
RATE, BETAS = 1e-4, (0.9, 0.95)
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Size:
    """A model and its batches."""

    hidden: int
    layers: int
    vocabulary: int
    length: int
    micro_batch: int
    microbatches: int
    steps: int


FULL = Size(1536, 16, 32000, 1024, 4, 8, 8)
TINY = Size(32, 4, 128, 16, 2, 4, 3)


@dataclass(frozen=True)
class Way:
    """How a run computes.

    Attributes:
        dtype: Of the weights.
        precision: Of autocast.
        scaled: Whether a ``GradScaler`` moves the factor of the loss.
    """

    dtype: torch.dtype = torch.bfloat16
    precision: str = "float32"
    scaled: bool = False

    @property
    def has_copies(self) -> bool:
        """Whether the optimizer steps float32 copies."""
        return self.dtype is not torch.float32


@dataclass(frozen=True)
class Curve:
    """What a run did. Memory is ``None`` on CPUs."""

    losses: list[float]
    samples_per_s: float
    peak_bytes: int | None


class Measurement:
    """The parts of the script, on one device."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self.size, self.device = size, device
        self.config = LlamaConfig(
            hidden_size=size.hidden, intermediate_size=4 * size.hidden,
            num_hidden_layers=size.layers, num_attention_heads=max(1, size.hidden // 64),
            num_key_value_heads=max(1, size.hidden // 64), vocab_size=size.vocabulary,
            max_position_embeddings=size.length, attn_implementation="sdpa", use_cache=False,
        )  # fmt: skip

    def model(self, way: Way) -> LlamaForCausalLM:
        """Return the model, the same one every time."""
        torch.manual_seed(0)
        return LlamaForCausalLM(self.config).train().to(way.dtype)

    def batches(self) -> list[Batch]:
        """Return the batches of all steps, on the CPU."""
        size, generator = self.size, torch.Generator().manual_seed(1)
        shape = (size.steps, size.micro_batch * size.microbatches, size.length)
        ids = torch.randint(0, size.vocabulary, shape, generator=generator)
        return [{"input_ids": each, "labels": each.clone()} for each in ids]

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return AdamW over all parameters."""
        return torch.optim.AdamW(model.parameters(), lr=RATE, betas=BETAS)

    def scaler(self) -> torch.amp.GradScaler:
        """Return a scaler that no first step overflows with."""
        return torch.amp.GradScaler("cpu", init_scale=2.0**12)

    # ---- runs ---------------------------------------------------------------------------

    def eager(self, way: Way, *, compiled: bool = False) -> Curve:
        """Train in plain torch."""
        model = self.model(way).to(self.device)
        optimizer, scaler = self.optimizer(model), self.scaler()
        masters = MasterWeights(optimizer)
        call: Any = torch.compile(model) if compiled else model
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(way.precision)

        def step(batch: Batch) -> float:
            total = torch.zeros((), device=self.device)
            for n in range(self.size.microbatches):
                first = n * self.size.micro_batch
                part = {
                    k: v[first : first + self.size.micro_batch].to(self.device)
                    for k, v in batch.items()
                }
                with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
                    loss = call(**part).loss / self.size.microbatches
                (scaler.scale(loss) if way.scaled else loss).backward()
                total += loss.detach()
            with masters.in_place():
                if way.scaled:
                    scaler.step(optimizer)
                    scaler.update()
                else:
                    optimizer.step()
            optimizer.zero_grad()
            return float(total)

        return self._timed(step)

    def planned(self, way: Way, plan: ipp.Plan, **options: Any) -> Curve:
        """Train through a plan."""
        model = self.model(way)
        with ipp.compile(
            model,
            plan,
            optimizer=self.optimizer(model),
            device=str(self.device.type),
            precision=way.precision,
            loss_scaling=self.scaler() if way.scaled else 1.0,
            master_weights=way.has_copies,
            self_check=False,
            **options,
        ) as executable:
            return self._timed(lambda batch: executable.train_step(batch).loss)

    def _timed(self, step: Callable[[Batch], float]) -> Curve:
        on_gpu = self.device.type == "cuda"
        seconds, losses = [], []
        for batch in self.batches():
            begin_s = time.perf_counter()
            losses.append(step(batch))
            if on_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin_s)
        samples = self.size.micro_batch * self.size.microbatches
        later = seconds[len(seconds) // 2 :]
        peak = torch.cuda.max_memory_allocated() if on_gpu else None
        return Curve(losses, samples / statistics.median(later), peak)

    def plan(self, stages: int, way: Way) -> ipp.Plan:
        """Return a plan of so many stages, priced for GPUs."""
        model = ipp.on_meta(self.config, task="causal-lm").to(way.dtype)
        example = {k: v[: self.size.micro_batch] for k, v in self.batches()[0].items()}
        return ipp.plan(
            model,
            example,
            machine=MACHINE,
            num_stages=stages,
            microbatches=self.size.microbatches,
            replicas=1,
        )


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """Let this process be the only one of a job."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    own = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    before = dict(os.environ)
    os.environ.update({**own, "MASTER_PORT": port})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def distributed(measurement: Measurement, way: Way, plan: ipp.Plan) -> Curve:
    """Train through the distributed target in this process alone."""
    with one_process():
        return measurement.planned(way, plan, target="distributed", schedule="interleaved")


def parts(measurement: Measurement) -> Iterator[tuple[str, str, int, Callable[[], Curve]]]:
    """Yield name, name of the run to compare with, predicted bytes, and what to run."""
    copies, bf16 = Way(), Way(torch.float32, "bf16")
    fp16 = Way(torch.float32, "fp16", scaled=True)
    yield "eager", "eager", 0, partial(measurement.eager, copies)
    plans = {stages: measurement.plan(stages, copies) for stages in (2, 4)}
    predicted = {n: sum(s.memory_bytes for s in plan.stages) for n, plan in plans.items()}
    for stages, plan in plans.items():
        name = f"local, {stages} stages"
        yield name, "eager", predicted[stages], partial(measurement.planned, copies, plan)
    yield (
        "distributed, 1 process, 4 interleaved stages", "eager", predicted[4],
        partial(distributed, measurement, copies, plans[4]),
    )  # fmt: skip
    for name, way in (("bf16 autocast", bf16), ("fp16 autocast and scaler", fp16)):
        yield f"eager, {name}", f"eager, {name}", 0, partial(measurement.eager, way)
        run = partial(measurement.planned, way, measurement.plan(2, way))
        yield f"local, 2 stages, {name}", f"eager, {name}", 0, run
    yield "torch.compile", "eager", 0, partial(measurement.eager, copies, compiled=True)
    yield (
        "local, 2 stages, compile_blocks", "eager", predicted[2],
        partial(measurement.planned, copies, plans[2], compile_blocks=True),
    )  # fmt: skip


def run(measurement: Measurement, limit_s: float) -> dict[str, Mapping[str, Any]]:
    """Run all parts, print each, and return them by name."""
    begin_s, found, curves = time.monotonic(), {}, {}
    for name, reference, predicted, part in parts(measurement):
        gc.collect()
        if measurement.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        if time.monotonic() - begin_s > limit_s:
            found[name] = {"left out": f"after {limit_s:.0f} s"}
            print(f"{name}: left out, {limit_s:.0f} s are over", flush=True)
            continue
        try:
            curves[name] = part()
        except (PipelineError, RuntimeError, ValueError) as error:
            found[name] = {"failed": f"{type(error).__name__}: {first_line(error)}"}
            print(f"{name}: FAILED, {found[name]['failed']}", flush=True)
            continue
        found[name] = described(curves[name], curves.get(reference), predicted)
        shown = ", ".join(f"{key} {value}" for key, value in found[name].items() if key != "losses")
        print(f"{name}: {shown}", flush=True)
    return found


def described(curve: Curve, reference: Curve | None, predicted: int) -> dict[str, Any]:
    """Return the numbers of a run, beside those of the one that it is compared with."""
    made: dict[str, Any] = {**asdict(curve), "samples_per_s": round(curve.samples_per_s, 2)}
    if reference is not None and reference is not curve:
        pairs = zip(curve.losses, reference.losses, strict=True)
        made["loss_difference"] = f"{max(abs(a - b) / abs(b) for a, b in pairs):.1e}"
        made["of_eager_speed"] = round(curve.samples_per_s / reference.samples_per_s, 3)
    if predicted and curve.peak_bytes is not None:
        made["predicted_bytes"] = predicted
        made["peak_of_predicted"] = round(curve.peak_bytes / predicted, 3)
    return made


def main(argv: list[str] | None = None) -> dict[str, Mapping[str, Any]]:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="a model that a CPU trains at once")
    parser.add_argument("--limit-s", type=float, default=540.0, help="no part begins after it")
    parser.add_argument("--json", type=Path, help="write everything there")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; use --device cpu --tiny for a dry run")
    device = torch.device(options.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"torch {torch.__version__} on {name}", flush=True)
    found = run(Measurement(TINY if options.tiny else FULL, device), options.limit_s)
    if options.json:
        options.json.write_text(json.dumps({"device": name, "runs": found}, indent=1))
    return found


if __name__ == "__main__":
    main()
