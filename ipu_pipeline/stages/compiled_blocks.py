"""Blocks through ``torch.compile``, one by one, so that stages and schedules stay what they are.

What is compiled computes what it computed; its kernels are fused, so that sums are rounded in
another order. A block that draws random numbers is refused: inside a compiled block they would come
from torch's global generator, and depend on the split.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from ipu_pipeline.capture.calls import set_modes
from ipu_pipeline.capture.programs import Program
from ipu_pipeline.errors import LoweringError, first_line
from ipu_pipeline.ops.random import is_random

# The compiler of torch.compile unless something else is asked for.
_BACKEND = "inductor"
# Where a program's module keeps what was compiled of it: both end together.
_FORMS = "ipu_pipeline_compiled"


def run_compiled(program: Program, inputs: Sequence[Any], *, recompute: bool) -> Any:
    """Return the outputs of ``program``, compiled when it first runs.

    Args:
        program: A block.
        inputs: What it takes.
        recompute: Keep no activations, and compute them again in the backward pass.

    Raises:
        LoweringError: ``torch.compile`` cannot do it, or the block draws random numbers or
            changes a buffer.
    """
    from torch._dynamo.exc import TorchDynamoException  # slow to import

    forms: dict[bool, Callable[..., Any]] = vars(program.module).setdefault(_FORMS, {})
    if recompute not in forms:
        code = partial(_recomputed, program.module) if recompute else program.module
        forms[recompute] = torch.compile(code, fullgraph=True, backend=_checked)
    set_modes(program.modes)
    before = [(name, buffer, buffer._version) for name, buffer in program.module.named_buffers()]
    try:
        with warnings.catch_warnings():  # dynamo looks at .grad of what other blocks computed
            warnings.filterwarnings("ignore", r".*\.grad attribute of a Tensor that is not a leaf")
            outputs = forms[recompute](*inputs)
    except TorchDynamoException as error:
        cause = getattr(error, "inner_exception", None) or error
        reason = cause if isinstance(cause, LoweringError) else first_line(cause)
        raise LoweringError(
            f"compile_blocks: block {program.name!r} cannot be compiled: {reason}; leave "
            "compile_blocks out"
        ) from error
    changed = [name for name, buffer, version in before if buffer._version != version]
    if changed:
        raise LoweringError(
            f"compile_blocks: block {program.name!r} changes {changed[0]} when it runs, which is "
            "followed in blocks that are not compiled only; leave compile_blocks out"
        )
    return outputs


def _recomputed(module: nn.Module, *inputs: Any) -> Any:
    return checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=False)


def _checked(module: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """Compile a graph that draws no random numbers."""
    for part in module.modules():
        for node in part.graph.nodes if isinstance(part, fx.GraphModule) else ():
            target = getattr(Tensor, node.target, None) if node.op == "call_method" else node.target
            if node.op.startswith("call") and is_random(target, node.args, node.kwargs):
                raise LoweringError(
                    f"it draws random numbers ({getattr(target, '__name__', target)}), which would "
                    "no longer be keyed by microbatch and block; set the model's dropout to 0"
                )
    compiled: Callable[..., Any] = torch._dynamo.lookup_backend(_BACKEND)(module, inputs)
    return compiled
