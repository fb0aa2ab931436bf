"""Variants of NSQ: the share of pixels near a threshold, a layer with another one, samples made behind it, and a
run that goes on."""

import json
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import RUNS
from test_adaptive import network

from nsq_repro import mnist, records, results, suite, tables, variants
from nsq_repro.data import load
from nsq_repro.exact import zbox
from nsq_repro.networks import SoftQuantNet, _digest, build, load_checkpoint, save_checkpoint
from nsq_repro.quantization import SoftQuantize
from nsq_repro.training import (
    NOISE,
    TrainSpec,
    add_noise,
    perturb_behind,
    recipe,
    train_key,
    training_cost,
    training_loss,
)

ROOT = Path(__file__).resolve().parents[1]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("radius", [Fraction(1, 20), Fraction(3, 10), Fraction(8, 255), Fraction(1, 510)])
def test_share_is_that_of_exact_arithmetic(radius):
    x = torch.randint(256, (300,), dtype=torch.uint8, generator=seeded())
    taus = [Fraction(2 * level + 1, 510) for level in range(77, 178)]
    exact = [sum(abs(Fraction(v, 255) - t) <= radius for v in x.tolist()) / 300 for t in taus]
    np.testing.assert_allclose(variants.share_within(x, float(radius)), exact, atol=1e-12)
    assert variants.quietest(x, float(radius)) == pytest.approx(float(taus[exact.index(min(exact))]))


@pytest.mark.parametrize("shift", [-0.1, 0.055])
def test_shifted_layer_is_exact(shift):
    net = network(shift=shift, alpha=30.0).double()
    x, e = (
        torch.rand(40, 1, 4, 4, dtype=torch.float64, generator=seeded()),
        torch.rand(40, dtype=torch.float64, generator=seeded(1)) / 3,
    )
    lo, hi = net.quantize.reachable_box(x, e)
    r = e.view(-1, 1, 1, 1)
    torch.testing.assert_close(lo, torch.sigmoid(30 * ((x - r).clamp(0, 1) - 0.5 - shift)))
    torch.testing.assert_close(hi, torch.sigmoid(30 * ((x + r).clamp(0, 1) - 0.5 - shift)))
    y = net(x).argmax(1)
    found = zbox(net, x, y, 0.3, steps=20)
    assert ((found.x - x).abs() <= 0.3 + 1e-12).all() and found.x.min() >= 0 and found.x.max() <= 1
    assert torch.equal(found.correct, net(found.x).argmax(1) == y) and not found.correct.all()


def test_threshold_is_where_it_says():
    S = SoftQuantize(1, float("inf"), shift=-0.1)
    assert S(torch.tensor([0.39, 0.41])).tolist() == [0, 1]
    with pytest.raises(ValueError, match="shift"):
        SoftQuantize(1, 1000.0, shift=0.6)


def test_checkpoints_keep_the_shift_and_old_ones_load(tmp_path):
    net = build("mnist_cnn", K=1, alpha=1000.0, shift=-0.055)
    path = save_checkpoint(tmp_path / "new.safetensors", net)
    assert load_checkpoint(path)[0].quantize.shift == -0.055
    with safetensors.safe_open(path, "pt") as f:
        meta, tensors = json.loads(f.metadata()["nsq"]), {k: f.get_tensor(k) for k in f.keys()}
    old = {k: v for k, v in meta.items() if k not in ("shift", "digest")}  # as files were before there was a shift
    (tmp_path / "old.safetensors").write_bytes(
        safetensors.torch.save(tensors, {"nsq": json.dumps({**old, "digest": _digest(old)})})
    )
    assert load_checkpoint(tmp_path / "old.safetensors")[0].quantize.shift == 0.0


def test_new_fields_rename_no_run():
    spec = next(t for t in mnist.protocol(scale="cpu", device="cpu").train if t.model == "nsq")
    assert train_key(spec, "f") == {
        "K": 1,
        "alpha": 1000.0,
        "noise": 0.3,
        "network": "mnist_cnn_pytorch",
        "iterations": 3000,
        "model": "nsq",
        "data": "f",
    }
    all_specs = variants.specs({t.model: t for t in mnist.protocol(scale="cpu", device="cpu").train}, 0.445)
    assert all_specs["nsq"] == spec and len({records.spec_hash(train_key(s, "f")) for s in all_specs.values()}) == len(
        variants.LABELS
    )


@pytest.mark.parametrize(
    "wrong",
    [
        dict(model="nsq", noise_shape="square"),
        dict(model="sq", noise_shape="signs"),
        dict(model="stability", noise_shape="signs"),
        dict(model="natural", shift=0.1),
        dict(model="nsq", shift=0.5),
    ],
)
def test_wrong_specs_are_refused(wrong):
    with pytest.raises(ValueError, match="noise_shape|shift"):
        recipe(**wrong)


def test_uniform_noise_is_what_it_was():
    x = torch.rand(5, 1, 4, 4)
    torch.testing.assert_close(
        add_noise(x, 0.3, seeded()),
        (x + 0.3 * (2 * torch.rand(x.shape, generator=seeded()) - 1)).clamp(0, 1),
        rtol=0,
        atol=0,
    )
    assert set(NOISE) == {"uniform", "signs", "gaussian"}


def test_signs_reach_training():
    torch.manual_seed(0)
    F, x, seen = torch.nn.Linear(16, 4), torch.full((8, 1, 4, 4), 0.5), []
    model = SoftQuantNet(torch.nn.Sequential(torch.nn.Flatten(), F), SoftQuantize(1, 1000.0))
    model.quantize.register_forward_pre_hook(lambda _, a: seen.append(a[0]))
    training_loss(
        model,
        x,
        torch.zeros(8, dtype=torch.int64),
        TrainSpec(K=1, alpha=1000.0, noise=0.3, noise_shape="signs"),
        seeded(),
    )
    assert sorted(round(v, 4) for v in seen[0].unique().tolist()) == [0.2, 0.8]


