"""Tiny tables of questions with region features, and a tokenizer of their words."""

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ["[PAD]", "[UNK]", "what", "colour", "is", "it", "there", "a", "box"]


@pytest.fixture
def tokenizer():
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_max_length=12,
        model_input_names=["input_ids", "attention_mask", "token_type_ids"],
    )


@pytest.fixture
def rows():
    """Return a function that makes columns: three questions, two regions, five features."""

    def make(**changes):
        values = np.arange(30, dtype=np.float32).reshape(3, 2, 5)
        columns = {
            "question": ["what colour is it", "is there a box", "is it a box"],
            "visual_feats": values.tolist(),
            "visual_pos": [[[0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]]] * 3,
            "label": [0, 2, 1],
        }
        return {name: value for name, value in {**columns, **changes}.items() if value is not None}

    return make


@pytest.fixture
def table(rows):
    return lambda **changes: datasets.Dataset.from_dict(rows(**changes))
