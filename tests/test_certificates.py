"""Certificates: nothing inside a certified box is ever misclassified, bounds are in order, exact answers are exact."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from nsq_repro import certificates
from nsq_repro.attacks import pgd
from nsq_repro.certificates import METHODS, bound_margins, bounds, certify, corners, cut, exact_hard, preimage
from nsq_repro.correlated_errors import Polytopes, SharedErrors, curves
from nsq_repro.intervals import interval
from nsq_repro.networks import MnistCNN, SoftQuantNet
from nsq_repro.programs import Maximum, chain, read_program
from nsq_repro.quantization import SoftQuantize, output_values
from nsq_repro.zonotopes import Patches, PixelGenerators, Zonotope, forward, maximum, zonotope_of_box

few = settings(max_examples=15, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)


C, L, R, P = nn.Conv2d, nn.Linear, nn.ReLU, nn.MaxPool2d
HEAD = lambda classes: [R(), nn.Flatten(), L(16, 8), R(), L(8, classes)]
KINDS = {
    "cnn": lambda n: [C(1, 3, 3, padding=1), P(2), R(), C(3, 4, 2), *HEAD(n)],
    "pool3": lambda n: [
        *(C(1, 4, 3, padding=1, bias=False), R(), P(3)),
        *(C(4, 4, 3, stride=2, padding=1, groups=2), nn.Flatten(), L(4, n)),
    ],
    "deep": lambda n: [C(1, 3, 3, padding=1), R(), C(3, 3, 3, padding=1), P(2), R(), C(3, 4, 2), *HEAD(n)],
    "mlp": lambda n: [nn.Flatten(), L(36, 12), R(), nn.Sequential(L(12, 12), R()), L(12, 10), R(), L(10, n)],
}


def network(seed, kind="cnn", classes=4, gain=2.0):
    "A random float64 network on 1×6×6 images."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        F = nn.Sequential(*KINDS[kind](classes)).double()
    for p in F.parameters():
        p.requires_grad_(False).mul_(gain)
    return F


def boxes(seed, n=8, free=8):
    "Random boxes on 1×6×6 images in which only some sides have a length."
    g = torch.Generator().manual_seed(seed)
    lo = torch.rand(n, 1, 6, 6, generator=g, dtype=torch.float64)
    wide = torch.rand(lo.shape, generator=g).flatten(1).argsort(1).argsort(1).view(lo.shape) < free
    return lo, lo + wide * torch.rand(lo.shape, generator=g, dtype=torch.float64) * (1 - lo), torch.arange(n) % 4, g


def exact(F, z, y):
    out = F(z)
    return out.gather(1, y[:, None]) - out


def smallest_seen(F, lo, hi, y, g, draws=30):
    "The smallest margin over each class at random points, at corners, and after a few steps of gradient descent."
    low = torch.full((len(y), 4), math.inf, dtype=torch.float64)
    for d in range(draws):
        t = torch.rand(lo.shape, generator=g, dtype=torch.float64)
        z = lo + (hi - lo) * (t if d % 3 == 0 else t.round())
        if d % 3 == 2:
            for j in range(4):
                for _ in range(4):
                    z = z.detach().requires_grad_()
                    (grad,) = torch.autograd.grad(exact(F, z, y)[:, j].sum(), z)
                    z = torch.minimum(torch.maximum(z.detach() - 0.3 * (hi - lo) * grad.sign(), lo), hi)
                low = torch.minimum(low, exact(F, z, y))
        low = torch.minimum(low, exact(F, z, y))
    return low


@few
@given(seeds, st.sampled_from(["cnn", "deep", "pool3", "mlp"]), st.integers(1, 36))
def test_no_point_of_a_box_is_below_any_bound_and_dearer_is_no_worse(seed, kind, free):
    F, (lo, hi, y, g) = network(seed, kind), boxes(seed, free=free)
    low = [bounds(F, lo, hi, y, m) for m in METHODS]
    seen = smallest_seen(F, lo, hi, y, g)
    for m, b in zip(METHODS, low):
        assert (b <= seen + 1e-9).all(), m
    for cheap, dear in zip(low, low[1:]):
        assert (dear >= cheap - 1e-12).all()


@pytest.mark.parametrize("kind", ["cnn", "deep", "pool3", "mlp"])
def test_thousands_of_boxes_of_many_networks(kind):
    """3,200 boxes with the batched bounds, 160 with the one that takes boxes singly: no point found is below them."""
    for seed in range(20):
        F, (lo, hi, y, g) = network(1000 + seed, kind), boxes(1000 + seed, n=40, free=1 + seed % 12)
        seen = smallest_seen(F, lo, hi, y, g, draws=9)
        for m in ("forward", "crown"):
            assert (bounds(F, lo, hi, y, m) <= seen + 1e-9).all(), (seed, m)
        assert (bounds(F, lo[:2], hi[:2], y[:2], "full") <= seen[:2] + 1e-9).all(), seed


def parts(lo, hi, g, n):
    "n boxes inside of one box (1, C, H, W), some of their sides without a length."
    t = torch.rand(2, n, *lo.shape[1:], generator=g, dtype=torch.float64).sort(0).values
    t = torch.where(
        torch.rand(t.shape[1:], generator=g) < 0.4, torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1, 1), t
    )
    t[1] = torch.where(torch.rand(t.shape[1:], generator=g) < 0.1, t[0], t[1])
    return lo + (hi - lo) * t[0], lo + (hi - lo) * t[1]


@pytest.mark.parametrize("kind", ["cnn", "deep", "pool3", "mlp"])
def test_boxes_of_one_image_done_together(kind):
    """96 boxes of 12 networks that share the generators of their errors: no point found is below their bounds."""
    lost, gained = [], []
    for seed in range(12):
        F, (lo, hi, y, g) = network(2000 + seed, kind), boxes(2000 + seed, n=1, free=2 + seed % 12)
        layers, (a, b) = read_program(F), parts(lo, hi, g, 8)
        y = y.expand(8)
        low = bound_margins(layers, a, b, y, "full", together=True).low
        assert (low <= smallest_seen(F, a, b, y, g, draws=6) + 1e-9).all(), seed
        alone, crown = (bound_margins(layers, a, b, y, m).low for m in ("full", "crown"))
        same = bound_margins(layers, *(v[:1].expand(3, -1, -1, -1) for v in (a, b)), y[:3], "full", together=True).low
        assert_close(same, same[:1].expand(3, -1))
        lost.append(float((alone - low).mean())), gained.append(float((low - crown).mean()))
        if kind == "pool3":
            assert_close(low, alone)  # no errors are kept: nothing to share
    if kind != "pool3":
        assert 0 <= sum(lost) and sum(gained) > 0, "worse than without generators for errors"


@pytest.mark.parametrize("kind", ["cnn", "deep", "pool3", "mlp"])
@pytest.mark.parametrize("method", METHODS)
def test_a_box_of_no_width_gives_the_margins(kind, method):
    F, (lo, _, y, _) = network(3, kind), boxes(3)
    assert_close(bounds(F, lo, lo, y, method), exact(F, lo, y))


@pytest.mark.parametrize("method", METHODS[1:])
def test_linear_bounds_are_exact_where_no_unit_changes_sign(method):
    F, (lo, hi, y, _) = network(5, "cnn"), boxes(5)
    hi = lo + 2e-5 * (hi > lo)  # so small a box that no unit changes sign, with sides that still count as free
    planes = [p for p in forward(read_program(F), lo, hi).planes if p is not None]
    assert len(planes) == 3 and not any((p.offset > 0).any() for p in planes)
    x = lo.requires_grad_()
    truth = torch.stack(
        [
            exact(F, (lo + hi) / 2, y)[:, j]
            - (torch.autograd.grad(exact(F, x, y)[:, j].sum(), x)[0].abs() * (hi - lo) / 2).sum((1, 2, 3))
            for j in range(4)
        ],
        1,
    )
    assert_close(bounds(F, lo.detach(), hi.detach(), y, method), truth.detach())


@few
@given(seeds, st.sampled_from(["cnn", "pool3", "mlp"]))
def test_every_layer_of_the_forward_pass_encloses_and_every_plane_bounds(seed, kind):
    F, (lo, hi, _, g) = network(seed, kind), boxes(seed)
    layers = [step.layer for step in read_program(F).steps]
    for i in range(1, len(layers)):
        part = chain(layers[:i] + layers[-1:])
        seen = forward(part, lo, hi)
        planes, (l, u) = seen.planes[i - 1], seen.z.bounds()
        a, b = interval(part, lo, hi)
        for _ in range(20):
            v = lo + (hi - lo) * torch.rand(lo.shape, generator=g, dtype=torch.float64).round()
            for layer in layers[: i - 1]:
                v = layer(v)
            out = layers[i - 1](v)
            for below, above in ((l, u), (a, b)):
                assert (below - 1e-9 <= out).all() and (out <= above + 1e-9).all()
            if planes is not None:
                k, (n, c, *size) = layers[i - 1].k, v.shape
                if k > 1:
                    v = v.view(n, c, size[0] // k, k, size[1] // k, k).permute(0, 3, 5, 1, 2, 4).flatten(1, 2)
                else:
                    v = v[:, None]
                below, above = (planes.lower * v).sum(1), (planes.upper * v).sum(1)
                for w in planes[:2]:
                    assert (w >= 0).all() and (w.sum(1) <= 1 + 1e-12).all()
                    assert layers[i - 1].zero or (w.sum(1) >= 1 - 1e-12).all()
                assert (below <= out + 1e-9).all() and (out <= above + planes.offset + 1e-9).all()


@few
@given(seeds, st.sampled_from(["cnn", "relu-pool", "mlp"]), st.integers(1, 6), st.sampled_from([0.0, 0.01, 0.3]))
def test_curves_enclose_the_errors_they_stand_for(seed, kind, free, narrow):
    """Not only each unit: every linear functional of the errors stays within its bounds, as a polytope promises."""
    F, (lo, hi, _, g) = network(seed, "cnn" if kind == "relu-pool" else kind), boxes(seed, n=1, free=free)
    layers = [step.layer for step in read_program(F).steps]
    block = {"cnn": layers[:2], "relu-pool": [layers[0], layers[1], nn.Flatten()], "mlp": layers[:3]}[kind]
    if free > 1:
        hi = torch.where(torch.rand(hi.shape, generator=g) < 0.4, lo + narrow * (hi - lo), hi)
    box, z = zonotope_of_box(lo, hi), forward(chain([*block, layers[-1]]), lo, hi).z
    c = curves(block, box, z)
    if not box.terms:  # no free pixel is left
        assert c is z
        return
    polytopes = c.term(Polytopes)
    assert (c.radius <= z.radius + 1e-12).all()
    assert polytopes is None or sum(polytopes.rows.sizes) == len(polytopes.rows.values)
    xi = torch.rand(2000, 1, 6, 6, generator=g, dtype=torch.float64)
    xi[:1000] = (xi[:1000] * 2).round() / 2
    free = box.term(PixelGenerators).pixel
    rows = c.term(PixelGenerators).rows.whole()
    affine = c.centre + torch.einsum("tp,p...->t...", (2 * xi - 1).flatten(1)[:, free], rows)
    e = (nn.Sequential(*block)(lo + xi * (hi - lo)) - affine).flatten(1)
    probe = nn.Linear(e.shape[1], 300, bias=False).double()
    probe.weight.data = torch.randn(300, e.shape[1], generator=g, dtype=torch.float64)
    probe.weight.data[: e.shape[1]] = torch.eye(e.shape[1], dtype=torch.float64)[:300]
    probe.weight.data[150:] *= torch.rand(150, e.shape[1], generator=g) < 3 / e.shape[1]  # few units at a time
    c = Zonotope(0 * c.centre, c.radius, tuple(t for t in c.terms if isinstance(t, Polytopes)))
    l, u = (c.flatten(whole=False) if c.centre.dim() > 2 else c).affine(probe).bounds()
    assert (probe(e) >= l - 1e-9).all() and (probe(e) <= u + 1e-9).all()


def test_curves_of_one_pixel_leave_a_fraction_of_the_error():
    lo, hi, _, _ = boxes(1, n=1, free=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = [nn.Flatten(), nn.Linear(36, 400).double(), Maximum(1, True)]
    hi, lo = torch.where(hi > lo, 1.0, lo), torch.where(hi > lo, 0.0, lo)  # one pixel from 0 to 1
    z = forward(chain([*block, nn.Linear(400, 2).double()]), lo, hi).z
    c = curves(block, zonotope_of_box(lo, hi), z)
    assert c.term(Polytopes).rows.sizes and z.radius.sum() > 0 and c.radius.sum() < z.radius.sum() / 4


def test_a_rectifier_gets_the_line_of_crown():
    g = torch.Generator().manual_seed(0)
    l, u = (3 * torch.randn(2, 2000, generator=g, dtype=torch.float64)).sort(0).values
    l, u = (
        torch.cat([l, torch.tensor([0.0, -1.0, -1.0, 1.0, 0.0])])[None],
        torch.cat([u, torch.tensor([1.0, 0.0, -0.5, 2.0, 0.0])])[None],
    )
    _, (lam, s, t) = maximum(Zonotope((l + u) / 2, (u - l) / 2), Maximum(1, True))
    lam, s = lam[:, 0], s[:, 0]
    for d in torch.linspace(0, 1, 33, dtype=torch.float64)[:, None] * (u - l) + l:
        assert (lam * d <= d.relu() + 1e-12).all() and (d.relu() <= s * d + t + 1e-12).all()
    mixed = (l < 0) & (u > 0)
    assert_close((s * u + t)[mixed], u[mixed])
    assert_close((s * l + t)[mixed], 0 * l[mixed])
    assert_close(lam[mixed], (u > -l).double()[mixed])
    assert (t[~mixed] == 0).all() and torch.equal(s[0, -5:-1], torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64))


@few
@given(
    seeds,
    st.sampled_from([(1, True), (2, True), (2, False), (3, True)]),
    st.sampled_from(["pixels", "errors", "boxes"]),
)
def test_a_maximum_is_between_its_planes_at_every_point_of_the_set(seed, kind, what):
    g = torch.Generator().manual_seed(seed)
    new = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)
    N = 4 if what == "boxes" else 1
    own = torch.tensor([0, 2, 3, 1, 0, 1, 2, 3, 2]) if N > 1 else torch.zeros(9, dtype=torch.long)
    corner = tuple((i % 5 - 1, i % 4) for i in range(4 if N > 1 else 9))
    inside = lambda rows: replace(rows, values=torch.cat(rows.each(torch.mul, [0] * len(rows.sizes), one)))
    one = torch.ones(1, 1, 6, 6, dtype=torch.float64)  # nothing outside of the map
    pixels = inside(Patches(new(9, 3, 4, 3), (3, 1, 4, 1) if N > 1 else (1,) * 9, corner, (6, 6)))
    terms = [PixelGenerators(pixels, own, own, N)]
    if what != "pixels":
        rows = inside(Patches(new(4, 3, 2, 3), (1, 3), ((0, 1), (4, 4)), (6, 6)))
        terms.append(SharedErrors(rows, new(N, 4).abs() * (new(N, 4) > -1), (("some", 4),)))
    if what == "errors":
        terms.append(Polytopes(Patches(new(6, 3, 3, 3), (2, 4), ((-1, 2), (2, 2)), (6, 6), distinct=True)))
    z, layer = Zonotope(new(N, 3, 6, 6), 0.2 * new(N, 3, 6, 6).abs(), tuple(terms)), Maximum(*kind)
    m, planes = maximum(z, layer)
    for _ in range(40):
        rows = pixels.whole() * new(9).sign()[:, None, None, None]
        v = z.centre + torch.zeros_like(z.centre).index_add(0, own, rows) + z.radius * new(N, 3, 6, 6).sign()
        for t in z.terms[1:]:
            if isinstance(t, SharedErrors):
                xi = t.share * (2 * torch.rand(N, 4, generator=g, dtype=torch.float64) - 1)
                v = v + torch.einsum("nm,m...->n...", xi, t.rows.whole())
            else:
                groups = t.rows.whole().split(t.rows.sizes)
                v = v + sum(p[torch.randint(len(p), (1,), generator=g)] for p in groups)
        out = layer(v)
        l, u = m.bounds()
        entries = v.view(N, 3, 6 // layer.k, layer.k, 6 // layer.k, layer.k).permute(0, 3, 5, 1, 2, 4).flatten(1, 2)
        assert ((planes.lower * entries).sum(1) <= out + 1e-9).all()
        assert (out <= (planes.upper * entries).sum(1) + planes.offset + 1e-9).all()
        assert (l <= out + 1e-9).all() and (out <= u + 1e-9).all()


def test_zonotope_of_a_box_forgets_nothing():
    lo, hi, _, _ = boxes(0)
    hi.view(-1)[::5] += 4e-7
    for tiny in (0.0, 1e-6, 0.3):
        z = zonotope_of_box(lo, hi, tiny)
        l, u = z.bounds()
        assert_close(l, lo, rtol=0, atol=1e-14)
        assert_close(u, hi, rtol=0, atol=1e-14)
        assert torch.equal(z.term(PixelGenerators).owner.bincount(), (hi - lo > tiny).flatten(1).sum(1))
        assert_close(zonotope_of_box(lo.flatten(1), hi.flatten(1), tiny).bounds(), (lo.flatten(1), hi.flatten(1)))


@few
@given(
    seeds,
    st.sampled_from([(1, 5.0), (1, 1000.0), (2, 40.0), (1, math.inf), (3, math.inf), None]),
    st.floats(0.005, 0.3),
    st.sampled_from(["cnn", "mlp"]),
)
def test_a_certified_image_is_never_broken_and_a_broken_one_is(seed, layer, eps, kind):
    F, (x, _, _, g) = network(seed, kind, gain=1.3), boxes(seed, n=6)
    model = F if layer is None else SoftQuantNet(F, SoftQuantize(*layer))
    y = model(x).argmax(1)
    y[0] = (y[0] + 1) % 4
    c = certify(model, x, y, eps, boxes=7, slack=1e-6, leaf=4)
    assert not (c.robust & c.broken).any() and c.method[0] == "wrong" and c.broken[0] and not c.robust[0]
    assert (
        (model(c.x).argmax(1) != y)[c.broken].all()
        and ((c.x - x).abs() <= eps + 1e-12).all()
        and 0 <= c.x.min()
        and c.x.max() <= 1
    )
    assert (c.boxes <= 7).all() and [v == "unknown" for v in c.verdict] == [m == "open" for m in c.method]
    for _ in range(100):
        t = 2 * torch.rand(x.shape, generator=g, dtype=torch.float64) - 1
        for r in (t, t.sign()):
            assert (model((x + eps * r).clamp(0, 1)).argmax(1) == y)[c.robust].all()
    for setting in ("pgd", "bpda_ste"):
        assert pgd(model, x, y, eps, 10, eps / 3, setting=setting).correct_worst[c.robust].all()


def brute_force(model, x, y, eps):
    S = model.quantize
    lo, hi = S.reachable_box(x, eps)
    free = lambda a, b: ((b > a).flatten().nonzero()[:, 0].tolist(), output_values(S.K, dtype=x.dtype))

    def survives(a, b, t):
        pixels, values = free(a, b)
        for choice in itertools.product(
            *[[v for v in values if a.flatten()[p] <= v <= b.flatten()[p]] for p in pixels]
        ):
            z = a.clone()
            z.view(-1)[pixels] = torch.stack(choice) if choice else a.new_zeros(0)
            if model.features(z[None]).argmax() != t:
                return False
        return True

    return torch.tensor([survives(*args) for args in zip(lo, hi, y)])


@settings(max_examples=12, deadline=None, derandomize=True)
@given(seeds, st.sampled_from([1, 2]), st.sampled_from(["cnn", "pool3", "mlp"]), st.sampled_from([(16, 1), (2, 1000)]))
def test_exact_hard_is_brute_force_whether_it_enumerates_or_cuts(seed, K, kind, how):
    F, g = network(seed, kind), torch.Generator().manual_seed(seed)
    model, eps = SoftQuantNet(F, SoftQuantize(K, math.inf)), 0.1
    x = output_values(K)[torch.randint(0, K + 1, (10, 1, 6, 6), generator=g)]
    near = 0.25 if K == 2 else 0.5
    x.view(10, -1)[:, 4:10] = near + 0.2 * torch.rand(10, 6, generator=g, dtype=torch.float64) - 0.1
    y = model(x).argmax(1)
    c = exact_hard(model, x, y, eps, *how)
    assert torch.equal(c.robust, brute_force(model, x, y, eps)) and torch.equal(c.broken, ~c.robust)
    assert (model(c.x).argmax(1) != y)[c.broken].all() and ((c.x - x).abs() <= eps + 1e-12).all()


def test_corners_are_those_of_itertools():
    lo, hi = torch.tensor([0.0, 0.5, 0.0, 1.0]), torch.tensor([1.0, 0.5, 0.5, 1.0])
    points = torch.cat(list(corners(lo, hi, output_values(2, dtype=torch.float32), 100, chunk=4)))
    assert sorted(map(tuple, points.tolist())) == sorted(itertools.product([0, 0.5, 1], [0.5], [0, 0.5], [1.0]))


@few
@given(seeds, st.sampled_from([None, 1, 3]))
def test_a_cut_loses_no_reachable_point(seed, K):
    lo, hi, _, g = boxes(seed, n=1)
    lv = None if K is None else output_values(K)
    if K:
        lo, hi = (lo * K).round() / K, (hi * K).round() / K
    if not (hi > lo).any():
        return
    halves = cut(lo[0], hi[0], torch.rand(lo[0].shape, generator=g, dtype=torch.float64) * (hi[0] - lo[0]), lv)
    z = lo + (hi - lo) * torch.rand(500, 1, 6, 6, generator=g, dtype=torch.float64)
    if K:
        z = (z * K).round() / K
    inside = torch.stack([((z >= a - 1e-12) & (z <= b + 1e-12)).flatten(1).all(1) for a, b in halves])
    assert inside.any(0).all() and all((b >= a).all() and (b - a).sum() < (hi - lo).sum() for a, b in halves)


def test_preimage_is_in_the_ball_and_maps_back():
    lo, hi, _, g = boxes(1, n=30)
    x, eps = lo, 0.1
    for S in (SoftQuantize(1, 20.0), SoftQuantize(1, math.inf), SoftQuantize(2, math.inf), SoftQuantize(3, 60.0)):
        a, b = S.reachable_box(x, eps)
        hard = math.isinf(S.alpha)
        for z in (a, b, torch.where(torch.rand(x.shape, generator=g) < 0.5, a, b)) + (
            () if hard else (a + (b - a) * torch.rand(x.shape, generator=g),)
        ):
            v = preimage(S, z, x, eps)
            assert ((v - x).abs() <= eps + 1e-12).all() and 0 <= v.min() and v.max() <= 1
            assert_close(S(v), z, rtol=0, atol=1e-9)


def test_float32_bounds_differ_from_float64_far_less_than_the_slack():
    F, (lo, hi, y, _) = network(9, "cnn"), boxes(9, free=4)
    b64 = bounds(F, lo, hi, y, "full")
    b32 = bounds(F.float(), lo.float(), hi.float(), y, "full")
    assert ((b32.double() - b64).abs() <= 1e-5 * (1 + b64.abs())).all()


def test_mnist_network_in_float32():
    torch.manual_seed(0)
    model = SoftQuantNet(MnistCNN("pytorch"), SoftQuantize()).eval()
    x = torch.rand(2, 1, 28, 28).round() * 0.9
    x[:, :, 10, 10:14] = 0.5
    y = model(x).argmax(1)
    lo, hi = model.quantize.reachable_box(x, 0.05)
    low = [bounds(model.features, lo, hi, y, m) for m in METHODS]
    with torch.no_grad():
        for _ in range(5):
            assert (exact(model.features, lo + (hi - lo) * torch.rand(x.shape), y) >= low[-1] - 1e-4).all()
    for cheap, dear in zip(low, low[1:]):
        assert (dear >= cheap - 1e-5).all()


def test_wrong_arguments_are_named():
    F, (x, hi, y, _) = network(0), boxes(0)
    hard = SoftQuantNet(F, SoftQuantize(1, math.inf))
    for message, call in [
        ("method='planet' is unknown", lambda: bounds(F, x, hi, y, "planet")),
        ("lo is above hi", lambda: bounds(F, hi, x, y)),
        ("one image; these have the labels", lambda: bound_margins(read_program(F), x, hi, y, "full", together=True)),
        ("expected a box and a label", lambda: bounds(F, x, hi, y[:3])),
        ("y holds labels 0 to 7; F has 4 classes", lambda: bounds(F, x, hi, y + torch.arange(8) // 7 * 4)),
        (
            "F contains Sigmoid",
            lambda: certify(
                nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.Sigmoid(), nn.Linear(4, 4)).double(), x, y, 0.1
            ),
        ),
        ("method='ibp'", lambda: certify(hard, x, y, 0.1, method="ibp")),
        ("alpha = inf", lambda: exact_hard(SoftQuantNet(F, SoftQuantize()), x, y, 0.1)),
        ("no quantization layer", lambda: exact_hard(F, x, y, 0.1)),
        (
            "do not divide an input",
            lambda: bounds(nn.Sequential(nn.MaxPool2d(4), nn.Flatten(), nn.Linear(1, 4)).double(), x, hi, y, "forward"),
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_exact_hard_enumerates_what_it_has_no_bounds_for():
    F, g = network(4, "mlp"), torch.Generator().manual_seed(4)
    smooth = nn.Sequential(
        *[nn.Tanh() if isinstance(m, nn.ReLU) else m for m in F.modules() if not isinstance(m, nn.Sequential)]
    )
    model, x = SoftQuantNet(smooth, SoftQuantize(1, math.inf)), torch.randint(0, 2, (12, 1, 6, 6), generator=g).double()
    x.view(12, -1)[:, :8] = 0.4 + 0.2 * torch.rand(12, 8, generator=g, dtype=torch.float64)
    x[0].view(-1)[:30] = 0.5  # too many to try
    y = model(x).argmax(1)
    c = exact_hard(model, x, y, 0.3, 10)
    assert (
        torch.equal(c.robust[1:], brute_force(model, x[1:], y[1:], 0.3))
        and torch.equal(c.broken[1:], ~c.robust[1:])
        and c.verdict[0] == "unknown"
    )
    assert 0 < int(c.robust.sum()) < 11
    with pytest.raises(ValueError, match="F contains Tanh"):
        certify(SoftQuantNet(smooth, SoftQuantize()), x, y, 0.3)


def test_what_cannot_be_computed_is_not_proven():
    F, (x, hi, _, _) = network(0), boxes(0)
    F[0].weight.data[0, 0] = math.nan  # argmax of nan is 0
    y = torch.zeros(8, dtype=torch.long)
    for method in ("crown", "full"):
        with pytest.raises(ValueError, match="not finite"):  # no verdict at all
            certify(F, x, y, 0.01, method=method, boxes=3)
        assert not (bounds(F, x, hi, y, method)[:, 1:] > 0).any()
    assert bound_margins(read_program(F), x, hi, y, "crown").open[:, 1:].all()


def test_nothing_to_certify_is_no_error():
    F, (x, hi, y, _) = network(0), boxes(0)
    c = certify(F, x[:0], y[:0], 0.1)
    assert (
        len(c.robust) == len(c.broken) == 0
        and c.method == []
        and bounds(F, x[:0], hi[:0], y[:0], "full").shape == (0, 4)
    )


def test_only_the_classes_that_matter_are_open():
    F, (lo, hi, y, _) = network(0), boxes(0, free=12)
    layers, y = read_program(F), y * 0
    for together in (False, True):
        every = bound_margins(layers, lo, hi, y, "full", together=together)
        classes = torch.rand(8, 4, generator=torch.Generator().manual_seed(0)) < 0.5
        some = bound_margins(layers, lo, hi, y, "full", together=together, classes=classes)
        assert every.open[:, 1:].all() and torch.equal(some.open, every.open & classes) and some.open.any()
        assert_close(some.low[some.open], every.low[some.open])


def test_errors_are_kept_behind_flatten_and_for_several_channels():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        F = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=2, groups=2),
            nn.ReLU(),
            nn.Conv2d(4, 3, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(27, 9),
            nn.ReLU(),
            nn.Linear(9, 8),
            nn.ReLU(),
            nn.Linear(8, 4),
        ).double()
    for p in F.parameters():
        p.requires_grad_(False).mul_(2)
    g = torch.Generator().manual_seed(0)
    lo = torch.rand(1, 2, 6, 6, generator=g, dtype=torch.float64)
    lo, hi = parts(lo, lo + 0.3 * (torch.rand(lo.shape, generator=g) < 0.2), g, 40)
    y = torch.zeros(40, dtype=torch.long)
    low = bound_margins(read_program(F), lo, hi, y, "full", together=True).low
    assert (low <= smallest_seen(F, lo, hi, y, g) + 1e-9).all() and (
        low - bound_margins(read_program(F), lo, hi, y, "crown").low
    ).mean() > 0


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e4])
def test_large_logits_get_more_slack_than_their_rounding(scale):
    torch.manual_seed(0)
    F = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(196, 2)).eval().requires_grad_(False)
    F[1].weight.normal_().mul_(scale)
    x = torch.rand(30, 1, 14, 14) * 0.4 + 0.3
    y = F(x).argmax(1)
    rows = (F[1].weight[y] - F[1].weight[1 - y]).double()
    margin = (rows * x.flatten(1)).sum(1) + (F[1].bias[y] - F[1].bias[1 - y]).double()
    at_the_edge = margin / rows.abs().sum(1)  # where the margin is 0 in real arithmetic
    assert not certify(F, x, y, at_the_edge * (1 + 2e-7), boxes=0).robust.any()
    assert certify(F, x, y, at_the_edge * 0.5, boxes=0).robust.float().mean() > 0.8


def test_slack_covers_what_float32_loses(monkeypatch):
    torch.manual_seed(0)
    F = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2)).eval().requires_grad_(False)
    x = torch.rand(4, 1, 1, 16)
    y, edge = F(x).argmax(1), torch.tensor(1e-9)
    assert certify(F, x, y, edge, boxes=0).robust.all()
    monkeypatch.setattr(certificates._Target, "rounding", lambda *_: 1.0)  # as if float32 lost all digits
    assert not certify(F, x, y, edge, boxes=0).robust.any()
    monkeypatch.undo()
    F[1].weight += torch.tensor([1e3] * 8 + [-1e3] * 8)  # sums of 8e3 that nearly cancel
    of = certificates._Target.of(F, x, "crown", 1e-3, math.inf, 1)
    assert of.rounding(x) > 1e-5 and of.rounding(x.double()) == 0.0
