"""Train the model of this bundle on IPUs.

Needs torch, transformers and poptorch, and nothing else. Edit model_parallel.py to move blocks;
what the edit breaks is said before anything is compiled.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import torch  # noqa: E402
import transformers  # noqa: E402
from runtime.checks import BundleError, check_blocks, check_order  # noqa: E402
from runtime.device import (  # noqa: E402
    decayed_groups,
    make_optimizer,
    make_options,
    mean_loss,
    read_data,
    started_by_poprun,
    synthetic_data,
)
from runtime.files import read_files  # noqa: E402
from runtime.host_draws import seed_host  # noqa: E402
from runtime.placement import (  # noqa: E402
    ModuleNotFound,
    Placement,
    PlacementError,
    find_modules,
)
from runtime.static_graph import DeviceForward  # noqa: E402

USER_ERRORS = (BundleError, ModuleNotFound, PlacementError, OSError, ValueError)


def main() -> None:
    """Check, compile, train, save."""
    arguments = parse_arguments()
    check_output(arguments)
    plan, settings, blocks = read_files(HERE)
    planned = {block["name"] for block in plan["graph"]["blocks"]}
    check_blocks(
        blocks, [name for name in settings["annotated_blocks"] if name in planned], settings
    )
    planned_replicas = settings["replication_factor"]  # of all processes: they share the rows
    settings = local_settings(settings)
    model = load_model(arguments.model, plan["model"]["model_class"])
    calls = settings["device_iterations"] * settings["gradient_accumulation_steps"]
    call_size = settings["micro_batch_size"] * calls * planned_replicas
    if arguments.data:
        data = read_data(arguments.data, call_size)
    else:
        data = synthetic_data(
            plan["graph"]["inputs"], call_size * arguments.steps, settings["seed"] or 0
        )
    modules = find_modules(model, [b["module"] for b in blocks], plan["model"]["parameters"])
    sample = {name: value[: settings["micro_batch_size"]] for name, value in data.items()}
    running = check_order(model, blocks, modules, sample)
    print(f"checked: {len(running)} blocks, {settings['num_stages']} stages")
    if not arguments.check_only:
        train(model, running, plan, settings, data, arguments)


def local_settings(settings: Any) -> Any:
    """Return the settings of this process; poprun gives each one its part of the replicas."""
    popdist = started_by_poprun()
    if popdist is None:
        return {**settings, "instance": 0}
    total, planned = popdist.getNumTotalReplicas(), settings["replication_factor"]
    if total != planned:
        raise BundleError(
            f"poprun was given --num-replicas {total}, the plan has {planned}; make them equal"
        )
    popdist.init()
    local, index = popdist.getNumLocalReplicas(), popdist.getInstanceIndex()
    return {**settings, "replication_factor": local, "instance": index}


def train(
    model: Any, blocks: Any, plan: Any, settings: Any, data: Any, arguments: argparse.Namespace
) -> None:
    """Compile, run the steps, and save the weights under their own names."""
    poptorch = importlib.import_module("poptorch")
    if settings["half"]:
        model = model.half()
        data = {name: v.half() if v.is_floating_point() else v for name, v in data.items()}
    placement = Placement(model, blocks, plan["model"]["parameters"], poptorch)
    options = make_options(settings, poptorch)
    options.setExecutionStrategy(placement.strategy(pipelined=not settings["num_io_tiles"]))
    groups = decayed_groups(model, settings["weight_decay"])
    optimizer = make_optimizer(settings, groups, poptorch)
    loader = poptorch.DataLoader(
        options, Rows(data), batch_size=settings["micro_batch_size"], shuffle=arguments.shuffle
    )
    forward = DeviceForward(model, poptorch, settings)
    executor = poptorch.trainingModel(model.train(), options, optimizer)
    losses = []
    samples = 0
    seed_host(settings["seed"], settings["instance"])
    started = time.perf_counter()
    for step, batch in enumerate(loader):
        if step == arguments.steps:
            break
        size = settings["micro_batch_size"]
        given = forward.inputs(batch, size, training=True, build=step == 0)
        try:
            loss = mean_loss(executor(**given), settings)
        except poptorch.Error as error:
            raise BundleError(f"poptorch cannot compile or run the model: {error}") from error
        losses.append(loss)
        samples += loader.combinedBatchSize or 0
        rate = samples / (time.perf_counter() - started)
        print(f"step {step + 1}: loss {loss:.6f}, {rate:.1f} samples/s, compilation included")
    executor.copyWeightsToHostIfNeeded()
    executor.destroy()
    forward.restore()
    placement.undo()
    if arguments.output and settings["instance"] == 0:
        model.float().save_pretrained(arguments.output)
        (Path(arguments.output) / "losses.json").write_text(json.dumps(losses))
        print(f"saved: {arguments.output}")


class Rows(torch.utils.data.Dataset):  # torch 1.13 does not take a type here
    """Rows of the named tensors."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(next(iter(self.data.values())))

    def __getitem__(self, index: int) -> Any:
        return {name: value[index] for name, value in self.data.items()}


def load_model(source: str, model_class: str) -> Any:
    """Return the model in training mode: from a folder or hub name, or fresh from a config."""
    cls = getattr(transformers, model_class, None)
    if cls is None:
        raise BundleError(
            f"transformers {transformers.__version__} has no {model_class}; install a version that "
            "has it"
        )
    path = Path(source)
    config = path if path.is_file() else path / "config.json"
    has_weights = (path.is_dir() and any(path.glob("*.safetensors"))) or any(path.glob("*.bin"))
    if config.is_file() and not has_weights:
        torch.manual_seed(0)
        return _made(lambda: cls(cls.config_class.from_json_file(str(config))), str(config))
    return _made(lambda: cls.from_pretrained(source), source)


def _made(make: Callable[[], Any], source: str) -> Any:
    try:
        return make().train()
    except Exception as error:  # of transformers, about files that may hold anything
        said = " ".join(str(error).split())[:300]
        raise BundleError(f"no model can be made of {source}: {said}") from error


def check_output(arguments: argparse.Namespace) -> None:
    """Make the folder for the weights, before any work; one that holds files needs --force."""
    if arguments.output:
        folder = Path(arguments.output)
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()) and not arguments.force:
            raise BundleError(f"{folder} is not empty; choose another folder, or give --force")
        with tempfile.TemporaryFile(dir=folder):
            pass


def parse_arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(HERE), help="folder, hub name or config.json")
    parser.add_argument("--data", help="torch.save'd dict of tensors: model inputs, rows first")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps (default 10)")
    parser.add_argument("--output", help="folder for the trained weights")
    parser.add_argument("--force", action="store_true", help="replace files in that folder")
    parser.add_argument("--shuffle", action="store_true", help="shuffle the rows")
    parser.add_argument("--check-only", action="store_true", help="check, do not compile")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except USER_ERRORS as error:
        sys.exit(f"error: {error}")
