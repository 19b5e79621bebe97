"""Every kind of file that is read: how a good one is written, and what is done with one."""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import math
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import msgspec
import numpy as np
import pytest
from torch import nn

import ipu_pipeline as ipp
from benchmarks.results import read_csv
from benchmarks.solver_instances import read_instance, solve_instance
from benchmarks.suite.workloads import FILE, load
from ipu_pipeline.backends.cluster.launch.spec import make_spec
from ipu_pipeline.backends.cluster.launch.torchrun import slurm_file
from ipu_pipeline.backends.ipu.bundle import emit
from ipu_pipeline.backends.ipu.config import IPUConfig
from ipu_pipeline.backends.ipu.settings import settings_for
from ipu_pipeline.backends.local.measure.cache import load_measurements, store_measurements
from ipu_pipeline.capture import capture
from ipu_pipeline.capture.from_config import config_named, from_config
from ipu_pipeline.compiler import plan
from ipu_pipeline.errors import LoweringError, PipelineError, PlanError
from ipu_pipeline.ir.machine import Device, Machine
from ipu_pipeline.ir.machines import machine_by_name
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.planner.report import text_report
from ipu_pipeline.planner.schedules.simulate import simulate
from tasks.question_answering import read_squad
from tasks.samples import in_data, read_rows
from tasks.table import TASKS
from tasks.visual_question_answering import AnswerSet, load_file
from tasks.visual_question_answering import read_rows as read_questions
from tasks.visual_question_answering.answers import Labels
from tests.examples.vqa_tables import records
from tests.ir.plan_example import example_machine, example_plan
from tests.security.kind import Kind, finite, ipu_plan
from tests.security.kinds_of_jobs import JOBS
from tests.tiny_models import TINY

# ---------------------------------------------------------------- plans, machines, configurations


BUNDLED = ("runtime", "model_parallel")


def use_plan(path: Path) -> None:
    """Read a plan and do what explain, simulate and launch do with it."""
    plan = Plan.load(path)
    plan.explain()
    timeline = simulate(plan)
    finite(timeline.step_s)
    for stage in plan.stages:
        finite(stage.forward_s, stage.backward_s, stage.transfer_s, stage.memory_bytes)
    with contextlib.suppress(LoweringError):  # of a plan that runs elsewhere
        spec = make_spec(plan, path, ("train.py",), here=False)
        slurm_file(spec, python="python", folder=path.parent, name="job")


def report_plan(path: Path) -> None:
    """Read a plan and report it: its neighbours are planned, which takes longer."""
    text_report(Plan.load(path))


def bundle(path: Path) -> None:
    """Write a bundle around ``path``."""
    emit(ipu_plan(), settings_for(ipu_plan(), None), path.parent)


def use_bundle(path: Path) -> None:
    """Read the files of a bundle as its run.py does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(path.parent))
        for name in [name for name in sys.modules if name.split(".")[0] in BUNDLED]:
            patch.delitem(sys.modules, name)
        files = importlib.import_module("runtime.files")
        try:
            plan, settings, blocks = files.read_files(path.parent)
        except files.BundleError as error:  # names files by what they are called in the bundle
            raise PlanError(str(error).replace(path.name, str(path))) from error
        assert plan["graph"]["blocks"]
        assert len(blocks) > 0
        assert settings["micro_batch_size"] >= 1


def use_ipu_plan(path: Path) -> None:
    """Read a plan for IPUs and write its bundle."""
    plan = Plan.load(path)
    emit(plan, settings_for(plan, None), path.parent / "bundle")


@cache
def trained_plan() -> tuple[nn.Module, Plan]:
    """Return a tiny model, and its plan for this machine."""
    model, batch = TINY["bert-qa"].build(batch_size=1, seq_length=8)
    return model, plan(model, batch, machine=example_machine(), num_stages=2, microbatches=2)


def compile_plan(path: Path) -> None:
    """Compile the model by a plan, and compute by what is accepted."""
    model, good = trained_plan()
    found = Plan.load(path)
    try:
        with ipp.compile(copy.deepcopy(model), found, target="local") as executable:
            if found.total_batch_size == good.total_batch_size:
                batch = TINY["bert-qa"].batch(batch_size=good.total_batch_size, seq_length=8)
                assert math.isfinite(executable.forward_backward(batch))
    except PipelineError as error:  # of the plan, whose file compile does not know
        raise PlanError(f"{path}: {error}") from error


def use_machine(path: Path) -> None:
    """Read a machine and do what the planner does with it."""
    machine = Machine.load(path)
    machine.fingerprint()
    finite(machine.link_between(0, len(machine.devices) - 1).transfer_s(8))
    finite(*(device.peak_flops_per_s("float32") for device in machine.devices))


def write_machine(path: Path) -> None:
    """Write a published machine."""
    path.write_text(json.dumps(machine_by_name("a100-80g-x4").to_json()), encoding="utf-8")


MEASURED = Device("cpu", 1, {"float32": 1e9}, 1e8, op_rates={"gelu": 1e6})


def write_measurements(path: Path) -> None:
    """Keep a device in the cache, which is the folder of ``path``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPU_PIPELINE_CACHE", str(path.parent))
        store_measurements(path.stem, MEASURED)


