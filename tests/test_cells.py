"""Cells: any number of workers gives the same, a killed run goes on, and what was found once is not lost or forged."""

import importlib
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ITERATIONS, RUNS
from test_adaptive import CE, RADII, TARGETED, N, everything, network

from nsq_repro import adaptive, capacity, cells, records, suite
from nsq_repro.data import Dataset, load
from nsq_repro.networks import build, save_checkpoint

ROOT = Path(__file__).resolve().parents[1]
TIMES = ("seconds", "provenance", "from", "boxes_seconds")


def images(n=N):
    x = (torch.rand(N, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 255).byte()
    y = network(0)(x.float() / 255).argmax(1)
    return Dataset(x, y, "random", "random images", "test", tuple("abcd")).subset(n)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("NSQ_HOME", str(tmp_path))
    return tmp_path


def union(attacks=(CE, TARGETED), n=N, nets=None, radii=RADII, **how):
    nets = nets or {"nsq": network(0), "sq": network(1)}
    before = {e: v[:n] for e, v in everything().items() if e in radii}
    return suite.cascade(nets, "nsq", {m: {"model": m} for m in nets}, images(n), attacks, radii, before, **how)


def proofs(boxes, n=N, net=None, radii=RADII, attacked=None, **how):
    attacked = attacked or {e: v[:n] for e, v in everything().items()}
    return suite.certified(net or network(0), {"model": "nsq"}, images(n), radii, attacked, boxes, **how)


def untimed(value):
    "A record without what another run does not give again."
    if isinstance(value, dict):
        return {k: untimed(v) for k, v in value.items() if k not in TIMES}
    return [untimed(v) for v in value] if isinstance(value, list) else value


def files(home):
    return sorted(p.relative_to(home) for p in home.glob("runs/cells/**/record.json"))


def work(workers=cells.ALONE):
    attacks = (CE, suite.Attack("transfer", source="sq", steps=3), suite.Attack("flips", n=7))
    above = union(attacks, batch_size=3, workers=workers)
    return untimed([above, proofs(40, attacked=suite.left_of(above), chunk=3, workers=workers)])


def test_two_workers_give_what_one_gives(tmp_path, monkeypatch):
    found = []
    for n in (1, 2):
        monkeypatch.setenv("NSQ_HOME", str(tmp_path / str(n)))
        with cells.Workers(n) as workers:
            found.append((work(workers), files(tmp_path / str(n))))
            if n == 2:
                with pytest.raises(ZeroDivisionError):
                    workers.run([cells.Cell("x", {"k": k}, _fails, {"k": k}) for k in range(4)])
    assert found[0] == found[1] and len(found[0][1]) > 20
    assert records.run_file({"k": 3}, "x").exists() and not records.run_file({"k": 0}, "x").exists()


def _fails(k):
    return {"third": 3 // k}


def test_workers_share_a_processor_only():
    with pytest.raises(ValueError, match="workers=2"):
        cells.Workers(2, "cuda")


START = """
import test_cells
if __name__ == "__main__":
    with test_cells.cells.Workers(2) as workers:
        test_cells.work(workers)
"""


def children(pid):
    "Processes that a process started (Linux)."
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return path.read_text().split() if path.exists() else []


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    monkeypatch.setenv("NSQ_HOME", str(undisturbed))
    expected, whole, upto = work(), files(undisturbed), random.Random(0).randrange(3, 15)
    monkeypatch.setenv("NSQ_HOME", str(killed))
    (tmp_path / "start.py").write_text(START)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen([sys.executable, str(tmp_path / "start.py")], env=env, stderr=subprocess.DEVNULL)
    while len(files(killed)) < upto and run.poll() is None:
        time.sleep(0.005)
    workers = children(run.pid)
    run.kill()
    run.wait()
    deadline = time.time() + 20
    while any(map(alive, workers)) and time.time() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, workers))  # they end by themselves
    kept = {p: records.load_json(killed / p)["digest"] for p in files(killed)}
    assert 0 < len(kept) < len(whole) and (workers or not Path("/proc").exists())
    assert work() == expected and files(killed) == whole
    assert all(records.load_json(killed / p)["digest"] == d for p, d in kept.items())  # nothing is done twice


