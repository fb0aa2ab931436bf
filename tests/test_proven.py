"""Training by bounds: the loss is what its equation says, nothing that is proven can be broken, and the record says
what was measured."""

import copy
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from torch import nn

from nsq_repro import cli, proven, records
from nsq_repro.attacks import ball, pgd
from nsq_repro.certificates import bound_margins, bounds, corners
from nsq_repro.exact import zbox
from nsq_repro.intervals import interval, lowest_margins, worst_logits
from nsq_repro.networks import SoftQuantNet, build, load_checkpoint, save_checkpoint
from nsq_repro.programs import NoBounds, read_program
from nsq_repro.quantization import SoftQuantize
from nsq_repro.results import check_series, draw
from nsq_repro.training import TrainSpec, interval_loss, recipe, train, train_key, training_loss
from nsq_repro.zonotopes import forward

BOTH = torch.tensor([0.0, 1.0], dtype=torch.float64)


def small(seed=0, classes=3, K=1, alpha=1000.0):
    "A random convolutional network for images of 4 × 4 behind a layer, in float64."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = (nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten())
        F = nn.Sequential(*first, nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, classes))
        nn.init.zeros_(F[5].bias)
    return SoftQuantNet(F, SoftQuantize(K, alpha)).double().eval().requires_grad_(False)


def images(n, seed=0, shape=(1, 4, 4)):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trained(alpha=1000.0, layer=True):
    "A small network that intervals prove something of, trained for a second."
    model, x = small(1, alpha=alpha), images(60, 3)
    y = (x.flatten(1).mean(1) > 0.5).long()
    model = model.train().requires_grad_(True) if layer else model.features.train().requires_grad_(True)
    adam = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(150):
        adam.zero_grad()
        interval_loss(model, x, y, 0.1, 0.5).backward()
        adam.step()
    return model.eval().requires_grad_(False), x, y


def as_matrix(layer, shape):
    "An affine layer as a matrix and a vector, from its values at unit vectors."
    n = math.prod(shape)
    bias = layer(torch.zeros(1, *shape, dtype=torch.float64)).flatten()
    return (layer(torch.eye(n, dtype=torch.float64).view(n, *shape)).flatten(1) - bias).T, bias


def loss_by_hand(model, x, y, eps, weight):
    "@eq-interval-loss with matrices, positive and negative weights apart, one image after the other."
    F, S = model.features, model.quantize
    layers = [as_matrix(F[0], (1, 4, 4)), as_matrix(F[3], (16,)), as_matrix(F[5], (12,))]
    total = 0.0
    for image, t in zip(x, y.tolist()):
        low, high = (S((image + way * eps).clamp(0, 1)).flatten() for way in (-1, 1))
        for W, b in layers[:2]:
            pos, neg = W.clamp(min=0), W.clamp(max=0)
            low, high = (pos @ low + neg @ high + b).relu(), (pos @ high + neg @ low + b).relu()
        W, b = layers[2]
        rows, shift = W - W[t], b - b[t]
        worst = torch.where(rows > 0, high, low).mul(rows).sum(1) + shift
        natural = F(S(image)[None])[0]
        loss = lambda logits: float(logits.logsumexp(0) - logits[t])
        total += (1 - weight) * loss(natural) + weight * loss(worst)
    return total / len(x)


@pytest.mark.parametrize("eps, weight", [(0.1, 0.5), (0.3, 1.0), (0.0, 0.5), (0.2, 0.0)])
def test_loss_is_that_of_its_equation(eps, weight):
    model, x, y = small(), images(6), torch.arange(6) % 3
    wanted = loss_by_hand(model, x, y, eps, weight)
    assert float(interval_loss(model, x, y, eps, weight)) == pytest.approx(wanted, rel=1e-5)


def test_training_loss_of_the_recipes_is_the_interval_loss():
    model, x, y = small(), images(6), torch.arange(6) % 3
    for name, net in (("nsq_ibp", model), ("ibp", model.features)):
        spec = recipe(name, eps=0.2, worst=0.7)
        for grown in (0.25, 1.0):
            got = training_loss(net, x, y, spec, torch.Generator(), grown)
            torch.testing.assert_close(got, interval_loss(net, x, y, grown * 0.2, grown * 0.7))


