"""Trainings by TRL's trainers, on a tiny Llama with random weights; all results are plain data."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from ipu_pipeline.train import PipelineMixin

WORDS = "a b c d e f g h i j k l m n o p".split()  # noqa: SIM905
SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}


def tokenizer() -> Any:
    names = [*SPECIAL.values(), *WORDS]
    made = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **SPECIAL)


def causal_lm(kind: Any = transformers.LlamaForCausalLM, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=1, initializer_range=0.2, **changes,
    )  # fmt: skip
    return kind(config)


def words(n: int, length: int) -> str:
    return " ".join(WORDS[(3 * n + 5 * i + i * i) % len(WORDS)] for i in range(length))


def texts(count: int = 12) -> list[dict[str, str]]:
    return [{"text": words(n, 4 + n % 5)} for n in range(count)]


def completions(count: int = 12) -> list[dict[str, str]]:
    return [
        {"prompt": words(n, 3 + n % 3), "completion": " " + words(n + 7, 2 + n % 4)}
        for n in range(count)
    ]


def preferences(count: int = 12) -> list[dict[str, str]]:
    return [
        {
            "prompt": words(n, 3 + n % 3),
            "chosen": " " + words(n + 7, 2 + n % 4),
            "rejected": " " + words(n + 2, 3 + n % 3),
        }
        for n in range(count)
    ]


def own_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    flat = outputs.logits[:, :-1].flatten(0, 1)
    summed = nn.functional.cross_entropy(flat, labels[:, 1:].flatten(), reduction="sum")
    count = labels[:, 1:].ne(-100).sum() if num_items_in_batch is None else num_items_in_batch
    return 2 * summed / count


def lora() -> Any:
    import peft

    return peft.LoraConfig(r=4, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])


def vowels(completions: list[str], **_: Any) -> list[float]:
    return [sum(text.count(vowel) for vowel in "aeio") - 0.1 * len(text) for text in completions]


def sft(rows: Any, more: dict[str, Any] | None = None, **config: Any) -> tuple[Any, ...]:
    return "SFT", rows, config, more or {}


def dpo(more: dict[str, Any] | None = None, **config: Any) -> tuple[Any, ...]:
    return "DPO", preferences(), config, more or {}


FORMS: dict[str, tuple[Any, ...]] = {
    "text": sft(texts()),
    "prompt_completion": sft(completions()),
    "packing": sft(texts(24), packing=True, max_length=16),
    "wrapped": sft(texts(24), packing=True, max_length=8, packing_strategy="wrapped"),
    "padding_free": sft(texts(), padding_free=True, max_length=None),
    "chunked": sft(texts(), loss_type="chunked_nll"),
    "dft": sft(completions(), loss_type="dft"),
    "label_smoothing": sft(texts(), label_smoothing_factor=0.1),
    "function": sft(texts(), {"compute_loss_func": own_loss}),
    "adapters": sft(texts(), {"peft_config": lora}),
    "reference": dpo({"ref_model": causal_lm}),
    "reference_from_path": dpo(),
    "precomputed": dpo(precompute_ref_log_probs=True),
    "without_adapters": dpo({"peft_config": lora}),
    "several_losses": dpo({"ref_model": causal_lm}, loss_type=["sigmoid", "ipo", "sft"],
                          loss_weights=[0.8, 0.2, 1.0], ld_alpha=0.5),
    "reward": ("Reward", preferences(), {}, {}),
    "rewards_of_generated": ("GRPO", [{"prompt": row["prompt"]} for row in completions()],
                             {"num_generations": 2, "max_completion_length": 6, "beta": 0.1,
                              "scale_rewards": "batch", "per_device_eval_batch_size": 4},
                             {"reward_funcs": vowels}),
}  # fmt: skip


def made(name: str, folder: str, *, pipeline: bool, **changes: Any) -> Any:
    """Return the trainer of a form, TRL's own or over two stages."""
    import datasets
    import trl

    kind, rows, config, more = FORMS[name]
    base = getattr(trl, f"{kind}Trainer")
    own = type("Mixed", (PipelineMixin, base), {}) if pipeline else base
    if kind == "Reward":
        model = causal_lm(transformers.LlamaForSequenceClassification, num_labels=1)
    else:
        model = causal_lm()
    path = Path(folder) / "start"
    model.save_pretrained(path)  # where TRL finds a reference model
    model.config._name_or_path = str(path)
    args = getattr(trl, f"{kind}Config")(
        output_dir=folder, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
        dataloader_pin_memory=False, save_strategy="no", max_steps=3, learning_rate=0.02,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1, seed=3,
        optim="sgd", lr_scheduler_type="constant",
        **{"gradient_checkpointing": False, "per_device_eval_batch_size": 3, **config, **changes},
    )  # fmt: skip
    more = {k: v() if k in ("ref_model", "peft_config") else v for k, v in more.items()}
    data = datasets.Dataset.from_list(copy.deepcopy(rows))
    if "precompute_ref_log_probs" in config:  # TRL shares them between processes beside a file
        kept, new = Path(folder) / "rows", tempfile.mkdtemp(dir=folder)
        data.save_to_disk(new)
        with contextlib.suppress(OSError):  # another process was here before
            Path(new).rename(kept)
        data = datasets.load_from_disk(kept)
    return own(
        model=model, args=args, train_dataset=data, eval_dataset=data.select(range(5)),
        processing_class=tokenizer(), **more, **({"num_stages": 2} if pipeline else {}),
    )  # fmt: skip


def trained(name: str, folder: str, *, pipeline: bool = True, **changes: Any) -> dict[str, Any]:
    """Return what is logged of a training and an evaluation, and the weights behind it."""
    trainer = made(name, folder, pipeline=pipeline, **changes)
    trainer.train()
    trainer.evaluate()
    times = ("runtime", "per_second", "flos", "step_time")
    history = [
        {k: v for k, v in entry.items() if not any(word in k for word in times)}
        for entry in trainer.state.log_history
    ]
    weights = [float(p.detach().abs().sum()) for p in trainer.model.parameters()]
    stages = trainer.plan.num_stages if pipeline else 2
    return {"history": history, "weights": weights, "stages": stages}
