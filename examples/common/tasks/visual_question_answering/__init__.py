"""Visual question answering: region features, answer sets, hard and soft labels, VQA accuracy."""

from tasks.visual_question_answering.answers import (
    AnswerSet,
    GivenLabel,
    Labels,
    read_label,
)
from tasks.visual_question_answering.dataset import (
    Questions,
    Regions,
    RegionTable,
    VisualQuestionAnsweringDataset,
    build_dataset,
)
from tasks.visual_question_answering.features import NUM_FEATURES, grid_regions
from tasks.visual_question_answering.loss import SoftAnswerLoss
from tasks.visual_question_answering.metrics import (
    VqaScores,
    agreement,
    score_answers,
)
from tasks.visual_question_answering.stored import load_file, load_splits, read_rows

__all__ = [
    "NUM_FEATURES",
    "AnswerSet",
    "GivenLabel",
    "Labels",
    "Questions",
    "RegionTable",
    "Regions",
    "SoftAnswerLoss",
    "VisualQuestionAnsweringDataset",
    "VqaScores",
    "agreement",
    "build_dataset",
    "grid_regions",
    "load_file",
    "load_splits",
    "read_label",
    "read_rows",
    "score_answers",
]
