"""The look at rendered pages finds what is wrong with a page; sliders and filters answer to the keyboard."""

import html
import json
import re
import shutil
from pathlib import Path

import check_browser
import pytest
import render_pages

NBS = Path(__file__).resolve().parents[1] / "nbs"
PAGE = '<!doctype html><html lang="en"><meta charset="utf-8"><title>a page</title><link rel="icon" href="data:,">'
FAULTS = {
    "wide": ('<div style="width:2000px">wide</div>', "wider than the window"),
    "equation": (
        '<p class="math display" style="overflow:auto;width:9em"><math></math><b style="padding:9em">x</p>',
        "equation",
    ),
    "picture": ('<img src="none.png" alt="">', "picture missing: none.png"),
    "script": ("<script>nothing.at.all()</script>", "nothing is not defined"),
    "formula": ('<script>MathJax = {version: "3"}</script><span class="math">\\(x\\)</span>', "formula not set"),
}


@pytest.fixture
def site(tmp_path):
    (tmp_path / "good.html").write_text(f"{PAGE}<p>text</p>", encoding="utf-8")
    why = check_browser.not_here(tmp_path)
    if why:
        pytest.skip(why)
    return tmp_path


def test_without_pages_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert check_browser.main(tmp_path) == 0
    assert capsys.readouterr().out.startswith("skipped: no rendered pages")


def test_it_finds_what_is_wrong(site):
    for name, (body, _) in FAULTS.items():
        (site / f"{name}.html").write_text(PAGE + body, encoding="utf-8")
    lines, _ = check_browser.look(site)
    assert not [line for line in lines if line.startswith("good")]
    for name, (_, words) in FAULTS.items():
        width = 1400 if name == "equation" else 390
        assert any(line.startswith(f"{name}.html at {width} px") and words in line for line in lines), (name, lines)


def still():
    "The still picture of the quantization page."
    cells = json.loads((NBS / "quantization.ipynb").read_text(encoding="utf-8"))["cells"]
    (cell,) = [c for c in cells if "#| label: fig-quantization-play" in "".join(c["source"])]
    return next("".join(o["data"]["image/png"]) for o in cell["outputs"] if "image/png" in o["data"])


def test_sliders_answer_to_the_keyboard(site):
    from playwright.sync_api import sync_playwright

    for name in ("play.js", "play.css"):
        shutil.copy(NBS / name, site)
    image = f'<img alt="a digit" style="max-width:100%" src="data:image/png;base64,{still()}">'
    linked = f'<a href="large.html">{image}</a>'  # as in a page whose pictures can be enlarged
    body = f'<div id="fig-quantization-play"><figure style="margin:0">{linked}</figure></div>'
    head = '<meta name="viewport" content="width=device-width"><link rel="stylesheet" href="play.css">'
    page_file = site / "play.html"
    page_file.write_text(f'{PAGE}{head}<script src="play.js" defer></script>{body}', encoding="utf-8")
    with sync_playwright() as p:
        program = next(filter(None, map(shutil.which, check_browser.BROWSERS)))
        browser = p.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for scripts in (True, False):
            page = browser.new_context(java_script_enabled=scripts).new_page()
            page.goto(page_file.as_uri())
            assert page.locator("img").is_visible() != scripts
            assert page.locator(".play").count() == scripts
            if scripts:
                before = page.locator(".play p").text_content()
                assert not page.locator("a .play").count()
                page.focus("#play-K")
                page.keyboard.press("ArrowRight")
                assert page.locator("#play-K").get_attribute("aria-valuetext") == "2"
                page.keyboard.press("Tab")
                assert page.evaluate("document.activeElement.id") == "play-alpha"
                assert page.locator(".play p").text_content() != before
        browser.close()
    assert check_browser.look(site)[0] == []