def use_measurements(path: Path) -> None:
    """Find what was measured, or nothing: a damaged entry is dropped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPU_PIPELINE_CACHE", str(path.parent))
        assert load_measurements(path.stem, Device) in (None, MEASURED)


def write_config(path: Path) -> None:
    """Write the configuration of a tiny BERT as published ones are."""
    TINY["bert-qa"].config(architectures=["BertForQuestionAnswering"]).to_json_file(path)


def use_config(path: Path) -> None:
    """Build the model and capture it, as plan does."""
    with config_named(path):
        capture(*from_config(path, batch_size=1, seq_length=8), self_check=False)


# ---------------------------------------------------------------- samples


SQUAD = {
    "version": "1.1",
    "data": [
        {
            "title": "T",
            "paragraphs": [
                {
                    "context": f"The {colour} box\u2028stands in Ghent.",
                    "qas": [
                        {
                            "id": f"q{number}",
                            "question": "Where?",
                            "answers": [{"text": "Ghent", "answer_start": 19 + len(colour)}],
                        }
                    ],
                }
                for number, colour in enumerate(("red", "green"))
            ],
        }
    ],
}


def use_squad(path: Path) -> None:
    """Read the questions; every answer stands where it says."""
    for example in read_squad(path):
        example.question.encode()
        for answer in example.answers:
            assert example.context[answer.start :].startswith(answer.text)


def use_rows(task: str) -> Callable[[Path], None]:
    """Return what encodes the samples of a file for a task."""
    from tests.examples.tasks.tiny import make_tokenizer

    def use(path: Path) -> None:
        from tasks.features import Setup
        from tasks.labels import choose_classes

        rows, row = read_rows(path), TASKS[task]
        options, pair_label = row.options(max_seq_length=16), "next_sentence_label"
        with in_data(str(path)):
            labels = list(row.labels_of(rows, options)) if row.labels_of else []
            classes = choose_classes({"train": labels}) if row.labels_of else ()
            data = row.encode(rows, Setup(make_tokenizer(), options, classes, pair_label))
        assert len(data) > 0

    return use


def write_rows(task: str) -> Callable[[Path], None]:
    """Return what writes samples of a task, as the suffix of the file says."""
    from tests.examples.tasks.tiny import make_rows

    def write(path: Path) -> None:
        rows = make_rows(task, 4)
        if path.suffix == ".csv":
            from make_task_data import as_csv

            text = as_csv(rows)
        elif path.suffix == ".txt":
            text = "".join(" ".join(map(str, row.values())) + "\n" for row in rows)
        elif path.suffix == ".jsonl":
            text = "".join(json.dumps(row) + "\n" for row in rows)
        else:
            text = json.dumps(rows)
        path.write_text(text, encoding="utf-8")

    return write


def write_questions(path: Path) -> None:
    """Write questions about images, as the suffix of the file says."""
    rows = records(3, "soft" if path.suffix == ".parquet" else "hard")
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows), encoding="utf-8")


def use_questions(path: Path) -> None:
    """Read questions, regions and labels."""
    found = read_questions(load_file(path), str(path))
    answers = found.answers or AnswerSet.of_labels(found.labels)
    labels = Labels.of(found.labels, answers, found.where)
    for row in range(len(found)):
        assert isinstance(found.questions[row], str)
        for part in found.regions[row]:
            assert np.isfinite(part.numpy()).all()
        labels[row]


# ---------------------------------------------------------------- benchmarks


def write_max_load(path: Path) -> None:
    """Write operators on accelerators."""
    nodes = [
        {"id": number, "supportedOnFpga": 1, "cpuLatency": 20.0, "fpgaLatency": 2.0 + number,
         "isBackwardNode": 0, "colorClass": number, "size": 10.0}
        for number in range(4)
    ]  # fmt: skip
    edges = [{"sourceId": i, "destId": i + 1, "cost": 0.5} for i in range(3)]
    raw = {"maxSizePerFPGA": 30.0, "maxFPGAs": 2, "maxCPUs": 1, "nodes": nodes, "edges": edges}
    path.write_text(json.dumps(raw), encoding="utf-8")


def write_layers(path: Path) -> None:
    """Write layers that may be recomputed."""
    way = {"timePerSample": 1.0, "memoryUsageA": 2.0, "memoryUsageB": 3.0, "syncTimeFw": {"1": 0.0},
           "syncTimeBw": {"1": 0.0}}  # fmt: skip
    nodes = [{"id": i, "TMPCs": {"1": [way, way | {"timePerSample": 1.3}]}} for i in range(4)]
    edges = [{"sourceId": i, "destId": i + 1, "communicationCost": 5.0} for i in range(3)]
    raw = {"maxDevices": 2, "maxMemoryPerDevice": 100.0, "nodes": nodes, "edges": edges}
    path.write_text(json.dumps(raw), encoding="utf-8")


def use_instance(path: Path) -> None:
    """Read a partitioning instance and solve it."""
    found = solve_instance(read_instance(path), 1.0)
    assert found.lower_bound >= 0


RESULT = "throughput,bert,eager,seconds,s,1.5,1.4,1.6,5,measured,0123456789ab,2026-01-02\n"


def write_results(path: Path) -> None:
    """Write results as benchmarks.run does."""
    from benchmarks.results import NAMES

    path.write_text(",".join(NAMES) + "\n" + RESULT * 3, encoding="utf-8")


def use_results(path: Path) -> None:
    """Read results."""
    assert all(math.isfinite(row.median) for row in read_csv(path))


def use_workloads(path: Path) -> None:
    """Read what is to be measured."""
    suite = load(path)
    assert all(work.microbatches >= 1 for work in suite.workloads.values())
    assert msgspec.to_builtins(suite)


KINDS: dict[str, Kind] = {
    "plan.json": Kind(lambda path: example_plan().save(path), use_plan, 80),
    "report/plan.json": Kind(lambda path: example_plan().save(path), report_plan, 7),
    "ipu/plan.json": Kind(lambda path: ipu_plan().save(path), use_ipu_plan, 30),
    "compile/plan.json": Kind(lambda path: trained_plan()[1].save(path), compile_plan, 3),
    "bundle/settings.json": Kind(bundle, use_bundle, 10),
    "bundle/plan.json": Kind(bundle, use_bundle, 5),
    "machine.json": Kind(write_machine, use_machine, 60),
    "ipu_config.json": Kind(
        lambda path: IPUConfig(layers_per_ipu=(1, 2, 3), gradient_accumulation_steps=16).save(path),
        lambda path: IPUConfig.load(path),
        60,
    ),
    "device-2x1.json": Kind(write_measurements, use_measurements, 60),
    "config.json": Kind(write_config, use_config, 10),
    "squad.json": Kind(
        lambda path: path.write_text(json.dumps(SQUAD), encoding="utf-8"), use_squad, 60
    ),
    "pairs.csv": Kind(
        write_rows("sequence-classification"), use_rows("sequence-classification"), 50
    ),
    "words.jsonl": Kind(write_rows("token-classification"), use_rows("token-classification"), 50),
    "choices.json": Kind(write_rows("multiple-choice"), use_rows("multiple-choice"), 30),
    "text.txt": Kind(write_rows("masked-lm"), use_rows("masked-lm"), 40),
    "documents.jsonl": Kind(write_rows("pretraining"), use_rows("pretraining"), 20),
    "vqa.json": Kind(write_questions, use_questions, 55),
    "vqa.parquet": Kind(write_questions, use_questions, 10),
    "graph.json": Kind(write_max_load, use_instance, 30),
    "layers.json": Kind(write_layers, use_instance, 30),
    "results.csv": Kind(write_results, use_results, 42),
    "workloads.yaml": Kind(lambda path: path.write_bytes(FILE.read_bytes()), use_workloads, 5),
    **JOBS,
}
