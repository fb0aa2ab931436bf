"""The rooms of the package: imports go one way, pages use what stands before them, and an experiment is found by
its shape."""

import ast
import json
import re
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import DRAWING
from test_runs import cli

import nsq_repro

ROOT = Path(__file__).resolve().parents[1]
MODULES = {p.stem: p for p in sorted((ROOT / "nsq_repro").glob("[a-z]*.py"))}
ORDER = re.findall(r"- (\w+)\.ipynb", (ROOT / "nbs" / "sidebar.yml").read_text(encoding="utf-8"))
MACHINERY = ("records", "archive", "tables", "plots", "plots_beyond", "results", "cli")  # any page may use it


def imported(source, package="nsq_repro"):
    "Modules of the package that a source imports, inside functions too."
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            module = f"{package}.{node.module or ''}".rstrip(".") if node.level else node.module or ""
            if module == package:
                found |= {a.name for a in node.names}
            elif module.startswith(f"{package}."):
                found.add(module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith(f"{package}.")}
    return found & set(MODULES)


def page_imports(name):
    "Modules that the cells of a page import."
    cells = json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    sources = ("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    return set().union(*(imported(re.sub(r"^[%!].*$", "", s, flags=re.M)) for s in sources))


GRAPH = {m: imported(p.read_text(encoding="utf-8")) - {m} for m, p in MODULES.items()}


def test_imports_have_no_circles():
    try:
        list(TopologicalSorter(GRAPH).static_order())
    except CycleError as e:
        pytest.fail(f"a circle of imports: {' → '.join(e.args[1])}")


@pytest.mark.parametrize("name", [n for n in ORDER if n not in (*MACHINERY, "index")])
def test_a_page_uses_only_what_stands_before_it(name):
    before = set(ORDER[: ORDER.index(name)]) | set(MACHINERY) | {name}
    later = page_imports(name) - before
    assert not later, f"{name} uses {', '.join(sorted(later))}, which stands after it"


@pytest.mark.parametrize("name", [m for m in MACHINERY if m != "cli"])
def test_machinery_uses_only_machinery(name):
    assert GRAPH[name] <= {*MACHINERY, "quantization", "statistics"}


def test_only_drawing_modules_import_what_draws():
    for name, path in MODULES.items():
        tops = {
            a.name.split(".")[0] if isinstance(n, ast.Import) else (n.module or "").split(".")[0]
            for n in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(n, (ast.Import, ast.ImportFrom))
            for a in n.names
        }
        assert name in ("plots", "plots_beyond") or not tops & set(DRAWING), name


TOY = '''
"A toy experiment: how many images of the digits are brighter than a level."
from dataclasses import dataclass

from nsq_repro import experiments, records
from nsq_repro.data import load
from nsq_repro.experiments import Experiment, parameter, read

PRESETS = {"smoke": {}, "cpu": {}, "paper": {}}

@dataclass(frozen=True)
class Parameters(experiments.Parameters):
    "Parameters of the toy."
    level: float = parameter(0.2, "brightness that counts", least=0, most=1)

def run(**parameters):
    "Count, or find the count."
    q = read(Parameters, parameters)
    data = load("digits")
    count = lambda folder: {"bright": int((data.floats().flatten(1).mean(1) > q.level).sum()), "data": data.describe()}
    record = records.cached({"level": q.level, "data": data.fingerprint}, "toy", count, q.refresh)
    text, rows = items()[0].table(record)
    records.save_table("toy-bright", text, rows, {**record, "seed": 0}, "cpu")
    return record

def items():
    "The toy's table."
    from nsq_repro.results import Item
    row = lambda r: [{"bright": r["bright"]}]
    return (Item("toy-bright", table=lambda r: (records.table_markdown(row(r), ["bright"]), row(r))),)

experiment = Experiment("toy", "how many digits are bright?", Parameters, PRESETS, run)
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    "The command line where the package has one more page."
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "toy.py").write_text(TOY, encoding="utf-8")
    monkeypatch.setattr(nsq_repro, "__path__", [*nsq_repro.__path__, str(tmp_path / "pages")])
    monkeypatch.delitem(sys.modules, "nsq_repro.toy", raising=False)
    yield lambda *args: cli(*args, home=tmp_path)
    sys.modules.pop("nsq_repro.toy", None)


def test_a_new_experiment_is_found_by_its_shape(toy, tmp_path):
    assert "toy" in toy("run", "--help").stdout
    told = toy("run", "toy", "--help").stdout
    assert "how many digits are bright?" in told and "level" in told and "at most 1" in told
    wrong = toy("run", "toy", "--plain", "-p", "levl", "0.3")
    assert wrong.returncode == 1 and "did you mean level?" in wrong.stderr and not (tmp_path / "runs").exists()
    done = toy("run", "toy", "--plain", "-p", "level", "1/4")
    assert done.returncode == 0, done.stderr
    listed = toy("list").stdout
    assert "toy-bright" in listed and "toy-" in listed
    checked = toy("verify", "--scale", "cpu")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "toy-bright.json  (made again)" in checked.stdout
    table = tmp_path / "figures" / "cpu" / "toy-bright.md"
    table.write_text(table.read_text(encoding="utf-8").replace("| ", "| 1", 1), encoding="utf-8")
    assert "MISMATCH" in toy("verify", "--scale", "cpu").stdout


def test_every_experiment_runs_without_what_draws(bare):
    from nsq_repro import experiments

    assert set(bare.runs) == set(experiments.experiment_names()), "an experiment is missing in RUNS"
    assert bare.said.endswith("ended with 0"), bare.said
    assert re.findall(r"^ran (.+)$", bare.said, re.M) == list(bare.runs)
    kinds = {p.parent.name.rsplit("-", 1)[0] for p in bare.root.glob("*/runs/**/record.json")}
    assert kinds >= {"train", "eval", "attack", "proof", "zeros", "gradients", "sanity"}
