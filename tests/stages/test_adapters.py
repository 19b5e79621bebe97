"""PEFT adapters over a model on meta: the base's files are read, adapters begin as PEFT says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ipu_pipeline.checkpoint.slices import Slices
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.stages.materialize import SINGLE, materialize
from tests.tiny_models import TINY

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]}


def adapted(**changes: Any) -> nn.Module:
    base, _ = TINY["llama"].build(device="meta")
    config = changes.pop("config", None) or peft.LoraConfig(**{**LORA, **changes})
    return peft.get_peft_model(base, config)


def test_the_base_is_read_and_adapters_do_not_depend_on_what_is_held(tmp_path: Path) -> None:
    base, batch = TINY["llama"].build()
    base.save_pretrained(tmp_path, max_shard_size="20KB")
    whole, part, other = (adapted() for _ in range(3))
    names = [name for name, _ in whole.named_parameters()]
    held = names[::2]
    materialize(whole, tmp_path, seed=3)
    materialize(part, tmp_path, seed=3, held=held)
    materialize(other, tmp_path, seed=4)
    with torch.no_grad():
        assert torch.equal(whole(**batch).logits, base(**batch).logits)  # B is 0
    with pytest.raises(LoweringError, match=r"stand-ins for the others; save_checkpoint\(folder\)"):
        part.save_pretrained(tmp_path / "adapters")  # type: ignore[operator]
    whole.save_pretrained(tmp_path / "adapters")  # type: ignore[operator]
    own, some, differs = (dict(m.named_parameters()) for m in (whole, part, other))
    assert all(torch.equal(own[n], some[n]) for n in held)
    drawn = {n for n in names if "lora_A" in n}
    assert drawn
    assert {n for n in names if not torch.equal(own[n], differs[n])} == drawn
    kept = next(p for n, p in own.items() if "modules_to_save" in n)
    before = next(p for n, p in own.items() if "original_module" in n)
    assert torch.equal(kept, before)
    assert kept.data_ptr() != before.data_ptr()
    assert [n for n, p in own.items() if p.requires_grad] == [
        n for n in names if "lora_" in n or "modules_to_save" in n
    ]


def test_files_with_adapters_are_read_as_they_are(tmp_path: Path) -> None:
    base, batch = TINY["llama"].build()
    config = peft.LoraConfig(**LORA, init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    save_file({n: t.clone() for n, t in model.state_dict().items()}, tmp_path / SINGLE)
    again = adapted(init_lora_weights=False)
    materialize(again, tmp_path, seed=3)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("kind", ["injected", "mixed"])
def test_adapters_that_others_wrap_read_the_base(tmp_path: Path, kind: str) -> None:
    base, batch = TINY["llama"].build()
    base.save_pretrained(tmp_path)
    model, _ = TINY["llama"].build(device="meta")
    config = peft.LoraConfig(**LORA)
    if kind == "mixed":
        model = peft.get_peft_model(model, config, mixed=True)
    else:
        model.add_adapter(config)
    materialize(model, tmp_path, seed=3)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, base(**batch).logits)


@pytest.mark.parametrize(("start", "spread"), [("gaussian", 0.5), (False, 0.0)])
def test_other_beginnings(start: Any, spread: float) -> None:
    model = adapted(init_lora_weights=start)
    materialize(model, seed=3)
    own = dict(model.named_parameters())
    first = torch.cat([p.detach().flatten() for n, p in own.items() if "lora_A" in n])
    second = torch.cat([p.detach().flatten() for n, p in own.items() if "lora_B" in n])
    assert bool(second.any()) == (start is False)
    assert not spread or first.std() == pytest.approx(spread, rel=0.2)  # 1 / r


class Slice(Slices):
    size = 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, r"adapter 'default' \(LORA\) is no LoRA that begins with"),
        (
            {"config": peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])},
            r"adapter 'default' \(IA3\) is no LoRA that begins with init_lora_weights True",
        ),
        ({"merge": True}, r"adapter 'default' was merged into weights .* call unmerge_adapter\(\)"),
        (
            {"layer_replication": [[0, 1], [0, 2]]},
            r"layer_replication of adapter 'default' repeats",
        ),
    ],
)
def test_what_depends_on_weights_is_refused(changes: Any, message: str) -> None:
    changes = copy.deepcopy(changes)
    merge = changes.pop("merge", False)
    model: Any = adapted(**changes)
    if merge:
        model.merge_adapter()
    with pytest.raises(LoweringError, match=message):
        materialize(model)


def test_slices_are_refused(tmp_path: Path) -> None:
    TINY["llama"].build()[0].save_pretrained(tmp_path)
    with pytest.raises(LoweringError, match="on meta do not go with tensor parallelism; plan with"):
        materialize(adapted(), tmp_path, slices=Slice())
