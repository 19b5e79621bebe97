import copy
import json
import os
import pathlib
import random
import resource
import signal
import socket

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    MarianConfig,
    MarianMTModel,
    MixtralConfig,
    MixtralForCausalLM,
)

from ipu_pipeline.errors import CheckpointError
from ipu_pipeline.targets import checkpoint
from ipu_pipeline.targets.checkpoint import is_complete, read_checkpoint, write_checkpoint

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 40}


def bert(seed=0, layers=2, cls=BertForMaskedLM):
    torch.manual_seed(seed)
    return cls(BertConfig(**SIZES, num_hidden_layers=layers, max_position_embeddings=8))


def adamw(model, groups=1):
    parameters = list(model.parameters())
    split = [parameters[i::groups] for i in range(groups)]
    return torch.optim.AdamW([{"params": g} for g in split], lr=1e-2, weight_decay=0.1)


def one_step(model, optimizer, seed=0):
    torch.manual_seed(seed)
    ids = torch.randint(0, 40, (2, 8))
    model.eval()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@pytest.fixture
def trained():
    model = bert()
    optimizer = adamw(model, groups=2)
    for seed in range(2):
        one_step(model, optimizer, seed)
    return model, optimizer


@pytest.fixture
def saved(trained, tmp_path):
    model, optimizer = trained
    return write_checkpoint(
        tmp_path / "c", model=model, optimizer=optimizer, global_step=7, extra={"note": [1, "a"]}
    )


def assert_untouched(path, message, model=None, optimizer=None):
    """Reading fails with ``message`` and changes neither model, optimizer nor random state."""
    model = model or bert(seed=5)
    optimizer = optimizer or adamw(model)
    weights = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict())
    rng = torch.get_rng_state()
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path, model=model, optimizer=optimizer)
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
    torch.testing.assert_close(optimizer.state_dict()["state"], state["state"], rtol=0, atol=0)
    assert optimizer.state_dict()["param_groups"] == state["param_groups"]
    assert torch.equal(torch.get_rng_state(), rng)


def reseal(path, change):
    """Rewrite the manifest with a valid checksum of its own."""
    body = json.loads((path / "checkpoint.json").read_text())
    del body["sha256"], body["files"], body["schema_version"], body["library_version"]
    (path / "checkpoint.json").unlink()
    change(body)
    checkpoint.manifest.write_manifest(path, body)


def test_round_trip_continues_bit_for_bit(trained, saved):
    model, optimizer = trained
    other = bert(seed=9)
    identities = [id(p) for p in other.parameters()]
    restored = adamw(other, groups=2)
    info = read_checkpoint(saved, model=other, optimizer=restored)
    assert (info.global_step, info.extra) == (7, {"note": [1, "a"]})
    assert [id(p) for p in other.parameters()] == identities
    for seed in range(3):
        assert one_step(model, optimizer, seed) == one_step(other, restored, seed)


def test_another_grouping_of_the_parameters_loads_it(trained, saved):
    model, optimizer = trained
    other = bert(seed=9)
    restored = adamw(other, groups=5)
    read_checkpoint(saved, model=other, optimizer=restored)
    for seed in range(3):
        assert one_step(model, optimizer, seed) == one_step(other, restored, seed)


def test_settings_come_back_and_the_loading_side_chooses_the_kernel(trained, saved):
    other = bert(seed=9)
    restored = torch.optim.AdamW(other.parameters(), lr=5.0, betas=(0.5, 0.5), foreach=True)
    read_checkpoint(saved, model=other, optimizer=restored)
    group = restored.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"]) == (1e-2, 0.1, (0.9, 0.999))
    assert group["foreach"] is True


def test_tensor_learning_rate_stays_a_tensor(saved):
    other = bert(seed=9)
    restored = torch.optim.AdamW(other.parameters(), lr=torch.tensor(5.0))
    read_checkpoint(saved, model=other, optimizer=restored)
    assert torch.equal(restored.param_groups[0]["lr"], torch.tensor(1e-2))


