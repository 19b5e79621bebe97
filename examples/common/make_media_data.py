"""Write small data sets of pictures and sounds for the scripts.

    python examples/common/make_media_data.py numbers --output_dir out/demo_numbers

writes ``train.jsonl`` and ``validation.jsonl`` and the files that they name: ``shapes`` are the
pictures of the installed package easy-vqa with their shape and colour, ``words`` one spoken digit
each, ``numbers`` one or two of them. No speaker is in both. The same task, seed and sizes always
write the same sounds.
"""

from __future__ import annotations

import json
import shutil
import sys
import wave
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Annotated, Any

import typer
from spoken_digits import RATE, WORDS, speak

from ipu_pipeline.errors import PipelineError
from ipu_pipeline.ir.files import make_folder, write_text

# How many digits a sound may hold, and sounds of the training file unless said otherwise.
SOUNDS: Mapping[str, tuple[tuple[int, ...], int]] = {
    "words": ((1,), 2000),
    "numbers": ((1, 2), 2000),
}
SHAPES, FORMS = "shapes", ("circle", "rectangle", "triangle")


def make_sounds(task: str, split: str, size: int, seed: int, folder: Path) -> Iterator[Any]:
    """Write sounds; yield the rows that name them."""
    rng = Random(f"{task}-{split}-{seed}")
    counts, _ = SOUNDS[task]
    for number in range(size):
        digits = [rng.randrange(len(WORDS)) for _ in range(rng.choice(counts))]
        name = f"{split}/{number:05}.wav"
        with wave.open(str(folder / name), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(RATE)
            file.writeframes((speak(digits, rng) * 32767).astype("<i2").tobytes())
        text = " ".join(WORDS[digit] for digit in digits)
        yield {"audio": name, "label" if task == "words" else "text": text}


def copy_shapes(split: str, size: int, folder: Path) -> Iterator[Any]:
    """Copy pictures of easy-vqa; yield rows with their class.

    Raises:
        ValueError: The package is not installed, or has not so many.
    """
    try:
        import easy_vqa
    except ImportError as error:
        raise ValueError("easy-vqa is not installed; run 'pip install easy-vqa pillow'") from error
    of = "train" if split == "train" else "test"
    questions = zip(*getattr(easy_vqa, f"get_{of}_questions")(), strict=True)
    paths = getattr(easy_vqa, f"get_{of}_image_paths")()
    seen: dict[int, dict[bool, str]] = {}
    for text, answer, image in questions:
        if text.startswith("what"):
            seen.setdefault(image, {})[answer in FORMS] = answer
    known = [image for image in sorted(seen) if len(seen[image]) == 2]
    if size > len(known):
        raise ValueError(f"easy-vqa has {len(known)} pictures to {of}, asked were {size}")
    for image in known[:size]:
        name = f"{split}/{image:05}.png"
        shutil.copyfile(paths[image], folder / name)
        yield {"image": name, "label": f"{seen[image][False]} {seen[image][True]}"}


def main(
    task: Annotated[str, typer.Argument(help=f"One of {', '.join([*SOUNDS, SHAPES])}.")],
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Folder of the files.")],
    seed: Annotated[int, typer.Option("--seed", help="Same seed, same sounds.")] = 42,
    num_train: Annotated[
        int | None, typer.Option("--num_train", min=1, help="Samples; default: enough to learn.")
    ] = None,
    num_validation: Annotated[int, typer.Option("--num_validation", min=1, help="Samples.")] = 200,
) -> None:
    """Write the train and validation files of one task."""
    if task not in (*SOUNDS, SHAPES):
        raise ValueError(f"there is no task {task!r}, only {', '.join([*SOUNDS, SHAPES])}")
    usual = SOUNDS[task][1] if task in SOUNDS else 2000
    for split, size in (("train", num_train or usual), ("validation", num_validation)):
        make_folder("--output_dir", output_dir / split)
        made = (
            copy_shapes(split, size, output_dir)
            if task == SHAPES
            else make_sounds(task, split, size, seed, output_dir)
        )
        path = output_dir / f"{split}.jsonl"
        write_text(path, "".join(json.dumps(row) + "\n" for row in made))
        typer.echo(f"{path}: {size} samples")


if __name__ == "__main__":
    try:
        typer.run(main)
    except (PipelineError, ValueError) as error:
        sys.exit(f"error: {error}")
