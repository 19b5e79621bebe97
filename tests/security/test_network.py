"""What the processes of a job listen on, and what they make of what they are sent."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForQuestionAnswering

import ipu_pipeline as ipp
from tests.security import listening

LOOPBACK = ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="only Linux tells who listens")
def test_a_launch_on_one_machine_listens_on_loopback_only(tmp_path: Path) -> None:
    config = BertConfig(
        num_hidden_layers=2, hidden_size=16, num_attention_heads=2, intermediate_size=16,
        vocab_size=30,
    )  # fmt: skip
    where = torch.zeros(2, dtype=torch.long)
    batch = {
        "input_ids": torch.ones(2, 6, dtype=torch.long),
        "start_positions": where,
        "end_positions": where,
    }
    model = BertForQuestionAnswering(config).train()
    ipp.plan(model, batch, num_stages=2, microbatches=2).save(tmp_path / "plan.json")
    command = [sys.executable, "-m", "ipu_pipeline", "launch", str(tmp_path / "plan.json"), "--"]
    program = [str(Path(listening.__file__)), str(tmp_path)]
    done = subprocess.run([*command, *program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        addresses = json.loads((tmp_path / f"rank{rank}.json").read_text(encoding="utf-8"))
        assert addresses
        assert set(addresses) <= set(LOOPBACK)
