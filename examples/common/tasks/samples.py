"""Raw samples as rows: from json, jsonl, csv and txt files, or from a data set of the hub.

Lines end with a line feed, or with a carriage return and one: text may hold U+2028 and the other
separators of ``str.splitlines``. ``datasets`` reads a row with too many fields as an index without
a word, so files are read here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ipu_pipeline.errors import DatasetError, first_line, shown
from ipu_pipeline.ir.codec import parse_json
from ipu_pipeline.ir.files import read_table, read_text

Row = Mapping[str, Any]
Rows = Sequence[Row]
TEXT_COLUMN = "text"  # of txt files
MAX_BYTES = 2**34  # of a file of samples


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read every sample of a file, in file order.

    Args:
        path: ``.json`` (a list of objects, ``{"data": [...]}``, or one object per line),
            ``.jsonl`` (one object per line), ``.csv`` (with a header), or ``.txt`` (every line,
            the empty ones too, as column ``text``).

    Returns:
        At least one row.

    Raises:
        DatasetError: The file is missing or empty, its kind is unknown, or a place in it is wrong.
    """
    path = Path(path)
    if path.suffix not in _READERS:
        raise DatasetError(
            f"{path} is of no known kind; pass a file that ends in {', '.join(_READERS)}"
        )
    text = read_text(path, "the samples", DatasetError, most_bytes=MAX_BYTES)
    rows = _READERS[path.suffix](text, str(path))
    if not rows:
        raise DatasetError(f"{path} holds no sample; pass a file with at least one")
    return rows


def _read_json(text: str, where: str) -> list[dict[str, Any]]:
    """Read a list of objects, or fall back on one object per line as ``datasets`` does."""
    try:
        root = parse_json(text)
    except ValueError as error:
        if text.lstrip().startswith("{"):
            return _read_lines(text, where)
        raise DatasetError(
            f"{where} is no JSON that can be read: {error}; write [{{...}}, ...], or one object "
            "per line"
        ) from error
    if isinstance(root, dict):
        root = root["data"] if isinstance(root.get("data"), list) else [root]
    if not isinstance(root, list) or not all(isinstance(row, dict) for row in root):
        raise DatasetError(
            f"{where} is not a list of JSON objects; write [{{...}}, ...], or one object per line"
        )
    return root


def _read_lines(text: str, where: str) -> list[dict[str, Any]]:
    """Read one object per line."""
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise DatasetError(
                f"{where}, line {number} cannot be read: {error}; write one object per line"
            ) from error
        if not isinstance(row, dict):
            raise DatasetError(
                f"{where}, line {number} holds a {type(row).__name__}; write one object per line"
            )
        rows.append(row)
    return rows


def _read_csv(text: str, where: str) -> list[dict[str, Any]]:
    """Read a table whose first line names the columns."""
    return list(read_table(text, where, DatasetError))


def _read_txt(text: str, _: str) -> list[dict[str, Any]]:
    """Read every line as a sample."""
    lines = text.removesuffix("\n").split("\n") if text else []
    return [{TEXT_COLUMN: line.removesuffix("\r")} for line in lines]


_READERS: Mapping[str, Callable[[str, str], list[dict[str, Any]]]] = {
    ".json": _read_json,
    ".jsonl": _read_lines,
    ".csv": _read_csv,
    ".txt": _read_txt,
}


def hub_splits(
    dataset_name: str, config_name: str | None = None, *, instead: str = "files of samples"
) -> Mapping[str, Iterable[Row]]:
    """Load a data set through the ``datasets`` library.

    Args:
        dataset_name: Hub name, or a folder that ``datasets`` can load.
        config_name: Its configuration, if it has several.
        instead: What ``--train_file`` and ``--validation_file`` may hold, for the message.

    Raises:
        DatasetError: It cannot be loaded: offline and not cached, or unknown.
    """
    from datasets import load_dataset

    files = f"--train_file and --validation_file with {instead} instead of --dataset_name"
    with loading_data(dataset_name, files):
        splits: Mapping[str, Iterable[Row]] = load_dataset(dataset_name, config_name)
    return splits


@contextmanager
def loading_data(dataset_name: str, instead: str) -> Iterator[None]:
    """Turn what ``datasets`` raises about a data set into one line.

    Args:
        dataset_name: What is loaded inside.
        instead: What to pass without a network.

    Raises:
        DatasetError: It cannot be loaded: offline and not cached, unknown, or damaged.
    """
    with by_datasets(f"data set {dataset_name!r}", f"without a network pass {instead}"):
        yield


@contextmanager
def by_datasets(what: str, remedy: str) -> Iterator[None]:
    """Turn whatever ``datasets`` and Arrow raise about what is loaded inside into one line.

    Raises:
        DatasetError: It cannot be loaded.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(
            f"{what} cannot be loaded ({first_line(error)[:200]}); {remedy}"
        ) from error


@contextmanager
def in_data(where: str) -> Iterator[None]:
    """Begin what is wrong with samples with the name of their file or data set."""
    try:
        yield
    except DatasetError as error:
        raise DatasetError(f"{where}, {error}") from error


def load_hub_rows(dataset_name: str, config_name: str | None = None) -> dict[str, Rows]:
    """Load every split of a data set, with the names of its class labels in place of numbers.

    Raises:
        DatasetError: It cannot be loaded.
    """
    splits = hub_splits(dataset_name, config_name)
    return {str(name): _named(rows) for name, rows in splits.items()}


def _named(rows: Any) -> list[dict[str, Any]]:
    """Replace class numbers, in columns and in lists, by the names that the data set has."""
    naming = {}
    for name, feature in rows.features.items():
        inner = getattr(feature, "feature", feature)
        if hasattr(inner, "int2str"):
            naming[name] = inner.int2str
    named = []
    for row in rows:
        changed = dict(row)
        for name, to_name in naming.items():
            value = row[name]
            several = isinstance(value, list)
            changed[name] = [to_name(v) for v in value] if several else to_name(value)
        named.append(changed)
    return named


def require(row: Row, column: str, kind: type | tuple[type, ...], where: str) -> Any:
    """Return ``row[column]`` if it is there and of the expected kind.

    Raises:
        DatasetError: It is not.
    """
    if column not in row:
        raise DatasetError(
            f"{where} has no column {column!r} (it has {shown(list(row))}); "
            "rename it, or say which columns to read"
        )
    value = row[column]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not object):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        raise DatasetError(
            f"{where}: {column!r} is a {type(value).__name__}, it has to be "
            f"{' or '.join(k.__name__ for k in kinds)}"
        )
    return value
