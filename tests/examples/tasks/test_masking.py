"""What is hidden: transformers' shares, a function of the position, never nothing."""

import pytest
import torch
from transformers import DataCollatorForLanguageModeling

from ipu_pipeline.train import TrainingArguments
from ipu_pipeline.train.data import keyed_randomness, train_batches
from tasks.features import Setup
from tasks.masking import MaskingCollator
from tasks.table import TASKS
from tests.examples.tasks.tiny import make_rows, make_tokenizer

NO = -100


def setup_for(tokenizer=None, **options):
    given = {"max_seq_length": 24, "line_by_line": True, **options}
    return Setup(tokenizer or make_tokenizer(), TASKS["masked-lm"].options(**given))


@pytest.fixture
def data():
    return TASKS["masked-lm"].encode(make_rows("masked-lm", 40), setup_for())


def samples_of(data):
    return [data[i] for i in range(len(data))]


def test_hides_what_transformers_hides(data):
    ours, theirs = MaskingCollator(setup_for()), DataCollatorForLanguageModeling(make_tokenizer())
    with keyed_randomness(1):
        mine = ours(samples_of(data))
    with keyed_randomness(1):
        expected = theirs(samples_of(data))
    empty = (expected["labels"] == NO).all(dim=1)
    assert 0 < empty.sum() < 20
    for name, column in expected.items():
        assert torch.equal(mine[name][~empty], column[~empty])


def test_every_row_hides_at_least_one_ordinary_token(data):
    batch = MaskingCollator(setup_for(mlm_probability=0.01))(samples_of(data))
    hidden = batch["labels"] != NO
    assert (hidden.sum(dim=1) >= 1).all()
    assert (batch["labels"][hidden] > 4).all()  # no special token
    assert (batch["input_ids"][hidden] == 4).float().mean() > 0.9


def test_a_row_of_special_tokens_hides_nothing():
    batch = MaskingCollator(setup_for())([{"input_ids": [2, 3, 0], "attention_mask": [1, 1, 0]}])
    assert (batch["labels"] == NO).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_hidden_depends_on_the_position_alone(data, workers, tmp_path):
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=10, dataloader_num_workers=workers
    )

    def batches(position):
        loader = train_batches(data, arguments, MaskingCollator(setup_for()))
        return list(loader.batches(*position))

    torch.manual_seed(1)
    whole = batches((0, 0))
    torch.manual_seed(2)
    rest = batches((0, 2))
    other_epoch = batches((1, 0))
    assert len(whole) == 4
    for first, second in zip(whole[2:], rest, strict=True):
        assert torch.equal(first["input_ids"], second["input_ids"])
        assert torch.equal(first["labels"], second["labels"])
    masks = [(batch["labels"] != NO).tolist() for batch in (*whole, *other_epoch)]
    assert all(a != b for i, a in enumerate(masks) for b in masks[:i])


def test_needs_a_mask_token():
    with pytest.raises(ValueError, match="has no mask token, so the model was not made to guess"):
        MaskingCollator(setup_for(make_tokenizer(mask_token=None)))
