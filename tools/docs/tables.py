"""The tables of the site, from the objects that they list."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import typer

from ipu_pipeline import cli, errors
from ipu_pipeline.backends.ipu.config.presets import preset_names
from ipu_pipeline.ir import machines
from ipu_pipeline.ir.limits import LIMITS
from ipu_pipeline.planner.passes.manager import PASSES, Pass
from ipu_pipeline.planner.schedules import schedule_kind, schedule_names
from ipu_pipeline.train.trainer_checks import refusals

ROOT = Path(__file__).resolve().parents[2]


def _table(columns: str, rows: Iterator[str]) -> str:
    heads = columns.split(" | ")
    return "\n".join([f"| {columns} |", "|" + "---|" * len(heads), *rows]) + "\n"


def error_classes() -> list[type[errors.PipelineError]]:
    """Return the classes of ``errors.py``, in their order there."""
    found = [
        item
        for item in vars(errors).values()
        if inspect.isclass(item) and issubclass(item, errors.PipelineError)
    ]
    return sorted(found, key=lambda kind: inspect.getsourcelines(kind)[1])


def _errors() -> str:
    rows = (
        f"| [`{kind.__name__}`](#{kind.__name__.lower()}) | `{kind.__mro__[1].__name__}` | "
        f"{inspect.getdoc(kind)} |"
        for kind in error_classes()
    )
    return _table("class | is a | meaning", rows)


def _schedules() -> str:
    kinds = map(schedule_kind, schedule_names())
    rows = (
        f"| `{kind.name}` | {kind.summary} | {kind.placement} | "
        f"{f'`{kind.torch_class}`' if kind.torch_class else 'none'} |"
        for kind in kinds
    )
    return _table("name | what it does | stages and devices | class of torch", rows)


def _machines() -> str:
    def row(family: dict[str, Any]) -> str:
        device, link = family["device"], family["link"]
        peak = max(device["flops_per_s"][name] for name in ("float16", "bfloat16"))
        return (
            f"| `{family['name']}` | {device['memory_bytes'] / 1e9:.1f} GB | {peak / 1e12:,.0f} | "
            f"{device['memory_bytes_per_s'] / 1e12:.2f} | {link['bytes_per_s'] / 1e9:,.0f}, "
            f"{family['board_link']['bytes_per_s'] / 1e9:,.0f} | {family['devices_per_board']} | "
            f"{family['source']} |"
        )

    columns = (
        "name | memory of a device | peak TFLOP/s (16 bit) | memory TB/s | "
        "links GB/s: on a board or node, beyond | devices a board | source"
    )
    return _table(columns, map(row, machines._facts().values()))


def _passes() -> str:
    def row(kind: type[Pass]) -> str:
        options = [
            f"`{item.name}`" + ("" if item.default is MISSING else f" (default `{item.default}`)")
            for item in fields(kind)
        ]
        first = inspect.getdoc(kind)
        assert first is not None
        return f"| `{kind.name}` | {first.splitlines()[0]} | {', '.join(options)} |"

    known = sorted(PASSES, key=lambda kind: kind.name)
    return _table("pass | what it does | options", map(row, known))


def _limits() -> str:
    return _table("count | largest", (f"| `{name}` | {most:,} |" for name, most in LIMITS.items()))


def _presets() -> str:
    return "".join(f"- `{name}`\n" for name in preset_names())


def _decisions() -> str:
    lines = []
    for path in sorted((ROOT / "docs" / "decisions").glob("*.md")):
        title = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        lines.append(f"- [{title}](decisions/{path.name})\n")
    return "".join(lines)


def commands() -> dict[str, Any]:
    """Return the commands of ``ipu-pipeline`` by name."""
    found: dict[str, Any] = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    return found


def _command(name: str, command: Any) -> str:
    context = command.make_context(name, [], resilient_parsing=True)
    help_text = inspect.cleandoc(command.help or "")
    arguments, options = [], []
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if parameter.param_type_name == "argument":
            arguments.append(record[0].split()[0])
        if record is None or "--help" in parameter.opts:
            continue
        flag, meaning = record[0], record[1].replace("|", "\\|").replace("*", "\\*")
        options.append(f"| `{flag}` | {meaning} |")
    usage = " ".join(["ipu-pipeline", name, *arguments, *(["[OPTIONS]"] if options else [])])
    table = _table("argument, option | meaning", iter(options)) if options else ""
    return f"## {name}\n\n```sh\n{usage}\n```\n\n{help_text}\n\n{table}"


def _commands() -> str:
    return "\n".join(_command(*found) for found in commands().items())


def made() -> Iterator[tuple[str, str]]:
    """Yield every file: its name and its text."""
    yield "errors.md", _errors()
    yield "trainer-refusals.md", refusals()
    yield "schedules.md", _schedules()
    yield "machines.md", _machines()
    yield "passes.md", _passes()
    yield "limits.md", _limits()
    yield "presets.md", _presets()
    yield "decisions.md", _decisions()
    yield "commands.md", _commands()
