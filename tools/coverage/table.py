"""The table of all classes: as JSON data and as Markdown."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ipu_pipeline.ir.files import make_folder, write_text
from tools.coverage.record import MEANING, Record

_INTRODUCTION = """\
# Coverage: every model class of transformers

Made by `make coverage`; do not edit.

Every model class that transformers {transformers} lists for a task is built with a small config,
captured, planned for 2 and for 4 stages, and trained one step (SGD, 2 microbatches) by the local
target. The loss, every gradient, every buffer and every weight after the step are compared with the
same step of the model alone. Configs and batches are made by general rules: no code knows a single
model. Dropout probabilities are 0, because masks are drawn per block, and float32 products are
torch's on both sides: two libraries of them round differently.
"""


_EMITTED = """\
# Coverage on IPUs: what is planned is emitted, and runs

Made by `python -m tools.coverage --ipus --output docs/coverage_ipus.json`; do not edit.

Every model class that transformers {transformers} lists for a task is built with a small config,
captured, planned for 2, 4 and 8 stages on a pod of 16 IPUs, and every plan is written as a bundle.
The plan for 2 stages trains one step (SGD) on the stand-in for poptorch, and loss and weights are
compared with the model alone. Nothing of it ran on IPUs. A depth that is not listed is refused when
it is planned, with a reason. A class that draws random numbers in its forward pass is compared with
as many draws of the same generator. **{covered} of the {total} classes are covered.**
"""
_GENERATED = """\
# Coverage of generation: tokens are those of eager

Made by `python -m tools.coverage --generate --output docs/coverage_generation.json`; do not edit.

Every model class with transformers' `generate` is built with a small config and planned for 2 and
4 stages. It generates 4 tokens, greedily and with 3 beams, on as many ranks of the distributed
target as there are stages, each with its own stages' weights only (those of others are NaN; the
ranks are threads, whose messages are the same). Tokens have to be equal and scores within 1e-4;
the column says how far apart scores are. **{covered} of the {total} classes that generate are
covered.**
"""
_PASSES = {
    "check_emitted": "every plan that was made is emitted, and one trained a step equal to eager",
    "check_generated": "for every number of stages all ranks get the tokens of the model alone",
}
# What says where a rule was broken: depth, kind of error, line of the model.
_PLACE = re.compile(r"(\d+ stages: )?(\w+: )?(\w+\.py:\d+ \(.*?\): )?")


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """Return the numbers that say how far it reaches."""
    passed = [record for record in records if record.result == "pass"]
    counted = [record for record in records if record.counted]
    return {
        "classes": len(records),
        "counted": len(counted),
        "passed": len(passed),
        "passed_share": round(len(passed) / len(counted), 4) if counted else 0.0,
        "architectures_passed": len({record.architecture for record in passed}),
        "exact": sum(record.difference == 0.0 for record in passed),
        "results": dict(sorted(Counter(record.result for record in records).items())),
    }


def write_json(path: Path, records: Sequence[Record], versions: Mapping[str, str]) -> None:
    """Write versions, summary and every record; equal runs give equal files but for seconds."""
    data = {
        "versions": dict(versions),
        "summary": summary(records),
        "records": [record.to_json() for record in records],
    }
    _write(path, json.dumps(data, indent=1) + "\n")


def write_markdown(
    path: Path,
    records: Sequence[Record],
    versions: Mapping[str, str],
    check: str = "",
    total: int = 0,
) -> None:
    """Write the page that people read."""
    _write(path, markdown(records, versions, check, total))


def markdown(
    records: Sequence[Record], versions: Mapping[str, str], check: str = "", total: int = 0
) -> str:
    """Return the page: numbers, what did not pass and why, then every class.

    Args:
        records: What was found.
        versions: Of the libraries.
        check: Name of the check; empty: that of a training step.
        total: Classes that there are for it.
    """
    numbers = summary(records)
    emitted = check == "check_emitted"
    meaning = {**MEANING, "pass": _PASSES.get(check, MEANING["pass"])}
    introduction = {"check_emitted": _EMITTED, "check_generated": _GENERATED}
    equal = "" if check else f"; {numbers['exact']} of them are equal to eager to the last bit"
    left = [record for record in records if record.counted and record.result != "pass"]
    known = {"covered": len(records), "total": total}
    parts = [
        introduction.get(check, _INTRODUCTION).format(**versions, **known),
        f"**{numbers['passed']} of {numbers['counted']} classes pass "
        f"({100 * numbers['passed_share']:.1f} %), of {numbers['architectures_passed']} "
        f"architectures**{equal}. "
        "Counted are classes whose eager step runs and repeats itself. "
        f"Versions: {', '.join(f'{name} {text}' for name, text in versions.items())}.\n",
        _grid(
            ("result", "classes", "meaning"),
            ((kind, str(count), meaning[kind]) for kind, count in numbers["results"].items()),
        ),
        *(_depths_and_rules(records) if emitted else ()),
        "## Counted, and not passed\n",
        _grid(
            ("class", "architecture", "result", "reason"),
            ((r.name, r.architecture, r.result, r.reason) for r in left),
        )
        if left
        else "None.\n",
        "## Every class\n",
        _grid(
            ("class", "architecture", "task", "blocks", "stages", "difference", "result", "reason"),
            map(_row, records),
        ),
    ]
    return "\n".join(parts)


def _depths_and_rules(records: Sequence[Record]) -> list[str]:
    """Return how many classes are emitted for every depth, and what refuses the others."""
    depths = Counter(depth for record in records for depth in record.stages)
    rules: Counter[str] = Counter()
    for record in records:
        if record.counted and record.reason:
            rules[_rule(record.reason)] += 1
    return [
        _grid(
            ("stages", "classes emitted"),
            ((str(depth), str(count)) for depth, count in sorted(depths.items())),
        ),
        "## Reasons, by rule\n",
        _grid(("rule", "classes"), ((rule, str(count)) for rule, count in rules.most_common())),
    ]


def _rule(reason: str) -> str:
    """Return a reason without the place and the numbers of one class."""
    text = reason[_PLACE.match(reason).end() :]  # type: ignore[union-attr]  # it matches nothing, too
    return re.sub(r"\d+", "N", re.split(r"[;,]", text)[0])


def _row(record: Record) -> tuple[str, ...]:
    return (
        record.name,
        record.architecture,
        record.task,
        str(record.blocks or ""),
        ", ".join(map(str, record.stages)),
        f"{record.difference:.0e}" if record.difference else ("0" if record.stages else ""),
        record.result,
        record.reason,
    )


def _grid(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _write(path: Path, text: str) -> None:
    write_text(make_folder("--output", path.parent) / path.name, text)