@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_samples_behind_the_layer_can_be_reached(shift):
    net, spec = network(shift=shift, alpha=30.0).double().train(), recipe("nsq_box", eps=0.2)
    x, y = (
        torch.rand(60, 1, 4, 4, dtype=torch.float64, generator=seeded(2)),
        torch.randint(4, (60,), generator=seeded(3)),
    )
    z = perturb_behind(net, x, y, spec, seeded())
    lo, hi = net.quantize.reachable_box(x, 0.2)
    assert (lo <= z).all() and (z <= hi).all() and ((z > lo) & (z < hi)).any()
    back = net.quantize.inverse(z).clamp((x - 0.2).clamp_min(0), (x + 0.2).clamp_max(1))
    torch.testing.assert_close(net.quantize(back), z, rtol=0, atol=1e-3)
    start = lo + (hi - lo) * torch.rand(x.shape, generator=seeded())
    leaf = start.float().double().requires_grad_()
    (g,) = torch.autograd.grad(torch.nn.functional.cross_entropy(net.features(leaf), y, reduction="sum"), leaf)
    up = torch.nn.functional.cross_entropy(net.features(z), y) - torch.nn.functional.cross_entropy(
        net.features(start), y
    )
    inner = (z > lo) & (z < hi) & (g.abs() > 1e-6)
    assert up > 0 and torch.equal((z - start).sign()[inner], g.sign()[inner])
    loss = training_loss(net, x, y, spec, seeded())
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(net.features(z).float(), y))
    assert all(p.requires_grad for p in net.parameters()) and net.training


def test_costs_of_variants_that_share_a_model(tmp_path, monkeypatch):
    monkeypatch.setenv("NSQ_HOME", str(tmp_path))
    quick = dict(iterations=2, batch_size=5, network="mnist_cnn_pytorch")
    digits = load("digits", "train").subset(20)
    by_name = training_cost(
        {"plain": recipe("nsq", **quick), "signs": recipe("nsq", noise_shape="signs", **quick)},
        digits,
        rounds=1,
        iterations=1,
    )
    by_model = training_cost([recipe("nsq", **quick)], digits, rounds=1, iterations=1)
    assert set(by_name["seconds_per_iteration"]) == {"plain", "signs"} and set(by_model["seconds_per_iteration"]) == {
        "nsq"
    }


SMALL = dict(scale="smoke", device="cpu", **RUNS["variants"])


@pytest.fixture
def quick(tmp_path, monkeypatch):
    monkeypatch.setenv("NSQ_HOME", str(tmp_path))
    budgets = {m: {**how, "iterations": 6} for m, how in mnist.PRESETS["smoke"]["training"].items()}
    monkeypatch.setitem(mnist.PRESETS["smoke"], "training", budgets)


def test_run_stops_and_goes_on(quick, monkeypatch):
    with pytest.raises(FileNotFoundError, match="plain NSQ"):
        variants.run(compute=False, **SMALL)
    real, calls = suite.not_broken, []

    def stops(*args, **kwargs):
        calls.append(args[2])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(suite, "not_broken", stops)
    with pytest.raises(KeyboardInterrupt):
        variants.run(**SMALL)
    monkeypatch.setattr(suite, "not_broken", real)
    whole = variants.run(**SMALL)
    monkeypatch.setattr(suite, "not_broken", lambda *a, **k: pytest.fail("attacked again"))
    again = variants.run(compute=False, **SMALL)
    assert again["found"] == whole["found"] and list(whole["found"]) == ["nsq", "box", "threshold"]
    part = variants.run(compute=False, **{**SMALL, "variants": "nsq,box,signs"})
    assert variants.variants_record(part)["missing"] == ["signs"] and list(part["found"]) == ["nsq", "box"]
    assert not any(
        d.name.startswith("variant-") and not list(d.iterdir()) for d in (records.home() / "runs").iterdir()
    )  # looking makes no folders


def test_record_draws_and_is_verified(quick, bare, tmp_path, monkeypatch):
    shutil.copytree(bare.root / "variants", tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(suite, "not_broken", lambda *a, **k: pytest.fail("attacked again"))
    out = variants.run(**SMALL)
    record, made = variants.variants_record(out), results.Results("smoke")
    made.figure("mnist-variants-accuracy", record)
    made.table("mnist-variants", record, "mnist-variants-accuracy")
    made.figure(
        "mnist-thresholds", {"scale": "smoke", "data": out["fit"].describe(), **variants.threshold_record([out["fit"]])}
    )
    assert not [r for r in results.verify("smoke") if r["problems"]]
    rows, bits = (
        {r["variant"]: r for r in tables.variants_rows(record)},
        lambda v: records.unpack(out["found"][v]["left"]["0.3"], 12),
    )
    assert rows["box"]["less nsq"] == pytest.approx(100 * (bits("box").mean() - bits("nsq").mean()), abs=0.01)
    assert (
        rows["box"]["iterations"] == 3
        and rows["threshold"]["iterations"] == 6
        and rows["threshold"]["label"].startswith("threshold at 0.")
    )
    path = records.figure_dir("smoke") / "mnist-variants-accuracy.json"
    kept = records.load_json(path)
    kept["series"][1]["correct"][0] -= 1
    records.save_record(path, kept)
    assert any("correct is" in p for r in results.verify("smoke") for p in r["problems"])
