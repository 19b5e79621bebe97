"""What ``tune`` proposes for experts on 16 to 2,048 GPUs: ``python -m benchmarks.gpu_plans``.

One row a model and number of H100s, as ``ipu-pipeline tune`` finds it from a ``config.json`` in
bfloat16, with the bound and the gap. The table stands in ``docs/checks/predictions.md``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.gpu_models import known_config
from ipu_pipeline.backends.cluster.tune.search import tune
from ipu_pipeline.backends.cluster.tune.space import GpuRequest
from ipu_pipeline.backends.cluster.tune.text import as_json
from ipu_pipeline.cli.tune import gpu_capturer
from ipu_pipeline.errors import PartitionError
from ipu_pipeline.ir.machines import machine_by_name

COUNTS = (16, 64, 256, 1024, 2048)
SEQ, GLOBAL_BATCH = 4096, 2048
# gpt-oss as itself: the published runs are priced as a model without its sinks.
_OSS = {
    "model_type": "gpt_oss", "hidden_size": 2880, "num_hidden_layers": 24, "head_dim": 64,
    "num_attention_heads": 64, "num_key_value_heads": 8, "intermediate_size": 2880,
    "vocab_size": 201088, "num_local_experts": 32, "num_experts_per_tok": 4,
    "architectures": ["GptOssForCausalLM"],
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "Mixtral-8x7B": {**known_config("mixtral-8x7b"), "architectures": ["MixtralForCausalLM"]},
    "Qwen3-30B-A3B": {**known_config("qwen3-30b"), "architectures": ["Qwen3MoeForCausalLM"]},
    "gpt-oss-20b": _OSS,
    "DeepSeek-V3": {**known_config("deepseek-v3"), "architectures": ["DeepseekV3ForCausalLM"]},
}


def plans(names: Sequence[str], counts: Sequence[int], gpu: str) -> Iterator[dict[str, Any]]:
    """Yield what ``tune`` finds; where nothing fits, the first sentence of the reason."""
    for name in names:
        with TemporaryDirectory() as folder:
            file = Path(folder) / "config.json"
            file.write_text(json.dumps({**MODELS[name], "max_position_embeddings": SEQ}))
            identity, capture = gpu_capturer(str(file), None, SEQ, None, searched=True, fused=True)
            for count in counts:
                row: dict[str, Any] = {"model": name, "gpus": count, "gpu": gpu}
                request = GpuRequest(global_batch=GLOBAL_BATCH)
                machine = machine_by_name(f"{gpu}-x{count}")
                try:
                    found = as_json(tune(capture, machine, request, identity))
                except PartitionError as error:
                    yield {**row, "reason": str(error).partition("; use")[0]}
                    continue
                best = found["front"][0]
                yield {**row, **best, "gap": 1 - best["bound_s"] / best["step_s"],
                       "seconds": found["seconds"], "limits": found["limits"]}  # fmt: skip


_HEAD = """\
| model | GPUs | sizes | batch | recompute | GB | tokens/s a GPU | step s | MFU | bound s | gap |
|---|---:|---|---:|---|---:|---:|---:|---:|---:|---:|
"""


def text_row(row: dict[str, Any]) -> str:
    """Return one row of the table of the page."""
    begin = f"| {row['model']} | {row['gpus']:,} "
    if "reason" in row:
        return f"{begin}| does not fit | | | | | | | | |"
    sizes = " ".join(f"{name}{row[name]}" for name in ("pp", "vpp", "dp", "tp", "cp", "ep")
                     if row[name] > 1)  # fmt: skip
    batch = f"{row['microbatches']} x {row['micro_batch']}"
    again = [*row["recompute"], *([f"{n} layers"] if (n := sum(row["recomputed_layers"])) else [])]
    return (
        f"{begin}| {sizes} zero{row['zero_stage']} | {batch} | {'+'.join(again) or 'none'} "
        f"| {row['memory_bytes'] / 1e9:.1f} | {row['tokens_per_s'] / row['gpus']:,.0f} "
        f"| {row['step_s']:.2f} | {row['mfu']:.1%} | {row['bound_s']:.2f} | {row['gap']:.1%} |"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one row a model and number of GPUs, as they are found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--gpus", nargs="+", type=int, default=COUNTS)
    parser.add_argument("--gpu", default="h100", help="family of machines")
    parser.add_argument("--json", action="store_true", help="print one JSON object a row")
    given = parser.parse_args(arguments)
    print("" if given.json else _HEAD, end="")
    for row in plans(given.models, given.gpus, given.gpu):
        print(json.dumps(row) if given.json else text_row(row), flush=True)


if __name__ == "__main__":
    main()
