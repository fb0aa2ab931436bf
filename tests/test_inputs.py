"""What attacks and evaluations are given: inputs, each with the line that refuses it, and networks left as found."""

import copy
import functools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from nsq_repro.attacks import SETTINGS, fgsm, pgd, surrogate, taken_apart
from nsq_repro.evaluation import AttackSpec, accuracy_vs_eps
from nsq_repro.exact import (
    bracket,
    closed_form,
    flip_search,
    gradient_table,
    reachable_box,
    sanity_record,
    standard_attack,
    union,
    zbox,
    zero_gradient_share,
)
from nsq_repro.networks import SoftQuantNet
from nsq_repro.quantization import SoftQuantize
from nsq_repro.training import TrainSpec, recipe

pytestmark = pytest.mark.reliability
SHAPE, CLASSES = (1, 4, 4), 5


def network(layer=True, seed=0, alpha=200.0, **range_):
    "A small network behind a layer, or without, in eval mode."
    torch.manual_seed(seed)
    F = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, CLASSES))
    return (SoftQuantNet(F, SoftQuantize(1, alpha, **range_)) if layer else F).eval()


def images(net, n=6, low=0.0, high=1.0):
    torch.manual_seed(1)
    x = low + (high - low) * torch.rand(n, *SHAPE)
    return x, net(x).argmax(1)


few = dict(steps=2, step_size=0.05)
ATTACKS = {
    "fgsm": fgsm,
    **{s: lambda *a, s=s, **k: pgd(*a, **{**few, "setting": s, **k}) for s in SETTINGS},
    "zbox": lambda *a, **k: zbox(*a, **{"steps": 2, **k}),
    "flips": lambda *a, **k: flip_search(*a, **{"flips": 1, **k}),
    "spsa": lambda *a, **k: standard_attack("spsa", *a, **{"steps": 2, "samples": 2, **k}),
    "square": lambda *a, **k: standard_attack("square", *a, **{"n_queries": 2, **k}),
    "apgd": lambda *a, **k: standard_attack("apgd-ce", *a, **{"steps": 2, "backward": "ste", **k}),
    "eot": lambda *a, **k: standard_attack("eot", *a, **{"steps": 2, "draws": 1, **k}),
    "annealed": lambda *a, **k: standard_attack("annealed", *a, **{"steps": 2, **k}),
    "zeros": zero_gradient_share,
    "gradients": lambda *a, **k: gradient_table(*a, **{**few, **k}),
    "sanity": lambda *a, **k: sanity_record(*a, **{"steps": 2, "tries": 1, **k}),
    "curve": lambda m, x, y, e, **k: accuracy_vs_eps(m, x, y, **{**few, "eps": (e,), "losses": ("ce",), **k}),
}
NEEDS_PARTS = [a for a in ATTACKS if a not in ("fgsm", "pgd", "spsa", "square")]


class Bad(nn.Module):
    "A network that gives what `make` makes of its logits."

    def __init__(self, make):
        super().__init__()
        self.inner, self.make = network(layer=False), make

    def forward(self, x):
        return self.make(self.inner(x))


class InPlace(nn.Module):
    def forward(self, x):
        with torch.no_grad():
            return x.sub_(0.5).flatten(1)[:, :CLASSES]


def pixel(value):
    def change(x):
        x = x.clone()
        x[-1, 0, 0, 0] = value
        return x

    return change


