"""``python -m ipu_pipeline``: the same commands as ``ipu-pipeline``."""

from ipu_pipeline.cli import run

if __name__ == "__main__":
    run()
