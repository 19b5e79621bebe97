"""Training: a thin loop over any executable, with transformers' arguments, callbacks and files.

Read ``loop.py`` first; ``run.py`` is what it steps through.
"""

from ipu_pipeline.training.arguments import TrainingArguments
from ipu_pipeline.training.checkpoint import latest_checkpoint, list_checkpoints
from ipu_pipeline.training.evaluate import EvalOutput, evaluate_loop
from ipu_pipeline.training.loop import train
from ipu_pipeline.training.optimizers import build_optimizer, build_scheduler
from ipu_pipeline.training.results import TrainResult, save_results

__all__ = [
    "EvalOutput",
    "TrainResult",
    "TrainingArguments",
    "build_optimizer",
    "build_scheduler",
    "evaluate_loop",
    "latest_checkpoint",
    "list_checkpoints",
    "save_results",
    "train",
]
