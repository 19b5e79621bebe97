import logging
import random
from itertools import chain

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from ipu_pipeline.train import TrainingArguments
from ipu_pipeline.train.data import (
    BatchLoader,
    EpochBatches,
    build_collator,
    keyed_randomness,
    train_batches,
)
from tests.train.eager_executable import Questions, tiny_bert


def indices(sampler, epoch, step=0):
    sampler.position = (epoch, step)
    return [list(batch) for batch in sampler]


class Noisy(torch.utils.data.Dataset):
    """Draws from every global generator, as augmentation does."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return [index, torch.rand(()).item(), np.random.rand(), random.random()]


def stack(samples):
    return {"x": torch.tensor(samples, dtype=torch.float64)}


def noisy_batches(num_workers, position=(0, 0), seed=3):
    arguments = TrainingArguments(
        per_device_train_batch_size=4, dataloader_num_workers=num_workers, seed=seed
    )
    return [b["x"] for b in train_batches(Noisy(), arguments, stack).batches(*position)]


@given(
    num_samples=st.integers(1, 60),
    micro=st.integers(1, 5),
    divisor=st.integers(1, 6),
    drop_last=st.booleans(),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 5),
)
def test_every_epoch_is_a_permutation_and_resumes_anywhere(
    num_samples, micro, divisor, drop_last, seed, epoch
):
    try:
        sampler = EpochBatches(
            num_samples, micro * divisor, divisor=divisor, seed=seed, drop_last=drop_last
        )
    except ValueError:
        assert num_samples < (micro * divisor if drop_last else divisor)
        return
    batches = indices(sampler, epoch)
    assert len(batches) == len(sampler)
    used = [i for batch in batches for i in batch]
    assert len(set(used)) == len(used) == sampler.num_used
    assert set(used) <= set(range(num_samples))
    assert all(len(batch) % divisor == 0 for batch in batches)
    assert all(len(batch) == micro * divisor for batch in batches[: None if drop_last else -1])
    assert num_samples - sampler.num_used < (micro * divisor if drop_last else divisor)
    for step in range(len(batches) + 1):
        assert indices(sampler, epoch, step) == batches[step:]


def test_order_depends_on_seed_and_epoch_only():
    first, again = EpochBatches(50, 8, seed=1), EpochBatches(50, 8, seed=1)
    torch.manual_seed(99)
    indices(again, 7)
    assert indices(first, 0) == indices(again, 0)
    assert indices(first, 0) != indices(first, 1)
    assert indices(first, 0) != indices(EpochBatches(50, 8, seed=2), 0)
    # The batch size cuts the same order elsewhere.
    recut = indices(EpochBatches(50, 5, seed=1), 0)
    assert list(chain(*indices(first, 0))) == list(chain(*recut))


def test_the_order_is_that_of_transformers_trainer(tmp_path):
    samples = [{"input_ids": torch.tensor([index]), "labels": 0} for index in range(50)]
    seen: list[int] = []

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, input_ids, labels):
            seen.extend(input_ids.flatten().tolist())
            return {"loss": self.weight * labels.sum()}

    trainer = transformers.Trainer(
        model=Model(),
        args=transformers.TrainingArguments(
            str(tmp_path),
            seed=11,
            num_train_epochs=2,
            per_device_train_batch_size=4,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=samples,
    )
    trainer.train()

    arguments = TrainingArguments(
        output_dir="unused", seed=11, per_device_train_batch_size=4, gradient_accumulation_steps=1
    )
    batches = train_batches(samples, arguments, transformers.default_data_collator, divisor=1)
    ours = [
        value
        for epoch in range(2)
        for batch in batches.batches(epoch, 0)
        for value in batch["input_ids"].flatten().tolist()
    ]
    assert ours == seen


def test_refusals():
    with pytest.raises(ValueError, match="batch_size 5 must be a multiple of 2, above 0"):
        EpochBatches(10, 5, divisor=2)
    with pytest.raises(ValueError, match="holds 3 samples, one batch needs at least 4; lower the"):
        EpochBatches(3, 8, divisor=4)
    with pytest.raises(ValueError, match="holds 7 samples, one batch needs at least 8"):
        EpochBatches(7, 8, divisor=4, drop_last=True)

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield 1

    with pytest.raises(ValueError, match="Stream cannot be indexed, so its order could not be"):
        train_batches(Stream(), TrainingArguments(), stack)
    with pytest.raises(ValueError, match="generator cannot be indexed"):
        train_batches((i for i in range(3)), TrainingArguments(), stack)


@pytest.mark.parametrize(
    ("drop_last", "left_out", "sizes", "text"),
    [
        (False, 3, [16, 4], "has to be a multiple of 4"),
        (True, 7, [16], "as dataloader_drop_last"),
    ],
)
def test_samples_left_out_are_announced(caplog, drop_last, left_out, sizes, text):
    arguments = TrainingArguments(
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        replicas=2,
        dataloader_drop_last=drop_last,
    )
    with caplog.at_level(logging.WARNING):
        loader = train_batches(list(range(23)), arguments, lambda x: {"x": torch.tensor(x)})
    assert [len(batch["x"]) for batch in loader.batches()] == sizes
    assert len(caplog.records) == 1
    assert f"{left_out} of 23 samples are left out of each epoch" in caplog.text
    assert text in caplog.text


def test_nothing_is_said_when_nothing_is_left_out(caplog):
    train_batches(list(range(20)), TrainingArguments(), stack)
    assert not caplog.records


def test_a_batch_with_its_randomness_is_a_function_of_its_position():
    everything = noisy_batches(0)
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    again = noisy_batches(0)
    resumed = noisy_batches(0, (0, 1))
    workers = noisy_batches(2)
    torch.testing.assert_close(everything, again, rtol=0, atol=0)
    torch.testing.assert_close(everything[1:], resumed, rtol=0, atol=0)
    torch.testing.assert_close(everything, workers, rtol=0, atol=0)
    assert not torch.equal(everything[0], noisy_batches(0, seed=4)[0])
    assert not torch.equal(everything[0], noisy_batches(0, (1, 0))[0])


def test_reading_leaves_the_global_generators_alone():
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    noisy_batches(0)
    noisy_batches(1)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]
    with pytest.raises(IndexError), keyed_randomness(1, 2):
        random.choice([])
    assert random.getstate() == states[2]


def test_neighbouring_keys_draw_differently():
    def drawn(*key):
        with keyed_randomness(*key):
            return torch.rand(()).item(), np.random.rand(), random.random()

    keys = [(a, b, c) for a in range(4) for b in range(4) for c in range(4)]
    assert len({drawn(*key) for key in keys}) == len(keys)
    assert drawn(1, 2) == drawn(1, 2)


def test_token_masking_continues_exactly():
    tokenizer = wordless_tokenizer()
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5)
    data = [{"input_ids": list(range(5, 25))} for _ in range(12)]
    arguments = TrainingArguments(per_device_train_batch_size=4, seed=2)
    whole = list(train_batches(data, arguments, collator).batches())
    rest = list(train_batches(data, arguments, collator).batches(0, 2))
    assert torch.equal(whole[2]["input_ids"], rest[0]["input_ids"])
    assert torch.equal(whole[2]["labels"], rest[0]["labels"])
    assert not torch.equal(whole[1]["labels"], whole[2]["labels"])


def wordless_tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {"[UNK]": 0, "[MASK]": 1, "[PAD]": 2} | {f"w{i}": i for i in range(3, 30)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="[UNK]")),
        mask_token="[MASK]",
        pad_token="[PAD]",
        unk_token="[UNK]",
    )


def test_a_dataset_that_reads_many_at_once_is_asked_once():
    class Many(list):
        calls = 0

        def __getitems__(self, wanted):
            Many.calls += 1
            return [self[i] for i in wanted]

    sampler = EpochBatches(6, 3, shuffle=False)
    loader = BatchLoader(Many(range(6)), sampler, lambda x: {"x": torch.tensor(x)}, 0)
    assert [b["x"].tolist() for b in loader.batches()] == [[0, 1, 2], [3, 4, 5]]
    assert Many.calls == len(loader) == 2


def test_default_collator_pads_and_hides_columns(caplog):
    model, arguments = tiny_bert(), TrainingArguments()
    samples = [{"input_ids": [5, 6], "words": "a b"}, {"input_ids": [7], "words": "c"}]
    with caplog.at_level(logging.INFO):
        batch = build_collator(model, arguments, tokenizer=wordless_tokenizer())(samples)
    assert batch["input_ids"].tolist() == [[5, 6], [7, 2]]
    assert "words" not in batch
    assert "have been ignored: words" in caplog.text
    kept = build_collator(model, TrainingArguments(remove_unused_columns=False), lambda x: x)
    assert kept(samples) is samples
    plain = build_collator(model, arguments)([Questions()[0], Questions()[1]])
    assert plain["input_ids"].shape == (2, 12)