def test_a_smaller_budget_later_loses_nothing(home, monkeypatch):
    much = proofs((40, 3, 2))
    how = {k: n for c in much["cells"].values() for k, n in c["how"].items()}
    assert how["crown"] and how["broken"] and how["open"]
    monkeypatch.setattr(suite, "certify", lambda *a, **k: pytest.fail("searched again"))
    for boxes in (0, 1, 2, (40, 3, 2)):
        again = proofs(boxes)
        assert again["left"] == much["left"] and again["broken"] == much["broken"]
        assert untimed(again["cells"]) == untimed(much["cells"])
    few = proofs(1, n=10)
    assert all((v == suite.left_of(much)[e][:10]).all() for e, v in suite.left_of(few).items())


def test_a_larger_budget_adds(home, monkeypatch):
    little, calls, real = proofs(1), [], suite.certify
    left = suite.left_of(little)

    def counted(model, x, y, eps, boxes, **how):
        calls.append((eps, len(x)))
        return real(model, x, y, eps, boxes, **how)

    monkeypatch.setattr(suite, "certify", counted)
    much = proofs(60)
    assert all((suite.left_of(much)[e] | ~v).all() for e, v in left.items()) and much["left"] != little["left"]
    e = next(e for e in RADII if little["cells"][f"{e:g}"]["how"].get("open"))
    was_open = little["cells"][f"{e:g}"]["how"]["open"]
    assert sum(n for eps, n in calls if eps == e) == was_open > 0  # nothing else at the first radius that had some
    assert much["cells"][f"{e:g}"]["budgets"] == [1, 60]


def test_a_proof_at_a_larger_radius_is_one_at_a_smaller(home, monkeypatch):
    high = suite.left_of(proofs(60, radii=RADII[1:2]))[RADII[1]]
    assert high.any()
    given = []
    real = suite.certify
    monkeypatch.setattr(suite, "certify", lambda m, x, *a, **k: given.append(len(x)) or real(m, x, *a, **k))
    low = proofs(1, radii=RADII[:1])
    assert (suite.left_of(low)[RADII[0]] | ~high).all()
    assert sum(given) <= N - high.sum()


def test_what_was_broken_stays_broken(home):
    name = cells.network_name(network(0), {"model": "nsq"})
    first = suite.left_of(union((CE, TARGETED)))
    assert not first[RADII[-1]].all()
    own = suite.attack_questions({"nsq": network(0)}, "nsq", {"nsq": {"model": "nsq"}}, images(), [CE, TARGETED], RADII)
    assert not any(v.any() for v in suite.known_broken(name, images(), RADII, but=own).values())
    union((replace(CE, steps=1),))
    lost = suite.known_broken(name, images(), RADII)
    assert all((lost[e] >= ~v).all() for e, v in first.items())
    assert all((lost[large] >= lost[small]).all() for small, large in zip(RADII, RADII[1:]))
    fewer = suite.known_broken(name, images(9), RADII)
    assert all((fewer[e] == v[:9]).all() for e, v in lost.items())
    assert suite.known_broken(name, images(), RADII, but=own)[RADII[-1]].any()  # the short attack's


def test_attacks_are_not_run_again_on_images_they_had(home, monkeypatch):
    few = suite.left_of(union(n=10))
    calls, real = [], suite.not_broken
    monkeypatch.setattr(suite, "not_broken", lambda a, nets, m, x, *r, **k: calls.append(len(x)) or real(
        a, nets, m, x, *r, **k))
    more = union()
    assert all((v == suite.left_of(more)[e][:10]).all() for e, v in few.items())
    assert sum(calls) == sum(r["given"] for r in more["rows"]) - sum(r["given"] for r in union(n=10)["rows"])


