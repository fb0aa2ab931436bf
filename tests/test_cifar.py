"""CIFAR-10 and the parameter study as users run them: papermill's command line, no data, wrong values, cells of a
grid shared and resumed."""

import dataclasses
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RUNS
from test_runs import ROOT, arguments, cli, evaluations

from nsq_repro import cifar, mnist, parameter_study, records, results, tables, training
from nsq_repro.certificates import certify
from nsq_repro.data import load
from nsq_repro.networks import build
from nsq_repro.programs import check_program, read_program

LITTLE = {"scale": "smoke", **RUNS["cifar"]}
QUIETLY = dict(kernel_name="python3", progress_bar=False)
SMALL = {k: v for k, v in LITTLE.items() if k != "models"}


def papermill(*args, home, cwd=ROOT, **env):
    "Papermill's own command line, with a home of its own; returns the finished process."
    env = {
        **os.environ,
        "NSQ_HOME": str(home),
        "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "Agg",
        "PYTHONPATH": str(ROOT),
        **env,
    }
    return subprocess.run(
        [sys.executable, "-m", "papermill", *map(str, args)],
        env=env,
        capture_output=True,
        text=True,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
    )


def missing(home):
    "Commands for the cells of the small grid that are not there."
    return cli("run", "parameter_study", "--list", "--scale", "smoke", *arguments(SMALL), home=home).stdout.splitlines()


def parameters_of(command):
    return dict(zip((words := shlex.split(command))[4::3], words[5::3]))


@pytest.fixture(scope="module")
def home(bare, tmp_path_factory):
    "A home with a small CIFAR run in it, made where nothing that draws can be imported, and an NSQ with K = 4."
    home = Path(shutil.copytree(bare.root / "cifar", tmp_path_factory.mktemp("cifar") / "home"))
    more = arguments({**LITTLE, "models": "nsq", "K": 4})
    assert cli("run", "cifar", "--plain", "--scale", "smoke", *more, home=home).returncode == 0
    return home


def test_plain_run_leaves_every_curve(bare):
    found = evaluations(bare.root / "cifar")
    assert sorted((r["model"], r["attack"]["setting"]) for r in found.values()) == sorted(
        [("natural", "pgd"), *(("nsq", s) for s in ("pgd", "bpda", "bpda_ste"))] * 2
    )
    assert all(r["attack"]["eps"] == [0, 8 / 255] and r["data"]["name"] == "photos" for r in found.values())