# what is changed, how, and the words that refuse it, for every attack
IMAGES = {
    "normalized": (lambda x: (x - 0.13) / 0.31, "outside \\[0, 1\\]; put the normalization"),
    "bytes as floats": (lambda x: 255 * x, "outside \\[0, 1\\]; divide by 255"),
    "one pixel above": (pixel(1.5), "outside"),
    "one pixel below": (pixel(-0.5), "outside"),
    "rounding": (pixel(1.0001), "x.clamp\\(0, 1\\)"),
    "nan": (pixel(math.nan), "not finite"),
    "inf": (pixel(math.inf), "not finite"),
    "bytes": (lambda x: (255 * x).byte(), "uint8"),
    "whole numbers": (lambda x: x.round().long(), "int64"),
    "half precision": (lambda x: x.half(), "float16"),
    "bfloat16": (lambda x: x.bfloat16(), "bfloat16"),
    "numpy": (lambda x: x.numpy(), "torch.as_tensor"),
    "list": (lambda x: x.tolist(), "list"),
    "none": (lambda x: x[:0], "at least one image"),
    "one image without a batch": (lambda x: x[0], "one label for each"),
    "flat": (lambda x: x.flatten(), "N, C, H, W"),
    "too wide": (lambda x: torch.cat([x, x], 3), "the network does not take these images"),
    "float64": (lambda x: x.double(), "the network does not take these images"),
}
LABELS = {
    "floats": (lambda y: y.float(), "float32"),
    "booleans": (lambda y: y > 0, "bool"),
    "numpy": (lambda y: y.numpy(), "ndarray"),
    "list": (lambda y: y.tolist(), "list"),
    "one hot": (lambda y: nn.functional.one_hot(y, CLASSES), "one label for each"),
    "too few": (lambda y: y[:-1], "one label for each"),
    "too many": (lambda y: torch.cat([y, y]), "one label for each"),
    "negative": (lambda y: y - 9, "labels are 0 to"),
    "from 1": (lambda y: torch.full_like(y, CLASSES), f"{CLASSES} classes"),
    "elsewhere": (lambda y: y.to("meta"), "one device"),
}
RADII = {
    "bytes": (8, "8/255, not 8"),
    "negative": (-0.1, "\\[0, 1\\]"),
    "nan": (math.nan, "\\[0, 1\\]"),
    "inf": (math.inf, "\\[0, 1\\]"),
    "text": ("0.1", "\\[0, 1\\]"),
    "none": (None, "\\[0, 1\\]"),
    "true": (True, "\\[0, 1\\]"),
    "too many": (torch.full((7,), 0.1), "\\[0, 1\\]"),
    "one of them nan": (torch.tensor([0.1, 0.1, math.nan, 0.1, 0.1, 0.1]), "\\[0, 1\\]"),
}
NETWORKS = {
    "nan logits": (lambda: Bad(lambda z: z * math.nan), "not finite"),
    "an inf logit": (lambda: Bad(lambda z: z / torch.tensor([1.0, 1, 1, 1, 0])), "not finite"),
    "one logit": (lambda: Bad(lambda z: z[:, :1]), "at least two classes"),
    "flat logits": (lambda: Bad(lambda z: z[:, 0]), "at least two classes"),
    "maps": (lambda: Bad(lambda z: z[:, :, None, None]), "at least two classes"),
    "a tuple": (lambda: Bad(lambda z: (z, z)), "a tuple"),
    "a dictionary": (lambda: Bad(lambda z: {"logits": z}), "a dict"),
    "one row": (lambda: Bad(lambda z: z[:1]), "expected logits"),
    "numpy": (lambda: Bad(lambda z: z.detach().numpy()), "a ndarray"),
    "other pixels": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), "does not take these images"),
    "float64": (lambda: network().double(), "does not take these images"),
    "elsewhere": (lambda: network().to("meta"), "does not take these images|not a network|takes|device"),
    "in place": (lambda: InPlace(), "in place"),
    "text": (lambda: "net", "not a network|cannot be taken apart|nn.Module"),
}


def given(kind, value):
    "Arguments (model, x, y, eps) of which one is wrong."
    net = network()
    x, y = images(net)
    arguments = dict(model=net, x=x, y=y, eps=0.1)
    arguments[kind] = value(arguments[kind]) if kind in ("x", "y") else value() if kind == "model" else value
    return arguments["model"], arguments["x"], arguments["y"], arguments["eps"]


TABLE = [
    (attack, kind, name, *case)
    for attack in ATTACKS
    for kind, cases in (("x", IMAGES), ("y", LABELS), ("eps", RADII), ("model", NETWORKS))
    for name, case in cases.items()
]


@pytest.mark.parametrize("attack, kind, name, value, words", TABLE, ids=lambda v: v if isinstance(v, str) else "")
def test_one_line_refuses(attack, kind, name, value, words):
    with pytest.raises(ValueError, match=words) as refused:
        ATTACKS[attack](*given(kind, value))
    assert "\n" not in str(refused.value)


