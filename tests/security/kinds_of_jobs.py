"""More kinds of files and messages: of other frameworks, weights, runs, ranks, and workers."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path

import msgspec
import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed import HashStore
from transformers import TrainerState

from ipu_pipeline.backends.cluster.dryrun.report import check_messages, dry_run
from ipu_pipeline.backends.cluster.launch.spec import make_spec
from ipu_pipeline.backends.cluster.layouts.exchange import FORMATS, export_plan, read_plan
from ipu_pipeline.backends.cluster.layouts.given_layout import (
    GivenLayout,
    GivenModel,
    imported_plan,
)
from ipu_pipeline.backends.cluster.layouts.given_text import layout_text
from ipu_pipeline.backends.cluster.layouts.megatron_layout import blocks_of, parse_layout
from ipu_pipeline.backends.cluster.ranks.signature import SignedStore
from ipu_pipeline.backends.ipu.config import IPUConfig
from ipu_pipeline.backends.ipu.prices.predict import predict
from ipu_pipeline.backends.ipu.runtime.device import read_data
from ipu_pipeline.backends.ipu.runtime.messages import (
    VERSION,
    Channel,
    MessageError,
    SharedTensors,
    check_command,
)
from ipu_pipeline.checkpoint.slices import UNCUT
from ipu_pipeline.errors import LoweringError, PlanError
from ipu_pipeline.ir.files import of_file
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.ir.machines import machine_by_name
from ipu_pipeline.ir.plan import ModelIdentity, Plan
from ipu_pipeline.planner.report.compare import compare_text
from ipu_pipeline.planner.report.trace import write_trace
from ipu_pipeline.planner.schedules.simulate import simulate
from ipu_pipeline.stages.materialize import _Files
from ipu_pipeline.train.arguments import TrainingArguments
from ipu_pipeline.train.output_folder import Run, newest_checkpoint, run_of_trainer_checkpoint
from ipu_pipeline.train.progress import Progress
from tests.backends.cluster.prices.test_rank_plan import captured
from tests.ir.plan_example import example_plan
from tests.security.kind import Kind, finite, ipu_plan

# ---------------------------------------------------------------- plans on GPUs, other frameworks

LAYOUTS = {"megatron": "E|t*2|t*2|(t|)*2,L", "torchtitan": "E|t*2|t*2|(t|)*2,L",
           "automodel": "E|t*2|t*2|(t|)*2,L", "transformers": "Et*2|t*2|t*2L"}  # fmt: skip


@cache
def gpu_model() -> GivenModel:
    """Return a tiny captured decoder."""
    return GivenModel(captured(), ModelIdentity("LlamaForCausalLM", {}))


@cache
def gpu_plan(layout: str = "Et*2|t*2|t*2L", dp: int = 2) -> Plan:
    """Return a plan of it for GPUs."""
    parsed = parse_layout(layout)
    machine, sizes = machine_by_name("h100-x12"), {"pp": 3, "tp": 2, "dp": dp, "microbatches": 6}
    given = GivenLayout(lambda graph: blocks_of(parsed, graph), sizes, {"engine": "torch"})
    return given.plan(gpu_model(), machine)


def write_settings(name: str) -> Callable[[Path], None]:
    """Return what writes a pipeline as another framework does."""

    def write(path: Path) -> None:
        plan = gpu_plan(LAYOUTS[name], 1 if name == "transformers" else 2)
        path.write_text(export_plan(plan, name)[0], encoding="utf-8")

    return write


def use_settings(name: str) -> Callable[[Path], None]:
    """Return what imports it."""

    def use(path: Path) -> None:
        given, machine = read_plan(path, name), machine_by_name("h100-x12")
        with of_file(path):
            made = imported_plan(given.with_sizes({"microbatches": 6}), gpu_model(), machine)
        finite(made.objective_s)
        layout_text(made, None)

    return use


def use_gpu_plan(path: Path) -> None:
    """Read a plan on GPUs and do what the commands about plans do with it."""
    plan = Plan.load(path)
    with of_file(path):
        plan.explain()
        json.dumps(simulate(plan).to_json(), allow_nan=False)
        compare_text(plan, gpu_plan(), ("this", "that"))
        with contextlib.suppress(LoweringError):
            make_spec(plan, path, ("train.py",), here=False)
        for name in FORMATS:
            with contextlib.suppress(PlanError):
                export_plan(plan, name)


def dry_run_plan(path: Path) -> None:
    """Read a plan on GPUs and look at all messages of its step."""
    plan = Plan.load(path)
    with of_file(path), contextlib.suppress(LoweringError):
        dry_run(plan, 0).text()
        check_messages(plan)


def trace_plan(path: Path) -> None:
    """Read a plan and write the trace of its step."""
    plan = Plan.load(path)
    write_trace(plan, path.with_name("trace.json"), simulate(plan))


def write_pod(path: Path) -> None:
    """Write a pod as one device and a count."""
    raw = machine_by_name("pod4").to_json()
    raw["device"], raw["count"] = raw.pop("devices")[0], 4
    path.write_text(json.dumps(raw), encoding="utf-8")


def use_pod(path: Path) -> None:
    """Price a plan on a machine."""
    from dataclasses import replace

    from ipu_pipeline.planner.price import check_runs, priced

    machine = Machine.load(path)
    with of_file(path):
        plan = replace(ipu_plan(), machine=machine)
        check_runs(plan)
        finite(priced(plan).objective_s)


def use_ipu_config(path: Path) -> None:
    """Predict a configuration, as ``predict`` does."""
    config = IPUConfig.load(path)
    with of_file(path):
        found = predict(ipu_plan().graph, config, machine_by_name("pod4"))
        finite(found.time.total_s)


# ---------------------------------------------------------------- weights, data, runs


class Tiny(nn.Module):
    """Two layers with a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.BatchNorm1d(4)


