"""Tensor parallelism: exact on a mesh of replicas, positions and slices, or refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from ipu_pipeline.backends.cluster.cut_plan import (
    cut_plan,
    refuse_attentions,
    refuse_between_blocks,
    refuse_whole_tensors,
    refuse_with_slices,
)
from ipu_pipeline.backends.cluster.tensor_parallel import TensorParallel
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.stages.executable import ExecutionOptions
from tests.backends.cluster import slice_jobs
from tests.backends.cluster.matrix import difference
from tests.backends.cluster.processes import Processes
from tests.backends.cluster.slice_jobs import MODELS
from tests.tiny_models import TINY
from tests.versions import needs_styles

# (dp, pp, tp) of one batch of 4 microbatches.
MESHES: dict[tuple[int, int, int], dict[str, Any]] = {
    (1, 2, 2): {"num_stages": 2, "tp": 2},
    (2, 1, 2): {"num_stages": 1, "tp": 2, "replicas": 2, "microbatches": 2},
    (2, 2, 1): {"num_stages": 2, "replicas": 2, "microbatches": 2},
    (4, 1, 1): {"num_stages": 1, "replicas": 4, "microbatches": 1},
    (1, 1, 4): {"num_stages": 1, "tp": 4},
    (1, 4, 1): {"num_stages": 4},
}


def check_gradients(found: list[dict[str, Any]]) -> None:
    assert set().union(*(rank["found"] for rank in found)) == found[0]["expected"]
    for rank in found:
        assert rank["loss"] == pytest.approx(rank["expected_loss"], rel=1e-6)
        assert rank["error"] < 1e-6
        assert rank["own_error"] < 1e-3


def local(name: str, steps: int) -> list[float]:
    losses: list[float] = slice_jobs.trained(
        name=name, planned={"num_stages": 1}, steps=steps, target="local"
    )["losses"]
    return losses


@needs_styles
def test_it_trains_as_one_process_and_a_checkpoint_loads_under_another_mesh(
    four: Processes, tmp_path: Path
) -> None:
    path, name = str(tmp_path / "checkpoint"), "llama-tied"
    expected = local(name, 4)
    first = four.run("slice_jobs.trained", name=name, planned=MESHES[1, 2, 2], steps=2, path=path)
    assert difference(first[0]["losses"], expected) < 1e-5
    assert all(rank["state"] == first[0]["state"] for rank in first)
    assert first[0]["read"] == first[0]["state"]  # by from_pretrained
    whole = sum(p.nbytes for p in MODELS[name].build()[0].parameters())
    assert max(rank["held"] for rank in first) < 0.52 * whole
    again = four.run("slice_jobs.trained", name=name, planned=MESHES[2, 1, 2], steps=2, load=path,
                     replicated_tensor_sharding=True)  # fmt: skip
    assert difference(again[0]["losses"], expected[2:]) < 1e-5


@needs_styles
@pytest.mark.acceptance
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("name", "half"), [("llama-tied", 25), ("mixtral-wide", 5), ("starcoder2-dropout", 5)]
)
def test_every_mesh_gives_the_losses_of_one_process(
    four: Processes, tmp_path: Path, name: str, half: int
) -> None:
    """Losses with clipping; a checkpoint of any mesh loads under any other, bit by bit."""
    meshes = [m for (*_, tp), m in MESHES.items() if tp < 4 or "wide" in name]
    paths = [str(tmp_path / str(number)) for number in range(len(meshes))]
    expected = local(name, 2 * half)
    saved: list[dict[str, Any]] = []
    for path, planned in zip(paths, meshes, strict=True):
        given = {"name": name, "planned": planned, "steps": half, "path": path}
        saved += four.run("slice_jobs.trained", **given)[:1]
        assert difference(saved[-1]["losses"], expected) < 1e-5
        assert saved[-1]["read"] == saved[-1]["state"]  # by from_pretrained
    for planned in meshes:
        found = four.run("slice_jobs.continued", name=name, planned=planned, steps=3, paths=paths)
        for before, after in zip(saved, found[0], strict=True):
            assert after["state"] == before["state"]
            assert after["dcp"].items() <= before["state"].items()
            assert difference(after["losses"], expected[half : half + 3]) < 1e-5


@needs_styles
@pytest.mark.acceptance
@pytest.mark.parametrize("schedule", ["zbv", "interleaved", "dualpipev"])
def test_schedules(four: Processes, schedule: str) -> None:
    planned = {"num_stages": 4, "tp": 2}
    check_gradients(four.run("slice_jobs.gradients", name="mixtral", planned=planned,
                             schedule=schedule, recompute="all"))  # fmt: skip


@needs_styles
@pytest.mark.acceptance
@pytest.mark.parametrize("name", sorted(set(MODELS) - {"llama-dropout"}))
def test_architectures(two: Processes, name: str) -> None:
    planned = {"num_stages": 1, "tp": 2}
    check_gradients(two.run("slice_jobs.gradients", name=name, planned=planned))


@needs_styles
@pytest.mark.acceptance
def test_batches_of_other_sizes_are_evaluated(four: Processes) -> None:
    found = four.run("slice_jobs.evaluated", name="llama", planned=MESHES[1, 2, 2])
    assert max(max(rank) for rank in found) < 1e-6


@needs_styles
@pytest.mark.acceptance
def test_from_meta(four: Processes, tmp_path: Path) -> None:
    model = MODELS["llama-tied"].build()[0]
    model.save_pretrained(tmp_path)
    planned, name = MESHES[1, 2, 2], "llama-tied"
    found = four.run("slice_jobs.from_meta", name=name, planned=planned, weights=str(tmp_path))
    expected = four.run("slice_jobs.from_meta", name=name, planned=MESHES[1, 4, 1],
                        weights=str(tmp_path))  # fmt: skip
    assert difference(found[0]["losses"], expected[0]["losses"]) < 1e-5
    assert max(rank["held"] for rank in found) < 0.35 * sum(p.nbytes for p in model.parameters())
    scratch = [
        four.run("slice_jobs.from_meta", name=name, planned=own)[0]["losses"]
        for own in (planned, MESHES[1, 4, 1])
    ]
    assert difference(*scratch) < 1e-5
    assert "slices of the model's weights only" in found[0]["refused"]


@needs_styles
@pytest.mark.acceptance
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_adapters_over_bases_of_which_each_process_has_its_stage(
    two: Processes, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    base = TINY["llama"].build()[0]
    base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    given = {"weights": str(tmp_path / "base")}
    found = two.run(
        "slice_jobs.adapters_from_meta", num_stages=2, path=str(tmp_path / "two"), **given
    )
    one = slice_jobs.adapters_from_meta(
        num_stages=1, path=str(tmp_path / "one"), target="local", **given
    )
    for rank in found:
        assert difference(rank["losses"], one["losses"]) < 1e-6
        assert rank["sums"] == pytest.approx(one["sums"], rel=1e-5)
    assert max(rank["held"] for rank in found) < 0.75 * one["held"]


# ---- what is refused ----------------------------------------------------------------------------


def plan(granularity: str = "layer", **stage: Any) -> Any:
    return SimpleNamespace(
        granularity=granularity,
        stages=(SimpleNamespace(serialize=stage.get("serialize", {}), table_slices=()),),
    )


def llama(**changes: Any) -> nn.Module:
    return TINY["llama"].make(**{**TINY["llama"].options, "num_hidden_layers": 1, **changes})


def model_of(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config)


@needs_styles
def test_what_cannot_be_cut_is_refused() -> None:
    model = model_of(llama())
    assert cut_plan(model, plan(), 1).parameters == ()
    assert set(cut_plan(model, plan(), 2).blocks) == {"model.layers.0"}
    attention = model.model.layers[0].self_attn

    def refused(what: str, tp: int = 2, own: Any = model, of: Any = None) -> None:
        with pytest.raises(LoweringError, match=what):
            cut_plan(own, of or plan(), tp)

    refused("k_proj.weight has 2 heads, which tp 4 does not divide", tp=4)
    refused("is no part of a larger block at granularity 'op'", of=plan("op"))
    refused("runs lm_head in slices one after another", of=plan(serialize={"lm_head": 2}))
    refused("GPT2LMHeadModel.tp_plan is empty", own=TINY["gpt2-lm"].build()[0])
    attention.q_proj.weight.register_hook(lambda g: g)
    refused(r"q_proj.weight' has a hook on its gradient")
    model = model_of(llama())
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    refused("mlp.up_proj' has a hook, which would see slices", own=model)
    model = model_of(llama())
    model.model.layers[0].mlp.up_proj.adapter = nn.Linear(2, 2)
    refused("a Linear with parts of its own", own=model)
    model = model_of(llama())
    model.model.layers[0].mlp.up_proj.weight = model.model.layers[0].mlp.gate_proj.weight
    model.tp_plan.pop("model.layers.*.mlp.up_proj")
    refused("up_proj.weight are one tied weight, and model.tp_plan does not cut", own=model)
    model = model_of(llama())
    model.tp_plan["model.norm"] = "sequence_parallel"
    refused("uses sequence_parallel, which is not supported", own=model)
    model = model_of(llama())
    model.tp_plan["model.layers.*.mlp.up_proj.weight"] = model.tp_plan.pop(
        "model.layers.*.mlp.up_proj"
    )
    refused("and does not name 'model.layers.0.mlp.up_proj'", own=model)
    refused("3 rows or columns, which cannot be cut", tp=4, own=model_of(llama(
        intermediate_size=3, num_key_value_heads=4)))  # fmt: skip
    options = ExecutionOptions(compile_blocks=True)
    refuse_with_slices(options, (), 1)
    with pytest.raises(LoweringError, match="compile_blocks works on whole blocks, and with tp 2"):
        refuse_with_slices(options, (), 2)
    with pytest.raises(LoweringError, match="offload_activations works on whole blocks"):
        refuse_with_slices(ExecutionOptions(), {"a"}, 2)
    with pytest.raises(LoweringError, match="output_attentions returns weights by head"):
        refuse_attentions({"output_attentions": True})


def test_an_older_transformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ipu_pipeline.backends.cluster.cut_plan._has_styles", lambda: False)
    with pytest.raises(LoweringError, match=r"needs the styles of transformers 5.21, and this is"):
        cut_plan(model_of(llama()), plan(), 2)


@needs_styles
def test_a_table_that_others_use_whole_stays_whole() -> None:
    model = model_of(llama(tie_word_embeddings=True))
    table = model.lm_head.weight
    assert cut_plan(model, plan(), 2).is_cut(table)
    model.tp_plan.pop("lm_head")
    assert not cut_plan(model, plan(), 2).is_cut(table)


@needs_styles
@pytest.mark.parametrize(
    ("make", "fits"),
    [(torch.optim.AdamW, True), (torch.optim.SGD, True), (torch.optim.Adafactor, False)],
)
def test_optimizers_that_need_whole_tensors_are_refused(make: Any, fits: bool) -> None:
    model = model_of(llama())
    cuts, optimizer = cut_plan(model, plan(), 2), make(model.parameters(), lr=1e-2)
    if fits:
        refuse_whole_tensors(optimizer, cuts)
        return
    with pytest.raises(LoweringError, match="Adafactor does not update every element"):
        refuse_whole_tensors(optimizer, cuts)


@pytest.fixture
def mesh() -> Iterator[Any]:
    """The first of two ranks whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    dist.destroy_process_group()