def test_worst_logits_are_the_bounds_of_the_certificates():
    model, x, y = small(), images(30), torch.arange(30) % 3
    lo, hi = model.quantize.reachable_box(x, 0.2)
    torch.testing.assert_close(-worst_logits(model.features, lo, hi, y), bounds(model.features, lo, hi, y, "ibp"))


def test_gradients_of_the_bound_are_those_of_finite_differences():
    F, x, y = small().features.requires_grad_(True), images(5), torch.arange(5) % 3
    lo, hi = ball(x, 0.1)
    total = lambda: TF.cross_entropy(worst_logits(F, lo, hi, y), y)
    gradients = torch.autograd.grad(total(), list(F.parameters()))
    for p, g in zip(F.parameters(), gradients):
        with torch.no_grad():
            i, h = g.abs().argmax(), 1e-6
            p.view(-1)[i] += h
            above = total()
            p.view(-1)[i] -= 2 * h
            below = total()
            p.view(-1)[i] += h
        assert float((above - below) / (2 * h)) == pytest.approx(float(g.view(-1)[i]), rel=1e-4)


def test_specs_have_what_they_need_and_no_more():
    assert train_key(recipe("nsq_ibp"), "f") == {
        "model": "nsq_ibp", "K": 1, "alpha": 1000.0, "eps": 0.3, "worst": 0.5, "data": "f",
    }  # fmt: skip
    assert train_key(recipe("ibp", worst=0.9), "f") == {"model": "ibp", "eps": 0.3, "worst": 0.9, "data": "f"}
    assert "worst" not in train_key(recipe("nsq"), "f") and "worst" not in train_key(recipe("pgd"), "f")


@pytest.mark.parametrize(
    "wrong, word",
    [
        (lambda: recipe("nsq_ibp", worst=1.5), "worst=1.5"),
        (lambda: recipe("ibp", worst=0.0), "worst"),
        (lambda: recipe("ibp", eps=0.0), "eps"),
        (lambda: TrainSpec("ibp", eps=0.1, worst=0.5, steps=3, step_size=0.1), "steps"),
        (lambda: TrainSpec("pgd", eps=0.1, steps=3, step_size=0.1, worst=0.5), "works without"),
        (lambda: proven.plan(scale="smoke", radius=2), "radius=2"),
        (lambda: proven.plan(scale="smoke", network="resnet"), "network"),
        (lambda: proven.plan(scale="smoke", n_attack=1000), "at most 100"),
        (lambda: proven.plan(scale="smoke", models="nsq"), "nsq_ibp"),
        (lambda: proven.plan(scale="smoke", wurst=0.5), "did you mean worst"),
        (lambda: proven.plan(scale="smoke", K=(1, 2)), "K=.1, 2.: mnist takes one"),
        (lambda: proven.plan(scale="smoke", radius=(0.1, 0.3)), "radius=.0.1, 0.3.: mnist takes one"),
        (lambda: proven.plan(scale="smoke", experiment="cifar", K=(2, 2)), "2 is given twice"),
        (lambda: proven.plan(scale="smoke", experiment="cifr"), "did you mean 'cifar'"),
    ],
)
def test_wrong_values_are_refused_in_one_line(wrong, word):
    with pytest.raises(ValueError, match=word) as e:
        wrong()
    assert "\n" not in str(e.value)


def test_a_network_without_bounds_is_refused_before_an_iteration():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.Sigmoid(), nn.Linear(4, 3))
    with pytest.raises(NoBounds, match="Sigmoid"):
        interval_loss(model, images(2).float(), torch.zeros(2, dtype=torch.int64), 0.1, 0.5)


@pytest.mark.parametrize("seed", range(4))
def test_brute_force_agrees_with_every_proof(seed):
    hard, x = small(seed, alpha=math.inf), images(60, seed)
    y = hard(x).argmax(1)
    radii = (0.02, 0.05, 0.1, 0.2)
    known = {e: proven.proven_by_intervals(hard, x, y, e).numpy() for e in radii}
    sure, broken, _ = proven.proven_beyond(hard, x, y, known, {e: np.ones(60, bool) for e in radii}, boxes=4)
    assert known[0.02].any() and not known[0.2].all()
    for e in radii:
        boxes = zip(*hard.quantize.reachable_box(x, e), y)
        whole = [all((hard.features(z).argmax(1) == t).all() for z in corners(l, h, BOTH, 2**16)) for l, h, t in boxes]
        assert np.array(whole)[sure[e]].all() and not np.array(whole)[broken[e]].any()
        assert (sure[e] >= known[e]).all()


