"""The site as a reader meets it: what is cited is listed, and each page leads to the next one."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
LISTED = re.findall(r"- (\S+\.ipynb)", (NBS / "sidebar.yml").read_text(encoding="utf-8"))
ORDER = [name for name in LISTED if (NBS / name).exists()]  # test_package says which is missing
CELLS = {name: json.loads((NBS / name).read_text(encoding="utf-8"))["cells"] for name in ORDER}
PROSE = {
    name: "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    for name, cells in CELLS.items()
}
QUARTO = (ROOT / "_quarto.yml").read_text(encoding="utf-8")


def entries():
    "The entries of the bibliography: key to its fields."
    text = (NBS / "references.bib").read_text(encoding="utf-8")
    found = re.findall(r"^@(\w+)\{(\w+),\n(.*?)^\}", text, re.M | re.S)
    assert len(found) == text.count("\n@"), "an entry is not closed by a line of its own"
    return {key: dict(re.findall(r"(\w+) = \{((?:[^{}]|\{[^{}]*\})*)\}", body)) for _, key, body in found}


def cited(name):
    "Keys that the prose of a page cites: @key, but no reference to an equation, a figure or a table."
    text = re.sub(r"```.*?```|`[^`]*`", "", PROSE[name], flags=re.S)
    return set(re.findall(r"(?<![\w@.])@(?!(?:eq|fig|tbl|sec)-)([a-zA-Z]\w+)", text))


@pytest.mark.parametrize("name", ORDER)
def test_what_a_page_cites_is_in_the_bibliography(name):
    assert not cited(name) - set(entries())


def test_each_entry_is_cited_and_complete():
    found, used = entries(), set().union(*map(cited, ORDER))
    assert not set(found) - used, "never cited"
    for key, fields in found.items():
        assert {"author", "title", "year"} <= set(fields), key
        assert key.rstrip("abcdefghijklmnopqrstuvwxyz").endswith(fields["year"]), key
        if "eprint" in fields:
            assert re.fullmatch(r"\d{4}\.\d{4,5}", fields["eprint"]), key
            assert fields["url"] == f"https://arxiv.org/abs/{fields['eprint']}", key


def test_the_list_of_references_needs_no_network():
    assert re.search(r"^bibliography: references\.bib$", QUARTO, re.M)
    assert not re.search(r"^\s*(csl|bibliography): *\S*https?:", QUARTO, re.M)


@pytest.mark.parametrize("name", ORDER)
def test_names_in_prose_are_citations(name):
    assert not re.findall(r"[^.\n]*\bet\s+al\b[^.\n]*", PROSE[name])


@pytest.mark.parametrize("name", ORDER)
def test_a_page_says_early_what_one_knows_at_its_end(name):
    first = [c for c in CELLS[name][:6] if c["cell_type"] == "markdown"]
    assert re.search(r"\b[Aa]t\s+(the|its)\s+end\b", "\n".join("".join(c["source"]) for c in first))


@pytest.mark.parametrize("name", ORDER)
def test_the_last_cell_leads_to_the_next_page(name):
    last, following = CELLS[name][-1], (LISTED + ["index.ipynb"])[LISTED.index(name) + 1]
    assert last["cell_type"] == "markdown", "the page ends in code"
    text = "".join(last["source"])
    assert re.findall(r"\]\((\w+\.ipynb)", text) == [following]
    assert len(re.findall(r"\.(?:\s|$)", text)) == 1, "one sentence"