def test_random_states_come_back(saved, trained):
    model, _ = trained
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    random.gauss(0, 1)
    write_checkpoint(saved, model=model, optimizer=None, global_step=8)
    draws = [(torch.rand(3).tolist(), np.random.rand(), random.gauss(0, 1)) for _ in range(2)]
    read_checkpoint(saved, model=model, optimizer=None)
    assert [
        (torch.rand(3).tolist(), np.random.rand(), random.gauss(0, 1)) for _ in range(2)
    ] == draws
    torch.manual_seed(11)
    expected = torch.get_rng_state()
    read_checkpoint(saved, model=model, optimizer=None, restore_rng=False)
    assert torch.equal(torch.get_rng_state(), expected)


def test_from_pretrained_loads_the_weights(trained, saved):
    model, _ = trained
    loaded, info = BertForMaskedLM.from_pretrained(saved, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight


def marian():
    config = MarianConfig(
        vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, pad_token_id=39,
        max_position_embeddings=8, decoder_start_token_id=39, eos_token_id=0,
    )  # fmt: skip
    return MarianMTModel(config)


def mixtral():
    return MixtralForCausalLM(
        MixtralConfig(**SIZES, num_hidden_layers=1, num_key_value_heads=1, num_local_experts=2)
    )


@pytest.mark.parametrize("build", [marian, mixtral])
def test_models_whose_own_files_differ_from_their_state(build, tmp_path):
    """Marian leaves parameters out of its file; Mixtral's hub format renames the experts."""
    model, other = build(), build()
    path = write_checkpoint(tmp_path / "c", model=model, optimizer=None, global_step=0)
    read_checkpoint(path, model=other, optimizer=None)
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
    again = type(model).from_pretrained(path)
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(3, 3)
        self.second = torch.nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.register_buffer("count", torch.rand(2))


def test_a_plain_module_with_tied_weights(tmp_path):
    model, other = Tied(), Tied()
    path = write_checkpoint(
        tmp_path / "c", model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1),
        global_step=1,
    )  # fmt: skip
    assert sorted(p.name for p in path.iterdir()) == [
        "checkpoint.json", "model.safetensors", "optimizer.json", "optimizer.safetensors",
    ]  # fmt: skip
    optimizer = torch.optim.SGD(other.parameters(), lr=9.0)
    read_checkpoint(path, model=other, optimizer=optimizer)
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert other.second.weight is other.first.weight
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_frozen_parameters_have_no_optimizer_state(tmp_path):
    model = Tied()
    model.first.bias.requires_grad_(requires_grad=False)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable)
    path = write_checkpoint(tmp_path / "c", model=model, optimizer=optimizer, global_step=1)
    read_checkpoint(path, model=model, optimizer=optimizer)
    other = Tied()
    message = r"covers other parameters: only there \[\], only here \['first.bias'\]"
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path, model=other, optimizer=torch.optim.AdamW(other.parameters()))


# ---------------------------------------------------------------- damaged and foreign


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


def test_an_altered_manifest(saved):
    path = saved / "checkpoint.json"
    path.write_text(path.read_text().replace('"global_step": 7', '"global_step": 8'))
    assert_untouched(saved, "checkpoint.json does not match its own checksum")


def test_no_checkpoint_at_all(tmp_path):
    assert not is_complete(tmp_path)
    assert_untouched(tmp_path, "is not a complete checkpoint: checkpoint.json is not there")


def test_a_newer_schema(saved, monkeypatch):
    monkeypatch.setattr(checkpoint.manifest, "SCHEMA_VERSION", 2)
    reseal(saved, lambda body: None)
    monkeypatch.undo()
    assert_untouched(saved, "has checkpoint schema 2 .* reads up to 1; update ipu-pipeline")


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
    checkpoint.weights.save_file(tensors, saved / "model.safetensors")
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


# ---------------------------------------------------------------- atomic