@pytest.mark.parametrize("method", ["forward", "crown", "full"])
def test_every_bound_is_at_least_that_of_intervals(method):
    model, x, y = trained()
    x, y, program = x[:20], y[:20], read_program(model.features)
    lo, hi = ball(x, 0.1)  # every pixel free: intervals are narrower than zonotopes in some units, and wider in others
    seen, (low, high) = forward(program, lo, hi), interval(program, lo, hi)
    assert (seen.box[0] >= low - 1e-9).all() and (seen.box[1] <= high + 1e-9).all()
    assert (seen.box[1] < high - 1e-6).any()
    ours = bound_margins(program, lo, hi, y, method).low
    assert (ours >= bounds(model.features, lo, hi, y, "ibp") - 1e-9).all()
    logits = lambda z: model.features(z).gather(1, y[:, None]) - model.features(z)
    g = torch.Generator().manual_seed(1)
    for _ in range(300):
        corner = torch.where(torch.rand(x.shape, generator=g) < 0.5, lo, hi)
        assert (logits(corner) >= ours - 1e-9).all()
        inside = model.features[:-1](corner)
        assert (inside >= seen.box[0] - 1e-9).all() and (inside <= seen.box[1] + 1e-9).all()


@pytest.mark.parametrize("layer", [True, False])
def test_no_search_breaks_a_proven_image(layer):
    model, x, y = trained(alpha=30.0, layer=layer)
    g, e = torch.Generator().manual_seed(0), 0.1
    sure = proven.proven_by_intervals(model, x, y, e)
    assert 0.3 < sure.float().mean() < 1
    x, y = x[sure], y[sure]
    lo, hi = ball(x, e)
    for _ in range(300):
        z = lo + (hi - lo) * torch.rand(x.shape, generator=g, dtype=torch.float64)
        assert (model(z).argmax(1) == y).all()
        assert (model(torch.where(z < x, lo, hi)).argmax(1) == y).all()
    for loss in ("ce", "cw", "dlr", "targeted"):
        assert zbox(model, x, y, e, steps=50, loss=loss, targets=2, restarts=2).correct.all()
    for loss in ("ce", "cw"):
        assert pgd(model, x, y, e, 50, e / 10, loss=loss, setting="bpda_ste" if layer else "pgd").correct_worst.all()


def test_border_cases():
    F = nn.Sequential(nn.Flatten(), nn.Linear(1, 2)).double().requires_grad_(False)
    F[1].weight.copy_(torch.tensor([[0.0], [2.0]])), F[1].bias.copy_(torch.tensor([1.0, 0.0]))
    model, zero = SoftQuantNet(F, SoftQuantize(1, math.inf)).eval(), torch.zeros(1, dtype=torch.int64)
    at = lambda v, e: bool(proven.proven_by_intervals(model, torch.full((1, 1, 1, 1), v, dtype=torch.float64), zero, e))
    assert at(0.25, 0.0) and at(0.25, 0.2) and not at(0.25, 0.26) and not at(0.75, 0.0)
    for v, e in ((0.25, 0.25), (0.375, 0.125)):  # the end of the ball is the threshold itself
        reached = F(model.quantize(torch.full((1, 1, 1, 1), v + e, dtype=torch.float64))).argmax()
        assert at(v, e) == (int(reached) == 0) and not at(v, e + 1e-9)
    soft = SoftQuantNet(F, SoftQuantize(1, 1000.0)).eval()
    same = torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64)
    assert not proven.proven_by_intervals(soft, same, zero, 0.0)[0]  # a margin of 0 is no proof


@pytest.mark.parametrize("margin, slack, right", [(2e-3, 1e-3, True), (5e-4, 1e-3, False), (5e-4, 1e-4, True)])
def test_a_margin_below_the_slack_is_not_proven(margin, slack, right):
    F = nn.Sequential(nn.Flatten(), nn.Linear(1, 2)).double().requires_grad_(False)
    F[1].weight.zero_(), F[1].bias.copy_(torch.tensor([margin, 0.0]))
    x, y = images(3, shape=(1, 1, 1)), torch.zeros(3, dtype=torch.int64)
    assert (proven.proven_by_intervals(F.eval(), x, y, 0.1, slack) == right).all()


