"""Training scripts over transformers' ``Trainer``, composed of features, and their truth.

The same subclass is made over ``Trainer`` and over :class:`~ipu_pipeline.train.PipelineTrainer`;
what both collect, log and train must be equal.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ipu_pipeline.train import PipelineTrainer
from tests.programs.program import Features

WORDS, LENGTH, CLASSES = 30, 6, 3

WEIGHTS = ("", "global step", "epoch", "callback", "argument", "random", "running mean")
LOGS = ("", "item", "detach", "log", "float", "numpy", "branch")
CONSTANTS = ("", "tensor", "loss module", "global", "array", "teacher", "in a closure")
INPUTS = ("", "labels stay", "mixed", "mask dropped", "label smoothing")
CALLS = ("", "twice", "reference pass", "outputs changed")
CLASS_WEIGHT = torch.tensor([1.0, 2.0, 0.5])


@dataclass(frozen=True)
class Script(Features):
    """The features of one training script; every field's first value is the plain one."""

    weight: str = ""
    log: str = ""
    constant: str = ""
    inputs: str = ""
    calls: str = ""
    microbatches: int = 2
    stages: int = 2
    evaluates: bool = False


def model_of(layers: int = 3, seed: int = 3) -> nn.Module:
    """Return a small BERT without dropout."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=WORDS, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=16, num_labels=CLASSES,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def samples(number: int) -> list[dict[str, Any]]:
    """Return a small classification set."""
    draw = torch.Generator().manual_seed(7)
    return [
        {
            "input_ids": torch.randint(1, WORDS, (LENGTH,), generator=draw).tolist(),
            "attention_mask": [1] * LENGTH,
            "labels": int(torch.randint(0, CLASSES, (), generator=draw)),
        }
        for _ in range(number)
    ]


class Anneals(TrainerCallback):
    """Moves a number of its trainer at the end of every step."""

    def __init__(self) -> None:
        self.trainer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.alpha = state.global_step / 4


class ScriptedLoss:
    """The ``compute_loss`` of a script, over whatever trainer comes after it."""

    script: Script
    alpha = 0.0
    mean = 1.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kept: list[Any] = []
        self.class_weight = CLASS_WEIGHT.clone()
        self.criterion = nn.CrossEntropyLoss(weight=CLASS_WEIGHT.clone())
        self.teacher = model_of(2, seed=5).eval().requires_grad_(requires_grad=False)
        from_closure = CLASS_WEIGHT.clone()
        self.closed = lambda: from_closure

    def number(self) -> float:
        """Return the weight of the second term."""
        return {
            "": lambda: 0.5,
            "global step": lambda: self.state.global_step / 4,
            "epoch": lambda: float(self.state.epoch or 0.0),
            "callback": lambda: self.alpha,
            "argument": lambda: self.args.weight_decay * (1 + self.state.global_step),
            "random": lambda: float(np.random.beta(0.5, 0.5)),
            "running mean": lambda: self.mean,
        }[self.script.weight]()

    def main_term(self, logits: Tensor, labels: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Return the first term of the loss."""
        constant = self.script.constant
        if constant == "loss module":
            return self.criterion(logits, labels)
        if constant == "teacher":
            with torch.no_grad():
                target = self.teacher(**inputs).logits.softmax(-1)
            return functional.cross_entropy(logits, target)
        weight = {
            "tensor": lambda: self.class_weight,
            "global": lambda: CLASS_WEIGHT,
            "array": lambda: torch.as_tensor(np.array([1.0, 3.0, 1.0], dtype=np.float32)),
            "in a closure": self.closed,
        }.get(constant, lambda: None)
        return functional.cross_entropy(logits, labels, weight=weight())

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Return the loss of one microbatch."""
        if self.script.inputs == "label smoothing":
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        labels = self.prepared(inputs)
        outputs = model(**inputs)
        logits = self.read(outputs, model, inputs)
        inputs.pop("labels", None)
        loss = self.main_term(logits, labels, inputs)
        if self.script.calls == "reference pass":
            with torch.no_grad():
                loss = loss + model(**inputs).logits.mean()
        extra = logits.pow(2).mean()
        loss = loss + self.number() * extra
        self.keep(loss, extra)
        return (loss, outputs) if return_outputs else loss

    def prepared(self, inputs: dict[str, Any]) -> Tensor:
        """Change the inputs before the model sees them; return the labels."""
        how = self.script.inputs
        labels = inputs["labels"] if how == "labels stay" else inputs.pop("labels")
        if how == "mixed":
            draw = torch.rand(labels.shape[0], 1) < 0.5
            inputs["input_ids"] = torch.where(draw, inputs["input_ids"], 1)
        if how == "mask dropped":
            inputs.pop("attention_mask")
        return labels

    def read(self, outputs: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Return the logits that the loss is computed from."""
        logits = outputs.logits
        if self.script.calls == "outputs changed":
            outputs["logits"] = logits = logits * 2
        if self.script.calls == "twice":
            logits = (logits + model(**inputs).logits) / 2
        return logits

    def keep(self, loss: Tensor, extra: Tensor) -> None:
        """Keep values for a log, as people do."""
        if self.script.weight == "running mean":
            self.mean = 0.5 * self.mean + 0.5 * loss.item()
        if self.script.log == "log":
            self.log({"extra": extra.item()})
        kept = {
            "item": lambda: (loss.item(), extra.item()),
            "detach": lambda: (loss.detach(), extra.detach()),
            "float": lambda: (float(loss), 0.0),
            "numpy": lambda: (loss.detach().cpu().numpy(), 0.0),
            "branch": lambda: (1.0, 0.0) if bool(loss > 1.0) else (2.0, 0.0),
        }.get(self.script.log)
        if kept is not None:
            self.kept.append(kept())


