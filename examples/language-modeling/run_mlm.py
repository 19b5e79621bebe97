r"""Guess hidden tokens with a Transformers model, split over pipeline stages.

    python examples/language-modeling/run_mlm.py --model_name_or_path minilm \
        --num_stages 2 --train_file out/demo_mlm/train.txt \
        --validation_file out/demo_mlm/validation.txt \
        --do_train --do_eval --output_dir out/mlm

Options are spelled as in transformers' own run_mlm.py; ``--help`` lists them.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

from run_task import main

if __name__ == "__main__":
    main("masked-lm")
