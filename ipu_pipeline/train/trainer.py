"""transformers' trainers over a pipeline."""

from __future__ import annotations

from transformers import Seq2SeqTrainer, Trainer

from ipu_pipeline.train.mixin import PipelineMixin


class PipelineTrainer(PipelineMixin, Trainer):
    """``transformers.Trainer`` over a pipeline; arguments are those of :class:`PipelineMixin`."""


class PipelineSeq2SeqTrainer(PipelineMixin, Seq2SeqTrainer):
    """``transformers.Seq2SeqTrainer`` over a pipeline.

    With ``predict_with_generate`` losses come from the stages, and tokens from the model's own
    ``generate`` with its weights of now: over processes as :meth:`Executable.generate` runs it, or
    by the whole model in each of them where that is refused (precision other than float32, tensor
    parallelism, a spread vocabulary). Arguments are those of :class:`PipelineMixin`.
    """