OPTIONS = [
    ("pgd", "steps", 0, "steps=0"), ("pgd", "steps", 2.5, "whole number"), ("pgd", "steps", "9", "whole number"),
    ("pgd", "steps", True, "whole number"), ("pgd", "steps", None, "whole number"),
    ("pgd", "step_size", math.nan, "step_size=nan"), ("pgd", "step_size", math.inf, "step_size=inf"),
    ("pgd", "step_size", -0.1, "step_size=-0.1"), ("pgd", "step_size", "0.1", "step_size='0.1'"),
    ("pgd", "restarts", 0, "restarts=0"), ("pgd", "restarts", 1.5, "restarts=1.5"),
    ("pgd", "loss", "mse", "ce, cw, dlr"), ("pgd", "loss", ["ce"], "ce, cw, dlr"), ("pgd", "loss", None, "ce, cw, dlr"),
    ("pgd", "setting", "eot", "bpda_ste"), ("pgd", "setting", None, "bpda_ste"),
    ("pgd", "seed", 1.5, "seed=1.5"), ("pgd", "seed", "1", "seed='1'"), ("pgd", "seed", None, "seed=None"),
    ("pgd", "index", torch.arange(3), "one whole number for each"), ("pgd", "index", torch.rand(6), "whole number"),
    ("pgd", "index", torch.zeros(1, dtype=torch.int64), "one whole number for each"),
    ("pgd", "x_start", torch.rand(1, *SHAPE), "shape of x"),
    ("pgd", "x_start", torch.full((6, *SHAPE), math.nan), "finite"),
    ("zbox", "steps", 0, "steps=0"), ("zbox", "steps", 2.5, "steps=2.5"), ("zbox", "restarts", 0, "restarts=0"),
    ("zbox", "targets", 0, "targets=0"), ("zbox", "targets", 1.5, "targets=1.5"),
    ("zbox", "step_size", math.nan, "step_size=nan"), ("zbox", "method", "fab", "apgd"),
    ("zbox", "loss", "mse", "ce, cw, dlr"), ("zbox", "seed", 1.5, "seed=1.5"),
    ("zbox", "index", torch.arange(3), "one whole number for each"),
    ("flips", "flips", 0, "flips=0"), ("flips", "batch_size", 0, "batch_size=0"),
    ("spsa", "backward", "bpda", "'ste'"), ("spsa", "steps", 0, "steps=0"), ("spsa", "steps", 2.5, "steps=2.5"),
    ("zeros", "at", "end", "'start' or 'steps'"), ("zeros", "steps", 0, "steps=0"), ("zeros", "seed", 1.5, "seed=1.5"),
    ("zeros", "step_size", math.nan, "step_size=nan"), ("sanity", "tries", 0, "tries=0"),
    ("sanity", "steps", 0, "steps=0"),
    ("sanity", "setting", "eot", "bpda_ste"), ("gradients", "loss", "mse", "ce, cw, dlr"),
    ("curve", "steps", 2.5, "steps=2.5"), ("curve", "step_size", "0.1", "step_size='0.1'"),
    ("curve", "step_size", math.nan, "step_size=nan"), ("curve", "random_start", "no", "True or False"),
    ("curve", "restarts", 0, "restarts=0"), ("curve", "losses", (), "nothing to attack with"),
    ("curve", "losses", ("mse",), "ce, cw, dlr"), ("curve", "settings", ("eot",), "bpda_ste"),
    ("curve", "batch_size", 0, "batch_size=0"), ("curve", "batch_size", -1, "batch_size=-1"),
    ("curve", "eps", 0.1, "increasing radii"), ("curve", "eps", (), "increasing radii"),
    ("curve", "eps", (0.2, 0.1), "increasing radii"), ("curve", "eps", ("a",), "increasing radii"),
    ("curve", "seed", 0.5, "seed=0.5"),
]


@pytest.mark.parametrize("attack, option, value, words", OPTIONS, ids=lambda v: v if isinstance(v, str) else "")
def test_one_line_refuses_an_option(attack, option, value, words):
    with pytest.raises(ValueError, match=words) as refused:
        ATTACKS[attack](*given("eps", 0.1), **{option: value})
    assert "\n" not in str(refused.value)


