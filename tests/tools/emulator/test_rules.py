"""What the back end refuses when it compiles: every rule by its message."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.tools.emulator.toys import batch, mlp, two_ipus


class Calls(nn.Module):
    """Calls its layers in order and returns a loss; layers may repeat."""

    def __init__(self, layers, order):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.order = order

    def forward(self, x, target):
        for index in self.order:
            x = self.layers[index](x)
        return functional.cross_entropy(x, target)


def chain(poptorch, ipus, order=None):
    layers = [nn.Linear(6, 6) for _ in ipus]
    for index, (layer, ipu) in enumerate(zip(layers, ipus)):
        poptorch.BeginBlock(layer, f"b{index}", ipu_id=ipu)
    return Calls(layers, order or range(len(ipus)))


def train(poptorch, model, *, accumulation=8, options=None, strategy=None):
    options = options or poptorch.Options()
    options.Training.gradientAccumulation(accumulation)
    if strategy is not None:
        options.setExecutionStrategy(strategy)
    divisor = accumulation * options.replication_factor
    executor = poptorch.trainingModel(model, options)
    executor.compile(*batch(divisor))
    return executor


def test_stages_must_not_decrease(poptorch) -> None:
    with pytest.raises(poptorch.Error, match="stage ids must not decrease along the data flow"):
        train(poptorch, chain(poptorch, [0, 1, 0]))
    auto = poptorch.PipelinedExecution(poptorch.AutoStage.AutoIncrement)
    program = train(poptorch, chain(poptorch, [0, 1, 0]), strategy=auto).program
    assert (program.num_forward_stages, program.num_stages, program.num_ipus) == (3, 5, 2)


def test_a_stage_is_on_one_ipu(poptorch) -> None:
    strategy = poptorch.PipelinedExecution(["b0"], ["b1", "b2"])
    with pytest.raises(poptorch.Error, match=r"Stage 1 is on IPU 1 \(block 'b1'\) and on IPU 2"):
        train(poptorch, chain(poptorch, [0, 1, 2]), strategy=strategy)


@pytest.mark.parametrize("ipus", [[0, 2], [1, 2]])
def test_stages_are_contiguous(poptorch, ipus) -> None:
    with pytest.raises(poptorch.Error, match="numbered 0 to N-1 without a gap"):
        train(poptorch, chain(poptorch, ipus))


def test_listed_stage_that_never_runs_is_a_gap(poptorch) -> None:
    strategy = poptorch.PipelinedExecution("b0", "absent", "b1")
    with pytest.raises(poptorch.Error, match=r"stages \[0, 2\] on IPUs \[0, 1\]"):
        train(poptorch, chain(poptorch, [0, 1]), strategy=strategy)


def test_neighbouring_stages_on_one_ipu_are_merged(poptorch) -> None:
    auto = poptorch.PipelinedExecution(poptorch.AutoStage.AutoIncrement)
    model = chain(poptorch, [0, 0, 1, 1])
    assert train(poptorch, model, strategy=auto, accumulation=3).program.num_stages == 3


def test_accumulation_fills_the_pipeline(poptorch) -> None:
    with pytest.raises(
        poptorch.Error,
        match=r"gradientAccumulation is 6, but a pipeline of 4 forward stages has 7 stages: "
        r"gradientAccumulation must be at least 7 \(2 x 4 - 1\)",
    ):
        train(poptorch, chain(poptorch, [0, 1, 2, 3]), accumulation=6)
    train(poptorch, chain(poptorch, [0, 1, 2, 3]), accumulation=7)


def test_device_iterations_fill_the_inference_pipeline(poptorch) -> None:
    with pytest.raises(poptorch.Error, match="deviceIterations must be at least 2"):
        poptorch.inferenceModel(two_ipus(poptorch, mlp()))(batch(2)[0])
    options = poptorch.Options().setExecutionStrategy(poptorch.ShardedExecution())
    poptorch.inferenceModel(two_ipus(poptorch, mlp()), options)(batch(2)[0])


def test_number_of_ipus_is_a_power_of_two(poptorch) -> None:
    with pytest.raises(
        poptorch.Error, match=r"needs 3 IPUs \(3 x 1 replicas\), which is not a power of 2"
    ):
        train(poptorch, chain(poptorch, [0, 1, 2]))
    options = poptorch.Options().autoRoundNumIPUs(True)
    assert train(poptorch, chain(poptorch, [0, 1, 2]), options=options).program.num_ipus == 4
    options = poptorch.Options().useOfflineIpuTarget().autoRoundNumIPUs(True)
    assert train(poptorch, chain(poptorch, [0, 1, 2]), options=options).program.num_ipus == 3


def test_at_most_64_ipus(poptorch) -> None:
    options = poptorch.Options().replicationFactor(64)
    with pytest.raises(poptorch.Error, match=r"needs 128 IPUs \(2 x 64 replicas\).*at most 64"):
        train(poptorch, two_ipus(poptorch, mlp()), options=options)


def test_a_variable_lives_on_one_ipu(poptorch) -> None:
    model = chain(poptorch, [0, 1])
    model.layers[1].weight = model.layers[0].weight
    with pytest.raises(
        poptorch.Error,
        match=r"Can not copy variable tensor layers.0.weight between virtual graphs when "
        r"pipelining: it is used on IPUs 0, 1",
    ):
        train(poptorch, model)


def test_sharing_a_variable_is_only_advised_against_when_sharded(poptorch, caplog) -> None:
    model = chain(poptorch, [0, 1])
    model.layers[1].weight = model.layers[0].weight
    train(poptorch, model, accumulation=1, strategy=poptorch.ShardedExecution())
    assert "layers.0.weight is used on IPUs [0, 1]: keep tied weights on one IPU" in caplog.text


def test_losses(poptorch) -> None:
    class Net(nn.Module):
        def __init__(self, make):
            super().__init__()
            self.layer, self.make = nn.Linear(6, 3), make

        def forward(self, x, target):
            return self.make(self.layer(x), target)

    def two(logits, target):
        return functional.cross_entropy(logits, target) + functional.mse_loss(logits, logits * 2)

    with pytest.raises(poptorch.Error, match="Couldn't find a loss in graph!"):
        train(poptorch, Net(lambda logits, _: logits.sum()))
    with pytest.raises(poptorch.Error, match=r"Multiple independent losses found \(2\)"):
        train(poptorch, Net(two))
    with pytest.raises(poptorch.Error, match=r"loss has shape \(1, 3\): it must be a scalar"):
        train(poptorch, Net(lambda logits, _: poptorch.identity_loss(logits, "none")))

    def hidden(logits, target):
        functional.cross_entropy(logits, target)
        return logits

    with pytest.raises(poptorch.Error, match="The loss is not among the outputs"):
        train(poptorch, Net(hidden))
    train(poptorch, Net(lambda logits, t: poptorch.identity_loss(two(logits, t), "none")))
    train(poptorch, Net(lambda logits, _: poptorch.identity_loss(logits, "mean")))


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: int(x.sum()),
        lambda x: float(x.sum()),
        lambda x: x.tolist(),
        lambda x: 0.0 in x,
        lambda x: torch.equal(x, x),
        lambda x: torch.full((2,), x.sum()),
    ],
)
def test_values_cannot_be_read_while_tracing(poptorch, read) -> None:
    class Net(nn.Module):
        def forward(self, x):
            read(x)
            return x

    with pytest.raises(poptorch.Error, match="aten::item is only supported in eager mode"):
        poptorch.inferenceModel(Net())(torch.ones(2))


@pytest.mark.parametrize("move", [lambda x: x.to("cpu"), lambda x: x.cpu()])
def test_moving_to_the_host_is_refused(poptorch, move) -> None:
    class Net(nn.Module):
        def forward(self, x):
            return move(x) + 1

    with pytest.raises(poptorch.Error, match=r'moved with .to\("cpu"\) or .cpu\(\)'):
        poptorch.inferenceModel(Net())(torch.ones(2))


def test_zero_sized_tensors_are_refused(poptorch) -> None:
    class Net(nn.Module):
        def forward(self, x):
            return x, x[:0]

    with pytest.raises(poptorch.Error, match="zero-sized tensors are not supported"):
        poptorch.inferenceModel(Net())(torch.ones(2))
    with pytest.raises(poptorch.Error, match=r"Input 0 has shape \(0,\): zero-sized"):
        poptorch.inferenceModel(Net())(torch.ones(0))


def test_reassigned_buffers_are_refused(poptorch) -> None:
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x):
            self.count = self.count + 1
            return x + self.count

    model = Net()
    with pytest.raises(poptorch.Error, match="'count' was reassigned inside forward"):
        poptorch.inferenceModel(model)(torch.ones(2))
    assert torch.equal(model.count, torch.zeros(1))


def test_overlap_rules(poptorch) -> None:
    class Net(nn.Module):
        def forward(self, x):
            mode = poptorch.OverlapMode.OverlapDeviceIterationLoop
            x = poptorch.set_overlap_for_input(x, mode)
            return poptorch.set_overlap_for_output(x + 1, mode)

    def run(*, sharded=True, tiles=True, final=False):
        options = poptorch.Options()
        if sharded:
            options.setExecutionStrategy(poptorch.ShardedExecution())
        if tiles:
            options.TensorLocations.numIOTiles(32)
        if final:
            options.outputMode(poptorch.OutputMode.Final)
        return poptorch.inferenceModel(Net(), options)(torch.ones(2))

    with pytest.raises(poptorch.Error, match="cannot be used with PipelinedExecution"):
        run(sharded=False)
    with pytest.raises(poptorch.Error, match=r"needs TensorLocations.numIOTiles"):
        run(tiles=False)
    with pytest.raises(poptorch.Error, match=r"needs OutputMode.All or OutputMode.Sum"):
        run(final=True)
    assert torch.equal(run(), torch.full((2,), 2.0))


@pytest.mark.parametrize(
    ("forward", "said"),
    [
        (lambda x, i, o: i(x + 1), "input applied on a node which is not a tensor input"),
        (lambda x, i, o: i(x) + x, "must be the only op applied to an input"),
        (lambda x, i, o: o(x + 1) + 1, "output applied on a node which is not a tensor output"),
        (lambda x, i, o: [o(x + 1)] * 2, "returned twice"),
    ],
)  # poptorch/source/OverlappedIO.cpp of SDK 3.4
def test_what_overlap_can_be_set_for(forward, said, poptorch) -> None:
    mode = poptorch.OverlapMode.OverlapDeviceIterationLoop

    class Net(nn.Module):
        def forward(self, x):
            return forward(
                x,
                lambda value: poptorch.set_overlap_for_input(value, mode),
                lambda value: poptorch.set_overlap_for_output(value, mode),
            )

    options = poptorch.Options()
    options.setExecutionStrategy(poptorch.ShardedExecution())
    options.TensorLocations.numIOTiles(32)
    with pytest.raises(poptorch.Error, match=said):
        poptorch.inferenceModel(Net(), options)(torch.ones(2))
