"""One model class that generates: tokens of 2 and 4 stages on ranks, compared with eager.

The ranks are threads (:mod:`tools.coverage.rank_threads`), each with a copy of the model in which
the weights of other stages are NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.utils import ModelOutput, logging

from ipu_pipeline.capture import CapturedModel, capture
from ipu_pipeline.capture.patches import preserved_state
from ipu_pipeline.ops.linear import torchs_products
from tools.coverage.check import STAGES, Say, planned, recorded
from tools.coverage.classes import ModelClass
from tools.coverage.eager import Batch, EagerError, model_and_batches, own_values
from tools.coverage.rank_threads import on_threads
from tools.coverage.record import Record, Result, one_line

TOKENS = 4
NUM_BEAMS = 3
CLOSE = 1e-4  # of scores, where logits are near 1
_WAYS: Mapping[str, Mapping[str, Any]] = {
    "greedy": {"num_beams": 1},
    f"{NUM_BEAMS} beams": {"num_beams": NUM_BEAMS},
}
Tokens = Mapping[str, Tensor]


def check_generated(item: ModelClass, say: Say = lambda _: None) -> Record:
    """Generate with one class on the ranks of 2 and 4 stages; nothing is raised."""
    logging.set_verbosity_error()
    with torchs_products():
        return recorded(_check, item, say)


def generates(item: ModelClass) -> bool:
    """Whether a class has transformers' ``generate``."""
    kind = item.load()
    return hasattr(kind, "generate") and bool(kind.can_generate())


def _check(item: ModelClass, say: Say, facts: dict[str, Any]) -> tuple[Result, str]:
    """Fill in ``facts`` on the way; return the result and its reason."""
    facts["stages"] = ()
    say("eager-fails")
    try:
        model, (part, *_) = model_and_batches(item)
        inputs, expected = _eager(model, part)
    except EagerError as error:
        return "eager-fails", str(error)
    facts["inputs"] = tuple(inputs)
    first = dict(list(expected.items())[:1])
    if _difference(_generated(model, inputs, first), first)[0] != 0.0:
        return "nondeterministic", "two eager generations differ"
    say("crash")
    try:
        captured = capture(model, own_values(part), self_check=False)
    except Exception as error:
        return "capture-refused", one_line(error)
    facts["blocks"] = len(captured.graph.blocks)
    facts["difference"] = 0.0
    for depth in sorted({min(depth, facts["blocks"]) for depth in STAGES}):
        problem = _compare(captured, depth, inputs, expected, facts)
        if problem is not None:
            return problem
        facts["stages"] = (*facts["stages"], depth)
    return "pass", "" if len(expected) == len(_WAYS) else f"{', '.join(expected)} only, as eager"


def _compare(
    captured: CapturedModel,
    depth: int,
    inputs: Batch,
    expected: Mapping[str, Tokens],
    facts: dict[str, Any],
) -> tuple[Result, str] | None:
    """Return what is wrong with ranks for ``depth`` stages; ``None``: nothing."""
    try:
        plan = planned(captured, depth)
    except Exception as error:
        return "plan-refused", one_line(error)
    try:
        found = on_threads(
            captured.model, plan, lambda own: _generated(own, inputs, expected), min(depth, 4)
        )
    except Exception as error:
        return "step-fails", f"{depth} stages: {one_line(error.__cause__ or error)}"
    worst, where = max(_difference(one, expected) for one in found)
    facts["difference"] = max(facts["difference"], worst)
    return None if worst <= CLOSE else ("differs", f"{where} with {depth} stages ({worst:.2g})")


def _eager(model: nn.Module, part: Batch) -> tuple[Batch, dict[str, Tokens]]:
    """Return inputs and what the model generates of them.

    Raises:
        EagerError: It generates from none of the candidates.
    """
    failure: Exception | None = None
    for inputs in _inputs(model, part):
        found: dict[str, Tokens] = {}
        for way in _WAYS:
            try:
                found |= _generated(model, inputs, (way,))
            except Exception as error:
                failure = failure or error
        if found:
            return inputs, found
    reason = "no inputs" if failure is None else one_line(failure)
    raise EagerError(f"generate of the model alone fails: {reason}") from failure


def _inputs(model: nn.Module, part: Batch) -> Iterator[Batch]:
    """Yield what may be given to ``generate``, the most telling first."""
    given = {n: v for n, v in part.items() if "label" not in n and not n.startswith("decoder_")}
    yield given
    yield {n: v for n, v in given.items() if n in ("input_ids", "attention_mask")}
    main = getattr(model, "main_input_name", "")
    yield {n: v for n, v in given.items() if n == main}


def _generated(model: nn.Module, inputs: Batch, ways: Sequence[str] | Mapping[str, Any]) -> Any:
    """Return tensors of what a model generates, by way."""
    found = {}
    kind: Any = model
    pad = getattr(kind.generation_config, "pad_token_id", None)
    with preserved_state(model), torch.no_grad():
        model.eval()
        for way in ways:
            result = kind.generate(
                **own_values(inputs), **_WAYS[way], do_sample=False, max_new_tokens=TOKENS,
                min_new_tokens=TOKENS - 1, return_dict_in_generate=True, output_scores=True,
                **({} if pad is not None else {"pad_token_id": 0}),
            )  # fmt: skip
            found[way] = _tensors(result)
    return found


def _tensors(value: Any, name: str = "result") -> dict[str, Tensor]:
    """Return the tensors in a result by where they are; caches are the ranks' own."""
    if isinstance(value, Tensor):
        return {name: value}
    found: dict[str, Tensor] = {}
    if isinstance(value, ModelOutput | dict):
        for key, item in value.items():
            if not isinstance(item, Cache):
                found |= _tensors(item, key)
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            found |= _tensors(item, f"{name}[{index}]")
    return found


def _difference(found: Any, expected: Any) -> tuple[float, str]:
    """Return the largest difference of two results; infinite where tokens differ."""
    worst = (0.0, "")
    for way, tensors in expected.items():
        for name, one in tensors.items():
            other = found[way].get(name)
            if other is None or one.shape != other.shape:
                return float("inf"), f"{way}: {name} has another shape"
            if not one.is_floating_point():
                distance = 0.0 if torch.equal(one, other) else float("inf")
            else:
                # Scores of tokens that are ruled out are infinite on both sides.
                delta = (one.double() - other.double()).abs()
                delta = torch.where(one == other, 0.0, delta)
                distance = float(delta.max()) if delta.numel() else 0.0
                distance = distance if distance == distance else float("inf")
            worst = max(worst, (distance, f"{way}: {name} differs"))
    return worst
