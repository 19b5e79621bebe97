"""The benchmark's reader and the fast search on small random max-load files, by brute force."""

from __future__ import annotations

import itertools
import json
import random

import pytest

from benchmarks.solver_instances import read_instance, solve_instance
from ipu_pipeline.errors import DatasetError


def write(tmp_path, raw):
    path = tmp_path / "instance.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    return path


def node(number, seconds, *, size=1.0, backward=False, colour=None, device=True, host=10.0):
    raw = {
        "id": number,
        "supportedOnFpga": device,
        "cpuLatency": host * seconds,
        "fpgaLatency": seconds,
        "isBackwardNode": backward,
        "size": size,
    }
    return raw if colour is None else {**raw, "colorClass": colour}


def random_file(seed):
    rng = random.Random(seed)
    n = rng.randint(3, 6)
    nodes = [
        node(i, rng.randint(0, 9), size=rng.randint(0, 4), host=rng.choice([1, 3, 10]),
             device=rng.random() < 0.9, colour=i)
        for i in range(n)
    ]  # fmt: skip
    edges = [(p, c) for c in range(n) for p in range(c) if rng.random() < 0.4]
    if rng.random() < 0.5:  # a backward pass of the same devices
        nodes += [node(n + i, rng.randint(0, 9), backward=True, colour=i) for i in range(n)]
        edges += [(n + c, n + p) for p, c in edges if c < n] + [(i, n + i) for i in range(n)]
    costs = [rng.randint(0, 4) for _ in nodes]
    return {
        "maxSizePerFPGA": rng.choice([4, 8, 100]),
        "maxFPGAs": rng.randint(1, 3),
        "maxCPUs": rng.randint(0, 1),
        "nodes": nodes,
        "edges": [{"sourceId": p, "destId": c, "cost": costs[p]} for p, c in edges],
    }


def least_load(raw):
    """Every assignment of colours to devices whose order is acyclic, by the published rules."""
    colours = sorted({n["colorClass"] for n in raw["nodes"]})
    by_id = {n["id"]: n for n in raw["nodes"]}
    num_devices, num_hosts = raw["maxFPGAs"], raw["maxCPUs"]
    forward = [
        (by_id[e["sourceId"]]["colorClass"], by_id[e["destId"]]["colorClass"])
        for e in raw["edges"]
        if not by_id[e["sourceId"]]["isBackwardNode"] and not by_id[e["destId"]]["isBackwardNode"]
    ]
    best = None
    for places in itertools.product(range(num_devices + num_hosts), repeat=len(colours)):
        place = dict(zip(colours, places, strict=True))
        if not contiguous(place, forward):
            continue
        load = worst_load(raw, by_id, place, num_devices)
        if load is not None and (best is None or load < best):
            best = load
    return best


def contiguous(place, edges):
    """Whether the devices can be ordered so that no edge goes back."""
    arcs = {(place[p], place[c]) for p, c in edges if place[p] != place[c]}
    names = set(place.values())
    while names:
        free = [name for name in names if not any(b == name and a in names for a, b in arcs)]
        if not free:
            return False
        names -= set(free)
    return True


def worst_load(raw, by_id, place, num_devices):
    at = {number: place[n["colorClass"]] for number, n in by_id.items()}
    worst = 0.0
    for device in set(at.values()):
        members = [by_id[number] for number, where in at.items() if where == device]
        if device >= num_devices:
            worst = max(worst, sum(n["cpuLatency"] for n in members))
            continue
        if not all(n["supportedOnFpga"] for n in members):
            return None
        if sum(n["size"] for n in members) > raw["maxSizePerFPGA"]:
            return None
        crossing = {
            (e["sourceId"], e["cost"])
            for e in raw["edges"]
            if (at[e["sourceId"]] == device) != (at[e["destId"]] == device)
        }
        work = sum(n["fpgaLatency"] for n in members) + sum(cost for _, cost in crossing)
        worst = max(worst, work)
    return worst


