"""Count how programs fare: ``python -m tests.programs.census 2000 --seed 7``.

Prints a table in Markdown, by construct: programs that hold it, the share of them that equals
plain torch, and the refusals by the construct that they name. Exits with 1 if any program is
neither equal nor refused by an error of ours.
"""

from __future__ import annotations

import argparse
import random
import sys
import warnings
from collections import Counter

import torch

from ipu_pipeline.errors import PipelineError, StageError
from ipu_pipeline.stages.loss_shares import MixedSamplesError
from tests.programs.program import FEATURES, Program, eager, pipelined

# Of four programs one has a given feature.
RARE = 4


def drawn(draw: random.Random) -> Program:
    """Return a random program."""
    chosen = {
        name: draw.choice(values[1:]) if draw.randrange(RARE) == 0 else values[0]
        for name, values in FEATURES.items()
    }
    layers = draw.randint(2, 4)
    return Program(
        **chosen,
        layers=layers,
        stages=draw.randint(1, min(3, layers)),
        microbatches=draw.randint(1, 4),
    )


# What a program may be; the last one is refused where its losses mix samples, and equal with the
# remedy that the error names.
RIGHT = ("equal", "refused", "equal when asked")


def outcome(program: Program, *, asked: bool = False, target: str = "local") -> str:
    """Return one of :data:`RIGHT`, or what is wrong.

    A training that diverges makes rounding errors large: what differs is run again in float64.
    """
    found = _outcome(program, asked=asked, target=target)
    if found in RIGHT or target != "local":
        return found
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return _outcome(program, asked=asked, target=target)
    finally:
        torch.set_default_dtype(usual)


def _outcome(program: Program, *, asked: bool, target: str) -> str:
    truth = eager(program, asked=asked)
    try:
        found = pipelined(program, asked=asked, target=target)
    except MixedSamplesError as error:
        if not program.mixes or asked:
            return f"refused falsely: {error}"
        found_then = outcome(program, asked=True, target=target)
        return "equal when asked" if found_then == "equal" else found_then
    except PipelineError as error:
        # Of another process there is only the text.
        ours = isinstance(error.__cause__, PipelineError) or "GuardError: " in str(error)
        if isinstance(error, StageError) and not ours:
            return f"failed in a stage: {error}"
        return "refused" if len(str(error)) > 40 else f"refused without a reason: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return truth.difference(found) or "equal"


def main() -> int:
    """Draw, run, count and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("number", type=int)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    draw = random.Random(arguments.seed)
    held: Counter[str] = Counter()
    equal: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    wrong = 0
    for _ in range(arguments.number):
        program = drawn(draw)
        found = outcome(program)
        if found not in RIGHT:
            wrong += 1
            print(f"{program}: {found}", file=sys.stderr, flush=True)
        for construct in ("all", *constructs(program)):
            held[construct] += 1
            equal[construct] += found == "equal"
            asked[construct] += found == "equal when asked"
    print("| construct | programs | equal to plain torch | and with loss_weights |")
    print("|---|---|---|---|")
    for construct, number in held.most_common():
        shares = [100 * count[construct] / number for count in (equal, asked)]
        print(f"| {construct} | {number} | {shares[0]:.1f} % | {shares[1]:.1f} % |")
    print(f"\nneither equal nor refused: {wrong}", file=sys.stderr)
    return int(wrong > 0)


def constructs(program: Program) -> list[str]:
    """Return what is special about a program."""
    return [f"{name}: {value}" for name, value in program.special().items() if name in FEATURES]


if __name__ == "__main__":
    sys.exit(main())
