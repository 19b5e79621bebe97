"""Calls of ``poptorch``: texts, each with its place in the contract and the error, if there is one.

``P`` is ``poptorch``; :class:`World` has the other names. What is accepted must be true.
"""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import torch
from torch import nn

from tests.tools.emulator.toys import batch, mlp, two_ipus

PROBES = {
    ("1: storage rule", "AssertionError: Unexpected type"): [
        "options.deviceIterations('2')",
        "options.deviceIterations(2.0)",
        "options.replicationFactor(None)",
        "options.setExecutionStrategy(P.PipelinedExecution)",
        "options.useIpuModel(1)",
        "options.logDir(3)",
        "options.Training.gradientAccumulation(1.0)",
        "options.Training.setAutomaticLossScaling(1)",
        "options.Precision.enableStochasticRounding(1)",
        "options.outputMode('All')",
    ],
    ("1: storage rule", ""): [
        "options.deviceIterations(True).device_iterations is True",
        "options.deviceIterations(0).device_iterations == 0",
        "options.deviceIterations(-1).device_iterations == -1",
        "options.Training.gradientAccumulation(4) is options.Training",
        "options.anchorTensor('a', 'b') is None",
    ],
    ("1: undeclared attributes", "AssertionError: is not an option"): ["setattr(options, 'x', 1)"],
    ("1: undeclared attributes", "AttributeError: no private"): ["setattr(options, '_x', 1)"],
    ("1: freezing", "AttributeError: Can't modify frozen Options"): [
        "P.DataLoader(options, data); options.deviceIterations(2)",
        "P.inferenceModel(model, options); options.Training.gradientAccumulation(2)",
        "P.trainingModel(model, options); options._Popart.set('outlineThreshold', 1.0)",
    ],
    ("1: freezing", ""): [
        "P.DataLoader(options, data); options.clone().deviceIterations(2)",
        "P.inferenceModel(model, options).options is not options",
    ],
    ("facts: deepcopy of frozen options", ""): [
        "P.DataLoader(options, data); copy.deepcopy(options).deviceIterations(2)",
        "P.DataLoader(options, data); copy.deepcopy(options).Training.gradientAccumulation(2)",
    ],
    ("1: inputReplicaGrouping", "ValueError: "): [
        "options.inputReplicaGrouping(2, P.CommGroupType.Consecutive)",
        "options.replicationFactor(4).inputReplicaGrouping(3, P.CommGroupType.Consecutive)",
        "options.replicationFactor(4).inputReplicaGrouping(2, P.CommGroupType.All)",
    ],
    ("1: outputMode", "AssertionError: "): ["options.outputMode(P.OutputMode.EveryN)"],
    ("1: toDict", "AssertionError: OutputMode.Default"): ["options.toDict()"],
    ("1: setAvailableMemoryProportion", "AssertionError: "): [
        "options.setAvailableMemoryProportion({'0': 0.2})"
    ],
    ("1: setAvailableMemoryProportion", ""): [
        "options.setAvailableMemoryProportion({'IPU0': 9.0})"
    ],
    ("1: useOfflineIpuTarget", "AssertionError: "): ["options.useOfflineIpuTarget(3)"],
    ("1: setPartialsType", "ValueError: "): ["options.Precision.setPartialsType(torch.int32)"],
    ("1: reductions", "ValueError: "): [
        "options.Training.accumulationAndReplicationReductionType(P.ReductionType.NoReduction)"
    ],
    ("1: numIOTiles", "AssertionError: "): [
        "options.TensorLocations.numIOTiles(33)",
        "options.TensorLocations.numIOTiles(200)",
        "options.TensorLocations.numIOTiles(32.0)",
    ],
    ("1: loadFromFile", "ConfigFileError: "): ["options.loadFromFile(file('deviceIterations('))"],
    ("1: loadFromFile", ""): [
        "options.loadFromFile(file('deviceIterations(3)')).device_iterations == 3"
    ],
    ("facts: enum strings in POPTORCH_DEFAULT_OPTIONS", ""): [
        "default('outputMode', 'OutputMode.All').output_mode is P.OutputMode.All",
        "default('syncPattern', 'SyncPattern.Full').sync_pattern is P.SyncPattern.Full",
        "default('logDir', './out').log_dir == './out'",
    ],
    ("facts: maxRepeatLogs(None)", ""): ["options.maxRepeatLogs(None).max_repeat_logs > 4"],
    ("facts: unknown _Popart.set keys", "Error: Unknown .* option "): [
        "popart('enableOutlinig', True)",
        "popart('outlineThreshold', 10)",
        "popart('enablePipelining', 1)",
        "popart('engineOptions', 'x')",
        "popart('autoRecomputation', 'Pipeline')",
        "popart('saveInitializersToFile', True)",
        "popart('partialsTypeMatMuls', None)",
    ],
    ("facts: unknown _Popart.set keys", ""): [
        "popart('outlineThreshold', 10.0)",
        "popart('enableExplicitIR', True)",
        "popart('subgraphCopyingStrategy', 1)",
        "popart('matmulOptions', {'a': '1'})",
        "popart('accumulateOuterFragmentSettings.excludedVirtualGraphs', ['0'])",
        "popart('kahnTieBreaker', 'fifo')",
    ],
    ("2: BeginBlock", "Error: BeginBlock"): [
        "P.BeginBlock(P.BeginBlock(model.first, ipu_id=0), ipu_id=1)",
        "P.BeginBlock(3)",
    ],
    ("2: BeginBlock", ""): [
        "P.BeginBlock(model.first, 'a', ipu_id=0) is model.first",
        "P.BeginBlock(len)([1]) == 1",
        "pickle.loads(pickle.dumps(P.BeginBlock(model, 'a'))).first.in_features",
    ],
    ("facts: int user_id", ""): [
        "P.BeginBlock(model.first, user_id=3, ipu_id=0)",
        "P.Block(user_id=0)",
        "P.PipelinedExecution(P.Stage(0), 1).stage(1)",
    ],
    ("2: ids", "AssertionError: "): ["P.BeginBlock(model, 'a', ipu_id=-1)", "P.Block(user_id=1.5)"],
    ("2: strategies", "AssertionError: "): [
        "P.PipelinedExecution('a', 'a')",
        "P.SerialPhasedExecution()",
        "P.PipelinedExecution('a').stage('b')",
        "P.Stage()",
    ],
    ("2: a traced block that is not listed", "AssertionError: Unknown block 'last'"): [
        "options.setExecutionStrategy(P.PipelinedExecution('first')); train(pipelined)"
    ],
    ("facts: Stage as a phase", ""): [
        "P.SerialPhasedExecution(P.Stage('a'), P.Stage('b')).phase(1).stage(0).blocks == ['b']"
    ],
    ("2: accumulation fills the pipeline", "Error: gradientAccumulation must be at least 3"): [
        "options.Training.gradientAccumulation(2); train(pipelined)"
    ],
    ("2: number of IPUs", "Error: not a power of 2"): [
        "options.replicationFactor(3); train(model)",
    ],
    ("2: number of IPUs", ""): [
        "options.replicationFactor(3).autoRoundNumIPUs(True); train(model).program.num_ipus == 4"
    ],
    ("facts: autoRecomputation unset means Pipeline", ""): [
        "accumulate(4); train(pipelined).program.recomputed_stages == [0]",
        "accumulate(4); options._Popart.set('autoRecomputation', 0); "
        "train(pipelined).program.recomputed_stages == []",
        "train(model).program.recomputed_stages == []",
    ],
    ("facts: removeBlocks() before one's own hooks", "TypeError: "): [
        "h = hook(pipelined.first); P.removeBlocks(pipelined); h.remove(); pipelined(*data4)"
    ],
    ("facts: removeBlocks() after one's own hooks", ""): [
        "h = hook(pipelined.first); h.remove(); P.removeBlocks(pipelined); pipelined(*data4)",
        "old = model.first._forward_pre_hooks; P.removeBlocks(model); "
        "old is not model.first._forward_pre_hooks",
    ],
    ("2: removeBlocks", "AssertionError: "): ["P.removeBlocks([model])"],
    ("3: ops", "ValueError: "): [
        "P.recomputationCheckpoint(1)",
        "P.custom_op([], 'n', 'd', 1, [], attributes={'a': None})",
    ],
    ("3: ops", "AssertionError: "): [
        "P.identity_loss(torch.ones(1), 'max')",
        "P.serializedMatMul(data4[0], data4[0], 'none')",
    ],
    ("3: reassigned buffers", "Error: reassigned inside forward"): ["infer(Reassigns())(data4[0])"],
    ("3: reassigned buffers, BatchNorm exempt", ""): [
        "infer(nn.BatchNorm1d(6, momentum=None).eval())(data4[0]) is not None"
    ],
    ("3: poptorch.CPU runs on the host", ""): [
        "infer(OnHost(P))(data4[0]).shape == (4, 6)",
        "infer(OnHost(P))(data4[0]).equal(data4[0] * data4[0].sum())",
    ],
    ("4: one independent loss", "Error: Couldn't find a loss"): [
        "train(nn.Linear(6, 2), data4[0])"
    ],
    ("4: inferenceModel", "Error: Gradient accumulation must be 1"): [
        "options.Training.gradientAccumulation(2); P.inferenceModel(model, options)"
    ],
    ("4: wrapped twice", "RuntimeError: already been wrapped"): [
        "P.trainingModel(model); P.trainingModel(model)"
    ],
    ("4: batch dimension", "AssertionError: Invalid batch dimension"): [
        "accumulate(3); train(model, *data4)"
    ],
    ("4: later calls must match", "Error: differ from those"): [
        "e = infer(model); e(data4[0]); e(data4[0][:2])",
        "e = infer(model); e(data4[0]); e(data4[0].half())",
        "e = infer(Nested()); e({'a': data4[0], 'b': 1}); e({'a': data4[0], 'b': 2})",
        "e = infer(Nested()); e({'a': data4[0], 'b': 1}); e({'a': data4[0]})",
    ],
    ("facts: dict inputs in another key order", ""): [
        "e = infer(Difference()); d = {'a': data4[0], 'b': data4[0] * 2}; "
        "e(d).equal(e(dict(reversed(list(d.items())))))"
    ],
    ("facts: inputs that require grad are detached", ""): [
        "infer(model)(data4[0].clone().requires_grad_()) is not None; said('requires_grad=True')"
    ],
    ("facts: custom argument parsers", ""): [
        "P.registerCustomArgParser(Pair, parser(P)); y = infer(Sums())(Pair(*data4)); "
        "P.registerCustomArgParser(Pair, None); y.equal(data4[0].sum() + data4[1].sum())"
    ],
    ("facts: custom argument parsers", "Error: must inherit from ICustomArgParser"): [
        "P.registerCustomArgParser(Pair, object())"
    ],
    ("facts: torch.save of a wrapped model", ""): [
        "train(model); restored(model).first.weight.equal(model.first.weight)",
        "train(model); type(restored(model)).__name__ == 'Mlp'",
        "train(model); type(restored(model).first.weight) is nn.Parameter",
        "train(model); type(copy.deepcopy(model)).__name__ == 'Mlp'",
    ],
    ("4: attach and detach", "Error: "): [
        "infer(model).detachFromDevice()",
        "e = train(model); e.attachToDevice()",
    ],
    ("4: ConnectionType.Never", "AssertionError: offline device"): [
        "options.connectionType(P.ConnectionType.Never); infer(model)(data4[0])"
    ],
    ("facts: named stages cannot be pickled", "AttributeError|PicklingError: local"): [
        "options.setExecutionStrategy(P.PipelinedExecution(P.Stage('first'), P.Stage('last'))); "
        "accumulate(4); export(pipelined)",
        "pickle.dumps(options.setExecutionStrategy(P.ShardedExecution('a', 'b')))",
        "pickle.dumps(P.SerialPhasedExecution('a'))",
    ],
    ("facts: AutoStage can be pickled", ""): [
        "options.setExecutionStrategy(P.PipelinedExecution(P.AutoStage.AutoIncrement)); "
        "accumulate(4); auto(P, pipelined); export(pipelined)",
        "accumulate(4); export(pipelined)",
        "copy.deepcopy(P.PipelinedExecution('a', 'b')).stage('b')._stage_id == 1",
    ],
    ("5: lr is constant when omitted", ""): [
        "P.optim.AdamW(model.parameters()).variable_attrs.isConstant('lr')",
        "not P.optim.AdamW(model.parameters(), lr=0.1).variable_attrs.isConstant('lr')",
    ],
    ("5: signatures", "TypeError: "): [
        "P.optim.SGD(model.parameters())",
        "P.optim.LAMB(model.parameters(), max_grad_norm=1.0)",
        "P.optim.RMSprop(model.parameters(), max_grad_norm=1.0)",
    ],
    ("5: accum types", "AssertionError: "): [
        "P.optim.Adam(model.parameters(), accum_type=torch.bfloat16)"
    ],
    ("5: unsupported types", "AssertionError: Unsupported optimizer type"): [
        "P.trainingModel(model, options, torch.optim.Adagrad(model.parameters()))"
    ],
    ("facts: amsgrad in constructors", ""): ["P.optim.Adam(model.parameters(), amsgrad=True)"],
    ("5: amsgrad", "ValueError: amsgrad"): [
        "P.trainingModel(model, options, P.optim.AdamW(model.parameters(), amsgrad=True))"
    ],
    ("facts: velocity_scaling in constructors", ""): [
        "P.optim.SGD(model.parameters(), lr=0.1, velocity_scaling=2.0); said('velocity_scaling')",
        "P.optim.SGD(model.parameters(), lr=0.1, velocity_scaling=2.0, use_combined_accum=True)",
    ],
    ("facts: setOptimizer(torch.optim.SGD)", ""): [
        "o = P.optim.SGD(model.parameters(), lr=0.1); e = train(model, optimizer=o); "
        "e.setOptimizer(torch.optim.SGD(model.parameters(), lr=0.2)) is None"
    ],
    ("5: the type cannot change", "Error: setOptimizer"): [
        "e = train(model); e.setOptimizer(P.optim.Adam(model.parameters(), lr=0.1))"
    ],
    ("facts: ipu_state before compile", ""): [
        "P.optim.Adam(model.parameters(), lr=0.1).state_dict()['ipu_state'] is None",
        "o = P.optim.Adam(model.parameters(), lr=0.1); o.load_state_dict(o.state_dict()) is None",
        "o = P.optim.Adam(model.parameters(), lr=0.1); train(model, optimizer=o); "
        "o.state_dict()['ipu_state'] is not None",
    ],
    ("5: foreign states", "RuntimeError: "): [
        "P.optim.SGD(model.parameters(), lr=0.1).load_state_dict("
        "torch.optim.SGD(model.parameters(), lr=0.1).state_dict())"
    ],
    ("5: AdamW(bias_correction=False) has no effect", ""): [
        "train(model, optimizer=P.optim.AdamW(model.parameters(), lr=0.1, bias_correction=False)); "
        "said('no effect on the device')"
    ],
    ("6: DataLoader", ""): [
        "len(P.DataLoader(options.deviceIterations(4), data, batch_size=4)) == 12",
        "P.DataLoader(options.deviceIterations(4), data, batch_size=4).combinedBatchSize == 16",
        "P.DataLoader(options, data, batch_size=None).combinedBatchSize is None",
    ],
    ("facts: DataLoader(batch_sampler=...)", ""): [
        "len(P.DataLoader(options.deviceIterations(4), data, batch_sampler=sampler)) == 12",
        "len(list(P.DataLoader(options.deviceIterations(4), data, batch_sampler=sampler))) == 12",
        "[len(b) for b in P.DataLoader(options.deviceIterations(4), data, batch_sampler=sampler, "
        "drop_last=False)][-2:] == [16, 8]",
    ],
    ("6: batch_sampler excludes", "Error: mutually exclusive"): [
        "P.DataLoader(options, data, batch_size=2, batch_sampler=sampler)",
        "P.DataLoader(options, data, shuffle=True, batch_sampler=sampler)",
    ],
}


