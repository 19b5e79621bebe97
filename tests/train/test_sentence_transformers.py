"""sentence-transformers' trainer over a pipeline, equal to the trainer as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

from ipu_pipeline.train import PipelineMixin
from tests.later import every_second
from tests.train.trl_programs import preferences, tokenizer

st = pytest.importorskip("sentence_transformers", reason="pip install sentence-transformers")
losses = pytest.importorskip("sentence_transformers.losses")
models = pytest.importorskip("sentence_transformers.models")
pytestmark = pytest.mark.filterwarnings("ignore")


def encoder(folder: Any) -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=24, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=32, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    words = models.Transformer(str(folder), max_seq_length=16)
    return st.SentenceTransformer(
        modules=[words, models.Pooling(words.get_embedding_dimension(), "mean")],
        device="cpu",
    )


LOSSES = {
    "negatives": (lambda m: losses.MultipleNegativesRankingLoss(m), ("prompt", "chosen")),
    "own_weights": (lambda m: losses.SoftmaxLoss(m, 16, 2), ("prompt", "chosen", "label")),
    "triplets": (lambda m: losses.TripletLoss(m), ("prompt", "chosen", "rejected")),
    "shorter_embeddings": (
        lambda m: losses.MatryoshkaLoss(m, losses.CoSENTLoss(m), [16, 8]),
        ("prompt", "chosen", "score"),
    ),
    "cached": (
        lambda m: losses.CachedMultipleNegativesRankingLoss(m, mini_batch_size=2),
        ("prompt", "chosen"),
    ),
}


def trained(name: str, folder: Any, *, pipeline: bool) -> tuple[list[float], list[float], Any]:
    import datasets

    make, columns = LOSSES[name]
    rows = [{**row, "label": n % 2, "score": n / 24} for n, row in enumerate(preferences(24))]
    data = datasets.Dataset.from_list([{c: row[c] for c in columns} for row in rows])
    model, base = encoder(folder / "model"), st.SentenceTransformerTrainer
    args = st.SentenceTransformerTrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, max_steps=3,
        dataloader_pin_memory=False, save_strategy="no", logging_steps=1, learning_rate=0.05,
        per_device_train_batch_size=4, gradient_accumulation_steps=2, optim="sgd",
    )  # fmt: skip
    kind = type("Mixed", (PipelineMixin, base), {}) if pipeline else base
    more = {"num_stages": 2} if pipeline else {}
    trainer = kind(
        model=model, args=args, train_dataset=data, eval_dataset=data.select(range(5)),
        loss=make(model), **more,
    )  # fmt: skip
    trainer.train()
    found = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    found.append(trainer.evaluate()["eval_loss"])
    return found, [float(p.detach().abs().sum()) for p in trainer.loss.parameters()], trainer


@pytest.mark.parametrize("name", every_second(LOSSES))
def test_losses_and_weights_are_those_of_the_trainer_as_it_is(tmp_path, name) -> None:
    *theirs, _ = trained(name, tmp_path / "theirs", pipeline=False)
    *ours, trainer = trained(name, tmp_path / "ours", pipeline=True)
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(expected, rel=1e-5)
    if name not in ("cached", "shorter_embeddings"):  # these call a forward of their own
        assert trainer.plan.num_stages == 2
