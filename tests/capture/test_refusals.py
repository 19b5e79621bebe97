"""Everything that cannot be replayed is refused by name, before anything runs wrongly."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, fx, nn

from ipu_pipeline.capture import capture
from ipu_pipeline.capture import check as check_module
from ipu_pipeline.capture.captured import CapturedModel
from ipu_pipeline.capture.values import named_tensors
from ipu_pipeline.errors import CaptureError, GuardError
from tests.capture.toys import Layer, assert_replays, batch, last, toy
from tests.tiny_models import TINY, VOCAB


def plain(self, x):
    return {"loss": self.layers[1](self.layers[0](x)).square().mean()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_tensor_stored_on_the_side_by_a_block(dtype: torch.dtype) -> None:
    class Secret(Layer):
        def forward(self, x: Tensor) -> Tensor:
            self.side = (x * 10).to(dtype)
            return self.linear(x)

    def body(self, x):
        return {"loss": (self.layers[1](self.layers[0](x)) * self.layers[0].side).sum()}

    model = toy(body, Secret)
    captured = capture(model, batch())
    assert_replays(model, captured, batch(1))
    model.layers[0].forward = model.layers[0].linear.forward
    with pytest.raises(GuardError, match=r"Secret put a tensor in an attribute .* and none for"):
        captured.run(batch(1))


def test_constants_of_the_model_are_fine_as_long_as_they_stay_what_they_are() -> None:
    model = toy(lambda self, x: {"loss": (self.layers[0](x) * self.table).sum()})
    for table in (torch.arange(4), torch.arange(4.0)):
        model.table = table
        assert capture(model, batch()).notes == ()
    model.table = torch.arange(4.0, requires_grad=True)
    with pytest.raises(CaptureError, match="neither a parameter, a buffer, an input"):
        capture(model, batch())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda h: torch.nested.nested_tensor(list(h)), "passes a nested tensor .*: pad it"),
        (torch.Generator, "passes a Generator object .*: draw from torch's own generator"),
        (lambda h: torch.nn.utils.rnn.pack_sequence(list(h)), "a PackedSequence object .*: keep w"),
    ],
)
def test_what_stages_do_not_exchange(make: Any, message: str) -> None:
    class Taking(Layer):
        def forward(self, x: Tensor, shared: object = None) -> Tensor:
            return self.linear(x)

    def body(self, x):
        h = self.layers[0](x)
        shared = make() if make is torch.Generator else make(h.detach())
        return {"loss": self.layers[1](h, shared).square().mean()}

    with pytest.raises(CaptureError, match=message):
        capture(toy(body, Taking), batch())


def test_inference_mode_between_blocks() -> None:
    def body(self, x):
        with torch.inference_mode():
            target = self.layers[1](x)
        return {"loss": (self.layers[0](x) - target.clone()).square().mean()}

    with pytest.raises(CaptureError, match=r"made under torch.inference_mode .* torch.no_grad"):
        capture(toy(body), batch())


def test_spec_augment_of_wav2vec2() -> None:
    config = transformers.Wav2Vec2Config(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, conv_dim=(8, 8), conv_stride=(4, 4), conv_kernel=(8, 8),
        num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        mask_time_prob=0.5, mask_time_length=2, layerdrop=0.0,
    )  # fmt: skip
    model = transformers.Wav2Vec2ForCTC(config).train()
    inputs = {"input_values": torch.randn(2, 800), "labels": torch.randint(1, 9, (2, 4))}
    assert "mask_time_prob=0" in capture(model, inputs).glue.frozen  # drawn anew in every run
    model.config.mask_time_prob = 0.0
    assert any(p.name.endswith("layers.1") for p in capture(model, inputs).programs)
    model.config.layerdrop = 0.1
    with pytest.raises(CaptureError, match="layerdrop=0"):
        capture(model, inputs)


def test_gradient_checkpointing() -> None:
    model, inputs = TINY["bert-qa"].build()
    name = next(  # of older transformers the second
        name
        for name in ("activation_checkpointing", "gradient_checkpointing")
        if hasattr(model, f"{name}_enable")
    )
    getattr(model, f"{name}_enable")()
    with pytest.raises(CaptureError, match=r"call model\.activation_checkpointing_disable\(\)"):
        capture(model, inputs)
    getattr(model, f"{name}_disable")()
    assert capture(model, inputs).training


def test_training_without_labels() -> None:
    model, inputs = TINY["bert-qa"].build()
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(CaptureError, match=r"no loss for the batch \(input_ids, attention_mask\)"):
        capture(model, inputs)


@pytest.mark.parametrize("value", [[torch.zeros(2)], {"boxes": torch.zeros(2)}])
def test_tensors_inside_structures_of_the_batch(value) -> None:
    with pytest.raises(CaptureError, match=f"'labels' of the batch is a {type(value).__name__}"):
        capture(toy(plain), batch(labels=value))


def fixed_noise(x):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return x + torch.randn(4)


def twice_the_same(x):
    state = torch.get_rng_state()
    first = torch.rand(4)
    torch.set_rng_state(state)
    return x + first * torch.rand(4)


class Noisy(Layer):
    add: Any = None

    def forward(self, x):
        return super().forward(self.add(x))


@pytest.mark.parametrize(
    ("add", "message"),
    [(fixed_noise, r"the model seeds torch \(torch.manual_seed\(3\)\) in its forward pass"),
     (twice_the_same, r"the model puts back a state of torch's random numbers \(fork_rng, set_")],
)  # fmt: skip
def test_seeds_in_a_forward_pass(add, message) -> None:
    with pytest.raises(CaptureError, match=message):
        capture(toy(lambda self, x: last(self, add(self.layers[0](x)))), batch())
    with pytest.raises(CaptureError, match=message):
        capture(toy(plain, type("Noisy", (Noisy,), {"add": staticmethod(add)})), batch())


def test_a_seed_that_was_drawn_is_no_promise() -> None:
    def body(self, x):
        torch.manual_seed(torch.seed())
        return last(self, self.layers[0](x))

    assert len(capture(toy(body), batch()).programs) == 2


def test_empty_batch_and_unknown_granularity() -> None:
    with pytest.raises(CaptureError, match="the example batch is empty"):
        capture(toy(plain), {})
    with pytest.raises(ValueError, match="granularity 'word' is unknown; use one of layer"):
        capture(toy(plain), batch(), granularity="word")  # type: ignore[arg-type]


def test_model_that_calls_no_module() -> None:
    model = toy(lambda self, x: {"loss": x.sum()})
    with pytest.raises(CaptureError, match="calls no module with parameters"):
        capture(model, batch())


def test_output_of_a_strange_type() -> None:
    model = toy(lambda self, x: SimpleNamespace(loss=self.layers[0](x).sum()))
    with pytest.raises(CaptureError, match="the model returns a SimpleNamespace; it must return"):
        capture(model, batch())
    assert [name for name, _ in named_tensors((torch.ones(2), None, torch.ones(()), 3))] == [
        "output_0", "output_2",
    ]  # fmt: skip


def test_assigned_data_of_a_tensor() -> None:
    def body(self, x):
        h = self.layers[0](x)
        h.data = h.data * 2
        return {"loss": h.sum()}

    with pytest.raises(CaptureError, match=r"assigns an attribute of a tensor \(data\)"):
        capture(toy(body), batch())


def test_value_read_on_meta() -> None:
    def body(self, x):
        h = self.layers[0](x)
        return {"loss": h.sum() * h.max().item()}

    with pytest.raises(
        CaptureError, match=r"reads tensor values in Python .* capture it with real"
    ):
        capture(toy(body).to("meta"), batch())


def test_other_errors_of_the_model_pass_through() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        capture(toy(plain), {"x": torch.zeros(2, 7)})


# ---- the self-check -----------------------------------------------------------------------


def changed(captured: CapturedModel, target: str, change) -> None:
    """Apply ``change`` to the only node with ``target``, wherever it is."""
    for program in captured.programs:
        for node in program.module.graph.nodes:
            if node.op in ("call_method", "call_function") and node.target == target:
                change(node)
                program.module.recompile()
                return
    raise AssertionError(f"no node {target}")


def scaled(self, x):
    return {"loss": self.layers[1](self.layers[0](x).mul(2.0).detach()).square().mean()}


def test_the_self_check_catches_another_number() -> None:
    captured = capture(toy(scaled), batch())

    def change(node: fx.Node) -> None:
        node.args = (node.args[0], 2.01)

    changed(captured, "mul", change)
    with pytest.raises(CaptureError, match=r"captured Toy differs from the model on other data: "
                       r"loss by 0\.0\d+ of its scale \(allowed 0\.0001\)"):  # fmt: skip
        check_module.check_capture(captured, batch())


def test_the_self_check_catches_a_gradient_that_the_model_does_not_have() -> None:
    captured = capture(toy(scaled), batch())
    changed(captured, "detach", lambda node: setattr(node, "target", "contiguous"))
    with pytest.raises(CaptureError, match=r"gradient of layers\.0\.linear\.(weight|bias) by "):
        check_module.check_capture(captured, batch())


def test_the_self_check_catches_a_lost_gradient() -> None:
    captured = capture(toy(plain), batch())
    changed(captured, "square", lambda node: setattr(node, "args", (_detached(node),)))
    with pytest.raises(CaptureError, match=r"gradient of layers\.0\.linear\.(weight|bias) by "):
        check_module.check_capture(captured, batch())


def _detached(node: fx.Node) -> fx.Node:
    layer = next(n for n in node.graph.nodes if n.op == "call_module")
    with node.graph.inserting_before(layer):
        cut = node.graph.call_method("detach", (layer.args[0],))
    layer.args = (cut,)
    return node.args[0]


def test_capture_runs_the_self_check(monkeypatch: pytest.MonkeyPatch) -> None:
    original = CapturedModel.run
    monkeypatch.setattr(
        CapturedModel, "run",
        lambda self, inputs: {name: value * 2 for name, value in original(self, inputs).items()},
    )  # fmt: skip
    model, inputs = TINY["bert-qa"].build()
    with pytest.raises(CaptureError, match="the captured BertForQuestionAnswering differs from"):
        capture(model, inputs)
    assert capture(model, inputs, self_check=False).notes == ()


def test_batch_that_the_model_refuses_when_altered_is_checked_as_it_is() -> None:
    def body(self, x, order):
        if not bool((order[:-1] <= order[1:]).all()):
            raise IndexError("order must rise")
        return {"loss": self.layers[1](self.layers[0](x)).square().mean()}

    captured = capture(toy(body), batch(order=torch.tensor([1, 2])))
    assert captured.notes[0].startswith("checked on the example batch only")
    assert "order must rise" in captured.notes[0]


def test_altered_data_differ_and_keep_shapes() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 99, (1, 8), generator=generator)
    boxes = torch.arange(32).reshape(1, 8, 4)
    inputs = {"input_ids": ids, "attention_mask": torch.ones(1, 8), "bbox": boxes,
              "position_ids": ids, "scale": torch.tensor(2.0), "flag": True}  # fmt: skip
    other = check_module.altered(inputs)
    assert torch.equal(other["input_ids"], ids.flip(1))
    assert torch.equal(other["bbox"], boxes.flip(1))
    assert other["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1, 0, 0]]
    assert torch.equal(other["position_ids"], ids)
    assert (other["scale"], other["flag"]) == (inputs["scale"], True)
    two = check_module.altered({"pixel_values": boxes.reshape(2, 4, 4)})
    assert torch.equal(two["pixel_values"], boxes.reshape(2, 4, 4).flip(0))


def test_dropout_is_off_during_the_check_only() -> None:
    model, inputs = TINY["bert-qa"].build(dropout=True)
    captured = capture(model, inputs)
    torch.manual_seed(0)
    first = captured.run(inputs)["loss"]
    assert not torch.equal(first, captured.run(inputs)["loss"])
    assert all(m.p == 0.1 for m in model.modules() if isinstance(m, nn.Dropout))


def with_fast_weights(self, layer: nn.Module, x: Tensor) -> Tensor:
    weights = {n: p * self.scale for n, p in layer.named_parameters()}
    return torch.func.functional_call(layer, weights, (x,))


def test_a_block_that_is_called_with_other_parameters_is_refused() -> None:
    class Fast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.scale = Layer(), nn.Parameter(torch.tensor(1.5))

        def forward(self, x: Tensor) -> Tensor:
            return with_fast_weights(self, self.inner, x)

    def body(self, x):
        return {"loss": with_fast_weights(self, self.layers[1], self.layers[0](x)).square().mean()}

    model = toy(body)
    model.scale = nn.Parameter(torch.tensor(1.5))
    message = (
        "'layers.1' is called with another 'linear.weight' than its own .* a module of its own"
    )
    with pytest.raises(CaptureError, match=message):
        capture(model, batch())
    model = toy(plain, Fast)  # the remedy
    assert_replays(model, capture(model, batch()), batch(1))
