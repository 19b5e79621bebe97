"""Find the calibration constants: ``python -m benchmarks.ipu_fit --configs F --throughput F``.

Minimises squared relative errors of published items per second (grades A and B; 5 % is one unit)
and of published single matrix products (15 %), with a weak pull to the physical range of every
constant. The search is Nelder and Mead's on the logarithms, from fixed starting points, so that
the same files give the same constants on every run.

Source: Nelder, Mead, A simplex method for function minimization, Computer Journal 1965.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import exp, log
from pathlib import Path

from benchmarks.ipu_observations import Observation, judged, load_observations
from ipu_pipeline.backends.ipu.prices import DEFAULT_CALIBRATION, Calibration, chip_named
from ipu_pipeline.backends.ipu.prices.matmul import Product, plan_matmul

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "ipu"
ROW_ERROR, PRODUCT_ERROR = 0.05, 0.15


@dataclass(frozen=True)
class Prior:
    """Where a constant is expected: its middle, and the logarithmic width of what is plausible."""

    middle: float
    width: float


PRIORS = {
    "amp_block_cycles": Prior(60.0, 0.5),  # 16x16 weights at 16 B/cycle: 32; with launch: 331
    "vector_bytes_per_cycle": Prior(8.0, 0.7),  # one 8-byte access; at most 24
    "launch_cycles": Prior(1000.0, 0.5),  # sync and exchange start: some 100 ns each, several
    "exchange_share": Prior(0.7, 0.25),
    "copy_share": Prior(0.8, 0.2),  # 55 of 64 GB/s measured on GC2
    "step_host_s": Prior(0.02, 0.7),
    "poptorch_factor": Prior(1.05, 0.05),  # published pairs: 1.03 to 1.08
    "tensor_update_s": Prior(2e-4, 0.5),
}
# Published single products: family, sizes, precision, share of the peak (hardware.json:
# gemm_half_n1024, gemm_half_n2048 on Bow; hw_GC200_gemm_fp32_measured, largest that fits).
PRODUCTS = (
    ("ipu-bow", Product(1, 4096, 4096, 1024), "16.16", 197.7 / 348.5),
    ("ipu-bow", Product(1, 4096, 4096, 2048), "16.16", 211.0 / 348.5),
    ("ipu-gc200", Product(1, 3584, 3584, 3584), "32.32", 44.2 / 62.4),
)
DEFAULT_PROPORTION = 0.6


def fit(
    observations: Sequence[Observation], start: Calibration | None = None, iterations: int = 300
) -> Calibration:
    """Return the constants that explain ``observations`` best.

    Args:
        observations: Rows of grades A and B.
        start: Where to begin; ``None``: the middle of what is plausible.
        iterations: Steps of the search.
    """
    names = list(PRIORS)
    first = asdict(start) if start else {name: PRIORS[name].middle for name in names}

    def loss(point: Sequence[float]) -> float:
        return _loss(Calibration(**_values(names, point)), observations)

    point = [log(first[name]) for name in names]
    for step in (0.25, 0.1):
        point = minimise(loss, point, step, iterations // 2)
    return Calibration(**_values(names, point))


def _values(names: Sequence[str], point: Sequence[float]) -> dict[str, float]:
    return {name: float(f"{exp(value):.4g}") for name, value in zip(names, point, strict=True)}


def _loss(calibration: Calibration, observations: Sequence[Observation]) -> float:
    total = 0.0
    for prediction, measured in speeds(observations, calibration):
        total += (log(prediction / measured) / ROW_ERROR) ** 2
    for family, product, precision, share in PRODUCTS:
        found = product_share(family, product, precision, calibration)
        total += (log(found / share) / PRODUCT_ERROR) ** 2
    for name, prior in PRIORS.items():
        total += (log(getattr(calibration, name) / prior.middle) / prior.width) ** 2
    return total


def speeds(
    observations: Sequence[Observation], calibration: Calibration
) -> list[tuple[float, float]]:
    """Return predicted and measured items per second of every observation."""
    return [(o.predicted_items_per_s(calibration), o.items_per_s) for o in observations]


def product_share(family: str, product: Product, precision: str, calibration: Calibration) -> float:
    """Return the share of the peak that one matrix product is predicted to reach."""
    chip = chip_named(family)
    chip = replace(chip, calibration=calibration)
    plan = plan_matmul(product, chip, precision, DEFAULT_PROPORTION)
    return product.macs / (plan.cycles * chip.tiles * chip.macs_per_cycle(precision))


def minimise(
    function: Callable[[Sequence[float]], float],
    start: Sequence[float],
    step: float,
    iterations: int,
) -> list[float]:
    """Minimise by Nelder and Mead's simplex with its usual coefficients."""
    size = len(start)
    corners = [list(start)]
    corners += [[v + (step if i == j else 0.0) for j, v in enumerate(start)] for i in range(size)]
    ranked = sorted((function(corner), corner) for corner in corners)
    for _ in range(iterations):
        centre = [sum(corner[j] for _, corner in ranked[:-1]) / size for j in range(size)]
        along = partial(_along, centre, ranked[-1][1])
        best = _try(function, along, ranked[0][0], ranked[-2][0], ranked[-1][0])
        if best is not None:
            ranked[-1] = best
        else:
            towards = [partial(_along, ranked[0][1], corner) for _, corner in ranked[1:]]
            ranked[1:] = [(function(corner), corner) for corner in (to(0.5) for to in towards)]
        ranked.sort()
    return ranked[0][1]


def _along(base: Sequence[float], end: Sequence[float], factor: float) -> list[float]:
    return [b + factor * (e - b) for b, e in zip(base, end, strict=True)]


def _try(
    function: Callable[[Sequence[float]], float],
    along: Callable[[float], list[float]],
    lowest: float,
    second_worst: float,
    worst: float,
) -> tuple[float, list[float]] | None:
    """Reflect, expand or contract the worst corner; ``None`` when the simplex must shrink."""
    reflected = along(-1.0)
    value = function(reflected)
    if value < lowest:
        expanded = along(-2.0)
        return min((function(expanded), expanded), (value, reflected))
    if value < second_worst:
        return value, reflected
    contracted = along(0.5)
    inner = function(contracted)
    return (inner, contracted) if inner < worst else None


def main() -> None:
    """Fit, and print the constants as JSON with those of the package beside them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--configs", type=Path, default=SHARED / "known_good_configs.json")
    parser.add_argument("--throughput", type=Path, default=SHARED / "throughput.json")
    parser.add_argument("--iterations", type=int, default=300)
    arguments = parser.parse_args()
    observations, _ = load_observations(arguments.configs, arguments.throughput)
    found = fit(judged(observations), iterations=arguments.iterations)
    shares = {
        f"{family} {product.m}x{product.k}x{product.n} {precision}": [
            round(product_share(family, product, precision, found), 3),
            round(share, 3),
        ]
        for family, product, precision, share in PRODUCTS
    }
    print(
        json.dumps(
            {
                "found": asdict(found),
                "in_package": asdict(DEFAULT_CALIBRATION),
                "share_of_peak_predicted_and_published": shares,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