@pytest.mark.parametrize("seed", range(150))
def test_random_files_equal_brute_force(tmp_path, seed):
    raw = random_file(seed)
    search = solve_instance(read_instance(write(tmp_path, raw)))
    expected = least_load(raw)
    if expected is None:
        assert not search.pipelines
    else:
        assert search.pipelines
        assert search.objective == pytest.approx(expected)
        assert search.lower_bound == search.objective


def test_a_backward_node_alone_is_ordered_by_its_mirrored_edges(tmp_path):
    raw = {
        "maxSizePerFPGA": 9, "maxFPGAs": 2, "maxCPUs": 0,
        "nodes": [node(0, 1, colour=0), node(1, 1, colour=1), node(2, 1, backward=True, colour=1),
                  node(3, 1, backward=True), node(4, 1, backward=True, colour=0)],
        "edges": [{"sourceId": p, "destId": c, "cost": 0}
                  for p, c in ((0, 1), (1, 2), (2, 3), (3, 4))],
    }  # fmt: skip
    problem = read_instance(write(tmp_path, raw)).problem
    assert problem.num_blocks == 3
    assert [mask.bit_count() for mask in problem.preds] == [0, 1, 2]


def test_groups_in_a_cycle_become_one(tmp_path):
    raw = {
        "maxSizePerFPGA": 9, "maxFPGAs": 2, "maxCPUs": 0,
        "nodes": [node(0, 1, colour=0), node(1, 1, colour=1), node(2, 1, colour=0)],
        "edges": [{"sourceId": p, "destId": c, "cost": 0} for p, c in ((0, 1), (1, 2))],
    }  # fmt: skip
    assert read_instance(write(tmp_path, raw)).problem.num_blocks == 1


def test_another_format_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="neither a max-load file"):
        read_instance(write(tmp_path, {"nodes": []}))


def test_sync_times_are_refused(tmp_path):
    way = {"timePerSample": 1, "memoryUsageA": 1, "memoryUsageB": 1,
           "syncTimeFw": {"1": 2.0}, "syncTimeBw": {}}  # fmt: skip
    raw = {"maxDevices": 1, "maxMemoryPerDevice": 9, "edges": [],
           "nodes": [{"id": 0, "TMPCs": {"1": [way]}}]}  # fmt: skip
    with pytest.raises(DatasetError, match="node 0 has sync times at degree 1"):
        read_instance(write(tmp_path, raw))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(maxFPGAs=10**9), r"Expected `int` <= 1024 - at `\$.maxFPGAs`"),
        (lambda raw: raw.update(maxFPGAs=0), r"Expected `int` >= 1 - at `\$.maxFPGAs`"),
        (lambda raw: raw["nodes"][0].update(id=1), "has 2 nodes of 1 ids; make ids unique"),
        (lambda raw: raw["edges"][0].update(destId=7), r"edges\[0\]: destId 7 is no node's id"),
    ],
)
def test_max_load_files_are_checked(tmp_path, change, message):
    raw = {
        "maxSizePerFPGA": 9, "maxFPGAs": 2, "maxCPUs": 0, "nodes": [node(0, 1), node(1, 1)],
        "edges": [{"sourceId": 0, "destId": 1, "cost": 0}],
    }  # fmt: skip
    change(raw)
    with pytest.raises(DatasetError, match=rf"instance\.json.*{message}"):
        read_instance(write(tmp_path, raw))


def test_layers_are_checked(tmp_path):
    way = {"timePerSample": 1, "memoryUsageA": 1, "memoryUsageB": 1, "syncTimeFw": {},
           "syncTimeBw": {}}  # fmt: skip
    edges = [{"sourceId": a, "destId": b, "communicationCost": 1} for a, b in ((0, 1), (1, 0))]
    raw = {"maxDevices": 1, "maxMemoryPerDevice": 9, "edges": edges,
           "nodes": [{"id": i, "TMPCs": {"1": [way]}} for i in range(2)]}  # fmt: skip
    with pytest.raises(DatasetError, match=r"has edges in a circle: nodes \["):
        read_instance(write(tmp_path, raw))
    raw["nodes"][0]["TMPCs"] = {"2": [way]}
    with pytest.raises(DatasetError, match="node 0 has no TMPCs of degree 1, which is read"):
        read_instance(write(tmp_path, raw))