def test_another_network_has_findings_of_its_own(home):
    proofs(60)
    retrained = network(0)
    with torch.no_grad():
        retrained.features[3].weight.mul_(-1.0)  # as if the same recipe had come out differently
    assert not suite.left_of(proofs(0, net=retrained))[RADII[-1]].any()
    union()
    name = cells.network_name(retrained, {"model": "nsq"})
    assert not any(v.any() for v in suite.known_broken(name, images(), RADII, ("attack",)).values())


def test_a_changed_cell_is_refused_and_refresh_replaces_it(home):
    whole = proofs(60)
    path = next(home.glob("runs/cells/*/proof-*/record.json"))
    good = records.load_json(path)
    records.save_json(path, {**good, "proven": records.pack(np.ones(good["n"], bool))})
    with pytest.raises(ValueError, match="changed after it was written"):
        proofs(60)
    records.save_record(path, {**good, "content": {**good["content"], "eps": 0.9}})
    with pytest.raises(ValueError, match="not the one that its folder is named for"):
        proofs(60)
    assert untimed(proofs(60, refresh=True)) == untimed(whole)
    assert all(records.load_json(path)[k] == good[k] for k in ("content", "how", "proven", "broken"))


def test_refresh_attacks_again_and_keeps_other_attacks(home):
    union((TARGETED,))
    before = {p: records.load_json(home / p)["digest"] for p in files(home)}
    union((CE,))
    again = union((CE,), refresh=True)
    assert all(records.load_json(home / p)["digest"] == d for p, d in before.items())
    assert untimed(again) == untimed(union((CE,)))


def test_records_name_their_cells(home):
    above, below = union(), proofs(20)
    for record in (above, below):
        made = cells.made_from("part", "nsq", record["from"])
        there = [records.load_json(p) for k in made["kinds"] for p in (home / "runs").glob(f"{k}-*/record.json")]
        assert sorted(made["digests"]) == sorted(r["digest"] for r in there)
        assert sum(c["files"] for c in made["commits"]) == len(there)
        assert made["seconds"] == pytest.approx(sum(r["seconds"] for r in there), abs=0.01)
    keys = {"commit", "dirty", "versions", "device", "threads", "seconds", "cpu_seconds"}
    assert all(keys <= set(r["provenance"]) for r in there)


SMALL = dict(scale="smoke", device="cpu", **{**RUNS["adaptive"], "parts": "certificates,arithmetic"})


def test_bracket_keeps_what_earlier_runs_know(bare, home, monkeypatch):
    from nsq_repro import mnist

    shutil.copytree(bare.root / "adaptive", home, dirs_exist_ok=True)
    few = ITERATIONS["adaptive"]
    budgets = {m: {**how, "iterations": few} for m, how in mnist.PRESETS["smoke"]["training"].items()}
    monkeypatch.setitem(mnist.PRESETS["smoke"], "training", budgets)
    first = adaptive.run(**SMALL)
    record = adaptive.bracket_record(first)
    assert untimed(adaptive.bracket_record(adaptive.run(**SMALL))) == untimed(record)
    parts = [r["part"] for r in record["runs"]]
    assert parts == ["training", "curves", "box", "certificates"]
    there = {records.load_json(p)["digest"] for p in home.glob("runs/**/record.json")}
    assert all(set(r["digests"]) <= there for r in record["runs"])
    less = {**adaptive.PRESETS["smoke"], "box": adaptive.box_attack(1), "boxes": 0, "proof": dict(method="crown")}
    monkeypatch.setitem(adaptive.PRESETS, "smoke", less)
    later = adaptive.run(**SMALL)
    for e, v in adaptive.not_broken_by_any(first, "nsq").items():
        assert not (adaptive.not_broken_by_any(later, "nsq")[e] & ~v).any()
        before, after = (suite.left_of(out["certificates"]["nsq"])[e] for out in (first, later))
        assert not (before & ~after).any()
    other = {**record["runs"][0], "commits": [{"commit": "f" * 40, "dirty": False, "files": 1}]}
    mixed = {**record, "runs": [other, *record["runs"][1:]]}
    assert "fffffffff (1 run files)" in records.caption(mixed)


