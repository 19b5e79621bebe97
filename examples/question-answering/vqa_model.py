"""LXMERT for run_vqa.py: with trained weights, or new ones for a config.json alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from model_loading import has_no_weights, load_weights, loading
from torch import nn
from vqa_data import Splits
from vqa_options import Options

from ipu_pipeline.errors import PipelineError
from tasks.visual_question_answering import AnswerSet, SoftAnswerLoss

SMALL_ALIAS = "small"
SMALL_FOLDER = Path(__file__).with_name("lxmert_small")
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


@dataclass(frozen=True)
class Loaded:
    """A model ready to train, its tokenizer, and the answers that its head chooses from."""

    model: Any
    tokenizer: Any
    answers: AnswerSet


def load_lxmert(options: Options, splits: Splits) -> Loaded:
    """Load ``--model_name_or_path``, and fit it to the data as far as the options ask.

    A folder without weights gives new ones; its vocabulary (if it has no tokenizer), its answers
    and the width of its region features are then those of the data. A model with weights keeps
    its answers, unless ``--replace_qa_head`` gives it those of the data.

    Raises:
        PipelineError: There is no such model here, it is no LXMERT, or it has no weights and
            there is nothing to train it on.
    """
    from transformers import AutoConfig

    name = options.model_name_or_path
    source = str(SMALL_FOLDER) if name == SMALL_ALIAS else name
    with loading(name, f"without a network pass a local folder, or '{SMALL_ALIAS}'"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if config.model_type != "lxmert":
        raise PipelineError(
            f"model {name!r} is a {config.model_type}, run_vqa.py trains lxmert; pass such a "
            f"model, or '{SMALL_ALIAS}'"
        )
    if has_no_weights(Path(source)):
        loaded = _new(options, splits, source, config)
    else:
        loaded = _trained(options, splits, source)
    if splits.soft:
        loaded.model.loss = SoftAnswerLoss()
    return loaded


def _new(options: Options, splits: Splits, source: str, config: Any) -> Loaded:
    """Return a model with new weights, as wide as the data needs."""
    from transformers import LxmertForQuestionAnswering

    if splits.train is None:
        raise PipelineError(
            f"model {options.model_name_or_path!r} has no weights; add --do_train, or pass the "
            "output folder of a run that trained it"
        )
    tokenizer = _tokenizer(source, splits.train.questions, config)
    answers = splits.answers()
    features, _ = splits.train.region_shapes
    config.update({"vocab_size": len(tokenizer), "visual_feat_dim": features[-1]})
    _name_answers(config, answers)
    model = LxmertForQuestionAnswering(config)
    typer.echo(
        f"{options.model_name_or_path}: new weights: {model.num_parameters():,} parameters, "
        f"{len(tokenizer)} words, {len(answers)} answers"
    )
    return Loaded(model.train(), tokenizer, answers)


def _trained(options: Options, splits: Splits, source: str) -> Loaded:
    """Return a model with the weights of its files, with its own answers or the data's."""
    from transformers import AutoTokenizer, LxmertForQuestionAnswering

    name = options.model_name_or_path
    with loading(name, f"without a network pass a local folder, or '{SMALL_ALIAS}'"):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model = load_weights(LxmertForQuestionAnswering, source, name)
    if options.replace_qa_head:
        answers = splits.answers()
        _replace_head(model, answers)
        typer.echo(f"{name}: new question answering head for {len(answers)} answers")
        return Loaded(model, tokenizer, answers)
    size = model.config.num_qa_labels
    names = model.config.id2label
    if len(names) == size:
        return Loaded(model, tokenizer, AnswerSet(tuple(names[i] for i in range(size))))
    return Loaded(model, tokenizer, AnswerSet.numbered(size))


def _replace_head(model: Any, answers: AnswerSet) -> None:
    """Give the model's own head one output per answer, all of them new.

    ``resize_num_qa_labels`` alone would keep the weights of the first old answers, which are
    other answers than the data's.
    """
    layer: nn.Linear = model.resize_num_qa_labels(len(answers))
    nn.init.normal_(layer.weight, std=model.config.initializer_range)
    nn.init.zeros_(layer.bias)
    _name_answers(model.config, answers)


def _name_answers(config: Any, answers: AnswerSet) -> None:
    """Write the answers into the configuration, so that the saved model says what it chooses."""
    config.num_qa_labels = len(answers)
    config.id2label = dict(enumerate(answers.names))
    config.label2id = {name: number for number, name in enumerate(answers.names)}


def _tokenizer(source: str, questions: Sequence[str], config: Any) -> Any:
    from transformers import AutoTokenizer

    if Path(source, "tokenizer.json").is_file():
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    return build_tokenizer(questions, config.max_position_embeddings)


def build_tokenizer(questions: Sequence[str], max_length: int) -> Any:
    """Return a tokenizer whose words are those of ``questions``, in lower case.

    Args:
        questions: Texts to take the words from.
        max_length: Tokens that the model takes.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    pad, unknown, start, end = SPECIAL_TOKENS
    words = Tokenizer(models.WordLevel(unk_token=unknown))
    words.normalizer = normalizers.BertNormalizer(lowercase=True)
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # In a set order, so that the same questions give the same numbers on every machine.
    trainer = trainers.WordLevelTrainer(special_tokens=list(SPECIAL_TOKENS), show_progress=False)
    words.train_from_iterator(sorted(questions), trainer)
    words.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        special_tokens=[(start, words.token_to_id(start)), (end, words.token_to_id(end))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask", "token_type_ids"],
        pad_token=pad,
        unk_token=unknown,
        cls_token=start,
        sep_token=end,
    )