def test_command_without_data_says_what_to_do(tmp_path):
    "`papermill nbs/cifar.ipynb -p K 2` in the repository, on a machine without CIFAR-10."
    done = papermill("nbs/cifar.ipynb", "-p", "K", "2", home=tmp_path, NSQ_DATA=str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert done.returncode != 0
    assert all(
        word in done.stderr
        for word in ("FileNotFoundError", "cifar-10-batches-py", "NSQ_DATA", "download", "-p scale smoke")
    )
    assert "CIFAR-10 was not found" in json.dumps(json.loads(done.stdout)["cells"]) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"K": 0}, "K=0"),
        ({"eps": 2}, "eps="),
        ({"eps": "8"}, "8/255, not 8"),
        ({"models": "nqs"}, "natural"),
        ({"network": "resnet"}, "resnet9"),
        ({"held": 1500}, "must be left"),
        ({"held": 50}, "only 50 held-out"),
        ({"alpha": -1}, "alpha=-1"),
        ({"noise": "16"}, "16/255, not 16"),
        ({"step_size": "x"}, "step_size"),
        ({"n_test": 100_000}, "only 500"),
        ({"levels": "2,4"}, "levels"),
        ({"Kay": 2}, "unknown parameter Kay"),
    ],
)
def test_wrong_values_stop_before_any_work(wrong, said, tmp_path, monkeypatch):
    monkeypatch.setenv("NSQ_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=said):
        cifar.run(**{"scale": "smoke", **wrong})
    assert not list(tmp_path.iterdir())


@pytest.mark.slow  # as without data
def test_wrong_value_in_the_notebook(tmp_path, monkeypatch):
    monkeypatch.setenv("NSQ_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    from papermill import PapermillExecutionError, execute_notebook

    with pytest.raises(PapermillExecutionError, match="ValueError: K=0"):
        execute_notebook(ROOT / "nbs" / "cifar.ipynb", "o.ipynb", {"K": 0, "scale": "smoke"}, **QUIETLY)
    assert [f.name for f in tmp_path.iterdir()] == ["o.ipynb"]


@pytest.mark.slow  # as with MNIST
def test_papermill_from_another_folder(home, tmp_path, monkeypatch):
    """K reaches the specs, the figures' folder and the records; the natural model is not trained again;
    everything drawn is what its record says."""
    from papermill import execute_notebook

    before = set(home.glob("runs/train-*"))
    monkeypatch.setenv("NSQ_HOME", str(home))
    monkeypatch.chdir(tmp_path)
    execute_notebook(ROOT / "nbs" / "cifar.ipynb", "o.ipynb", {**LITTLE, "K": 8, "levels": "2,3,5"}, **QUIETLY)
    (new,) = set(home.glob("runs/train-*")) - before
    assert json.loads((new / "record.json").read_text())["spec"]["K"] == 8
    (folder,) = {p.parent for p in home.glob("figures/smoke/cifar-*/fig4.json")}
    assert {"K8", "levels2+3+5"} <= set(folder.name.split("-"))
    fig4, fig11 = (json.loads((folder / f"{f}.json").read_text()) for f in ("fig4", "fig11"))
    assert (
        fig4["training"]["nsq"]["spec"]["network"] == "cifar_tiny"
        and fig4["attack"]["step_size"] == 2 / 255
        and fig11["spec"]["K"] == 5
    )
    assert {"device", "versions", "commit", "dirty", "seconds"} <= set(fig4["provenance"]) and fig4["data"]["n"] == 20
    text = (tmp_path / "o.ipynb").read_text()
    assert "scikit-learn's two photographs" in text and '"output_type": "error"' not in text
    checked = [results.check_file(p) for p in folder.glob("*.json")]
    assert len(checked) == 8 and not [c for c in checked if c["problems"]], checked


def test_paper_preset_is_the_papers():
    "What the paper prints and MadryLab's recipe, without running it."
    p = cifar.protocol(scale="paper", device="cpu")
    assert (
        [t.model for t in p.train] == ["natural", "pgd", "sq", "nsq", "fgsm_rs"]
        and p.attacks[0].n_test == 10_000
        and p.dataset == "cifar10"
    )
    for t in p.train:
        assert (t.network, t.iterations, t.batch_size, t.optimizer, t.lr, t.schedule, t.weight_decay, t.augment) == (
            "cifar_wide",
            80_000,
            128,
            "sgd",
            0.1,
            "madrylab",
            2e-4,
            True,
        )
    pgd, nsq = p.train[1], p.train[3]
    assert (pgd.eps, pgd.steps, pgd.step_size) == (8 / 255, 10, 2 / 255) and (nsq.K, nsq.alpha, nsq.noise) == (
        2,
        25500,
        16 / 255,
    )
    assert {(a.setting, a.loss) for a in p.attacks} == set(itertools.product(("pgd", "bpda", "bpda_ste"), ("ce", "cw")))
    assert all(
        a.steps == 20 and a.step_size == 2 / 255 and a.eps == tuple(e / 255 for e in (0, 1, 2, 4, 6, 8))
        for a in p.attacks
    )


def test_study_shares_the_cells_of_cifar_and_lists_the_others(home):
    assert {(c["K"], c["alpha"]) for c in map(parameters_of, missing(home))} == {
        ("2", "255"),
        ("4", "255"),
    }  # (2, 25500) and (4, 25500) are NSQs of the runs above, BPDA included
    assert not cli("run", "cifar", "--list", home=home).stdout


def test_cells_run_one_by_one_and_the_last_one_draws(home, tmp_path):
    "The printed commands, in the repository's folder, in any order; outputs go to runs/ of the home."
    before = {p: p.stat().st_mtime_ns for p in home.glob("runs/*/record.json")}
    *lines, last = missing(home)
    for line in lines:
        assert (
            cli(
                "run", "parameter_study", "--plain", *arguments(parameters_of(line)), "--scale", "smoke", home=home
            ).returncode
            == 0
        )
    words = shlex.split(last)
    assert words[:2] == ["papermill", "nbs/parameter_study.ipynb"]
    done = papermill(words[1], tmp_path / Path(words[2]).name, *words[3:], home=home)
    assert done.returncode == 0, done.stderr
    assert before == {p: p.stat().st_mtime_ns for p in before}, "what was there was computed again"
    (folder,) = home.glob("figures/smoke/parameter_study-*")
    assert {p.name for p in folder.glob("*.svg")} == {"fig5.svg", "fig6.svg", "parameter-study.svg"}
    assert (
        "matters more" in (folder / "parameter-effects.md").read_text()
        and "photographs" in (folder / "parameter-effects.md").read_text()
    )
    assert not missing(home)
    decomposition_follows_from_the_records(home)


def decomposition_follows_from_the_records(home):
    "Effects again, from the evaluation records alone and image by image."
    record = records.load_json(next(home.glob("figures/smoke/parameter_study-*/parameter-study.json")))
    found = {}
    for p in home.glob("runs/eval-*/record.json"):
        r = records.load_json(p)
        spec = records.load_json(home / "runs" / f"train-{r['train_hash']}" / "record.json")["spec"]
        if (
            r["attack"]["setting"] == "bpda"
            and r["attack"]["loss"] == "cw"
            and spec["alpha"] in (255, 25500)
            and spec["K"] in (2, 4)
        ):
            found[spec["K"], spec["alpha"]] = [records.unpack(o, 20) for o in r["series"][0]["outcomes"]]
    A = np.array([[found[K, a][1].mean() for a in (255, 25500)] for K in (2, 4)])
    rows = {(r["response"], r["loss"], r["effect"]): r for r in tables.effects_rows(record, draws=50)}
    for effect, other in (("K", A.mean(1)), ("alpha", A.mean(0))):
        assert rows["largest", "cw", effect]["size"] == pytest.approx(50 * abs(other[1] - other[0]), abs=1e-3)
        assert rows["largest", "cw", effect]["change"] == pytest.approx(100 * (other[1] - other[0]), abs=1e-3)
    assert rows["largest", "cw", "interaction"]["size"] == pytest.approx(
        25 * abs(A[0, 0] - A[0, 1] - A[1, 0] + A[1, 1]), abs=1e-3
    )


def test_study_without_any_cell_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("NSQ_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="none of the 4 cells"):
        parameter_study.run(scale="smoke", compute=False)
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize("model", ["nsq", "pgd", "fgsm_rs"])
def test_killed_training_ends_with_the_same_weights(model, tmp_path, monkeypatch):
    """The recipes of scale cpu, bit for bit: momentum, batch statistics, schedule, order,
    crops and noise all go on where they were."""
    spec = dataclasses.replace(
        cifar.protocol(scale="cpu", device="cpu", models=model, iterations=6).train[0],
        batch_size=16,
        **({"steps": 2} if model == "pgd" else {}),
    )
    photos, step, calls = load("photos", "train"), training.training_step, []

    def stops(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return step(*args)

    def weights(home, save_every=30.0):
        monkeypatch.setenv("NSQ_HOME", str(home))
        return training.train(spec, photos, progress=False, save_every=save_every)[0].state_dict()

    whole = weights(tmp_path / "whole")
    monkeypatch.setattr(training, "training_step", stops)
    with pytest.raises(KeyboardInterrupt):
        weights(tmp_path / "killed", save_every=0.0)
    again = weights(tmp_path / "killed")
    assert len(calls) == 5 + 6 - 4  # four iterations were kept
    assert whole.keys() == again.keys() and all(torch.equal(whole[k], again[k]) for k in whole)


def test_held_out_images_are_attacked_and_not_trained_on(tmp_path, monkeypatch):
    "The last training images, in place of the test images; figures in a folder of their own."
    monkeypatch.setenv("NSQ_HOME", str(tmp_path))
    little = dict(scale="smoke", device="cpu", models="natural", n_test=20, steps=1, eps="8/255", iterations=2)
    done = cifar.run(**little, held=30)
    whole = load("photos", "train")
    assert done.trained[0]["data"]["n"] == len(whole) - 30 and done.evaluated[0]["data"]["split"] == "held-out"
    assert done.p.variant.startswith("cifar-") and "held30" in done.p.variant
    ok = records.unpack(done.evaluated[0]["series"][0]["outcomes"][0], 20)
    right = done.nets["natural"](whole.floats(slice(-30, -10))).argmax(1) == whole.y[-30:-10]
    assert (ok == right.numpy()).all()


def test_trainings_may_be_in_float32_and_slow_ones_are_announced(tmp_path, monkeypatch, capsys):
    "bfloat16 without instructions for it takes many times as long: a line says so, and there is another way."
    monkeypatch.setenv("NSQ_HOME", str(tmp_path))
    asked = cifar.protocol(scale="cpu", device="cpu", precision="fp32", models="natural,pgd")
    assert [t.precision for t in asked.train] == ["fp32"] * 2 and "precisionfp32" in asked.variant
    assert {t.precision for t in cifar.protocol(scale="cpu", device="cpu").train} == {"bf16"}
    monkeypatch.setattr("nsq_repro.experiments.search_precision", lambda device: "fp32")
    little = dict(scale="smoke", device="cpu", models="natural", n_test=10, steps=1, eps="8/255", iterations=1)
    for precision, said in (("fp32", False), ("bf16", True), ("bf16", False)):  # the last is there already
        cifar.run(**little, precision=precision)
        assert ("no instructions" in "".join(capsys.readouterr())) == said


def test_recipes_of_mnist_keep_their_names():
    "Fields that were added to the spec since do not rename what is trained already."
    fingerprint = "9098c74ff66846a5"  # of MNIST's training images
    found = {
        t.model: records.spec_hash(training.train_key(t, fingerprint))
        for t in mnist.protocol(scale="cpu", device="cpu").train
    }
    assert found == {
        "natural": "fe0fe6c679263cb2",
        "pgd": "e9433e4d4e955480",
        "sq": "14e08aae4641809f",
        "nsq": "a758e1f020d1a9f1",
        "fgsm_rs": "3114876c68fd6fa9",
    }


def test_certificates_read_resnet9():
    "Batch normalization of the image, maxima and residual sums: the program is the network."
    net = build("cifar_resnet9_small", 2, 25500.0)
    x = load("photos", "train").floats(slice(30))
    net(x)
    net.eval()
    program = read_program(net.features)
    check_program(program, net.features, net.quantize(x[:4]))
    assert sum(type(s.layer).__name__ == "Sum" for s in program.steps) == 2
    y = net(x[:1]).argmax(1)
    assert bool(certify(net, x[:1], y, 1e-6, boxes=1, method="crown").robust)
