"""The look at rendered pages finds what is wrong with a page, and the sliders answer to the keyboard."""

import json
import shutil
from pathlib import Path

import check_browser
import pytest

NBS = Path(__file__).resolve().parents[1] / "nbs"
PAGE = '<!doctype html><html lang="en"><meta charset="utf-8"><title>a page</title><link rel="icon" href="data:,">'
FAULTS = {
    "wide": ('<div style="width:2000px">wide</div>', "wider than the window"),
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


def test_without_pages_it_says_so(tmp_path, capsys):
    assert check_browser.main(tmp_path) == 0
    assert capsys.readouterr().out.startswith("skipped: no rendered pages")


def test_it_finds_what_is_wrong(site):
    for name, (body, _) in FAULTS.items():
        (site / f"{name}.html").write_text(PAGE + body, encoding="utf-8")
    lines, _ = check_browser.look(site)
    assert not [line for line in lines if line.startswith("good")]
    for name, (_, words) in FAULTS.items():
        assert any(line.startswith(f"{name}.html at 390 px") and words in line for line in lines), (name, lines)


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
