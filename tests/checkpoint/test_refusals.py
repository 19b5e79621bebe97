import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    BertForMaskedLM,
    BertForQuestionAnswering,
)

from ipu_pipeline import checkpoint
from ipu_pipeline.checkpoint import check_share, is_complete, read_checkpoint, write_checkpoint
from ipu_pipeline.errors import CheckpointError
from tests.checkpoint.models import Tied, assert_untouched, bert, reseal


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "optimizer.json", "config.json"]
)
def test_truncated_altered_and_missing_files(saved, name):
    path = saved / name
    content = path.read_bytes()
    path.write_bytes(content[:-3])
    assert not is_complete(saved)
    assert_untouched(saved, f"damaged: {name} has .* bytes instead of {len(content)}; load an")
    path.write_bytes(content[:-3] + b"abc")
    assert is_complete(saved)
    assert_untouched(saved, f"damaged: {name} does not match its checksum")
    path.unlink()
    assert not is_complete(saved)
    assert_untouched(saved, f"damaged: {name} is missing")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema_version": 1}'])
def test_a_manifest_that_cannot_be_read(saved, text):
    (saved / "checkpoint.json").write_text(text)
    assert_untouched(saved, "checkpoint.json cannot be read")


@pytest.mark.parametrize("name", ["checkpoint.json", "optimizer.json", "model.safetensors"])
def test_what_the_system_does_not_give_is_named(saved, name, monkeypatch):
    def refusing(function):
        def refuse(path, *args, **kwargs):
            if path.name == name:
                raise PermissionError(13, "Permission denied", str(path))
            return function(path, *args, **kwargs)

        return refuse

    for function in ("open", "read_bytes"):  # root may read everything
        monkeypatch.setattr(Path, function, refusing(getattr(Path, function)))
    message = rf"cannot read .*/{name}: Permission denied; change its permissions, or copy the"
    assert_untouched(saved, message)
    if name == "checkpoint.json":  # it may be complete, so it is not passed over
        with pytest.raises(CheckpointError, match=message):
            is_complete(saved)


@pytest.mark.parametrize("name", ["checkpoint.json", "optimizer.json", "model.safetensors"])
def test_what_is_no_file_is_damage(saved, name):
    (saved / name).unlink()
    (saved / name).mkdir()
    assert not is_complete(saved)
    assert_untouched(saved, rf"c is damaged: {name} (is missing|cannot be read .*it is a folder)")


def test_an_altered_manifest(saved):
    path = saved / "checkpoint.json"
    path.write_text(path.read_text().replace('"global_step": 7', '"global_step": 8'))
    assert_untouched(saved, "checkpoint.json does not match its own checksum")


def test_no_checkpoint_at_all(tmp_path):
    assert not is_complete(tmp_path)
    assert_untouched(tmp_path, "is not a complete checkpoint: checkpoint.json is not there")


def test_a_newer_schema(saved, monkeypatch):
    monkeypatch.setattr(checkpoint.manifest, "SCHEMA_VERSION", 3)
    reseal(saved, lambda body: None)
    monkeypatch.undo()
    assert_untouched(saved, "has checkpoint schema 3 .* reads up to 2; update ipu-pipeline")


def test_another_model_names_the_first_parameters_that_differ(saved):
    assert_untouched(
        saved,
        r"encoder.layer.2.attention.self.query.weight is absent in the checkpoint and \[16, 16\] "
        r"here; .* \(and 13 more\); build the model as it was",
        model=bert(layers=3),
    )
    model = bert(cls=BertForQuestionAnswering)
    assert_untouched(saved, "checkpoint of BertForMaskedLM, the model is BertForQ", model=model)


def test_other_settings_are_announced(saved, trained, caplog):
    model, optimizer = trained
    read_checkpoint(saved, model=model, optimizer=optimizer)
    assert not caplog.records
    model.config.hidden_dropout_prob = 0.5
    model.config.num_attention_heads = 4
    read_checkpoint(saved, model=model, optimizer=optimizer)
    assert "hidden_dropout_prob was 0.1 and is 0.5" in caplog.text
    assert "num_attention_heads was 2 and is 4" in caplog.text
    assert len(caplog.records) == 1
    assert ";" in caplog.text


def test_another_class_with_the_same_parameters(saved):
    class Renamed(BertForMaskedLM):
        pass

    assert_untouched(
        saved, "the model is Renamed: the parameters agree; build", model=bert(cls=Renamed)
    )


