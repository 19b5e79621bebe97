"""Options, optimizers, slices and made-up rows: the files that go into a bundle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ipu_pipeline.backends.ipu.annotations import annotate
from ipu_pipeline.backends.ipu.check import check
from ipu_pipeline.backends.ipu.runtime.device import (
    decayed_groups,
    make_optimizer,
    make_options,
    mean_loss,
    synthetic_data,
)
from ipu_pipeline.backends.ipu.runtime.placement import Placement
from ipu_pipeline.backends.ipu.runtime.static_graph import DeviceForward
from ipu_pipeline.backends.ipu.runtime.tables import (
    Part,
    cut,
    find_table,
    restore,
    sliced_lookup,
)
from ipu_pipeline.backends.ipu.settings import OptimizerSettings, settings_for
from tests.backends.ipu.emulated import case

# ---- options --------------------------------------------------------------------------------


def _flat(**config: Any) -> dict[str, Any]:
    made = case(**config)
    return settings_for(made.plan, made.config, half=True, seed=3).to_json()


def test_every_setting_reaches_the_options(poptorch: Any) -> None:
    flat = _flat(
        replication_factor=2,
        device_iterations=3,
        matmul_proportion=(0.1, 0.3),
        optimizer_state_offchip=True,
        replicated_tensor_sharding=True,
        auto_loss_scaling=True,
        output_mode="sum",
        executable_cache_dir="cache",
    )
    options = make_options(flat, poptorch)
    found = options.toDict()
    assert options.replication_factor == 2
    assert options.device_iterations == 3
    assert options.Training.gradient_accumulation == 4
    assert options.output_mode is poptorch.OutputMode.Sum
    assert options.Training.automaticLossScaling
    assert found["available_memory_proportion"] == {0: 0.1, 1: 0.3}
    assert found["random_seed"] == 3
    assert found["auto_round_num_ipus"] is True
    assert found["enableStochasticRounding"] is True
    assert found["partialsTypeMatMuls"] == "half"
    location = found["location_optimizer"]
    assert location["onChip"] == 0
    assert location["useReplicatedTensorSharding"] == 1


@pytest.mark.parametrize("mode", ["all", "final", "default"])
def test_output_modes(mode: str, poptorch: Any) -> None:
    options = make_options(_flat(output_mode=mode), poptorch)
    assert options.output_mode is getattr(poptorch.OutputMode, mode.capitalize())


def test_options_of_evaluation(poptorch: Any) -> None:
    flat = _flat(inference_device_iterations=5, inference_replication_factor=2)
    options = make_options(flat, poptorch, inference=True)
    assert options.device_iterations == 5
    assert options.replication_factor == 2
    assert options.Training.gradient_accumulation == 1
    assert options.output_mode is poptorch.OutputMode.All
    assert options.toDict()["enableStochasticRounding"] is False


def test_what_the_published_runtime_tells_popart(poptorch: Any) -> None:
    def told(*, clipped: bool = False, inference: bool = False, **config: Any) -> dict[str, Any]:
        flat = {**_flat(**config), "max_grad_norm": 1.0 if clipped else None}
        options = make_options(flat, poptorch, inference=inference)
        options.toDict()
        return dict(options._Popart.options)

    found = told(recompute=False)
    assert found["autoRecomputation"] == 0
    assert told(explicit_ir_inference=True)["autoRecomputation"] == 3
    assert found["accumulateOuterFragmentSettings.schedule"] == 3
    assert found["accumulateOuterFragmentSettings.excludedVirtualGraphs"] == ["0"]
    # PopART orders clipping itself
    assert "accumulateOuterFragmentSettings.schedule" not in told(clipped=True)
    assert found["engineOptions"]["target.syncReplicasIndependently"] == "true"
    assert told(explicit_ir_inference=True, inference=True)["enableExplicitIR"] is True
    assert "enableExplicitIR" not in told(inference=True)
    assert (
        "cachePath" not in make_options(_flat(executable_cache_dir="disabled"), poptorch).toDict()
    )


def test_a_first_moment_in_float16_is_priced_and_emitted() -> None:
    plain, half = (case(enable_half_first_order_momentum=chosen).plan for chosen in (False, True))
    assert half.stages[0].weight_bytes < plain.stages[0].weight_bytes
    dtypes = [settings_for(p).optimizer.first_order_momentum_dtype for p in (plain, half)]
    assert dtypes == ["float32", "float16"]


def test_sharding_needs_replicas(poptorch: Any) -> None:
    options = make_options(_flat(replicated_tensor_sharding=True), poptorch)
    assert options.toDict()["location_optimizer"]["useReplicatedTensorSharding"] == 0


# ---- optimizers -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AdamW", "Adam", "LAMB", "SGD", "RMSprop"])
def test_optimizers_of_the_device(name: str, poptorch: Any) -> None:
    made = case()
    clip = 1.0 if name in ("AdamW", "Adam", "SGD") else None
    optimizer = OptimizerSettings(
        optimizer=name,
        learning_rate=0.25,
        loss_scaling=8.0,
        max_grad_norm=clip,
        accum_dtype="float16",
    )
    flat = settings_for(made.plan, made.config, optimizer=optimizer).to_json()
    groups = decayed_groups(made.model, 0.1)
    found = make_optimizer(flat, groups, poptorch)
    assert type(found).__name__ == name
    assert found.loss_scaling == 8.0
    assert found.accum_type is torch.float16
    assert [group["weight_decay"] for group in found.param_groups] == [0.1, 0.0]
    assert not found.variable_attrs.isConstant("lr")


def test_biases_and_norms_are_not_decayed() -> None:
    model = nn.Module()
    model.linear, model.norm, model.table = nn.Linear(2, 2), nn.LayerNorm(2), nn.Embedding(3, 2)
    model.linear.weight.requires_grad_(False)
    decayed, plain = decayed_groups(model, 0.1)
    assert [id(p) for p in decayed["params"]] == [id(model.table.weight)]
    assert {id(p) for p in plain["params"]} == {
        id(model.linear.bias),
        id(model.norm.weight),
        id(model.norm.bias),
    }


# ---- slices ---------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [None, 0, 4])
def test_a_lookup_in_slices(padding: int | None) -> None:
    torch.manual_seed(0)
    plain = nn.Embedding(6, 4, padding_idx=padding)
    sliced = nn.Embedding(6, 4, padding_idx=padding)
    sliced.load_state_dict(plain.state_dict())
    keys, own = list(sliced.state_dict()), type(sliced)
    cut(sliced, [Part("x", (0, 6), (3, 3))], {})
    ids = torch.tensor([[0, 5, 4], [1, 2, 4]])
    for table in (plain, sliced):
        (table(ids) ** 2).sum().backward()
    assert torch.equal(plain(ids), sliced(ids))
    torch.testing.assert_close(plain.weight.grad, sliced.weight.grad)
    restore(sliced)
    assert type(sliced) is own
    assert list(sliced.state_dict()) == keys
    assert not {"parts", "names", "parameters_before"} & {*sliced.__dict__}


def test_ids_of_other_slices_give_zeros() -> None:
    rows = torch.ones(2, 3)
    found = sliced_lookup(torch.tensor([0, 2, 3, 4]), rows, first=2)
    assert found[:, 0].tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("bias", [True, False])
def test_a_projection_in_slices(bias: bool, poptorch: Any) -> None:
    linear = nn.Linear(4, 6, bias=bias)
    x = torch.randn(2, 3, 4)
    expected = linear(x)
    cut(linear, [Part("x", (0, 6), (2, 1))], {})
    assert torch.equal(linear.eval()(x), expected)
    linear.train()
    torch.testing.assert_close(linear(x), expected)
    restore(linear)
    assert type(linear) is nn.Linear


def test_what_cannot_be_sliced() -> None:
    with pytest.raises(ValueError, match=r"block 'x' is serialized, but has no embedding"):
        find_table(nn.LayerNorm(3), "x")
    with pytest.raises(
        ValueError, match=r"factor 4 of 'x' does not divide its 6 rows; .*\[2, 3, 6\]"
    ):
        cut(nn.Linear(2, 6), [Part("x", (0, 6), (4, 1))], {})
    with pytest.raises(ValueError, match=r"factor 2 of 'x' does not divide its 67 rows; .* none"):
        cut(nn.Linear(2, 67), [Part("x", (0, 67), (2, 1))], {})
    with pytest.raises(ValueError, match=r"max_norm, sparse or scaled gradients, which slices can"):
        find_table(nn.Embedding(6, 2, max_norm=1.0), "x")
    with pytest.raises(ValueError, match=r"'x' has 6 rows, its blocks have 0 to 2, 3 to 6; every"):
        cut(nn.Embedding(6, 2), [Part("x", (0, 2)), Part("y", (3, 6))], {})


# ---- placement ------------------------------------------------------------------------------


class _Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = _Returns(tuple)
        self.second = _Returns(dict)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)[0])["y"]


class _Returns(nn.Module):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Any:
        y = x * self.weight
        return (y, None, "text") if self.kind is tuple else {"y": y}


def test_checkpoints_keep_the_structure_of_outputs(poptorch: Any) -> None:
    model = _Chain()
    entry = {"again": False, "checkpoint": True, "serialize": 1, "stage": 0, "ipu": 0}
    entries = [{**entry, "block": name, "module": name} for name in ("first", "second")]
    placement = Placement(model, entries, {}, poptorch)
    x = torch.ones(1, 2)
    assert torch.equal(model(x), x)
    assert model.first(x)[1:] == (None, "text")
    placement.undo()
    assert not model.first._forward_hooks


class _Adds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return x * self.weight + table


class _Given(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = _Adds(), _Adds()
        self.register_buffer("table", torch.arange(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x, self.table), self.table)


def test_a_buffer_that_is_handed_to_two_ipus_is_a_value(poptorch: Any) -> None:
    model = _Given()
    entry = {"again": False, "checkpoint": False, "serialize": 1}
    entries = [
        {**entry, "block": name, "module": name, "stage": i, "ipu": i}
        for i, name in enumerate(("first", "second"))
    ]
    placement = Placement(model, entries, {}, poptorch)
    options = poptorch.Options()
    options.deviceIterations(2)
    options.setExecutionStrategy(placement.strategy())
    executor = poptorch.inferenceModel(model, options)
    assert executor(torch.ones(2, 2)).tolist() == [[1, 3], [1, 3]]
    executor.destroy()
    placement.undo()


def test_one_module_per_stage_of_both_strategies(poptorch: Any) -> None:
    made = case()
    entries = [
        {"block": n, "module": n, "stage": i, "ipu": i, "again": False, "checkpoint": False,
         "serialize": 1}
        for i, n in enumerate(("bert.embeddings", "qa_outputs"))
    ]  # fmt: skip
    placement = Placement(made.model, entries, made.plan.model.parameters, poptorch)
    assert isinstance(placement.strategy(), poptorch.PipelinedExecution)
    assert isinstance(placement.strategy(pipelined=False), poptorch.ShardedExecution)
    placement.undo()


def test_evaluation_has_its_own_placement(poptorch: Any) -> None:
    made = case(
        "bert-mlm",
        changes={"vocab_size": 4098},
        gradient_accumulation_steps=8,
        inference_layers_per_ipu=(1, 1, 2),
        inference_matmul_proportion=(0.1, 0.2, 0.3),
        inference_embedding_serialization_factor=3,
    )
    settings = settings_for(made.plan, made.config)
    check(made.plan, settings)
    flat, entries = settings.to_json(), annotate(made.plan, settings.inference_places())
    assert (flat["num_stages"], flat["inference_num_stages"]) == (3, 4)
    expected = made.model.eval()(**made.example)
    blocks = [entry.to_json() for entry in entries]
    placement = Placement(made.model, blocks, made.plan.model.parameters, poptorch)
    forward = DeviceForward(made.model, poptorch, flat)
    ipus: dict[bool, list[int]] = {}
    for inference in (True, False, True):  # a program that was made in between changes nothing
        options = make_options(flat, poptorch, inference=inference)
        options.setExecutionStrategy(placement.strategy(pipelined=not inference))
        made.model.train(not inference)
        if inference:
            executor = poptorch.inferenceModel(made.model, options)
            logits = executor(**made.example)[-1]
            torch.testing.assert_close(logits, expected.logits, rtol=0, atol=1e-6)
        else:
            optimizer = make_optimizer(
                {**flat, "learning_rate": 0.0}, [{"params": [*made.model.parameters()]}], poptorch
            )
            executor = poptorch.trainingModel(made.model, options, optimizer)
            executor(**made.batch())
        ipus[inference] = [block.ipu for block in executor.program.blocks]
        sliced = any(block.serialized for block in executor.program.blocks)
        executor.destroy()
    print(ipus, sliced)
    forward.restore()
    placement.undo()


# ---- rows -----------------------------------------------------------------------------------


def test_made_up_rows_have_the_planned_shapes() -> None:
    inputs = [
        {"name": "ids", "shape": [2, 3], "dtype": "int64"},
        {"name": "pixels", "shape": [2, 4], "dtype": "float32"},
    ]
    data = synthetic_data(inputs, 5, seed=1)
    assert data["ids"].shape == (5, 3)
    assert set(data["ids"].flatten().tolist()) <= {0, 1}
    assert data["pixels"].shape == (5, 4)
    assert torch.equal(data["pixels"], synthetic_data(inputs, 5, seed=1)["pixels"])


def test_the_mean_of_a_sum() -> None:
    settings = {"output_mode": "sum", "gradient_accumulation_steps": 4, "device_iterations": 2}
    assert mean_loss(torch.tensor([8.0, 24.0]), settings) == 2.0
    assert mean_loss(torch.tensor([8.0, 24.0]), {**settings, "output_mode": "all"}) == 16.0
