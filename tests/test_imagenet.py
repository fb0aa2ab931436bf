"""ImageNet: photographs as they are found, networks with two outputs, a cache that is whole or absent, and processes
that share a run without changing it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import PROCESSES

from nsq_repro import imagenet, photographs, records
from nsq_repro.attacks import pgd
from nsq_repro.cells import Workers, network_name
from nsq_repro.data import Dataset, fingerprint, load
from nsq_repro.networks import SoftQuantNet, build, load_checkpoint, save_checkpoint, weights_digest
from nsq_repro.photographs import Input, Pretrained, Team, class_indices, decoded, listed, read_weights, register
from nsq_repro.quantization import SoftQuantize
from nsq_repro.training import make_optimizer, recipe

ROOT = Path(__file__).resolve().parents[1]
SMALL = Input(32, 36)


@pytest.fixture
def few(tmp_path, monkeypatch):
    "A tiny Imagenette with the oddities of ImageNet; the folder of the data."
    monkeypatch.setenv("NSQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NSQ_HOME", str(tmp_path / "home"))
    for split, n in (("train", 2), ("val", 2)):
        for k, wnid in enumerate(photographs.WNIDS):
            folder = tmp_path / "imagenette2-160" / split / wnid
            folder.mkdir(parents=True)
            for i in range(n):
                noise = np.random.RandomState(10 * k + i).randint(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(noise).save(folder / f"{i}.JPEG", "JPEG")
    return tmp_path


def photo(folder, name, mode="RGB", kind="JPEG", size=(50, 40), **how):
    noise = np.random.RandomState(0).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path = folder / name
    Image.fromarray(noise).convert(mode).save(path, kind, **how)
    return path


def test_odd_files_are_decoded(tmp_path):
    exif = b"Exif\x00\x00II*\x00\xff\xff\xff\xff broken"
    odd = {
        "png named JPEG": photo(tmp_path, "a.JPEG", kind="PNG"), "CMYK": photo(tmp_path, "b.JPEG", "CMYK"),
        "grey": photo(tmp_path, "c.JPEG", "L"), "EXIF": photo(tmp_path, "d.JPEG", exif=exif),
        "small": photo(tmp_path, "e.JPEG", size=(20, 60)), "palette": photo(tmp_path, "f.JPEG", "P", "PNG"),
    }
    for what, path in odd.items():
        x = decoded(path, SMALL)
        assert x.shape == (3, 32, 32) and x.dtype == np.uint8, what
    plain = decoded(photo(tmp_path, "g.JPEG", kind="PNG", size=(36, 36)), SMALL)  # nothing to resize: the middle
    noise = np.random.RandomState(0).randint(0, 256, (36, 36, 3), dtype=np.uint8)
    assert (plain == noise[2:34, 2:34].transpose(2, 0, 1)).all()
    (tmp_path / "h.JPEG").write_bytes(odd["grey"].read_bytes()[:200])
    with pytest.raises(ValueError, match="h.JPEG is damaged"):
        decoded(tmp_path / "h.JPEG", SMALL)


def test_class_indices():
    thousand = [f"n{i:08d}" for i in range(1000)]
    assert class_indices(thousand[::-1])["n00000007"] == 7
    assert class_indices(["n03888257", "n01440764"]) == {"n03888257": 701, "n01440764": 0}
    with pytest.raises(ValueError, match="background"):
        class_indices([*thousand, "background"])
    with pytest.raises(ValueError, match="n99999999"):
        class_indices(["n01440764", "n99999999"])


def test_the_order_is_stated_and_nested(few):
    order = listed("imagenette", root=few)
    assert len(order) == 20 and len({p for _, p in order}) == 20
    for part in (order[:10], order[10:]):
        assert sorted(label for label, _ in part) == sorted(photographs.WNIDS.values())
    assert order == listed("imagenette", root=few) != listed("imagenette", root=few, seed=1)
    with pytest.raises(FileNotFoundError, match="imagenet-sample"):
        listed("imagenet-sample", root=few)
    with pytest.raises(ValueError, match="only 20 test images"):
        photographs.photographs("imagenette", "test", SMALL, 21, few)


def test_the_cache_is_whole_or_absent(few, monkeypatch):
    first = photographs.photographs("imagenette", "test", SMALL, root=few)
    path = photographs.cache_file(listed("imagenette", root=few), SMALL._replace(resize=32))
    assert path.exists() and first.fingerprint == fingerprint(first.x.clone(), first.y)
    assert not first.resident and isinstance(first, Dataset) and first.subset(3).fingerprint != first.fingerprint
    monkeypatch.setattr(photographs, "decoded", lambda *a: pytest.fail("decoded again"))
    again = photographs.photographs("imagenette", "test", SMALL, root=few)
    assert again.fingerprint == first.fingerprint
    monkeypatch.undo()
    monkeypatch.setenv("NSQ_CACHE", str(few / "cache"))
    half = path.with_name("half")
    half.write_bytes(path.read_bytes()[:5000])
    os.replace(half, path)  # the file that is mapped stays as it is
    assert torch.equal(photographs.photographs("imagenette", "test", SMALL, root=few).x, first.x)
    path.with_suffix(".json").unlink()  # killed between the two
    assert photographs.photographs("imagenette", "test", SMALL, root=few).fingerprint == first.fingerprint

    real, calls = photographs.decoded, []

    def dies(*a):
        calls.append(a)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return real(*a)

    monkeypatch.setattr(photographs, "decoded", dies)
    with pytest.raises(KeyboardInterrupt):
        photographs.photographs("imagenette", "train", SMALL, root=few)
    assert len(list(path.parent.glob("*.npy"))) == 1 and not list(path.parent.glob("*.part"))


def test_memory_does_not_grow_with_the_images(tmp_path):
    "Reading every image of a set of 96 MB, batch by batch, takes a few MB of memory of one's own."
    code = """
