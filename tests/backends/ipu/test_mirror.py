"""The model here and the one that the worker builds: what is described, refused and compared."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from ipu_pipeline.backends.ipu.mirror import HostWeights, check_labels, compare, described
from ipu_pipeline.backends.ipu.runtime.messages import paged
from ipu_pipeline.backends.ipu.runtime.sdk_model import ModelError, SdkModel
from ipu_pipeline.errors import LoweringError
from tests.backends.ipu.emulated import ALL, assert_same_weights
from tests.tiny_models import TINY


def _bert(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return transformers.BertForQuestionAnswering(TINY["bert-qa"].config(**changes))


@pytest.mark.parametrize("name", ["bert-mlm", "t5", "lxmert-qa"])
def test_the_worker_builds_the_same_model(name: str) -> None:
    model, batch = TINY[name].build()
    for parameter in list(model.parameters())[:2]:
        parameter.requires_grad_(False)
    found = described(model)
    built = SdkModel(found["model"], found["parameters"], found["buffers"])
    built.write({n: v.detach() for n, v in HostWeights(model).tensors().items()})
    built.finish()
    assert_same_weights(built.model, model)
    assert [p.requires_grad for p in built.model.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]
    torch.testing.assert_close(built.model.train()(**batch).loss, model(**batch).loss)
    assert built.names() == {name: name for name, _ in model.named_parameters()}
    with pytest.raises(ModelError, match="the model has no parameter or buffer 'nowhere'"):
        built.write({"nowhere": torch.ones(1)})


class Own(transformers.BertForQuestionAnswering):
    """A class of the user's own, in a module that can be imported."""


def _without_config(_model: nn.Module) -> nn.Module:
    return nn.Linear(2, 2)


def _local_class(model: nn.Module) -> nn.Module:
    class Local(transformers.BertForQuestionAnswering):
        pass

    model.__class__ = Local
    return model


def _hooked(model: nn.Module) -> nn.Module:
    model.bert.register_forward_hook(print)
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without_config, r"Linear has no transformers configuration, from which the worker"),
        (_local_class, r"Local is defined in .*cannot import it; define it at the top of a"),
        (lambda model: model.to("meta"), r"the model has parameters on meta; the worker is sent"),
        (_hooked, r"'bert' has a forward hook, which stays in this process"),
    ],
)
def test_models_that_cannot_be_described(
    change: Callable[[nn.Module], nn.Module], message: str
) -> None:
    with pytest.raises(LoweringError, match=message):
        described(change(_bert()))


def test_a_class_of_ones_own() -> None:
    model = Own(TINY["bert-qa"].config())
    found = described(model)
    assert type(SdkModel(found["model"], found["parameters"], found["buffers"]).model) is Own


def _edit(description: Any, what: str, value: Any) -> None:
    description["model"][what] = value


def _rename(description: Any, *names: str) -> None:
    about = description["parameters"]
    for name in names:
        about[f"{name}.other"] = {**about.pop(name), "same_as": f"{name}.other"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: _edit(d, "class", "NoModel"), r"transformers .* of .* has no NoModel; install"),
        (
            lambda d: _edit(d, "module", "no_module"),
            r"the model's class BertForQuestionAnswering cannot be imported from 'no_module' under",
        ),
        (
            lambda d: _edit(d, "config", d["model"]["config"].replace('"gelu"', '"no_such"')),
            r"cannot build BertForQuestionAnswering from its configuration: KeyError",
        ),
        (
            lambda d: (
                _edit(d, "changed", ["new_trick"]),
                _edit(d, "config", d["model"]["config"].replace("{", '{"new_trick": 3,', 1)),
            ),
            r"does not know what the configuration sets: new_trick=3; leave it at the default",
        ),
        (
            lambda d: _rename(d, *(f"bert.encoder.layer.{n}.output.dense.bias" for n in (0, 1))),
            r"parameter 'bert.encoder.layer.0.output.dense.bias.other' is missing in the SDK's",
        ),
        (
            lambda d: d["parameters"].pop("qa_outputs.bias"),
            r"parameter 'qa_outputs.bias' is only in the SDK's model",
        ),
        (
            lambda d: d["parameters"]["qa_outputs.bias"].update(shape=[3]),
            r"parameter 'qa_outputs.bias' is \[3\] here, \[2\] there",
        ),
        (
            lambda d: d["buffers"].update(scale={"shape": [1], "dtype": "float32"}),
            r"buffer 'scale' is missing in the SDK's model",
        ),
    ],
)
def test_what_the_sdks_transformers_lacks(change: Callable[[Any], None], message: str) -> None:
    found = copy.deepcopy(described(_bert()))
    change(found)
    with pytest.raises(ModelError, match=message):
        SdkModel(found["model"], found["parameters"], found["buffers"])


