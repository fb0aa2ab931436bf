"""The package from outside: what importing costs, what it promises, and that its descriptions agree with each other."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nsq_repro

ROOT = Path(__file__).resolve().parents[1]
BARE = ("quantization", "data", "networks", "attacks", "training", "evaluation", "records")  # run on a bare GPU machine


def run(code, **kwargs):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, **kwargs
    ).stdout


def test_importing_the_package_loads_nothing():
    assert not {"torch", "numpy"} & set(run("import sys; import nsq_repro; print(*sys.modules)").split())


@pytest.mark.parametrize("line", ["--help", "--version", "run --help", "run mnist --scale huge", "verify --scale auto"])
def test_help_and_options_do_not_wait_for_pytorch(line):
    main = f"try:\n    main({line.split()})\nexcept SystemExit:\n    print('answered', *sys.modules)"
    answered = run(f"import sys\nfrom nsq_repro.cli import main\n{main}").partition("answered")[2].split()
    assert "argparse" in answered and not {"torch", "pandas", "matplotlib", "papermill"} & set(answered)


@pytest.mark.parametrize("name", nsq_repro.__all__)
def test_public_names_exist_and_are_in_the_readme(name):
    assert callable(getattr(nsq_repro, name)) and name in dir(nsq_repro)
    assert f"| `{name}` |" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_unknown_name():
    with pytest.raises(AttributeError, match="nothing_like_that"):
        getattr(nsq_repro, "nothing_like_that")


def test_bare_modules_import_little():
    roots = run(
        f"import sys\nfor m in {BARE}: __import__('nsq_repro.' + m)\nprint(*{{m.split('.')[0] for m in sys.modules}})"
    ).split()
    assert not {
        "torchvision",
        "matplotlib",
        "seaborn",
        "sklearn",
        "pandas",
        "papermill",
        "IPython",
        "ipykernel",
        "fastcore",
        "nbdev",
    } & set(roots)


def test_importing_everything_leaves_the_gpu_and_settings_of_plots_alone():
    modules = sorted(p.stem for p in (ROOT / "nsq_repro").glob("[a-z]*.py"))
    code = (
        "import matplotlib as m, matplotlib.pyplot, torch\nbefore = dict(m.rcParams)\n"
        f"for name in {modules}: __import__('nsq_repro.' + name)\n"
        "print(torch.cuda.is_initialized(), before == dict(m.rcParams))"
    )
    assert run(code) == "False True\n"


def test_no_star_imports():
    for file in (ROOT / "nsq_repro").glob("*.py"):
        assert not re.search(r"^\s*from \S+ import \*", file.read_text(encoding="utf-8"), re.M), file


def test_readme_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert "subset(100)" in code and "bpda_ste worst" in run(code.replace("subset(100)", "subset(10)"))


def test_readme_example_attacks_a_trained_network_where_there_is_one():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    there = (ROOT / "figures" / "cpu" / "weights" / "mnist-nsq.json").exists()
    assert not there or 'load_model("mnist-nsq")' in code


def test_versions_and_names_agree():
    assert f"\nversion = {nsq_repro.__version__}\n" in (ROOT / "settings.ini").read_text(encoding="utf-8")
    assert f"\nversion: {nsq_repro.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)[1]
    assert newest == nsq_repro.__version__


NAMING = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", ".github/workflows/tests.yml", ".github/workflows/docs.yml")


@pytest.mark.parametrize("name", NAMING)
def test_what_is_named_is_there(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert set(re.findall(r"(?:^|[`:&] ?)make ([a-z-]+)", text, re.M)) <= targets
    for link in re.findall(r"\]\((?!https?:)([^)#\s]+)", text):
        assert (ROOT / link).exists(), link


def test_sidebar_has_every_notebook_once():
    listed = re.findall(r"- (\S+\.ipynb)", (ROOT / "nbs" / "sidebar.yml").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(p.name for p in (ROOT / "nbs").glob("*.ipynb"))


def test_front_page_lists_every_page_in_the_order_of_the_sidebar():
    sidebar = re.findall(r"- (\S+\.ipynb)", (ROOT / "nbs" / "sidebar.yml").read_text(encoding="utf-8"))
    cells = json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(c["source"]) for c in cells)
    rows = re.findall(r"^\| \[[^\]]+\]\((\S+\.ipynb)\) \|.*\S \|$", text, re.M)
    assert rows == [page for page in sidebar if page != "index.ipynb"]


def test_notebooks_keep_what_papermill_needs():
    for path in (ROOT / "nbs").glob("*.ipynb"):
        nb = json.loads(path.read_text(encoding="utf-8"))
        assert nb["metadata"]["kernelspec"] == {"display_name": "python3", "language": "python", "name": "python3"}, (
            path.name
        )
        assert sum("parameters" in c["metadata"].get("tags", ()) for c in nb["cells"]) <= 1, path.name


def mixes_imports(cell):
    """An import beside other code in a cell that is not exported: building the site runs such a cell,
    without those above it."""
    source = "".join(cell["source"])
    if cell["cell_type"] != "code" or re.search(r"^#\| *(export|eval: *false)", source, re.M):
        return False
    kinds = {type(node) for node in ast.walk(ast.parse(source))}
    return bool(kinds & {ast.Import, ast.ImportFrom} and kinds & {ast.Expr, ast.Assign})


@pytest.mark.parametrize("path", sorted((ROOT / "nbs").glob("*.ipynb")), ids=lambda p: p.stem)
def test_imports_have_cells_of_their_own(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    mixed = [c["source"][0] for c in cells if mixes_imports(c)]
    assert not mixed or not any("#| export" in "".join(c["source"]) for c in cells), mixed


@pytest.mark.parametrize("table", ["mnist-accuracy", "cifar-accuracy", "mnist-bracket-values"])
def test_readme_shows_the_recorded_numbers(table):
    "The results in the README are the committed table, line by line; nothing is typed."
    readme, found = (ROOT / "README.md").read_text(encoding="utf-8"), ROOT / "figures" / "cpu" / f"{table}.md"
    assert all(line in readme for line in found.read_text(encoding="utf-8").splitlines())
