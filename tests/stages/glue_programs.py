"""Bodies of models whose code between the blocks reads values of tensors, and keeps tensors."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from tests.capture.toys import WIDTH, Toy

Body = Callable[..., dict[str, Tensor]]
LOG: list[str] = []


def rest(self: Toy, h: Tensor) -> dict[str, Tensor]:
    return {"loss": self.layers[1](h).square().mean(), "hidden": h}


def logs_a_part(self: Toy, x: Tensor) -> dict[str, Tensor]:
    h = self.layers[0](x)
    part = 0.1 * h.abs().mean()
    self.kept.append(part.item())
    out = rest(self, h)
    out["loss"] = out["loss"] + part
    self.kept.append({"total": float(out["loss"].detach()), "size": h.shape[0]})
    return out


def keeps_detached_losses(self: Toy, x: Tensor) -> dict[str, Tensor]:
    out = rest(self, self.layers[0](x))
    self.kept.append(out["loss"].detach())
    self.recent.append((out["loss"].detach(), "loss"))
    return out


def scales_by_the_largest(self: Toy, x: Tensor) -> dict[str, Tensor]:
    h = self.layers[0](x)
    h = h / float(h.detach().abs().max())
    return rest(self, h * math.sqrt(h.detach().norm()) + torch.full((WIDTH,), h.sum().item()))


def branches(self: Toy, x: Tensor) -> dict[str, Tensor]:
    h = self.layers[0](x)
    if h.mean() > 0:
        self.kept.append("above")
        h = h.relu() * 2
    else:
        self.calls += 1
        h = h.tanh()
    return rest(self, h)


def counts(self: Toy, x: Tensor) -> dict[str, Tensor]:
    chosen = int((x > 0).sum())
    found = int((self.layers[0](x) > 0).sum())
    self.calls += chosen + found
    h = self.layers[0](x) * chosen / (1 + found)
    return rest(self, h)


def asserts(self: Toy, x: Tensor) -> dict[str, Tensor]:
    h = self.layers[0](x)
    assert torch.isfinite(h).all()
    assert not torch.equal(h, x)
    return rest(self, h)


def prints(self: Toy, x: Tensor) -> dict[str, Tensor]:
    out = rest(self, self.layers[0](x))
    LOG.append(f"{out['loss']:.4f}")
    LOG.append(repr(out["loss"].detach()))
    self.kept.append(out["loss"].tolist())
    return out


def keeps_a_hidden_state(self: Toy, x: Tensor) -> dict[str, Tensor]:
    self.last = self.layers[0](x)
    self.cache["given"] = x
    self.cache["both"] = [self.last.detach(), self.last.detach().mean()]
    return rest(self, self.last)


def uses_what_it_kept(self: Toy, x: Tensor) -> dict[str, Tensor]:
    h = self.layers[0](x)
    if self.last is not None:
        h = h + 0.1 * self.last
    self.last = h.detach()
    return rest(self, h)


def goes_through_numpy(self: Toy, x: Tensor) -> dict[str, Tensor]:
    h = self.layers[0](x)
    array = h.detach().numpy()
    self.kept.append(float(np.median(array)))
    mask = torch.from_numpy((array > np.median(array)).astype(np.float32))
    return rest(self, h * mask + torch.tensor(array.max(0)))


def every_third(self: Toy, x: Tensor) -> dict[str, Tensor]:
    out = rest(self, self.layers[0](x))
    self.calls += 1
    if self.calls % 3 == 0:
        self.kept.append(out["loss"].item())
    return out


def reads_out_of_order(self: Toy, x: Tensor) -> dict[str, Tensor]:
    a = self.layers[0](x)
    out = rest(self, a)
    self.kept.append(out["loss"].item())
    scale = a.abs().max().item()
    self.kept.append(scale)
    out["loss"] = out["loss"] * scale
    return out


def moves_a_position(self: Toy, x: Tensor) -> dict[str, Tensor]:
    h = self.layers[0](x)
    place = int(self.place)
    self.queue[place] = h.detach().mean()
    self.place[0] = (place + 1) % WIDTH
    return rest(self, h * self.queue)


def switches_modes(self: Toy, x: Tensor) -> dict[str, Tensor]:
    h = self.layers[0](x)
    self.layers[0].train(bool(h.mean() > 0))
    return rest(self, h)


def everything(self: Toy, x: Tensor) -> dict[str, Tensor]:
    h = self.layers[0](x)
    if self.last is not None:
        h = h + 0.1 * self.last
    scale = h.detach().abs().max().item()
    h = h / scale
    if h.detach().mean() > 0:
        h = h.relu() + h
    else:
        self.calls += 1
    self.last = h.detach().mean(0)
    self.kept.append(scale)
    out = rest(self, h)
    self.recent.append(out["loss"].detach())
    self.cache["count"] = int((x > 0).sum())
    out["loss"] = out["loss"] * (1 + self.cache["count"])
    return out


def loops_by_value(self: Toy, x: Tensor) -> dict[str, Tensor]:
    h, count = self.layers[0](x), 0
    while h.detach().abs().max().item() > 0.3 and count < 5:
        h, count = h * 0.5, count + 1
    self.kept.append(count)
    return rest(self, h)


def catches_an_error(self: Toy, x: Tensor) -> dict[str, Tensor]:
    h = self.layers[0](x)
    try:
        if h.detach().sum() > 0:
            raise ValueError
        self.calls += 1
    except ValueError:
        h = h * 2
    return rest(self, h)


def indexes_by_value(self: Toy, x: Tensor) -> dict[str, Tensor]:
    h = self.layers[0](x)
    place = h.detach()[0].argmax().item()
    values, _ = h.topk(1 + place % 3, dim=-1)
    return rest(self, h + h[:, place : place + 1] + values.mean())


def makes_tensors_of_lists(self: Toy, x: Tensor) -> dict[str, Tensor]:
    h = self.layers[0](x)
    self.kept.append(h.detach().tolist())
    weights = [float(value) for value in h.detach().mean(0)]
    return rest(self, sum(weight * h for weight in weights) * torch.tensor(weights))


def averages_numbers(self: Toy, x: Tensor) -> dict[str, Tensor]:
    out = rest(self, self.layers[0](x))
    value = out["loss"].item()
    self.kept[:] = [0.9 * (self.kept[0] if self.kept else value) + 0.1 * value]
    out["loss"] = out["loss"] / self.kept[0]
    return out


def averages_tensors(self: Toy, x: Tensor) -> dict[str, Tensor]:
    h = self.layers[0](x)
    last = torch.zeros(WIDTH) if self.last is None else self.last
    self.last = last * 0.9 + h.detach().mean(0) * 0.1
    return rest(self, h + self.last)


def averages_in_place(self: Toy, x: Tensor) -> dict[str, Tensor]:
    h = self.layers[0](x)
    if self.last is None:
        self.last = torch.zeros(WIDTH)
    self.last.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
    return rest(self, h + self.last)


def uses_a_list_of_tensors(self: Toy, x: Tensor) -> dict[str, Tensor]:
    h = self.layers[0](x)
    if len(self.recent) == 2:
        h = h + torch.stack(list(self.recent)).mean()
    self.recent.append(h.detach().mean())
    return rest(self, h)


def keeps_deep_inside(self: Toy, x: Tensor) -> dict[str, Tensor]:
    h = self.layers[0](x)
    self.cache.setdefault("a", {}).setdefault("b", []).append(h.detach().mean())
    holder = SimpleNamespace(first=h.detach(), second=(h.detach().sum(), 1))
    self.kept.append(holder.second)
    self.cache[self.calls] = copy.deepcopy(h.detach())
    self.calls += 1
    return rest(self, h)


def counts_what_is_selected(self: Toy, x: Tensor) -> dict[str, Tensor]:
    h = self.layers[0](x)
    return rest(self, h * (x > 0).nonzero().shape[0] + h[h > 0].numel())


def draws_a_mask(self: Toy, x: Tensor) -> dict[str, Tensor]:
    h = self.layers[0](x)
    mask = np.random.rand(*h.shape) < 0.5
    self.kept.append(np.asarray(h.detach()).max().item())
    return rest(self, h.masked_fill(torch.from_numpy(mask), 0.0))


PROGRAMS: dict[str, Body] = {
    name: value
    for name, value in list(globals().items())
    if callable(value) and getattr(value, "__annotations__", {}).get("x") == "Tensor"
}

# Run by `make test`; the others are acceptance tests.
FIRST = {name: body for name, body in PROGRAMS.items() if name not in (
    "loops_by_value", "catches_an_error", "indexes_by_value", "makes_tensors_of_lists",
    "averages_numbers", "averages_tensors", "averages_in_place", "uses_a_list_of_tensors",
    "switches_modes", "every_third", "asserts", "everything",
)}  # fmt: skip
