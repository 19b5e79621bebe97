"""Started by ``ipu-pipeline launch``: train a step, then list who of the job listens where."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from transformers import BertConfig, BertForQuestionAnswering

import ipu_pipeline as ipp

LISTEN = "0A"


def sockets_of(pid: int) -> set[str]:
    """Return the socket numbers of a process."""
    opened = [path for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()]
    links = [str(path.readlink()) for path in opened]
    return {link[8:-1] for link in links if link.startswith("socket:[")}


def listening(pids: list[int]) -> list[str]:
    """Return the addresses on which processes listen, as the kernel writes them."""
    own = set().union(*map(sockets_of, pids))
    found = []
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text(encoding="ascii").splitlines()[1:]:
            parts = line.split()
            if parts[3] == LISTEN and parts[9] in own:
                found.append(parts[1].rpartition(":")[0])
    return found


def main() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        num_hidden_layers=2, hidden_size=16, num_attention_heads=2, intermediate_size=16,
        vocab_size=30,
    )  # fmt: skip
    model = BertForQuestionAnswering(config).train()
    ids, where = torch.randint(1, 30, (4, 6)), torch.randint(0, 6, (4,))
    batch = {"input_ids": ids, "start_positions": where, "end_positions": where}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plan = ipp.Plan.load(os.environ["IPU_PIPELINE_PLAN"])
    with ipp.compile(model, plan, target="distributed", optimizer=optimizer) as executable:
        executable.train_step(batch)
        addresses = listening([os.getpid(), os.getppid()])
    rank = os.environ["RANK"]
    Path(sys.argv[1], f"rank{rank}.json").write_text(json.dumps(addresses), encoding="utf-8")


if __name__ == "__main__":
    main()
