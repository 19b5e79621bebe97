"""``python -m ipu_pipeline``: the same commands as ``ipu-pipeline``."""

from ipu_pipeline.cli import app

if __name__ == "__main__":
    app(prog_name="ipu-pipeline")
