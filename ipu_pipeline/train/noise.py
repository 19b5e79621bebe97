"""NEFTune's noise, drawn as transformers draws it: from torch's generator, one batch after another.

transformers adds the noise in a hook of the embedding. There it would be drawn in a stage, whose
random numbers depend on the microbatch alone and do not move torch's generator. So it is drawn when
the model is called, in the order of the microbatches, and the hook adds what was drawn for its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from transformers.integrations.neftune import neftune_post_forward_hook

from ipu_pipeline.errors import LoweringError
from ipu_pipeline.ops.random import block_scope

_ALPHA = "neftune_noise_alpha"
_OF_A_STAGE = 4  # parts of a key: seed, step, microbatch, block


class EmbeddingNoise:
    """The noise of the microbatches of one optimizer step."""

    def __init__(self) -> None:
        self._embedding: nn.Module | None = None
        self._drawn: dict[int, Tensor] = {}

    def replace(self, model: nn.Module) -> Any:
        """Take the place of transformers' hook; return the handle of ours."""
        (self._embedding,) = [m for m in model.modules() if _ALPHA in vars(m)]
        hooks = self._embedding._forward_hooks
        known = (neftune_post_forward_hook, self._add)
        for key in [key for key, hook in hooks.items() if hook in known]:
            del hooks[key]
        return self._embedding.register_forward_hook(self._add)

    def begin(self) -> None:
        """Forget the noise of the step before."""
        self._drawn.clear()

    def draw(self, index: int, inputs: dict[str, Any]) -> None:
        """Draw the noise of a microbatch whose model is called with ``inputs``."""
        embedding, ids = self._embedding, inputs.get("input_ids")
        if embedding is None or not hasattr(embedding, _ALPHA) or not isinstance(ids, Tensor):
            return
        weight: Any = embedding.weight
        nothing = weight.new_zeros((*ids.shape, weight.shape[-1]))
        with torch.no_grad():
            self._drawn[index] = neftune_post_forward_hook(embedding, (), nothing)

    def _add(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        modes = reversed(_get_current_function_mode_stack())
        key = next((mode.key for mode in modes if isinstance(mode, block_scope)), ())
        if not module.training or len(key) != _OF_A_STAGE or not self._drawn:
            added: Tensor = neftune_post_forward_hook(module, inputs, output)
            return added
        noise = self._drawn.get(int(key[2]))
        if noise is None or noise.shape != output.shape:
            raise LoweringError(
                f"neftune_noise_alpha adds noise to embeddings of shape {tuple(output.shape)}, and "
                f"was drawn for input_ids of one call ({noise if noise is None else noise.shape}); "
                "this model embeds something else: leave neftune_noise_alpha out"
            )
        return output + noise