GRIDS = {
    "parameter_study": dict(Ks="2,3", alphas="255", n_test=4, steps=2, iterations=3),
    "capacity": dict(networks="tiny", lengths="3,4", n_test=4, steps=2),
}


@pytest.mark.parametrize("name", GRIDS)
def test_cells_of_a_grid_side_by_side_are_those_one_after_the_other(name, tmp_path, monkeypatch):
    "The same run files, byte for byte but for times and provenance, and the same record of the grid."
    found, taken = [], ("seconds", "cpu_seconds", "images_per_second", "provenance", "digest", "from", "rows")
    whole = lambda p: {k: v for k, v in records.load_record(p).items() if k not in taken}
    for n in (1, 2):
        monkeypatch.setenv("NSQ_HOME", str(tmp_path / str(n)))
        grid = importlib.import_module(f"nsq_repro.{name}")
        record = grid.run(scale="smoke", device="cpu", workers=n, **GRIDS[name])
        assert not record["missing"]
        left = sorted((tmp_path / str(n) / "runs").glob("[tec]*-*/record.json"))  # trainings, curves, box attacks
        found.append({p.parent.name: whole(p) for p in left})
    assert found[0] == found[1] and len(found[0]) >= 4


def _mean(net, x):
    return float(net(x).detach().mean())


def other_weights(run, record, refresh):
    "What was measured is loaded for the same network, refused for another one, and made again with refresh."
    first = run(0)
    assert run(0) == first
    with pytest.raises(ValueError, match="nsq with other weights .* run with refresh") as refused:
        run(1)
    assert "\n" not in str(refused.value)
    assert refresh(1)["weights"] == run(1)["weights"] != first["weights"]
    known = records.load_record(record())
    records.save_record(record(), {k: v for k, v in known.items() if k != "weights"})
    assert "weights" not in run(0)  # older records do not say: they stay readable


def test_a_measurement_is_not_of_another_training(tmp_path, monkeypatch):
    monkeypatch.setenv("NSQ_HOME", str(tmp_path))
    content, x = {"model": {"model": "nsq"}}, torch.rand(2, 3, 32, 32)
    cell = lambda seed: cells.measurement("toy", content, _mean, build("cifar_tiny", seed=seed).eval(), x)
    record = lambda: records.run_file(content, "toy")
    other_weights(lambda seed: cell(seed).run(), record, lambda seed: cell(seed).run(refresh=True))


def test_a_cell_that_trains_is_not_of_another_training(tmp_path, monkeypatch):
    "The file of the network is compared, where it is there."
    monkeypatch.setenv("NSQ_HOME", str(tmp_path))
    content = {"model": {"model": "nsq", "data": "toy"}}
    cell = cells.Cell("toy", content, dict, {"n": 1}, trains=True)
    path, record = records.run_file(content["model"], "train", "model.safetensors"), records.run_file(content, "toy")

    def run(seed, refresh=False):
        save_checkpoint(path, build("cifar_tiny", seed=seed))
        return cell.run(refresh)

    other_weights(run, lambda: record, lambda seed: run(seed, refresh=True))
    path.unlink()
    assert cell.run()["n"] == 1


def test_the_box_attack_of_a_grid_is_not_of_another_training(tmp_path, monkeypatch):
    monkeypatch.setenv("NSQ_HOME", str(tmp_path))
    attacked = {"n": 4, "eps": [], "left": {}, "rows": [], "from": []}
    monkeypatch.setattr(capacity, "cascade", lambda *a, **k: attacked)
    p, cells_, _ = capacity.grid(scale="smoke", device="cpu")
    p, test, key = next(iter(cells_.values())), load("photos").subset(4), {"model": "nsq"}
    record = lambda: records.run_file(capacity.box_content(p, key, test), "capacity")
    run = lambda seed, again=False: capacity.box_record(p, build("cifar_tiny", seed=seed).eval(), key, test, again)
    other_weights(run, record, lambda seed: run(seed, True))
