"""Work that is killed at a random moment: the same call goes on, and in the end its records are those of work
that nobody disturbed."""

import json
import os
import random
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import PROCESSES
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from nsq_repro import cli, records, reliability
from nsq_repro import training as trainings
from nsq_repro.data import load
from nsq_repro.evaluation import AttackSpec, evaluate
from nsq_repro.networks import SoftQuantNet, build, weights_digest
from nsq_repro.quantization import SoftQuantize
from nsq_repro.suite import certified
from nsq_repro.training import recipe, train, train_key

pytestmark = pytest.mark.reliability

SPEC = recipe("nsq", iterations=8, batch_size=10, network="cifar_tiny", lr=1e-3)


def training():
    "A training that saves its state as often as it can."
    return train(SPEC, load("photos", "train"), progress=False, save_every=0)


def evaluation():
    "Curves of a network with random weights."
    net, _ = train(recipe("nsq", iterations=1, batch_size=4, network="cifar_tiny"), load("photos"), progress=False)
    for loss in ("ce", "cw"):
        attack = AttackSpec("bpda_ste", loss, (0.0, 0.02, 0.04, 0.06), steps=4, step_size=0.01, n_test=10)
        evaluate(net, train_key(SPEC, "toy"), load("photos"), attack, batch_size=5)


def proofs():
    "Proofs in cells of two images."
    torch.manual_seed(0)
    F = nn.Sequential(nn.Flatten(), nn.Linear(784, 12), nn.ReLU(), nn.Linear(12, 10))
    net, data, radii = SoftQuantNet(F, SoftQuantize(1, 500.0)).eval(), load("digits").subset(12), (0.01, 0.03)
    with torch.no_grad():
        right = (net(data.floats()).argmax(1) == data.y).numpy()
    return certified(net, {"model": "toy"}, data, radii, dict.fromkeys(radii, right | True), 8, chunk=2)


def drawing():
    "Figures and tables with their records."
    from matplotlib.figure import Figure

    for k in range(4):
        fig = Figure(figsize=(2, 1))
        fig.subplots().plot(range(k + 2))
        records.save_figure(fig, f"toy{k}", {"k": k}, "smoke")
        records.save_table(f"toy-table{k}", f"{k}", [{"k": k}], {"k": k}, "smoke")