def test_what_is_not_a_number_is_not_proven():
    model, x, y = small(), images(4), torch.zeros(4, dtype=torch.int64)
    model.features[5].bias[1] = math.nan
    lo, hi = interval(read_program(model.features), *model.quantize.reachable_box(x, 0.1))
    low = lowest_margins(model.features[5], (lo + hi) / 2, (hi - lo) / 2, y)
    assert low.isnan().any()
    with pytest.raises(ValueError, match="not finite"):
        proven.proven_by_intervals(model, x, y, 0.1)


def test_initial_weights_keep_intervals_as_wide_as_they_are():
    wide = {}
    for name in ("mnist_strided", "mnist_strided_pytorch", "cifar_strided"):
        x = images(10, shape=(3, 32, 32) if name == "cifar_strided" else (1, 28, 28)).float()
        low, high = interval(read_program(build(name)), x - 0.5, x + 0.5)
        wide[name] = float((high - low).mean())
    assert all(0.6 < wide[name] < 1.6 for name in ("mnist_strided", "cifar_strided"))
    assert wide["mnist_strided_pytorch"] > 20


def test_rounded_weights_survive_their_file(tmp_path):
    net = proven.rounded(build("mnist_strided", 1, 1000.0))
    path = save_checkpoint(tmp_path / "n.safetensors", copy.deepcopy(net).bfloat16())
    assert path.stat().st_size < 2e6
    back, x = load_checkpoint(path)[0], images(5, shape=(1, 28, 28)).float()
    assert all(p.dtype == torch.float32 for p in back.parameters())
    torch.testing.assert_close(back(x), net(x), rtol=0, atol=0)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A record of the experiment at scale smoke, and the folder it was made in."
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("NSQ_HOME", str(home))
        how = dict(scale="smoke", device="cpu", seeds=1, iterations=20, n_attack=6)
        yield proven.run(**how), how, home


def test_the_record_counts_what_it_says(made):
    record, how, home = made
    assert [(r["model"], r["seed"]) for r in record["networks"]] == [("nsq_ibp", 0), ("ibp", 0)]
    assert {s["accounting"] for s in record["series"]} == {"attacked", "certified", "intervals"}
    assert not record["missing"]
    rows = {(r["model"], r["eps"]): r for r in proven.proven_rows(record)}
    for (m, e), r in rows.items():
        assert r["certified"] <= r["attacked"] and r["n"] == 100 and r["n_attack"] == 6
        s = next(s for s in record["series"] if (s["model"], s["accounting"]) == (m, "intervals"))
        i = s["eps"].index(e)
        assert r["intervals"] == pytest.approx(100 * records.unpack(s["outcomes"][i], 100).mean(), abs=0.01)
    assert check_series(record) == [] and check_series({**record, "asked": {**record["asked"], "n_attack": 7}})
    assert record["networks"][1]["free"]["0.3"] > record["networks"][0]["free"]["0.3"] > 0
    assert proven.proven_table(record).count("| NSQ-IBP |") == 3
    assert "NSQ-IBP, trained for" in proven.proven_sentence(record)


def test_the_record_is_made_again_from_what_is_there(made):
    record, how, home = made
    assert proven.run(**how, compute=False) == record
    some = proven.run(**{**how, "seeds": 2}, compute=False)
    assert len(some["networks"]) == 2 and [(t["model"], t["seed"]) for t in some["missing"]] == [
        ("nsq_ibp", 1), ("ibp", 1),
    ]  # fmt: skip
    with pytest.raises(FileNotFoundError, match="compute=True"):
        proven.run(**{**how, "worst": 0.6}, compute=False)


def test_the_published_network_is_the_one_that_was_measured(made):
    record, how, home = made
    net, meta = load_checkpoint(proven.publish(**how))
    p = proven.plan(**how)
    _, _, test = proven.splits(p)
    ok = proven.proven_by_intervals(net, test.floats(), test.y, 0.1).numpy()
    s = next(s for s in record["series"] if (s["model"], s["accounting"]) == ("nsq_ibp", "intervals"))
    assert (records.unpack(s["outcomes"][s["eps"].index(0.1)], s["n"]) == ok).all()
    assert meta["training"] == record["networks"][0]["training"]["hash"]


