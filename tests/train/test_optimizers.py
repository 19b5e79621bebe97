import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration, Trainer
from transformers import TrainingArguments as TheirArguments

from ipu_pipeline.ops.adamw import StochasticRoundingAdamW
from ipu_pipeline.train import TrainingArguments, build_optimizer, build_scheduler


def bert():
    config = BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2,
    )  # fmt: skip
    return BertForMaskedLM(config)


def t5():
    return T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    )


def frozen_bert():
    model = bert()
    model.bert.embeddings.requires_grad_(requires_grad=False)
    return model


SETTINGS = {
    "learning_rate": 3e-4,
    "weight_decay": 0.02,
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-6,
}


@pytest.mark.parametrize("build", [bert, t5, frozen_bert])
def test_groups_are_those_of_the_trainer(build, tmp_path):
    model = build()
    theirs = TheirArguments(output_dir=str(tmp_path), use_cpu=True, optim="adamw_torch", **SETTINGS)
    expected = Trainer(model, theirs).create_optimizer()
    optimizer = build_optimizer(model, TrainingArguments(**SETTINGS))
    assert len(optimizer.param_groups) == len(expected.param_groups) == 2
    for ours, wanted in zip(optimizer.param_groups, expected.param_groups, strict=True):
        assert [id(p) for p in ours["params"]] == [id(p) for p in wanted["params"]]
        for name in ("lr", "weight_decay", "betas", "eps", "amsgrad"):
            assert ours[name] == wanted[name]
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) == sum(p.requires_grad for p in model.parameters())


def test_nothing_to_train():
    model = torch.nn.Linear(2, 2).requires_grad_(requires_grad=False)
    with pytest.raises(ValueError, match="Linear has no trainable parameter; set requires_grad"):
        build_optimizer(model, TrainingArguments())


def test_it_trains_as_the_trainers(tmp_path):
    ours, theirs = bert(), bert()
    theirs.load_state_dict(ours.state_dict())
    optimizers = [
        build_optimizer(ours, TrainingArguments(**SETTINGS)),
        Trainer(
            theirs,
            TheirArguments(output_dir=str(tmp_path), use_cpu=True, optim="adamw_torch", **SETTINGS),
        ).create_optimizer(),
    ]
    ids = torch.arange(40).reshape(4, 10)
    for _ in range(5):
        losses = []
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            model.eval()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_stochastic_rounding_is_for_bfloat16_weights():
    arguments = TrainingArguments(stochastic_rounding=True, seed=7)
    model = bert()
    message = r"those of BertForMaskedLM are torch.float32; load the model with dtype=torch.bfloat"
    with pytest.raises(ValueError, match=message):
        build_optimizer(model, arguments)
    rounding = build_optimizer(model.bfloat16(), arguments)
    assert isinstance(rounding, StochasticRoundingAdamW)
    assert [group["seed"] for group in rounding.param_groups] == [7, 7]
    assert type(build_optimizer(model, TrainingArguments())) is torch.optim.AdamW


@pytest.mark.parametrize(
    "settings",
    [
        {"lr_scheduler_type": "linear", "warmup_ratio": 0.2},
        {"lr_scheduler_type": "cosine", "warmup_steps": 3},
        {"lr_scheduler_type": "constant"},
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": '{"power": 2.0}'},
    ],
)
def test_schedule_is_that_of_the_trainer(settings, tmp_path):
    model = bert()
    share = settings.get("warmup_ratio", settings.get("warmup_steps", 0))
    translated = {k: v for k, v in settings.items() if not k.startswith("warmup")}
    theirs = TheirArguments(
        output_dir=str(tmp_path), use_cpu=True, warmup_steps=share, **translated
    )
    trainer = Trainer(model, theirs)
    trainer.create_optimizer_and_scheduler(num_training_steps=10)
    optimizer = build_optimizer(model, TrainingArguments(**settings))
    scheduler = build_scheduler(optimizer, TrainingArguments(**settings), 10)
    for _ in range(10):
        assert scheduler.get_last_lr() == trainer.lr_scheduler.get_last_lr()
        for optim, sched in ((optimizer, scheduler), (trainer.optimizer, trainer.lr_scheduler)):
            optim.step()
            sched.step()
