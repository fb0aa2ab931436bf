"""The site as a reader meets it: what is cited is listed, and each page leads to the next one."""

import json
import re
from pathlib import Path

import pytest
import torch

from nsq_repro.quantization import soft_quantize

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
        assert {"eprint", "doi", "url"} & set(fields), f"{key}: nowhere to read it"
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


def test_the_home_page_shows_no_code_but_what_a_reader_would_type():
    for cell in CELLS["index.ipynb"]:
        if cell["cell_type"] == "code":
            assert re.match(r"#\| (include|echo): false\n", "".join(cell["source"])), cell["id"]
    assert all(line in PROSE["index.ipynb"] for line in ("git clone https://", "pip install git+https://"))


def test_the_home_page_cites_this_version():
    text, cff = PROSE["index.ipynb"], (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    (version,), (title,) = re.findall(r"version = \{(.+?)\}", text), re.findall(r"title   = \{(.+?)\}", text)
    assert f"\nversion: {version}\n" in cff and f'\ntitle: "{title}"\n' in cff
    paper = entries()["zheng2018"]
    assert paper["eprint"] in text and " ".join(re.sub(r"[{}]", "", paper["title"]).split()) in text


@pytest.mark.parametrize("name", ORDER)
def test_pictures_in_prose_are_there_and_have_a_text(name):
    for file, rest in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)(\{[^}]*\})?", PROSE[name]):
        assert (NBS / file).exists(), file
        assert re.search(r'fig-alt="[^"]{20,}"', rest) or not file.endswith(".svg"), file


def test_the_home_page_lists_every_page_in_reading_order():
    (table,) = [c for c in CELLS["index.ipynb"] if "| page | paper | question |" in "".join(c["source"])]
    listed = re.findall(r"^\| \[[^\]]+\]\((\w+\.ipynb)\)", "".join(table["source"]), re.M)
    assert listed == [name for name in LISTED if name != "index.ipynb"]


def test_the_objective_page_stays_short():
    assert len(re.sub(r"\$\$.*?\$\$", "", PROSE["objective.ipynb"], flags=re.S).split()) <= 2050


def test_card_and_icon_show_the_layer():
    "The card of the site is Figure 2; its icon is the layer with three levels."
    assert (NBS / "card.png").read_bytes() == (ROOT / "figures" / "cpu" / "fig2.png").read_bytes()
    points = re.search(r'points="([^"]+)"', (NBS / "favicon.svg").read_text(encoding="utf-8"))[1].split()
    x, y = torch.tensor([[float(v) for v in point.split(",")] for point in points], dtype=torch.float64).T
    torch.testing.assert_close((30 - y) / 28, soft_quantize((x - 2) / 28, 3, 60.0), rtol=0, atol=0.06)
    assert all(line in QUARTO for line in ("favicon: favicon.svg", "image: card.png"))


def test_what_the_site_names_is_there_and_travels():
    "What the configuration names exists, what pages load is copied, and the notebooks' links are to this repository."
    (listed,) = re.findall(r"^  resources: \[(.+)\]$", QUARTO, re.M)
    named = re.findall(r"(?:favicon|image|css|bibliography): ([\w.]+\.\w+)$", QUARTO, re.M)
    sources = [QUARTO, *("".join(c["source"]) for cells in CELLS.values() for c in cells)]
    loaded = set(re.findall(r'(?:src|href)="([\w.]+\.(?:js|css))"', "\n".join(sources))) | {"site.js"}
    assert len(named) == 4 and {"play.js", "play.css", "claims.js"} <= loaded <= set(listed.split(", "))
    assert all((NBS / name).exists() for name in (*named, *listed.split(", "), "404.qmd"))
    repository = re.search(r'REPOSITORY = "(.+?)/blob/main/nbs"', (NBS / "site.js").read_text(encoding="utf-8"))[1]
    assert f'repo-url: "https://github.com/{repository}"' in (NBS / "nbdev.yml").read_text(encoding="utf-8")
