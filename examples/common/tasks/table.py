"""Every task of an encoder as one row of a table: nothing here or behind it names a model.

A row says how samples become features, how a batch is made, and what is measured. Extractive
question answering has a room of its own (``question_answering/``): it reads windows back as text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import (
    DataCollatorForMultipleChoice,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
)

from ipu_pipeline.capture.from_config import TASKS as AUTO_CLASSES
from ipu_pipeline.train.data import Collator
from tasks import (
    masked_lm,
    multiple_choice,
    pretraining,
    scores,
    sequence_classification,
    token_classification,
)
from tasks.features import EncodedDataset, Setup, TextOptions
from tasks.masking import MaskingCollator
from tasks.samples import Rows
from tasks.scores import Predict, Scores, Tensors


@dataclass(frozen=True)
class Task:
    """What is particular to a task.

    Attributes:
        name: Its name, also in ``ipu-pipeline plan --task``.
        options: What it can be told.
        encode: Makes features of rows.
        collator: Returns what makes a batch of features.
        measure: Keeps a few numbers per sample of a batch's outputs.
        metrics: Turns these into scores.
        fit_baseline: Returns the trivial answer that a training set suggests.
        main_metric: The score that says most.
        labels_of: Yields the classes of all samples; ``None`` without classes.
        tokenizer_options: What its tokenizer is loaded with.
    """

    name: str
    options: type[TextOptions]
    encode: Callable[[Rows, Setup], EncodedDataset]
    collator: Callable[[Setup], Collator]
    measure: Callable[[Tensors, Tensors], Tensors]
    metrics: Callable[[Tensors, Setup], Scores]
    fit_baseline: Callable[[EncodedDataset, Setup], Predict]
    main_metric: str
    labels_of: Callable[[Rows, Any], Iterator[str]] | None = None
    tokenizer_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def auto_class(self) -> str:
        """Name of transformers' auto class for it."""
        return AUTO_CLASSES[self.name]


_ROWS = (
    Task(
        "sequence-classification",
        sequence_classification.SequenceClassificationOptions,
        sequence_classification.encode,
        lambda setup: DataCollatorWithPadding(setup.tokenizer),
        scores.measure_classes,
        scores.class_scores,
        scores.most_frequent_class,
        "accuracy",
        sequence_classification.labels_of,
    ),
    Task(
        "token-classification",
        token_classification.TokenClassificationOptions,
        token_classification.encode,
        lambda setup: DataCollatorForTokenClassification(setup.tokenizer),
        scores.measure_classes,
        scores.entity_scores,
        scores.most_frequent_tag,
        "f1",
        token_classification.labels_of,
        # Tokenizers that see spaces take words only as if a space were before each of them.
        {"add_prefix_space": True},
    ),
    Task(
        "multiple-choice",
        multiple_choice.MultipleChoiceOptions,
        multiple_choice.encode,
        lambda setup: DataCollatorForMultipleChoice(setup.tokenizer),
        scores.measure_classes,
        scores.choice_scores,
        scores.most_frequent_choice,
        "accuracy",
    ),
    Task(
        "masked-lm",
        masked_lm.MaskedLMOptions,
        masked_lm.encode,
        MaskingCollator,
        scores.measure_hidden,
        scores.hidden_scores,
        scores.most_frequent_token,
        "perplexity",
    ),
    Task(
        "pretraining",
        pretraining.PretrainingOptions,
        pretraining.encode,
        MaskingCollator,
        scores.measure_pairs,
        scores.pair_scores,
        scores.most_frequent_pair,
        "perplexity",
    ),
)
TASKS: Mapping[str, Task] = {task.name: task for task in _ROWS}
