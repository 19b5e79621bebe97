"""The samples that a script's options name, and the classes that occur in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from demo_model import source_of
from script_options import DataOptions
from script_run import split_of

from ipu_pipeline.capture.from_config import load_config
from tasks.labels import choose_classes
from tasks.media import MediaDataset
from tasks.samples import Row, Rows, in_data, load_hub_rows, read_rows


def read_splits(options: DataOptions) -> dict[str, Rows]:
    """Return the samples of every split that is needed.

    Raises:
        DatasetError: The data cannot be read, or a split is missing.
    """
    hub: Mapping[str, Rows] = {}
    if options.dataset_name is not None:
        hub = load_hub_rows(options.dataset_name, options.dataset_config_name)
    rows: dict[str, Rows] = {}
    for split in options.splits:
        path, limit = options.source(split)
        found = read_rows(path) if path is not None else split_of(hub, split, options)
        rows[split] = found[:limit]
    return rows


def media_data(
    options: DataOptions, rows: Mapping[str, Rows], features: Callable[[Row, Path], dict[str, Any]]
) -> dict[str, MediaDataset]:
    """Return the samples of every split, whose features are made of a row and its file's folder."""
    made = {}
    for split, samples in rows.items():
        folder = (options.source(split)[0] or Path()).parent
        made[split] = MediaDataset(
            samples, name_of(split, options), partial(features, folder=folder)
        )
    return made


def find_classes(
    labels_of: Callable[[Rows, Any], Iterator[str]] | None,
    rows: Mapping[str, Rows],
    options: DataOptions,
) -> tuple[str, ...]:
    """Return the classes of the data as the model numbers them; empty for tasks without any."""
    if labels_of is None:
        return ()
    labels = {}
    for split, samples in rows.items():
        with in_data(name_of(split, options)):
            labels[split] = list(labels_of(samples, options))
    config = load_config(source_of(options.model_name_or_path))
    return choose_classes(labels, config.label2id)


def name_of(split: str, options: DataOptions) -> str:
    """Return the file or data set of a split, for messages."""
    path, _ = options.source(split)
    return str(path) if path is not None else f"{options.dataset_name}[{split}]"
