"""Tiny tokenizers of three kinds; nothing is read from disk or network."""

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
# Words fall into letters, so that one word is several tokens, as with a real vocabulary.
PIECES = [chr(c) for c in range(33, 127)] + ["##" + chr(c) for c in range(33, 127)]
WHOLE = ["the", "was", "born", "in", "when", "and", "built"]
KINDS = ("bert", "roberta", "left")


def make_tokenizer(kind: str, model_max_length: int = 64) -> PreTrainedTokenizerFast:
    vocabulary = {piece: i for i, piece in enumerate(SPECIAL + WHOLE + PIECES)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if kind == "left":  # no special tokens at all, padded on the left
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="[PAD]",
            unk_token="[UNK]",
            padding_side="left",
            model_max_length=model_max_length,
            model_input_names=["input_ids", "attention_mask"],
        )
    second = "1" if kind == "bert" else "0"
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair=f"[CLS] $A [SEP] $B:{second} [SEP]:{second}",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=model_max_length,
        model_input_names=[*names, "token_type_ids"] if kind == "bert" else names,
    )


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return make_tokenizer(request.param)


@pytest.fixture
def bert_tokenizer():
    return make_tokenizer("bert")
