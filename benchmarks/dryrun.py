"""Peak memory of dry runs against plans, for large models over (dp, pp, tp).

``python -m benchmarks.dryrun [MODEL ...]`` plans every job, plays the first, a middle and the last
rank of a pipeline, and prints one line per job. Nothing is compared with a GPU: both numbers are
counted here, the plan's from its blocks, the other one from the operations of a whole step.
"""

from __future__ import annotations

import resource
import sys
import time
from typing import Any, NamedTuple

from transformers import AutoConfig

from benchmarks.gpu_models import known_config
from ipu_pipeline import plan
from ipu_pipeline.backends.cluster.dryrun.report import dry_run
from ipu_pipeline.capture.from_config import from_config, in_dtype
from ipu_pipeline.errors import PartitionError
from ipu_pipeline.ir.text import GIGABYTES, render_table

# T5 v1.1 XXL; it has no plan of what tensor parallelism cuts.
_T5 = {
    "model_type": "t5", "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64,
    "num_layers": 24, "vocab_size": 32128, "feed_forward_proj": "gated-gelu",
    "decoder_start_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip


class Job(NamedTuple):
    """A model over ``dp`` replicas, ``pp`` ranks of a pipeline, ``tp`` ranks that share a stage."""

    model: str
    dp: int
    pp: int
    tp: int
    schedule: str = "1f1b"

    @property
    def ranks(self) -> int:
        """Ranks of the job."""
        return self.dp * self.pp * self.tp


JOBS = (
    Job("llama-3-8b", 1, 8, 1),
    Job("llama-3-8b", 8, 4, 2),
    Job("llama-3-8b", 2, 4, 4, "gpipe"),
    Job("llama-3-70b", 4, 8, 8),
    Job("llama-3-405b", 8, 16, 8),
    Job("mixtral-8x7b", 2, 4, 8),
    Job("t5-xxl", 1, 8, 1),
    Job("t5-xxl", 128, 8, 1),
)


def line(job: Job) -> list[str]:
    """Plan one job, play three of its ranks, and return its line of the table."""
    t5 = job.model == "t5-xxl"
    raw: dict[str, Any] = dict(_T5) if t5 else {**known_config(job.model)}
    if not t5:
        raw["max_position_embeddings"] = 65536
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    task, length = ("seq2seq-lm", 512) if t5 else ("causal-lm", 4096)
    model, batch = from_config(config, task, batch_size=1, seq_length=length)
    # A plan of torch's own operations, or where none fits 80 GB, of fused ones.
    for engine in ("torch", "megatron"):
        try:
            made = plan(
                model, batch, machine=f"h100-x{job.ranks}", schedule=job.schedule,
                num_stages=job.pp, replicas=job.dp, microbatches=max(8, job.pp),
                settings={"precision": "bfloat16", "tp": job.tp, "engine": engine},
            )  # fmt: skip
            break
        except PartitionError as error:
            if engine == "megatron":
                return [*map(str, job), str(error)[:40], "", "", ""]
    begin, cells, worst = time.process_time(), [], 0.0
    for position in sorted({0, job.pp // 2, job.pp - 1}):
        rank = (job.ranks // job.tp // job.pp - 1) * job.pp * job.tp + position * job.tp
        found = dry_run(made, rank, *in_dtype(*from_config(
            config, task, batch_size=1, seq_length=length), "bfloat16"))  # fmt: skip
        played, planned = found.peaks
        cells.append(f"{GIGABYTES(planned)} / {GIGABYTES(played)}")
        worst = max(worst, found.difference, key=abs)
        assert not found.messages.problem, found.messages.problem
    seconds = (time.process_time() - begin) / len(cells)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return [*map(str, job), "; ".join(cells), f"{100 * worst:+.1f}", f"{seconds:.0f}",
            GIGABYTES(memory)]  # fmt: skip


def main() -> None:
    """Print the table."""
    wanted = sys.argv[1:]
    columns = ["model", "dp", "pp", "tp", "schedule", "plan / played GB of three ranks", "worst %",
               "CPU s a rank", "GB here"]  # fmt: skip
    jobs = [job for job in JOBS if not wanted or job.model in wanted]
    print(render_table(columns, [line(job) for job in jobs]))


if __name__ == "__main__":
    main()
