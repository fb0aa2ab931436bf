"""Properties of the l1-gradient objective: the split of PGD's increments, Hölder, the double backward, Figure 1's
clouds."""

import copy
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from nsq_repro import plots
from nsq_repro.attacks import LOSSES, pgd
from nsq_repro.networks import SoftQuantNet
from nsq_repro.objective import (
    chain_rule,
    choose_pixels,
    hoelder_bounds,
    in_float64,
    increments,
    inner_maximum,
    input_gradient_l1,
    iterate_clouds,
    l1_objective,
    layer_bounds,
    mean_slope,
    measure_increments,
    measure_norms,
    measure_steps,
    occupied_pairs,
    pgd_path,
    points_of_interest,
    predicted_increase,
    random_start,
)
from nsq_repro.quantization import SoftQuantize

few = settings(max_examples=25, deadline=None, derandomize=True)
seeds, layers = st.integers(0, 2**31), st.sampled_from([None, (1, 5.0), (1, 50.0), (1, 1000.0), (3, 300.0)])


def network(seed, layer=None, act=nn.ReLU, hidden=24, classes=10, gain=3.0):
    "A random fully connected float64 network on 1×6×6 images, with a layer S in front where `layer` is (K, alpha)."
    g = torch.Generator().manual_seed(seed)
    F = nn.Sequential(
        nn.Flatten(), *([nn.Linear(36, hidden), act()] if hidden else []), nn.Linear(hidden or 36, classes)
    ).double()
    with torch.no_grad():
        for p in F.parameters():
            p.copy_(gain * torch.randn(p.shape, generator=g) / p.shape[-1] ** 0.5)
    return F if layer is None else SoftQuantNet(F, SoftQuantize(*layer))


def images(seed, n=4, classes=10, low=0.0, high=1.0):
    g = torch.Generator().manual_seed(seed + 1)
    return low + (high - low) * torch.rand(n, 1, 6, 6, generator=g, dtype=torch.float64), torch.randint(
        classes, (n,), generator=g
    )


@few
@given(
    seeds,
    layers,
    st.floats(0, 0.5),
    st.floats(1e-4, 0.3),
    st.sampled_from(["ce", "cw", "dlr"]),
    st.sampled_from(["pgd", "bpda_ste"]),
)
def test_parts_sum_to_the_true_increase_and_clipping_keeps_its_bounds(seed, layer, eps, step, loss, setting):
    net, (x, y) = network(seed, layer), images(seed)
    path = pgd_path(net, x, y, eps, 6, step, loss, setting)
    parts = increments(path, step)
    tolerance = 1e-11 * (1 + parts.predicted + path.loss[1:].abs())
    assert_close(
        parts.true,
        torch.stack([LOSSES[loss](net(b), y) - LOSSES[loss](net(a), y) for a, b in zip(path.x, path.x[1:])]).detach(),
    )
    assert ((parts.predicted + parts.clipping + parts.remainder - parts.true).abs() <= tolerance).all()
    assert (parts.clipping <= tolerance).all() and (parts.clipping >= -parts.predicted - tolerance).all()
    assert_close(parts.total().true, path.loss[-1] - path.loss[0], rtol=1e-9, atol=1e-9)


@few
@given(seeds, layers, st.floats(0.01, 0.4), st.sampled_from(["pgd", "bpda_ste"]))
def test_path_is_the_attack(seed, layer, eps, setting):
    net, (x, y) = network(seed, layer), images(seed)
    path, attack = (
        pgd_path(net, x, y, eps, 5, eps / 4, setting=setting),
        pgd(net, x, y, eps, 5, eps / 4, setting=setting, random_start=False),
    )
    assert_close(path.x[-1], attack.x_last, rtol=0, atol=1e-12)
    assert (path.x - x).abs().max() <= eps + 1e-12 and 0 <= path.x.min() and path.x.max() <= 1
    assert_close(inner_maximum(net, x, y, eps, 5, eps / 4, setting=setting), path.loss.amax(0))


def test_the_inner_maximum_remembers_a_loss_that_was_left_again():
    "With steps as long as the ball the path oscillates, and for some image the largest loss comes early."
    net, (x, y) = network(2, (1, 1000.0)), images(2, 60)
    loss = pgd_path(net, x, y, 0.3, 8, 0.3).loss
    assert (loss[:-2].amax(0) > loss[-2:].amax(0) + 1e-6).any()
    assert_close(inner_maximum(net, x, y, 0.3, 8, 0.3, setting="bpda_ste"), loss.amax(0))


def test_random_start_is_that_of_the_attack():
    net, (x, y) = network(3), images(3)
    for restart in (0, 2):
        path = pgd_path(net, x, y, 0.2, 5, 0.05, x_start=random_start(x, 0.2, seed=7, restart=restart))
        assert_close(path.x[-1], pgd(net, x, y, 0.2, 5, 0.05, seed=7, restarts=restart + 1).x_last, rtol=0, atol=1e-12)