def test_another_training_is_not_published(made, tmp_path, monkeypatch):
    "Trained again by the same spec it has other weights than those that were measured; older records do not say which."
    record, how, home = made
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("NSQ_HOME", str(tmp_path))
    train = tmp_path / "runs" / f"train-{record['networks'][0]['training']['hash']}"
    net, meta = load_checkpoint(train / "model.safetensors")
    nn.init.zeros_(next(net.parameters()).requires_grad_(False))
    save_checkpoint(train / "model.safetensors", net, {"spec": meta["spec"]})
    files = {"model.safetensors": records.file_digest(train / "model.safetensors")}
    records.save_record(train / "record.json", {**records.load_json(train / "record.json"), "files": files})
    with pytest.raises(ValueError, match="nsq_ibp with other weights"):
        proven.publish(**how)
    path = next(f for f in tmp_path.glob("runs/proven-*/record.json") if train.name[6:] in f.read_text())
    old = {k: v for k, v in records.load_record(path).items() if k != "weights"}
    records.save_record(path, old)
    assert proven.publish(**how).exists()
    old["row"]["training"]["provenance"]["finished"] = "2020-01-01T00:00:00Z"
    records.save_record(path, old)
    with pytest.raises(ValueError, match="another training of nsq_ibp; run with refresh"):
        proven.publish(**how)


def test_the_published_network_is_attacked_from_a_terminal(made, capsys, monkeypatch):
    path = str(proven.publish(**made[1]))
    short = ["--data", "digits", "--n", "20", "--steps", "4", "--eps", "0.05", "0.3"]
    assert cli.main(["attack", path, *short]) == 0
    said = capsys.readouterr().out
    assert said.count("ε = ") == 10 and "no proven image is broken" in said
    monkeypatch.setattr(proven, "proven_by_intervals", lambda model, x, y, eps: torch.ones(len(y), dtype=torch.bool))
    assert cli.main(["attack", path, *short]) == 1 and "a fault of the proof" in capsys.readouterr().out
    for wrong, says in ((["--n", "0"], "n=0: "), (["--eps", "0.3", "0.1"], "must increase"), (["--eps", "3"], "eps=3")):
        assert cli.main(["attack", path, *short, *wrong]) == 1
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1
    assert cli.main(["attack", "mnist-nqs"]) == 1 and "no network is called" in capsys.readouterr().err


def test_each_attack_is_given_what_the_others_left():
    torch.manual_seed(1)
    model, x, y = small().float(), torch.rand(30, 1, 4, 4), torch.randint(3, (30,))
    rows = proven.break_rows(model, x, y, (0.05, 0.2), steps=5)
    for a, b in zip(rows, rows[1:]):
        if a["eps"] == b["eps"]:
            assert b["tried"] == a["tried"] - a["broken"] and b["left"] == a["left"] - b["broken"]
    left = {e: min(r["left"] for r in rows if r["eps"] == e) for e in (0.05, 0.2)}
    clean = int((model(x).argmax(1) == y).sum())
    assert left[0.2] <= left[0.05] <= clean and rows[0]["tried"] == clean and left[0.2] < clean
    found = pgd(model, x, y, 0.2, 5, 0.1, "ce", "bpda_ste").x
    assert rows[0]["broken"] == int(((model(found).argmax(1) != y) & (model(x).argmax(1) == y)).sum())


def test_proven_and_broken_is_an_error(made, monkeypatch):
    record, how, home = made
    everything = lambda model, x, y, e, slack: torch.ones(len(y), dtype=torch.bool)
    monkeypatch.setattr(proven, "proven_by_intervals", everything)
    p = proven.plan(**how)
    fit, _, test = proven.splits(p)
    spec = proven.spec_of(p, "nsq_ibp", 0)
    net, _ = train(spec, fit, progress=False)
    with pytest.raises(ValueError, match="certified and broken"):
        proven.both_sides(proven.rounded(net), "nsq_ibp", train_key(spec, fit.fingerprint), p, test)


def test_the_published_record_is_of_the_preset():
    record = records.load_json(records.repository() / "figures" / "cpu" / "mnist-proven.json")
    p = proven.plan(scale="cpu", device="cpu")
    asked = {(r["model"], r["seed"]): r["spec"] for r in record["networks"]}
    for t in proven.trainings(p):
        spec = records.spec_dict(proven.spec_of(p, **t), defaults=True)
        assert {k: v for k, v in spec.items() if k in asked[t["model"], t["seed"]]} == asked[t["model"], t["seed"]]


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    "A record of the colour images' part at scale smoke, and the networks it is about by layer."
    with pytest.MonkeyPatch.context() as m:
        m.setenv("NSQ_HOME", str(tmp_path_factory.mktemp("coloured")))
        how = dict(scale="smoke", device="cpu", experiment="cifar", K=2, radius=2 / 255, n_attack=10, iterations=80)
        record, p = proven.run(**how), proven.plan(**how)
        fit, _, test = proven.splits(p)
        load_net = lambda t: proven.rounded(train(proven.spec_of(p, **t), fit, progress=False)[0])
        yield record, {t["K"]: load_net(t) for t in proven.trainings(p)}, test