@pytest.mark.parametrize("limit", [100, 20_000, 50_000])
def test_a_full_disk_leaves_the_earlier_checkpoint(saved, trained, limit):
    """The kernel refuses to write more than ``limit`` bytes into a file, as on a full disk."""
    model, optimizer = trained
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    assert max(map(len, before.values())) > 50_000
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        with pytest.raises(OSError, match=r"too large|could not write"):
            write_checkpoint(saved, model=model, optimizer=optimizer, global_step=8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def killed_while(action):
    """Run ``action`` in a forked process that has to die by SIGKILL."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize("point", ["save_optimizer", "write_manifest"])
def test_killed_while_saving(saved, trained, monkeypatch, point):
    model, optimizer = trained

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    new = saved.parent / "new"

    def save():
        monkeypatch.setattr(checkpoint, point, die)
        write_checkpoint(new, model=model, optimizer=optimizer, global_step=8)

    killed_while(save)
    assert not new.exists()
    left = [p.name for p in saved.parent.iterdir() if p != saved]
    assert len(left) == 1
    assert left[0].startswith(".new.incomplete.")
    assert not is_complete(saved.parent / left[0])
    write_checkpoint(new, model=model, optimizer=optimizer, global_step=8)
    assert sorted(p.name for p in saved.parent.iterdir()) == ["c", "new"]


def test_killed_between_the_two_renames_of_a_replacement(saved, trained, monkeypatch):
    model, optimizer = trained

    def replace():
        rename = pathlib.Path.rename

        def die_on_second(self, target):
            rename(self, target)
            if target.name.endswith(".previous"):
                os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(pathlib.Path, "rename", die_on_second)
        write_checkpoint(saved, model=model, optimizer=optimizer, global_step=8)

    killed_while(replace)
    assert not saved.exists()
    assert read_checkpoint(saved, model=model, optimizer=optimizer).global_step == 7
    write_checkpoint(saved, model=model, optimizer=optimizer, global_step=9)
    assert read_checkpoint(saved, model=model, optimizer=optimizer).global_step == 9
    assert [p.name for p in saved.parent.iterdir()] == ["c"]


def test_killed_after_both_renames_of_a_replacement(saved, trained):
    model, optimizer = trained
    (saved.parent / ".c.previous").mkdir()
    read_checkpoint(saved, model=model, optimizer=optimizer)
    assert [p.name for p in saved.parent.iterdir()] == ["c"]


def test_a_live_writer_elsewhere_is_left_alone(tmp_path):
    model = Tied()
    host = socket.gethostname()
    kept = [tmp_path / f".a.incomplete.{host}.{os.getppid()}", tmp_path / ".b.incomplete.pod7.12"]
    old = tmp_path / ".d.incomplete.pod7.13"
    for item in [*kept, old, tmp_path / f".e.incomplete.{host}.{os.getpid()}"]:
        item.mkdir()
    os.utime(old, (0, 0))
    write_checkpoint(tmp_path / "c", model=model, optimizer=None, global_step=0)
    assert sorted(tmp_path.iterdir()) == sorted([*kept, tmp_path / "c"])


def test_a_writer_of_another_user_counts_as_alive(tmp_path, monkeypatch):
    def refuse(pid, number):
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    item = tmp_path / f".a.incomplete.{socket.gethostname()}.1"
    item.mkdir()
    checkpoint.directory.remove_stale(tmp_path)
    assert item.exists()


def test_nothing_is_pickled(saved):
    endings = {p.suffix for p in saved.iterdir()}
    assert endings == {".json", ".safetensors"}


@pytest.mark.parametrize("shown", [True, False])
def test_the_progress_bars_of_transformers_stay_as_they_were(tmp_path, capfd, shown):
    logging = checkpoint.weights.transformers_logging
    before = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    try:
        write_checkpoint(tmp_path / "c", model=bert(), optimizer=None, global_step=0)
        assert capfd.readouterr().err == ""
        assert logging.is_progress_bar_enabled() is shown
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()