def test_tying_is_the_users() -> None:
    model, _ = TINY["bert-mlm"].build()
    found = described(model)
    head = found["parameters"]["cls.predictions.decoder.weight"]
    assert head["same_as"] == "bert.embeddings.word_embeddings.weight"
    head["same_as"] = "cls.predictions.decoder.weight"
    with pytest.raises(ModelError, match=r"'cls.predictions.decoder.weight' is 'bert.embeddings.w"):
        SdkModel(found["model"], found["parameters"], found["buffers"])
    found = described(_bert())
    first, second = (f"bert.encoder.layer.{n}.output.dense.bias" for n in (0, 1))
    found["parameters"][second]["same_as"] = first
    made = SdkModel(found["model"], found["parameters"], found["buffers"]).model
    assert made.get_parameter(first) is made.get_parameter(second)


def test_another_name_is_found_by_its_shape() -> None:
    """Where no other parameter could be meant; what the model computes must be compared then."""
    found = described(_bert())
    _rename(found, "qa_outputs.bias")
    made = SdkModel(found["model"], found["parameters"], found["buffers"])
    assert made.names()["qa_outputs.bias"] == "qa_outputs.bias.other"
    assert made.has_guesses


def test_old_names_of_a_weight_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = transformers.BertForQuestionAnswering.__init__

    def older(self: Any, config: Any) -> None:
        plain(self, config)
        self.qa_outputs = torch.nn.Module()
        self.qa_outputs.weight_g = nn.Parameter(torch.ones(2, 1))

    monkeypatch.setattr(transformers.BertForQuestionAnswering, "__init__", older)
    found = described(_bert())
    ours = "qa_outputs.parametrizations.weight.original0"
    about = found["parameters"].pop("qa_outputs.weight_g")
    found["parameters"][ours] = {**about, "same_as": ours}
    made = SdkModel(found["model"], found["parameters"], found["buffers"])
    assert made.names()["qa_outputs.weight_g"] == ours
    assert not made.has_guesses


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"logits": torch.ones(2)}, r"the model returns loss here and logits under 4\.29"),
        (
            {"loss": torch.tensor(1.1)},
            r"computes another 'loss' here than under 4\.29, up to 0\.1 ",
        ),
        ({"loss": torch.ones(2)}, r"of shape \(\) here, \(2,\) there, with the same weights"),
    ],
)
def test_another_result_is_refused(theirs: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(LoweringError, match=message):
        compare({"loss": torch.tensor(1.0)}, theirs, "4.29")
    compare({"loss": torch.tensor(1.0)}, {"loss": torch.tensor(1.0 + 1e-6)}, "4.29")


def test_labels_that_versions_read_differently() -> None:
    model, batch = ALL["wav2vec2-ctc"].build()
    check_labels(model, batch)
    blank = {"labels": batch["labels"].clone()}
    blank["labels"][0, 0] = 0
    with pytest.raises(LoweringError, match=r"labels hold 0, .* pad labels with -100"):
        check_labels(model, blank)
    check_labels(ALL["hubert"].build()[0], blank)  # no CTC, though its config says how


def test_weights_changed_here_are_seen_by_name() -> None:
    model = _bert()
    weights = HostWeights(model)
    weights.same()
    assert weights.changed() == {}
    with torch.no_grad():
        model.qa_outputs.bias.add_(1)
    assert list(weights.changed()) == ["qa_outputs.bias"]
    weights.same()
    model.qa_outputs.bias = nn.Parameter(torch.zeros(2))
    assert list(weights.changed()) == ["qa_outputs.bias"]
    model.qa_outputs.bias.requires_grad_(False)
    with pytest.raises(LoweringError, match=r"requires_grad of a parameter was changed after"):
        weights.changed()


def test_pages_hold_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ipu_pipeline.backends.ipu.runtime.messages.PAGE_BYTES", 100)
    sizes = {"a": 10, "b": 10, "c": 50, "d": 1}
    pages = list(paged({name: torch.ones(size) for name, size in sizes.items()}))
    assert [list(page) for page in pages] == [["a", "b"], ["c"], ["d"]]
