r"""Classify pictures with a Transformers model, split over pipeline stages.

    python examples/image-classification/run_image_classification.py \
        --model_name_or_path examples/image-classification/small --num_stages 2 \
        --train_file out/demo_shapes/train.jsonl \
        --validation_file out/demo_shapes/validation.jsonl \
        --do_train --do_eval --output_dir out/shapes

Options are spelled as in transformers' own run_image_classification.py; ``--help`` lists them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

import ctrl_c  # noqa: F401 - from here on
from classification_run import ClassOptions, classify
from script_options import run_command_line

from ipu_pipeline.train.arguments import option
from tasks.media import read_picture
from tasks.samples import Row, require


@dataclass(kw_only=True)
class Options(ClassOptions):
    """Everything that the script can be told."""

    image_column_name: str = option(default="image", help="Column of the picture.")


def run(options: Options) -> Any:
    """Train and evaluate a classifier of pictures."""

    def features(row: Row, folder: Path, processor: Any) -> dict[str, Any]:
        picture = read_picture(require(row, options.image_column_name, object, "row"), folder)
        return {"pixel_values": processor(picture, return_tensors="pt")["pixel_values"][0]}

    return classify(options, "AutoModelForImageClassification", "AutoImageProcessor", features)


if __name__ == "__main__":
    run_command_line(run, Options)
