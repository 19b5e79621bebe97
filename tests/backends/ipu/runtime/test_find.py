"""Modules by path, and by structure where another transformers version names them otherwise."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from ipu_pipeline.backends.ipu.annotations import annotate
from ipu_pipeline.backends.ipu.runtime.placement import (
    ModuleNotFound,
    Placement,
    PlacementError,
    find_modules,
)
from ipu_pipeline.capture import model_identity
from tests.backends.ipu.emulated import case


class _OldViT(nn.Module):
    """The tiny ViT under the names of another transformers version.

    ``vit.layers.0`` of the plan is ``vit.encoder.layer.0`` here, as in transformers 4.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        vit = model.vit
        encoder = nn.Module()
        encoder.layer = nn.ModuleList(_layers_of(vit))
        self.vit = nn.Module()
        self.vit.embeddings = vit.embeddings
        self.vit.encoder = encoder
        self.vit.layernorm = vit.layernorm
        self.classifier = model.classifier

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = self.vit.embeddings(pixel_values)
        for layer in self.vit.encoder.layer:
            found = layer(hidden)
            hidden = found[0] if isinstance(found, tuple) else found
        logits = self.classifier(self.vit.layernorm(hidden)[:, 0])
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def _layers_of(vit: nn.Module) -> list[nn.Module]:
    lists = [m for m in vit.modules() if isinstance(m, nn.ModuleList)]
    return list(max(lists, key=len))


def test_layers_under_other_names_land_on_the_planned_ipus(poptorch) -> None:
    made = case("vit", layers=(1, 3))
    old = _OldViT(made.model)
    annotations = [a.to_json() for a in annotate(made.plan)]
    assert not set(dict(old.named_modules())) >= {a["module"] for a in annotations}
    placement = Placement(old, annotations, made.plan.model.parameters, poptorch)
    layers = list(old.vit.encoder.layer)
    found = [placement.modules[a["module"]] for a in annotations if a["kind"] == "layer"]
    assert [id(module) for module in found] == [id(layer) for layer in layers]
    options = poptorch.Options()
    options.Training.gradientAccumulation(4)
    options.setExecutionStrategy(placement.strategy())

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = old

        def forward(self, pixel_values: Tensor, labels: Tensor) -> Tensor:
            return self.inner(pixel_values, labels)["loss"]

    executor = poptorch.trainingModel(Loss().train(), options)
    executor(**made.batch())
    ipus = [(block.id, block.ipu) for block in executor.program.blocks if block.id]
    assert ipus == [(f"stage{a['stage']}", a["ipu"]) for a in annotations if a["module"]]
    executor.destroy()
    placement.undo()


class _Shared(nn.Module):
    """T5's embedding in transformers 4: encoder and decoder hold one module object."""

    def __init__(self) -> None:
        super().__init__()
        table = nn.Embedding(8, 4)
        self.shared = table
        self.encoder, self.decoder = nn.Module(), nn.Module()
        self.encoder.embed_tokens = table
        self.decoder.embed_tokens = table
        self.encoder.block = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.encoder.block[0](self.encoder.embed_tokens(ids))
        return hidden + self.decoder.embed_tokens(ids)


def _entry(module: str, stage: int, ipu: int) -> dict[str, object]:
    return {
        "block": module, "module": module, "stage": stage, "ipu": ipu,
        "again": False, "checkpoint": False, "serialize": 1,
    }  # fmt: skip


def test_one_object_under_two_names_begins_once(poptorch) -> None:
    model = _Shared()
    planned = model_identity(model).parameters
    # named_modules gives an object one name only, so the others are no path there
    paths = ("encoder.embed_tokens", "encoder.block.0", "decoder.embed_tokens")
    entries = [_entry(path, 0, 0) for path in paths]
    placement = Placement(model, entries, planned, poptorch)
    assert placement.modules["encoder.embed_tokens"] is model.shared
    assert placement.modules["decoder.embed_tokens"] is model.shared
    assert [a["block"] for a in placement.begun] == ["encoder.embed_tokens", "encoder.block.0"]
    placement.undo()
    # where a later call is in another stage, every call takes its turn
    calls = [
        _entry("shared", 0, 0),
        {**_entry("shared", 0, 0), "block": "shared#2"},
        _entry("encoder.block.0", 1, 1),
        {**_entry("shared", 2, 0), "block": "shared#3"},
    ]
    placement = Placement(model, calls, planned, poptorch)
    assert placement.begun == calls
    placement.undo()


