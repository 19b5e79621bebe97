"""The user's model, batch and random state are as before, also after an error."""

from __future__ import annotations

import gc
import queue
import random
import threading
import weakref
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.bert import modeling_bert

import ipu_pipeline
from ipu_pipeline.capture import capture
from ipu_pipeline.errors import CaptureError
from tests.capture.toys import WIDTH, Layer, batch, toy
from tests.tiny_models import TINY


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "call": (nn.Module.__call__, nn.Module._call_impl),
        "apply": torch.autograd.Function.__dict__["apply"],
        "is_tracing": getattr(modeling_bert, "is_tracing", None),
        "modes": [module.training for module in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "parameters": [(id(p), p._version, p.requires_grad) for p in model.parameters()],
        "buffers": [id(b) for b in model.buffers()],
        "keys": list(model.state_dict()),
        "grad": [p.grad for p in model.parameters()],
        "use_cache": getattr(getattr(model, "config", None), "use_cache", None),
        "random": (random.getstate(), np.random.get_state()[1].tolist()),
        "torch random": torch.get_rng_state().tolist(),
        "seeds of GPUs that are not used yet": list(torch.cuda._lazy_seed_tracker.get_calls()),
        "grad mode": torch.is_grad_enabled(),
    }


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def normalised(self, x):
    h = self.norm(self.layers[0](x))
    h = h * torch.rand(()) * random.random() * float(np.random.rand())
    if self.fails:
        raise ValueError("broken glue")
    return {"loss": self.layers[1](h).square().mean()}


@pytest.mark.parametrize("fails", [False, True])
def test_toy_with_batch_norm_and_random_numbers(fails: bool) -> None:
    model = toy(normalised)
    model.norm = nn.BatchNorm1d(WIDTH)
    model.fails = fails
    model.layers[0].eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before, state = snapshot(model), values(model)
    if fails:
        with pytest.raises(ValueError, match="broken glue"):
            capture(model, batch())
    else:
        capture(model, batch(), self_check=False).graph  # noqa: B018
    assert snapshot(model) == before
    assert all(torch.equal(value, state[name]) for name, value in values(model).items())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())


@pytest.mark.parametrize("name", ["gpt2-lm", "convnext", "bert-qa"])
def test_whole_capture_with_the_self_check(name: str) -> None:
    model, inputs = TINY[name].build(dropout=True)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = True
    before, state = snapshot(model), values(model)
    copies = {key: value.clone() for key, value in inputs.items()}
    capture(model, inputs).graph  # noqa: B018
    assert snapshot(model) == before
    assert all(torch.equal(value, state[key]) for key, value in values(model).items())
    assert all(torch.equal(inputs[key], value) for key, value in copies.items())


def test_a_buffer_that_is_only_read_is_not_written_to() -> None:
    model = toy(lambda self, x: {"loss": self.layers[1](self.layers[0](x) + self.offset).sum()})
    model.register_buffer("offset", torch.ones(WIDTH))
    capture(model, batch()).graph  # noqa: B018
    assert model.offset._version == 0


def test_use_cache_comes_back_after_a_refusal() -> None:
    model, inputs = TINY["gpt2-lm"].build()
    model.config.use_cache = True
    before = snapshot(model)
    with pytest.raises(CaptureError, match="no loss"):
        capture(model, {"input_ids": inputs["input_ids"]})
    assert snapshot(model) == before


def test_what_hooks_and_forward_keep_in_python_is_put_back() -> None:
    class Counting(Layer):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    seen: list[float] = []
    model = toy(lambda self, x: {"loss": self.layers[1](self.layers[0](x)).sum()}, Counting)
    model.layers[0].register_forward_hook(lambda _m, _i, o: seen.append(float(o.detach().max())))
    model.table = {"first": [1]}
    model.register_forward_pre_hook(lambda m, _: m.table.update(new=m.table["first"].append(2)))
    plan = ipu_pipeline.plan(model, {"x": batch()["x"][:1]}, num_stages=1, microbatches=2)
    assert (seen, model.table) == ([], {"first": [1]})
    assert [layer.calls for layer in model.layers] == [0, 0]
    with ipu_pipeline.compile(model, plan) as executable:
        executable.forward_backward(batch())
    assert len(seen) == 2
    assert [layer.calls for layer in model.layers] == [2, 2]


