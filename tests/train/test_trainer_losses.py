"""Whatever computes the loss, gradients are those of transformers' Trainer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForQuestionAnswering, Trainer, TrainingArguments

from ipu_pipeline.capture.captured import capturing
from ipu_pipeline.errors import StageError
from ipu_pipeline.stages import captures
from ipu_pipeline.train.optimizers import scale_gradients
from ipu_pipeline.train.trainer import PipelineTrainer
from tests.tiny_models import TINY
from tests.train.helpers import CHECKPOINTING, load_script


def arguments(tmp_path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(tmp_path),
        **{
            "disable_tqdm": True,
            "report_to": "none",
            "use_cpu": True,
            "dataloader_pin_memory": False,
            "save_strategy": "no",
            "logging_steps": 1,
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 3,
            "per_device_eval_batch_size": 3,
            "max_grad_norm": 0.0,
            "optim": "sgd",
            "learning_rate": 0.1,
        }
        | options,
    )


class KeepsGradients:
    """Mixed in: remembers the gradients of the last step."""

    def _get_grad_norm(self, model, grad_norm=None):
        parameters = self.model.named_parameters()
        self.gradients = {n: p.grad.clone() for n, p in parameters if p.grad is not None}
        return super()._get_grad_norm(model, grad_norm)


def both(classes, model, tmp_path, dataset, arguments_of=None, **options: Any) -> tuple[Any, Any]:
    """Train two copies of the model; compare losses and gradients; return the trainers."""
    state = {name: value.clone() for name, value in model().state_dict().items()}
    trainers = []
    for base in classes:
        own = model()
        own.load_state_dict(state)
        kind = type(base.__name__, (KeepsGradients, base), {})
        extra = {"num_stages": 2} if issubclass(base, PipelineTrainer) else {}
        args = arguments(tmp_path, **(arguments_of or {}))
        trainer = kind(model=own, args=args, train_dataset=dataset, **options, **extra)
        trainer.train()
        trainers.append(trainer)
    theirs, ours = trainers
    assert ours.plan.num_stages == 2
    expected, found = ([e for e in t.state.log_history if "loss" in e] for t in trainers)
    assert [e["loss"] for e in found] == pytest.approx([e["loss"] for e in expected], rel=1e-6)
    assert ours.gradients.keys() == theirs.gradients.keys()
    for name, gradient in theirs.gradients.items():
        torch.testing.assert_close(ours.gradients[name], gradient, rtol=1e-5, atol=1e-6)
    return theirs, ours


CLASSES = (Trainer, PipelineTrainer)


def gpt2() -> nn.Module:
    return TINY["gpt2-lm"].build()[0]


def copies() -> Any:
    return load_script("causal_lm").Copies(32, seed=5)


def test_token_means_over_microbatches_of_unequal_counts(tmp_path, monkeypatch) -> None:
    made: list[Any] = []
    original = captures.capture

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(original(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(captures, "capture", counted)
    counts = [sum(label != -100 for label in copies()[i]["labels"]) for i in range(6)]
    assert len(set(counts)) > 1
    both(CLASSES, gpt2, tmp_path, copies())
    assert made == []  # plan's capture serves every number of labels


def test_label_smoothing(tmp_path) -> None:
    trainers = both(
        CLASSES, gpt2, tmp_path, copies(), {"label_smoothing_factor": 0.1},
        eval_dataset=load_script("causal_lm").Copies(7, seed=6),
    )  # fmt: skip
    expected, found = (t.evaluate()["eval_loss"] for t in trainers)
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_function_for_the_loss(tmp_path) -> None:
    def doubled(outputs, labels, num_items_in_batch=None):
        flat = outputs.logits[:, :-1].flatten(0, 1)
        summed = nn.functional.cross_entropy(flat, labels[:, 1:].flatten(), reduction="sum")
        return 2 * summed / num_items_in_batch

    both(CLASSES, gpt2, tmp_path, copies(), compute_loss_func=doubled)


class Weighted(Trainer):
    """What the documentation of transformers shows: classes with weights of their own."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        weight = torch.tensor([1.0, 3.0]).to(outputs.logits.device)
        loss = nn.functional.cross_entropy(outputs.logits, labels, weight=weight)
        return (loss, outputs) if return_outputs else loss


class WeightedInStages(PipelineTrainer):
    loss_is_scaled_for_ga = False
    compute_loss = Weighted.compute_loss


def test_an_overridden_compute_loss(tmp_path) -> None:
    texts = [
        {"input_ids": [2 + i % 7] * 8, "attention_mask": [1] * 8, "labels": i % 2}
        for i in range(16)
    ]
    trainers = both(
        (Weighted, WeightedInStages),
        lambda: TINY["roberta"].build()[0],
        tmp_path,
        texts,
        eval_dataset=texts,
    )
    expected, found = (t.predict(texts) for t in trainers)
    assert found.predictions == pytest.approx(expected.predictions, abs=1e-5)
    assert found.metrics["test_loss"] == pytest.approx(expected.metrics["test_loss"], rel=1e-5)