@needs_styles
def test_no_numbers_are_drawn_for_slices_and_none_leave_a_block(mesh: Any) -> None:
    model = model_of(llama(attention_dropout=0.1))
    batch = {"input_ids": torch.tensor([[1, 2, 3]])}
    cut = TensorParallel(model, None, cut_plan(model, plan(), 2), mesh)
    cut.install()
    with pytest.raises(LoweringError, match=r"'model.layers.0' drops out .*attention_dropout"):
        model(**batch)
    model.eval()
    model(**batch)
    cut.undo(None, gather=False)
    with pytest.raises(LoweringError, match="slices of the model's weights only"):
        model(**batch)
    model = model_of(llama())
    model.tp_plan.pop("model.layers.*.mlp.down_proj")
    model.model.layers[0].mlp.down_proj = nn.Linear(model.config.intermediate_size // 2, 32)
    cut = TensorParallel(model, None, cut_plan(model, plan(), 2), mesh)
    cut.install()
    with pytest.raises(LoweringError, match=r"'model.layers.0' ends where .* has cut its values"):
        model(**batch)
    prelude = SimpleNamespace(module=model.lm_head, name="prelude")
    stage = SimpleNamespace(prelude=prelude, programs=())
    with pytest.raises(LoweringError, match="around block 'prelude' uses a weight itself"):
        refuse_between_blocks([stage], cut)  # type: ignore[list-item]