def differences(found: Any, wanted: Any) -> str:
    """Say how an output differs from plain torch's, apart from the device's types."""
    if isinstance(wanted, torch.Tensor):
        kind = {torch.int64: torch.int32, torch.float64: torch.float32}.get(wanted.dtype)
        wanted = wanted if kind is None else wanted.to(kind)
        same = found.dtype == wanted.dtype and torch.equal(found, wanted)
        return "" if same else f"{found} is not {wanted}"
    if isinstance(wanted, dict):
        found, wanted = list(found.items()), list(wanted.items())
    if isinstance(wanted, (list, tuple)):
        if len(found) != len(wanted):
            return f"{len(found)} values, not {len(wanted)}"
        return "".join(differences(a, b) for a, b in zip(found, wanted))
    return "" if found == wanted else f"{found} is not {wanted}"


class Reassigns(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        self.count = self.count + 1
        return x


class OnHost(nn.Module):
    """A part that reads values, which is fine on the host."""

    def __init__(self, poptorch):
        super().__init__()
        self.host = poptorch.CPU(lambda x: x * x.sum().item(), "scale")

    def forward(self, x):
        return self.host(x)


class Nested(nn.Module):
    def forward(self, inputs):
        return inputs["a"] + 1


class Difference(nn.Module):
    def forward(self, inputs):
        return inputs["a"] - inputs["b"]


class Pair:
    def __init__(self, first, second):
        self.first, self.second = first, second


class Sums(nn.Module):
    def forward(self, pair):
        return pair.first.sum() + pair.second.sum()


METHODS = ["train", "infer", "popart", "default", "file", "hook", "export", "auto", "parser"]
METHODS += ["restored"]


class World:
    """The names that a probe may use."""

    def __init__(self, poptorch, monkeypatch, folder, caplog) -> None:
        caplog.set_level("WARNING", logger="poptorch")
        self.poptorch, self.monkeypatch, self.folder = poptorch, monkeypatch, folder
        self.options = poptorch.Options()
        data = torch.arange(200)
        self.names = {
            "P": poptorch,
            "torch": torch,
            "nn": nn,
            "copy": copy,
            "pickle": pickle,
            "options": self.options,
            "model": mlp(),
            "pipelined": two_ipus(poptorch, mlp()),
            "data": data,
            "data4": batch(4),
            "sampler": torch.utils.data.BatchSampler(range(200), 4, drop_last=False),
            "said": lambda text: text in caplog.text,
            "accumulate": lambda n: self.options.Training.gradientAccumulation(n),
            **{kind.__name__: kind for kind in (Reassigns, OnHost, Nested, Difference, Pair, Sums)},
            **{name: getattr(self, name) for name in METHODS},
        }

    def run(self, text: str) -> Any:
        """Run the statements and return the value of the last one."""
        *statements, last = text.split("; ")
        for statement in statements:
            exec(statement, self.names)
        return eval(last, self.names)

    def train(self, model, *inputs, optimizer=None):
        executor = self.poptorch.trainingModel(model, self.options, optimizer)
        executor.compile(*(inputs or batch(12)))
        return executor

    def infer(self, model):
        return self.poptorch.inferenceModel(model, self.options)

    def popart(self, key, value):
        self.options._Popart.set(key, value)
        return self.train(mlp())

    def default(self, name, value):
        self.monkeypatch.setenv("POPTORCH_DEFAULT_OPTIONS", f'{{"{name}": "{value}"}}')
        return self.poptorch.Options()

    def file(self, text):
        path = self.folder / "options.txt"
        path.write_text(text)
        return str(path)

    def hook(self, module):
        return module.register_forward_pre_hook(lambda _m, args, kwargs: None, with_kwargs=True)

    def export(self, model):
        executor = self.poptorch.trainingModel(model, self.options)
        executor.compileAndExport(str(self.folder / "it"), *batch(12))
        return True

    def auto(self, poptorch, model):
        poptorch.removeBlocks(model)
        poptorch.BeginBlock(model.last, ipu_id=1)

    def parser(self, poptorch):
        class Parser(poptorch.ICustomArgParser):
            def yieldTensors(self, struct):
                yield from (struct.first, struct.second)

            def reconstruct(self, original_structure, tensor_iterator):
                return Pair(next(tensor_iterator), next(tensor_iterator))

        return Parser()

    def restored(self, model):
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        options = {"weights_only": False} if torch.__version__ >= "2.4" else {}
        return torch.load(file, **options)