def bert_qa() -> nn.Module:
    torch.manual_seed(3)
    return BertForQuestionAnswering(
        BertConfig(
            vocab_size=40,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def marked(size: int = 24) -> Any:
    return load_script("qa").Marked(size, seed=4)


def test_bfloat16_is_applied_once(tmp_path) -> None:
    trainers = [
        kind(
            model=bert_qa(),
            args=arguments(tmp_path, bf16=True),
            train_dataset=marked(),
            eval_dataset=marked(7),
            **extra,
        )
        for kind, extra in ((Trainer, {}), (PipelineTrainer, {"num_stages": 2}))
    ]
    ours = trainers[1]
    before = [t.predict(marked(7)) for t in trainers]  # ours in one piece: there is no plan yet
    for trainer in trainers:
        trainer.train()
    after = [t.predict(marked(7)) for t in trainers]
    assert ours._steps.executable.options.precision == "bf16"
    for expected, found in (before, after):
        for reference, mine in zip(expected.predictions, found.predictions, strict=True):
            assert mine.dtype == reference.dtype == "float32"
            assert mine == pytest.approx(reference, abs=2e-2)
    expected, found = ([e["loss"] for e in t.state.log_history if "loss" in e] for t in trainers)
    assert found == pytest.approx(expected, rel=1e-3)


class Float16Trainer(Trainer):
    """What transformers does with fp16 on GPUs, on a CPU: autocast, and accelerate's scaler."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        scale_gradients(self.accelerator, self.args.device)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.float16):
            return super().compute_loss(*args, **kwargs)


def test_float16_scales_and_skips_as_accelerate_does(tmp_path) -> None:
    found = []
    for kind, extra in ((Float16Trainer, {}), (PipelineTrainer, {"num_stages": 2})):
        options = {"fp16": kind is PipelineTrainer, "max_steps": 4, "max_grad_norm": 0.5}
        trainer = kind(
            model=bert_qa(), args=arguments(tmp_path, **options), train_dataset=marked(), **extra
        )
        scaler = trainer.accelerator.scaler
        start = {"scale": 2.0**24, "backoff_factor": 2.0**-10, "growth_interval": 2}
        scaler.load_state_dict({**scaler.state_dict(), **start})
        trainer.train()
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        found.append((history, scaler.state_dict(), trainer.lr_scheduler.last_epoch))
    (expected, scaling, steps), (ours, own_scaling, own_steps) = found
    assert (own_scaling, own_steps) == (scaling, steps) == ({**scaling, "scale": 2.0**15}, 3)
    for key in ("loss", "grad_norm", "learning_rate"):
        pairs = [(a[key], b[key]) for a, b in zip(ours, expected, strict=True)][1:]
        assert [a for a, _ in pairs] == pytest.approx([b for _, b in pairs], rel=1e-3)


def test_checkpointing_recomputes_every_block(tmp_path) -> None:
    _, ours = both(CLASSES, bert_qa, tmp_path, marked(), {CHECKPOINTING: True})
    executable = ours._steps.executable
    assert executable._cache.recompute == {block.name for block in ours.plan.blocks}


NOISY = {"neftune_noise_alpha": 5.0, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}


def test_noise_on_embeddings_is_that_of_transformers_also_when_resumed(tmp_path) -> None:
    theirs, ours = both(CLASSES, gpt2, tmp_path / "whole", copies(), NOISY)
    quiet, _ = both(CLASSES, gpt2, tmp_path / "quiet", copies(), {"max_steps": 4})
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (theirs, quiet)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)
    assert not hasattr(ours.model.get_input_embeddings(), "neftune_noise_alpha")
    again = PipelineTrainer(
        gpt2(), arguments(tmp_path / "again", **NOISY), train_dataset=copies(), num_stages=2
    )
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, value in theirs.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_noise_on_embeddings_for_code_around_the_model(tmp_path) -> None:
    options = {**NOISY, "label_smoothing_factor": 0.1, CHECKPOINTING: True}
    both(CLASSES, gpt2, tmp_path, copies(), options)


def test_noise_on_embeddings_of_another_call_is_refused(tmp_path) -> None:
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(64, 4), nn.Linear(4, 2)

        def get_input_embeddings(self):
            return self.embedding

        def forward(self, input_ids, labels=None):
            hidden = self.embedding(input_ids[:, 1:])
            return {"loss": self.head(hidden).pow(2).mean()}

    trainer = PipelineTrainer(
        Twice(), arguments(tmp_path, neftune_noise_alpha=5.0), train_dataset=copies(), num_stages=1
    )
    with pytest.raises(StageError, match=r"adds noise to embeddings of shape .* this model embeds"):
        trainer.train()


def test_batches_that_are_too_large_are_made_smaller(tmp_path, monkeypatch) -> None:
    """transformers halves the microbatch; ours has another plan made for it."""
    found = []
    for base in CLASSES:
        model, sizes = gpt2(), []

        def watched(module, args, kwargs, output, sizes=sizes):
            if module.training and not capturing():
                sizes.append(len(args[0]))
                if sizes[-1] > 1:
                    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 GB")

        model.transformer.h[1].register_forward_hook(watched, with_kwargs=True)
        options = {"auto_find_batch_size": True, "per_device_train_batch_size": 4, "max_steps": 2}
        extra = {"num_stages": 2} if base is PipelineTrainer else {}
        trainer = base(model, arguments(tmp_path, **options), train_dataset=copies(), **extra)
        trainer.train()
        found.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
        assert sizes[-1] == trainer._train_batch_size == trainer.state.train_batch_size == 1
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.acceptance
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's
def test_blocks_are_compiled_where_transformers_compiles_the_model(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # which transformers sets, to be undone
    plain, compiled = (
        PipelineTrainer(bert_qa(), arguments(tmp_path, torch_compile=c), train_dataset=marked(),
                        num_stages=2)
        for c in (False, True)
    )  # fmt: skip
    losses = [trainer.train().training_loss for trainer in (plain, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert compiled._steps.executable.options.compile_blocks


def test_data_without_labels_and_nested_outputs(tmp_path) -> None:
    rows = [
        {key: value for key, value in marked()[i].items() if "positions" not in key}
        for i in range(7)
    ]
    found = []
    for kind, extra in ((Trainer, {}), (PipelineTrainer, {"num_stages": 2})):
        model = bert_qa()
        model.config.output_hidden_states = True
        trainer = kind(model=model, args=arguments(tmp_path), train_dataset=marked(), **extra)
        trainer.train()
        found.append([trainer.predict(some) for some in (rows[:1], rows)])
    for theirs, ours in zip(*found, strict=True):
        assert_same_nesting(theirs, ours)


def assert_same_nesting(theirs: Any, ours: Any) -> None:
    assert theirs.label_ids is ours.label_ids is None
    assert not any("loss" in key for key in ours.metrics)
    assert len(ours.predictions) == len(theirs.predictions) == 3
    assert len(ours.predictions[2]) == len(theirs.predictions[2]) == 4
    for mine, reference in zip(
        (*ours.predictions[:2], *ours.predictions[2]),
        (*theirs.predictions[:2], *theirs.predictions[2]),
        strict=True,
    ):
        assert mine == pytest.approx(reference, abs=1e-4)


def test_models_that_return_tuples(tmp_path) -> None:
    found = []
    for kind, extra in ((Trainer, {}), (PipelineTrainer, {"num_stages": 2})):
        model = bert_qa()
        model.config.return_dict = False
        trainer = kind(model=model, args=arguments(tmp_path), train_dataset=marked(), **extra)
        trainer.train()
        found.append(trainer.predict(marked(5)))
    theirs, ours = found
    assert len(ours.predictions) == len(theirs.predictions) == 2
    for mine, reference in zip(ours.predictions, theirs.predictions, strict=True):
        assert mine == pytest.approx(reference, abs=1e-4)
    assert ours.metrics["test_loss"] == pytest.approx(theirs.metrics["test_loss"], rel=1e-5)


def broken(tmp_path, weight: float, rate: float, **options: Any) -> PipelineTrainer:
    model = gpt2()
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = weight
    args = arguments(tmp_path, learning_rate=rate, max_steps=3, **options)
    return PipelineTrainer(model=model, args=args, train_dataset=copies(), num_stages=2)


@pytest.mark.parametrize("in_order", [False, True])
def test_a_run_without_a_finite_loss_does_not_end_well(tmp_path, caplog, *, in_order: bool) -> None:
    trainer = broken(tmp_path, weight=math.nan, rate=0.1)
    trainer.loss_in_order = in_order
    with pytest.raises(
        StageError, match="3 optimizer steps have taught the model nothing: none of"
    ):
        trainer.train()
    assert caplog.text.count("the loss of step 1 is nan") == 1
    assert trainer.state.global_step == 3, "as many as transformers makes"


def test_a_first_step_that_breaks_the_weights_does_not_end_well(tmp_path) -> None:
    trainer = broken(tmp_path, weight=1.0, rate=math.inf)
    message = r"only the first one .* and transformer\.wte\.weight is not finite now"
    with pytest.raises(StageError, match=message):
        trainer.train()
    one = broken(tmp_path, weight=1.0, rate=0.1)
    one.args.max_steps = 1
    one.train()
