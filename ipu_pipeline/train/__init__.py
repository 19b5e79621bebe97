"""Training: one thin loop over any executable, and a trainer with everything of transformers.

Read ``loop.py`` to see how an executable is driven. ``PipelineMixin`` (``mixin.py``) puts a trainer
of transformers, TRL or sentence-transformers over the stages: ``class X(PipelineMixin,
SFTTrainer)``; ``PipelineTrainer`` (``trainer.py``) is that of transformers' own. Callbacks,
trackers, evaluations, best model and result files are theirs. They are imported when asked for.
"""

from typing import TYPE_CHECKING, Any

from ipu_pipeline.train.arguments import TrainingArguments
from ipu_pipeline.train.checkpoints import latest_checkpoint, list_checkpoints
from ipu_pipeline.train.loop import train
from ipu_pipeline.train.optimizers import build_optimizer, build_scheduler
from ipu_pipeline.train.progress import TrainResult

if TYPE_CHECKING:
    from ipu_pipeline.train.mixin import PipelineMixin
    from ipu_pipeline.train.trainer import PipelineSeq2SeqTrainer, PipelineTrainer

__all__ = [
    "PipelineMixin",
    "PipelineSeq2SeqTrainer",
    "PipelineTrainer",
    "TrainResult",
    "TrainingArguments",
    "build_optimizer",
    "build_scheduler",
    "latest_checkpoint",
    "list_checkpoints",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in ("PipelineMixin", "PipelineSeq2SeqTrainer", "PipelineTrainer"):
        from ipu_pipeline.train import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
