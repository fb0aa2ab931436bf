"""A stand-in for Quarto where there is none: the pages through nbdev and pandoc, with the site's own style and
scripts, to be looked at in a browser. Navigation, search and themes are Quarto's and are missing.

    python tests/render_pages.py FOLDER [MATHJAX]        (MATHJAX: address of its script; without: MathML)
"""

import base64
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KINDS = {"eq": "Eq.", "fig": "Fig.", "tbl": "Table"}
HEAD = """<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="favicon.svg"><link rel="stylesheet" href="styles.css"><script src="site.js" defer></script>
<style>
body { font: 17px/1.5 system-ui, sans-serif; margin: 0; padding: 0; max-width: none; }
main { max-width: 800px; margin: auto; padding: 0 12px; }
pre > code.sourceCode { white-space: pre-wrap; word-break: break-word; }
pre > code.sourceCode > span { display: inline; }
pre { white-space: pre-wrap; background: #8881; padding: .4em; } code { font-size: .875em; }
figure { margin: 1em 0; } img { max-width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; } td, th { padding: .4em; vertical-align: top; }
.numbered { display: flex; align-items: center; } .numbered > p { flex: 1; min-width: 0; }
</style>"""


def options(source):
    "The `#|` lines of a code cell as a dictionary, and the code below them."
    lines = source.splitlines()
    found = dict(m.groups() for m in (re.match(r"#\| *([\w-]+): *(.*)", line) for line in lines) if m)
    return {k: v.strip().strip('"') for k, v in found.items()}, "\n".join(s for s in lines if not s.startswith("#|"))


def fenced(text, kind=""):
    "Text as a block of code."
    return f"`````{kind}\n{text.rstrip()}\n`````"


def picture(data, name, folder, chosen):
    "A picture beside the page, with its label, caption and text."
    file = f"{name}.png"
    (folder / file).write_bytes(base64.b64decode(data))
    text, label = chosen.get("fig-alt", "").replace('"', "'"), chosen.get("label", name)
    caption = f"{{{label}}}: {chosen.get('fig-cap', '')}"
    return f'<figure id="{label}">\n\n![]({file}){{alt="{text}"}}\n\n{caption}\n\n</figure>'


def shown(output, name, folder, chosen):
    "One output as Markdown."
    data = {k: "".join(v) for k, v in output.get("data", {}).items() if isinstance(v, (str, list))}
    if "image/png" in data:
        return picture(data["image/png"], name, folder, chosen)
    if "text/markdown" in data:
        return data["text/markdown"]
    if "text/html" in data:
        return data["text/html"]
    return fenced(data.get("text/plain") or "".join(output.get("text", "")))


def page_markdown(path, folder):
    "A processed notebook as Markdown; its pictures are written beside the page."
    cells, parts = json.loads(path.read_text(encoding="utf-8"))["cells"], []
    for i, cell in enumerate(cells):
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            parts.append(source)
            continue
        chosen, code = options(source)
        if chosen.get("include") == "false":
            continue
        if chosen.get("echo") != "false" and code.strip():
            block = fenced(code, "python")
            fold = f'<details class="code-fold"><summary>{chosen.get("code-summary", "Code")}</summary>'
            parts.append(f"{fold}\n\n{block}\n\n</details>" if "code-fold" in chosen else block)
        outputs = cell["outputs"] if chosen.get("output") != "false" else []
        parts += [shown(o, f"{path.stem}-{i}-{j}", folder, chosen) for j, o in enumerate(outputs)]
    return "\n\n".join(parts)


def resolved(text, tags=False):
    "Equation, figure and table labels as numbers, references as links, and pages as HTML."
    numbers, count = {}, dict.fromkeys(KINDS, 0)
    for label in re.findall(r"(?:\{#?|label: )((?:eq|fig|tbl)-[a-z0-9-]+)", text):
        if label not in numbers:
            count[label.split("-")[0]] += 1
            numbers[label] = count[label.split("-")[0]]
    name = lambda label: f"{KINDS[label.split('-')[0]]} {numbers.get(label, '?')}"
    beside = lambda m: f'<div id="{m[2]}" class="numbered">\n\n$${m[1]}$$\n\n<span>({numbers[m[2]]})</span></div>'
    inside = lambda m: f'<span id="{m[2]}">$${m[1].rstrip()} \\tag{{{numbers[m[2]]}}}$$</span>'  # MathML has no \\tag
    text = re.sub(r"\$\$([^$]+)\$\$ *\{#(eq-[a-z0-9-]+)\}", inside if tags else beside, text)
    text = re.sub(r"\{(fig-[a-z0-9-]+)\}:", lambda m: f"{name(m[1])}:", text)
    text = re.sub(r"(?<![\w`])@((?:eq|fig|tbl)-[a-z0-9-]+)", lambda m: f"[{name(m[1])}](#{m[1]})", text)
    return re.sub(r"\]\((\w+)\.ipynb", r"](\1.html", text)


def processed():
    "The folder of the notebooks as nbdev hands them to Quarto."
    from nbdev.serve import proc_nbs

    return Path(proc_nbs(path=ROOT / "nbs", n_workers=0, force=True))  # modules may be newer than the cache


def render(notebooks, folder, mathjax=None):
    "All pages of a folder of processed notebooks into another; what pandoc warns of, a line each."
    folder.mkdir(parents=True, exist_ok=True)
    for kept in (ROOT / "nbs").glob("*.*"):
        if kept.suffix in (".svg", ".js", ".css", ".bib"):
            shutil.copy(kept, folder)
    (folder / "head.html").write_text(HEAD, encoding="utf-8")
    before, after = folder / "before.html", folder / "after.html"
    before.write_text("<main>", encoding="utf-8")
    after.write_text("</main>", encoding="utf-8")
    said = []
    for path in sorted(notebooks.glob("*.ipynb")):
        math = [f"--mathjax={mathjax}"] if mathjax else ["--mathml"]
        done = subprocess.run(
            ["pandoc", "-f", "markdown", "-t", "html5", "-s", *math, "--citeproc", "--bibliography=references.bib",
             "-H", "head.html", "-B", "before.html", "-A", "after.html", "-o", f"{path.stem}.html"],
            input=resolved(page_markdown(path, folder), bool(mathjax)),
            capture_output=True, text=True, cwd=folder, check=False,
        )  # fmt: skip
        said += [f"{path.stem}: {line}" for line in done.stderr.splitlines() if line.strip()]
    for file in (folder / "head.html", before, after):
        file.unlink()
    return said


if __name__ == "__main__":
    lines = render(processed(), Path(sys.argv[1]).resolve(), *sys.argv[2:])
    print(*lines, sep="\n")
