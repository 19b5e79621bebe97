"""The executor: two copies of the weights, attaching, files, counters, random state."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from tests.tools.emulator.toys import batch, largest_difference, mlp


def trainer(poptorch, model, *, options=None, lr=0.1):
    optimizer = poptorch.optim.SGD(model.parameters(), lr=lr)
    return poptorch.trainingModel(model, options, optimizer)


def test_the_user_model_reads_new_weights_when_it_is_looked_at(poptorch) -> None:
    model, before = mlp(), mlp()
    executor = trainer(poptorch, model)
    weight = model.first.weight
    executor(*batch(2))
    assert executor._link.device_is_newer
    assert not torch.equal(weight, before.first.weight)
    assert not executor._link.device_is_newer
    executor(*batch(2))
    assert executor._link.device_is_newer
    assert not torch.equal(model.state_dict()["last.bias"], before.last.bias)
    assert not executor._link.device_is_newer


def test_host_changes_reach_the_device_when_they_are_copied(poptorch) -> None:
    model = mlp()
    executor = trainer(poptorch, model, lr=0.0)
    first = executor(*batch(2))[1].item()
    with torch.no_grad():
        model.last.weight.zero_()
        model.last.bias.zero_()
    assert executor(*batch(2))[1].item() == first
    executor.copyWeightsToHost()
    assert model.last.weight.detach().abs().sum() > 0
    with torch.no_grad():
        model.last.weight.zero_()
        model.last.bias.zero_()
    executor.copyWeightsToDevice()
    assert executor(*batch(2))[1].item() == pytest.approx(torch.log(torch.tensor(3.0)).item())


def test_load_state_dict_uploads(poptorch) -> None:
    model, other = mlp(), mlp(seed=7)
    executor = trainer(poptorch, model, lr=0.0)
    executor(*batch(2))
    executor.load_state_dict(other.state_dict())
    assert executor(*batch(2))[1].item() == pytest.approx(other(*batch(2))[1].item())


def test_inference_follows_training(poptorch) -> None:
    model = mlp()
    executor = trainer(poptorch, model)
    inference = poptorch.inferenceModel(executor)
    x, target = batch(2)
    torch.testing.assert_close(inference(x), mlp()(x).detach())
    executor(x, target)
    now = inference(x)
    torch.testing.assert_close(now, copy.deepcopy(model)(x).detach())
    assert not torch.equal(now, mlp()(x))
    executor(x, target)
    executor.destroy()
    torch.testing.assert_close(inference(x), model(x).detach())
    inference.copyWeightsToHost()


def test_wrapping_twice_is_refused(poptorch) -> None:
    model = mlp()
    executor = trainer(poptorch, model)
    assert type(model).__name__ == "PoptorchMlp"
    with pytest.raises(RuntimeError, match="model has already been wrapped"):
        trainer(poptorch, model)
    executor.compile(*batch(2))
    model.destroy()
    assert type(model).__name__ == "Mlp"
    assert type(model.first.weight) is nn.Parameter
    trainer(poptorch, model)(*batch(2))


def test_destroy_before_compilation_leaves_the_model_wrapped(poptorch) -> None:
    model = mlp()
    trainer(poptorch, model).destroy()
    with pytest.raises(RuntimeError, match="already been wrapped"):
        trainer(poptorch, model)


def test_wrapped_models_can_be_copied(poptorch) -> None:
    model = mlp()
    model.register_buffer("note", torch.ones(2))
    executor = trainer(poptorch, model)
    executor(*batch(2))
    made = copy.deepcopy(model)
    assert largest_difference(made, model) == 0.0
    assert type(made.note) is torch.Tensor
    assert torch.equal(made.note, torch.ones(2))


def test_attach_and_detach(poptorch) -> None:
    model = mlp()
    executor = trainer(poptorch, model)
    for call in (
        executor.attachToDevice,
        executor.detachFromDevice,
        executor.copyWeightsToHost,
        executor.copyWeightsToDevice,
        executor.copyNamedBuffersToDevice,
        lambda: executor.rng_state,
        lambda: executor.program,
        lambda: executor.save("nowhere"),
        executor.getTensorNames,
        lambda: executor.getAnchoredTensor("x"),
    ):
        with pytest.raises(poptorch.Error, match="the model has not been compiled yet"):
            call()
    assert not executor.isCompiled()
    executor.compile(*batch(2))
    assert executor.isCompiled()
    assert executor.isAttachedToDevice()
    with pytest.raises(poptorch.Error, match=r"attachToDevice\(\): the model is attached already"):
        executor.attachToDevice()
    executor.detachFromDevice()
    with pytest.raises(poptorch.Error, match=r"detachFromDevice\(\): the model is not attached"):
        executor.detachFromDevice()
    executor(*batch(2))
    assert executor.isAttachedToDevice()


def test_offline_models_compile_only(poptorch) -> None:
    options = poptorch.Options().useOfflineIpuTarget()
    executor = trainer(poptorch, mlp(), options=options)
    with pytest.raises(AssertionError, match=r"offline device .*use compile\(\)"):
        executor(*batch(2))
    executor.compile(*batch(2))
    assert not executor.isAttachedToDevice()
    with pytest.raises(AssertionError, match="attach to an offline device"):
        executor.attachToDevice()


def test_second_compilation_only_warns(poptorch, caplog) -> None:
    executor = trainer(poptorch, mlp())
    executor.compile(*batch(2))
    executor.compile(*batch(4))
    assert "Call to compile() ignored" in caplog.text
    executor(*batch(2))


def test_inference_needs_no_accumulation(poptorch) -> None:
    options = poptorch.Options()
    options.Training.gradientAccumulation(2)
    with pytest.raises(poptorch.Error, match="must be 1 for inference models, got 2"):
        poptorch.inferenceModel(mlp(), options)


def test_models_and_options_are_typed(poptorch) -> None:
    for make in (poptorch.trainingModel, poptorch.inferenceModel):
        with pytest.raises(AssertionError, match=r"Unexpected type .*the model"):
            make(torch.relu)
    with pytest.raises(AssertionError, match=r"Unexpected type .*options"):
        poptorch.inferenceModel(mlp(), {"deviceIterations": 2})


def test_attributes_of_the_model(poptorch) -> None:
    model = mlp()
    executor = trainer(poptorch, model)
    assert executor.first is model.first
    assert executor.model is model
    with pytest.raises(AttributeError, match="absent"):
        executor.absent  # noqa: B018
    with pytest.raises(AttributeError, match="__fspath__"):
        executor.__fspath__  # noqa: B018


def test_save_and_load(poptorch, tmp_path) -> None:
    model = mlp()
    executor = trainer(poptorch, model)
    executor(*batch(2))
    executor.save(str(tmp_path))
    expected = executor(*batch(2, seed=3))[1]
    edited = []
    loaded = poptorch.load(str(tmp_path), edit_opts_fn=edited.append)
    assert loaded.isCompiled()
    assert torch.equal(loaded(*batch(2, seed=3))[1], expected)
    assert isinstance(edited[0], poptorch.Options)
    assert type(model).__name__ == "PoptorchMlp"


def test_offline_executable_becomes_online(poptorch, tmp_path) -> None:
    file = str(tmp_path / "model.poptorch")
    options = poptorch.Options().useOfflineIpuTarget()
    offline = trainer(poptorch, mlp(), options=options)
    offline.compileAndExport(file, *batch(2), export_model=False)
    with pytest.raises(poptorch.Error, match="saved with export_model=False"):
        poptorch.load(file)
    online = trainer(poptorch, mlp())
    online.loadExecutable(file)
    online(*batch(2))
    with pytest.raises(poptorch.Error, match=r"loadExecutable\(\): the model is compiled already"):
        online.loadExecutable(file)
    torch.save({"magic": "poptorch-standin", "version": "3.3.0"}, file)
    with pytest.raises(poptorch.Error, match=r"version 3.3.0, this is 3.4.0\+standin"):
        poptorch.load(file)
    torch.save([1], file)
    with pytest.raises(poptorch.Error, match="not an executable of the poptorch stand-in"):
        poptorch.load(file)


def test_models_that_do_not_pickle(poptorch, tmp_path) -> None:
    model = mlp()
    model.note = lambda: None
    executor = trainer(poptorch, model)
    executor.compile(*batch(2))
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        executor.save(str(tmp_path))
    executor.save(str(tmp_path), export_model=False, save_rng_state=False)
    trainer(poptorch, mlp()).loadExecutable(str(tmp_path))


def test_options_can_be_pickled(poptorch) -> None:
    made = pickle.loads(pickle.dumps(poptorch.Options().deviceIterations(3)))
    assert made.device_iterations == 3


def test_inference_can_be_detached_and_destroyed(poptorch) -> None:
    inference = poptorch.inferenceModel(mlp())
    inference(batch(2)[0])
    inference.detachFromDevice()
    inference.destroy()
    assert not inference.isCompiled()


def test_seed_hook_after_compilation(poptorch) -> None:
    executor = trainer(poptorch, mlp(dropout=0.5), lr=0.0)
    executor.compile(*batch(2))
    executor.setSeedHook(lambda _update, _step, _replica: 5)
    assert torch.equal(executor(*batch(2))[0], executor(*batch(2))[0])


def test_rng_state_restores_dropout(poptorch) -> None:
    model = mlp(dropout=0.5)
    executor = trainer(poptorch, model, lr=0.0)
    executor.compile(*batch(2))
    state = executor.rng_state
    first = executor(*batch(2))[0]
    executor.rng_state = state
    assert torch.equal(executor(*batch(2))[0], first)


def test_counters(poptorch) -> None:
    executor = trainer(poptorch, mlp(), options=poptorch.Options().logCycleCount(True))
    assert executor.getPerfCounters()["input"] == [[]]
    assert executor.getLatency() == (0.0, 0.0, 0.0)
    with pytest.raises(poptorch.Error, match=r"cycleCount\(\): the model has not been compiled"):
        executor.cycleCount()
    with pytest.raises(poptorch.Error, match=r"compilationTime\(\) needs a compiled model"):
        executor.compilationTime()
    executor(*batch(2))
    counters = executor.getPerfCounters()
    assert (len(counters["input"]), len(counters["output_complete"])) == (2, 2)
    assert executor.getLatency()[0] > 0
    assert executor.getComputeLatency()[1] >= executor.getHostIpuLatency()[1] >= 0
    assert executor.getIpuHostLatency()[2] >= 0
    assert executor.cycleCount() > 0
    assert executor.compilationTime() > 0
    plain = trainer(poptorch, mlp())
    plain.compile(*batch(2))
    with pytest.raises(poptorch.Error, match=r"needs Options.logCycleCount\(True\)"):
        plain.cycleCount()


def test_named_buffers(poptorch) -> None:
    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("shift", torch.zeros(1))

        def forward(self, x):
            return x + self.shift

    options = poptorch.Options().updatableNamedBuffers(["shift"])
    model = Shift()
    executor = poptorch.inferenceModel(model, options)
    assert executor(torch.ones(1)).item() == 1.0
    model.shift.fill_(4.0)
    assert executor(torch.ones(1)).item() == 1.0
    executor.copyNamedBuffersToDevice()
    assert executor(torch.ones(1)).item() == 5.0
    plain = poptorch.inferenceModel(Shift())
    plain.compile(torch.ones(1))
    with pytest.raises(AssertionError, match=r"needs Options.updatableNamedBuffers"):
        plain.copyNamedBuffersToDevice()


def test_anchored_gradients(poptorch) -> None:
    options = poptorch.Options()
    options.Training.gradientAccumulation(2)
    options.anchorTensor("g", "Gradient___last.bias", poptorch.OutputMode.All)
    executor = trainer(poptorch, mlp(), options=options)
    executor.compile(*batch(2))
    assert "Gradient___first.weight" in executor.getTensorNames()
    with pytest.raises(poptorch.Error, match="read before the first call"):
        executor.getAnchoredTensor("g")
    executor(*batch(2))
    plain = mlp()
    x, target = batch(2)
    plain(x[:1], target[:1])[1].backward()
    torch.testing.assert_close(executor.getAnchoredTensor("g")[:3], plain.last.bias.grad)
    with pytest.raises(poptorch.Error, match=r"'h' is not anchored, only \['g'\] are"):
        executor.getAnchoredTensor("h")
    options = poptorch.Options()
    options.anchorTensor("x", "encoder/out:0")
    with pytest.raises(poptorch.Error, match="anchored tensor 'x' is unknown: 'encoder/out:0'"):
        trainer(poptorch, mlp(), options=options)(*batch(2))
    assert poptorch.inferenceModel(mlp())(x).shape == (2, 3)