def test_one_object_begins_a_block_per_call(poptorch) -> None:
    model = _Shared()
    entries = [
        _entry("encoder.embed_tokens", 0, 0),
        _entry("encoder.block.0", 1, 1),
        _entry("decoder.embed_tokens", 2, 0),
    ]
    placement = Placement(model, entries, model_identity(model).parameters, poptorch)
    options = poptorch.Options()
    options.Training.gradientAccumulation(5)
    options.setExecutionStrategy(placement.strategy())

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, ids: Tensor) -> Tensor:
            return poptorch.identity_loss(self.inner(ids), reduction="mean")

    executor = poptorch.trainingModel(Loss().train(), options)
    for _ in range(2):  # every forward pass begins with the first block again
        executor(torch.arange(5) % 8)
    found = [(block.id, block.ipu) for block in executor.program.blocks if block.id]
    assert found == [(f"stage{e['stage']}", e["ipu"]) for e in entries]
    executor.destroy()
    placement.undo()
    assert not model.shared._forward_pre_hooks
    assert not model._forward_pre_hooks


def test_a_parameter_on_two_ipus_is_refused(poptorch) -> None:
    model = nn.Sequential(OrderedDict(a=nn.Linear(4, 4), b=nn.Linear(4, 4)))
    model.b.weight = model.a.weight
    with pytest.raises(
        PlacementError,
        match=r"parameter 'weight' of 'b' on IPU 1 is also used by 'a' on IPU 0; put both on one",
    ):
        Placement(model, [_entry("a", 0, 0), _entry("b", 1, 1)], {}, poptorch)
    assert not model.a._forward_pre_hooks


def test_as_many_as_planned_or_none() -> None:
    planned = {f"old.{i}.weight": "3x2 float32" for i in range(2)}
    model = nn.Module()
    model.new = nn.ModuleList([nn.Linear(2, 3, bias=False) for _ in range(3)])
    with pytest.raises(
        ModuleNotFound, match=r"no module 'old.0', and 3 modules of its structure for 2 that the"
    ):
        find_modules(model, ["old.0", "old.1"], planned)
    model.new = model.new[:2]
    found = find_modules(model, ["old.0", "old.1"], planned)
    assert list(found.values()) == list(model.new)


def test_close_names_are_offered() -> None:
    model = nn.Sequential(OrderedDict(classifier=nn.Linear(2, 2)))
    with pytest.raises(
        ModuleNotFound, match=r"no module 'classifer', .*close names: classifier; use the transf"
    ):
        find_modules(model, ["classifer"], {})


def test_shapes_tell_alike_names_apart() -> None:
    planned = {"old.a.weight": "3x2 float32", "old.b.weight": "2x3 float32"}
    model = nn.Module()
    model.first, model.second = nn.Linear(3, 2, bias=False), nn.Linear(2, 3, bias=False)
    found = find_modules(model, ["old.a", "old.b"], planned)
    assert found == {"old.a": model.second, "old.b": model.first}
    assert torch.equal(found["old.a"].weight, model.second.weight)


def test_parameters_renamed_below_renamed_modules() -> None:
    planned = {
        f"old.{layer}.{name}": f"{shape} float32"
        for layer in range(2)
        for name, shape in (("q.weight", "3x2"), ("q.bias", "3"), ("out.weight", "2x3"))
    }
    model = nn.Module()
    model.new = nn.ModuleList(
        nn.ModuleDict({"query": nn.Linear(2, 3), "dense": nn.Linear(3, 2, bias=False)})
        for _ in range(2)
    )
    found = find_modules(model, ["old.0", "old.1"], planned)
    assert list(found.values()) == list(model.new)
