"""Training: a thin loop over any executable, with transformers' arguments, callbacks and files.

Read ``loop.py`` first; ``run.py`` is what it steps through.
"""

from ipu_pipeline.train.arguments import TrainingArguments
from ipu_pipeline.train.checkpoint import latest_checkpoint, list_checkpoints
from ipu_pipeline.train.evaluate import EvalOutput, evaluate_loop
from ipu_pipeline.train.loop import train
from ipu_pipeline.train.optimizers import build_optimizer, build_scheduler
from ipu_pipeline.train.results import TrainResult, save_results

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
