"""Where LXMERT's parts run on four IPUs: embeddings | language | vision | cross-modality."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ipu_pipeline.backends.ipu.config import IPUConfig
from ipu_pipeline.planner.search import Constraints

NUM_IPUS = 4
_LEFT_OPEN = (-1,)


def with_published_placement(config: IPUConfig | None, model_config: Any) -> IPUConfig | None:
    """Spell out the placement that published configurations of LXMERT leave to their library.

    ``Graphcore/lxmert-base-ipu`` holds no ``layers_per_ipu``; optimum-graphcore puts both
    embeddings on IPU 0, the language layers on IPU 1, the vision layers on IPU 2, and the
    cross-modality layers, the pooler and the head on IPU 3. In ``layers_per_ipu`` that is
    ``[0, l_layers, r_layers, x_layers]``, for any numbers of layers. A configuration that places
    its layers itself, or is not for four IPUs, stays as it is.
    """
    if config is None or config.layers_per_ipu != _LEFT_OPEN or config.num_ipus() != NUM_IPUS:
        return config
    counts = (0, model_config.l_layers, model_config.r_layers, model_config.x_layers)
    return replace(config, layers_per_ipu=counts)


def in_execution_order(config: IPUConfig | None, machine: str) -> Constraints | None:
    """Return what makes counts of layers mean these layers on machines that may reorder them.

    The branches for language and vision do not depend on each other, so that "one layer" might
    be either; IPUs keep the order of execution anyway.
    """
    counted = config is not None and config.layers_per_ipu != _LEFT_OPEN
    return Constraints(execution_order=True) if counted and machine == "local" else None
