"""Counts beyond every limit are refused at once, with the limit, wherever a user can give them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from enum import EnumMeta
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

import pytest
from transformers import BertConfig
from typer.models import OptionInfo
from typer.testing import CliRunner

from ipu_pipeline.backends.cluster.launch.spec import make_spec
from ipu_pipeline.backends.ipu.config import IPUConfig
from ipu_pipeline.backends.ipu.tune import TuneRequest
from ipu_pipeline.backends.local.measure import local_machine
from ipu_pipeline.capture.example_batch import BatchSize
from ipu_pipeline.capture.from_config import from_config
from ipu_pipeline.cli import app
from ipu_pipeline.errors import LoweringError, PartitionError, PipelineError
from ipu_pipeline.ir.limits import LIMITS, check_count, check_elements
from ipu_pipeline.ir.machines import machine_by_name
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.planner.passes.manager import PassManager
from ipu_pipeline.planner.schedules import PipelineShape
from ipu_pipeline.planner.search import Constraints
from ipu_pipeline.planner.search.parallel import check_depth
from ipu_pipeline.train import TrainingArguments
from tests.ir.plan_example import example_plan

HUGE = 10**15


def loaded(tmp_path: Path, **changes: Any) -> Plan:
    path = tmp_path / "plan.json"
    example_plan().save(path)
    raw = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(raw | changes), encoding="utf-8")
    return Plan.load(path)


def started(tmp_path: Path, replicas: int, **choices: Any) -> None:
    machine = machine_by_name("a100-80g-x65536")
    plan = replace(example_plan(), replicas=replicas, machine=machine)
    make_spec(plan, tmp_path, ("train.py",), **choices)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "microbatches of a plan": (
        lambda folder: loaded(folder, num_microbatches=HUGE), "num_microbatches may be 1000000000"
    ),
    "replicas of a plan": (lambda folder: loaded(folder, replicas=10**6), "replicas may be 65536"),
    "stages": (lambda _: Constraints(num_stages=HUGE), "num_stages may be 4096 at most, got 10000"),
    "microbatches": (lambda _: Constraints(num_microbatches=HUGE), "num_microbatches may be"),
    "replicas": (lambda _: Constraints(replicas=HUGE), "replicas may be 65536 at most"),
    "depth": (lambda _: Constraints(max_stages=HUGE), "max_stages may be 65536 at most"),
    "orders": (lambda _: Constraints(max_ideals=HUGE), "max_ideals may be 10000000 at most"),
    "slices": (lambda _: Constraints(serialize={"a": HUGE}), "slices of a may be 65536 at most"),
    "layers": (lambda _: Constraints(layers_per_ipu=(HUGE,)), "layers_per_ipu may be 10000"),
    "a shape": (lambda _: PipelineShape.of(HUGE, 1), "num_stages may be 4096 at most"),
    "more stages than blocks": (
        lambda _: check_depth(example_plan().graph, 4000), "4000 stages need at least as many bloc"
    ),
    "a pass": (
        lambda _: PassManager.parse(f"serialize_embedding{{factor={HUGE}}}"), "factor may be 65536"
    ),
    "a pod": (lambda _: machine_by_name("pod100000"), "at most 65536 devices are possible"),
    "a long name of a pod": (lambda _: machine_by_name(f"pod{'9' * 5000}"), r"pod9+\.\.\.': at mo"),
    "this machine": (lambda _: local_machine(HUGE), "num_stages on this machine may be 256"),
    "a batch": (lambda _: BatchSize(HUGE), "batch_size may be 65536 at most"),
    "a sequence": (lambda _: BatchSize(1, HUGE), "seq_length may be 1048576 at most"),
    "both": (lambda _: BatchSize(2**16, 2**20), "lower the micro batch or the sequence length"),
    "images": (lambda _: check_elements(2**16, 3, 224, 224), "65536 x 3 x 224 x 224 elements"),
    "layers of a config": (
        lambda _: from_config(BertConfig(num_hidden_layers=10**9), "masked-lm"),
        "num_hidden_layers may be 10000 at most, got 1000000000",
    ),
    "IPUs": (lambda _: IPUConfig(ipus_per_replica=HUGE), "ipus_per_replica: Expected .* <= 4096"),
    "accumulation": (lambda _: IPUConfig(gradient_accumulation_steps=HUGE), "<= 1000000000"),
    "iterations": (lambda _: IPUConfig(device_iterations=HUGE), "<= 1000000000"),
    "copies": (lambda _: IPUConfig(replication_factor={"default": HUGE}), "<= 65536"),
    "layers of an IPU": (lambda _: IPUConfig(layers_per_ipu=(HUGE,)), "<= 10000"),
    "factor": (lambda _: IPUConfig(embedding_serialization_factor=HUGE), "<= 65536"),
    "global batch": (lambda _: TuneRequest(HUGE), "global_batch may be 1000000000 at most"),
    "IPUs to tune": (lambda _: TuneRequest(1, ipus_per_replica=HUGE), "ipus_per_replica may be"),
    "samples": (
        lambda folder: TrainingArguments(folder, per_device_train_batch_size=HUGE),
        "per_device_train_batch_size may be 65536",
    ),
    "accumulation of a script": (
        lambda folder: TrainingArguments(folder, gradient_accumulation_steps=HUGE),
        "gradient_accumulation_steps may be",
    ),
    "stages of a script": (lambda folder: TrainingArguments(folder, num_stages=HUGE), "num_stages"),
    "processes here": (lambda folder: started(folder, 40_000), "processes on one machine may be 2"),
    "processes of one node": (
        lambda folder: started(folder, 30_000, here=False, nodes=1),
        "processes on one machine may be 256",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_huge_count_is_refused_with_its_limit(tmp_path: Path, name: str) -> None:
    use, message = REFUSED[name]
    with pytest.raises((PipelineError, ValueError), match=message):
        use(tmp_path)


class Number(NamedTuple):
    """An option of a command that takes a number."""

    command: str
    flag: str
    whole: bool
    most: float | None
    others: tuple[str, ...]


def numbers() -> Iterator[Number]:
    """Find every option of every command that takes a number."""
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__
        parameters = inspect.signature(command.callback).parameters
        needed, found = [], []
        for parameter, hint in get_type_hints(command.callback, include_extras=True).items():
            if get_origin(hint) is not Annotated:
                continue
            kind, info = get_args(hint)
            kinds = set(get_args(kind) or (kind,))
            is_option = isinstance(info, OptionInfo)
            # In an annotation the first argument of typer.Option is the first name.
            flag = str((info.default, *(info.param_decls or ()))[0])
            if is_option and kinds & {int, float}:
                found.append((flag, int in kinds, info.max))
            if parameters[parameter].default is inspect.Parameter.empty:
                named = list(kind) if isinstance(kind, EnumMeta) else []
                value = "8" if int in kinds else named[0].value if named else "none"
                needed += [[flag, value] if is_option else [value]]
        for flag, whole, most in found:
            others = [part for parts in needed if parts[0] != flag for part in parts]
            yield Number(name, flag, whole, most, tuple(others))


NUMBERS = {f"{number.command} {number.flag}": number for number in numbers()}


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_of_a_command_has_a_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """What is outside is refused at once, and by its name."""
    monkeypatch.chdir(tmp_path)
    command, flag, whole, most, others = NUMBERS[name]
    assert most is not None
    for value in ("1" + "0" * 400, "-1", "nan", "inf", "-inf", "x", "", *["1.5"] * whole):
        done = CliRunner().invoke(app, [command, *others, flag, value])
        assert done.exit_code == 2, value
        assert f"Invalid value for '{flag}'" in done.output
    done = CliRunner().invoke(app, [command, *others, flag, str(most)])
    assert done.exit_code == 1, "the largest one is taken; something else is refused"
    assert done.output.startswith("error: ")


def test_the_numbers_of_the_commands_are_found() -> None:
    assert {"tune --global-batch", "tune --free", "plan --num-stages"} <= NUMBERS.keys()
    assert {"launch --threads", "emit --seed", "emit --learning-rate"} <= NUMBERS.keys()


def test_what_is_no_count_is_refused() -> None:
    for wrong in (1.5, True, "3", None):
        with pytest.raises(ValueError, match="replicas must be a whole number, got"):
            check_count("replicas", wrong)
    with pytest.raises(LoweringError, match="nodes must be at least 1, got 0"):
        check_count("nodes", 0, error=LoweringError)
    with pytest.raises(PartitionError, match="got more"):
        check_count("nodes", 10**4000, error=PartitionError)
    for name, most in LIMITS.items():
        check_count(name, most)
