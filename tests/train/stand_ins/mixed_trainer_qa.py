"""What a user writes to put the trainer beside ``run_qa.py`` over a pipeline."""

from __future__ import annotations

from typing import Any

from trainer_qa import QuestionAnsweringTrainer

from ipu_pipeline.train import PipelineMixin


class MixedQuestionAnsweringTrainer(PipelineMixin, QuestionAnsweringTrainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, num_stages=2, **kwargs)
