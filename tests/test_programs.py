"""What a network computes: programs give F's own outputs, sums and modules used twice are bounded soundly, and what may
do something else is refused by name."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_certificates import boxes, smallest_seen
from torch import nn
from torch.testing import assert_close

from nsq_repro.attacks import pgd
from nsq_repro.certificates import METHODS, bound_margins, bounds, certify, exact_hard
from nsq_repro.networks import CifarResNet, SoftQuantNet
from nsq_repro.programs import NoBounds, Sum, chain, check_program, read_program
from nsq_repro.quantization import SoftQuantize
from nsq_repro.zonotopes import Patches, PixelGenerators, Zonotope, added

few = settings(max_examples=12, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)


class Graph(nn.Module):
    "A random network on 1×6×6 images: convolutions and ReLUs used again, sums, batch normalization, pooling."

    def __init__(self, seed, channels=3, depth=4, classes=4):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.draw = lambda n: int(torch.randint(n, (), generator=g))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = nn.Conv2d(1, channels, 3, padding=1)
            self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
            self.norm, self.relu = nn.BatchNorm2d(channels), nn.ReLU()
            self.pool, self.last = nn.MaxPool2d(2), nn.Linear(channels * 9, 8)
            self.square, self.out = nn.Linear(8, 8), nn.Linear(8, classes)
        self.plan = [(self.draw(4), self.draw(2), self.draw(10)) for _ in range(depth)]
        for v in (self.norm.running_mean, self.norm.running_var, self.norm.weight.data):
            v.uniform_(0.3, 2, generator=g)
        for p in self.parameters():
            p.requires_grad_(False).mul_(1.5)
        self.double().eval()

    def forward(self, x):
        values = [self.first(x)]
        for what, which, back in self.plan:
            v, other = values[-1], values[back % len(values)]
            made = (lambda: self.relu(v), lambda: self.convs[which](self.relu(v)), lambda: v + other,
                    lambda: self.norm(self.convs[which](v)) + other)[what]  # fmt: skip
            values.append(made())
        v = self.last(self.pool(values[-1].relu()).flatten(1))
        v = self.square(v.relu()) + v
        return self.out(torch.relu(self.square(v.relu()) + v))


@few
@given(seeds, st.integers(1, 12))
def test_no_point_is_below_a_bound_of_networks_with_sums_and_reuse(seed, free):
    F, (lo, hi, y, g) = Graph(seed), boxes(seed, free=free)
    assert any(isinstance(s.layer, Sum) for s in read_program(F).steps)
    low, seen = [bounds(F, lo, hi, y, m) for m in METHODS], smallest_seen(F, lo, hi, y, g, draws=12)
    for m, b in zip(METHODS, low):
        assert (b <= seen + 1e-9).all(), m
    for cheap, dear in zip(low, low[1:]):
        assert (dear >= cheap - 1e-12).all()


def test_boxes_of_one_image_done_together_in_networks_with_sums_and_reuse():
    gained = []
    for seed in range(25):
        F, (lo, hi, y, g) = Graph(seed), boxes(seed, n=1, free=6)
        t = torch.rand(2, 8, 1, 6, 6, generator=g, dtype=torch.float64).sort(0).values
        a, b, y = lo + (hi - lo) * t[0], lo + (hi - lo) * t[1], y.expand(8)
        m = bound_margins(read_program(F), a, b, y, "full", together=True)
        assert (m.low <= smallest_seen(F, a, b, y, g, draws=6) + 1e-9).all(), seed
        gained.append(float((m.low - bound_margins(read_program(F), a, b, y, "crown").low).mean()))
    assert sum(gained) > 0


@pytest.mark.parametrize("method", METHODS)
def test_a_box_of_no_width_gives_the_margins_of_a_network_with_sums(method):
    for seed in range(10):
        F, (lo, _, y, _) = Graph(seed), boxes(seed)
        out = F(lo)
        assert_close(bounds(F, lo, lo, y, method), out.gather(1, y[:, None]) - out)


def test_the_sum_of_two_sets_holds_every_sum_for_the_same_pixels():
    g = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    owner, pixel = torch.tensor([0, 1, 0, 1]), torch.tensor([3, 3, 5, 7])
    rows = lambda i: Patches(new(4, 2, 2, 3), (2, 2), ((i, 1), (2, 2 - i)), (5, 6))
    a, b = (
        Zonotope(new(2, 2, 5, 6), new(2, 2, 5, 6).abs(), (PixelGenerators(rows(i), owner, pixel, 2),)) for i in (0, 1)
    )
    low, high = added(a, b).bounds()
    xi, best = new(4, 200).sign(), torch.full_like(high, -math.inf)
    for t in range(200):
        values = [z.centre.index_add(0, owner, z.terms[0].rows.whole() * xi[:, t].view(4, 1, 1, 1)) for z in (a, b)]
        best = torch.maximum(best, values[0] + a.radius + values[1] + b.radius)
        assert (low - 1e-12 <= values[0] - a.radius + values[1] - b.radius).all()
    assert_close(best, high)


class Difference(nn.Module):
    "Two branches that differ in sign: nothing is left of them but a constant"

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.a, self.b, self.minus = nn.Linear(36, 20), nn.Linear(20, 9), nn.Linear(20, 9, bias=False)
            self.c, self.out = nn.Linear(9, 9), nn.Linear(9, 4)
        self.minus.weight.data = -self.b.weight.data
        self.double().requires_grad_(False)

    def forward(self, x):
        h = self.a(x.flatten(1)).relu()
        return self.out(self.c(self.b(h) + self.minus(h)).relu())


def test_a_sum_knows_the_errors_that_its_branches_have_in_common():
    F, (lo, hi, y, _) = Difference(), boxes(0)
    F.a.weight.mul_(4), F.b.weight.mul_(4), F.minus.weight.mul_(4)
    exact = F(lo).gather(1, y[:, None]) - F(lo)
    assert_close(bounds(F, lo, hi, y, "full"), exact)
    assert (bounds(F, lo, hi, y, "crown") < exact - 0.01).sum() > 15  # here the branches have radii


@few
@given(seeds, st.sampled_from([(1, 1000.0), (1, 20.0), (1, math.inf), None]), st.floats(0.01, 0.2))
def test_a_certified_image_of_a_network_with_sums_is_never_broken(seed, layer, eps):
    F, (x, _, _, g) = Graph(seed, depth=3), boxes(seed, n=8)
    model = F if layer is None else SoftQuantNet(F, SoftQuantize(*layer)).eval()
    y, radii = model(x).argmax(1), torch.linspace(0, eps, 8, dtype=torch.float64)
    c = certify(model, x, y, radii, boxes=7, slack=1e-6, leaf=8)
    assert c.robust[0] and not (c.robust & c.broken).any() and (model(c.x).argmax(1) != y)[c.broken].all()
    assert ((c.x - x).abs().flatten(1).amax(1) <= radii + 1e-12).all()
    for _ in range(100):
        t = radii.view(-1, 1, 1, 1) * (2 * torch.rand(x.shape, generator=g, dtype=torch.float64) - 1)
        assert (model((x + t).clamp(0, 1)).argmax(1) == y)[c.robust].all()
    assert pgd(model, x, y, radii, 10, eps / 3, setting="bpda_ste").correct_worst[c.robust].all()


def test_one_radius_for_each_image_is_what_each_gets_alone():
    x = boxes(3, n=6)[0]
    x = torch.where((x - 0.5).abs() < 0.4, x.round(), x)
    x.flatten(1)[:, 5:17] = 0.5 + 0.1 * (x.flatten(1)[:, 5:17] - 0.5)
    radii, settled = torch.tensor([0.0, 0.02, 0.05, 0.1, 0.2, 0.3], dtype=torch.float64), set()
    for seed in range(3):
        for alpha, proof in ((1000.0, certify), (math.inf, certify), (math.inf, exact_hard)):
            model = SoftQuantNet(Graph(seed), SoftQuantize(1, alpha)).eval()
            y = model(x).argmax(1)
            together = proof(model, x, y, radii)
            alone = [proof(model, x[i : i + 1], y[i : i + 1], float(e)) for i, e in enumerate(radii)]
            assert together.method == [m for c in alone for m in c.method]
            assert torch.equal(together.x, torch.cat([c.x for c in alone]))
            settled |= set(together.method)
    assert settled >= {"crown", "broken"}
    for wrong in (torch.zeros(5), torch.full((6,), math.nan), -0.1, math.inf, torch.zeros(6, 1)):
        with pytest.raises(ValueError, match="eps"):
            certify(model, x, y, wrong)


def linear(n=4, m=2):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(n, m)


class Twice(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Adding(nn.Sequential):
    "A Sequential that adds its input"

    def forward(self, x):
        return super().forward(x) + x


class With(nn.Module):
    "A network that calls `f(self, x)`"

    def __init__(self, f, **parts):
        super().__init__()
        self.f = f
        for name, m in parts.items():
            setattr(self, name, m)

    def forward(self, x):
        return self.f(self, x)


def changed(module, change):
    change(module)
    return nn.Sequential(nn.Flatten(), module)


def in_place(net, x):
    y = net.a(x)
    z = y
    y += x
    return net.b(z)


REFUSED = {
    "hook": (lambda: changed(linear(), lambda m: m.register_forward_hook(lambda m, a, out: -out)), "forward hooks"),
    "pre-hook": (lambda: changed(linear(), lambda m: m.register_forward_pre_hook(lambda m, a: None)), "forward hooks"),
    "own forward": (lambda: changed(linear(), lambda m: setattr(m, "forward", lambda x: x)), "forward of its own"),
    "subclass": (lambda: nn.Sequential(nn.Flatten(), Twice(4, 2)), "subclass of Linear"),
    "parametrized": (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(linear())), "subclass of Linear"),
    "training norm": (lambda: nn.Sequential(nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.Flatten(), linear()), "eval"),
    "training dropout": (lambda: nn.Sequential(nn.Flatten(), nn.Dropout(0.1), linear()), "eval"),
    "no statistics": (
        lambda: nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), nn.Flatten(), linear()).eval(),
        "images depend on each other",
    ),
    "tanh": (lambda: nn.Sequential(nn.Flatten(), nn.Tanh(), linear()), "F contains Tanh"),
    "function": (lambda: With(lambda net, x: net.a(x.flatten(1).exp()), a=linear()), "F contains exp"),
    "constant": (lambda: With(lambda net, x: net.a(x.flatten(1) + 1), a=linear()), "adds a number"),
    "control flow": (lambda: With(lambda net, x: net.a(x) if x.sum() > 0 else x, a=linear()), "cannot be read"),
    "in place": (lambda: With(in_place, a=linear(4, 4), b=linear()), "changed in place"),
    "input in place": (lambda: nn.Sequential(nn.Flatten(), nn.ReLU(inplace=True), linear()), "changes its input"),
    "not linear": (lambda: nn.Sequential(nn.Flatten(), linear(), nn.ReLU()), "last layer of F must be Linear"),
    "layer inside": (lambda: nn.Sequential(SoftQuantize(), nn.Flatten(), nn.Tanh(), linear()), "F contains"),
    "ceil": (lambda: nn.Sequential(nn.MaxPool2d(2, ceil_mode=True), nn.Flatten(), linear(1)), "ceil_mode"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_may_compute_something_else_is_refused_by_name(name):
    F, message = REFUSED[name]
    F, x, y = F(), torch.rand(3, 1, 2, 2), torch.zeros(3, dtype=torch.long)
    for call in (lambda: certify(F, x, y, 0.01), lambda: bounds(F, x, x, y)):
        with pytest.raises(ValueError, match=message):
            call()


def test_what_is_read_is_checked_against_the_network():
    state = {"factor": 1.0}

    class Hidden(nn.Module):
        "Depends on something outside, which changes after it was read"

        def __init__(self):
            super().__init__()
            self.a, self.b = linear(), nn.Linear(4, 2)

        def forward(self, x):
            return (self.a if state["factor"] == 1 else self.b)(x.flatten(1))

    F, x = Hidden(), torch.rand(5, 1, 2, 2)
    program = read_program(F)
    check_program(program, F, x)
    state["factor"] = 2.0
    with pytest.raises(ValueError, match="does not give F's own outputs"):
        check_program(program, F, x)
    with pytest.raises(ValueError, match="alone than among others"):
        check_program(None, lambda x: x.flatten(1) - x.flatten(1).mean(), x)
    low, F, y = x.bfloat16(), nn.Sequential(nn.Flatten(), linear()), torch.zeros(5, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16):
        under = bounds(F, x, x, y)
    assert torch.equal(under, bounds(F, x, x, y))
    with pytest.raises(ValueError, match="float32 or float64"):
        bounds(F.bfloat16(), low, low, y)


def test_the_whole_network_is_what_its_parts_say():
    class Shifted(SoftQuantNet):
        def forward(self, x):
            return super().forward(1 - x)

    class Wide(SoftQuantize):
        def forward(self, x):
            return 1 - super().forward(x)

    F, x, y = nn.Sequential(nn.Flatten(), linear()), torch.rand(5, 1, 2, 2), torch.zeros(5, dtype=torch.long)
    with pytest.raises(ValueError, match="behind its layer"):
        certify(Shifted(F, SoftQuantize()), x, y, 0.01)
    with pytest.raises(ValueError, match="reachable_box"):
        certify(SoftQuantNet(F, Wide()), x, y, 0.01)


def test_training_mode_and_hooks_are_refused_where_points_are_enumerated_too():
    F = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Tanh(), linear())
    hard, x, y = SoftQuantNet(F, SoftQuantize(1, math.inf)), torch.rand(3, 1, 2, 2), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match="training mode"):
        exact_hard(hard, x, y, 0.1)
    assert len(exact_hard(hard.eval(), x, y, 0.1).method) == 3


def test_a_subclassed_sequential_a_reused_relu_and_functions_are_read_as_they_compute():
    relu = nn.ReLU()
    block = Adding(nn.Linear(4, 4), relu, nn.Linear(4, 4))
    F = nn.Sequential(nn.Flatten(), linear(4, 4), relu, block, relu, nn.Identity(), nn.Dropout(), linear()).eval()
    x = torch.randn(50, 1, 2, 2)
    check_program(read_program(F), F, x)
    kinds = [type(s.layer).__name__ for s in read_program(F).steps]
    assert kinds.count("Maximum") == 3 and kinds.count("Sum") == 1 and len(kinds) == 9
    doubled = With(lambda net, x: net.a(torch.add(h := x.flatten(1), h)), a=linear())
    check_program(read_program(doubled), doubled, x)
    pooled = With(lambda net, x: net.a(net.c(h := torch.max_pool2d(x, 2)).flatten(1) + h.relu().flatten(1)),
                  a=linear(1), c=nn.Conv2d(1, 1, 1))  # fmt: skip
    check_program(read_program(pooled), pooled, x)
    with pytest.raises(NoBounds):
        read_program(CifarResNet((16, 16, 16, 16), 1).eval())


def test_norms_are_worked_into_the_layer_before_or_stand_alone_and_leave_the_network_as_it_was():
    F = nn.Sequential(
        *(nn.BatchNorm2d(1), nn.Conv2d(1, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU()),
        *(nn.BatchNorm2d(3), nn.Flatten(), nn.BatchNorm1d(108, affine=False)),
        *(nn.Linear(108, 8), nn.BatchNorm1d(8), nn.ReLU(), linear(8, 4)),
    )
    g = torch.Generator().manual_seed(0)
    for m in F:
        if hasattr(m, "running_var"):
            m.running_mean.normal_(generator=g), m.running_var.uniform_(0.5, 2, generator=g)
    F, before = F.double().eval(), {k: v.clone() for k, v in F.double().state_dict().items()}
    for p in F.parameters():
        p.requires_grad_(False)
    lo, hi, y, g = boxes(0)
    program = read_program(F)
    check_program(program, F, lo)
    assert [type(s.layer).__name__ for s in program.steps].count("Conv2d") == 3 and len(program.steps) == 9
    assert all(torch.equal(v, before[k]) for k, v in F.state_dict().items())
    for m in METHODS:
        assert (bounds(F, lo, hi, y, m) <= smallest_seen(F, lo, hi, y, g, draws=9) + 1e-9).all()


def test_logits_that_are_no_numbers_are_no_proof():
    F, x, y = nn.Sequential(nn.Flatten(), linear()), torch.rand(3, 1, 2, 2), torch.zeros(3, dtype=torch.long)
    layers = (SoftQuantize(), SoftQuantize(1, math.inf))
    for value in (math.nan, math.inf):
        F[1].bias.data[0] = value
        for model in (F, *(SoftQuantNet(F, S) for S in layers)):
            with pytest.raises(ValueError, match="not finite"):
                certify(model, x, y, 0.3)
    new = lambda *values: torch.tensor(values, dtype=torch.float64)
    F = nn.Sequential(nn.Flatten(), linear(4, 1), nn.ReLU(), linear(1, 2)).double()
    F[1].weight.data, F[1].bias.data = new(1e200, 0, 0, 0)[None], new(-5e199)
    F[3].weight.data, F[3].bias.data = new(1e200, 0)[:, None], new(1, 0)
    x = new(0, 0.1, 0.9, 0.45).view(4, 1, 1, 1).expand(4, 1, 2, 2)  # logits: inf and 0 above ½, else 1 and 0
    for model in (F, *(SoftQuantNet(F, S) for S in layers)):
        for method in ("crown", "full"):
            c = certify(model, x, y.new_zeros(4), 0.1, method=method)
            assert c.robust.tolist() == [True, True, False, False]


def test_chain():
    layers = [nn.Flatten(), linear()]
    assert [s.inputs for s in chain(layers).steps] == [(0,), (1,)] and chain(layers).path_to(1) == layers[:1]
