import io

from rich.console import Console

from ipu_pipeline.train import TrainingArguments, build_optimizer, train
from ipu_pipeline.train import run as run_module
from ipu_pipeline.train.progress import TrainingProgress
from tests.train.eager_executable import EagerExecutable, Questions, tiny_bert


def drawn(tmp_path, monkeypatch, *, terminal=True, **settings):
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=110)

    def make(*, disable):
        return TrainingProgress(console, disable=disable)

    monkeypatch.setattr(run_module, "TrainingProgress", make)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, logging_steps=2, save_strategy="no", **settings
    )
    model = tiny_bert()
    train(EagerExecutable(model, build_optimizer(model, arguments)), Questions(16), arguments)
    return text.getvalue()


def test_bar_and_lines(tmp_path, monkeypatch):
    text = drawn(tmp_path, monkeypatch)
    assert "4/4" in text
    assert "samples/s" in text
    assert "lr 1.25e-05" in text
    assert "step 2  loss 2." in text
    assert "train_runtime" in text


def test_without_a_terminal_lines_are_printed(tmp_path, monkeypatch):
    text = drawn(tmp_path, monkeypatch, terminal=False)
    assert "step 4  loss 2." in text
    assert "\x1b" not in text


def test_disabled(tmp_path, monkeypatch):
    assert drawn(tmp_path, monkeypatch, disable_tqdm=True).strip() == ""