def notebook():
    "A notebook that trains and draws, executed as `nsq-repro run` does."
    home = records.home()
    source = ["import sys", f"sys.path.insert(0, {str(Path(__file__).parent)!r})", "import test_kills as t"]
    cells = ["\n".join(source), "t.training()", "t.drawing()", "print(steps)"]
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    code = lambda k, s: dict(cell_type="code", id=f"c{k}", metadata={}, source=s, outputs=[], execution_count=None)
    written = [code(k, s) for k, s in enumerate(cells)]
    page = {"cells": written, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    records.atomic_write(home / "nbs" / "toy.ipynb", json.dumps(page))
    records.repository = lambda: home
    cli.run_notebook("toy", {"steps": 3})


WORK = {f.__name__: f for f in (training, evaluation, proofs, drawing, notebook)}


def begin(kind, home):
    "A process that does the work in a home of its own."
    process = PROCESSES.Process(target=at_home, args=(kind, str(home)))
    process.start()
    return process


def at_home(kind, home):
    "The work of a process."
    torch.set_num_threads(1)
    os.environ.update(NSQ_HOME=home, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
    WORK[kind]()


def results(home):
    "All that is left, without times and provenance; files other than records by their content."
    taken = ("seconds", "cpu_seconds", "images_per_second", "provenance", "digest", "drawn_with")
    found = {}
    for path in sorted(p for part in ("runs", "figures") for p in (home / part).rglob("*") if p.is_file()):
        name = path.relative_to(home).as_posix()
        if path.suffix == ".json":
            record = records.load_record(path)  # whole, with its digest and its files
            found[name] = {k: v for k, v in record.items() if k not in taken}
        elif path.suffix == ".ipynb":
            page = json.loads(path.read_text(encoding="utf-8"))
            found[name] = [(c["source"], [o.get("text") for o in c["outputs"]]) for c in page["cells"]]
        elif not path.name.startswith("."):
            found[name] = records.file_digest(path)
    return found


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    "Kind of work → its home, its results and how long it takes, found once."
    known, first = {}, PROCESSES.Process(target=int)
    first.start()  # and with it what the others are forked from, whose time is not theirs
    first.join()

    def of(kind):
        if kind not in known:
            home = tmp_path_factory.mktemp(kind)
            start = time.perf_counter()
            process = begin(kind, home)
            process.join()
            assert process.exitcode == 0
            known[kind] = home, results(home), time.perf_counter() - start
        return known[kind]

    return of


def killed(kind, home, seconds):
    "Whether the work was still going on when it was killed, so many seconds after it began."
    process = begin(kind, home)
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode != 0


SEEDS = [0, *(pytest.param(k, marks=pytest.mark.slow) for k in range(1, 30))]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", WORK)
def test_killed_work_goes_on(kind, seed, undisturbed, tmp_path, monkeypatch):
    _, wanted, takes = undisturbed(kind)
    moment = random.Random(f"{kind} {seed}").uniform(0.05, 0.95) * takes
    for attempt in range(5):
        home = tmp_path / f"{attempt}"
        home.mkdir()
        if killed(kind, home, moment * 0.7**attempt):
            break
    else:
        pytest.fail("it was always done before it could be killed")
    results_so_far(home, wanted)
    again = begin(kind, home)
    again.join()
    assert again.exitcode == 0
    monkeypatch.setenv("NSQ_HOME", str(home))
    assert results(home) == wanted
    assert {left.kind for left in reliability.leftovers()} <= {"lock", "temporary file", "decoded data"}


def results_so_far(home, wanted):
    "What a killed process leaves is what belongs there, or nothing."
    for path in (p for p in home.rglob("*.json") if not p.name.startswith(".")):
        name = path.relative_to(home).as_posix()
        assert name in wanted or path.name.startswith("eps-"), name
        assert records.load_record(path)
    for path in home.glob("figures/**/*.svg"):
        assert records.file_digest(path) == wanted[path.relative_to(home).as_posix()]


def test_the_comparison_sees_a_difference(undisturbed, tmp_path):
    "One outcome more, in a record whose digest fits, is seen."
    home, wanted, _ = undisturbed("proofs")
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    assert results(tmp_path) == wanted
    path = sorted(tmp_path.glob("runs/**/proof-*/record.json"))[0]
    record = records.load_record(path)
    records.save_record(path, {**record, "boxes": [int(k) for k in np.array(record["boxes"]) + 1]})
    assert results(tmp_path) != wanted


def full(path, record):
    raise OSError(28, f"cannot write {path}: no space left on device")


def test_a_record_that_cannot_be_saved_leaves_the_state(tmp_path, monkeypatch):
    "The next call goes on from the last state, which goes when the record is there."
    monkeypatch.setenv("NSQ_HOME", str(tmp_path))
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(records, "save_record", full)
        training()
    (state,) = tmp_path.glob("runs/train-*/state.safetensors")
    kept = state.read_bytes()
    with monkeypatch.context() as patch:
        seen = []
        patch.setattr(trainings, "learning_rate", lambda spec, t: (seen.append(t), spec.lr)[1])
        training()
    assert seen == [SPEC.iterations - 1, SPEC.iterations - 1] and not state.exists()  # two groups of weights
    state.write_bytes(kept)  # as a process leaves it that is killed between record and state
    training()
    assert not state.exists()


DAMAGES = {
    "a moment of another shape": lambda tensors: tensors | {"optimizer.0.exp_avg": torch.zeros(3)},
    "no average": lambda tensors: {k: v for k, v in tensors.items() if not k.startswith("average.")},
    "another parameter": lambda tensors: tensors | {"optimizer.999.exp_avg": torch.zeros(3)},
    "a slot is missing": lambda tensors: {k: v for k, v in tensors.items() if k != "optimizer.1.exp_avg_sq"},
    "a layer is missing": lambda tensors: {k: v for k, v in tensors.items() if k != next(iter(tensors))},
}


@pytest.mark.parametrize("digest", [True, False], ids=["with", "without a digest"])
@pytest.mark.parametrize("harm", [None, *DAMAGES])
def test_a_damaged_state_changes_no_weight(harm, digest, tmp_path, monkeypatch, capsys):
    "It is set aside before any of it is used; older states have no digest, and whole ones count."
    spec = replace(SPEC, averaging=0.9)
    model = build(spec.network, spec.K, spec.alpha, spec.seed)
    parts = model, trainings.make_optimizer(model, spec), trainings.averaged(model, spec)
    trainings.training_step(*parts[:2], torch.rand(4, 3, 32, 32), torch.arange(4), spec, torch.Generator())
    path, progress = tmp_path / "state.safetensors", {"iteration": 1, "seconds": 1.0, "losses": []}
    trainings._save_state(path, progress, *parts)
    with safe_open(path, "pt") as f:
        meta, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
    meta = meta if digest else {"nsq": meta["nsq"]}
    save_file(DAMAGES[harm](tensors) if harm else tensors, path, meta)
    fresh = build(spec.network, spec.K, spec.alpha, seed=1)
    others = fresh, trainings.make_optimizer(fresh, spec), trainings.averaged(fresh, spec)
    before = weights_digest(fresh.state_dict())
    assert trainings._load_state(path, *others) == (None if harm else progress)
    assert weights_digest(fresh.state_dict()) == (before if harm else weights_digest(model.state_dict()))
    assert path.with_suffix(".damaged").exists() == ("set aside" in capsys.readouterr().out) == bool(harm)


def test_a_state_with_one_other_number_is_damaged(tmp_path, capsys):
    "Right names and shapes, another moment or iteration: the digest tells."
    model = build(SPEC.network, SPEC.K, SPEC.alpha, SPEC.seed)
    parts, path = (model, trainings.make_optimizer(model, SPEC)), tmp_path / "state.safetensors"
    progress = {"iteration": 1, "seconds": 1.0, "losses": []}
    for later in (0, 1):
        trainings._save_state(path, progress, *parts)
        with safe_open(path, "pt") as f:
            meta, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
        name = next(iter(tensors))
        tensors[name] = tensors[name] + (1 - later)
        save_file(tensors, path, meta | {"nsq": records.canonical(progress | {"iteration": 1 + later})})
        assert trainings._load_state(path, *parts) is None and "digest" in capsys.readouterr().out
