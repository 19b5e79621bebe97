"""What PipelineTrainer does in one process, the reference, and in several; all of it plain data."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import IterableDataset
from transformers import (
    EarlyStoppingCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    set_seed,
)

import ipu_pipeline as ipp
from ipu_pipeline.errors import LoweringError, PipelineError
from ipu_pipeline.train import PipelineTrainer, TrainingArguments
from tests.backends.cluster.jobs import built
from tests.tiny_models import TINY
from tests.train.eager_executable import Questions, tiny_bert
from tests.train.helpers import QUIET, TWO_STAGES, run_script

TIMES = ("runtime", "per_second")
# Rounding noise of gradients that are zero in theory (a key's bias) does not become steps.
ROUNDED = {"adam_epsilon": 1e-3}


def history(trainer: Trainer) -> list[dict[str, Any]]:
    """Return everything logged but times."""
    return [
        {k: v for k, v in entry.items() if not any(word in k for word in TIMES)}
        for entry in trainer.state.log_history
    ]


def weights(trainer: Trainer) -> list[float]:
    """Return a number for each parameter."""
    return [float(p.detach().abs().sum()) for p in trainer.model.parameters()]


def predicted(trainer: Trainer, data: Any) -> list[Any]:
    found = trainer.predict(data).predictions
    return [p.tolist() for p in (found if isinstance(found, tuple) else (found,))]


def script(folder: str, name: str, **options: Any) -> dict[str, Any]:
    """Run a script that was written for transformers' Trainer, and predict."""
    options = {"num_train_epochs": 2, "num_train": 38, **ROUNDED, **options}
    trainer = run_script(name, Path(folder), TWO_STAGES, **options)
    return {
        "history": history(trainer),
        "weights": weights(trainer),
        "predictions": predicted(trainer, trainer.eval_dataset),
        "files": sorted(p.name for p in Path(folder).iterdir()),
    }


def made(folder: str, data: Any = None, **changes: Any) -> PipelineTrainer:
    """Return a trainer of a tiny BERT; ``more`` are further arguments of the trainer."""
    more = {"eval_dataset": Questions(7, seed=2), **changes.pop("more", {})}
    skipped = ("do_train", "do_eval")
    options = {k: v for k, v in QUIET.items() if k not in skipped} | {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 3,
        "max_steps": 3,
        **ROUNDED,
    }
    kind, model = changes.pop("kind", TrainingArguments), changes.pop("model", None)
    args = kind(output_dir=folder, **options | changes)
    set_seed(0)
    return PipelineTrainer(
        model or tiny_bert(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1),
        args,
        train_dataset=Questions(18) if data is None else data,
        **{"num_stages": 2} | more,
    )


# ---- checkpoints --------------------------------------------------------------------------


SAVING = {
    "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2,
    "save_total_limit": 2, "load_best_model_at_end": True, "max_steps": 5,
}  # fmt: skip


class StopsOne(TrainerCallback):
    """Stops another process than the first, as a clock would at its own time."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= dist.is_initialized() and dist.get_rank() == 1


def kept(folder: str) -> dict[str, Any]:
    """Train with checkpoints and the best model; resume in the middle of an epoch."""
    whole = made(folder, **SAVING)
    whole.train()
    states = torch.load(Path(folder) / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"]
    again = made(f"{folder}-again", **SAVING, more={"callbacks": [StopsOne()]})
    again.train(resume_from_checkpoint=str(Path(folder) / "checkpoint-4"))
    save, saved = again._save, Path(f"{folder}-saved")

    def slowly(*args: Any, **kwargs: Any) -> None:
        time.sleep(0.3)  # in the first process; the others read what it writes
        save(*args, **kwargs)

    again._save = slowly
    again.save_model(str(saved))
    return {
        "saved": sorted(p.name for p in saved.iterdir()),
        "whole": history(whole),
        "weights": weights(whole),
        "again": history(again),
        "best": Path(str(whole.state.best_model_checkpoint)).name,
        "files": sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*")),
        "states": {n: sorted(state) for n, state in states.items()},
    }


def further(folder: str) -> dict[str, Any]:
    """Go on from the newest checkpoint, stop early, and train once more."""
    made(folder, **SAVING).train()
    onward = made(folder, **SAVING | {"max_steps": 6, "load_best_model_at_end": False})
    onward.train(resume_from_checkpoint=True)
    patience = {"callbacks": [EarlyStoppingCallback(1)]}
    stopped = made(
        f"{folder}-stopped", **SAVING | {"max_steps": 9}, learning_rate=0.0, more=patience
    )
    stopped.train()
    first = stopped.state.global_step
    stopped.train()
    return {"onward": history(onward), "stopped": [first, history(stopped)]}


# ---- data ---------------------------------------------------------------------------------


class Stream(IterableDataset):
    """Questions without a length."""

    def __iter__(self) -> Any:
        return (Questions(18)[index] for index in range(18))


class Long(Questions):
    """Questions of several lengths."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = super().__getitem__(index)
        length = max(row["start_positions"] + 1, 4 + index % 9)
        return {**row, "input_ids": row["input_ids"][:length]}


def padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Collate rows of several lengths."""
    longest = max(len(row["input_ids"]) for row in rows)
    mask = [[1] * len(r["input_ids"]) + [0] * (longest - len(r["input_ids"])) for r in rows]
    ids = [row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows]
    rest = {n: [row[n] for row in rows] for n in ("start_positions", "end_positions")}
    columns = {"input_ids": ids, "attention_mask": mask, **rest}
    return {name: torch.tensor(values) for name, values in columns.items()}


def hidden(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Collate rows of which each word may be hidden."""
    batch = padded(rows)
    batch["input_ids"].masked_fill_(torch.rand(batch["input_ids"].shape) < 0.1, 1)
    return batch


class Reads(TrainerCallback):
    """Reads weights after every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append(float(sum(p.detach().abs().sum() for p in model.parameters())))


def data(folder: str) -> dict[str, Any]:
    """Train on data of every kind."""
    reader = Reads()
    length = {"train_sampling_strategy": "group_by_length", "max_steps": -1, "num_train_epochs": 1}
    trainers = {
        "stream": made(folder, Stream(), max_steps=6, more={"callbacks": [reader]}),
        "dropped": made(folder, dataloader_drop_last=True, max_steps=-1, num_train_epochs=1),
        "lengths": made(folder, Long(18), **length, more={"data_collator": padded}),
        "single": made(
            folder,
            gradient_accumulation_steps=1,
            max_grad_norm=0.0,
            lr_scheduler_type="reduce_lr_on_plateau",
            eval_strategy="steps",
            eval_steps=1,
            include_num_input_tokens_seen="all",
            label_names=["start_positions"],
        ),
    }
    found = {}
    for name, trainer in trainers.items():
        trainer.train()
        found[name] = history(trainer), weights(trainer), predicted(trainer, Questions(5, seed=3))
        trainer.close()
    return {**found, "seen": reader.seen}


class Generating(PipelineTrainer, Seq2SeqTrainer):
    pass


def generated(folder: str) -> dict[str, Any]:
    """Train T5, and predict by generating and by one call of the model."""
    rows = [{"input_ids": [3 + i, 4, 5, 6], "labels": [5, 4, 3]} for i in range(8)]
    args = Seq2SeqTrainingArguments(
        output_dir=folder, predict_with_generate=True, generation_max_length=6, save_strategy="no",
        use_cpu=True, max_steps=2, report_to="none", dataloader_pin_memory=False, logging_steps=1,
        gradient_accumulation_steps=2, per_device_train_batch_size=2, disable_tqdm=True,
    )  # fmt: skip
    trainer = Generating(TINY["t5"].build()[0], args, train_dataset=rows, num_stages=2)
    trainer.train()
    called: list[str] = []
    if dist.is_initialized():
        executable: Any = trainer._steps.executable
        call = executable._call_model
        executable._call_model = lambda name, calls: called.append(name) or call(name, calls)
    words = predicted(trainer, rows[:3])
    assert called == ["generate"] * dist.is_initialized()
    trainer.args.predict_with_generate = False
    return {"history": history(trainer), "words": words, "logits": predicted(trainer, rows[:3])}


# ---- copies of the pipeline ---------------------------------------------------------------


class Counting(Questions):
    """Counts the samples that are read."""

    num_read = 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.num_read += 1
        return super().__getitem__(index)


def copied(folder: str, batches: str = "whole") -> dict[str, Any]:
    """Train with two copies of the pipeline, or with as many microbatches in one process."""
    several = dist.is_initialized()
    changes = {"replicas": 2, "batches": batches} if several else {"gradient_accumulation_steps": 4}
    data = Counting(19)
    trainer = made(folder, data, max_steps=-1, num_train_epochs=2, **changes)
    trainer.train()
    return {
        "history": history(trainer),
        "weights": weights(trainer),
        "evaluation": trainer.evaluate()["eval_loss"],
        "places": [trainer.plan.num_stages, trainer.plan.replicas] if several else [2, 2],
        "fewer": data.num_read < 2 * 19 if several and batches == "share" else batches == "share",
    }


# ---- tensor parallelism -------------------------------------------------------------------


def sliced(folder: str, stages: int) -> dict[str, Any]:
    """Train a Llama with a resumed checkpoint, evaluate, and let a callback read its weights.

    Two processes share every product, or one process runs two stages.
    """
    several = dist.is_initialized()
    number = stages if several else 2
    rows = [{n: v[0].tolist() for n, v in TINY["llama"].batch(batch_size=1, seed=i).items()}
            for i in range(14)]  # fmt: skip
    _, plan, _ = built("llama", num_stages=number, microbatches=2, tp=2 if several else 1)

    def trainer(where: str, **changes: Any) -> PipelineTrainer:
        more = {"plan": plan, "eval_dataset": rows[:5], "num_stages": None, "callbacks": [reader]}
        return made(
            where, rows, model=TINY["llama"].build()[0], eval_strategy="steps", eval_steps=2,
            more=more, **changes,
        )  # fmt: skip

    reader = Reads()
    whole = trainer(folder, save_strategy="steps", save_steps=2, max_steps=4)
    whole.train()
    saved = Path(folder) / "checkpoint-2"
    states = torch.load(saved / "optimizer.pt", weights_only=True)["state"]
    again = trainer(f"{folder}-again", max_steps=4)
    again.train(resume_from_checkpoint=str(saved))
    return {
        "history": history(whole),
        "again": history(again),
        "weights": weights(whole),
        "seen": reader.seen,
        "states": {n: float(state["exp_avg"].abs().sum()) for n, state in states.items()},
        "predictions": predicted(again, rows[:3]),
        "outside": float(again.model(**again.data_collator(rows[:2])).loss.detach()),
    }


# ---- what is refused, and what fails ------------------------------------------------------


class Inside(TrainerCallback):
    def on_pre_optimizer_step(self, *args, **kwargs):
        raise AssertionError


def refused(folder: str) -> list[str]:
    """Return what is said of that which processes do not do, or not alike."""
    rank = dist.get_rank()
    found = []

    def says(kind: type[Exception], trainer: Any, **options: Any) -> None:
        with pytest.raises(kind) as caught:
            trainer().train(**options)
        found.append(str(caught.value))

    smoothed = {"label_smoothing_factor": 0.1, "replicas": 2}
    says(ValueError, lambda: made(folder, more={"num_stages": 1}, **smoothed))
    # A callback of one process is refused in all.
    callbacks = [Inside()] if rank == 1 else []
    says(ValueError, lambda: made(folder, more={"callbacks": callbacks}))
    says(ValueError, lambda: made(folder, save_strategy="steps"), resume_from_checkpoint=True)
    says(LoweringError, lambda: made(folder, more={"num_stages": 1}))
    says(ValueError, lambda: made(folder, replicas=3, more={"num_stages": None}))
    shares: dict[str, Any] = {"replicas": 2, "batches": "share"}
    seen = {"include_num_input_tokens_seen": "all", **shares}
    says(ValueError, lambda: made(folder, more={"num_stages": 1}, **seen))
    length = {"train_sampling_strategy": "group_by_length", "max_steps": 4}
    more = {"num_stages": 1, "data_collator": hidden}
    says(ValueError, lambda: made(folder, Long(18), more=more, **shares, **length))
    whole = made(folder)
    whole.hp_search_backend = "optuna"  # as hyperparameter_search sets it
    says(ValueError, lambda: whole)
    with pytest.raises(ValueError, match="of type 2, not 1; leave norm_type out"):
        whole.accelerator.clip_grad_norm_(whole.model.parameters(), 1.0, norm_type=1)
    with torch.device("meta"):
        empty = tiny_bert()
    with pytest.raises(ValueError, match="the model is on meta, and PipelineTrainer saves"):
        PipelineTrainer(empty, TrainingArguments(output_dir=folder))
    model, plan, _ = built("bert-qa", num_stages=2)
    with (
        ipp.compile(model, plan, target="distributed") as executable,
        pytest.raises(LoweringError, match="known after the first forward and backward pass"),
    ):
        executable.clip_grad_norm(model.parameters(), 1.0)
    return found


def other_data(folder: str) -> str:
    """Return what is said of data that are not the same."""
    trainer = made(folder, Questions(18, seed=dist.get_rank()))
    with pytest.raises(Exception, match="rank") as caught:
        trainer.train()
    return f"{type(caught.value).__name__}: {caught.value}"


class Broken(Questions):
    """Questions that one process cannot read to their end."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        if dist.get_rank() == 1 and index == 17:
            raise OSError("the disk of rank 1 is gone")
        return super().__getitem__(index)


def broken(folder: str) -> str:
    """Return what is said when one process cannot read its data."""
    trainer = made(folder, Broken(18), train_sampling_strategy="sequential", max_steps=9)
    with pytest.raises(Exception, match="disk") as caught:
        trainer.train()
    return f"{type(caught.value).__name__}: {caught.value}"


def by_trl(folder: str, name: str) -> dict[str, Any]:
    """Train with one of TRL's trainers."""
    from tests.train.trl_programs import trained

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return trained(name, folder)


def live(folder: str, names: list[str]) -> list[Any]:
    """Train with code around the model; return what is logged and kept, or said of it."""
    from tests.train.live_programs import PROGRAMS
    from tests.train.test_live_loss import flat, logged, trained

    found: list[Any] = []
    for name in names:
        try:
            trainer = trained(PROGRAMS[name].make, PipelineTrainer, Path(folder) / name)
        except PipelineError as error:  # of the process of the stage, and of the others
            found.append(str(error))
        else:
            order = trainer._steps.training_order.ahead
            found.append([logged(trainer), flat(trainer.seen), weights(trainer), order])
    return found