@few
@given(seeds, st.floats(1e-4, 0.2))
def test_a_convex_loss_gains_at_least_the_prediction(seed, step):
    "Cross-entropy of a linear network, nothing clipped: every remainder is at least zero; and not always zero."
    net, (x, y) = network(seed, hidden=0), images(seed, low=0.45, high=0.55)
    parts = increments(pgd_path(net, x, y, 1.0, 2, step), step)
    assert (parts.clipping.abs() <= 1e-12 * (1 + parts.predicted)).all()
    assert (parts.remainder >= -1e-12 * (1 + parts.predicted)).all() and parts.remainder.max() > 0
    assert (parts.true >= parts.predicted * (1 - 1e-9)).all()


@few
@given(seeds, st.floats(1e-4, 0.2))
def test_an_affine_loss_gains_exactly_the_prediction(seed, step):
    net, (x, y) = network(seed, hidden=0, classes=2), images(seed, classes=2, low=0.45, high=0.55)
    parts = increments(pgd_path(net, x, y, 1.0, 2, step, "cw"), step)
    assert_close(parts.true, parts.predicted, rtol=1e-9, atol=1e-11)


def test_the_dual_norm_is_attained_and_not_exceeded():
    net, (x, y) = network(1, hidden=0, classes=2), images(1, classes=2, low=0.3, high=0.7)
    loss, outer, inner = chain_rule(net, x, y, "cw")
    exact = loss + predicted_increase(outer * inner, 0.2)
    assert_close(inner_maximum(net, x, y, 0.2, 10, 0.02, "cw"), exact)
    corners = x + 0.2 * (2 * torch.randint(2, (500, *x.shape), generator=torch.Generator().manual_seed(0)) - 1)
    assert all((LOSSES["cw"](net(c), y) <= exact + 1e-12).all() for c in corners)


def test_the_remainder_is_half_the_quadratic_form():
    net, (x, y) = network(5, (1, 5.0), nn.Tanh, gain=1.0), images(5, low=0.3, high=0.7)
    xs, off = x.clone().requires_grad_(), []
    (grad,) = torch.autograd.grad(LOSSES["ce"](net(xs), y).sum(), xs, create_graph=True)
    for s in (1e-2, 1e-3, 1e-4):
        d = s * grad.detach().sign()
        half = 0.5 * (torch.autograd.grad((grad * d).sum(), xs, retain_graph=True)[0] * d).flatten(1).sum(1)
        off.append(
            ((increments(pgd_path(net, x, y, 0.5, 1, s), s).remainder[0] - half).abs().sum() / half.abs().sum()).item()
        )
    assert off[1] < 0.2 * off[0] and off[2] < 0.2 * off[1] and off[2] < 0.01


@few
@given(seeds, layers, st.sampled_from(["ce", "cw", "dlr"]))
def test_input_gradient_is_that_of_autograd(seed, layer, loss):
    net, (x, y) = network(seed, layer), images(seed)
    xs = x.clone().requires_grad_()
    (auto,) = torch.autograd.grad(LOSSES[loss](net(xs), y).sum(), xs)
    _, outer, inner = chain_rule(net, x, y, loss)
    assert_close(outer * inner, auto, rtol=1e-8, atol=1e-9)
    assert_close(input_gradient_l1(net, x, y, loss), auto.abs().flatten(1).sum(1), rtol=1e-8, atol=1e-9)
    assert not input_gradient_l1(net, x, y, loss).requires_grad


def shifted(net, direction, h):
    other = copy.deepcopy(net)
    with torch.no_grad():
        for p, d in zip(other.parameters(), direction):
            p += h * d
    return other


@pytest.mark.parametrize("layer", [None, (1, 20.0)])
@pytest.mark.parametrize("what", ["norm", "objective"])
def test_double_backward_against_finite_differences(layer, what):
    net, (x, y) = network(2, layer, nn.Tanh, gain=1.0), images(2, low=0.3, high=0.7)
    points = pgd_path(net, x, y, 0.1, 2, 0.05).x[:-1]  # the objective holds its iterates fixed
    f = {
        "norm": lambda m: input_gradient_l1(m, x, y, create_graph=True).sum(),
        "objective": lambda m: l1_objective(m, x, y, 0.1, 2).sum(),
    }[what]
    fixed = (
        f
        if what == "norm"
        else lambda m: (LOSSES["ce"](m(x), y) + 0.05 * sum(input_gradient_l1(m, p, y) for p in points)).sum()
    )
    g = torch.Generator().manual_seed(0)
    direction = [torch.randn(p.shape, generator=g, dtype=torch.float64) for p in net.parameters()]
    slopes = torch.autograd.grad(f(net), list(net.parameters()), allow_unused=True)
    exact = sum((s * d).sum().item() for s, d in zip(slopes, direction) if s is not None)
    numeric = (fixed(shifted(net, direction, 1e-7)) - fixed(shifted(net, direction, -1e-7))).item() / 2e-7
    assert abs(exact) > 1e-2 and math.isclose(exact, numeric, rel_tol=1e-5)


