"""What one microbatch asks of every stage of a plan: seconds on its device, and bytes."""

from __future__ import annotations

from dataclasses import dataclass

from ipu_pipeline.planner.schedules.objective import StagePrice


@dataclass(frozen=True)
class Copies:
    """Seconds that the transfers of one microbatch occupy a stage's device.

    Attributes:
        activation_in_s: Activations from the stage before.
        activation_out_s: Activations to the stage behind.
        gradient_in_s: Gradients from the stage behind.
        gradient_out_s: Gradients to the stage before.
    """

    activation_in_s: float = 0.0
    activation_out_s: float = 0.0
    gradient_in_s: float = 0.0
    gradient_out_s: float = 0.0

    @property
    def forward_s(self) -> float:
        """Seconds during the forward pass."""
        return self.activation_in_s + self.activation_out_s

    @property
    def backward_s(self) -> float:
        """Seconds during the backward pass."""
        return self.gradient_in_s + self.gradient_out_s


@dataclass(frozen=True)
class StageLoad:
    """One stage. Seconds and ``stash_bytes`` are for one microbatch.

    Attributes:
        device: Position of its device in the machine.
        forward_s: Compute of the forward pass.
        backward_s: Compute of the backward pass, recomputation included; 0 in inference.
        copies: Transfers over its boundaries.
        weight_bytes: Held all the time: weights, gradients, optimizer state.
        stash_bytes: Kept from a microbatch's forward to its backward pass.
        workspace_bytes: Needed only while a pass runs.
        in_flight: Most microbatches whose stash it holds at one time.
        weights_s: Part of ``backward_s`` that a split backward pass computes later: gradients of
            weights, which no other stage waits for.
        softmax_s: The softmax over its rows of the vocabulary, where they are spread.
        rows_s: The gradient of these rows.
    """

    device: int
    forward_s: float
    backward_s: float
    copies: Copies
    weight_bytes: int
    stash_bytes: int
    workspace_bytes: int
    in_flight: int = 1
    weights_s: float = 0.0
    softmax_s: float = 0.0
    rows_s: float = 0.0

    @property
    def price(self) -> StagePrice:
        """Seconds for which a microbatch occupies the device, as the replay wants them."""
        copies = self.copies
        return StagePrice(
            self.forward_s, self.backward_s, copies.forward_s, copies.backward_s,
            weights_s=self.weights_s, softmax_s=self.softmax_s, rows_s=self.rows_s,
        )  # fmt: skip

    @property
    def memory_bytes(self) -> int:
        """Most bytes that it holds at one time."""
        return self.weight_bytes + self.in_flight * self.stash_bytes + self.workspace_bytes
