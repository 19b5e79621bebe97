"""What the scripts share: their arguments, and what they do with the trainer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed


@dataclass
class ScriptArguments:
    """What a script adds to transformers' arguments."""

    dropout: float = 0.0
    num_train: int = 64
    num_eval: int = 21


S = TypeVar("S", bound=ScriptArguments)


def parsed(kind: type[S], argv: list[str]) -> tuple[S, TrainingArguments]:
    script, args = HfArgumentParser((kind, TrainingArguments)).parse_args_into_dataclasses(argv)
    set_seed(args.seed)
    return script, args


def bert_sizes(script: ScriptArguments) -> dict[str, Any]:
    """The sizes and dropout of a tiny encoder."""
    return {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "hidden_dropout_prob": script.dropout,
        "attention_probs_dropout_prob": script.dropout,
    }


def run(trainer: Trainer) -> Trainer:
    """Train and evaluate, as the arguments say."""
    args = trainer.args
    if args.do_train:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model()
    if args.do_eval:
        trainer.log_metrics("eval", trainer.evaluate())
    return trainer
