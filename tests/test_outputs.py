"""What pages show of figures and tables is what their records make; a picture or a number changed by hand is found."""

import base64
import json
from pathlib import Path

import check_outputs
import pytest

NBS = Path(__file__).resolve().parents[1] / "nbs"
read = lambda path: json.loads(path.read_text(encoding="utf-8"))["cells"]
PAGES = {p.name: list(check_outputs.shown(read(p))) for p in NBS.glob("*.ipynb")}


@pytest.mark.parametrize("name", [name for name, found in sorted(PAGES.items()) if found])
def test_a_page_shows_what_its_records_make(name):
    assert not check_outputs.stale(NBS / name), "python tests/check_outputs.py --write makes them again"


def test_what_is_stale_is_found_and_made_again(tmp_path):
    (name,) = [n for n, found in PAGES.items() if any(item == "mnist-fair" for item, _, _ in found)]
    book, page = json.loads((NBS / name).read_text(encoding="utf-8")), tmp_path / name
    for _, kind, data in check_outputs.shown(book["cells"]):
        text = "".join(data[kind])
        other = base64.b64encode(check_outputs.made("mnist-bracket", kind)).decode() if "png" in kind else text + "1"
        data[kind] = other
    page.write_text(json.dumps(book), encoding="utf-8")
    items = [item for item, _, _ in PAGES[name]]
    assert check_outputs.stale(page) == items == check_outputs.stale(page, write=True) and len(items) > 1
    assert check_outputs.stale(page) == []
