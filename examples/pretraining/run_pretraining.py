r"""Guess hidden tokens, and which segments follow each other, split over pipeline stages.

    python examples/pretraining/run_pretraining.py --model_name_or_path minilm \
        --num_stages 2 --train_file out/demo_pretraining/train.txt \
        --validation_file out/demo_pretraining/validation.txt \
        --do_train --do_eval --output_dir out/pretraining

Options are spelled as in transformers' own run_mlm.py, with nsp_probability; ``--help`` lists them.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

from run_task import main

if __name__ == "__main__":
    main("pretraining")
