"""Run the coverage of transformers' model classes: ``python -m tools.coverage --help``."""

from tools.coverage.command import app

if __name__ == "__main__":
    app(prog_name="python -m tools.coverage")
