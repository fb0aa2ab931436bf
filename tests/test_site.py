"""The pages as one text: labels are unique, references and links lead somewhere, figures have captions, code
cells are short."""

import ast
import io
import json
import re
import tokenize
from collections import Counter
from pathlib import Path

import pytest

NBS = Path(__file__).resolve().parents[1] / "nbs"
PAGES = {p.name: json.loads(p.read_text(encoding="utf-8"))["cells"] for p in sorted(NBS.glob("*.ipynb"))}
PROSE = {
    name: "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    for name, cells in PAGES.items()
}
CODE = {name: ["".join(c["source"]) for c in cells if c["cell_type"] == "code"] for name, cells in PAGES.items()}


def labels(name):
    "Labels a page defines: {#eq-…} and {#tbl-…} in prose, #| label: in code."
    text = re.sub(r"`[^`]*`", "", PROSE[name])
    return re.findall(r"\{#((?:eq|tbl|fig|sec)-[^} ]+)", text) + [
        m for c in CODE[name] for m in re.findall(r"^#\| label: *(\S+)", c, re.M)
    ]


def headings(name):
    "Anchors that Quarto makes from a page's headings: lower case, hyphens for spaces, no other punctuation."
    lines = re.findall(r"^#+ +(.+)", re.sub(r"^```.*?^```", "", PROSE[name], flags=re.M | re.S), re.M)
    return [re.sub(r"^[\W\d_]+", "", re.sub(r"[^\w\s.-]", "", t).strip().replace(" ", "-").lower()) for t in lines]


def markdown_outputs(name):
    "What the cells of a page display as Markdown."
    outputs = [o.get("data", {}) for c in PAGES[name] for o in c.get("outputs", [])]
    return ["".join(o["text/markdown"]) for o in outputs if "text/markdown" in o]


ALL = Counter(label for name in PAGES for label in labels(name))


def test_labels_are_unique_and_well_formed():
    assert ALL and not [label for label, n in ALL.items() if n > 1]
    assert not [label for label in ALL if not re.fullmatch(r"(eq|tbl|fig|sec)-[a-z0-9-]+", label)]


@pytest.mark.parametrize("name", PAGES)
def test_references_lead_to_a_label(name):
    "A reference resolves on its own page only; to another page leads a link."
    captions = re.findall(r"^#\| (?:fig|tbl)-\w+:.*", "\n".join(CODE[name]), re.M)
    used = re.findall(r"(?<![\w`])@((?:eq|tbl|fig|sec)-[a-z0-9-]+)", "\n".join([PROSE[name], *captions]))
    assert not set(used) - set(labels(name))


@pytest.mark.parametrize("name", PAGES)
def test_links_between_pages(name):
    for page in re.findall(r"\]\(([\w-]+)\.(?:ipynb|html)[#)]", PROSE[name]):
        assert f"{page}.ipynb" in PAGES, page
    text = "\n".join([PROSE[name], *CODE[name], *markdown_outputs(name)])
    links = re.findall(r"([\w-]+)\.(?:ipynb|html)#([\w.-]*\w)(?![\w-])", text)
    for page, anchor in links + [(Path(name).stem, own) for own in re.findall(r"\]\(#([^)\s]+)\)", text)]:
        assert anchor in labels(f"{page}.ipynb") + headings(f"{page}.ipynb"), f"{page}#{anchor}"


@pytest.mark.parametrize("name", PAGES)
def test_pages_begin_with_a_title_and_a_summary(name):
    assert re.match(r"# .+\n\n> \S", "".join(PAGES[name][0]["source"]))


