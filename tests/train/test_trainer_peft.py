"""LoRA: only adapters are trained and saved; the blocks lie inside PEFT's wrapper."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2LMHeadModel, Trainer

from ipu_pipeline.train.trainer import PipelineTrainer
from tests.tiny_models import TINY
from tests.train.helpers import load_script
from tests.train.test_trainer_losses import CLASSES, arguments, both

peft = pytest.importorskip("peft")
# Of peft's own making, with transformers 5.23.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def adapted(dropout: float = 0.0) -> torch.nn.Module:
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_dropout=dropout,
        target_modules=["c_attn"],
        fan_in_fan_out=True,
        init_lora_weights=False,
    )
    return peft.get_peft_model(TINY["gpt2-lm"].build()[0], config)


def test_same_gradients_and_none_for_frozen_weights(tmp_path) -> None:
    rows = load_script("causal_lm").Copies(32, seed=5)
    _, ours = both(CLASSES, adapted, tmp_path, rows, eval_dataset=rows)
    assert all("lora_" in name for name in ours.gradients)
    assert len(ours.gradients) == 8
    blocks = [block.name for block in ours.plan.blocks]
    assert [name for name in blocks if ".h." in name] == [
        f"base_model.model.transformer.h.{index}" for index in range(4)
    ]


def test_checkpoints_hold_adapters_and_resume(tmp_path) -> None:
    rows = load_script("causal_lm").Copies(40, seed=5)
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    model = adapted(dropout=0.1)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = PipelineTrainer(
        model, arguments(tmp_path, **options), train_dataset=rows, num_stages=2
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files
    again = adapted(dropout=0.1)
    again.load_state_dict(start)
    resumed = PipelineTrainer(
        again, arguments(tmp_path / "again", **options), train_dataset=rows, num_stages=2
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
        if "lora_" not in name:
            assert torch.equal(value, start[name]), name

    base = TINY["gpt2-lm"].build()[0]
    assert isinstance(base, GPT2LMHeadModel)
    base.load_state_dict(
        {n.removeprefix("base_model.model.").replace("base_layer.", ""): v
         for n, v in start.items() if "lora_" not in n}
    )  # fmt: skip
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    expected = Trainer(loaded, arguments(tmp_path), eval_dataset=rows).evaluate()["eval_loss"]
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(expected, rel=1e-5)
