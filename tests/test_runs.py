"""Whole runs: papermill from another folder, the command line, a bare machine, a killed run, the same run twice."""

import io
import json
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import RUNS

from nsq_repro import mnist, records, results, training
from nsq_repro.cells import made_from
from nsq_repro.cli import main
from nsq_repro.data import load
from nsq_repro.evaluation import AttackSpec, eval_key, evaluate
from nsq_repro.experiments import datasets, evaluation_row, find_experiment, run_protocol, variant_name
from nsq_repro.networks import build

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"scale": "smoke", **RUNS["mnist"]}


def cli(*args, home):
    "The command in a home of its own, in this process; its status and what it said."
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setenv("NSQ_HOME", str(home))
        patch.chdir(home)
        try:
            status = main([*map(str, args)])
        except SystemExit as e:
            status = e.code
    return SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=err.getvalue())


def arguments(parameters):
    return [a for k, v in parameters.items() if k != "scale" for a in ("-p", k, str(v))]


def evaluations(home):
    "Evaluation records without what may differ between two runs."
    found = {p.parent.name: json.loads(p.read_text()) for p in Path(home).glob("runs/eval-*/record.json")}
    differ = ("seconds", "cpu_seconds", "provenance", "digest")
    return {k: {f: v for f, v in r.items() if f not in differ} for k, r in found.items()}


@pytest.fixture(scope="module")
def plain(bare, tmp_path_factory):
    "A home with one small run in it, made where nothing that draws can be imported."
    return Path(shutil.copytree(bare.root / "mnist", tmp_path_factory.mktemp("plain") / "home"))


def test_plain_run_leaves_records(plain):
    records = evaluations(plain)
    assert len(records) == 2 + 2 * 3  # natural: two losses; nsq: two losses, three settings
    for r in records.values():
        assert r["data"]["n"] == 20 and all(s["n"] == 20 and len(s["low"]) == len(s["eps"]) == 2 for s in r["series"])


def test_same_run_twice_is_identical(plain, tmp_path):
    torch.set_num_threads(1)  # as it was there
    assert cli("run", "mnist", "--plain", "--scale", "smoke", *arguments(SMALL), home=tmp_path).returncode == 0
    assert evaluations(tmp_path) == evaluations(plain)


def test_papermill_from_another_folder(plain, tmp_path, monkeypatch):
    "K=2 reaches the specs, the figure's folder and the record; what the plain run trained (the natural model) is used."
    import papermill  # takes seconds

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NSQ_HOME", str(plain))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = sorted(plain.glob("runs/train-*"))
    papermill.execute_notebook(
        ROOT / "nbs" / "mnist.ipynb", "o.ipynb", {**SMALL, "K": 2}, kernel_name="python3", progress_bar=False
    )
    assert len(list(plain.glob("runs/train-*"))) == len(before) + 1
    executed = json.loads((tmp_path / "o.ipynb").read_text())
    assert executed["metadata"]["papermill"]["parameters"]["K"] == 2 and any(
        'K = 2' in str(c.get("outputs")) for c in executed["cells"]
    )
    (folder,) = {p.parent for p in plain.glob("figures/smoke/mnist-*K2*/fig3.json")}
    checked = [results.check_file(p) for p in folder.glob("*.json")]
    assert len(checked) > 8 and not [c for c in checked if c["problems"]], checked
    record = json.loads((folder / "fig3.json").read_text())
    assert record["training"]["nsq"]["spec"]["K"] == 2 and "K2" in folder.name
    for name in ("fig1", "fig2", "fig3", "fig8"):
        assert all((folder / f"{name}.{kind}").stat().st_size > 300 for kind in ("svg", "png", "json"))
    needed = {"scale", "seed", "data", "attack", "series", "training", "provenance", "item"}
    assert (
        needed <= set(record)
        and {"device", "versions", "commit", "dirty"} <= set(record["provenance"])
        and record["data"]["fingerprint"]
    )


@pytest.mark.parametrize(
    "wrong, said",
    [
        (("K", "0"), "K=0"),
        (("eps", "2"), "eps="),
        (("models", "nqs"), "natural"),
        (("alpha", "-1"), "alpha=-1"),
        (("n_test", "100000"), "only 500"),
    ],
)
def test_wrong_parameters_stop_before_any_work(wrong, said, tmp_path):
    done = cli("run", "mnist", "--plain", "--scale", "smoke", "-p", *wrong, home=tmp_path)
    assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("runs/*"))


