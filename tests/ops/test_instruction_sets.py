"""Every instruction set that this processor has gives the results of every other one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from ipu_pipeline.ops import extension

HERE = extension.state().instruction_set
SETS = extension.INSTRUCTION_SETS[: extension.INSTRUCTION_SETS.index(HERE or "baseline") + 1]
pytestmark = pytest.mark.skipif(not HERE, reason=extension.state().detail)

# Bits where the computation draws or rounds at random, numbers where it adds up.
RUN = """
import sys, torch
from ipu_pipeline.ops import extension
from ipu_pipeline.ops.adamw import StochasticRoundingAdamW
from ipu_pipeline.ops.attention import attention_counter
from ipu_pipeline.ops.dropout import dropout_counter
from ipu_pipeline.ops.linear_cross_entropy import linear_cross_entropy

assert extension.available(), extension.state().detail
make = torch.Generator().manual_seed(0)
x = torch.randn(37, 129, generator=make, requires_grad=True)
weight = torch.randn(211, 129, generator=make, requires_grad=True)
labels = torch.randint(211, (37,), generator=make)
found = {"mask": dropout_counter(x.detach(), 0.3, seed=1, stream=2)}
found["narrow mask"] = dropout_counter(x.detach().bfloat16(), 0.3, seed=1, stream=2)
loss = linear_cross_entropy(x, weight, labels, num_slices=4)
loss.backward()
found |= {"loss": loss.detach(), "grad x": x.grad, "grad weight": weight.grad}
q, k, v = (torch.randn(2, 3, 33, 16, generator=make) for _ in range(3))
found["attention"] = attention_counter((3, 4), q, k, v, dropout_p=0.1)
narrow = torch.nn.Parameter(torch.randn(999, generator=make).bfloat16())
narrow.grad = torch.randn(999, generator=make).bfloat16()
StochasticRoundingAdamW([narrow], lr=1e-2).step()
found["adamw"] = narrow.detach()
torch.save({"set": extension.state().instruction_set, **found}, sys.argv[1])
"""
SAME_BITS = ("mask", "narrow mask", "adamw")


def run(wish: str, path: Path) -> dict[str, torch.Tensor]:
    variables = {**os.environ, extension.ISA_SWITCH: wish, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", RUN, str(path)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(path)


def assert_agree(folder: Path, sets: Sequence[str]) -> None:
    found = {wish: run(wish, folder / wish) for wish in sets}
    assert [results.pop("set") for results in found.values()] == list(sets)
    first = found.pop(sets[0])
    for results in found.values():
        for name, value in results.items():
            if name in SAME_BITS:
                assert torch.equal(value, first[name]), name
            torch.testing.assert_close(value, first[name])


@pytest.mark.skipif(len(SETS) < 2, reason="this processor has one instruction set")
def test_the_two_widest_sets_agree(tmp_path: Path) -> None:
    assert_agree(tmp_path, SETS[-2:])


@pytest.mark.acceptance
def test_all_sets_agree(tmp_path: Path) -> None:
    assert_agree(tmp_path, SETS)


@pytest.mark.acceptance
@pytest.mark.parametrize("wish", SETS)
def test_the_tests_of_the_operations_pass_with_every_set(root: Path, wish: str) -> None:
    variables = {**os.environ, extension.ISA_SWITCH: wish}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider",
               "-m", "not acceptance", "tests/ops"]  # fmt: skip
    done = subprocess.run(
        command, cwd=root, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]


def test_an_unknown_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(extension.ISA_SWITCH, "sse9")
    monkeypatch.delenv(extension.SWITCH, raising=False)
    found = extension.state.__wrapped__()
    assert not found.usable
    assert found.detail == "IPU_PIPELINE_ISA=sse9 is unknown; use one of baseline, avx2, avx512"


def test_a_set_that_is_not_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(extension.SWITCH, raising=False)
    other = next(name for name in extension.INSTRUCTION_SETS if name != HERE)
    monkeypatch.setenv(extension.ISA_SWITCH, other)  # the library is loaded already
    found = extension.state.__wrapped__()
    assert not found.usable
    assert f"IPU_PIPELINE_ISA={other}, and the library runs {HERE} on this" in found.detail
