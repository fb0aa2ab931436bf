"""Networks and checkpoints: seeds, models of one's own, files that are cut, flipped, foreign or written by a
killed run."""

import copy
import itertools
import os
import random
import signal
import time

import pytest
import safetensors.torch
import torch
from processes import PROCESSES
from torch import nn

from nsq_repro.networks import (
    NETWORKS,
    CifarResNet,
    ResidualUnit,
    SoftQuantNet,
    build,
    load_checkpoint,
    save_checkpoint,
)
from nsq_repro.quantization import SoftQuantize


@pytest.fixture
def mine(monkeypatch):
    "A small registered network with running statistics and a counter among its tensors."
    make = lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    monkeypatch.setitem(NETWORKS, "mine", make)
    model = build("mine", K=2, alpha=50.0, seed=5)
    model(torch.rand(8, 1, 9, 9))
    return model


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_random_state_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a = build("mnist_cnn", seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    assert equal(a, build("mnist_cnn", seed=7)) and not equal(a, build("mnist_cnn", seed=8))


def test_random_state_after_a_failure(monkeypatch):
    monkeypatch.setitem(NETWORKS, "broken", lambda: torch.rand(3) / {}["no"])
    before = torch.get_rng_state()
    with pytest.raises(KeyError):
        build("broken")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "args, says",
    [
        (dict(network="MNIST"), "'mnist_cnn'"),
        (dict(network=None), "'mnist_cnn'"),
        (dict(network=["mnist_cnn"]), "'mnist_cnn'"),
        (dict(network="mnist_cnn", K=1), "both"),
        (dict(network="mnist_cnn", alpha=10.0), "both"),
        (dict(network="mnist_cnn", K=0, alpha=10.0), "K"),
        (dict(network="mnist_cnn", K=1, alpha=-1.0), "alpha"),
    ],
)
def test_wrong_arguments(args, says):
    with pytest.raises(ValueError, match=says):
        build(**args)


def test_any_model_behind_the_layer():
    my_model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    model, x = SoftQuantNet(my_model, SoftQuantize(K=2, alpha=25500)), torch.rand(5, 3, 2, 2)
    assert torch.equal(model(x), my_model(model.quantize(x)))
    assert torch.equal(SoftQuantNet(lambda z: 2 * z, SoftQuantize())(x), 2 * SoftQuantize()(x))  # not even a module
    assert set(model.state_dict()) == {"features.1.weight", "features.1.bias"}


def test_memory_format_does_not_matter():
    "channels_last and plain layout compute the same network."
    a, x = build("mnist_cnn").double(), torch.rand(4, 1, 28, 28, dtype=torch.float64)
    b = build("mnist_cnn").double().to(memory_format=torch.contiguous_format)
    torch.testing.assert_close(a(x.to(memory_format=torch.channels_last)), b(x))


def test_initial_weights_of_mnist():
    "The two names share one architecture and differ in their weights; a checkpoint keeps the name."
    a, b = build("mnist_cnn", seed=1), build("mnist_cnn_pytorch", seed=1)
    assert [p.shape for p in a.parameters()] == [p.shape for p in b.parameters()] and not equal(a, b)
    torch.testing.assert_close(a.fc1.weight.std(), torch.tensor(0.088), rtol=0.01, atol=0)
    torch.testing.assert_close(b.fc1.weight.std(), torch.tensor((3 * 3136) ** -0.5), rtol=0.01, atol=0)
    assert (a.network, b.network) == ("mnist_cnn", "mnist_cnn_pytorch")


@pytest.fixture
def small(monkeypatch):
    "A residual network of CIFAR-10's kind with few channels."
    monkeypatch.setitem(NETWORKS, "small", lambda: CifarResNet((4, 4, 8, 10), 2))
    return build("small", seed=1)


@pytest.mark.parametrize(
    "filters, units",
    [((16, 16, 32), 5), ((16, 16, 33, 64), 5), ((16, 8, 32, 64), 5), ((0, 2, 4, 6), 1), ((2, 2, 4, 6), 0)],
)
def test_impossible_residual_networks(filters, units):
    with pytest.raises(ValueError, match="filters=.*units="):
        CifarResNet(filters, units)


