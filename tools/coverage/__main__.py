"""Run the coverage of transformers' model classes: ``python -m tools.coverage --help``."""

import typer

from tools.coverage.command import coverage_command

if __name__ == "__main__":
    typer.run(coverage_command)