def trainer_of(base: type[Trainer], script: Script, **options: Any) -> Any:
    """Return a trainer of ``base`` whose loss has the script's features."""
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(prefix="script_"), disable_tqdm=True, report_to="none",
        use_cpu=True, dataloader_pin_memory=False, save_strategy="no", logging_steps=1,
        max_steps=3, per_device_train_batch_size=2, learning_rate=0.05, optim="sgd",
        gradient_accumulation_steps=script.microbatches, per_device_eval_batch_size=4,
        max_grad_norm=0.0, lr_scheduler_type="constant", seed=1, weight_decay=0.1,
        label_smoothing_factor=0.1 if script.inputs == "label smoothing" else 0.0,
    )  # fmt: skip
    callback = Anneals()
    scripted = type("Scripted", (ScriptedLoss, base), {"script": script})
    trainer = scripted(
        model=model_of(), args=arguments, train_dataset=samples(12), eval_dataset=samples(6),
        callbacks=[callback], **options,
    )  # fmt: skip
    callback.trainer = trainer
    return trainer


def observed(trainer: Any, script: Script) -> dict[str, Any]:
    """Train, and return what a user observes, by name."""
    np.random.seed(3)
    trainer.train()
    found: dict[str, Any] = {}
    if script.evaluates:
        found["eval_loss"] = trainer.evaluate()["eval_loss"]
        found["predictions"] = trainer.predict(samples(6)).predictions
    history = trainer.state.log_history
    for name in ("loss", "extra"):
        found[name] = np.array([entry[name] for entry in history if name in entry])
    found["kept"] = np.array([[float(a), float(b)] for a, b in trainer.kept])
    for name, value in trainer.model.state_dict().items():
        found[name] = value.detach().numpy()
    return found


def difference(truth: dict[str, Any], found: dict[str, Any]) -> str:
    """Return the first thing that differs, an empty text where nothing does."""
    for name, value in truth.items():
        a, b = np.asarray(value), np.asarray(found.get(name))
        if a.shape != b.shape:
            return f"{name} has shape {a.shape} and {b.shape}"
        if a.size and not np.abs(a - b).max() <= 2e-5 * max(1.0, np.abs(a).max()):
            return f"{name}: {a.flatten()[:4]} and {b.flatten()[:4]}"
    return ""


eager = partial(trainer_of, Trainer)
pipelined = partial(trainer_of, PipelineTrainer)
