"""A small training under torchrun in which one rank kills itself at a given place, once."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset

import ipu_pipeline as ipp
from ipu_pipeline.backends.cluster import executable  # noqa: F401 - preloaded
from ipu_pipeline.checkpoint import is_complete, read_checkpoint
from ipu_pipeline.errors import CheckpointError
from ipu_pipeline.ir.machines import machine_by_name
from ipu_pipeline.train import TrainingArguments, build_optimizer, latest_checkpoint, train
from tests.tiny_models import TINY

STEPS, SAVE_STEPS, MICROBATCHES, MICRO_BATCH = 8, 2, 4, 2
CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
# Tied over its ranks; one that can be cut into slices.
MODELS = {1: "gpt2-lm", 2: "llama"}


@dataclass(frozen=True)
class Setup:
    """How the two processes share the model.

    Attributes:
        tp: Processes that share every product; they are one stage each otherwise.
        replicas: Processes that have all of the model, and a part of the optimizer's state.
        weights: Folder from which each process reads its own weights; empty: all have all.
    """

    tp: int = 1
    replicas: int = 1
    weights: str = ""

    @property
    def model(self) -> str:
        """Name of the model."""
        return MODELS[self.tp]

    @property
    def num_stages(self) -> int:
        """Of the pipeline."""
        return 2 // (self.tp * self.replicas)


@dataclass(frozen=True)
class Kill:
    """Where a rank kills itself.

    Attributes:
        place: ``forward``, ``backward``, ``optimizer`` or ``checkpoint``.
        rank: Which one.
        step: Steps that were done before.
        call: Of the module in this step (forward, backward); 0 before and 1 after the step
            (optimizer); number of a change of the folder (checkpoint), from 0.
        module: Name, for ``forward`` and ``backward``.
        seconds: After the beginning of the save, instead of ``call``, if not negative.
    """

    place: str
    rank: int
    step: int
    call: int = 0
    module: str = ""
    seconds: float = -1.0


class Samples(Dataset[Any]):
    """Samples of a fixed data set; their number is no multiple of the batch."""

    def __init__(self, name: str, size: int = 30) -> None:
        _, self._batch = TINY[name].build(batch_size=size, seed=3)

    def __len__(self) -> int:
        return len(next(iter(self._batch.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[index] for name, value in self._batch.items()}


def work(
    folder: str, kill: dict[str, Any] | None, options: dict[str, Any], setup: dict[str, Any]
) -> None:
    """Train; write ``result.json`` and what every rank's saves did into ``folder``."""
    how = Setup(**setup)
    torch.set_num_threads(1)
    output, rank = Path(folder) / "output", int(os.environ["RANK"])
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    model, example = TINY[how.model].build(dropout=True, seed=0)
    found = inspected(output, how.model) if rank == 0 and attempt else {}
    plan = ipp.plan(model, example, num_stages=how.num_stages, microbatches=MICROBATCHES)
    plan = replace(plan, replicas=how.replicas)
    if how.tp > 1:
        plan = replace(plan, machine=machine_by_name("h100-x8"), settings={"tp": how.tp})
    if how.weights:
        model, _ = TINY[how.model].build(dropout=True, device="meta")
    elif latest_checkpoint(output) is not None:
        torch.manual_seed(99)
        with torch.no_grad():  # nothing of the result may come from a fresh start
            for parameter in model.parameters():
                parameter.normal_()
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=STEPS,
        save_steps=SAVE_STEPS,
        save_total_limit=2,
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=MICROBATCHES,
        learning_rate=1e-3,
        warmup_steps=2,
        max_grad_norm=1.0,
        logging_steps=1,
        dataloader_drop_last=True,
        resume_from_checkpoint="auto",
        replicas=how.replicas,
        disable_tqdm=True,
        **options,
    )
    compiled = ipp.compile(
        model,
        plan,
        target="distributed",
        optimizer=build_optimizer(model, arguments),
        self_check=False,
        max_grad_norm=arguments.max_grad_norm,
        seed=arguments.seed,
        weights=how.weights or None,
        replicated_tensor_sharding=how.replicas > 1,
    )
    with compiled as made:
        saves = Saves(made, output, None if kill is None or attempt else Kill(**kill))
        first = latest_checkpoint(output)
        result = train(made, Samples(how.model), arguments)
        made.wait_for_checkpoint()
        state = saved(output / f"checkpoint-{STEPS}") if how.weights else made.state_dict()
    (Path(folder) / f"saves-{rank}.json").write_text(json.dumps(saves.log))
    if rank == 0:
        content = {
            "attempt": attempt,
            "resumed": first.name if first else "",
            "loss": result.training_loss,
            "history": [comparable(entry) for entry in result.log_history],
            "weights": {n: digest(t) for n, t in state.items()},
            "found": found,
            "modules": modules_of(model, plan) * (2 // how.num_stages),
        }
        (Path(folder) / "result.json").write_text(json.dumps(content))


class Saves:
    """Counts what a save changes on the disk, and kills the process where it is told to.

    Args:
        made: The executable; its ``save_checkpoint`` is wrapped.
        output: Changes in this folder are counted.
        kill: Where, if at all.
    """

    def __init__(self, made: Any, output: Path, kill: Kill | None) -> None:
        self.log: list[dict[str, Any]] = []
        self._output = str(output)
        self._made = made
        self._kill = kill if kill is not None and kill.rank == int(os.environ["RANK"]) else None
        self._count = -1
        self._save = made.save_checkpoint
        made.save_checkpoint = self._saved
        if self._kill is not None:
            plant(made, self._kill)
        sys.addaudithook(self._changed)

    def _saved(self, *arguments: Any, **named: Any) -> Path:
        kill = self._now()
        if kill is not None and kill.seconds >= 0:
            threading.Timer(kill.seconds, die).start()
        self._count = 0
        start = time.monotonic()
        self.log.append({"step": self._made.global_step})
        path = Path(self._save(*arguments, **named))
        self.log[-1]["seconds"] = time.monotonic() - start
        return path

    def _now(self) -> Kill | None:
        kill = self._kill
        here = kill is not None and kill.place == "checkpoint"
        return kill if here and kill.step == self._made.global_step else None

    def _changed(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._count < 0 or event not in CHANGES:
            return
        path = arguments[0]
        if not isinstance(path, str | os.PathLike) or not str(path).startswith(self._output):
            return
        kill = self._now()
        if kill is not None and kill.seconds < 0 and self._count == kill.call:
            die()
        self._count += 1
        self.log[-1]["changes"] = self._count


def plant(made: Any, kill: Kill) -> None:
    """Put a hook where ``kill`` says."""
    calls = []

    def reached() -> bool:
        calls.extend([1] * (made.global_step == kill.step))
        return made.global_step == kill.step and len(calls) == kill.call + 1

    def backward(_: nn.Module, __: Any, output: Any) -> None:
        if reached():
            _first(output).register_hook(lambda _: die())

    def step(*_: Any) -> None:
        if made.global_step == kill.step:
            die()

    if kill.place == "forward":
        module = made.model.get_submodule(kill.module)
        module.register_forward_pre_hook(lambda *_: die() if reached() else None)
    elif kill.place == "backward":
        made.model.get_submodule(kill.module).register_forward_hook(backward)
    elif kill.place == "optimizer" and kill.call == 0:
        made.optimizer.register_step_pre_hook(step)
    elif kill.place == "optimizer":
        made.optimizer.register_step_post_hook(step)


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def saved(path: Path) -> dict[str, Tensor]:
    """Return the weights in a checkpoint."""
    return {n: t for f in path.glob("model*.safetensors") for n, t in load_file(f).items()}


def inspected(output: Path, name: str) -> dict[str, str]:
    """Return what is in the output folder: checkpoints load, anything else is passed over."""
    found = {}
    for item in sorted(output.iterdir()) if output.is_dir() else []:
        if item.name.startswith(".") or not is_complete(item):
            found[item.name] = "passed over"
            continue
        model, _ = TINY[name].build(seed=1)
        optimizer = torch.optim.AdamW(model.parameters())
        try:
            read_checkpoint(item, model=model, optimizer=optimizer)
            found[item.name] = "loads"
        except CheckpointError as error:
            found[item.name] = f"unreadable: {error}"
    return found


def modules_of(model: nn.Module, plan: Any) -> list[list[str]]:
    """Return for every rank the modules with weights that its stage runs."""
    return [
        [
            name
            for name, module in model.named_modules()
            if any(name.startswith(f"{block}.") for block in stage.blocks)
            and next(module.parameters(recurse=False), None) is not None
        ]
        for stage in plan.stages
    ]


def comparable(entry: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k}


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()


def as_json(kill: Kill | None) -> dict[str, Any] | None:
    return None if kill is None else asdict(kill)


if __name__ == "__main__":
    work(**json.loads(sys.argv[1]))
