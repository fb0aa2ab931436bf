"""What spans plots, records and paper.json: colours anyone can tell apart, and printed numbers that the figures
find."""

import itertools

import matplotlib as mpl
import numpy as np
import pytest

from nsq_repro import plots, records, tables
from nsq_repro.records import paper

# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB
VISION = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def linear(color):
    c = np.array(mpl.colors.to_rgb(color))
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    f = TO_XYZ @ np.clip(rgb, 0, 1) / [0.95047, 1, 1.08883]
    f = np.where(f > 0.008856, np.cbrt(f), 7.787 * f + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", VISION)
def test_model_colours_stay_apart(vision):
    seen = {m: lab(np.array(VISION[vision]) @ linear(c)) for m, c in plots.COLORS.items()}
    for a, b in itertools.combinations(seen, 2):
        assert np.linalg.norm(seen[a] - seen[b]) > 18, (vision, a, b)


@pytest.mark.parametrize("model", records.MODELS)
def test_model_colours_show_on_white(model):
    assert 1.05 / ((TO_XYZ @ linear(plots.COLORS[model]))[1] + 0.05) >= 3


def test_every_printed_number_has_its_place():
    claims = paper()
    assert len({c["id"] for c in claims}) == len(claims) > 60
    for c in claims:
        assert c["kind"] in {"measured", "cited", "estimate", "comparison", "statement", "setting"}, c["id"]
        assert c["what"] and c["quote"] and c["place"] and 1 <= c["page"] <= 19, c["id"]
        assert c["value"] is None or c["unit"], c["id"]


@pytest.mark.parametrize(
    "dataset, model, setting, eps, value",
    [
        ("mnist", "nsq", "pgd", 0.3, 98.49),
        ("mnist", "nsq", "bpda", 0.3, 87.32),
        ("cifar10", "nsq", "pgd", 8 / 255, 78.01),
        ("cifar10", "nsq", "bpda", 8 / 255, 34.43),
        ("cifar10", "pgd", "pgd", 8 / 255, 46.62),
    ],
)
@pytest.mark.parametrize("loss", ["ce", "cw"])
def test_figures_find_printed_numbers(dataset, model, setting, eps, value, loss):
    assert (
        tables.printed_value(paper(dataset=dataset), {"model": model, "setting": setting, "loss": loss}, eps)["value"]
        == value
    )


def test_cited_numbers_are_not_marked_as_the_papers_own():
    assert tables.printed_value(paper(dataset="mnist"), {"model": "pgd", "setting": "pgd", "loss": "ce"}, 0.3) is None


def test_saved_twice_is_the_same_file(tmp_path):
    for name in ("a", "b"):
        with plots.style():
            plots.fig2().savefig(tmp_path / f"{name}.svg", metadata={"Date": None})
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