def test_weights_that_do_not_fill_the_model(trained, saved):
    """The manifest fits, the file does not: only a broken writer can do this."""
    tensors = {"bert.embeddings.word_embeddings.weight": torch.zeros(3), "odd": torch.zeros(1)}
    save_file(tensors, saved / "model.safetensors")
    reseal(saved, lambda body: None)
    assert_untouched(saved, "do not fit BertForMaskedLM: .* is missing; .*load it into the model")


def test_another_kind_of_optimizer(saved):
    model = bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert_untouched(saved, "the state of AdamW, the optimizer is SGD", model, optimizer)


def test_a_group_that_would_need_two_values(tmp_path):
    model = Tied()
    optimizer = torch.optim.SGD(
        [{"params": [model.first.weight], "lr": 0.1}, {"params": [model.first.bias], "lr": 0.2}]
    )
    path = write_checkpoint(tmp_path / "c", model=model, optimizer=optimizer, global_step=0)
    joined = torch.optim.SGD([model.first.weight, model.first.bias], lr=0.1)
    with pytest.raises(CheckpointError, match=r"under different lr \(0.1 and 0.2\); keep param"):
        read_checkpoint(path, model=model, optimizer=joined)


def test_no_optimizer_state(tmp_path, trained):
    model, optimizer = trained
    path = write_checkpoint(tmp_path / "c", model=model, optimizer=None, global_step=0)
    assert_untouched(path, "holds no optimizer state.* optimizer=None", model, optimizer)


# ---------------------------------------------------------------- what cannot be written


def test_a_foreign_parameter_in_the_optimizer(tmp_path):
    model = bert()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2, 3))], lr=0.1)
    with pytest.raises(CheckpointError, match=r"group 0 .* shape \(2, 3\) that is not one of Bert"):
        write_checkpoint(tmp_path / "c", model=model, optimizer=optimizer, global_step=0)
    assert list(tmp_path.iterdir()) == []


def test_settings_and_extra_that_json_cannot_hold(tmp_path):
    model = Tied()
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "odd": object()}], lr=0.1)
    with pytest.raises(CheckpointError, match="SGD has settings or state that JSON cannot hold"):
        write_checkpoint(tmp_path / "c", model=model, optimizer=optimizer, global_step=0)
    with pytest.raises(CheckpointError, match=r"extra must be JSON data .*; convert tensors"):
        write_checkpoint(
            tmp_path / "c", model=model, optimizer=None, global_step=0, extra={"x": {1}}
        )
    assert list(tmp_path.iterdir()) == []


def test_extra_that_has_no_one_meaning(tmp_path):
    deep: list = []
    for _ in range(200):
        deep = [deep]
    circle: dict = {}
    circle["x"] = circle
    for odd, why in (
        (deep, "more than 100 levels"), ({1: 2, "1": 3}, "key '1' twice"), (circle, "Circular"),
        ("\ud800", "half of a character"), (10**5000, "Exceeds the limit"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=rf"extra must be JSON data .*{why}"):
            write_checkpoint(
                tmp_path / "c", model=Tied(), optimizer=None, global_step=0, extra={"x": odd}
            )


def test_numbers_of_every_kind_come_back(tmp_path):
    extra = {"losses": [math.nan, math.inf, -math.inf], "generator": {"state": 2**127 + 1}}
    write_checkpoint(tmp_path / "c", model=Tied(), optimizer=None, global_step=0, extra=extra)
    found = read_checkpoint(tmp_path / "c", model=Tied(), optimizer=None).extra
    assert repr(found) == repr(extra)


@pytest.mark.parametrize("rate", [math.nan, math.inf])
def test_a_learning_rate_that_is_not_finite_is_damage(tmp_path, rate):
    """SGD itself would take it."""
    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["lr"] = rate
    write_checkpoint(tmp_path / "c", model=model, optimizer=optimizer, global_step=0)
    own = torch.optim.SGD(model.parameters(), lr=0.1)
    message = rf"a setting of the optimizer is 0\.1 here and {rate} there"
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "c", model=model, optimizer=own)


def test_ranks_check_each_file_once(saved):
    names = [path.name for path in saved.iterdir() if path.name != "checkpoint.json"]
    assert len(names) > 3
    for name in names:
        content = (saved / name).read_bytes()
        (saved / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        found = []
        for index in range(3):
            try:
                check_share(saved, index, 3)
            except CheckpointError as error:
                found.append(str(error))
        assert len(found) == 1
        assert f"{name} does not match its checksum" in found[0]
        (saved / name).write_bytes(content)