NEEDS = "needs one"
SPECS = [
    (lambda: TrainSpec(), NEEDS), (lambda: TrainSpec("pgd"), NEEDS), (lambda: TrainSpec("nsq", K=1, alpha=9.0), NEEDS),
    (lambda: TrainSpec("natural", K=1, alpha=9.0), "works without"),
    (lambda: TrainSpec("natural", noise=0.1), "works without"),
    (lambda: TrainSpec("sq", K=1, alpha=9.0, eps=0.1, steps=1, step_size=0.1), "works without"),
    (lambda: TrainSpec("stability", K=1, alpha=9.0, noise=0.1), NEEDS), (lambda: TrainSpec("l1"), NEEDS),
    (lambda: TrainSpec("nqs"), "natural, noisy"), (lambda: TrainSpec(["nsq"]), "natural, noisy"),
    (lambda: recipe("nqs"), "natural, noisy"), (lambda: recipe("natural", network="resnet"), "mnist_cnn"),
    (lambda: recipe("natural", lr="0.1"), "lr='0.1'"), (lambda: recipe("natural", lr=math.nan), "lr=nan"),
    (lambda: recipe("natural", lr=True), "lr=True"), (lambda: recipe("natural", iterations=10.0), "iterations=10.0"),
    (lambda: recipe("natural", batch_size="20"), "batch_size='20'"), (lambda: recipe("natural", seed=1.5), "seed=1.5"),
    (lambda: recipe("natural", augment="no"), "augment='no'"),
    (lambda: recipe("natural", weight_decay=-1), "weight_decay"),
    (lambda: recipe("natural", precision="fp16"), "bf16"), (lambda: recipe("natural", schedule="step"), "onecycle"),
    (lambda: recipe("natural", optimizer="lion"), "sgd"), (lambda: recipe("nsq", noise="0.3"), "noise='0.3'"),
    (lambda: recipe("nsq", noise=16), "16/255"), (lambda: recipe("nsq", noise=math.nan), "noise=nan"),
    (lambda: recipe("nsq", K=1.0), "K=1.0"), (lambda: recipe("nsq", K=True), "K=True"),
    (lambda: recipe("nsq", K=0), "K=0"),
    (lambda: recipe("nsq", alpha=math.nan), "alpha=nan"), (lambda: recipe("nsq", alpha="7"), "alpha='7'"),
    (lambda: recipe("nsq", noise_shape="square"), "signs"), (lambda: recipe("nsq", shift=0.7), "shift=0.7"),
    (lambda: recipe("natural", shift=0.1), "layer"), (lambda: recipe("pgd", eps=8), "8/255"),
    (lambda: recipe("pgd", eps="0.1"), "eps='0.1'"), (lambda: recipe("pgd", steps=0), "steps=0"),
    (lambda: recipe("pgd", steps=2.0), "steps=2.0"), (lambda: recipe("pgd", step_size=math.inf), "step_size=inf"),
    (lambda: recipe("pgd", warmup=2), "share"), (lambda: recipe("pgd", craft_mode="test"), "'eval'"),
    (lambda: SoftQuantNet(SoftQuantize(1, 9.0), network(layer=False)), "the network comes first"),
    (lambda: AttackSpec(eps=0.1), "increasing radii"), (lambda: AttackSpec(steps="9"), "steps='9'"),
    (lambda: standard_attack("autoattack", *given("eps", 0.1), sqare={}), "no part 'sqare'"),
    (lambda: standard_attack("fab", *given("eps", 0.1)), "fab-t"),
    (lambda: sanity_record(*given("eps", 0.0)), "above 0"),
    (lambda: standard_attack("spsa", *given("eps", torch.full((6,), 0.1))), "one eps"),
    (lambda: union({}), "one boolean"), (lambda: union({"a": [0.3, 0.8]}), "not an accuracy"),
    (lambda: union({"a": [True], "b": [True, False]}), "one boolean"),
    (lambda: bracket([0.1], [[True]], [[0.5]]), "not an accuracy"),
]


@pytest.mark.parametrize("make, words", SPECS, ids=[str(k) for k in range(len(SPECS))])
def test_one_line_refuses_a_description(make, words):
    with pytest.raises(ValueError, match=words):
        make()


