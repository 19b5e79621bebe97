r"""Classify texts or pairs of texts with a Transformers model, split over pipeline stages.

    python examples/text-classification/run_classification.py --model_name_or_path minilm \
        --num_stages 2 --train_file out/demo_classification/train.csv \
        --validation_file out/demo_classification/validation.csv \
        --do_train --do_eval --output_dir out/classification

Options are spelled as in transformers' own run_classification.py; ``--help`` lists them.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

from run_task import main

if __name__ == "__main__":
    main("sequence-classification")
