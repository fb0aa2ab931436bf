"""Fails unless the figures and tables that a page shows of items are what their records make today.

    python tests/check_outputs.py [--write]        (--write: make the stale ones again, in their pages)
"""

import base64
import json
import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from IPython.core.pylabtools import print_figure  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402

from nsq_repro import records, results  # noqa: E402

NBS = Path(__file__).resolve().parents[1] / "nbs"
MADE = re.compile(r'\b(?:results|items_of_pages)\.(figure|draw|table|words|item_text)\(\s*(?:name\()?"([\w-]+)"')


def shown(cells):
    "Item, kind of output and output of the cells that make one figure, or tables and nothing else."
    for cell in cells:
        named = MADE.findall("".join(cell["source"])) if cell["cell_type"] == "code" else []
        kinds = {"image/png" if how in ("figure", "draw") else "text/markdown" for how, _ in named}
        for kind in kinds if len(kinds) == 1 else ():
            outputs = [o["data"] for o in cell["outputs"] if kind in o.get("data", {})]
            yield from ((item, kind, data) for (_, item), data in zip(named, outputs) if len(outputs) == len(named))


def made(item, kind):
    "The item as a notebook shows it; None where it has no record."
    record = records.best_record(item) or records.best_record(f"mnist-{item}")
    if record is None:  # words have none of their own
        words = [n for n in (item, f"mnist-{item}") if n in results.items() and kind == "text/markdown"]
        return results.item_text(words[0]).encode() if words else None
    if kind == "text/markdown":
        return results.item_text(record["item"]).encode()
    figure = results.draw(record["item"], record)
    picture = print_figure(figure, fmt="png", bbox_inches="tight")
    plt.close(figure)
    return picture


def stale(path, write=False):
    "Items that a page shows otherwise than their records make them."
    book, found = json.loads(path.read_text(encoding="utf-8")), []
    for item, kind, data in shown(book["cells"]):
        text = "".join(data[kind])
        now, then = made(item, kind), base64.b64decode(text) if kind == "image/png" else text.encode()
        if now and not (results.same_picture(now, then) if kind == "image/png" else now == then):
            data[kind] = base64.b64encode(now).decode() if kind == "image/png" else now.decode().splitlines(True)
            found.append(item)
    if found and write:
        path.write_text(json.dumps(book, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    write = "--write" in sys.argv[1:]
    lines = [f"{p.name}: {item}" for p in sorted(NBS.glob("*.ipynb")) for item in stale(p, write)]
    print(*lines, f"{len(lines)} stale outputs{', made again' * write}", sep="\n")
    sys.exit(bool(lines) and not write)
