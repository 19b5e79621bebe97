"""From start and end logits over windows to one answer per question, with runners-up.

Axes: ``N`` windows, ``L`` tokens, ``S`` context tokens as starts, ``A`` answer lengths.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ipu_pipeline.errors import PipelineError
from ipu_pipeline.ir.files import make_folder, write_text
from tasks.question_answering.features import Window
from tasks.question_answering.squad import SquadExample

_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Candidate:
    """One possible answer.

    Attributes:
        text: The piece of the context.
        probability: Softmax of the summed logits over the question's candidates.
        start_logit: Logit of its first token.
        end_logit: Logit of its last token.
        start: First character in the context.
        stop: Character behind the last one.
    """

    text: str
    probability: float
    start_logit: float
    end_logit: float
    start: int
    stop: int

    @property
    def score(self) -> float:
        """Sum of both logits."""
        return self.start_logit + self.end_logit


def select_answers(
    examples: Sequence[SquadExample],
    windows: Sequence[Window],
    start_logits_NL: npt.ArrayLike,
    end_logits_NL: npt.ArrayLike,
    *,
    n_best_size: int = 20,
    max_answer_length: int = 30,
) -> dict[str, list[Candidate]]:
    """Return the ``n_best_size`` best answers of every example, best first.

    Every span of up to ``max_answer_length`` context tokens of every window competes (not only
    those whose start and end are among the best, so no question is left without an answer); a
    span seen in several windows counts once, with its best score.

    Args:
        examples: The examples that the windows were cut from.
        windows: One per row of the logits.
        start_logits_NL: Start logits.
        end_logits_NL: End logits.
        n_best_size: Candidates kept per example, at least 1.
        max_answer_length: Longest answer in tokens, at least 1.

    Returns:
        Candidates by example id; their probabilities sum to 1.

    Raises:
        ValueError: A size is below 1, the shapes do not fit, or an example has no window.
        PipelineError: A logit is not finite.
    """
    starts, ends = _logits(start_logits_NL, windows), _logits(end_logits_NL, windows)
    if n_best_size < 1 or max_answer_length < 1:
        raise ValueError(
            "n_best_size and max_answer_length must be at least 1, "
            f"got {n_best_size} and {max_answer_length}"
        )
    rows: dict[int, list[int]] = {}
    for row, window in enumerate(windows):
        rows.setdefault(window.example, []).append(row)
    answers: dict[str, list[Candidate]] = {}
    for index, example in enumerate(examples):
        found: dict[tuple[int, int], Candidate] = {}
        for row in rows.get(index, []):
            spans = _best_spans(
                windows[row], starts[row], ends[row], n_best_size, max_answer_length
            )
            for span in spans:
                known = found.get((span.start, span.stop))
                if known is None or span.score > known.score:
                    found[span.start, span.stop] = span
        if not found:
            raise ValueError(f"question {example.id!r} has no window with context tokens")
        best = sorted(found.values(), key=lambda c: (-c.score, c.start, c.stop))[:n_best_size]
        answers[example.id] = _finished(best, example.context)
    return answers


def _logits(logits_NL: npt.ArrayLike, windows: Sequence[Window]) -> _Floats:
    """Check one logits array against the windows."""
    array = np.asarray(logits_NL, dtype=np.float64)
    if array.ndim != 2 or len(array) != len(windows):
        raise ValueError(
            f"logits have shape {array.shape} for {len(windows)} windows; pass one row of tokens "
            "per window, in the order of the data set"
        )
    longest = max((window.stop for window in windows), default=0)
    if array.shape[1] < longest:
        raise ValueError(
            f"logits cover {array.shape[1]} tokens, a window has context up to token {longest}; "
            "build the features with the max_seq_length that the model ran with"
        )
    if not np.isfinite(array).all():
        row = int(np.argmin(np.isfinite(array).all(axis=1)))
        raise PipelineError(
            f"the logits of window {row} are not finite; the model has diverged: lower the "
            "learning rate or, with fp16, the loss scaling"
        )
    return array


def _best_spans(
    window: Window, start_L: _Floats, end_L: _Floats, n_best_size: int, max_answer_length: int
) -> list[Candidate]:
    """Return the best spans of one window: exact, over the band of allowed lengths."""
    num_tokens = len(window.offsets_C2)
    start_S, end_S = start_L[window.first : window.stop], end_L[window.first : window.stop]
    length = min(max_answer_length, num_tokens)
    padded = np.concatenate([end_S, np.full(length, -np.inf)])
    ends_SA = (
        np.lib.stride_tricks.sliding_window_view(padded, length)[:num_tokens] if length else None
    )
    if ends_SA is None:
        return []
    scores = (start_S[:, None] + ends_SA).ravel()
    keep = min(n_best_size, scores.size)
    chosen = np.argpartition(-scores, keep - 1)[:keep]
    spans = []
    for flat in chosen[np.isfinite(scores[chosen])]:
        first, extra = divmod(int(flat), length)
        last = first + extra
        start, stop = int(window.offsets_C2[first, 0]), int(window.offsets_C2[last, 1])
        spans.append(Candidate("", 0.0, float(start_S[first]), float(end_S[last]), start, stop))
    return spans


def _finished(best: Sequence[Candidate], context: str) -> list[Candidate]:
    """Add text and probability to the candidates of one example."""
    weights = [math.exp(c.score - best[0].score) for c in best]
    total = sum(weights)
    return [
        replace(c, text=context[c.start : c.stop], probability=w / total)
        for c, w in zip(best, weights, strict=True)
    ]


def write_predictions(
    output_dir: str | Path, answers: Mapping[str, Sequence[Candidate]]
) -> tuple[Path, Path]:
    """Write ``predictions.json`` (text by id) and ``nbest_predictions.json`` (candidates by id).

    Returns:
        The two paths.
    """
    folder = Path(output_dir)
    make_folder("output_dir", folder)
    best = {identifier: candidates[0].text for identifier, candidates in answers.items()}
    every = {identifier: [asdict(c) for c in found] for identifier, found in answers.items()}
    paths = folder / "predictions.json", folder / "nbest_predictions.json"
    for path, content in zip(paths, (best, every), strict=True):
        text = json.dumps(content, indent=2, ensure_ascii=False)
        write_text(path, text + "\n")
    return paths
