"""The sliders of the quantization page: the script computes what the package computes."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from nsq_repro.data import load, pixels_near
from nsq_repro.quantization import cell_index, soft_quantize, soft_quantize_derivative, thresholds

NBS = Path(__file__).resolve().parents[1] / "nbs"
NODE = shutil.which("node")
GRID = [(1, 10.0), (1, 1000.0), (2, 25500.0), (3, 30.0), (4, 1.0), (8, 1e5)]
needs_node = pytest.mark.skipif(not NODE, reason="no node here")


def play(expression):
    "An expression in the script's functions, computed by node."
    code = f"const p = require({json.dumps(str(NBS / 'play.js'))}); console.log(JSON.stringify({expression}))"
    return json.loads(subprocess.run([NODE, "-e", code], capture_output=True, text=True, check=True).stdout)


@needs_node
@pytest.mark.parametrize("K, alpha", GRID)
def test_curves_are_those_of_the_package(K, alpha):
    x = torch.cat([torch.linspace(0, 1, 401, dtype=torch.float64), thresholds(K), thresholds(K) + 1e-4])
    both = f"{x.tolist()}.map(x => [p.cellIndex(x, {K}), p.softQuantize(x, {K}, {alpha}), "
    got = torch.tensor(play(both + f"p.softQuantizeDerivative(x, {K}, {alpha})])"), dtype=torch.float64).T
    assert got[0].tolist() == cell_index(x, K).tolist()
    torch.testing.assert_close(got[1], soft_quantize(x, K, alpha), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got[2], soft_quantize_derivative(x, K, alpha), rtol=1e-9, atol=1e-12 * alpha)


@needs_node
def test_the_digit_is_one_of_the_package():
    image = load("digits").floats()[3].flatten().double()
    torch.testing.assert_close(torch.tensor(play("p.digit()"), dtype=torch.float64), image, rtol=0, atol=1e-6)


@needs_node
@pytest.mark.parametrize("K", [1, 2, 5, 8])
def test_counts_are_those_of_the_package(K):
    x = load("digits").subset(4).floats()[3:].double()
    for eps in (0, 0.05, 0.1, 0.3, 0.5):
        near = (x[..., None] - thresholds(K)).abs().amin(-1) <= eps + 1e-6
        s = play(f"p.summary(p.digit(), {K}, 1000, {eps})")
        assert s["crossing"] == int(near.sum()) and s["pixels"] == 784 and s["steepest"] == 250 / K
        assert s["flat"] == int((soft_quantize_derivative(x, K, 1000.0) < 0.01).sum())
        if K == 1:
            assert s["crossing"] == pixels_near(x, eps=eps).item()


@needs_node
def test_bands_cover_what_can_cross():
    for K, eps in [(1, 0.1), (4, 0.05), (4, 0.125), (8, 0.4)]:
        found = play(f"p.bands({K}, {eps})")
        assert all(a < b for a, b in found) and all(b[1] < c[0] for b, c in zip(found, found[1:]))
        x = torch.linspace(0, 1, 997, dtype=torch.float64)
        inside = torch.stack([(x >= a - 1e-6) & (x <= b + 1e-6) for a, b in found]).any(0)
        assert inside.tolist() == play(f"{x.tolist()}.map(x => p.canCross(x, {K}, {eps}))")


def test_the_page_asks_for_the_script_and_has_a_still_picture():
    cells = json.loads((NBS / "quantization.ipynb").read_text(encoding="utf-8"))["cells"]
    assert any('src="play.js"' in "".join(c["source"]) and 'href="play.css"' in "".join(c["source"]) for c in cells)
    (still,) = [c for c in cells if "#| label: fig-quantization-play" in "".join(c["source"])]
    assert any("image/png" in o.get("data", {}) for o in still["outputs"])
    assert "fig-quantization-play" in (NBS / "play.js").read_text(encoding="utf-8")


def test_the_script_needs_no_network():
    for name in ("play.js", "play.css"):
        assert not re.search(r"https?:|fetch\(|import |@import|url\(", (NBS / name).read_text(encoding="utf-8")), name
