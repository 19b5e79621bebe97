"""Reading ahead changes nothing that a loop over an accelerate loader can see."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from ipu_pipeline.train.prefetch import Prefetch


@pytest.mark.parametrize("size", [1, 4, 8, 11, 12])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_end_is_told_at_the_last_batch(size, depth) -> None:
    accelerator = Accelerator(cpu=True)
    before = accelerator.gradient_state.active_dataloader
    data = torch.arange(size)
    loader = accelerator.prepare(DataLoader(data, batch_size=4))
    chunks: list[int] = []
    ahead = Prefetch(loader, depth, lambda batches: chunks.append(len(batches)))
    assert len(ahead) == len(loader)
    assert ahead.dataset is loader.dataset
    gathered, ends = [], []
    for batch in ahead:
        gathered.append(accelerator.gather_for_metrics(batch))
        ends.append(accelerator.gradient_state.end_of_dataloader)
    assert torch.equal(torch.cat(gathered), data)
    assert ends == [False] * (len(loader) - 1) + [True]
    assert accelerator.gradient_state.active_dataloader is before
    assert sum(chunks) == len(loader)
    assert max(chunks) == min(depth, len(loader))


def test_any_iterable_of_batches_will_do() -> None:
    seen: list[list[int]] = []
    assert list(Prefetch([1, 2, 3], 2, seen.append)) == [1, 2, 3]
    assert seen == [[1, 2], [3]]
    assert list(Prefetch([], 2, seen.append)) == []
