"""Question-answering examples from SQuAD v1.1 JSON files or from a data set of the hub.

The file format is the one of Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine
Comprehension of Text", EMNLP 2016: ``data[] > paragraphs[] > qas[] > answers[]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ipu_pipeline.errors import DatasetError, shown
from ipu_pipeline.ir.codec import read_json
from tasks.samples import hub_splits

SHOWN_CHARACTERS = 40
_T = TypeVar("_T", str, int, list[Any], dict[str, Any])


@dataclass(frozen=True)
class Answer:
    """A gold answer: a piece of the context.

    Attributes:
        text: The answer, exactly as it stands in the context.
        start: Character of the context where it starts.
    """

    text: str
    start: int


@dataclass(frozen=True)
class SquadExample:
    """One question about one paragraph.

    Attributes:
        id: Unique in its data set.
        question: The question.
        context: The paragraph that holds the answer.
        answers: Gold answers, at least one; the first is the training label.
        title: Article of the paragraph, may be empty.
    """

    id: str
    question: str
    context: str
    answers: tuple[Answer, ...]
    title: str = ""


def read_squad(path: str | Path) -> list[SquadExample]:
    """Read every question of a SQuAD v1.1 file, in file order.

    Args:
        path: A JSON file ``{"version": "1.1", "data": [...]}``.

    Returns:
        The examples, at least one.

    Raises:
        DatasetError: The file is missing, is not SQuAD v1.1 JSON, is empty, repeats an id, or an
            answer does not stand where it says; the message names the place in the file.
    """
    path = Path(path)
    root = read_json(path, "the SQuAD v1.1 file", DatasetError)
    examples = list(_examples(root, str(path)))
    return _checked(examples, str(path))


def load_hub_squad(
    dataset_name: str, config_name: str | None = None
) -> dict[str, list[SquadExample]]:
    """Load a data set with SQuAD's columns through the ``datasets`` library.

    Args:
        dataset_name: Hub name such as ``squad``, or a folder that ``datasets`` can load.
        config_name: Its configuration, if it has several.

    Returns:
        The examples of every split, under the split's name.

    Raises:
        DatasetError: It cannot be loaded (offline and not cached, unknown), or its columns are not
            ``id, question, context, answers``.
    """
    instead = (
        "SQuAD v1.1 JSON files (examples/question-answering/make_demo_data.py writes such files)"
    )
    splits = hub_splits(dataset_name, config_name, instead=instead)
    return {str(name): _hub_split(rows, f"{dataset_name}[{name}]") for name, rows in splits.items()}


def _hub_split(rows: Iterable[Mapping[str, Any]], where: str) -> list[SquadExample]:
    """Turn the rows of one split into examples."""
    examples = []
    for i, row in enumerate(rows):
        at = f"{where} row {i}"
        gold = _get(row, "answers", dict, at)
        texts = _get(gold, "text", list, f"{at}.answers")
        starts = _get(gold, "answer_start", list, f"{at}.answers")
        if len(texts) != len(starts):
            raise DatasetError(
                f"{at}.answers: {len(texts)} 'text' but {len(starts)} 'answer_start'; "
                "SQuAD v1.1 wants one start per text"
            )
        answers = [{"text": t, "answer_start": s} for t, s in zip(texts, starts, strict=True)]
        context, title = _get(row, "context", str, at), str(row.get("title", ""))
        examples.append(_example({**row, "answers": answers}, context, title, at))
    return _checked(examples, where)


def _examples(root: Any, where: str) -> Iterator[SquadExample]:
    """Walk down ``data[] > paragraphs[] > qas[]``."""
    if not isinstance(root, dict):
        raise DatasetError(
            f"{where} holds a {type(root).__name__} at its top, expected an object with 'data'; "
            "pass a SQuAD v1.1 JSON file"
        )
    for i, article in enumerate(_get(root, "data", list, where)):
        at_article = f"{where}: data[{i}]"
        for j, paragraph in enumerate(_get(article, "paragraphs", list, at_article)):
            at_paragraph = f"{at_article}.paragraphs[{j}]"
            context = _get(paragraph, "context", str, at_paragraph)
            for k, qa in enumerate(_get(paragraph, "qas", list, at_paragraph)):
                yield _example(
                    qa, context, str(article.get("title", "")), f"{at_paragraph}.qas[{k}]"
                )


def _example(qa: Any, context: str, title: str, where: str) -> SquadExample:
    """Check one question and its answers."""
    identifier, question = _get(qa, "id", str, where), _get(qa, "question", str, where)
    gold = _get(qa, "answers", list, where)
    if qa.get("is_impossible") or not gold:
        raise DatasetError(
            f"{where} (id {shown(identifier)}) has no answer, as in SQuAD v2; only v1.1 is "
            "supported: remove unanswerable questions from the file"
        )
    answers = tuple(_answer(a, context, f"{where}.answers[{i}]") for i, a in enumerate(gold))
    return SquadExample(identifier, question, context, answers, title)


def _answer(answer: Any, context: str, where: str) -> Answer:
    """Check that an answer stands in the context where it says."""
    text, start = _get(answer, "text", str, where), _get(answer, "answer_start", int, where)
    there = context[start : start + len(text)] if start >= 0 else ""
    if not text or there != text:
        nearest = context.find(text) if text else -1
        remedy = (
            f"the text stands at {nearest}: is answer_start counted in bytes?"
            if nearest >= 0
            else "correct the text or remove the answer"
        )
        raise DatasetError(
            f"{where}: answer {text[:SHOWN_CHARACTERS]!r} is not at answer_start {start}, where "
            f"the context has {there[:SHOWN_CHARACTERS]!r}; {remedy}"
        )
    return Answer(text, start)


def _get(holder: Any, key: str, kind: type[_T], where: str) -> _T:
    """Return ``holder[key]`` if it has the expected type."""
    if not isinstance(holder, Mapping) or key not in holder:
        has = shown(list(holder)) if isinstance(holder, Mapping) else type(holder).__name__
        raise DatasetError(f"{where} has no {key!r} (it has {has}); SQuAD v1.1 needs it")
    value = holder[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DatasetError(
            f"{where}: {key!r} is a {type(value).__name__}, SQuAD v1.1 wants {kind.__name__}"
        )
    return value


def _checked(examples: list[SquadExample], where: str) -> list[SquadExample]:
    """Refuse an empty data set and repeated ids."""
    if not examples:
        raise DatasetError(f"{where} holds no question; pass a SQuAD v1.1 file with at least one")
    seen: set[str] = set()
    for example in examples:
        if example.id in seen:
            raise DatasetError(
                f"{where}: id {shown(example.id)} occurs more than once; ids key the predictions, "
                "so make them unique"
            )
        seen.add(example.id)
    return examples
