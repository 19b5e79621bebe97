"""The training and inference programs: what the device computes in one call."""

from __future__ import annotations

from typing import Any, Callable, Optional

import torch
from torch import Tensor

from .device import Weights, random_numbers
from .device_optimizer import DeviceOptimizer
from .enums import MeanReductionStrategy, ReductionType
from .errors import createPoptorchError
from .graph import Graph, tensors_of
from .options import Options
from .structure import (
    Collector,
    Counts,
    leaves,
    map_leaves,
    micro_batch,
    to_device,
    to_host,
)

GRADIENT = "Gradient___"
"""Prefix of a gradient's name on the device."""
SeedHook = Optional[Callable[[int, int, int], int]]
"""Seed of a micro-batch from (update or device iteration, accumulation step, replica)."""


class DeviceProgram:
    """A compiled model on the emulated device.

    Args:
        graph: The recorded operations.
        trained: Names of the parameters that get a gradient.
        options: Effective options.
        weights: The device's copies.
        optimizer: The device's optimizer; ``None`` for inference.

    Attributes:
        iterations_done: Device iterations so far; in training, the weight updates.
        seed_hook: Makes every random number depend on the micro-batch only.
    """

    def __init__(
        self,
        graph: Graph,
        trained: list[str],
        options: Options,
        weights: Weights,
        optimizer: DeviceOptimizer | None,
    ) -> None:
        self._graph = graph
        self._options = options
        self._weights = weights
        self._trained = [
            (GRADIENT + name, tensor)
            for name, tensor in zip(weights.names, weights.parameters)
            if name in trained
        ]
        self.optimizer = optimizer
        self.iterations_done = 0
        self.seed_hook: SeedHook = None
        self._counts = Counts.of(options)
        self._anchors: dict[str, Collector] = {}

    def run(self, inputs: Any) -> Any:
        """Run all micro-batches of one call and return the outputs that the options keep."""
        collector = Collector(
            self._counts, self._options.output_mode, self._options.output_return_period
        )
        self._anchors = {
            name: Collector(self._counts, mode or self._options.output_mode, period)
            for name, mode, period in self._options.anchored_tensors.values()
        }
        inputs = to_device(inputs)
        for iteration in range(self._counts.iterations):
            self._iterate(iteration, inputs, collector)
            self.iterations_done += 1
        return collector.result()

    def _iterate(self, iteration: int, inputs: Any, collector: Collector) -> None:
        sums = [_Accumulator(self._options, self.optimizer) for _ in range(self._counts.replicas)]
        for step in range(self._counts.accumulation):
            for replica in range(self._counts.replicas):
                slot = self._counts.slot(iteration, step, replica)
                batch = micro_batch(inputs, slot, self._counts.divisor)
                seed = self._seed(step, replica)
                with random_numbers(seed):
                    outputs, gradients = self._micro_batch(batch, replica)
                sums[replica].add(step, gradients)
                for name, anchor in self._anchors.items():
                    anchor.add(iteration, replica, to_host(gradients[name]))
                collector.add(iteration, replica, to_host(outputs))
        if self.optimizer is not None:
            self._update(sums)

    def _seed(self, step: int, replica: int) -> int | None:
        if self.seed_hook is None:
            return None
        return self.seed_hook(self.iterations_done, step, replica)

    def anchored(self, name: str) -> Tensor:
        """Return what the last call kept of an internal tensor.

        Raises:
            Error: There was no call yet.
        """
        if name not in self._anchors:
            raise createPoptorchError(f"{name} is read before the first call of the model")
        kept: Tensor = self._anchors[name].result()
        return kept

    def _micro_batch(self, batch: Any, replica: int) -> tuple[Any, dict[str, Tensor]]:
        """Return the outputs and, by their names on the device, the gradients."""
        values = self._weights.values(self._graph, replica)
        values.update(zip(self._graph.inputs, tensors_of(leaves(batch))))
        found, loss = self._graph.run(values, training=self.optimizer is not None)
        made = iter(found)
        outputs = map_leaves(lambda _value: next(made), self._graph.structure)
        if self.optimizer is None or loss is None:
            return outputs, {}
        gradients = torch.autograd.grad(
            loss * self.optimizer.loss_scaling, [tensor for _, tensor in self._trained]
        )
        return outputs, {name: made for (name, _), made in zip(self._trained, gradients)}

    def _update(self, sums: list[_Accumulator]) -> None:
        """Reduce over the replicas and change the weights."""
        assert self.optimizer is not None
        divisor = self.optimizer.loss_scaling * sums[0].divisor * sums[0].mean_over(len(sums))
        gradients = {
            name[len(GRADIENT) :]: torch.stack([part.sums[name].float() for part in sums]).sum(0)
            / divisor
            for name in sums[0].sums
        }
        parameters = dict(zip(self._weights.names, self._weights.parameters))
        self.optimizer.update(gradients, parameters)  # type: ignore[arg-type]


class _Accumulator:
    """Gradients of one replica over the micro-batches of an update, in the accumulation type.

    With the Running strategy it holds a mean at all times, which float16 cannot overflow as a sum
    would; the Post strategy divides after the reduction over replicas.
    """

    def __init__(self, options: Options, optimizer: DeviceOptimizer | None) -> None:
        training = options.Training
        strategy = training.meanAccumulationAndReplicationReductionStrategy
        kind = training.accumulation_and_replication_reduction_type
        self._mean = kind is ReductionType.Mean
        self._running = self._mean and strategy is MeanReductionStrategy.Running
        self._dtype = torch.float32 if optimizer is None else optimizer.values["accumType"]
        self.sums: dict[str, Tensor] = {}
        self.divisor = training.gradient_accumulation if self._mean and not self._running else 1

    def mean_over(self, replicas: int) -> int:
        """Return what the sum over replicas is divided by."""
        return replicas if self._mean else 1

    def add(self, step: int, gradients: dict[str, Tensor]) -> None:
        """Take the gradients of one micro-batch."""
        for name, gradient in gradients.items():
            value = gradient.to(self._dtype)
            if name not in self.sums:
                self.sums[name] = value
            elif self._running:
                self.sums[name] = self.sums[name] * (step / (step + 1)) + value / (step + 1)
            else:
                self.sums[name] = self.sums[name] + value
