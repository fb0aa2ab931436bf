"""Other machines: pipes that close, Ctrl-C, full disks, locales, users without a home, other people's settings."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nsq_repro import cli, plots, records, reliability, suite, training
from nsq_repro.cells import made_from
from nsq_repro.data import CIFAR_CLASSES, load
from nsq_repro.evaluation import AttackSpec, evaluate
from nsq_repro.training import bytes_written, recipe, train, train_key

pytestmark = pytest.mark.reliability
ROOT = Path(__file__).resolve().parents[1]
SPEC = recipe("nsq", iterations=8, batch_size=10, network="cifar_tiny", lr=1e-3)
WORK = """
from nsq_repro import records
from nsq_repro.cli import main
import torch
from nsq_repro.data import Dataset
from nsq_repro.training import recipe, train
main(["list"])
x, y = torch.randint(256, (8, 3, 32, 32)).byte(), torch.arange(8) % 2
spec = recipe("natural", iterations=2, batch_size=4, network="cifar_tiny")
train(spec, Dataset(x, y, "noise", "α – ε", "train", ("α", "β")))
records.save_table("toy", "α – ε", [{"α": "–"}], {"data": {"title": "α – ε"}}, "smoke")
assert records.load_figure_record("toy", "smoke")["data"]["title"] == "α – ε"
raise SystemExit(main(["list"]))
"""


def shell(line, home, **changes):
    "A line of bash in a home of its own; a variable that is None is taken away."
    env = {**os.environ, "NSQ_HOME": str(home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **changes}
    env = {k: v for k, v in env.items() if v is not None}
    nsq = f"nsq() {{ {sys.executable} -m nsq_repro.cli \"$@\"; }}; set -o pipefail; "
    return subprocess.run(["bash", "-c", nsq + line], env=env, capture_output=True, cwd=home)


@pytest.mark.parametrize("line", ["nsq list", "nsq run mnist --help", "nsq doctor"])
def test_a_pipe_that_closes(line, tmp_path):
    done = shell(f"{line} | true", tmp_path, NSQ_DATA=str(tmp_path))
    assert done.returncode == 0 and not done.stderr, done.stderr.decode()


@pytest.mark.parametrize("closed", ["2>&-", ">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams(closed, tmp_path):
    done = shell(f"nsq list {closed}", tmp_path)
    assert done.returncode == 0 and b"Traceback" not in done.stdout + done.stderr
    assert (">&-" not in closed.replace("2>&-", "")) == (b"no figures yet" in done.stdout)


LOCALES = {
    "closed": ({}, ">&- 2>&-"), "C": (dict(LC_ALL="C", PYTHONUTF8="0"), ""),
    "ISO-8859-1": (dict(LC_ALL="en_US.ISO-8859-1", PYTHONIOENCODING="iso-8859-1", PYTHONUTF8="0"), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", LOCALES)
def test_text_is_utf8_whatever_the_locale(name, tmp_path):
    changes, closed = LOCALES[name]
    (tmp_path / "work.py").write_text(WORK, encoding="utf-8")
    done = shell(f"{sys.executable} work.py {closed}", tmp_path, **changes)
    assert done.returncode == 0, done.stderr.decode()
    table = tmp_path / "figures" / "smoke" / "toy.md"
    assert table.read_text(encoding="utf-8") == "α – ε\n" and len(list(tmp_path.glob("runs/train-*/record.json"))) == 1


UNKNOWN = """
import pwd
def nobody(*_): raise KeyError("uid not found")
pwd.getpwuid = pwd.getpwnam = nobody
"""


def test_a_user_nobody_knows_without_a_home(tmp_path):
    nobody = dict.fromkeys(("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "NSQ_DATA", "XDG_CACHE_HOME"))
    doctor = WORK.replace('SystemExit(main(["list"]))', 'SystemExit(main(["list"]) or main(["doctor"]))')
    (tmp_path / "work.py").write_text(UNKNOWN + doctor, encoding="utf-8")
    done = shell(f"{sys.executable} work.py", tmp_path, **nobody)
    assert done.returncode == 0, done.stderr.decode()
    assert b"nothing is broken" in done.stdout


def test_ctrl_c_keeps_the_last_iteration(tmp_path, monkeypatch):
    "The state saved then leads to the weights of a run that nobody stopped, and to the same losses."
    data, step, calls = load("photos", "train"), training.training_step, []
    monkeypatch.setenv("NSQ_HOME", str(tmp_path / "a"))
    net, record = train(SPEC, data, progress=False)

    def stopped(*args):
        loss = step(*args)
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return loss

    monkeypatch.setenv("NSQ_HOME", str(tmp_path / "b"))
    monkeypatch.setattr(training, "training_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(SPEC, data, progress=False)
    assert len(calls) == 5 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    code, others = records._code_here(), {"commit": "0" * 40, "dirty": True}
    monkeypatch.setattr(records, "_code_here", lambda: others)  # as if a commit lay between the two processes
    again, resumed = train(SPEC, data, progress=False)
    assert len(calls) == 8 and resumed["losses"] == record["losses"]
    assert "parts" not in record["provenance"] and resumed["provenance"]["commit"] == others["commit"]
    made = [(p["iterations"], {k: p[k] for k in others}) for p in resumed["provenance"]["parts"]]
    assert made == [([0, 5], code), ([5, 8], others)] and made_from("training", "it", [resumed])["commits"][1:]
    assert records.is_dirty({"runs": [made_from("training", "it", [resumed])]})
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values()))


def test_ctrl_c_in_a_terminal_is_one_line(tmp_path):
    run = "run mnist --plain --scale smoke -p models natural -p iterations 100000 -p network mnist_cnn_pytorch"
    env = {**os.environ, "NSQ_HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "nsq_repro.cli", *run.split()]
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    seen, limit = b"", time.monotonic() + 120
    while b"img/s" not in seen and time.monotonic() < limit:
        seen += os.read(process.stderr.fileno(), 4096)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    last = (seen + err).decode().replace("\r", "\n").strip().splitlines()[-1]
    assert process.returncode == 130 and last.startswith("stopped;") and "Traceback" not in (seen + err).decode()
    assert list(tmp_path.glob("runs/train-*/state.safetensors"))


def almost_full(monkeypatch, free):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))


def test_a_full_disk_is_found_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NSQ_HOME", str(tmp_path))
    monkeypatch.setattr(training, "training_step", lambda *a: pytest.fail("training began"))
    almost_full(monkeypatch, bytes_written(SPEC) - 1)
    with pytest.raises(OSError, match="MB are free, and up to"):
        train(SPEC, load("photos"), progress=False)
    assert cli.main("run mnist --plain --scale smoke -p models natural,pgd".split()) == 1
    said = capsys.readouterr().err
    assert "choose another NSQ_HOME" in said and len(said.splitlines()) == 1
    assert not list(tmp_path.rglob("*.json"))


def test_what_a_training_writes_is_not_more_than_was_said(tmp_path, monkeypatch):
    monkeypatch.setenv("NSQ_HOME", str(tmp_path))
    most = []
    write = records.atomic_write

    def watched(path, content):
        result = write(path, content)
        most.append(sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()) + len(content))
        return result

    monkeypatch.setattr(records, "atomic_write", watched)
    train(SPEC, load("photos"), progress=False, save_every=0)
    assert len(most) > 3 and max(most) <= bytes_written(SPEC)


def folder_of_images(root):
    "A set of one image a class and split."
    r = np.random.RandomState(0)
    for split in ("train", "test"):
        for c in CIFAR_CLASSES:
            (folder := root / "cifar10" / split / c).mkdir(parents=True)
            Image.fromarray(r.randint(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / "a.png")
    return root / "cifar10" / "test" / "cat"


def test_images_with_16_bits_empty_folders_and_files_beside(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    cats = folder_of_images(tmp_path)
    (cats / "._a.png").write_bytes(b"left behind by another system")
    assert len(load("cifar10", root=tmp_path)) == 10
    Image.fromarray(np.zeros((32, 32), np.uint16)).save(cats / "b.png")
    with pytest.raises(ValueError, match="b.png has 16 bits a channel"):
        load("cifar10", root=tmp_path)
    (cats / "b.png").unlink()
    (cats / "a.png").unlink()
    with pytest.raises(ValueError, match="cat holds no images"):
        load("cifar10", root=tmp_path)


def test_other_peoples_matplotlibrc_changes_no_figure(tmp_path, monkeypatch):
    rc = ("text.usetex: True", "font.size: 30", "axes.facecolor: red", "lines.linewidth: 9", "svg.fonttype: none")
    (tmp_path / "matplotlibrc").write_text("\n".join(rc), encoding="utf-8")
    code = "from nsq_repro import plots, records; records.save_figure(plots.fig2(), 'fig2', {}, 'smoke')"
    done = shell(f'{sys.executable} -c "{code}"', tmp_path, MATPLOTLIBRC=str(tmp_path / "matplotlibrc"))
    assert done.returncode == 0, done.stderr.decode()
    monkeypatch.setenv("NSQ_HOME", str(tmp_path / "ours"))
    ours = records.save_figure(plots.fig2(), "fig2", {}, "smoke")
    theirs = [tmp_path / "figures" / "smoke" / p.name for p in ours]
    assert [records.file_digest(p) for p in ours[:2]] == [records.file_digest(p) for p in theirs[:2]]
    assert {p.suffix for p in ours[:2]} == {".svg", ".png"}


def test_radii_close_to_each_other_do_not_share_a_cell(tmp_path, monkeypatch):
    monkeypatch.setenv("NSQ_HOME", str(tmp_path))
    net, _ = train(SPEC, load("photos"), progress=False)
    radii = (0.1, 0.1000001, 0.10000010000000001)
    attack = AttackSpec("pgd", "ce", radii, steps=1, n_test=4)
    assert evaluate(net, train_key(SPEC, "toy"), load("photos"), attack)["series"][0]["eps"] == list(radii)
    assert len(list(tmp_path.glob("runs/eval-*/eps-*.json"))) == 3
    questions = [suite.attack_question(suite.Attack("zbox"), {"a": {}}, "a", e) for e in radii]
    assert len({records.spec_hash(q) for q in questions}) == 3
    with pytest.raises(ValueError, match="first six digits"):
        suite.check_radii(radii)


def test_doctor_says_what_is_broken(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NSQ_HOME", str(tmp_path))
    monkeypatch.setenv("NSQ_DATA", str(tmp_path / "data"))
    assert cli.main(["doctor"]) == 0 and capsys.readouterr().out.rstrip().endswith("nothing is broken")
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{name}-ubyte").write_bytes(b"not MNIST")
    assert cli.main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "2 broken" in said and "train-images-idx3-ubyte is damaged" in said
    monkeypatch.setattr(reliability.metadata, "version", lambda name: "0.1")
    assert any(f.about == "torch" and f.state.startswith("broken") for f in reliability.software())
    almost_full(monkeypatch, 10**6)
    assert all(f.state.startswith("note: little space") for f in reliability.folders())


def test_doctor_is_quick_and_counts_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("NSQ_HOME", str(tmp_path))
    monkeypatch.setenv("NSQ_DATA", str(tmp_path))
    records.save_record(records.run_file({"a": 1}, "toy"), {"value": 1})
    (records.run_dir({"a": 2}, "toy") / "state").write_text("12345", encoding="utf-8")
    began = time.process_time()
    found = reliability.doctor()
    assert time.process_time() - began < 5
    size = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
    assert [f.found for f in found["runs"]] == [f"2, {reliability.size_text(size)}", "1"]


def test_clean_shows_first_and_removes_with_yes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NSQ_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    data = tmp_path / "data"
    monkeypatch.setenv("NSQ_DATA", str(data))
    folder_of_images(data)
    load("cifar10")
    done = records.cached({"a": 1}, "toy", lambda folder: {"value": 1})
    begun = records.run_dir({"a": 2}, "toy") / "state.safetensors"
    begun.write_text("12345", encoding="utf-8")
    kept = records.save_table("toy", "1", [{"a": 1}], {}, "smoke")
    part = kept[0].with_name(".toy.md.x.part")
    part.write_text("half", encoding="utf-8")
    assert cli.main(["clean"]) == 0
    said = capsys.readouterr().out
    assert "nothing was removed" in said and part.exists() and begun.exists()
    for what in ("unfinished run", "temporary file", "decoded data", "lock", "5 bytes", "4 bytes"):
        assert what in said
    assert cli.main(["clean", "--yes"]) == 0
    assert not part.exists() and not begun.exists() and not list(data.rglob("decoded-*"))
    assert all(p.exists() for p in kept) and records.run_file({"a": 1}, "toy").exists() and done["value"] == 1
    assert len(load("cifar10")) == 10  # decoded again
    assert cli.main(["clean", "--yes", "--runs"]) == 0
    assert not records.run_file({"a": 1}, "toy").exists() and all(p.exists() for p in kept)
    assert json.loads(kept[2].read_text(encoding="utf-8"))["item"] == "toy"