@pytest.mark.parametrize("name", PAGES)
def test_figures_have_a_label_a_caption_and_a_text(name):
    for cell in (c for c in PAGES[name] if c["cell_type"] == "code"):
        source = "".join(cell["source"])
        drawn = any(kind.startswith("image/") for o in cell["outputs"] for kind in o.get("data", {}))
        if not drawn and not re.search(r"^#\| (label: *fig-|fig-)", source, re.M):
            continue
        assert re.search(r"^#\| label: *fig-", source, re.M), f"a figure without a label in\n{source}"
        for option in ("fig-cap", "fig-alt"):
            assert re.search(rf"^#\| {option}: *\S", source, re.M), f"a figure without {option} in\n{source}"
        named = re.search(r"""results\.figure\(\s*(name\()?['"]([\w-]+)""", source)
        files = f"*/{'*-' if named[1] else ''}{named[2]}.json" if named else "**/*.json"
        run = any((NBS.parent / "figures").glob(files))  # what was never run has no picture
        assert drawn or not run, f"no picture in the outputs of\n{source}"


@pytest.mark.parametrize("name", PAGES)
def test_cells_are_short_and_outputs_are_results(name):
    for cell in PAGES[name]:
        if cell["cell_type"] == "code":
            assert len([line for line in "".join(cell["source"]).splitlines() if line.strip()]) <= 40
            for o in cell["outputs"]:
                text = "".join(o.get("text", "")) + json.dumps(o.get("data", {}).get("text/plain", ""))
                assert (
                    o["output_type"] != "error"
                    and o.get("name") != "stderr"
                    and not re.search(r"/(home|root|work|tmp|Users)/", text)
                )


@pytest.mark.parametrize("name", PAGES)
def test_each_exported_cell_has_a_sentence_before_it(name):
    cells = PAGES[name]
    exported = [c["cell_type"] == "code" and "#| export" in "".join(c["source"]) for c in cells]
    bare = [c["id"] for c, one, before in zip(cells[1:], exported[1:], exported) if one and before]
    assert not bare, f"{name}: nothing is said before {bare}"


@pytest.mark.parametrize("name", PAGES)
def test_tables_are_displayed_and_not_printed(name):
    for cell in PAGES[name]:
        for text in ("".join(o["text"]) for o in cell.get("outputs", []) if o["output_type"] == "stream"):
            assert not re.search(r"^\|? *:?-{2,}:? *\|", text, re.M), f"a table as raw Markdown:\n{text}"
            paths = re.findall(r"^\s*[\w./-]*/[\w.-]+\.\w+\s*$", text, re.M)
            assert len(paths) < 2, f"a list of files:\n{text}"


def shown(path):
    "What nbdev shows of a module beside its code: its docstrings, and the comments that annotate parameters."
    text = path.read_text(encoding="utf-8")
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [*docs, *(t.string for t in tokens if t.type == tokenize.COMMENT)]


MODULES = sorted((NBS.parent / "nsq_repro").glob("[a-z]*.py"))


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.stem) for p in MODULES]
)
def test_docstrings_are_words(path):
    "A reference, a Markdown link or a <word> outside of backticks would be raw text or vanish in help() or HTML."
    for text in shown(path):
        found = re.search(r"@(eq|fig|tbl|sec)-|\]\(|<[A-Za-z/]", re.sub(r"`[^`]*`", "", text))
        assert not found, text


@pytest.mark.parametrize("name", PAGES)
def test_equations_hold_no_dollars_and_fit_the_column(name):
    "A dollar inside a displayed equation ends it for some readers; what is long is broken by hand."
    for text in re.findall(r"\$\$(.*?)\$\$", re.sub(r"```.*?```|`[^`]*`", "", PROSE[name], flags=re.S), re.S):
        assert "$" not in text, text
        lines = re.split(r"\\\\", re.sub(r"\\(begin|end)\{\w+\}", "", text))
        for line in lines:
            shown = re.sub(r"\\(left|right|[bB]igg?|mathrm|operatorname|text\w*|tfrac|frac|[,;:!])|[{}\s&_^]", "", line)
            assert len(re.sub(r"\\[a-zA-Z]+", "x", shown)) <= 60, line
