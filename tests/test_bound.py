"""Eq. 9–13 in general: the bounds as properties of random distributions, the path integral against the
divergence, the derived quantities by brute force."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from nsq_repro.bound import (
    border_steps,
    class_losses,
    cross_entropy,
    crossing_panels,
    factored_bound,
    fisher_trace,
    kl_divergence,
    label_loss,
    measure_pairs,
    noisy_pair,
    path_integral,
    repaired_bound,
    sharp_areas,
    split_cross_entropy,
    total_variation,
    two_class_limit,
    two_sample_bound,
    two_sample_factor,
    two_sample_gap,
)
from nsq_repro.networks import SoftQuantNet
from nsq_repro.quantization import SoftQuantize, thresholds
from nsq_repro.training import add_noise, stability_loss

few = settings(max_examples=60, deadline=None, derandomize=True)
seeds, classes = st.integers(0, 2**31), st.integers(2, 12)
scales = st.floats(-2, 2.5).map(lambda e: 10.0**e)  # from nearly uniform to sure beyond float64


def three(seed, C, scale, n=50):
    "Logits of p, logits of q, labels."
    g = torch.Generator().manual_seed(seed)
    zp, zq = scale * torch.randn(2, n, C, generator=g, dtype=torch.float64)
    return zp, zq, torch.randint(C, (n,), generator=g)


def of(*row):
    return torch.tensor([row], dtype=torch.float64).log()


def small(S=None, seed=0, smooth=True):
    "An untrained network, with outputs far enough from uniform to have something to integrate."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        F = nn.Sequential(
            nn.Flatten(), nn.Linear(36, 12), nn.Tanh() if smooth else nn.ReLU(), nn.Linear(12, 5)
        ).double()
    for p in F.parameters():
        p.data *= 2
    return F if S is None else SoftQuantNet(F, S)


def two_images(seed=0, n=1):
    return noisy_pair(
        torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), 0.3, seed
    )


# Eq. 9


@few
@given(seeds, classes, st.floats(-2, 1).map(lambda e: 10.0**e))
def test_losses_agree_with_torch(seed, C, scale):
    zp, zq, y = three(seed, C, scale)
    assert_close(class_losses(zp), -zp.log_softmax(1), rtol=1e-9, atol=1e-12)
    assert_close(label_loss(zp, y), nn.functional.cross_entropy(zp, y, reduction="none"), rtol=1e-9, atol=1e-12)
    assert_close(
        cross_entropy(zp, zq), nn.functional.cross_entropy(zp, zq.softmax(1), reduction="none"), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("lead", [1.0, 30.0, 50.0, 300.0])
def test_losses_keep_relative_precision(lead):
    z = torch.tensor([[lead, 0.0]], dtype=torch.float64)
    assert label_loss(z, torch.tensor([0])).item() == pytest.approx(math.log1p(math.exp(-lead)), rel=1e-13, abs=0)


def test_counterexample_to_eq9():
    left, right = (v.item() for v in two_sample_bound(of(0.99, 0.01), of(0.99, 0.01), torch.tensor([0])))
    assert (round(left, 4), round(right, 4)) == (0.0560, 0.0201)


@few
@given(seeds, classes, scales)
def test_gap_is_the_difference_of_the_sides(seed, C, scale):
    zp, zq, y = three(seed, C, scale)
    left, right = two_sample_bound(zp, zq, y)
    assert_close(two_sample_gap(zp, zq, y), left - right, rtol=1e-9, atol=1e-11 * scale)


@few
@given(seeds, classes, scales)
def test_eq9_where_it_is_true(seed, C, scale):
    zp, zq, y = three(seed, C, scale)
    near = (zp - zp.gather(1, y[:, None])).clamp_min(-1)  # p_i ≥ p_y/e
    left, right = two_sample_bound(near, zq, y)
    assert (left <= right * (1 + 1e-12)).all()
    one_hot = torch.where(nn.functional.one_hot(y, C).bool(), 0.0, -math.inf).double()
    assert_close(*two_sample_bound(zp, one_hot, y), rtol=1e-12, atol=0)


@few
@given(st.floats(0.01, 1 - 1e-6), st.floats(1e-4, 0.1))
def test_two_class_limit_separates(q, step):
    limit = two_class_limit(torch.tensor(q, dtype=torch.float64)).item()
    for p, sign in ((limit * (1 - step), -1), (1 - (1 - limit) * (1 - step), 1)):
        assert sign * two_sample_gap(of(p, 1 - p), of(q, 1 - q), torch.tensor([0])).item() > 0


def test_two_class_limit_at_certainty():
    assert two_class_limit(torch.ones(1, dtype=torch.float64)).item() == pytest.approx(math.e / (1 + math.e), rel=1e-14)


@few
@given(seeds, classes, scales)
def test_factored_bound(seed, C, scale):
    zp, zq, y = three(seed, C, scale)
    left, right = factored_bound(zp, zq, y)
    assert (left <= right * (1 + 1e-12)).all() and (two_sample_factor(zp, y) >= 1).all()


def test_factor_is_needed():  # half of it is not enough: q = (½, ½), p sure
    p, q, y = of(1 - 1e-9, 1e-9), of(0.5, 0.5), torch.tensor([0])
    assert cross_entropy(p, q) > label_loss(p, y) + two_sample_factor(p, y) / 2 * label_loss(q, y)


# The repaired bound


@few
@given(seeds, classes, scales)
def test_repaired_chain(seed, C, scale):
    b = repaired_bound(*three(seed, C, scale))
    for small_one, large in zip(b, b[1:]):
        assert (small_one <= large * (1 + 1e-12) + 1e-300).all()
    assert (b.tv >= 0).all() and (b.tv <= 1 + 1e-12).all()


@few
@given(seeds, classes, st.floats(-2, 0.5).map(lambda e: 10.0**e))
def test_total_variation(seed, C, scale):
    zp, zq, y = three(seed, C, scale)
    p, q = zp.softmax(1), zq.softmax(1)
    tv = total_variation(zp, zq)
    assert_close(tv, (p - q).abs().sum(1) / 2, rtol=1e-9, atol=1e-15)
    assert_close(tv, (p - q).clamp_min(0).sum(1), rtol=1e-9, atol=1e-14)  # the best set of classes
    agreed = torch.minimum(p, q).scatter(1, y[:, None], 0.0).sum(1)
    assert_close(repaired_bound(zp, zq, y).sharp - tv, agreed, rtol=1e-9, atol=1e-13)


def test_repaired_bound_with_zero_probabilities():
    for p, q, tv in (((1.0, 0.0), (0.0, 1.0), 1.0), ((1.0, 0.0), (1.0, 0.0), 0.0), ((1.0, 0.0), (0.5, 0.5), 0.5)):
        b = repaired_bound(of(*p), of(*q), torch.tensor([0]))
        assert b.tv.item() == pytest.approx(tv) and b.tv <= b.sharp <= b.misses <= b.losses


# Pairs of noisy samples


def test_noisy_pair():
    x = torch.rand(5, 1, 6, 6, dtype=torch.float64)
    a, b = noisy_pair(x, 0.2, seed=3)
    assert (
        max((a - x).abs().max(), (b - x).abs().max()) <= 0.2 and a.min() >= 0 and b.max() <= 1 and not torch.equal(a, b)
    )
    for again, s in zip(noisy_pair(x[3:], 0.2, seed=3, index=torch.tensor([3, 4])), (a, b)):
        assert torch.equal(again, s[3:])
    assert not torch.equal(noisy_pair(x, 0.2, seed=3, pair=1)[0], b)
    for wrong in (-0.1, 20):
        pytest.raises(ValueError, noisy_pair, x, wrong).match("radius")


def test_measure_pairs_does_not_depend_on_the_batch():
    net, x, y = small(SoftQuantize(1, 50.0)), torch.rand(7, 1, 6, 6, dtype=torch.float64), torch.arange(7) % 5
    whole, parts = measure_pairs(net, x, y, 0.3), measure_pairs(net, x, y, 0.3, batch=2)
    a, b = noisy_pair(x, 0.3)
    assert_close(whole.printed, two_sample_bound(net(a).detach(), net(b).detach(), y))
    assert_close(whole.repaired, parts.repaired)
    assert_close(whole.factored, parts.factored)


# Eq. 10–13


@few
@given(seeds, classes, scales)
def test_split(seed, C, scale):
    zp, zq, _ = three(seed, C, scale)
    s = split_cross_entropy(zp, zq)
    assert_close(s.whole, s.entropy + s.rest, rtol=1e-9, atol=1e-12 * scale)
    assert (s.entropy >= 0).all() and (s.rest >= -1e-12 * scale).all()
    assert_close(kl_divergence(zq, zq), torch.zeros(len(zq), dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "S",
    [
        None,
        SoftQuantize(1, 20.0),
        SoftQuantize(1, 1000.0),
        SoftQuantize(1, 25500.0),
        SoftQuantize(2, 25500.0),
        SoftQuantize(3, 10.0),
        SoftQuantize(4, 30.0),
    ],
)
def test_path_integral_is_the_divergence(S):
    net, (to, start) = small(S), (s[0] for s in two_images())
    kl = kl_divergence(net(start[None]), net(to[None])).item()
    r = path_integral(net, start, to, order=8)
    jumps = border_steps(net, start, to)[0] if S is not None else 0.0
    assert abs(r.value + jumps - kl) < 1e-7 * r.absolute
    if S is not None and S.K > 2:
        assert abs(jumps) > 1e-3 * abs(kl)  # a blunt layer's jumps count
    assert abs(r.value) <= r.absolute * (1 + 1e-12) <= r.norm * (1 + 1e-9) and r.weight.sum().item() == pytest.approx(
        1, abs=1e-12
    )


def test_path_does_not_matter():
    net, (to, start), (via, _) = (
        small(SoftQuantize(1, 200.0)),
        (s[0] for s in two_images()),
        (s[0] for s in two_images(1)),
    )
    z = net(start[None])[0]
    legs = [path_integral(net, a, b, 8, logits_q=z).value for a, b in ((start, via), (via, to))]
    assert sum(legs) == pytest.approx(path_integral(net, start, to, 8).value, rel=1e-6)


def test_kinks_converge():
    net, (to, start) = small(SoftQuantize(1, 100.0), smooth=False), (s[0] for s in two_images())
    kl, cuts = kl_divergence(net(start[None]), net(to[None])).item(), crossing_panels(net.quantize, start, to)
    fine = torch.cat([cuts[:-1] + k / 100 * cuts.diff() for k in range(100)] + [cuts[-1:]]).sort().values
    coarse, fine = (path_integral(net, start, to, 4, cuts=c) for c in (cuts, fine))
    assert abs(fine.value - kl) < 1e-4 * fine.absolute and abs(fine.value - kl) < abs(coarse.value - kl) / 10


def test_panels_are_cut_at_every_crossing():
    to, start = (s[0] for s in two_images(4))
    cuts = crossing_panels(SoftQuantize(3, 1000.0), start, to)
    assert cuts[0] == 0 and cuts[-1] == 1 and (cuts.diff() > 0).all()
    for t in thresholds(3).tolist():
        crossed = (start - t) * (to - t) < 0
        at = ((t - start) / (to - start))[crossed]
        assert (at[:, None] - cuts).abs().amin(1).max() < 1e-12
    assert crossing_panels(SoftQuantize(1, 1000.0), start, start).tolist() == [0, 1]  # nothing moves


def test_wrong_arguments():
    net, (to, start) = small(), (s[0] for s in two_images())
    with pytest.raises(ValueError, match="float64"):
        path_integral(net, start.float(), to.float())
    with pytest.raises(ValueError, match="order=0"):
        path_integral(net, start, to, 0)
    with pytest.raises(ValueError, match="at least 2"):
        class_losses(torch.zeros(3, 1))
    with pytest.raises(ValueError, match="n=0"):
        sharp_areas(0, 2)
    with pytest.raises(ValueError, match="weight"):
        stability_loss(net, start[None], torch.tensor([0]), 0.1, -1.0)


# What Eq. 10 does not say


def test_fisher_trace_is_the_curvature_of_the_divergence():
    net, x = small(SoftQuantize(1, 5.0)), two_images()[0]
    z = net(x).detach()
    hessian = torch.autograd.functional.hessian(lambda v: kl_divergence(z, net(v.view_as(x))).sum(), x.flatten())
    assert fisher_trace(net, x).item() == pytest.approx(hessian.trace().item(), rel=1e-9)


def test_gradient_towards_its_own_output_is_zero():
    net, x = small(SoftQuantize(1, 100.0)), two_images()[0].requires_grad_()
    z = net(x)
    (grad,) = torch.autograd.grad(cross_entropy(z, z.detach()).sum(), x)
    assert grad.abs().max() < 1e-12


@few
@given(st.integers(1, 12), st.integers(1, 6))
def test_sharp_areas(n, K):
    areas = sharp_areas(n, K)
    assert sum(areas) == (2 * K + 1) ** n and areas[0] == (K + 1) ** n and areas[-1] == K**n
    if n == 1:
        assert areas == [K + 1, K]


# Remark 2


@pytest.mark.parametrize("weight", [0.0, 1.0, 4.0])
def test_stability_loss(weight):
    net, x, y = small(SoftQuantize(1, 20.0)).float(), two_images(n=6)[0].float(), torch.arange(6) % 5
    seeded = torch.Generator().manual_seed(1)
    noisy = add_noise(x, 0.3, torch.Generator().manual_seed(1))
    z, zn = net(x).double(), net(noisy).double()
    expected = nn.functional.cross_entropy(z, y) + weight * kl_divergence(z, zn).mean()
    loss = stability_loss(net, x, y, 0.3, weight, seeded)
    assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    a, b = (torch.autograd.grad(v, list(net.parameters())) for v in (loss, expected))
    for p, q in zip(a, b):
        assert_close(p, q, rtol=1e-4, atol=1e-5)
