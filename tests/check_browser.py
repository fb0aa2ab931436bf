"""Looks at the rendered pages in headless Chromium, at two widths: nothing runs over the edge, every picture is
there, nothing fails, formulas are set. Where there is no rendered site it looks at what pandoc makes of the pages;
where there is no browser, or neither site nor pandoc, it says so and passes.

    python tests/check_browser.py [FOLDER]        (without one: _docs)
"""

import functools
import shutil
import sys
import tempfile
import threading
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import render_pages

ROOT = Path(__file__).resolve().parents[1]
WIDTHS = (1400, 390)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
LOOK = """() => ({
    over: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    missing: [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.getAttribute("src")),
    long: [...document.querySelectorAll(".math.display, math[display=block]")]
        .filter(m => m.scrollWidth > m.clientWidth + 1).map(m => m.textContent.trim().slice(0, 40)),
    mathjax: Boolean(window.MathJax && window.MathJax.version),
    unset: [...document.querySelectorAll(".math")].filter(m => !m.querySelector("mjx-container, math"))
        .map(m => m.textContent.trim().slice(0, 40)),
})"""


def not_here(folder):
    "Why nothing can be looked at, in one line; None where it can."
    if not any(Path(folder).glob("*.html")):
        return f"no rendered pages in {folder}: `make docs` renders them, and pandoc would do to look at"
    if not any(map(shutil.which, BROWSERS)):
        return f"no browser here ({', '.join(BROWSERS)})"
    try:
        import playwright  # noqa: F401
    except ImportError:
        return "no playwright here: .venv/bin/python -m pip install -e '.[browser]'"
    return None


class Handler(SimpleHTTPRequestHandler):
    "The folder as it is served: below the site's path, which the page for what is not found names in its links."

    def translate_path(self, path):
        return super().translate_path(path.removeprefix("/nsq-repro"))

    def log_message(self, format, *args):
        pass


@contextmanager
def served(folder):
    "The address of the pages of a folder on this machine; a browser loads no modules from files."
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/nsq-repro/"
        server.shutdown()


def look_at(page, address, name, width):
    "What is wrong with one page at one width: lines to print, and whether its formulas could be judged."
    said = []
    local = lambda url: url.startswith(address)
    heard = {
        "console": lambda m: m.type == "error" and local(m.location.get("url", "")) and said.append(m.text),
        "pageerror": lambda e: said.append(str(e)),
        "response": lambda r: r.status >= 400 and local(r.url) and said.append(f"not found: {Path(r.url).name}"),
    }
    for event, hear in heard.items():
        page.on(event, hear)
    page.set_viewport_size({"width": width, "height": 900})
    page.goto(address + name, wait_until="load")
    page.wait_for_timeout(300)
    found = page.evaluate(LOOK)
    for event, hear in heard.items():
        page.remove_listener(event, hear)
    said += [f"{found['over']} px wider than the window"] * (found["over"] > 1)
    said += [f"picture missing: {src}" for src in found["missing"]]
    judged = found["mathjax"] or not found["unset"]
    if width == max(WIDTHS) and judged:  # on a narrow screen it scrolls; what is not set has no length
        said += [f"equation longer than the column: {text}" for text in found["long"]]
    if found["mathjax"]:
        said += [f"formula not set: {text}" for text in found["unset"]]
    return sorted(set(said)), judged


def look(folder):
    "All pages of a folder at all widths: lines to print, and pages whose formulas could not be judged."
    from playwright.sync_api import sync_playwright

    lines, unjudged = [], []
    with sync_playwright() as p, served(folder) as address:
        program = next(filter(None, map(shutil.which, BROWSERS)))
        browser = p.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page()
        for path in sorted(Path(folder).glob("*.html")):
            for width in WIDTHS:
                said, judged = look_at(page, address, path.name, width)
                lines += [f"{path.name} at {width} px: {what}" for what in said]
                unjudged += [path.name] * (not judged)
        browser.close()
    return lines, sorted(set(unjudged))


def main(folder):
    with tempfile.TemporaryDirectory() as scratch:
        said = []
        if not any(Path(folder).glob("*.html")) and shutil.which("pandoc"):
            print("no rendered site: looking at what pandoc makes of the pages")
            folder, said = scratch, render_pages.render(render_pages.processed(), Path(scratch))
        why = not_here(folder)
        if why:
            print(f"skipped: {why}")
            return 0
        return report(folder, said)


def report(folder, said=()):
    "Print what is wrong with the pages of a folder, after what was said before; true if anything is."
    lines, unjudged = look(folder)
    lines = [*said, *lines]
    print(*lines, sep="\n", end="\n" * bool(lines))
    if unjudged:
        print(f"formulas of {len(unjudged)} pages not judged: MathJax did not load (it comes over the network)")
    print(f"{len(list(Path(folder).glob('*.html')))} pages at {' and '.join(map(str, WIDTHS))} px: {len(lines)} faults")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else ROOT / "_docs"))