def claims_html():
    "The table of claims of its page, as HTML; and its rows: the paper's page and the verdict."
    cells = json.loads((NBS / "claims.ipynb").read_text(encoding="utf-8"))["cells"]
    texts = ["".join(o.get("data", {}).get("text/markdown", "")) for c in cells for o in c.get("outputs", [])]
    (text,) = [t for t in texts if "| what the paper says |" in t]
    head, _, *rows = [re.split(r" *(?<!\\)\| *", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    bare = lambda text: html.escape(text.replace("**", ""))
    row = lambda cells, tag: "<tr>" + "".join(f"<{tag}>{bare(c)}</{tag}>" for c in cells) + "</tr>"
    body = "".join(row(r, "td") for r in rows)
    kinds = [(re.match(r"p\.\s*(\d+)", r[0])[1], re.sub(r" *\(.*", "", r[4].replace("**", ""))) for r in rows]
    return f"<table><thead>{row(head, 'th')}</thead><tbody>{body}</tbody></table>", kinds


def test_claims_are_filtered_by_page_and_by_verdict(site):
    from playwright.sync_api import sync_playwright

    for name in ("claims.js", "styles.css"):
        shutil.copy(NBS / name, site)
    table, kinds = claims_html()
    head = '<meta name="viewport" content="width=device-width"><link rel="stylesheet" href="styles.css">'
    other = "<table><thead><tr><th>verdict</th></tr></thead><tbody><tr><td>x</td></tr></tbody></table>"
    page_file = site / "claims.html"
    body = f'{PAGE}{head}<script src="claims.js" defer></script><main>{other}{table}</main>'
    page_file.write_text(body, encoding="utf-8")
    number, verdict = kinds[-1]
    with sync_playwright() as p:
        program = next(filter(None, map(shutil.which, check_browser.BROWSERS)))
        browser = p.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for scripts in (True, False):
            page = browser.new_context(java_script_enabled=scripts).new_page()
            page.goto(page_file.as_uri())
            seen = page.locator("table:last-of-type tbody tr:visible")
            assert seen.count() == len(kinds) and page.locator(".claims-filter").count() == scripts
            if scripts:
                pages, verdicts = (page.locator(f"#claims-{n} option").all_text_contents() for n in ("page", "verdict"))
                assert pages == ["all", *map(str, sorted({int(k[0]) for k in kinds}))]
                assert set(verdicts) == {"all"} | {k[1] for k in kinds}
                page.focus("#claims-page")
                down = lambda values, value: [page.keyboard.press("ArrowDown") for _ in range(values.index(value))]
                down(pages, number)
                assert seen.count() == sum(k[0] == number for k in kinds)
                page.keyboard.press("Tab")
                assert page.evaluate("document.activeElement.id") == "claims-verdict"
                down(verdicts, verdict)
                both = sum(k == kinds[-1] for k in kinds)
                assert seen.count() == both > 0
                assert page.locator("output").text_content() == f"{both} of {len(kinds)} claims"
                page.select_option("#claims-page", "")
                page.select_option("#claims-verdict", "")
                page.focus("#claims-words")
                page.keyboard.type("98.49")
                assert 0 < seen.count() < 5 and all("98.49" in text for text in seen.all_text_contents())
        browser.close()
    assert check_browser.look(site)[0] == []


def test_without_quarto_pandoc_makes_pages_to_look_at(tmp_path):
    if not shutil.which("pandoc"):
        pytest.skip("no pandoc here")
    (tmp_path / "in").mkdir()
    cells = [
        {"cell_type": "raw", "source": "---\ntitle: A page\n---\n"},
        {"cell_type": "markdown", "source": "$$ x^2 $$ {#eq-square}\n\nIn @eq-square, and [there](b.ipynb#eq-cube)."},
        {"cell_type": "code", "source": "#| echo: false\n1", "outputs": [{"data": {"text/plain": "one"}}]},
        {"cell_type": "code", "source": '#| label: fig-a\n#| fig-cap: "Of it."\n#| fig-alt: "A digit."\nf()',
         "outputs": [{"data": {"image/png": still(), "text/plain": "<Figure>"}}]},
    ]  # fmt: skip
    (tmp_path / "in" / "a.ipynb").write_text(json.dumps({"cells": cells}), encoding="utf-8")
    assert render_pages.render(tmp_path / "in", tmp_path) == []
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    for words in ('id="eq-square"', 'href="#eq-square">Eq. 1<', 'href="b.html#eq-cube"', "<code>one", 'alt="A digit."'):
        assert words in text, words
    assert "Fig. 1: Of it." in text and "echo" not in text and (tmp_path / "a-3-0.png").exists()
    (tmp_path / "in" / "a.ipynb").write_text(
        json.dumps({"cells": [{"cell_type": "markdown", "source": "$\\frac{1$"}]}), encoding="utf-8"
    )
    assert any("TeX" in line for line in render_pages.render(tmp_path / "in", tmp_path)), "a formula that fails is said"