def test_tensors_that_hooks_write_to_are_put_back() -> None:
    averages = {"first": torch.ones(WIDTH)}
    model = toy(lambda self, x: {"loss": self.layers[1](self.layers[0](x)).sum()})

    def average(_m: nn.Module, _i: Any, output: Tensor) -> None:
        averages["first"].lerp_(output.detach().mean(0), 0.1)

    model.layers[0].register_forward_hook(average)
    plan = ipu_pipeline.plan(model, {"x": batch()["x"][:1]}, num_stages=1, microbatches=2)
    assert torch.equal(averages["first"], torch.ones(WIDTH))
    with ipu_pipeline.compile(model, plan) as executable:
        executable.forward_backward(batch())
    assert not torch.equal(averages["first"], torch.ones(WIDTH))


@pytest.mark.parametrize("labels", [torch.tensor([0, 1]), torch.tensor([[1.0, 0, 1], [0, 1, 0]])])
def test_a_config_that_forward_writes_to_is_put_back(labels: Tensor) -> None:
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_labels=3,
        intermediate_size=16, max_position_embeddings=16,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).train()
    before = config.to_dict()
    assert capture(model, {"input_ids": torch.ones(2, 8, dtype=torch.long), "labels": labels})
    assert config.to_dict() == before
    assert config.problem_type is None


def test_is_tracing_comes_back() -> None:
    import transformers.masking_utils as masking

    assert "is_tracing" in vars(masking), "transformers renamed what the capture switches"
    before = masking.is_tracing
    model, inputs = TINY["llama"].build()
    capture(model, inputs, self_check=False)
    assert masking.is_tracing is before


def test_running_statistics_of_resnet_are_put_back() -> None:
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=3
    )
    model = transformers.ResNetForImageClassification(config).train()
    state = values(model)
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 2])}
    captured = capture(model, inputs)
    captured.graph  # noqa: B018
    assert all(torch.equal(value, state[name]) for name, value in values(model).items())
    captured.run(inputs)
    ran = values(model)
    model.load_state_dict(state)
    model(**inputs)
    assert all(torch.equal(value, ran[name]) for name, value in values(model).items())


def test_hooks_of_the_user_run_once_per_call() -> None:
    model = toy(lambda self, x: {"loss": self.layers[1](self.layers[0](x)).sum()})
    seen: list[str] = []
    model.layers[0].register_forward_hook(lambda *_: seen.append("leaf"))
    model.layers[1].linear.register_forward_hook(lambda *_: seen.append("inside"))
    captured = capture(model, batch(), self_check=False)
    assert seen == []
    captured.run(batch())
    assert seen == ["leaf", "inside"]


def test_no_activation_stays_alive() -> None:
    made = queue.SimpleQueue[weakref.ref[Tensor]]()  # a list would be put back

    class Watched(Layer):
        def forward(self, x: Tensor) -> Tensor:
            result = self.linear(x)
            made.put(weakref.ref(result))
            return result

    model = toy(lambda self, x: {"loss": self.layers[1](self.layers[0](x)).sum()}, Watched)
    gc.collect()
    gc.disable()
    try:
        captured = capture(model, batch(), self_check=False)
        assert captured.programs
        assert made.qsize() == 2
        assert [made.get()() for _ in range(2)] == [None, None]
    finally:
        gc.enable()


def test_captures_on_two_threads_do_not_disturb_each_other() -> None:
    call = nn.Module._call_impl
    found: dict[str, list[str]] = {}
    # Made before the threads begin: two models made at once can leave torch.nn.init replaced by
    # transformers' own functions for good.
    made = {name: TINY[name].build() for name in ("bert-qa", "vit", "gpt2-lm")}

    def work(name: str) -> None:
        model, inputs = made[name]
        for _ in range(3):
            found[name] = [p.name for p in capture(model, inputs, self_check=False).programs]

    threads = [threading.Thread(target=work, args=(name,)) for name in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert nn.Module._call_impl is call
    for name in made:
        model, inputs = TINY[name].build()
        assert found[name] == [p.name for p in capture(model, inputs).programs]


def test_the_public_name_can_be_called_although_it_is_a_package_too() -> None:
    model, inputs = TINY["vit"].build()
    assert ipu_pipeline.plan is not None  # imports the package ipu_pipeline.capture
    captured = ipu_pipeline.capture(model, inputs)
    assert isinstance(captured, ipu_pipeline.CapturedModel)
