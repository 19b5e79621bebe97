"""Write a plan as a folder that runs where poptorch is and this package is not.

::

    bundle/
    |-- model_parallel.py   the placement, one line per block; made to be read and edited
    |-- run.py              checks the placement, compiles, trains
    |-- settings.json       everything else that the device is told
    |-- ipu_config.json     the same as optimum-graphcore reads it
    |-- plan.json           what it was made from
    |-- config.json         the model's configuration, where the command was given one
    |-- requirements.txt
    `-- runtime/            what run.py and the worker use; the same files as in this package

The same plan gives the same bytes. Nothing but the standard library, torch, transformers and
poptorch is imported there; Python 3.8 is enough.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

from ipu_pipeline.backends.ipu.annotations import Annotation, annotate
from ipu_pipeline.backends.ipu.check import check
from ipu_pipeline.backends.ipu.settings import PopTorchSettings
from ipu_pipeline.ir.files import make_folder, write_text
from ipu_pipeline.ir.plan import Plan

RUNTIME = (
    "__init__.py",
    "checks.py",
    "device.py",
    "files.py",
    "host_draws.py",
    "host_values.py",
    "indexing.py",
    "messages.py",
    "own_gradients.py",
    "placement.py",
    "program_mode.py",
    "rewrites.py",
    "sdk_model.py",
    "serve.py",
    "sessions.py",
    "static_errors.py",
    "static_graph.py",
    "tables.py",
)
# SDK 3.4, the last one, supports these; poptorch itself comes with the SDK.
REQUIREMENTS = "torch==2.0.1\ntransformers>=4.18,<4.50\n# poptorch: from Graphcore's Poplar SDK\n"


def emit(
    plan: Plan, settings: PopTorchSettings, folder: str | Path, *, model_config: str | None = None
) -> Path:
    """Write the bundle of ``plan``.

    Args:
        plan: A plan for IPUs.
        settings: Of the plan.
        folder: Made if it does not exist; files of the bundle in it are replaced.
        model_config: JSON text of the model's configuration, for runs with fresh weights.

    Raises:
        LoweringError: poptorch cannot run the plan.
        OutputError: ``folder`` is none, or may not be written.
    """
    check(plan, settings, several_processes=True)
    folder = make_folder("the bundle's folder", folder)
    make_folder("the bundle's folder", folder / "runtime")
    annotations = annotate(plan, settings.inference_places())
    written = settings.to_json()
    written["annotated_blocks"] = [a.block for a in annotations if a.begins]
    plan.save(folder / "plan.json")
    written["plan_sha256"] = sha256((folder / "plan.json").read_bytes()).hexdigest()
    settings.config.save(folder / "ipu_config.json")
    write_text(folder / "settings.json", json.dumps(written, indent=2) + "\n")
    write_text(folder / "model_parallel.py", model_parallel_text(plan, annotations))
    write_text(folder / "requirements.txt", REQUIREMENTS)
    if model_config is not None:
        write_text(folder / "config.json", model_config)
    source = files("ipu_pipeline.backends.ipu.runtime")
    for name in RUNTIME:
        write_text(folder / "runtime" / name, source.joinpath(name).read_text(encoding="utf-8"))
    write_text(folder / "run.py", source.joinpath("run.py").read_text(encoding="utf-8"))
    shutil.rmtree(folder / "runtime" / "__pycache__", ignore_errors=True)
    return folder


def model_parallel_text(plan: Plan, annotations: Sequence[Annotation]) -> str:
    """Return ``model_parallel.py``: one line per block, predictions as comments."""
    num_ipus = max(stage.device for stage in plan.stages) + 1
    begun = [annotation for annotation in annotations if annotation.begins]
    calls = [_call(annotation) for annotation in begun]
    width = max(len(call) for call in calls)
    lines = []
    stage = -1
    for annotation, call in zip(begun, calls, strict=True):
        if annotation.stage != stage:
            stage = annotation.stage
            lines.append(f"    # stage {stage}: {_stage_note(plan, stage)}")
        lines.append(f"    {call:<{width}}  # {_block_note(annotation)}")
    heading = (
        f'"""Where each block of {plan.model.model_class} runs, on {num_ipus} IPUs.\n\n'
        "One line per block, in the order of execution. To move a block, change stage and IPU;\n"
        "run.py says what an edit breaks. Numbers in comments are predictions, milliseconds for\n"
        f"one microbatch of {plan.micro_batch_size}.\n"
        '"""\n'
    )
    helper = (
        "\n\ndef block(\n"
        "    module, stage, ipu, serialize=1, checkpoint=False, inference=None, name=None, "
        "rows=None\n):\n"
        '    """Describe one block: the module whose call begins it, and where it runs.\n\n'
        "    In evaluation it runs there, too, or where inference=(stage, ipu, serialize) says.\n"
        "    With rows=(first, end) it has these rows of the module's table only.\n"
        '    """\n'
        "    return {\n"
        '        "block": name or module,\n'
        '        "module": module,\n'
        '        "stage": stage,\n'
        '        "ipu": ipu,\n'
        '        "serialize": serialize,\n'
        '        "rows": rows,\n'
        '        "checkpoint": checkpoint,\n'
        '        "inference": inference,\n'
        '        "again": False,\n'
        "    }\n\n\n"
    )
    return heading + helper + "BLOCKS = [\n" + "\n".join(lines) + "\n]\n"


def _call(annotation: Annotation) -> str:
    # As JSON a name is a literal of Python, too, whatever it holds.
    module = json.dumps(annotation.module)
    parts = [module, f"stage={annotation.stage}", f"ipu={annotation.ipu}"]
    if annotation.serialize > 1:
        parts.append(f"serialize={annotation.serialize}")
    if annotation.rows:
        parts.append(f"rows={annotation.rows}")
    if annotation.checkpoint:
        parts.append("checkpoint=True")
    if annotation.inference:
        parts.append(f"inference={annotation.inference}")
    if annotation.block != annotation.module:
        parts.append(f"name={json.dumps(annotation.block)}")
    return f"block({', '.join(parts)}),"


def _block_note(annotation: Annotation) -> str:
    return (
        f"{annotation.forward_ms:.3f} ms forward, {annotation.backward_ms:.3f} ms backward, "
        f"{annotation.weight_mb:.1f} MB"
    )


def _stage_note(plan: Plan, index: int) -> str:
    stage = plan.stages[index]
    return (
        f"IPU {stage.device}, {stage.forward_s * 1e3:.3f} ms forward, "
        f"{stage.backward_s * 1e3:.3f} ms backward, {stage.memory_bytes / 1e6:.0f} MB"
    )
