"""Extractive question answering: SQuAD files, sliding windows, answer selection, EM and F1."""

from tasks.question_answering.features import (
    QuestionAnsweringDataset,
    Window,
    build_features,
)
from tasks.question_answering.metrics import SquadScores, score_predictions
from tasks.question_answering.postprocess import (
    Candidate,
    select_answers,
    write_predictions,
)
from tasks.question_answering.squad import (
    Answer,
    SquadExample,
    load_hub_squad,
    read_squad,
)

__all__ = [
    "Answer",
    "Candidate",
    "QuestionAnsweringDataset",
    "SquadExample",
    "SquadScores",
    "Window",
    "build_features",
    "load_hub_squad",
    "read_squad",
    "score_predictions",
    "select_answers",
    "write_predictions",
]