def test_standardized_inside(small):
    "Brightness and contrast of an image do not matter, and each image is by itself."
    x, net = torch.rand(3, 3, 32, 32, dtype=torch.float64), small.double().eval()
    torch.testing.assert_close(net(0.2 + 0.5 * x), net(x))
    torch.testing.assert_close(net(torch.cat([x[:1], x[1:] ** 3]))[0], net(x)[0])


def test_flat_images_behind_the_layer(small):
    "All pixels on one level: finite logits, and a gradient that is zero and not NaN."
    model, x = (
        SoftQuantNet(small, SoftQuantize(K=2, alpha=25500.0)),
        torch.full((2, 3, 32, 32), 0.4, requires_grad=True),
    )
    logits = model(x)
    logits.square().sum().backward()
    assert logits.isfinite().all() and (x.grad == 0).all() and all(p.grad.isfinite().all() for p in model.parameters())


def test_residual_gradients(small):
    """First and second derivatives of the input against differences, in float64;
    in-place operations must not spoil them."""
    net, g = small.double().eval(), torch.Generator().manual_seed(0)
    x = torch.rand(1, 3, 32, 32, dtype=torch.float64, generator=g)
    d, e = (torch.randn(x.shape, dtype=torch.float64, generator=g) for _ in range(2))
    f = lambda s, t: net(x + s * d + t * e)[0, 3]
    s, t = (torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2))
    (along,) = torch.autograd.grad(f(s, t), s, create_graph=True)
    (twice,) = torch.autograd.grad(along, t)
    h = 1e-6
    torch.testing.assert_close(along, (f(h, 0) - f(-h, 0)) / (2 * h), rtol=1e-4, atol=1e-7)
    slope = lambda t: torch.autograd.grad(f(s, t), s)[0]
    torch.testing.assert_close(twice, (slope(h) - slope(-h)) / (2 * h), rtol=1e-3, atol=1e-5)


def test_residual_memory_format(small):
    net, x = small.double(), torch.rand(2, 3, 32, 32, dtype=torch.float64)
    plain = copy.deepcopy(net).to(memory_format=torch.contiguous_format)
    shapes = []
    for unit in net.modules():
        if isinstance(unit, ResidualUnit):
            unit.register_forward_hook(
                lambda unit, inputs, out: shapes.append(out.is_contiguous(memory_format=torch.channels_last))
            )
    torch.testing.assert_close(net(x.to(memory_format=torch.channels_last)), plain(x))
    assert shapes == [True] * 6  # nothing on the way changes the layout


def test_residual_under_autocast(small):
    "bfloat16 gives about the same logits, gradients for all weights, and float32 running statistics."
    x = torch.rand(8, 3, 32, 32)
    want = copy.deepcopy(small)(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = small(x)
    got.float().square().sum().backward()
    assert (got.float() - want).norm() < 0.05 * want.norm()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.dtype == torch.float32 for p in small.parameters())
    assert all(b.dtype == torch.float32 for name, b in small.named_buffers() if "running" in name)


def test_running_statistics_are_saved(small, tmp_path):
    for _ in range(3):
        small(torch.rand(4, 3, 32, 32))
    loaded, _ = load_checkpoint(save_checkpoint(tmp_path / "m", small))
    assert equal(loaded, small) and loaded.norm.num_batches_tracked == 3 and not equal(loaded, build("small", seed=1))


def test_round_trip(mine, tmp_path):
    meta = {"model": "nsq", "spec": {"iterations": 3, "noise": 0.3}, "seed": 5}
    path = save_checkpoint(tmp_path / "new" / "m.safetensors", mine, meta)
    loaded, got = load_checkpoint(str(path))
    assert equal(loaded, mine) and not loaded.training and mine.training
    assert meta.items() <= got.items() and (got["network"], got["K"], got["alpha"]) == ("mine", 2, 50.0)
    x = torch.rand(4, 1, 9, 9)
    assert torch.equal(loaded(x), mine.eval()(x))


def test_equal_models_give_equal_files(mine, tmp_path):
    a, b = (save_checkpoint(tmp_path / f, mine, {"seed": 5}) for f in "ab")
    assert a.read_bytes() == b.read_bytes()


def test_compiled_model(mine, tmp_path):
    loaded, _ = load_checkpoint(save_checkpoint(tmp_path / "m", torch.compile(mine)))
    assert equal(loaded, mine)


