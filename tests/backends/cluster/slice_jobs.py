"""What the processes of the tests of tensor parallelism do; results are plain data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import ipu_pipeline as ipp
from ipu_pipeline.errors import PipelineError
from tests.backends.cluster import jobs
from tests.backends.cluster.jobs import built, compiled, digest
from tests.tiny_models import TINY, TinyModel

MAX_NORM = 0.5
_LLAMA = TINY["llama"]
_SMALL = {**_LLAMA.options, "num_hidden_layers": 2, "head_dim": 8}


def _like(config: str, **changes: Any) -> TinyModel:
    return TinyModel(getattr(transformers, config), "causal-lm", {**_SMALL, **changes}, {})


MODELS = {
    "llama-tied": replace(_LLAMA, options={**_LLAMA.options, "tie_word_embeddings": True}),
    "mixtral-wide": replace(
        TINY["mixtral"], options={**TINY["mixtral"].options, "num_key_value_heads": 4}
    ),
    "mixtral-dropout": replace(
        TINY["mixtral"], options={**TINY["mixtral"].options, "attention_dropout": 0.1}
    ),
    "llama-dropout": replace(_LLAMA, options={**_LLAMA.options, "attention_dropout": 0.1}),
    "qwen3": _like("Qwen3Config"),
    "qwen2": _like("Qwen2Config"),
    "phi3": _like("Phi3Config", eos_token_id=1, bos_token_id=1),
    "gemma2": _like("Gemma2Config"),
    "olmo2": _like("Olmo2Config"),
    "gpt-neox": _like("GPTNeoXConfig"),
    "gpt-oss": _like("GptOssConfig", num_local_experts=4),
    "qwen3-moe": _like(
        "Qwen3MoeConfig", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
    "cohere": _like("CohereConfig"),
    "starcoder2": _like("Starcoder2Config", use_bias=True),
    "starcoder2-dropout": _like(
        "Starcoder2Config",
        embedding_dropout=0.1,
        residual_dropout=0.1,
        tie_word_embeddings=True,
        num_hidden_layers=4,
    ),
    "deepseek-v3": _like(
        "DeepseekV3Config",
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
}


def with_models(job: Any) -> Any:
    def run(**arguments: Any) -> Any:
        with mock.patch.dict(TINY, MODELS):
            return job(**arguments)

    return run


gradients = with_models(jobs.gradients)
gradients_or_refusal = with_models(jobs.gradients_or_refusal)


@with_models
def trained(
    name: str, planned: dict[str, Any], steps: int, path: str = "", load: str = "", **options: Any
) -> dict[str, Any]:
    """Load if asked, train with clipping, save if asked, train on; read it as users do."""
    options = {"max_grad_norm": MAX_NORM, **options}
    made, batch = compiled(name, planned=planned, **options)
    with made:
        if load:
            made.load_checkpoint(load)
        results = [made.train_step(batch) for _ in range(steps)]
        held = sum(p.nbytes for p in made.model.parameters())
        own = {}
        if options.get("target") != "local":
            parameters = [(n, p) for n, p in made.model.named_parameters() if jobs.held(made, p)]
            own = {n: digest(made._slices.whole(p, p)) for n, p in parameters}
        state = {n: digest(t) for n, t in made.state_dict().items()}
        if path:
            made.save_checkpoint(path, blocking=False)
            results += [made.train_step(batch) for _ in range(steps)]
    read = {}
    if path and made.groups.layout.rank == 0:
        model = type(made.model).from_pretrained(path)
        read = {n: digest(t) for n, t in model.state_dict().items()}
    return {
        "losses": [result.loss for result in results],
        "norms": [result.grad_norm for result in results],
        "held": held,
        "own": own,
        "state": state,
        "read": read,
    }


@with_models
def continued(name: str, planned: dict[str, Any], steps: int, paths: list[str]) -> Any:
    """Go on from each of several checkpoints; return per path what was loaded and the losses.

    ``dcp`` is what torch.distributed.checkpoint reads, each process a quarter of every tensor.
    """
    made, batch = compiled(name, planned=planned, max_grad_norm=MAX_NORM)
    found = []
    with made:
        for path in paths:
            made.load_checkpoint(path)
            state = {n: digest(t) for n, t in made.state_dict().items()}
            losses = [made.train_step(batch).loss for _ in range(steps)]
            found.append({"state": state, "losses": losses})
        for path, one in zip(paths, found, strict=True):
            one["dcp"] = _read_by_dcp(path)
    return found


def _read_by_dcp(path: str) -> dict[str, str]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shapes = {
        name: saved.get_slice(name).get_shape()
        for file in sorted(Path(path).glob("model-*.safetensors"))
        for saved in [safe_open(file, "pt")]
        for name in saved.keys()  # noqa: SIM118 - no mapping
    }
    state: dict[str, Any] = {
        name: distribute_tensor(torch.zeros(shape), mesh, [Shard(0)])
        for name, shape in shapes.items()
    }
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(path))
    return {name: digest(tensor.full_tensor()) for name, tensor in state.items()}


@with_models
def from_meta(
    name: str, planned: dict[str, Any], weights: str | None = None, path: str = ""
) -> Any:
    """Train a model from meta; return losses and the bytes that this rank holds."""
    _, plan, batch = built(name, **planned)
    model, _ = TINY[name].build(device="meta")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with ipp.compile(
        model, plan, target="distributed", optimizer=optimizer, weights=weights
    ) as made:
        losses = [made.train_step(batch).loss for _ in range(3)]
        if path:
            made.save_checkpoint(path)
        held = sum(p.untyped_storage().nbytes() for p in model.parameters())
    refused = ""
    try:
        model(**batch)
    except PipelineError as error:
        refused = str(error)
    return {"losses": losses, "held": held, "refused": refused}


def adapters_from_meta(
    weights: str, num_stages: int, path: str, target: str = "distributed"
) -> dict[str, Any]:
    """Train LoRA over a base from meta; return losses, saved adapters, and the bytes held."""
    import peft

    base, example = TINY["llama"].build(device="meta")
    batch = TINY["llama"].batch(batch_size=8, seed=3)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    plan = ipp.plan(model, example, num_stages=num_stages, microbatches=4)
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=1e-2, eps=1e-3)
    with ipp.compile(
        model, plan, target=target, optimizer=optimizer, weights=weights, self_check=False
    ) as made:
        losses = [made.train_step(batch).loss for _ in range(3)]
        held = sum(p.untyped_storage().nbytes() for p in model.parameters())
        made.save_checkpoint(path)
    saved = {n: t for f in Path(path).glob("model*.safetensors") for n, t in load_file(f).items()}
    sums = {n: float(t.double().abs().sum()) for n, t in saved.items()}
    return {"losses": losses, "held": held, "sums": sums}


@with_models
def evaluated(name: str, planned: dict[str, Any]) -> list[float]:
    """Return how far logits of batches of several sizes are from the whole model's."""
    made, batch = compiled(name, planned=planned, learning_rate=None, loss_weights=None)
    cuts = [(5, 16), (3, 11)]
    batches = [{k: v[:size, :length] for k, v in batch.items()} for size, length in cuts]
    with made:
        found = [made.eval_step(own) for own in batches]
    made.model.eval()
    with torch.no_grad():
        expected = [made.model(**own) for own in batches]
    return [
        max((a.outputs["logits"] - b.logits).abs().max().item(), abs(a.loss - b.loss.item()))
        for a, b in zip(found, expected, strict=True)
    ]
