"""The exact attacks against brute force, closed forms and a library; the gate every image passes; checks that can
fail."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from nsq_repro.attacks import LOSSES, ball, margin, pgd
from nsq_repro.exact import (
    AUTOATTACK,
    CHECKS,
    bracket,
    climb,
    closed_form,
    flip_search,
    gradient_table,
    judged,
    log_slope,
    reachable_box,
    sanity,
    sanity_record,
    standard_attack,
    union,
    zbox,
    zero_gradient_share,
)
from nsq_repro.networks import SoftQuantNet
from nsq_repro.quantization import SoftQuantize, hard_quantize

SHAPE = (1, 4, 4)


def network(K=1, alpha=30.0, seed=0, classes=3, hidden=12, dtype=torch.float64):
    "A small network behind a layer (K None: without), and 12 images with the labels it gives them."
    g = torch.Generator().manual_seed(seed)
    layers = (
        [nn.Flatten(), nn.Linear(16, hidden), nn.ReLU(), nn.Linear(hidden, classes)]
        if hidden
        else [nn.Flatten(), nn.Linear(16, classes)]
    )
    F = nn.Sequential(*layers).double()
    with torch.no_grad():
        for p in F.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) / 2)
    x = torch.rand(12, *SHAPE, generator=g, dtype=torch.float64)
    net = (F if K is None else SoftQuantNet(F, SoftQuantize(K, alpha))).to(dtype).eval()
    x = x.to(dtype)
    return net, x, net(x).argmax(1)


LAYERS = [
    (1, 1000.0),
    (1, 20.0),
    (2, 25500.0),
    (4, 30.0),
    (4, 1.0),
    (8, 10000.0),
    (1, math.inf),
    (3, math.inf),
    (None, 1.0),
]


@pytest.mark.parametrize("K", [1, 2, 4])
def test_sign_pgd_through_the_layer_is_straight_through(K):
    net, x, y = network(K, 30.0)
    a, b, c = (
        pgd(m, x, y, 0.3, 30, 0.02, setting=s) for m, s in ((net, "pgd"), (net, "bpda_ste"), (closed_form(net), "pgd"))
    )
    assert (a.x_last != x).all()
    assert torch.equal(a.x_last, b.x_last) and torch.equal(c.x_last, b.x_last)


@pytest.mark.parametrize("alpha", [1000.0, 1e6, 1e30])
def test_closed_form_keeps_every_sign_in_float32(alpha):
    net, x, y = network(2, alpha, dtype=torch.float32)
    a, b, raw = (
        pgd(closed_form(net), x, y, 0.2, 10, 0.02),
        pgd(net, x, y, 0.2, 10, 0.02, setting="bpda_ste"),
        pgd(net, x, y, 0.2, 10, 0.02),
    )
    assert torch.equal(a.x_last, b.x_last) and not torch.equal(raw.x_last, b.x_last)


def test_log_slope_against_the_derivative():
    S, x = SoftQuantize(4, 40.0), torch.linspace(0, 1, 1001, dtype=torch.float64)
    torch.testing.assert_close(log_slope(S, x).exp(), S.derivative(x))
    assert log_slope(SoftQuantize(1, 1e5), x).isfinite().all()


def test_closed_form_needs_a_slope():
    for net in (network(1, math.inf)[0], network(None)[0]):
        with pytest.raises(ValueError, match="bpda_ste"):
            closed_form(net)


def test_zero_gradients_have_their_causes():
    net, _, _ = network(1, 1000.0, hidden=0, dtype=torch.float32)
    high, low, near = torch.full((2, *SHAPE), 0.6), torch.full((2, *SHAPE), 0.3), torch.full((2, *SHAPE), 0.501)
    y = torch.zeros(2, dtype=torch.int64)
    share = lambda x, dtype, **how: zero_gradient_share(net, x, y, 0.0, dtype=dtype, **how)
    assert share(high, torch.float32) == {"zero": 1, "upper": 1, "lower": 0, "behind": 0}
    assert share(low, torch.float32, at="steps", steps=3)["lower"] == pytest.approx(1)
    assert share(near, torch.float32)["zero"] == 0
    assert share(high, torch.float64)["upper"] == 1 and share(low, torch.float64)["zero"] == 0
    with torch.no_grad():
        net.features[1].weight.zero_()
    assert share(near, torch.float32)["behind"] == 1
    with pytest.raises(ValueError, match="'start' or 'steps'"):
        share(near, torch.float32, at="end")


def test_gradient_table():
    net, x, y = network(1, 1000.0, dtype=torch.float32)
    rows = {r["gradient"]: r for r in gradient_table(net, x, y, 0.2, steps=10, step_size=0.02)}
    assert (
        rows["closed form"] == {**rows["straight through"], "gradient": "closed form"}
        and rows["closed form"]["zero"] == 0
    )
    assert rows["float32"]["zero"] > rows["float64"]["zero"] > 0
    assert next(net.parameters()).dtype == torch.float32  # the network was left alone


@pytest.mark.parametrize("K,alpha", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_image_is_in_the_ball_and_judged(K, alpha, dtype):
    net, x, y = network(K, alpha, dtype=dtype)
    x[0, 0, 0] = torch.tensor([0.0, 1.0, 0.5, 0.25], dtype=dtype)
    y, radii = net(x).argmax(1), torch.linspace(0.02, 0.5, 12, dtype=dtype)
    for method, loss in (("pgd", "ce"), ("apgd", "cw"), ("apgd", "targeted")):
        for eps in (0.15, radii):
            a = zbox(net, x, y, eps, 8, loss, method)
            lo, hi = ball(x, eps if isinstance(eps, float) else eps.view(-1, 1, 1, 1))
            assert (a.x >= lo).all() and (a.x <= hi).all() and a.x.dtype == dtype
            assert torch.equal(net(a.x).argmax(1) == y, a.correct) and (a.best >= a.first).all()
            assert not a.correct.all()


@pytest.mark.parametrize("K,alpha", LAYERS[:-1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_way_back_is_the_nearest(K, alpha, dtype):
    "No float near the inverse has an S nearer to z, and the ends go to the ends."
    net, x, _ = network(K, alpha, dtype=dtype)
    b = reachable_box(net, x, 0.2)
    z = b.at(torch.rand_like(x))
    image = b.image(z)
    distance = (b.S(image) - z).abs()
    for end in (b.x_lo, b.x_hi):
        other = image
        for _ in range(3):
            other = other.nextafter(end)
            assert (distance <= (b.S(other) - z).abs() + torch.finfo(dtype).eps)[b.free].all()
    assert torch.equal(b.image(b.z_lo)[b.free], b.x_lo[b.free]) and torch.equal(b.image(b.z_hi)[b.free], b.x_hi[b.free])
    assert torch.equal(b.image(z)[~b.free], x[~b.free])
    torch.testing.assert_close(b.at(b.relative(z)), z)
    if math.isinf(alpha):
        assert torch.equal(b.S(image), hard_quantize(z, K))


def exact_leads(net, x, y, eps):
    "Smallest lead of the true class over all corners of each box: brute force."
    b = reachable_box(net, x, eps)
    corners = torch.tensor(list(itertools.product([0.0, 1.0], repeat=9)), dtype=x.dtype)
    leads = []
    for i in range(len(x)):
        free = (b.z_hi - b.z_lo > 1e-9)[i].flatten().nonzero()[:, 0]
        assert len(free) <= 9
        u = torch.zeros(512, 16, dtype=x.dtype)
        u[:, free] = corners[:, : len(free)]
        leads.append(margin(b.F(b.take([i]).at(u.view(-1, *SHAPE))), y[i].expand(512)).min())
    return torch.stack(leads).detach()


def few_free(net, x):
    "The images with at most nine pixels near the threshold: the others are moved away from it."
    x = x.clone().flatten(1)
    x[:, 9:] = (x[:, 9:] > 0.5).to(x.dtype)
    return x.view(-1, *SHAPE), net(x.view(-1, *SHAPE)).argmax(1)


@pytest.mark.parametrize("alpha", [20.0, 1000.0, math.inf])
@pytest.mark.parametrize("method", ["pgd", "apgd"])
def test_a_linear_network_is_attacked_exactly(alpha, method):
    eps, left = 0.03 if alpha == 20 else 0.1, 0
    for seed in range(3):
        net, x, _ = network(1, alpha, seed, classes=2, hidden=0)
        if alpha != 20:
            x, y = few_free(net, x)
            leads = exact_leads(net, x, y, eps)
        else:  # every pixel is free: the sum of the worst ends
            y, b = net(x).argmax(1), reachable_box(net, x, eps)
            w = (net.features[1].weight[y] - net.features[1].weight[1 - y]).view(-1, *SHAPE)
            ends = torch.minimum(w * b.z_lo, w * b.z_hi).flatten(1).sum(1)
            leads = (ends + net.features[1].bias[y] - net.features[1].bias[1 - y]).detach()
        a = zbox(net, x, y, eps, 40, "cw", method)
        assert torch.equal(a.correct, leads >= 0)
        torch.testing.assert_close(a.best[a.correct], -(leads + 50)[a.correct])
        left += a.correct.sum()
    assert 0 < left < 36


def test_no_attack_claims_more_than_brute_force():
    """On a network with a hidden layer, hard: what all corners withstand no search breaks;
    together the searches find nearly all of the rest."""
    missed, breakable = 0, 0
    for seed in range(4):
        net, x, _ = network(1, math.inf, seed)
        x, y = few_free(net, x)
        robust = exact_leads(net, x, y, 0.3) >= 0
        found = [
            zbox(net, x, y, 0.3, 40, "cw", restarts=3),
            zbox(net, x, y, 0.3, 40, "targeted", "apgd", 2),
            flip_search(net, x, y, 0.3),
        ]
        for a in found:
            assert not (robust & ~a.correct).any()
        missed += int((union({str(i): a.correct for i, a in enumerate(found)})[0] & ~robust.numpy()).sum())
        breakable += int((~robust).sum())
    assert missed <= 0.15 * breakable


def test_results_belong_to_the_image():
    net, x, y = network(2, 30.0)
    for how in (dict(method="pgd"), dict(method="apgd", loss="targeted")):
        whole = zbox(net, x, y, 0.1, 15, restarts=2, seed=3, **how)
        order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
        mixed = zbox(net, x[order], y[order], 0.1, 15, restarts=2, seed=3, index=order, **how)
        for i in range(12):
            one = zbox(net, x[i : i + 1], y[i : i + 1], 0.1, 15, restarts=2, seed=3, index=torch.tensor([i]), **how)
            torch.testing.assert_close(one.x[0], whole.x[i])
            assert one.correct[0] == whole.correct[i]
        torch.testing.assert_close(mixed.x, whole.x[order])
    assert not torch.equal(zbox(net, x, y, 0.1, 3, seed=4).x, zbox(net, x, y, 0.1, 3, seed=3).x)


@pytest.mark.parametrize("method", ["pgd", "apgd"])
def test_the_returned_image_has_the_best_loss(method):
    net, x, y = network(2, 30.0)
    for steps in (1, 2, 7, 30):
        a = zbox(net, x, y, 0.05, steps, "ce", method)
        assert a.correct.any()
        torch.testing.assert_close(LOSSES["ce"](net(a.x), y)[a.correct].detach(), a.best[a.correct])


def test_more_restarts_and_larger_balls_never_help_the_defender():
    net, x, y = network(1, 100.0)
    one, three = zbox(net, x, y, 0.1, 10), zbox(net, x, y, 0.1, 10, restarts=3)
    assert not (three.correct & ~one.correct).any() and (three.best >= one.best)[three.correct].all()
    assert zbox(net, x, y, 0.0, 10).correct.all() and zbox(net, x, y, 1.0, 10).correct.sum() <= 4


def test_apgd_is_that_of_the_library():
    torchattacks = pytest.importorskip("torchattacks")
    net, x, y = network(None)
    x = 0.3 + 0.4 * x  # nothing is clipped to [0, 1]: relative coordinates are those of the ball
    y = net(x).argmax(1)
    for steps in (20, 100):
        peer = torchattacks.APGD(net, eps=0.02, steps=steps, loss="ce")
        torch.manual_seed(7)
        best, _, loss, _ = peer.attack_single_run(x, y)
        torch.manual_seed(7)
        t = 2 * torch.rand(x.shape) - 1
        start = (t / t.abs().amax((1, 2, 3), keepdim=True)).double()
        a = climb(reachable_box(net, x, 0.02), y, (start + 1) / 2, steps, "apgd")
        ahead = (a.best - loss)[a.correct]  # what ours breaks leaves; the library goes on
        assert len(ahead) >= 6 and ahead.min() > -1e-6  # never behind; the corners at the end may be ahead
        assert (ahead < 1e-6).float().mean() > 0.7


def test_flip_search_with_several_levels():
    net, x, y = network(3, math.inf, classes=2, hidden=0)
    left = []
    for eps in (0.02, 0.05, 0.2):
        a = flip_search(net, x, y, eps, flips=16)
        b, w = reachable_box(net, x, eps), (net.features[1].weight[y] - net.features[1].weight[1 - y]).view(-1, *SHAPE)
        leads = torch.minimum(w * b.z_lo, w * b.z_hi).flatten(1).sum(1) + (
            net.features[1].bias[y] - net.features[1].bias[1 - y]
        )
        assert torch.equal(a.correct, leads >= 0)
        torch.testing.assert_close(-a.best[a.correct], leads[a.correct].detach())
        left.append(int(a.correct.sum()))
    assert 0 < sum(left) < 36 and left == sorted(left, reverse=True)
    one = flip_search(net, x, y, 0.2, flips=1)
    assert ((net.quantize(one.x) != net.quantize(x)).flatten(1).sum(1) <= 1).all()


def test_the_gate():
    net, x, y = network(1, 30.0)
    far = x + 1
    far[0, 0, 0, 0] = math.nan
    with pytest.warns(RuntimeWarning, match="NaN for 1 of 12"):
        a = judged(net, far, x, y, 0.1)
    assert torch.equal(a.x[0], x[0]) and torch.equal(a.x[1:], ball(x, 0.1)[1][1:])
    broken = copy.deepcopy(net)
    with torch.no_grad():
        broken.features[1].bias.fill_(math.nan)
    for call in (lambda: judged(broken, x, x, y, 0.1), lambda: zbox(broken, x, y, 0.1, 2)):
        with pytest.raises(ValueError, match="check"):
            call()


def test_union_counts():
    a, b, c = [True, False, False, True], [True, True, False, False], [True, True, False, True]
    worst, rows = union({"a": a, "b": torch.tensor(b), "c": np.array(c)})
    assert worst.tolist() == [True, False, False, False]
    assert [(r["attack"], r["correct"], r["first"], r["only"]) for r in rows] == [
        ("a", 2, 2, 1),
        ("b", 2, 1, 1),
        ("c", 3, 0, 0),
        ("all", 1, 3, 3),
    ]
    for bad in ({}, {"a": a, "b": b[:3]}):
        with pytest.raises(ValueError, match="one boolean per image"):
            union(bad)


def test_bracket():
    attacked, certified = [[1, 1, 0, 1], [1, 0, 1, 1]], [[0, 1, 0, 0], [1, 0, 0, 0]]
    up, low = bracket([0.1, 0.2], attacked, certified, model="nsq")
    assert (up["correct"], low["correct"]) == ([3, 2], [2, 1])  # broken stays broken, certified holds below
    assert up["model"] == "nsq" and (up["accounting"], low["accounting"]) == ("attacked", "certified")
    assert {"eps", "n", "accuracy", "low", "high", "outcomes"} <= set(up)
    with pytest.raises(ValueError, match="image 2 is certified and broken at eps=0.1"):
        bracket([0.1, 0.2], attacked, [[0, 0, 0, 0], [0, 0, 1, 0]])
    for args in (([0.1], attacked, certified), ([0.2, 0.1], attacked, certified), ([0.1, 0.2], attacked, [[1], [1]])):
        with pytest.raises(ValueError, match="increasing radii"):
            bracket(*args)


def test_the_standard_suite_says_what_is_wrong(monkeypatch):
    net, x, y = network(1, 30.0)
    for name, how, word in (
        ("fab", {}, "fab-t"),
        ("square", {"backward": "bpda"}, "'ste'"),
        ("transfer", {}, "source"),
        ("spsa", {"eps": 8}, "8/255"),
        ("apgd-t", {}, "4 classes"),
    ):
        with pytest.raises(ValueError, match=word):
            standard_attack(name, net, x, y, **{"eps": 0.1, **how})
    with pytest.raises(ValueError, match="SoftQuantNet"):
        standard_attack("annealed", net.features, x, y, 0.1)
    with pytest.raises(ValueError, match="another class"):
        standard_attack("hopskipjump", net, x[y == y[0]], y[y == y[0]], 0.1)
    monkeypatch.setitem(__import__("sys").modules, "torchattacks", None)
    with pytest.raises(ImportError, match="nsq-repro\\[dev\\]"):
        standard_attack("square", net, x, y, 0.1)


def test_the_standard_suite_runs():
    pytest.importorskip("torchattacks")
    net, x, y = network(1, 1000.0, dtype=torch.float32, classes=5)
    few = {"apgd-ce": {"steps": 10}, "apgd-t": {"steps": 5}, "fab-t": {"steps": 3}, "square": {"n_queries": 30}}
    state = torch.random.get_rng_state()
    raw, ste = (standard_attack("autoattack", net, x, y, 0.2, b, **few) for b in ("raw", "ste"))
    assert torch.equal(state, torch.random.get_rng_state()) and set(few) == set(AUTOATTACK)
    assert ste.correct.sum() <= raw.correct.sum()
    own = {
        "spsa": dict(steps=5, samples=16),
        "eot": dict(steps=10, draws=2),
        "annealed": dict(steps=20),
        "transfer": dict(source=net.features, steps=10),
    }
    for name, how in own.items():
        a = standard_attack(name, net, x, y, 0.3, **how)
        lo, hi = ball(x, 0.3)
        assert (a.x >= lo).all() and (a.x <= hi).all() and torch.equal(net(a.x).argmax(1) == y, a.correct)
        assert a.correct.sum() < 12, name


GOOD = {
    "n": 100,
    "classes": 10,
    "eps": 0.3,
    "by_eps": [[0.1, 90], [0.3, 50], [1.0, 0]],
    "risen": 1.0,
    "nan": 0,
    "correct": {
        "clean": 99,
        "one step": 70,
        "iterative": 52,
        "last iterate": 53,
        "more steps": 51,
        "restarts": 50,
        "random search": 95,
        "black box": 80,
        "box": 50,
        "unbounded": 0,
    },
}


def test_a_sound_evaluation_passes():
    rows = sanity([GOOD])
    assert len(rows) == len(CHECKS) + 4 and all(r["ok"] for r in rows)


@pytest.mark.parametrize(
    "change,red",
    [
        ({"correct": {"one step": 40}}, "one step"),
        ({"correct": {"black box": 40}}, "without"),
        ({"correct": {"more steps": 30}}, "twice the steps"),
        ({"correct": {"restarts": 30}}, "three restarts"),
        ({"correct": {"last iterate": 50}}, "best iterate"),
        ({"correct": {"box": 40}}, "agree"),
        ({"correct": {"box": 60}}, "agree"),
        ({"correct": {"unbounded": 30}}, "chance"),
        ({"by_eps": [[0.1, 50], [0.3, 60]]}, "larger ε"),
        ({"risen": 0.5}, "rises"),
        ({"nan": 1}, "NaN"),
        ({"correct": {"random search": 51}}, "the input attack"),
    ],
)
def test_a_failed_attack_turns_its_row_red(change, red):
    rows = sanity({**GOOD, **change, "correct": {**GOOD["correct"], **change.get("correct", {})}})
    assert [red in r["check"] for r in rows if not r["ok"]] == [True]


def test_sanity_asks_for_what_it_needs():
    with pytest.raises(ValueError, match="lacks 'nan', 'box'"):
        sanity(
            {
                **{k: v for k, v in GOOD.items() if k != "nan"},
                "correct": {k: v for k, v in GOOD["correct"].items() if k != "box"},
            }
        )


def test_masked_gradients_are_found_out():
    "The raw gradient through a sharp layer in float32 fails the checks that the straight-through one passes."
    net, x, y = network(1, 1e5, dtype=torch.float32)
    good, bad = (sanity(sanity_record(net, x, y, 0.15, 10, setting=s, tries=5)) for s in ("bpda_ste", "pgd"))
    red = lambda rows: {r["check"] for r in rows if not r["ok"]}
    assert "box and input attack agree" in red(bad) - red(good)


def test_a_shifted_layer_has_the_slope_of_its_own_derivative():
    x = torch.linspace(0.01, 0.99, 197, dtype=torch.float64)
    for S in (SoftQuantize(1, 40.0, shift=-0.1), SoftQuantize(3, 60.0, shift=0.07)):
        torch.testing.assert_close(log_slope(S, x), S.derivative(x).log(), rtol=1e-9, atol=1e-9)
