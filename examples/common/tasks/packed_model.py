"""A model of transformers that takes packed rows, and the data that it then takes.

Axes: as in ``packing.py``; ``H`` hidden.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from plan_report import say
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ipu_pipeline.capture.example_batch import IGNORED_LABEL
from ipu_pipeline.train.data import Collator
from tasks.packing import SPANS, STARTS, PackedDataset, PackingCollator, unpacked

_OF_A_SAMPLE = {"SequenceClassification": ("logits",),
                "PreTraining": ("seq_relationship_logits", "sop_logits")}  # fmt: skip


def packed(
    model: Any, data: Mapping[str, Any], collate: Collator, tokenizer: Any, options: Any
) -> tuple[dict[str, PackedDataset], PackingCollator]:
    """Return data by split as rows, and what makes batches of them that ``model`` then takes.

    Args:
        model: As for :func:`pack_model`.
        data: Samples of every split.
        collate: Makes a padded batch of samples.
        tokenizer: That of the model.
        options: ``max_seq_length`` is the length of a row, in tokens.

    Raises:
        ValueError: As :func:`pack_model`.
    """
    length, pad_id = options.max_seq_length, tokenizer.pad_token_id or 0
    pack_model(model, length)
    rows = {split: PackedDataset(samples, length) for split, samples in data.items()}
    num_segments = max(one.num_segments for one in rows.values())
    for split, one in rows.items():
        say(f"packed {split}: {len(data[split])} sequences in {len(one)} rows of {length} tokens")
    return rows, PackingCollator(collate, length, num_segments, pad_id)


def pack_model(model: Any, length: int) -> None:
    """Let a model of transformers take packed rows besides batches of samples.

    Its class becomes one derived from it, of the same name; weights, their names and files do not
    change. What it computes of packed samples is compared with what it computes of them alone.

    Args:
        model: An encoder with a head for sequence or token classification, question answering,
            masked tokens, or masked tokens and pairs.
        length: Tokens of a row.

    Raises:
        ValueError: It computes something else of packed samples, or has no loss of single ones.
    """
    name = type(model).__name__
    if name.endswith("SequenceClassification") and _is_no_choice(model.config):
        raise ValueError(
            f"the loss of {name} is not one of classes (num_labels "
            f"{model.config.num_labels}, problem_type {model.config.problem_type}), so that rows "
            "with fewer samples would count; leave --pack out"
        )
    base = model.base_model
    before = type(model), type(base)
    pad_id = model.config.pad_token_id or 0
    reasons = []
    for first in (0, pad_id + 1):  # RoBERTa and its kind count positions from behind the pad token
        try:
            base.__class__ = _packed(before[1], _PackedEncoder)
            model.__class__ = _packed(before[0], _PackedHead)
            base.first_position, base.one_per_sample = first, _of_a_sample(model) == ("logits",)
            _check(model, length, pad_id)
            return
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            model.__class__, base.__class__ = before
            reasons.append(str(error))
    raise ValueError(
        f"{name} computes something else of samples that share a row ({reasons[-1]}); leave --pack "
        "out"
    )


def _is_no_choice(config: Any) -> bool:
    return config.num_labels < 2 or config.problem_type not in (None, "single_label_classification")


def _packed(kind: Any, ours: Any) -> type:
    """Return a class derived from ``kind`` whose forward takes the starts of samples.

    Raises:
        TypeError: What ``kind`` is given besides its own arguments goes nowhere.
    """
    signature = inspect.signature(kind.forward)
    *named, last = signature.parameters.values()
    if last.kind is not last.VAR_KEYWORD:
        raise TypeError(f"{kind.__name__}.forward takes no further arguments")

    def forward(self: Any, *args: Any, **inputs: Any) -> Any:
        return ours.run(self, super(made, self).forward, *args, **inputs)

    further = inspect.Parameter(STARTS, inspect.Parameter.KEYWORD_ONLY, default=None)
    vars(forward)["__signature__"] = signature.replace(parameters=[*named, further, last])
    made: Any = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    return made


class _PackedEncoder:
    """The forward pass of a model without its head."""

    @staticmethod
    def run(base: Any, forward: Any, *args: Any, **inputs: Any) -> Any:
        """Run it; of rows, every sample attends to itself, and is pooled."""
        start_RS = inputs.pop(STARTS, None)
        if start_RS is None:
            return forward(*args, **inputs)
        segment_RL = inputs.pop("attention_mask")
        own_R1LL = (segment_RL[:, :, None] == segment_RL[:, None, :])[:, None]
        mask_R1LL = torch.zeros(own_R1LL.shape, dtype=base.dtype, device=own_R1LL.device)
        mask_R1LL = mask_R1LL.masked_fill(~own_R1LL, torch.finfo(base.dtype).min)
        position_RL = inputs.pop("position_ids") + base.first_position
        output = forward(*args, **inputs, attention_mask=mask_R1LL, position_ids=position_RL)
        hidden_RLH = output[0]
        index_RSH = start_RS[:, :, None].expand(-1, -1, hidden_RLH.shape[-1])
        first_N1H = hidden_RLH.gather(1, index_RSH).flatten(0, 1)[:, None]
        pooler = getattr(base, "pooler", None)
        if isinstance(pooler, nn.Linear):
            output["pooler_output"] = base.pooler_activation(pooler(first_N1H[:, 0]))
        elif pooler is not None:
            output["pooler_output"] = pooler(first_N1H)
        if base.one_per_sample:
            output["last_hidden_state"] = first_N1H
        return output


class _PackedHead:
    """The forward pass of a model with its head."""

    @staticmethod
    def run(model: Any, forward: Any, *args: Any, **inputs: Any) -> Any:
        """Run it; of rows, outputs and losses are those of the samples."""
        start_RS = inputs.get(STARTS)
        if start_RS is None:
            return forward(*args, **inputs)
        segment_RL = inputs["attention_mask"]
        spans = [inputs.pop(name, None) for name in SPANS]
        output = forward(*args, **inputs)
        for name in _of_a_sample(model):
            if output.get(name) is not None:
                if len(output[name]) != start_RS.numel():
                    raise ValueError(f"the head does not hand {STARTS} on to the encoder")
                output[name] = output[name].unflatten(0, start_RS.shape)
        if spans[0] is not None:
            losses = [
                _span_loss(output[f"{name.split('_')[0]}_logits"], segment_RL, place_RS)
                for name, place_RS in zip(SPANS, spans, strict=True)
            ]
            output["loss"] = sum(losses) / 2
        return output


def _span_loss(logits_RL: Tensor, segment_RL: Tensor, place_RS: Tensor) -> Tensor:
    """Return the loss of where answers begin or end, of every sample among its own tokens."""
    number_S = torch.arange(1, place_RS.shape[1] + 1, device=place_RS.device)
    own_RSL = segment_RL[:, None, :] == number_S[:, None]
    logits_RSL = logits_RL[:, None, :].float().masked_fill(~own_RSL, torch.finfo().min)
    return cross_entropy(logits_RSL.flatten(0, 1), place_RS.flatten(), ignore_index=IGNORED_LABEL)


def _of_a_sample(model: Any) -> tuple[str, ...]:
    """Return the outputs of which a sample has one."""
    name = type(model).__name__
    return next((names for end, names in _OF_A_SAMPLE.items() if name.endswith(end)), ())


def _check(model: Any, length: int, pad_id: int) -> None:
    """Compare two samples in a row with the same ones alone, one of them nearly as long as a row.

    Raises:
        ValueError: They differ.
    """
    draw, size = torch.Generator().manual_seed(0), model.config.vocab_size
    ids_L = torch.randint(size, (length,), generator=draw)
    ids_L[ids_L == pad_id] = (pad_id + 1) % size
    short = min(4, length // 2)
    parts = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}
             for ids in ids_L.split([length - short, short])]  # fmt: skip
    batch = PackingCollator(_padded, length, 2)([parts])
    mode = model.training
    try:
        with torch.no_grad():
            model.eval()
            alone = [model(**{n: values[None] for n, values in part.items()}) for part in parts]
            found, _ = unpacked(model(**batch), batch)
    finally:
        model.train(mode)
    for name, values in found.items():
        for value, own in zip(values, alone, strict=True):
            expected = own[name][0]
            difference = (value[: len(expected)] - expected).abs().max()
            if not difference <= 100 * torch.finfo(value.dtype).eps * (1 + expected.abs().max()):
                raise ValueError(f"{name} differ by {difference:.2g}")


def _padded(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    names, pad = parts[0], nn.utils.rnn.pad_sequence
    return {name: pad([part[name] for part in parts], batch_first=True) for name in names}
