"""Runs that many tests look at, made once; which tests come first; and what the tests did, counted for the page on
reliability: `--record` writes it through the project's own records."""

import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
DRAWING = ("matplotlib", "seaborn", "papermill", "nbdev", "fastcore", "IPython", "ipykernel")  # no GPU machine has them
SMALL = dict(models="natural,nsq", n_test=20, steps=2, iterations=3)
RUNS = {
    "mnist": dict(SMALL, eps="0.1"),
    "cifar": dict(SMALL, eps="8/255"),
    "parameter_study": dict(Ks="2", alphas="255", n_test=4, steps=2, iterations=3),
    "adaptive": dict(models="nsq", n_test=4, n_suite=2, parts="certificates,arithmetic,sanity"),
    "variants": dict(variants="nsq,box,threshold", n_test=12),
    "capacity": dict(networks="tiny", lengths="3", n_test=4, steps=2),
    "fair": dict(models="nsq", budgets="0.001", seeds=1, n_test=4),
    "proven": dict(models="nsq_ibp", seeds=1, iterations=6, n_attack=4),
    "imagenet": dict(models="nsq", n_test=4, steps=2, iterations=2),
    "benchmark": dict(parts="layer", rounds=1),
}
ITERATIONS = {"adaptive": 25}  # of trainings that have no parameter for it; 6 elsewhere
BARE = """
import os, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in NAMES:
            raise ImportError(f"{name} is not for training and attacks")
sys.meta_path.insert(0, Refuse())
from nsq_repro import mnist
from nsq_repro.cli import main
budgets = mnist.PRESETS["smoke"]["training"]
for name, how in RUNS.items():
    few = {m: {**given, "iterations": ITERATIONS.get(name, 6)} for m, given in budgets.items()}
    mnist.PRESETS["smoke"]["training"] = few
    os.environ["NSQ_HOME"] = name
    os.mkdir(name)
    given = [a for k, v in how.items() for a in ("-p", k, str(v))]
    assert main(["run", name, "--plain", "--scale", "smoke", "-p", "device", "cpu", *given]) == 0, name
    print("ran", name, flush=True)
assert not set(NAMES) & {m.split(".")[0] for m in sys.modules}
"""


@pytest.fixture(scope="session")
def bare(tmp_path_factory):
    """Every experiment at its smallest, run once for all tests where nothing that draws can be imported: `runs` (name →
    parameters), `root` (a home of each by its name), `said`. To be looked at; who changes a home takes a copy."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "bare"
    with FileLock(f"{root}.lock"):  # another process may be at it
        if not root.exists():
            root.mkdir()
            code = f"NAMES, RUNS, ITERATIONS = {DRAWING!r}, {RUNS!r}, {ITERATIONS!r}\n{BARE}"
            env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=root)
            said = done.stdout + done.stderr[-3000:]
            (root / "said").write_text(f"{said}\nended with {done.returncode}", encoding="utf-8")
    return SimpleNamespace(runs=RUNS, root=root, said=(root / "said").read_text(encoding="utf-8"))


FIRST = ("rooms claims cifar runs kills imagenet data networks outputs machines package cells weights programs").split()


def pytest_addoption(parser):
    parser.addoption("--record", action="store_true", help="write the counts to figures/cpu/reliability.json")


def pytest_collection_modifyitems(items):
    name = lambda item: item.path.stem.removeprefix("test_")
    items.sort(key=lambda item: FIRST.index(name(item)) if name(item) in FIRST else len(FIRST))  # short ones fill gaps
    for item in items:
        if getattr(item.function, "is_hypothesis_test", False):
            settings = getattr(item.function, "_hypothesis_internal_use_settings", None)
            item.user_properties.append(("examples", settings.max_examples if settings else 100))


class Counts:
    "What became of the tests, by file; tests of properties by themselves."

    def __init__(self):
        self.began, self.suites = time.perf_counter(), defaultdict(lambda: dict.fromkeys(FIELDS, 0))

    def pytest_runtest_logreport(self, report):
        examples = dict(report.user_properties).get("examples", 0)
        name = "properties" if examples else Path(report.fspath).stem.removeprefix("test_")
        suite = self.suites[name]
        suite["seconds"] += report.duration
        if report.when == "call" or report.outcome != "passed":
            suite["cases"] += 1
            suite["examples"] += examples
            suite[report.outcome] += 1

    def pytest_sessionfinish(self, session, exitstatus):
        from nsq_repro import reliability

        if exitstatus in (0, 1) and not hasattr(session.config, "workerinput"):  # to the end, in the first process
            reliability.save_counts(self.suites, time.perf_counter() - self.began)


FIELDS = ("cases", "passed", "failed", "skipped", "examples", "seconds")


def pytest_configure(config):
    if config.getoption("--record"):
        config.pluginmanager.register(Counts(), "counts")