ACCEPTED = {
    "labels of 32 bits": lambda m, x, y, e: (m, x, y.int(), e),
    "labels of 8 bits": lambda m, x, y, e: (m, x, y.byte(), e),
    "images that ask for gradients": lambda m, x, y, e: (m, x.clone().requires_grad_(), y, e),
    "images in channels_last": lambda m, x, y, e: (m, x.to(memory_format=torch.channels_last), y, e),
    "a radius from numpy": lambda m, x, y, e: (m, x, y, np.float64(e)),
    "a radius that asks for gradients": lambda m, x, y, e: (m, x, y, torch.tensor(e, requires_grad=True)),
    "a network in training mode": lambda m, x, y, e: (copy.deepcopy(m).train(), x, y, e),
    "a frozen network": lambda m, x, y, e: (copy.deepcopy(m).requires_grad_(False), x, y, e),
    "a wrapped network": lambda m, x, y, e: (nn.DataParallel(m), x, y, e),
}


def found(result):
    "What can be compared of a result."
    return [t for t in result if isinstance(t, torch.Tensor)] if isinstance(result, tuple) else [result]


@pytest.mark.parametrize("how", ACCEPTED)
@pytest.mark.parametrize("attack", ATTACKS)
def test_these_change_nothing(attack, how):
    if attack in ("sanity", "spsa", "square", "apgd", "eot", "annealed", "curve", "zeros") and "radius" in how:
        pytest.skip("takes a number")
    usual = given("eps", 0.1)
    torch.manual_seed(0)
    expected = found(ATTACKS[attack](*usual))
    torch.manual_seed(0)
    got = found(ATTACKS[attack](*ACCEPTED[how](*usual)))
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a, b) and not b.requires_grad if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("attack", ["fgsm", *SETTINGS, "zbox", "flips"])
def test_one_radius_for_each_image(attack):
    net, x, y, _ = given("eps", 0.1)
    radii = torch.linspace(0, 0.3, len(x))
    together = found(ATTACKS[attack](net, x, y, radii))[0]
    assert ((together - x).flatten(1).abs().amax(1) <= radii + 1e-6).all()
    for some in (radii.tolist(), radii.numpy(), radii.double()):
        assert torch.equal(found(ATTACKS[attack](net, x, y, some))[0], together)


# networks behind the layer

WRAPPED = {
    "DataParallel": nn.DataParallel,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "Sequential": lambda m: nn.Sequential(nn.Identity(), m),
    "nested": lambda m: nn.Sequential(nn.DataParallel(nn.Sequential(m, nn.Identity())), nn.Identity()),
    "parts in a Sequential": lambda m: nn.Sequential(m.quantize, m.features),
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "compiled inside": lambda m: nn.DataParallel(torch.compile(m, backend="eager")),
    "with straight-through gradients": lambda m: surrogate(m, "bpda_ste"),
}


class Subclass(SoftQuantNet):
    def forward(self, x):
        return self.features(self.quantize(x)) + self.features(x)