def test_half_precision_is_kept_out(mine, tmp_path):
    "bfloat16 weights load into the float32 network with the values they had."
    loaded, _ = load_checkpoint(save_checkpoint(tmp_path / "m", mine.bfloat16()))
    assert next(loaded.parameters()).dtype == torch.float32
    torch.testing.assert_close(
        loaded.state_dict()["features.0.weight"], mine.state_dict()["features.0.weight"].float(), rtol=0, atol=0
    )


def test_what_cannot_be_loaded_is_not_saved(mine, tmp_path):
    path = tmp_path / "m"
    for model, says in (
        (nn.Linear(2, 2), "Linear"),
        (SoftQuantNet(mine.features, nn.Sigmoid()), "Sigmoid"),
        (SoftQuantNet(nn.Linear(2, 2), SoftQuantize()), "Linear"),
    ):
        with pytest.raises(ValueError, match=says):
            save_checkpoint(path, model)
    with pytest.raises(ValueError, match="alpha=51.*alpha=50"):
        save_checkpoint(path, mine, {"alpha": 51.0})
    assert not path.exists()


def refused(path):
    with pytest.raises((ValueError, FileNotFoundError)) as e:
        load_checkpoint(path)
    assert str(path) in str(e.value) and "\n" not in str(e.value)
    return str(e.value)


def test_missing(tmp_path):
    assert "train the network first" in refused(tmp_path / "m")
    assert "no checkpoint" in refused(tmp_path)  # a folder


def test_cut_at_any_length(mine, tmp_path):
    path = save_checkpoint(tmp_path / "m", mine)
    whole = path.read_bytes()
    for n in {0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1}:
        path.write_bytes(whole[:n])
        assert "Delete it and run again" in refused(path)


def test_flipped_bits(mine, tmp_path):
    "A flipped bit is found, wherever it is, unless it changes nothing at all."
    path = save_checkpoint(tmp_path / "m", mine, {"iterations": 3000})
    whole, meta = path.read_bytes(), load_checkpoint(path)[1]
    rng, found = random.Random(0), 0
    for _ in range(200):
        b = bytearray(whole)
        b[rng.randrange(len(b))] ^= 1 << rng.randrange(8)
        path.write_bytes(b)
        try:
            loaded, got = load_checkpoint(path)
            assert equal(loaded, mine) and got == meta
        except ValueError as e:
            assert str(path) in str(e)
            found += 1
    assert found > 190


def test_foreign_files(mine, tmp_path, monkeypatch):
    path = tmp_path / "m"
    path.write_bytes(safetensors.torch.save({"w": torch.ones(2)}))
    assert "not a checkpoint of nsq_repro" in refused(path)
    torch.save(mine.state_dict(), path)
    assert "not a safetensors file" in refused(path)
    save_checkpoint(path, mine)
    monkeypatch.setitem(NETWORKS, "mine", lambda: nn.Linear(2, 2))
    assert "does not fit" in refused(path)
    monkeypatch.delitem(NETWORKS, "mine")
    assert "'mine'; there is 'mnist_cnn'" in refused(path)


def test_failed_write_keeps_the_old_file(mine, tmp_path, monkeypatch):
    path = save_checkpoint(tmp_path / "m", mine, {"seed": 1})

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, mine, {"seed": 2})
    assert load_checkpoint(path)[1]["seed"] == 1 and [p.name for p in tmp_path.iterdir()] == ["m"]


def write_on(path):
    "Checkpoints without end."
    m = build("mnist_cnn", K=1, alpha=1000.0)
    for i in itertools.count(1):
        save_checkpoint(path, m, {"i": i})


def test_killed_while_writing(tmp_path):
    "A process that writes checkpoints over and over is killed: what lies there is whole."
    path = tmp_path / "m"
    p = PROCESSES.Process(target=write_on, args=(path,))
    p.start()
    try:
        end = time.time() + 300
        while not path.exists() and p.is_alive() and time.time() < end:
            time.sleep(0.01)
        time.sleep(0.25)
    finally:
        p.kill()
        p.join()
    assert p.exitcode == -signal.SIGKILL
    loaded, meta = load_checkpoint(path)
    assert meta["i"] >= 1 and equal(loaded, build("mnist_cnn", K=1, alpha=1000.0))