def test_the_objective_leaves_no_trace_on_the_network():
    net, (x, y) = network(4, (1, 20.0)), images(4)
    l1_objective(net, x, y, 0.1, 3).sum().backward()
    assert all(p.requires_grad for p in net.parameters()) and sum(p.grad is not None for p in net.parameters()) >= 3


@few
@given(seeds, st.integers(1, 30), st.floats(-3, 3))
def test_hoelder(seed, n, spread):
    g = torch.Generator().manual_seed(seed)
    outer = torch.randn(5, n, generator=g, dtype=torch.float64)
    inner = (10**spread * torch.randn(5, n, generator=g, dtype=torch.float64)).exp()
    h = hoelder_bounds(outer, inner)
    assert_close(h.true, (outer * inner).abs().sum(1))
    assert (h.true <= h.entrywise * (1 + 1e-12)).all() and (h.true <= h.exchanged * (1 + 1e-12)).all()
    assert_close(h.induced, outer.abs().amax(1) * torch.linalg.matrix_norm(torch.diag_embed(inner), 1))
    if n == 1:
        assert_close(h.induced, h.true)


def test_the_induced_norm_is_no_bound():
    h = hoelder_bounds(torch.ones(1, 2), torch.ones(1, 2))
    assert h.true == 2 and h.induced == 1


class Convolutional(nn.Module):
    "Padding, stride, pooling and a linear end."

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 5, 3, padding=1), nn.Conv2d(5, 4, 3, stride=2), nn.Linear(4, 10)

    def forward(self, x):
        return self.c(self.b(nn.functional.max_pool2d(self.a(x).relu(), 2)).relu().flatten(1))


@pytest.mark.parametrize("layer", [None, (1, 20.0)])
def test_layer_bounds_hold_and_are_attained(layer):
    torch.manual_seed(0)
    F = Convolutional().double()
    net, (x, y) = F if layer is None else SoftQuantNet(F, SoftQuantize(*layer)), images(6, 30)
    bounds = layer_bounds(net, x, y)
    assert list(bounds) == ["a", "b", "c"] and all(
        (low <= norm * high * (1 + 1e-12)).all() for norm, low, high in bounds.values()
    )
    assert_close(bounds["a"][1], chain_rule(net, x, y)[1].flatten(1).abs().amax(1))
    assert_close(bounds["c"][0], F.c.weight.abs().sum(0).max().detach())
    assert (bounds["c"][2] <= 1).all()
    for norm, layer_, shape in (
        (bounds["a"][0], F.a, (1, 6, 6)),
        (bounds["b"][0], F.b, (5, 3, 3)),
    ):  # as a matrix, column by column
        columns = [
            (layer_(e.view(1, *shape)) - layer_(torch.zeros(1, *shape).double())).abs().sum()
            for e in torch.eye(math.prod(shape)).double()
        ]
        assert_close(norm, max(columns).detach())


@few
@given(seeds, st.floats(0, 4).map(lambda e: 10**e), st.floats(0.05, 0.5))
def test_mean_slope_is_the_mean_over_noise(seed, alpha, radius):
    S, x = SoftQuantize(1, alpha), images(seed)[0].flatten()[:3]
    edges = (
        torch.cat(
            [
                x - radius,
                x + radius,
                torch.tensor([0.5]).double() + torch.linspace(-1, 1, 20_001).double() * min(40 / alpha, 2),
            ]
        )
        .sort()
        .values
    )
    for pixel in x:
        u = (
            torch.cat(
                [
                    edges.clamp(pixel - radius, pixel + radius),
                    torch.linspace((pixel - radius).item(), (pixel + radius).item(), 2001).double(),
                ]
            )
            .sort()
            .values
        )
        assert_close(
            torch.trapezoid(S.derivative(u), u) / (2 * radius), mean_slope(S, pixel, radius), rtol=1e-3, atol=1e-9
        )


class Images:
    "As much of a `Dataset` as the measurements need."

    def __init__(self, n):
        self.x, self.y = images(9, n)

    def floats(self, index):
        return self.x[index].float()