import numpy as np, torch
from nsq_repro.photographs import Photographs
np.save("x.npy", np.zeros((4000, 3, 90, 90), np.uint8))
x = torch.from_numpy(np.load("x.npy", mmap_mode="c"))
data = Photographs(x, torch.zeros(4000, dtype=torch.int64), "", "", "test", ("a",), "f")
own = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) / 1024
data.floats(slice(20)); before, most = own(), 0
for i in range(0, len(data), 20):
    data.floats(slice(i, i + 20)); most = max(most, own())
print(most - before)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("this system does not tell")
    how = dict(cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
    assert float(subprocess.run([sys.executable, "-c", code], **how).stdout) < 20


def test_inception_trains_attacks_and_travels(tmp_path):
    register("inception_v3")
    model = build("inception_v3", 8, 10_000.0).train()
    F, x, y = model.features, torch.rand(2, 3, 299, 299), torch.tensor([3, 5])
    still = {k: v.clone() for k, v in F.net.state_dict().items() if "running" in k}
    spec = recipe("nsq", K=8, alpha=10_000.0, noise=8 / 255, network="inception_v3", lr=1e-3, optimizer="sgd")
    aux = F.net.AuxLogits.fc.weight.clone()
    step = photographs.shared_step(Team(), 2)
    loss = step(model, make_optimizer(model, spec), x, y, spec, torch.Generator().manual_seed(0))
    assert torch.isfinite(loss) and len(F.beside) == 1 and not torch.equal(aux, F.net.AuxLogits.fc.weight)
    assert all(torch.equal(F.net.state_dict()[k], v) for k, v in still.items())  # batch norm keeps its statistics
    model.eval()
    found = pgd(model, x, y, 4 / 255, steps=1, step_size=1 / 255, setting="bpda_ste", skip_cycles=False)
    assert 0 < (found.x_last - x).abs().max() <= 4 / 255 + 1e-6
    again, meta = load_checkpoint(save_checkpoint(tmp_path / "net.safetensors", model))
    assert meta["network"] == "inception_v3" and isinstance(again.features, Pretrained)
    for a, b in zip(model.state_dict().values(), again.state_dict().values()):
        assert torch.equal(a, b)


def test_messages(few, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(few / "hub"))
    with pytest.raises(FileNotFoundError, match="inception_v3_google-0cc3c7bd.pth there .https://"):
        photographs.weights_file("inception_v3", root=few)
    with pytest.raises(ValueError, match="did you mean inception_v3"):
        register("inception_v4")
    with pytest.raises(FileNotFoundError, match="no such file"):
        photographs.weights_file("inception_v3", "nothing.pth")
    with pytest.raises(ValueError, match="divisor of batch_size"):
        imagenet.plan(scale="smoke", batch_size=30, chunk=16)
    with pytest.raises(FileNotFoundError, match="Imagenette was not found"):
        imagenet.run(scale="smoke", data="imagenette", data_root=str(few / "nothing"))
    with pytest.raises(SystemExit, match="usage"):
        imagenet.main(["-q", "steps", "3"])
    if not photographs._in_a_package(photographs.LITE0):
        with pytest.raises((ImportError, FileNotFoundError), match="pip install 'nsq-repro.imagenet.'"):
            photographs.weights_file(photographs.LITE0, root=few)


def test_background_is_left_out(tmp_path):
    weight = torch.arange(1001.0)[:, None].repeat(1, 4)
    torch.save({"fc.weight": weight, "fc.bias": weight[:, 0].clone(), "conv": torch.zeros(3, 3)}, tmp_path / "w.pth")
    found = read_weights(tmp_path / "w.pth")
    assert found["fc.weight"].shape == (1000, 4) and found["fc.bias"][0] == 1 and found["conv"].shape == (3, 3)
    (tmp_path / "w.pth").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="damaged"):
        read_weights(tmp_path / "w.pth")


