"""transformers' own ``pipeline`` over an executable: its model's calls run on the stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import nn
from transformers import Pipeline
from transformers import pipeline as transformers_pipeline
from transformers.pipelines import check_task

from ipu_pipeline.compiler import compile as compile_plan
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.stages.executable import Executable

# Their pipelines call other methods of the model than forward and generate, or other models.
_OTHER_CALLS = ("any-to-any", "decision", "mask-generation", "text-to-audio")


class PipelinedModel:
    """What transformers' pipelines see in the place of a model.

    It is called and generates through an executable; all else is the model's own.
    """

    executable: Executable

    def __init__(self, executable: Executable) -> None:
        vars(self)["executable"] = executable

    @property  # type: ignore[misc]
    def __class__(self) -> type[Any]:
        """The model's, of which pipelines ask name and kind."""
        return type(self.executable.model)

    def __getattr__(self, name: str) -> Any:
        """Return what the model has."""
        return getattr(self.executable.model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set what the model has."""
        setattr(self.executable.model, name, value)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save the model as it does, with the weights of all stages; every process calls this."""
        state = self.executable.state_dict()
        if getattr(self.executable, "groups", None) is None or dist.get_rank() == 0:
            model: Any = self.executable.model
            model.save_pretrained(*args, **{"state_dict": state, **kwargs})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's forward pass."""
        return self.executable.forward(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate."""
        return self.executable.generate(*args, **kwargs)

    def to(self, device: Any) -> None:
        """Refuse to move what the executable has placed.

        Raises:
            LoweringError: Always.
        """
        raise LoweringError(
            f"the pipeline's device is {device} and the executable's {self.device}; leave device "
            "out of pipeline(...), and give it to compile_options={'device': ...}"
        )


def pipeline(
    task: str,
    model: nn.Module | Executable,
    plan: Plan | None = None,
    *,
    target: str | None = None,
    compile_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Pipeline:
    """Return transformers' own pipeline for a task, whose model runs on the stages of a plan.

    Args:
        task: One of transformers', such as ``text-classification`` or ``text-generation``.
        model: The model, or what it was compiled to, which goes on to train in between.
        plan: Of the model; ``None`` for an executable.
        target: Where the plan runs, ``None`` for ``local``; see :func:`ipu_pipeline.compile`. In
            processes each of them makes the pipeline and calls it with the same inputs.
        compile_options: Further options of :func:`ipu_pipeline.compile`.
        **options: Those of ``transformers.pipeline``: tokenizer, batch_size, ...

    Raises:
        LoweringError: The target or the task cannot run so.
        ValueError: There is a plan and an executable, or neither; an executable is given, and how
            to make one.
    """
    if isinstance(model, Executable) == (plan is not None):
        raise ValueError(
            "pipeline takes a model and its plan, or an executable alone; give "
            "pipeline(task, model, plan) or pipeline(task, executable)"
        )
    if isinstance(model, Executable) and (target is not None or compile_options):
        raise ValueError(
            "target and compile_options say how a model is compiled, and an executable is given, "
            "which is; leave them out, or give pipeline(task, model, plan)"
        )
    name = check_task(task)[0]
    if name in _OTHER_CALLS:
        raise LoweringError(
            f"the pipeline of task {name!r} calls the model otherwise than by forward and "
            "generate, which is what stages run; use transformers.pipeline with the model, or "
            "executable.forward and executable.generate"
        )
    if isinstance(model, Executable):
        executable = model
    else:
        assert plan is not None
        executable = compile_plan(
            model, plan, target=target or "local", training=False, **(compile_options or {})
        )
    facade: Any = PipelinedModel(executable)
    placed = getattr(facade, "hf_device_map", None)  # then they know the device, and refuse ours
    device = {} if placed else {"device": facade.device}
    make: Any = transformers_pipeline
    found: Pipeline = make(task, model=facade, **{**device, **options})
    return found
