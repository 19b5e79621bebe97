"""Samples that share a row have the logits, losses and gradients of the samples alone."""

from random import Random

import pytest
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from torch.testing import assert_close

import ipu_pipeline as ipp
from ipu_pipeline.train.trainer import PipelineTrainer
from tasks.packed_model import pack_model
from tasks.packing import PackedDataset, PackingCollator, best_fit, unpacked
from tests.examples.tasks.tiny import ENCODER, NO_DROPOUT
from tests.later import now

LENGTH, VOCABULARY = 40, ENCODER["vocab_size"]
SIZES = {**ENCODER, **NO_DROPOUT, "num_hidden_layers": 2, "type_vocab_size": 2}
# What a sample has besides its tokens.
LABELS = {
    "SequenceClassification": lambda rng, size: {"labels": rng.randrange(3)},
    "QuestionAnswering": lambda rng, size: {
        f"{end}_positions": rng.randrange(size) for end in ("start", "end")
    },
    "MaskedLM": lambda rng, size: {"labels": masked(rng, size)},
    "PreTraining": lambda rng, size: {
        "labels": masked(rng, size), "next_sentence_label": rng.randrange(2)
    },
    "TokenClassification": lambda rng, size: {"labels": [rng.randrange(3) for _ in range(size)]},
}  # fmt: skip


def masked(rng, size):
    return [rng.randrange(VOCABULARY) if n % 3 == 1 else -100 for n in range(size)]


def samples_of(task, number=14):
    rng = Random(task)
    sizes = [rng.randint(4, 18) for _ in range(number)]
    return [
        {
            "input_ids": [rng.randrange(5, VOCABULARY) for _ in range(size)],
            "token_type_ids": [int(n > size // 2) for n in range(size)],
            "attention_mask": [1] * size,
            **LABELS[task](rng, size),
        }
        for size in sizes
    ]


def padded(samples):
    columns = {name: [torch.tensor(one[name]) for one in samples] for name in samples[0]}
    return {
        name: pad_sequence(column, True, -100 if name == "labels" else 0)
        if column[0].ndim
        else torch.stack(column)
        for name, column in columns.items()
    }


def packed_case(task, kind, attention="sdpa"):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind, **SIZES, num_labels=3 if "Classification" in task else 2
    )
    make = getattr(transformers, f"AutoModelFor{task}")
    model = make.from_config(config, attn_implementation=attention).eval()
    pack_model(model, LENGTH)
    rows = PackedDataset(samples_of(task), LENGTH)
    return model, rows, PackingCollator(padded, LENGTH, rows.num_segments)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("kind", "attention", "task"),
    [
        *(("bert", "sdpa", task) for task in LABELS),
        ("roberta", "eager", "SequenceClassification"),
        ("distilbert", "sdpa", "QuestionAnswering"),
        ("albert", "eager", "PreTraining"),
    ],
)
def test_packed_samples_are_computed_as_they_are_alone(kind, attention, task):
    model, rows, collate = packed_case(task, kind, attention)
    if (kind, task) == ("albert", "PreTraining"):
        for sample in rows.data:
            sample["sentence_order_label"] = sample.pop("next_sentence_label")
    batch = collate([rows[n] for n in range(len(rows))])
    assert rows.num_segments > 2
    output = model(**batch)
    found, labels = unpacked(output, batch)
    own = [model(**padded([sample])) for sample in rows.data]
    for name in set(output) - {"loss"}:
        for value, alone in zip(rows.in_order(found[name]), own, strict=True):
            expected = alone[name][0]
            assert_close(value[: len(expected)], expected, rtol=0, atol=1e-5)
    assert torch.equal(
        rows.in_order(labels["input_ids"]).clamp(min=0), padded(rows.data)["input_ids"]
    )
    if task == "QuestionAnswering":  # unpacked, pads count as places: only alone there are none
        loss = sum(alone.loss for alone in own) / len(own)
    else:
        loss = model(**padded(rows.data)).loss
    assert_close(output.loss, loss, rtol=0, atol=1e-5)
    assert_close(gradients(model, output.loss), gradients(model, loss), rtol=0, atol=1e-5)


def trained(trainer, model, rows, collate, folder):
    """Return the losses of two steps of two rows each, and the weights behind them."""
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=2,
        logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
        learning_rate=0.01,
    )  # fmt: skip
    made = trainer(model, arguments, train_dataset=rows, data_collator=collate)
    made.train()
    losses = [line["loss"] for line in made.state.log_history if "loss" in line]
    # a key's bias has no gradient but rounding, of which AdamW makes steps
    kept = {n: v.clone() for n, v in model.state_dict().items() if not n.endswith("key.bias")}
    return losses, kept


@pytest.mark.parametrize("task", now(["SequenceClassification"], LABELS))
def test_trainers_take_packed_rows(task, tmp_path):
    expected = trained(transformers.Trainer, *packed_case(task, "bert"), tmp_path)

    def pipelined(*args, **kwargs):
        return PipelineTrainer(*args, num_stages=2, **kwargs)

    found = trained(pipelined, *packed_case(task, "bert"), tmp_path)
    assert_close(found, expected, rtol=0, atol=1e-5)


def test_stages_predict_for_every_sample():
    model, rows, collate = packed_case("PreTraining", "bert")
    batch = collate([rows[n] for n in range(4)])
    with torch.no_grad():
        expected = model(**batch)
    plan = ipp.plan(model, {n: v[:2] for n, v in batch.items()}, num_stages=2, microbatches=2)
    with ipp.compile(model, plan, training=False) as executable:
        result = executable.eval_step(batch)
    assert result.loss == pytest.approx(expected.loss.item(), abs=1e-5)
    logits = {name: value for name, value in expected.items() if name != "loss"}
    assert_close(dict(result.outputs), logits, rtol=0, atol=1e-5)


def test_long_samples_get_a_row_first_and_short_ones_fill_it():
    assert best_fit([2, 9, 3, 5, 10, 1], 10) == [[4], [1, 5], [3, 2, 0]]
    rng = Random(0)
    lengths = [rng.randint(1, 30) for _ in range(300)]
    rows = best_fit(lengths, 30)
    assert sorted(n for row in rows for n in row) == list(range(300))
    assert max(sum(lengths[n] for n in row) for row in rows) <= 30
    assert len(rows) <= 11 / 9 * sum(lengths) / 30 + 4  # what Johnson proved


def test_models_that_mix_the_samples_of_a_row_are_refused():
    model = transformers.FNetForMaskedLM(transformers.FNetConfig(**SIZES))
    kinds = type(model), type(model.fnet)
    with pytest.raises(ValueError, match=r"else of samples that share a row .* --pack"):
        pack_model(model, LENGTH)
    assert (type(model), type(model.fnet)) == kinds


def test_the_shortest_row_holds_two_samples():
    config = transformers.BertConfig(**SIZES, num_labels=3)
    for length in (2, 3, 4):
        pack_model(transformers.BertForSequenceClassification(config), length)


def test_losses_that_do_not_leave_samples_out_are_refused():
    config = transformers.BertConfig(**SIZES, num_labels=1)
    with pytest.raises(ValueError, match="is not one of classes"):
        pack_model(transformers.BertForSequenceClassification(config), LENGTH)
