r"""Find the names in sentences with a Transformers model, split over pipeline stages.

    python examples/token-classification/run_ner.py --model_name_or_path minilm \
        --num_stages 2 --train_file out/demo_ner/train.jsonl \
        --validation_file out/demo_ner/validation.jsonl \
        --do_train --do_eval --output_dir out/ner

Options are spelled as in transformers' own run_ner.py; ``--help`` lists them.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

from run_task import main

if __name__ == "__main__":
    main("token-classification")
