"""Worst-case verdicts: what is broken is broken, the accuracy is not above that of the plain loop, and work that
decides nothing is not done."""

import pytest
import torch

from nsq_repro import worst_case as page
from nsq_repro.exact import judged
from nsq_repro.suite import InBfloat16
from nsq_repro.worst_case import plain_worst_case, standard_verdict, worst_case

RADII = (0.0, 0.003, 0.01, 0.02, 0.05)
HOW = dict(steps=15, step_size=0.004)


def network(seed, layer):
    "A small random network for images of 6 × 6, alone, behind a sharp layer, or behind a smooth one."
    from nsq_repro.networks import SoftQuantNet
    from nsq_repro.quantization import SoftQuantize

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = (torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten())
        F = torch.nn.Sequential(*first, torch.nn.Linear(288, 16), torch.nn.ReLU(), torch.nn.Linear(16, 5)).eval()
        with torch.no_grad():  # no class may win everywhere
            F[5].bias -= F(torch.rand(200, 1, 6, 6)).mean(0)
    return F if layer is None else SoftQuantNet(F, SoftQuantize(*layer)).eval()


def images(net, n=40, seed=0):
    "Images, with the network's own labels but for the first two."
    x = torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(seed))
    y = net(x).argmax(1)
    y[:2] = (y[:2] + 1) % 5
    return x, y


@pytest.mark.parametrize("seed", [0, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 2))])
@pytest.mark.parametrize("layer", [None, (1, 1000.0), (2, 20.0)], ids=["plain", "sharp", "smooth"])
def test_never_above_the_plain_loop(seed, layer):
    net = network(seed, layer)
    x, y = images(net, seed=seed)
    plain = plain_worst_case(net, x, y, RADII, settings=None, **HOW)
    assert any(0 < k < 38 for k in plain.sum(1).tolist())  # the attack decides something
    for precision in ("fp32", "bf16"):
        found = worst_case(net, x, y, RADII, steps=15, precision=precision)
        assert (found.correct.sum(1) <= plain.sum(1)).all(), precision
        assert not found.correct[:, :2].any()


@pytest.mark.parametrize("layer", [None, (1, 1000.0)], ids=["plain", "sharp"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_broken_is_broken_within_its_radius_and_all_larger_ones(layer, precision):
    net = network(1, layer)
    x, y = images(net)
    found = worst_case(net, x, y, RADII, steps=10, precision=precision)
    assert (found.correct[1:] <= found.correct[:-1]).all()
    for r, e in enumerate(RADII):
        first = ~found.correct[r] if r == 0 else found.correct[r - 1] & ~found.correct[r]
        assert not judged(net, found.x[first], x[first], y[first], e).correct.any()
        assert ((found.x[first] - x[first]).abs() <= e + 1e-6).all()
    assert torch.equal(found.x[found.correct[-1]], x[found.correct[-1]])


def test_a_search_that_is_wrong_breaks_nothing(monkeypatch):
    class Off(InBfloat16):
        def forward(self, x):
            return -super().forward(x)

    net = network(0, None)
    x, y = images(net)
    monkeypatch.setattr(page, "searcher", lambda model, *_: Off(model).eval())
    found = worst_case(net, x, y, (0.0, 1e-6), steps=5, precision="bf16")
    assert found.correct[1, 2:].all()


@pytest.mark.parametrize("layer", [None, (1, 1000.0)], ids=["plain", "sharp"])
def test_confirmed_verdicts_break_all_that_the_plain_loop_breaks(layer, monkeypatch):
    net = network(2, layer)
    x, y = images(net)
    how = dict(settings=("pgd", "bpda_ste") if layer else ("pgd",), losses=("ce", "cw"), **HOW)
    plain = plain_worst_case(net, x, y, RADII, **how)
    monkeypatch.setattr(page, "_left_at", lambda sweep, i, *a: i)  # a search that finds nothing
    assert (worst_case(net, x, y, RADII, steps=1).correct & ~plain).any()
    found = worst_case(net, x, y, RADII, steps=1, confirm=how)
    assert torch.equal(found.correct, plain)
    lost = found.correct[0] & ~found.correct[-1]
    assert lost.any() and not judged(net, found.x[lost], x[lost], y[lost], RADII[-1]).correct.any()


def test_eight_radii_cost_less_than_two_runs():
    net = network(3, None)
    x, y = images(net)
    radii = tuple(k / 400 for k in range(1, 9))
    passes = lambda found: found.passes["search"] + found.passes["judge"]
    one = max(passes(worst_case(net, x, y, (e,), steps=40)) for e in radii)
    assert passes(worst_case(net, x, y, radii, steps=40)) < 2 * one


def test_the_standard_verdict_is_autoattacks_question():
    pytest.importorskip("torchattacks")
    from nsq_repro.exact import standard_attack

    net = network(0, None)
    x, y = images(net, 20)
    few = {k: {"steps": 10} for k in ("apgd-ce", "apgd-t", "fab-t")} | {"square": {"n_queries": 50}}
    peer = standard_attack("autoattack", net, x, y, 0.01, **few).correct
    for precision in ("fp32", "bf16"):
        ours = standard_verdict(net, x, y, 0.01, steps=10, queries=50, precision=precision)
        assert 0 < int(ours.sum()) <= int(peer.sum()) < 18


BAD = {
    "eps": (dict(eps=(0.2, 0.1)), "increasing"), "losses": (dict(losses=("mse",)), "there is no 'mse'"),
    "none": (dict(losses=()), "there is no 'nothing'"), "precision": (dict(precision="fp16"), "precision='fp16'"),
    "steps": (dict(steps=0), "steps=0"), "targets": (dict(targets=-1), "targets=-1"),
    "batch_size": (dict(batch_size=0), "batch_size=0"), "seed": (dict(seed=0.5), "seed=0.5"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    net = network(0, None)
    wrong, says = BAD[name]
    with pytest.raises(ValueError, match=says):
        worst_case(net, *images(net, 4), **wrong)


@pytest.mark.parametrize("confirm", [{"losses": "ce"}, {"batch_size": 3, "settings": "pgd"}])
def test_confirm_takes_what_the_plain_loop_takes(confirm):
    net = network(0, None)
    x, y = images(net)
    assert worst_case(net, x, y, (0.0, 0.1), steps=1, confirm={**confirm, "steps": 2}).correct.shape == (2, len(y))


@pytest.mark.parametrize("confirm", [{"losses": "cee"}, {"setings": "pgd"}, {"steps": 0}, {"step_size": -1.0}])
def test_confirm_is_refused_before_the_search(confirm, monkeypatch):
    net = network(0, None)
    x, y = images(net)
    monkeypatch.setattr(page, "_Sweep", lambda *_: pytest.fail("searched first"))
    with pytest.raises((ValueError, TypeError)):
        worst_case(net, x, y, (0.0, 0.1), steps=1, confirm=confirm)