def test_published_weights_of_lite0():
    pytest.importorskip("timm")
    file = photographs._in_a_package(photographs.LITE0)
    if file is None:
        pytest.skip("its package is not here")
    net = build(register(photographs.LITE0)).eval()
    photographs.put_weights(net, read_weights(file))  # every name, every shape
    assert net(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


def test_ties_count_against_the_label():
    z = torch.zeros(1, 10)
    for k in (1, 5, 9):
        assert not imagenet.among_first(z, torch.tensor([0]), k)
    assert imagenet.among_first(z, torch.tensor([0]), 10)
    z[0, 0] = 1e-3
    assert imagenet.among_first(z, torch.tensor([0]), 1)


def network(seed=0):
    "A small network of images 3 × 8 × 8 with six classes, behind a layer."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        F = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 6))
    return SoftQuantNet(F, SoftQuantize(4, 100.0)).eval()


def images(n, seed=0):
    x = torch.randint(0, 256, (n, 3, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Dataset(x, torch.arange(n) % 6, "noise", "noise", "test", tuple("abcdef"))


ATTACK = dict(eps=8 / 255, steps=4, step_size=2 / 255, search="fp32", seed=0)


def test_aimed_at_predictions_only_wrong_images_are_attacked_again():
    net, data = network(), images(40)
    x, y, i = data.floats(), data.y, torch.arange(40)
    whole = imagenet.batch_outcomes(net, x, y, i, imagenet.Row("pgd", "predicted"), ATTACK)
    true = imagenet.batch_outcomes(net, x, y, i, imagenet.Row("pgd"), ATTACK)
    part = imagenet.moved_outcomes(net, x, y, i, row=imagenet.Row("pgd", "predicted"), attack=ATTACK)
    assert 0 < part["moved"].sum() < 40
    for k in ("top1", "top5"):
        assert torch.equal(whole[k], torch.where(part["moved"], part[k], true[k]))


class Rank:
    "A process of a team, without the others."

    def __init__(self, rank, size):
        self.rank, self.size = rank, size

    def wait(self):
        pass


def test_shared_evaluation_is_the_evaluation(tmp_path, monkeypatch):
    net, data = network(), images(230)  # two full cells and a short one
    p = imagenet.plan(scale="smoke", eps=8 / 255, steps=4, step_size=2 / 255)
    rows = (imagenet.Row("clean"), imagenet.Row("pgd"), imagenet.Row("bpda_ste"), imagenet.Row("pgd", "predicted"))
    tasks = {("nsq", r): imagenet.cells_of(net, network_name(net, {"m": 1}), data, 230, r, p) for r in rows}
    found = {}
    for size in (1, 2):
        monkeypatch.setenv("NSQ_HOME", str(tmp_path / str(size)))
        for rank in reversed(range(size)):
            team = Rank(rank, size)
            mine = {t: cells[rank::size] for t, cells in tasks.items()}
            for t in tasks:
                Workers(1, progress=False).run(mine[t])
        found[size], runs = imagenet.outcomes_of(tasks, imagenet.Hands(team, Workers(1, progress=False)))
    for t in tasks:
        assert sum(r["n"] for r in runs[t]) == 230
        for k in ("top1", "top5", "few"):
            assert len(found[1][t][k]) == 230 and (found[1][t][k] == found[2][t][k]).all()
    curves = imagenet.curves_of(found[1], p.eps, few=False)
    clean = (net(data.floats()).argmax(1) == data.y).sum().item()
    assert {c["correct"][0] for c in curves if c["metric"] == "top-1 accuracy"} == {clean}


def test_bfloat16_finds_and_float32_judges():
    net, data = network(1), images(60, 1)
    x, y, i = data.floats(), data.y, torch.arange(60)
    with torch.no_grad():
        wrong = net(x).argmax(1) != y
    for row in (imagenet.Row("pgd"), imagenet.Row("bpda_ste"), imagenet.Row("zbox")):
        ok = imagenet.batch_outcomes(net, x, y, i, row, {**ATTACK, "search": "bf16"})["top1"]
        full = imagenet.batch_outcomes(net, x, y, i, row, ATTACK)["top1"]
        assert not (ok & wrong).any() or row.setting != "zbox"
        assert (ok != full).float().mean() < 0.1


def in_a_team(folder, rank, size, port):
    "Fine-tune in one of several processes, as `accelerate launch` starts them, and tell what came out."
    torch.set_num_threads(1)
    os.chdir(folder)
    os.environ.update(NSQ_HOME=str(folder / f"{size}"), ACCELERATE_USE_CPU="true", RANK=f"{rank}", LOCAL_RANK=f"{rank}")
    os.environ.update(WORLD_SIZE=f"{size}", MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}")
    team = Team("cpu")
    how = dict(network=register("squeezenet1_1"), iterations=4, batch_size=8, optimizer="sgd", lr=0.01)
    spec = recipe("nsq", K=8, alpha=1e4, noise=8 / 255, **how)
    net, r = photographs.fine_tune(spec, load("photos", "train").subset(32), None, 2, team, progress=False)
    told = {"rank": team.rank, "losses": r["losses"], "weights": weights_digest(net.state_dict())}
    Path(f"rank{team.rank}of{team.size}.json").write_text(json.dumps(told))


def test_two_processes_train_as_one(tmp_path):
    "The same losses to 1e-4; dropout and noise too are those of one process."
    pytest.importorskip("accelerate")
    found = {}
    for n in (1, 2):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        team = [PROCESSES.Process(target=in_a_team, args=(tmp_path, i, n, port)) for i in range(n)]
        for p in team:
            p.start()
        for p in team:
            p.join(300)
            p.kill()
        assert [p.exitcode for p in team] == [0] * n
        found[n] = [json.loads((tmp_path / f"rank{i}of{n}.json").read_text()) for i in range(n)]
    (one,), two = found[1], found[2]
    assert len({r["weights"] for r in two}) == 1
    for r in two:
        np.testing.assert_allclose(r["losses"], one["losses"], rtol=1e-4)


def test_table_finds_the_printed_numbers():
    assert imagenet.printed_value("natural", "clean", "top-1 accuracy") == 77.978
    assert imagenet.printed_value("nsq", "bpda", "top-5 accuracy") == 65.576
    assert imagenet.printed_value("nsq", "bpda_ste", "top-1 accuracy") is None
    assert imagenet.printed_value("natural", "pgd", "top-1 accuracy") == 5.974


def test_a_record_of_the_paper_s_data_decides_claims():
    "With ImageNet and Inception_v3 in the record, the claims page finds the rows it asks for."
    from nsq_repro import claims

    n, found = 1000, {}
    right = lambda share: {k: np.arange(n) < share * n for k in ("top1", "top5", "few")}
    for m, shares in {"natural": {"pgd": 0.06, "zbox": 0.0}, "nsq": {"pgd": 0.32, "bpda": 0.2, "zbox": 0.01}}.items():
        found[m, imagenet.Row("clean")] = right(0.78 if m == "natural" else 0.73)
        found |= {(m, imagenet.Row(s)): right(v) for s, v in shares.items()}
        found[m, imagenet.Row("pgd", "predicted")] = right(0.5)
    record = {
        "scale": "paper", "data": {"name": "imagenet", "title": "ImageNet", "n": n}, "lacks": [],
        "series": imagenet.curves_of(found, 4 / 255, few=False),
        "training": {"nsq": {"spec": {"network": "inception_v3"}}},
    }
    verdict = lambda id: claims.judge(records.paper(id=id)[0], lambda item: record if item == "table1" else None)
    assert verdict("imagenet-natural-pgd-4-top1")["verdict"] == claims.REPRODUCED
    assert "6.0 %" in verdict("imagenet-natural-pgd-4-top1")["ours"]  # not the row aimed at predictions
    assert verdict("imagenet-nsq-bpda-4-top1")["ours"].startswith("20.0 %")
    assert verdict("imagenet-gain-top1")["ours"].startswith("+14.0 points")
    record["data"]["name"], record["lacks"] = "imagenette", ["the validation images"]
    assert "missing: the validation images" in verdict("imagenet-nsq-bpda-4-top1")["why"]