def write_weights(path: Path) -> None:
    """Write the weights of a model, with an index if it is one."""
    state = {name: value.contiguous() for name, value in Tiny().state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
        return
    save_file(state, path.with_name("part.safetensors"))
    names = dict.fromkeys(state, "part.safetensors")
    path.write_text(json.dumps({"metadata": {"total_size": 4}, "weight_map": names}))


def use_weights(path: Path) -> None:
    """Read the weights of the folder."""
    model = Tiny()
    found = _Files(path.parent, UNCUT).tensors_of(model, dict(model.named_parameters()))
    assert found.keys() <= model.state_dict().keys()


def write_data(path: Path) -> None:
    """Write rows for a bundle."""
    torch.save({"ids": torch.ones(4, 3), "labels": torch.zeros(4)}, path)


def use_data(path: Path) -> None:
    """Read rows for a bundle."""
    assert {len(value) for value in read_data(str(path), 2).values()} != set()


def write_run(path: Path) -> None:
    """Write which run a folder is of."""
    path.write_text(json.dumps({"id": "0" * 32, "begun_from": None}), encoding="utf-8")


def use_run(path: Path) -> None:
    """Look where the last run of a folder goes on."""
    assert newest_checkpoint(path.parent, run_of_trainer_checkpoint) is None or Run.load(
        path.parent
    )


def write_trainer_state(path: Path) -> None:
    """Write what transformers' trainer writes last."""
    TrainerState(global_step=3, log_history=[{"loss": 1.5, "step": 3}]).save_to_json(str(path))


def use_trainer_state(path: Path) -> None:
    """Say whether a checkpoint of it is complete."""
    assert run_of_trainer_checkpoint(path.parent) in (None, "")


def progress(folder: Path) -> Progress:
    """Return the position of a training."""
    arguments = TrainingArguments(output_dir=str(folder), max_steps=20, report_to=[])
    return Progress(arguments, 10)


def write_progress(path: Path) -> None:
    """Write the position of a training."""
    path.write_text(json.dumps(progress(path.parent).to_json()), encoding="utf-8")


def use_progress(path: Path) -> None:
    """Restore it as a resume does, or be told with one of three errors and no change."""
    from ipu_pipeline.errors import CheckpointError
    from ipu_pipeline.ir.codec import read_json

    where = progress(path.parent)
    before = repr(asdict(where.state))
    saved = read_json(path, "the state", CheckpointError)
    try:
        where.restore(saved)
    except (KeyError, TypeError, ValueError) as error:
        assert repr(asdict(where.state)) == before
        raise PlanError(f"{path}: {error!r:.300}") from error
    json.dumps(where.to_json())


# ---------------------------------------------------------------- messages


def write_message(path: Path) -> None:
    """Write what a worker is asked."""
    place = {"tensor": "float32", "shape": [2, 2], "begin": 0}
    values = {
        "batch": {"dict": [["ids", place]]},
        "groups": {"list": [{"dict": [["params", {"list": ["a"]}], ["lr", 0.1]]}]},
    }
    path.write_text(json.dumps({"version": VERSION, "kind": "train", "values": values}))


def use_message(path: Path) -> None:
    """Receive it as a worker does."""
    left, right = socket.socketpair()
    memory = os.memfd_create("values")
    try:
        os.ftruncate(memory, 4096)
        body = path.read_bytes()
        left.sendall(struct.pack(">Q", len(body)) + body)
        kind, values = Channel(right, SharedTensors(memory), SharedTensors(memory)).receive()
        check_command(kind, values)
    except MessageError as error:
        raise PlanError(f"{path}: {error}") from error
    finally:
        left.close()
        right.close()
        os.close(memory)


class Sign(msgspec.Struct):
    """What a rank shows."""

    step: int
    what: str
    seconds: float


def use_store_entry(path: Path) -> None:
    """Read it from the job's store: what is not of its kind is not there."""
    store = HashStore()
    store.set("sign", path.read_bytes().decode("latin-1"))
    found = SignedStore(store, "job").get("sign", Sign)
    assert found is None or type(found) is Sign


def use_regions(path: Path) -> None:
    """Read cached regions: a damaged file is made again."""
    import pytest

    from tests.examples.conftest import FOLDER

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        easy_vqa_data = importlib.import_module("easy_vqa_data")
        patch.setattr(easy_vqa_data, "cache_folder", lambda: path.parent)
        patch.setattr(easy_vqa_data, "_fingerprint", lambda *_: "x")
        patch.setattr(easy_vqa_data, "_pixels", lambda _: np.zeros((8, 8, 3), np.uint8))
        features, boxes = easy_vqa_data._regions([Path("a")], 2)
        assert features.ndim == 3
        assert boxes.ndim == 2


def write_regions(path: Path) -> None:
    """Write cached regions."""
    use_regions(path)


JOBS: dict[str, Kind] = {
    **{
        f"{name}{suffix}": Kind(write_settings(name), use_settings(name), 10)
        for name, suffix in (
            ("megatron", ".flags"),
            ("torchtitan", ".json"),
            ("automodel", ".yaml"),
            ("transformers", ".json"),
        )
    },
    "gpu/plan.json": Kind(lambda path: gpu_plan().save(path), use_gpu_plan, 10),
    "dryrun/plan.json": Kind(lambda path: gpu_plan().save(path), dry_run_plan, 3),
    "trace/plan.json": Kind(lambda path: example_plan().save(path), trace_plan, 10),
    "pod.json": Kind(write_pod, use_pod, 20),
    "predict/ipu_config.json": Kind(
        lambda path: IPUConfig(layers_per_ipu=(3, 1), gradient_accumulation_steps=16).save(path),
        use_ipu_config,
        20,
    ),
    "model.safetensors": Kind(write_weights, use_weights, 20),
    "model.safetensors.index.json": Kind(write_weights, use_weights, 20),
    "rows.pt": Kind(write_data, use_data, 20),
    "run.json": Kind(write_run, use_run, 10),
    "trainer_state.json": Kind(write_trainer_state, use_trainer_state, 20),
    "progress.json": Kind(write_progress, use_progress, 20),
    "message.json": Kind(write_message, use_message, 20),
    "sign.json": Kind(
        lambda path: path.write_text('{"step": 1, "what": "x", "seconds": 0.5}'),
        use_store_entry,
        10,
    ),
    "regions-x.npz": Kind(write_regions, use_regions, 10),
}
