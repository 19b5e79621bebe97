"""Allocates two arrays, frees one, and prints what the probe saw."""

import json
import sys

from benchmarks.memory_probe import Probe

if __name__ == "__main__":
    size = int(sys.argv[1])
    probe = Probe()
    first, second = bytearray(size), bytearray(size)
    del second
    used = probe.stop()
    print(
        json.dumps(
            {"peak": used.heap_peak, "after": used.heap_after, "resident": used.resident_peak}
        )
    )
    del first