def test_missing_data_says_what_to_do(tmp_path):
    done = cli("run", "mnist", "--plain", "--scale", "cpu", "-p", "data_root", tmp_path, home=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert all(word in done.stderr for word in ("train-images-idx3-ubyte", "NSQ_DATA", "download"))


def test_unknown_parameter_and_scale(tmp_path):
    assert (
        "unknown parameter levels"
        in (r := cli("run", "mnist", "--plain", "--scale", "smoke", "-p", "levels", 2, home=tmp_path)).stderr
        and r.returncode == 1
    )
    assert cli("run", "mnist", "--scale", "huge", home=tmp_path).returncode == 2


def test_list(plain, tmp_path):
    said = cli("list", home=plain)
    assert said.returncode == 0 and "nsq" in said.stdout and "scikit-learn digits" in said.stdout
    listed = json.loads(cli("list", "--json", home=plain).stdout)
    assert sum(r["kind"] == "eval" for r in listed["runs"]) >= 8 and all(
        "unfinished" != r["state"] for r in listed["runs"]
    )
    assert "no figures yet" in cli("list", home=tmp_path).stdout


@pytest.mark.parametrize("kept, n", [(16, 24), (24, 16), (0, 8)])
def test_outcomes_of_another_length(kept, n):
    "What is missing is not read as lost, nor is what is too much left out."
    with pytest.raises(ValueError, match=f"{n} outcomes are {n // 8} bytes, and there are {kept // 8}"):
        records.unpack(records.pack([True] * kept), n)


def test_variants_never_share_a_name():
    "Seeds of long names, numbers beyond six digits, and the decimals that look like a number of grey levels."
    name = lambda seed=0, **given: variant_name("demo", given, dict.fromkeys(given), seed)
    long = tuple(k / 1000 for k in range(200))
    values = (1234567.0, 1234568.0, 1234570.0, 8 / 255, 0.0313725, 1 / 3, 0.333333, 1000.0, 25500.0, 0.1, 0.1 + 2e-17)
    names = [name(seed, eps=long) for seed in range(3)] + [name(seed, alpha=v) for v in values for seed in (0, 1)]
    assert len(set(names)) == 3 + 2 * len(set(values)) and max(map(len, names)) <= 100
    same = {"eps": (0.0, 8 / 255, 0.1), "K": 2, "alpha": 25500.0, "noise": 0.3, "models": ("nsq", "pgd")}
    assert name(3, **same) == "demo-eps0+0.0313725+0.1-K2-alpha25500-noise0.3-modelsnsq+pgd-seed3"
    assert name(eps=long).endswith("-c6df44d057874f92")


def test_the_commit_is_that_of_the_start(monkeypatch, tmp_path):
    "A commit made while a process works is not the code that it runs."
    monkeypatch.setenv("NSQ_HOME", str(tmp_path))
    monkeypatch.setattr(records, "repository", lambda: tmp_path)
    answers = {"rev-parse": "a" * 40, "status": ""}
    monkeypatch.setattr(records, "_git", lambda command, *_: answers[command])

    def compute(folder):
        answers.update({"rev-parse": "b" * 40, "status": " M nbs/records.ipynb"})
        return {"n": 1}

    for content in ({"K": 1}, {"K": 2}):
        made = records.cached(content, "toy", compute)["provenance"]
        assert (made["commit"], made["dirty"]) == ("a" * 40, False)


def test_each_radius_says_how_it_was_made(monkeypatch, tmp_path):
    "A curve that two processes made names both; one that is only put together names those that attacked."
    monkeypatch.setenv("NSQ_HOME", str(tmp_path))
    code = {"commit": "a" * 40, "dirty": True}
    monkeypatch.setattr(records, "_code", lambda folder: dict(code))
    data, net, key = load("digits"), build("mnist_cnn", 1, 1000.0).eval(), {"model": "nsq"}
    attack = AttackSpec("pgd", eps=(0.0, 0.1), steps=1, step_size=0.1, n_test=4)
    path = records.run_file(eval_key(attack, key, data), "eval")
    whole = evaluate(net, key, data, attack, batch_size=4)
    assert "parts" not in whole["provenance"] and whole["batch_size"] == 4
    path.unlink()
    code.update(commit="b" * 40, dirty=False)
    again = evaluate(net, key, data, attack, batch_size=2)
    assert again["batch_size"] == 4 and records.is_dirty(again)
    assert {k: again["provenance"][k] for k in code} == {"commit": "a" * 40, "dirty": True}
    path.unlink(), path.with_name("eps-0.1.json").unlink()
    mixed = evaluate(net, key, data, attack, batch_size=2)
    parts = mixed["provenance"]["parts"]
    told = [(p["commit"][0], p["dirty"], p["batch_size"], p["eps"]) for p in parts]
    assert told == [("a", True, 4, [0.0]), ("b", False, 2, [0.1])] and records.is_dirty(evaluation_row(mixed))
    made = made_from("curves", "nsq", [mixed, mixed])["commits"]
    assert [(c["commit"][0], c["dirty"], c["files"]) for c in made] == [("a", True, 2), ("b", False, 2)]
    old = records.load_record(path.with_name("eps-0.1.json"))
    records.save_record(path.with_name("eps-0.1.json"), {k: v for k, v in old.items() if k in OLD})
    path.unlink()
    unknown = evaluate(net, key, data, attack)["provenance"]["parts"][1]
    assert unknown.pop("eps") == [0.1] and set(unknown.values()) == {None}


OLD = ("n", "weights", "seconds", "cpu_seconds", "last", "worst")  # what a radius said of itself before


LOOKS = {
    "mnist": dict(SMALL, models="natural"), "cifar": dict(scale="smoke", models="natural", n_test=4),
    "fair": {"scale": "smoke", **RUNS["fair"]}, "variants": {"scale": "smoke", **RUNS["variants"]},
    "proven": {"scale": "smoke", **RUNS["proven"]}, "benchmark": {"scale": "smoke", **RUNS["benchmark"]},
}


@pytest.mark.parametrize("name", LOOKS)
def test_looking_computes_nothing(name, tmp_path, monkeypatch):
    "With compute=False nothing is trained, timed or attacked, not even with refresh; one line says how it is computed."
    monkeypatch.setenv("NSQ_HOME", str(tmp_path))
    monkeypatch.setattr(training, "training_step", lambda *a: pytest.fail("something was trained"))
    for refresh in (False, True):
        with pytest.raises(FileNotFoundError, match="compute=True|run mnist") as said:
            find_experiment(name).run(**LOOKS[name], device="cpu", compute=False, refresh=refresh)
        assert "\n" not in str(said.value) and not list(tmp_path.rglob("*"))


def test_what_is_there_is_loaded_and_the_rest_left_out(tmp_path, monkeypatch):
    "Two of three models; a refresh that may compute nothing removes nothing."
    monkeypatch.setenv("NSQ_HOME", str(tmp_path))
    few = dict(scale="smoke", device="cpu", n_test=4, steps=1, eps="0.1", iterations=2, losses="ce", settings="pgd")
    mnist.run(**few, models="natural,sq")
    there = {p: p.read_bytes() for p in tmp_path.rglob("*.*")}
    monkeypatch.setattr(training, "training_step", lambda *a: pytest.fail("something was trained"))
    for refresh in (False, True):
        done = mnist.run(**few, models="natural,sq", compute=False, refresh=refresh)
        assert list(done.nets) == ["natural", "sq"] and len(done.evaluated) == 2
    p = mnist.protocol(**few, models="natural,sq,nsq")
    nets, trained, evaluated = run_protocol(p, *datasets(p), refresh=True, progress=False, compute=False)
    assert list(nets) == ["natural", "sq"] and len(trained) == len(evaluated) == 2
    assert there == {p: p.read_bytes() for p in tmp_path.rglob("*.*")}
    assert list(mnist.run(**few, models="natural,sq,nsq", compute=False).nets) == ["natural", "sq"]
    for path in tmp_path.glob("runs/timing-*"):
        shutil.rmtree(path)
    with pytest.raises(FileNotFoundError, match="timing.*compute=True"):
        mnist.run(**few, models="natural,sq", compute=False)
