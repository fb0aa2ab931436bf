"""The benchmark compares what is equal, lets the ways take turns, and says by rule whether an aim is met. Nothing here
asserts a time."""

from dataclasses import replace

import pytest
import torch
from test_worst_case import network

from nsq_repro import benchmark
from nsq_repro.attacks import pgd
from nsq_repro.benchmark import PARTS, PEERS, Bench, Plan, in_turns, ratio, same_images
from nsq_repro.data import Dataset
from nsq_repro.experiments import find_experiment

SMALL = dict(n=6, n_curve=6, n_standard=4, n_proof=2, rounds=2, steps=4, step_size=0.01, eps=(0.0, 0.01, 0.03), at=0.02)


def plan(**more):
    _, p = benchmark.plan(scale="smoke", device="cpu")
    return replace(p, **{**SMALL, "sizes": (2, 4), **more})


@pytest.fixture
def bench():
    "Two small networks, images and a plan."
    nets = {"natural": network(0, None), "nsq": network(1, (1, 20.0))}
    x = (torch.rand(8, 1, 6, 6, generator=torch.Generator().manual_seed(0)) * 255).byte()
    y = nets["natural"](x.float() / 255).argmax(1)
    data = Dataset(x, y, "random", "random images", "test", tuple("abcde"))
    return Bench({k: v.requires_grad_(False) for k, v in nets.items()}, data, data, None, plan())


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("loss", ["ce", "cw"])
@pytest.mark.parametrize("model", ["natural", "nsq"])
def test_a_library_computes_what_pgd_computes(bench, name, loss, model):
    if name not in benchmark.peers():
        pytest.skip(f"{name} is not installed")
    (x, y), net = bench.images(6), bench.nets[model]
    there = benchmark.peers()[name](net, x, y, 0.05, 6, 0.02, loss)
    here = pgd(net, x, y, 0.05, 6, 0.02, loss, random_start=False).x_last
    assert ((here - x).abs() > 0.03).float().mean() > 0.5
    torch.testing.assert_close(here, there, atol=1e-5, rtol=0)


def test_skipping_cycles_changes_no_bit(bench):
    x, y = bench.images(6)
    for net in bench.nets.values():
        ends = [pgd(net, x, y, 0.05, 12, 0.02, skip_cycles=skip).x_last for skip in (None, False)]
        assert torch.equal(*ends)


def test_ways_that_differ_are_not_timed():
    x, calls = torch.rand(2, 1, 4, 4), []
    ways = {"a": lambda: calls.append("a") or x, "b": lambda: calls.append("b") or x + 0.1}
    with pytest.raises(RuntimeError, match="do not compute the same"):
        in_turns(ways, 3, same_images)
    assert calls == ["a", "b"]


def test_ways_take_turns():
    calls = []
    ways = {k: lambda k=k: calls.append(k) for k in "abc"}
    told = in_turns(ways, 3)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert all(len(v) == 3 for v in told["seconds"].values())
    assert ratio({"seconds": {"a": [1, 2, 4], "b": [2, 2, 12]}}, "a", "b") == {"ratio": 2, "low": 1, "high": 3}


@pytest.mark.parametrize("part", [p for p in PARTS if p not in ("training", "growth", "certificates")])
def test_each_workload_gives_its_rows(bench, part):
    pytest.importorskip("torchattacks")
    rows = benchmark.measured(part, bench)["rows"]
    assert rows and all(len(t) == bench.p.rounds for r in rows for t in r["seconds"].values())
    for r in rows:
        if part == "curve":
            assert all(a <= b for a, b in zip(r["found"]["here"], r["found"]["plain loop"]))
            assert len(r["found"]["torchattacks"]) == len(bench.p.eps)
        if part == "layer":
            assert r["saved"] == 1
        for found in r.get("spans", {}).values():
            inside = [(b, e) for _, depth, b, e in found if depth == 0]
            assert any("Backward" in name for name, *_ in found) and inside == sorted(inside)
            assert all(any(b <= b1 and e1 <= e for b, e in inside) for _, depth, b1, e1 in found if depth)


def record(seconds, found, **more):
    row = {"workload": "curve", "model": "nsq", "n": 4, "seconds": seconds, "found": found, **more}
    return {"rows": [row], "asked": {"rounds": 2}}


HERE, SLOW = [1.0, 1.0], [6.0, 7.0]


def test_aims_are_judged_by_the_record():
    same = {"here": [4, 2], "plain loop": [4, 2]}
    good = benchmark.comparisons(record({"here": HERE, "torchattacks": SLOW, "foolbox": [9.0, 9.0]}, same))[0]
    assert (good["peer"], good["ratio"], good["met"], good["fair"]) == ("torchattacks", 6.5, True, True)
    slow = record({"here": HERE, "torchattacks": [4.0, 4.0]}, same)
    assert not benchmark.comparisons(slow)[0]["met"] and "is missed" in benchmark.benchmark_words(slow)
    worse = record({"here": HERE, "torchattacks": SLOW}, {"here": [4, 3], "plain loop": [4, 2]})
    assert not benchmark.comparisons(worse)[0]["fair"] and "more images are left" in benchmark.benchmark_words(worse)
    assert "is met" in benchmark.benchmark_words(record({"here": HERE, "torchattacks": SLOW}, same))


def test_on_a_gpu_captured_steps_are_what_is_compared():
    seconds = {"here": SLOW, "torchattacks": SLOW}
    compared = lambda more: benchmark.comparisons(record(seconds | more, None, workload="pgd"))[0]
    row, usual = compared({"captured": HERE}), compared({})
    assert row["ratio"] == 6.5 and row["aim"] == benchmark.CAPTURED and row["what"].endswith("captured steps")
    assert usual["ratio"] == 1 and usual["aim"] == benchmark.AIMS["pgd"][0]


def test_a_missing_library_is_said(monkeypatch):
    monkeypatch.setattr(benchmark, "find_spec", lambda module: None if module == "art" else object())
    assert "ART" not in benchmark.peers() and benchmark.versions()["ART"] is None


def test_it_is_an_experiment():
    found = find_experiment("benchmark")
    assert set(found.presets) == {"smoke", "cpu", "paper"} and all(p["rounds"] >= 5 for p in found.presets.values())
    with pytest.raises(ValueError, match="did you mean"):
        found.plan(scale="smoke", parts="curves")
    assert isinstance(found.plan(scale="smoke")[1], Plan) and found.plan(scale="smoke", rounds=7)[1].variant