def test_measurements_have_the_shapes_they_promise():
    nets = in_float64({"natural": network(0).float(), "nsq": network(1, (1, 1000.0)).float()})
    assert all(p.dtype == torch.float64 for n in nets.values() for p in n.parameters()) and not nets["natural"].training
    data = Images(8)
    for parts in measure_increments(nets, data, 0.1, n=5, steps=3, step_size=0.05).values():
        assert all(p.shape == (3, 5) for p in parts)
    rho = measure_steps(nets, data, 0.1, (0.05, 0.001), n=5)
    assert set(rho) == set(nets) and all(len(r) == 2 and r[1] < r[0] for r in rho.values())
    norms = measure_norms(nets, data, n=5, radius=0.1)
    assert all(
        t.shape == (5,) and (t >= 0).all() for models in norms.values() for pair in models.values() for t in pair
    )
    assert all(
        torch.equal(*models["natural"]) for models in norms.values()
    )  # without a layer there is nothing to go around
    for kind, (px, py) in points_of_interest(nets["nsq"], data, 5).items():
        assert px.shape == (5, 1, 6, 6) and 0 <= px.min() and px.max() <= 1 and py.shape == (5,), kind


def clouds(**how):
    x, y = images(8, 1)
    return x, iterate_clouds(
        {"natural": network(0), "nsq": network(1, (1, 1000.0))},
        x,
        y,
        **{**dict(eps=8 / 255, steps=4, step_size=0.01, restarts=7), **how},
    )


def test_clouds_are_what_figure_1_draws():
    x, record = clouds()
    assert json.loads(json.dumps(record)) == record
    assert [(p["model"], p["start"]) for p in record["paths"]] == [
        (m, s) for m in ("natural", "nsq") for s in ("clean", "random")
    ]
    for p in record["paths"]:
        xy = torch.tensor(p["xy"], dtype=torch.float64)
        assert xy.shape == (1 if p["start"] == "clean" else 7, 5, 2) and 0 < p["occupied"] <= 1
        assert p["start"] == "random" or (xy[:, 0] == 0).all()
        plots.occupied_share(p["xy"], record["eps"])  # raises when a point leaves the square
    values = x.flatten()[record["attack"]["pixels"]]
    assert (values >= 8 / 255).all() and (values <= 1 - 8 / 255).all() and "nearest" not in record["note"]
    assert len(plots.fig1(record).axes) >= 3


def test_clouds_follow_the_attack_and_the_seed():
    x, record = clouds(seed=5)
    y = images(8, 1)[1]
    for m, random in zip((network(0), network(1, (1, 1000.0))), record["paths"][1::2]):
        last = pgd(m, x, y, 8 / 255, 4, 0.01, setting="bpda_ste", restarts=7, seed=5).x_last
        moved = (last - x).flatten()[record["attack"]["pixels"]]
        assert_close(torch.tensor(random["xy"][-1][-1]).double(), moved, rtol=0, atol=6e-5)
    assert record == clouds(seed=5)[1] != clouds(seed=6)[1]
    assert clouds(pixels=(3, 11))[1]["attack"]["pixels"] == [3, 11]


def test_pixels_are_chosen_by_the_stated_rule():
    x = torch.zeros(1, 1, 6, 6)
    x.view(-1)[[4, 9, 17]] = torch.tensor([0.4, 0.6, 0.9])
    pixels, free = choose_pixels(x, 0.3)
    assert pixels.tolist() == [4, 9] and free
    pixels, free = choose_pixels(x, 0.45)
    assert pixels.tolist() == [4, 9] and not free
    record = iterate_clouds({"natural": network(0).float()}, x, torch.tensor([1]), 0.45, 2, 0.1, 3)
    assert "nearest to 1/2" in record["note"] and record["axes"] == ["move of pixel (0, 4)", "move of pixel (1, 3)"]
    assert len(choose_pixels(torch.full((1, 1, 6, 6), 0.5), 0.3, count=5)[0]) == 5


@few
@given(seeds, st.integers(2, 5), st.integers(1, 25))
def test_occupied_pairs_is_the_mean_over_pairs(seed, pixels, bins):
    moves = 0.6 * torch.rand(40, pixels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.3
    each = [plots.occupied_share(moves[:, [i, j]], 0.3, bins) for i in range(pixels) for j in range(i + 1, pixels)]
    assert math.isclose(occupied_pairs(moves, 0.3, bins), sum(each) / len(each), abs_tol=1e-12)


def test_what_cannot_be_done_is_refused():
    net, (x, y) = network(0), images(0)
    with pytest.raises(ValueError, match="F without S"):
        pgd_path(net, x, y, 0.1, setting="bpda")
    with pytest.raises(ValueError, match="8/255"):
        pgd_path(net, x, y, 8)
    with pytest.raises(ValueError, match="steps=0"):
        pgd_path(net, x, y, 0.1, steps=0)
    with pytest.raises(ValueError, match="one image"):
        iterate_clouds({"natural": net}, x, y)
