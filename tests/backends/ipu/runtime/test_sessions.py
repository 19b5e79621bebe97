"""The programs on a model: what they leave behind, also after something went wrong."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from ipu_pipeline.backends.ipu.annotations import annotate
from ipu_pipeline.backends.ipu.optimizers import named_groups
from ipu_pipeline.backends.ipu.runtime.placement import Placement
from ipu_pipeline.backends.ipu.runtime.sessions import CompileError, Sessions
from ipu_pipeline.backends.ipu.runtime.static_errors import StaticGraphError
from ipu_pipeline.backends.ipu.settings import settings_for
from tests.backends.ipu.emulated import Case, case, sgd


class _Snapshot:
    """Everything of a model that compiling must not change."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.seen = self._look()

    def _look(self) -> dict[str, Any]:
        model = self.model
        return {
            "classes": [type(module) for module in model.modules()],
            "forward": [module.__dict__.get("forward") for module in model.modules()],
            "hooks": [
                (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
                for m in model.modules()
            ],
            "attributes": [sorted(module.__dict__) for module in model.modules()],
            "parameters": [(n, id(p), type(p)) for n, p in model.named_parameters()],
            "buffers": [(n, id(b), type(b)) for n, b in model.named_buffers()],
            "keys": list(model.state_dict()),
            "caches": getattr(model.config, "use_cache", None),
        }

    def assert_kept(self) -> None:
        """Compare with the model as it is now."""
        for what, value in self._look().items():
            assert value == self.seen[what], what


def _sessions(made: Case, poptorch: Any) -> Sessions:
    annotations = [a.to_json() for a in annotate(made.plan)]
    flat = settings_for(made.plan, made.config).to_json()
    return Sessions(made.model, annotations, made.plan.model.parameters, flat, poptorch)


def _groups(made: Case) -> list[dict[str, Any]]:
    return named_groups(sgd(made.model), made.model)


@pytest.mark.parametrize("name", ["bert-qa", "bert-mlm", "t5"])
def test_the_model_is_as_it_was(name: str, poptorch: Any) -> None:
    made = case(name, gradient_accumulation_steps=16)
    kept = _Snapshot(made.model)
    sessions = _sessions(made, poptorch)
    sessions.train(made.batch(), _groups(made))
    sessions.evaluate(made.batch(copies=1))
    sessions.close()
    kept.assert_kept()
    _sessions(made, poptorch).close()
    kept.assert_kept()


def test_own_hooks_go_before_the_blocks(poptorch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real removeBlocks puts other dicts in the place of those that handles point at."""
    plain = poptorch.removeBlocks

    def replacing(model: nn.Module) -> None:
        plain(model)
        for module in model.modules():
            module._forward_pre_hooks = OrderedDict(module._forward_pre_hooks)

    monkeypatch.setattr(poptorch, "removeBlocks", replacing)
    made = case("t5", gradient_accumulation_steps=16)
    kept = _Snapshot(made.model)
    _sessions(made, poptorch).close()
    kept.assert_kept()
    made.model(**made.example)
    sessions = _sessions(made, poptorch)
    assert sessions.train(made.batch(), _groups(made)) > 0
    sessions.close()


def test_the_strategy_can_be_pickled(poptorch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages listed by hand cannot: the real front end keeps a class local to a function."""
    monkeypatch.delattr(poptorch, "Stage")
    sessions = _sessions(case(), poptorch)
    assert isinstance(
        pickle.loads(pickle.dumps(sessions.placement.strategy())), poptorch.PipelinedExecution
    )
    sessions.close()


def test_a_forward_of_the_users_own_comes_back(poptorch: Any) -> None:
    made = case()
    own = made.model.forward
    made.model.forward = own  # as libraries that wrap models do
    sessions = _sessions(made, poptorch)
    sessions.train(made.batch(), _groups(made))
    assert made.model.forward is not own
    sessions.close()
    assert made.model.__dict__["forward"] is own


@pytest.mark.parametrize("fault", ["read", "empty", "division"])
def test_a_failed_compilation_leaves_the_model_clean(
    fault: str, poptorch: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    made = case()
    kept = _Snapshot(made.model)
    layer = type(made.model.bert.encoder.layer[1])

    def fails(_self: nn.Module, hidden: torch.Tensor, *_args: Any, **_kwargs: Any) -> Any:
        if fault == "empty":  # seen by the front end only
            return hidden.narrow(1, 0, 0) if poptorch.isRunningOnIpu() else hidden
        return hidden.sum().item() if fault == "read" else 1 / 0

    sessions = _sessions(made, poptorch)
    expected: Any = {
        "read": (StaticGraphError, "reads the value of a tensor in Python"),
        "empty": (CompileError, "cannot compile the model: .*zero-sized"),
        "division": (ZeroDivisionError, "division"),
    }[fault]
    with monkeypatch.context() as patched:
        patched.setattr(layer, "forward", fails)
        for call in (
            lambda: sessions.train(made.batch(), _groups(made)),
            lambda: sessions.evaluate(made.batch(copies=1)),
            lambda: sessions.save_executable(
                str(tmp_path / "e"), made.batch(), _groups(made), None
            ),
        ):
            with pytest.raises(expected[0], match=expected[1]):
                call()
    # The same sessions can be used once the reason is gone.
    assert sessions.train(made.batch(), _groups(made)) > 0
    sessions.close()
    kept.assert_kept()


def test_a_failed_evaluation_keeps_the_optimizers_state(
    poptorch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = []
    for fails in (False, True):
        made = case()
        layer = type(made.model.bert.encoder.layer[1])
        sessions = _sessions(made, poptorch)
        sessions.train(made.batch(0), _groups(made))  # under AdamW
        if fails:
            with monkeypatch.context() as patched:
                patched.setattr(layer, "forward", lambda *_, **__: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    sessions.evaluate(made.batch(copies=1))
        losses.append([sessions.train(made.batch(seed), None) for seed in (1, 2)])
        sessions.close()
    assert losses[0] == losses[1]


def test_the_optimizers_groups_keep_their_parameters(poptorch: Any) -> None:
    made = case()
    sessions = _sessions(made, poptorch)
    groups = _groups(made)
    sessions.train(made.batch(), groups)
    fewer = [{**groups[0], "params": groups[0]["params"][1:]}]
    with pytest.raises(CompileError, match=r"groups have other parameters than when the program"):
        sessions.train(made.batch(), fewer)
    sessions.close()


def test_an_exception_while_annotating_leaves_the_model_clean(
    monkeypatch: pytest.MonkeyPatch, poptorch: Any
) -> None:
    made = case()
    kept = _Snapshot(made.model)
    begin, begun = poptorch.BeginBlock, []

    def fail_at_the_third(module: nn.Module, **options: Any) -> nn.Module:
        begun.append(module)
        if len(begun) == 3:
            raise RuntimeError("planted")
        return begin(module, **options)

    monkeypatch.setattr(poptorch, "BeginBlock", fail_at_the_third)
    with pytest.raises(RuntimeError, match="planted"):
        _sessions(made, poptorch)
    kept.assert_kept()


def test_the_placement_is_undone_when_a_module_is_missing(poptorch: Any) -> None:
    made = case()
    kept = _Snapshot(made.model)
    entry = {"block": "x", "module": "nowhere", "stage": 0, "ipu": 0, "again": False}
    with pytest.raises(LookupError, match=r"no module 'nowhere'"):
        Placement(made.model, [{**entry, "checkpoint": False, "serialize": 1}], {}, poptorch)
    kept.assert_kept()
