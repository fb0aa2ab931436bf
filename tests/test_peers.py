"""PGD and FGSM against independent implementations: the same start points, steps and loss give the same images."""

import foolbox
import pytest
import torch
import torchattacks
from foolbox.attacks import LinfPGD

from nsq_repro.attacks import SETTINGS, ball, fgsm, pgd, surrogate
from nsq_repro.data import load
from nsq_repro.networks import build

EPS, STEPS, STEP = 0.2, 5, 0.05


class Plain(torch.nn.Module):
    "A function as a module, which is what the libraries ask for."

    def __init__(self, f, owner):
        super().__init__()
        self.f, self.owner = f, owner

    def forward(self, x):
        return self.f(x)


@pytest.fixture(params=["plain", *SETTINGS])
def case(request):
    "A float64 network, alone or with a layer in each setting, and 4 images it classifies as it likes."
    layer = {} if request.param == "plain" else dict(K=1, alpha=30.0)
    net = build("mnist_cnn", seed=1, **layer).double().eval()
    x = load("digits").floats(slice(0, 4)).double()
    f = net if request.param == "plain" else surrogate(net, request.param)
    return net, f, request.param, x, net(x).argmax(1)


def ours(net, setting, x, y, **how):
    return pgd(net, x, y, EPS, STEPS, STEP, setting="pgd" if setting == "plain" else setting, **how).x_last


def test_the_case_is_not_trivial(case):
    net, f, setting, x, y = case
    moved = (ours(net, setting, x, y, random_start=False) - x).abs()
    assert (moved > 0.1).float().mean() > 0.2


def test_torchattacks(case):
    net, f, setting, x, y = case
    for random_start in (False, True):
        torch.manual_seed(5)
        peer = torchattacks.PGD(Plain(f, net).eval(), eps=EPS, alpha=STEP, steps=STEPS, random_start=random_start)(x, y)
        torch.manual_seed(5)
        start = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1) if random_start else x
        torch.testing.assert_close(ours(net, setting, x, y, x_start=start), peer, atol=1e-6, rtol=0)


def test_foolbox(case):
    net, f, setting, x, y = case
    box = ball(x, EPS)
    start = torch.minimum(
        torch.maximum(x + EPS * torch.linspace(-1, 1, x[0].numel(), dtype=x.dtype).view_as(x[:1]), box[0]), box[1]
    )

    class FromStart(LinfPGD):
        def get_random_start(self, x0, epsilon):
            return type(x0)(start)

    peer = FromStart(abs_stepsize=STEP, steps=STEPS, random_start=True)
    images, _, _ = peer(foolbox.PyTorchModel(Plain(f, net).eval(), bounds=(0, 1)), x, y, epsilons=EPS)
    torch.testing.assert_close(ours(net, setting, x, y, x_start=start), images, atol=1e-6, rtol=0)


def test_fgsm(case):
    net, f, setting, x, y = case
    peer = torchattacks.FGSM(Plain(f, net).eval(), eps=EPS)(x, y)
    torch.testing.assert_close(
        fgsm(net, x, y, EPS, setting="pgd" if setting == "plain" else setting), peer, atol=1e-6, rtol=0
    )