def test_trainings_of_colour_images_stand_beside_each_other():
    p = proven.plan(scale="smoke", device="cpu", experiment="cifar")
    cells = [(t["radius"], t["K"]) for t in proven.trainings(p)]
    assert cells == [(e / 255, K) for e in (2, 8) for K in (2, 4, None)] and set(p.radius) <= set(p.eps)
    specs = [proven.spec_of(p, **t) for t in proven.trainings(p)]
    assert [s.K for s in specs] == [2, 4, None] * 2 and all(s.augment and s.network == "cifar_strided" for s in specs)
    assert {s.alpha for s in specs} == {25500.0, None} and [s.eps for s in specs] == [c[0] for c in cells]
    odd = proven.plan(scale="smoke", device="cpu", experiment="cifar", radius=3 / 255)
    assert odd.eps == tuple(e / 255 for e in (1, 2, 3, 4, 8)) and odd.variant == "proven-cifar-radius0.0117647"


def test_the_record_of_colour_images_counts_what_it_says(coloured):
    record, nets, test = coloured
    assert check_series(record) == [] and not record["missing"] and record["eps_unit"] == 255
    rows = {r["K"]: r for r in proven.cifar_rows(record)}
    for K, r in rows.items():
        x, S = test.floats(), getattr(nets[K], "quantize", None)
        assert r["clean"] == pytest.approx(100 * (nets[K](x).argmax(1) == test.y).float().mean().item(), abs=0.01)
        sure = proven.proven_by_intervals(nets[K], x, test.y, 2 / 255)
        assert r["intervals"] == pytest.approx(100 * sure.float().mean().item(), abs=0.01) and r["attacked"] <= 100
        lo, hi = ball(x, 2 / 255) if S is None else S.reachable_box(x, 2 / 255)
        assert r["width"] == pytest.approx((hi - lo).mean().item(), abs=1e-5)
        assert r["free"] == pytest.approx(100 * (hi - lo > 1e-6).float().mean().item(), abs=0.01)
    assert rows[2]["free"] < 10 < 99 < rows[None]["free"]
    assert proven.cifar_table(record).count("\n| 2/255 |") == 2 and draw("cifar-proven", record).axes
    said = proven.cifar_sentence(record)
    assert "(K = 2), " in said and "Short trainings: 80 iterations of 50 images, 0.05 % of what" in said


def test_no_search_breaks_a_proven_colour_image(coloured):
    _, nets, test = coloured
    g, e = torch.Generator().manual_seed(0), 2 / 255
    for K, net in nets.items():
        x, y = test.floats(), test.y
        sure = proven.proven_by_intervals(net, x, y, e)
        x, y = x[sure], y[sure]
        assert len(y) > 20 and len(y.unique()) > 1
        lo, hi = ball(x, e)
        for _ in range(30):
            z = lo + (hi - lo) * torch.rand(x.shape, generator=g)
            for point in (z, torch.where(z < x, lo, hi)):
                assert (net(point).argmax(1) == y).all()
        for loss in ("ce", "cw", "dlr", "targeted"):
            assert zbox(net, x, y, e, steps=10, loss=loss, targets=2).correct.all()
        setting = "pgd" if K is None else "bpda_ste"
        assert pgd(net, x, y, e, 10, e / 4, loss="ce", setting=setting).correct_worst.all()


def test_intervals_prove_nothing_of_a_network_that_is_not_its_parts():
    class Other(SoftQuantNet):
        def forward(self, x):
            return -self.features(self.quantize(x))

    F = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    net, x = Other(F, SoftQuantize(1, 1000.0)).eval(), torch.ones(3, 1, 2, 2)
    with pytest.raises(ValueError, match="behind its layer"):
        proven.proven_by_intervals(net, x, F(x).argmax(1), 0.01)