class Wrapper(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.module = net

    def forward(self, x):
        return self.module(1 - x)


class InAList(Wrapper):
    def __init__(self, net):
        nn.Module.__init__(self)
        self.nets = [net]

    def forward(self, x):
        return self.nets[0](x)


class Residual(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + x.flatten(1)[:, :CLASSES]


def hooked(net):
    net = copy.deepcopy(net)
    net.register_forward_hook(lambda m, i, o: o.flip(1))
    return net


def traced(net):
    return torch.jit.trace(net, torch.rand(2, *SHAPE))


HIDDEN = {
    "function": lambda m: lambda x: m(x),
    "bound method": lambda m: m.forward,
    "a layer of the output": lambda m: nn.Sequential(m, nn.Softmax(1)),
    "a layer before it": lambda m: nn.Sequential(nn.Dropout(0.0), m),
    "a module of one's own": Wrapper,
    "in a list": InAList,
    "a subclass with a forward of its own": lambda m: Subclass(m.features, m.quantize).eval(),
    "a Sequential with a forward of its own": lambda m: Residual(m.quantize, m.features),
    "a hook": hooked,
    "traced": traced,
    "exported": lambda m: torch.export.export(m, (torch.rand(2, *SHAPE),)).module(),
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("how", WRAPPED)
def test_a_layer_inside_a_wrapper_is_found(attack, how):
    net, x, y, e = given("eps", 0.3)
    wrapped = WRAPPED[how](net)
    if attack in ("zeros", "gradients") and "compiled" in how:
        pytest.skip("copied, which PyTorch does not do with compiled networks")
    if how.startswith("with") and attack in ("fgsm", "pgd", "square", "spsa", "zeros", "gradients", "sanity", "curve"):
        pytest.skip("its gradients are others")
    results = []
    for m in (net, wrapped):
        torch.manual_seed(0)
        results.append(found(ATTACKS[attack](m, x, y, e)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@functools.cache
def hidden_network(how):
    "The network of `given`, with its layer out of reach."
    return HIDDEN[how](network())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("attack", NEEDS_PARTS)
@pytest.mark.parametrize("how", HIDDEN)
def test_a_layer_that_cannot_be_reached_is_an_error(attack, how):
    _, x, y, e = given("eps", 0.3)
    with pytest.raises(ValueError, match="SoftQuantNet|nn.Module"):
        ATTACKS[attack](hidden_network(how), x, y, e)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", HIDDEN)
def test_the_whole_of_it_is_attacked_all_the_same(how):
    _, x, y, e = given("eps", 0.3)
    hidden = hidden_network(how)
    if how == "exported":
        pytest.skip("runs on two images only")
    r = pgd(hidden, x, y, e, **few)
    with torch.no_grad():
        assert torch.equal(hidden(r.x_last).argmax(1) == y, r.correct_last)


def test_a_layer_without_an_inverse_is_refused_by_the_box_attack_alone():
    class Round(nn.Module):
        def forward(self, x):
            return x.round()

    net = SoftQuantNet(network(layer=False), Round()).eval()
    x, y = images(net)
    assert pgd(net, x, y, 0.3, **few, setting="bpda_ste").x.shape == x.shape
    for attack in (zbox, flip_search, reachable_box):
        with pytest.raises(ValueError, match="inverse"):
            attack(net, x, *([0.3] if attack is reachable_box else [y, 0.3]))
    with pytest.raises(ValueError, match="SoftQuantNet with a finite alpha"):
        closed_form(net)


def test_networks_without_a_layer_are_themselves():
    net = network(layer=False)
    for m in (net, nn.DataParallel(net), nn.Sequential(nn.Identity(), net), torch.compile(net, backend="eager")):
        assert taken_apart(m) == (net, None) and surrogate(m, "bpda_ste") is m


# the range of the layer


@pytest.mark.parametrize("attack", [a for a in ATTACKS if a not in ("curve",)])
def test_a_layer_with_another_range_is_attacked_in_it(attack):
    unit, wide = network(alpha=20.0), network(alpha=20.0, vmin=-1.0, vmax=3.0)
    u, y = images(unit)
    with torch.no_grad():  # wide(4 u − 1) = unit(u)
        first, other = wide.features[1], unit.features[1]
        first.weight.copy_(other.weight / 4), first.bias.copy_(other.bias + other.weight.sum(1) / 4)
    assert torch.allclose(wide(4 * u - 1), unit(u), atol=1e-4)
    how = {"step_size": 0.05} if attack in ("pgd", "bpda", "bpda_ste", "zeros", "gradients") else {}
    results = []
    for m, x, e, scale in ((unit, u, 0.2, 1), (wide, 4 * u - 1, 0.8, 4)):
        torch.manual_seed(0)
        results.append(found(ATTACKS[attack](m, x, y, e, **{k: scale * v for k, v in how.items()})))
    if isinstance(results[0][0], torch.Tensor):
        moved = (results[1][0] - (4 * u - 1)).abs()
        assert moved.max() <= 0.8 + 1e-5 and results[1][0].min() >= -1 and results[1][0].max() <= 3
        assert ((results[1][0] - (4 * results[0][0] - 1)).abs() < 1e-3).float().mean() > 0.9
    elif attack == "sanity":
        a, b = (r[0] for r in results)
        assert b["by_eps"][-1][0] == 4.0 and all(abs(a["correct"][k] - b["correct"][k]) <= 1 for k in a["correct"])
    elif attack == "gradients":
        assert [r["correct"] for r in results[0][0]] == [r["correct"] for r in results[1][0]]
    else:
        assert abs(results[0][0]["zero"] - results[1][0]["zero"]) < 0.05


# networks are left as they were found


class Draws(nn.Module):
    "A network that draws random numbers."

    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, x):
        z = self.inner(x)
        return z + 0.3 * torch.randn_like(z)


def busy():
    "A network with much that could be changed: batch norm, dropout, a part in eval mode, a frozen weight, hooks."
    torch.manual_seed(0)
    F = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.BatchNorm1d(12), nn.Dropout(0.5), nn.Linear(12, CLASSES))
    net = SoftQuantNet(F, SoftQuantize(1, 200.0)).train()
    F[3].eval()
    F[1].weight.requires_grad_(False)
    F[1].register_forward_hook(lambda m, i, o: None)
    F[4].weight.grad = torch.ones_like(F[4].weight)
    return net


def state(net):
    "All of it that can be compared."
    modules = [(m.training, len(m._forward_hooks), len(m._backward_hooks), set(vars(m))) for m in net.modules()]
    flags = [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in net.parameters()]
    return modules, [f for f, _ in flags], [g for _, g in flags], {k: v.clone() for k, v in net.state_dict().items()}


def assert_same(a, b):
    assert a[0] == b[0] and a[1] == b[1] and a[3].keys() == b[3].keys()
    assert all(p is q is None or torch.equal(p, q) for p, q in zip(a[2], b[2]))
    assert all(torch.equal(a[3][k], b[3][k]) for k in a[3])


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_network_is_left_as_it_was_found(attack):
    net = busy()
    x = torch.rand(6, *SHAPE, requires_grad=True)
    y, before, pixels = copy.deepcopy(net).eval()(x).argmax(1), state(net), x.detach().clone()
    draws = torch.get_rng_state()
    ATTACKS[attack](net, x, y, 0.1)
    assert_same(before, state(net))
    assert torch.equal(x, pixels) and x.grad is None and torch.equal(draws, torch.get_rng_state())


@pytest.mark.parametrize("attack", ATTACKS)
def test_also_when_the_attack_ends_with_an_error(attack):
    net = busy()
    x, y = images(network())
    calls = iter(range(1000))

    def dies(m, inputs):
        if len(inputs[0]) > 2 and next(calls) > 0:
            raise KeyboardInterrupt

    hook = net.features.register_forward_pre_hook(dies)
    before = state(net)
    try:
        ATTACKS[attack](net, x, y, 0.1)
    except KeyboardInterrupt:
        pass
    assert_same(before, state(net))
    hook.remove()


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_modes_around_an_attack_do_not_matter(attack, mode):
    net, x, y, e = given("eps", 0.2)
    results = []
    for around in (torch.enable_grad, mode):
        torch.manual_seed(0)
        with around():
            results.append(found(ATTACKS[attack](net, x.clone(), y, e)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_a_network_made_in_inference_mode_says_so():
    with torch.inference_mode():
        net = network()
    x, y = images(network())
    with pytest.raises(ValueError, match="inference_mode"):
        pgd(net, x, y, 0.1, **few)


def test_a_network_without_a_gradient_says_so():
    class Detached(nn.Module):
        def forward(self, x):
            return x.detach().flatten(1)[:, :CLASSES]

    x, y = images(network())
    with pytest.raises(ValueError, match="differentiate"):
        pgd(Detached(), x, y, 0.1, **few)


@pytest.mark.parametrize("attack", [a for a in ATTACKS if a not in ("fgsm", "annealed", "gradients")])
def test_nan_along_the_way_is_no_verdict(attack):
    class Fragile(nn.Module):
        "NaN away from the clean images."

        def __init__(self, x):
            super().__init__()
            self.x, self.net = x, network(layer=False)

        def forward(self, x):
            near = (x[:, None] - self.x).abs().flatten(2).amax(2).amin(1) < 0.01
            return torch.where(near[:, None], self.net(x), math.nan)

    x, y = images(network(layer=False))
    with pytest.raises(ValueError, match="not finite"):
        ATTACKS[attack](Fragile(x), x, y, 0.2)


def test_skipping_is_for_networks_that_draw_nothing():
    net = Draws()
    x, y = images(net.inner, n=100)
    kept = []
    for skip in (None, True, False):
        torch.manual_seed(0)
        kept.append(pgd(net, x, y, 0.2, 30, 0.02, skip_cycles=skip))
    assert all(torch.equal(a.x, b.x) and torch.equal(a.correct_worst, b.correct_worst) for a in kept for b in kept)


def test_skipping_sees_noise_that_is_not_torchs():
    class Numpy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.noise = network(), np.random.RandomState(0)

        def forward(self, x):
            z = self.inner(x)
            return z + torch.from_numpy(self.noise.randn(*z.shape)).float()

    x, y = images(network(), n=50)
    kept = [pgd(Numpy(), x, y, 0.2, 30, 0.02, skip_cycles=s).correct_worst.sum() for s in (None, False)]
    assert abs(kept[0] - kept[1]) <= 10


def test_paths_that_do_not_repeat_cost_one_look_at_two_images():
    net, seen = network(layer=False), []
    x, y = images(net)
    net.register_forward_hook(lambda module, given, logits: seen.append(len(logits)))
    pgd(net, x, y, 0.2, 5, 1e-3, random_start=False)
    assert seen == [2, *[len(x)] * 6]  # five gradients and the verdict on the last iterate


# precision

SWITCHES = {
    "none": "pass",
    "all ieee": "b.fp32_precision = 'ieee'",
    "all tf32": "b.fp32_precision = 'tf32'",
    "old, matmul": "b.cuda.matmul.allow_tf32 = True",
    "old, cudnn": "b.cudnn.allow_tf32 = False",
    "old, medium": "torch.set_float32_matmul_precision('medium')",
    "mkldnn bf16": "b.mkldnn.matmul.fp32_precision = 'bf16'; b.mkldnn.conv.fp32_precision = 'bf16'",
    "cudnn": "b.cudnn.deterministic = True; b.cudnn.benchmark = True",
}
PROGRAM = """
import json, os, sys, traceback, torch; b = torch.backends
from nsq_repro.attacks import pgd, full_precision
def look():
    out = [b.cudnn.deterministic, b.cudnn.benchmark]
    for place in (b, b.cuda.matmul, b.cudnn, b.cudnn.conv, b.cudnn.rnn, b.mkldnn, b.mkldnn.matmul, b.mkldnn.conv):
        for name in ("fp32_precision", "allow_tf32"):
            try: out.append(getattr(place, name))
            except Exception as e: out.append(type(e).__name__)
    return out
def check(switch, follow):
    exec(switch)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10)); x = torch.rand(2, 1, 28, 28)
    before, y = look(), net(x).argmax(1)
    pgd(net, x, y, .1, steps=2)
    w = torch.rand(64, 64); exact = (w.double() @ w.double())
    assert (full_precision(lambda: w @ w)() - exact).abs().max() < 1e-4
    assert look() == before, (before, look())
    if hasattr(b, "fp32_precision") and follow:
        b.fp32_precision = "tf32"  # what the attack switched off follows the general switch again
        assert b.mkldnn.matmul.fp32_precision == "tf32"
for name, switch in json.loads(sys.argv[1]).items():
    if not os.fork():  # PyTorch as it is when it has been imported, for each switch
        try: check(switch, "all" in name)
        except BaseException: print(name, traceback.format_exc(), sep=": ", flush=True)
        else: print(name, "ok", sep=": ", flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def switched():
    "What was found in a process for each switch."
    command = [sys.executable, "-c", PROGRAM, json.dumps(SWITCHES)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("switch", SWITCHES)
def test_precision_switches_are_off_inside_and_on_again(switch, switched):
    assert f"{switch}: ok" in switched.splitlines(), switched[-2000:]


def count():
    "How many inputs are refused here, each with its line."
    return len(TABLE) + len(OPTIONS) + len(SPECS) + len(HIDDEN) * len(NEEDS_PARTS)
