"""Bad inputs of every public function, parameter, option and kind of file: each is refused in one clear line.
(Images, labels, radii and networks given to attacks: tests/test_inputs.py.)"""

import copy
import importlib
import json
import math
import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from nsq_repro import bound, certificates, cli, networks, objective, programs, quantization, records, statistics
from nsq_repro import experiments as ex
from nsq_repro.attacks import LOSSES, seeded_uniform, surrogate
from nsq_repro.cells import Workers, read_cell
from nsq_repro.data import Dataset, available, crop_flip, data_root, load, pixels_near
from nsq_repro.evaluation import AttackSpec, accuracy_vs_eps, evaluate
from nsq_repro.networks import NETWORKS, SoftQuantNet, build, load_checkpoint, save_checkpoint
from nsq_repro.quantization import SoftQuantize
from nsq_repro.suite import Attack, not_broken
from nsq_repro.training import recipe, stability_loss, train

pytestmark = pytest.mark.reliability

torch.manual_seed(0)
F = nn.Sequential(nn.Flatten(), nn.Linear(16, 5)).eval()
NET = SoftQuantNet(F, SoftQuantize(1, 100.0)).eval()
HARD = SoftQuantNet(F, SoftQuantize(1, math.inf)).eval()
X, Y = torch.rand(6, 1, 4, 4), torch.arange(6) % 5
DIGITS = load("digits").subset(20)
DOUBLE = copy.deepcopy(F).double()
NAN = torch.full_like(X, math.nan)
TABLE = []  # (what, call, kind of error, words of its message)


def refuse(what, call, words, kind=ValueError):
    "A row of the table. A call may take a folder to work in."
    TABLE.append((what, call, kind, words))


# the layer
for name, function in {
    "soft_quantize": lambda **k: quantization.soft_quantize(X, **k),
    "soft_quantize_derivative": lambda **k: quantization.soft_quantize_derivative(X, **k),
    "soft_quantize_inverse": lambda **k: quantization.soft_quantize_inverse(X, **k),
    "reachable_box": lambda **k: quantization.reachable_box(X, 0.1, **k),
    "SoftQuantize": SoftQuantize,
}.items():
    for field, value, words in [
        ("K", 0, "K must be"), ("K", 1.5, "K must be"), ("K", "2", "K must be"), ("K", True, "K must be"),
        ("K", None, "K must be"), ("alpha", 0, "alpha must"), ("alpha", -1.0, "alpha must"),
        ("alpha", math.nan, "alpha must"), ("alpha", "1e3", "alpha must"), ("alpha", None, "alpha must"),
        ("vmin", 1.0, "vmin < vmax"), ("vmax", -1.0, "vmin < vmax"), ("vmax", math.inf, "vmin < vmax"),
    ]:  # fmt: skip
        refuse(f"{name} {field}={value!r}", lambda f=function, k=field, v=value: f(**{k: v}), words)
for name, function in {
    "borders": quantization.borders, "thresholds": quantization.thresholds, "output_values": quantization.output_values,
    "hard_quantize": lambda K, **k: quantization.hard_quantize(X, K, **k),
    "cell_index": lambda K, **k: quantization.cell_index(X, K, **k),
}.items():  # fmt: skip
    for K in (0, 2.0, "2", None):
        refuse(f"{name} K={K!r}", lambda f=function, K=K: f(K), "K must be")
    refuse(f"{name} vmin=2", lambda f=function: f(2, vmin=2.0), "vmin < vmax")
for name, x in {"uint8": (255 * X).byte(), "int64": X.long(), "bool": X > 0.5}.items():
    for f in ("soft_quantize", "hard_quantize", "soft_quantize_derivative", "soft_quantize_inverse", "cell_index"):
        refuse(f"{f} of {name}", lambda f=f, x=x: getattr(quantization, f)(x), "floating-point pixels")
    refuse(f"the layer of {name}", lambda x=x: NET(x), "floating-point pixels")
for name, x in {"a list": X.tolist(), "numpy": X.numpy(), "nothing": None}.items():
    refuse(f"soft_quantize of {name}", lambda x=x: quantization.soft_quantize(x), "torch.as_tensor")
    refuse(f"the layer of {name}", lambda x=x: SoftQuantize()(x), "torch.as_tensor")
for eps, words in [
    (-0.1, "at least 0"), (math.nan, "at least 0"), ("0.1", "at least 0"), (None, "at least 0"),
    (torch.rand(3), "eps"), (torch.full((6,), -1.0), "at least 0"), (torch.full((6,), math.nan), "at least 0"),
]:  # fmt: skip
    refuse(f"reachable_box eps={eps!r}", lambda e=eps: quantization.reachable_box(X, e), words)
for shift in (0.5, -0.7, math.nan, "0.1", None):
    refuse(f"SoftQuantize shift={shift!r}", lambda s=shift: SoftQuantize(shift=s), "shift must be")

# networks
refuse("swapped S and F", lambda: SoftQuantNet(SoftQuantize(), F), "the network comes first")
for name in ("resnet", "", None, 3, ["mnist_cnn"]):
    refuse(f"build {name!r}", lambda n=name: build(n), "there is 'mnist_cnn'")
refuse("build K without alpha", lambda: build("mnist_cnn", K=1), "give both")
refuse("build alpha without K", lambda: build("mnist_cnn", alpha=9.0), "give both")
refuse("build K=0", lambda: build("mnist_cnn", 0, 9.0), "K must be")
refuse("build alpha=nan", lambda: build("mnist_cnn", 1, math.nan), "alpha must")
for seed in (1.5, "0", None, 2**70):
    refuse(f"build seed={seed!r}", lambda s=seed: build("mnist_cnn", seed=s), "seed")
refuse("initialization", lambda: networks.MnistCNN("xavier"), "initial is")
refuse("filters", lambda: networks.CifarResNet((16, 16)), "filters")
refuse("units", lambda: networks.CifarResNet(units=0), "units")

# descriptions of trainings and attacks
for field, values, words in [
    ("iterations", (0, -1, 1.5, "9", None, True), "iterations="), ("batch_size", (0, 2.0, "9", None), "batch_size="),
    ("lr", (0, -0.1, math.nan, math.inf, "1e-3", None, 10), "lr="), ("schedule", ("cosine", None, 1), "schedule="),
    ("optimizer", ("lion", None), "optimizer="), ("weight_decay", (-1, 1, "0", math.nan), "weight_decay="),
    ("augment", (1, "yes", None), "augment="), ("precision", ("fp16", None, 32), "precision="),
    ("seed", (0.5, "1", None, True), "seed="), ("K", (0, -1, 1.0, "1", True), "K="),
    ("alpha", (0, -5, math.nan, "1e3"), "alpha="), ("noise", (-0.1, 16, math.nan, "0.3"), "noise="),
    ("noise", (0, 0.0), "above 0"), ("noise_shape", ("square", None), "noise_shape="),
    ("shift", (0.5, -1, "0", math.nan), "shift="), ("network", ("vgg", None, 1), "network="),
]:  # fmt: skip
    for value in values:
        refuse(f"recipe nsq {field}={value!r}", lambda k=field, v=value: recipe("nsq", **{k: v}), words)
refuse("recipe noisy noise=0", lambda: recipe("noisy", noise=0), "above 0")
for field, values in {
    "eps": (0, -0.1, 8, math.nan, "0.3"), "steps": (0, -1, 2.5, "40"), "step_size": (0, -0.1, math.nan, 3, "0.01"),
    "warmup": (-0.1, 1.5, math.nan, "0"), "craft_mode": ("both", None),
}.items():  # fmt: skip
    for value in values:
        refuse(f"recipe pgd {field}={value!r}", lambda k=field, v=value: recipe("pgd", **{k: v}), f"{field}=")
for field, values in {
    "setting": ("eot", None, 1), "loss": ("mse", None, ["ce"]), "restarts": (0, 1.5, "1", None),
    "eps": ((), 0.1, (0.2, 0.1), (0.1, 0.1), (-0.1,), (8,), (math.nan,), ("a",), None, "0.1"),
    "steps": (0, 2.5, "9", True), "step_size": (0, -0.1, math.nan, "0.1", 3), "random_start": (1, "no", None),
    "n_test": (0, -1, 2.5, "9"), "seed": (0.5, "1", None),
}.items():  # fmt: skip
    for value in values:
        refuse(f"AttackSpec {field}={value!r}", lambda k=field, v=value: AttackSpec(**{k: v}), f"{field}=")
for field, value in [
    ("attack", "autoatack"), ("attack", None), ("alpha", -1.0), ("alpha", "9"), ("backward", "bpda"), ("steps", 0),
    ("steps", 2.5), ("restarts", 0), ("n_queries", -1), ("draws", 0), ("samples", "9"), ("n", 0),
]:  # fmt: skip
    given = {"attack": "zbox", field: value}
    refuse(f"Attack {field}={value!r}", lambda g=given: Attack(**g), f"{field}=")

# training and evaluation
SPEC = recipe("natural", iterations=1, batch_size=10, network="mnist_cnn_pytorch")
refuse("train on too few", lambda: train(replace(SPEC, batch_size=50), DIGITS, progress=False), "exceeds the 20")
refuse("train a name", lambda: train("nsq", DIGITS, progress=False), "TrainSpec")
refuse("train on tensors", lambda: train(SPEC, (DIGITS.x, DIGITS.y), progress=False), "Dataset")
refuse("train without data", lambda: train(SPEC, None, progress=False), "Dataset")
refuse("train on a device", lambda: train(SPEC, DIGITS, "gpu", progress=False), "device='gpu'")
refuse("train on photos", lambda: train(SPEC, load("photos"), progress=False), "does not take these images")
refuse("stability_loss", lambda: stability_loss(F, X, Y, 0.1, -1.0), "weight=")
for name, call, words in [
    ("too many images", lambda: evaluate(F, {}, DIGITS, AttackSpec(n_test=21)), "n_test=21"),
    ("no spec", lambda: evaluate(F, {}, DIGITS, "pgd"), "AttackSpec"),
    ("no data", lambda: evaluate(F, {}, X, AttackSpec(n_test=5)), "Dataset"),
    ("batch_size", lambda: evaluate(F, {}, DIGITS, AttackSpec(n_test=5), batch_size=-1), "batch_size=-1"),
    ("batch_size text", lambda: evaluate(F, {}, DIGITS, AttackSpec(n_test=5), batch_size="9"), "batch_size='9'"),
    ("device", lambda: evaluate(F, {}, DIGITS, AttackSpec(n_test=5), "gpu"), "device='gpu'"),
    ("device number", lambda: evaluate(F, {}, DIGITS, AttackSpec(n_test=5), "cuda:99"), "device='cuda:99'"),
]:
    refuse(f"evaluate {name}", call, words)
refuse("settings of a plain network", lambda: accuracy_vs_eps(F, X, Y, settings=("bpda",)), "without a quantization")
refuse("curve of one radius", lambda: accuracy_vs_eps(F, X, Y, eps=0.1), "increasing radii")
refuse("curve option", lambda: accuracy_vs_eps(F, X, Y, stepsize=0.1), "stepsize", TypeError)
refuse("surrogate", lambda: surrogate(F, "eot"), "bpda_ste")
refuse("dlr of two classes", lambda: LOSSES["dlr"](torch.rand(6, 2), Y % 2), "at least 3 classes")
refuse("seeded_uniform", lambda: seeded_uniform(torch.rand(3), (1, 4, 4), 0, 0), "index")
refuse("not_broken", lambda: not_broken(Attack("zbox"), {"a": NET}, "a", X, Y, 0.1, Y, precision="fp16"), "bf16")

# certificates
for name, call, words in [
    ("method", lambda: certificates.certify(NET, X, Y, 0.1, method="ibp"), "crown, full"),
    ("eps=-1", lambda: certificates.certify(NET, X, Y, -1), "eps"),
    ("eps=8", lambda: certificates.certify(NET, X, Y, 8), "8/255"),
    ("eps=nan", lambda: certificates.certify(NET, X, Y, math.nan), "eps"),
    ("eps of three", lambda: certificates.certify(NET, X, Y, torch.rand(3)), "eps"),
    ("eps='0.1'", lambda: certificates.certify(NET, X, Y, "0.1"), "eps"),
    ("boxes=-1", lambda: certificates.certify(NET, X, Y, 0.1, boxes=-1), "boxes=-1"),
    ("boxes=1.5", lambda: certificates.certify(NET, X, Y, 0.1, boxes=1.5), "boxes=1.5"),
    ("boxes='9'", lambda: certificates.certify(NET, X, Y, 0.1, boxes="9"), "boxes='9'"),
    ("batch=0", lambda: certificates.certify(NET, X, Y, 0.1, batch=0), "batch=0"),
    ("leaf=-1", lambda: certificates.certify(NET, X, Y, 0.1, leaf=-1), "leaf=-1"),
    ("slack=nan", lambda: certificates.certify(NET, X, Y, 0.1, slack=math.nan), "slack=nan"),
    ("slack=-1", lambda: certificates.certify(NET, X, Y, 0.1, slack=-1), "slack=-1"),
    ("gain=nan", lambda: certificates.certify(NET, X, Y, 0.1, gain=math.nan), "gain=nan"),
    ("bytes", lambda: certificates.certify(NET, (255 * X).byte(), Y, 0.1), "uint8"),
    ("bytes as floats", lambda: certificates.certify(NET, 255 * X, Y, 0.1), "divide by 255"),
    ("nan", lambda: certificates.certify(NET, NAN, Y, 0.1), "not finite"),
    ("numpy", lambda: certificates.certify(NET, X.numpy(), Y, 0.1), "torch.as_tensor"),
    ("too few labels", lambda: certificates.certify(NET, X, Y[:3], 0.1), "one label for each"),
    ("labels as floats", lambda: certificates.certify(NET, X, Y.float(), 0.1), "float32"),
    ("classes", lambda: certificates.certify(NET, X, Y + 5, 0.1), "classes"),
    ("training mode", lambda: certificates.certify(nn.Sequential(nn.Flatten(), nn.Dropout(), F[1]), X, Y, 0.1), "eval"),
    ("a function", lambda: certificates.certify(lambda x: F(x), X, Y, 0.1), "SoftQuantNet"),
    ("unknown layer", lambda: certificates.certify(nn.Sequential(F, nn.Softmax(1)).eval(), X, Y, 0.1), "Softmax"),
    ("exact_hard of a soft layer", lambda: certificates.exact_hard(NET, X, Y, 0.1), "alpha = inf"),
    ("exact_hard without a layer", lambda: certificates.exact_hard(F, X, Y, 0.1), "alpha = inf"),
    ("exact_hard limit=-1", lambda: certificates.exact_hard(HARD, X, Y, 0.1, limit=-1), "limit=-1"),
    ("exact_hard limit=1.5", lambda: certificates.exact_hard(HARD, X, Y, 0.1, limit=1.5), "limit=1.5"),
    ("exact_hard limit=99", lambda: certificates.exact_hard(HARD, X, Y, 0.1, limit=99), "limit=99"),
    ("bounds method", lambda: certificates.bounds(F, X, X, Y, "lp"), "ibp, forward"),
    ("bounds lo above hi", lambda: certificates.bounds(F, X + 0.1, X, Y), "lo <= hi"),
    ("bounds nan", lambda: certificates.bounds(F, NAN, NAN, Y), "lo <= hi"),
    ("bounds shapes", lambda: certificates.bounds(F, X, X[:2], Y), "shapes"),
    ("bounds labels", lambda: certificates.bounds(F, X, X, Y[:2]), "shapes"),
    ("bounds classes", lambda: certificates.bounds(F, X, X, Y + 5), "5 classes"),
    ("Conv1d", lambda: programs.read_program(nn.Sequential(nn.Conv1d(1, 1, 1), nn.Linear(1, 2)).eval()), "Conv1d"),
    ("ends in ReLU", lambda: programs.read_program(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()), "Linear"),
    ("read a text", lambda: programs.read_program("mnist_cnn"), "nn.Module"),
]:
    refuse(f"certificates: {name}", call, words)

# the derivations
for name, call, words in [
    ("inner_maximum eps", lambda: objective.inner_maximum(NET, X, Y, -0.1), "eps"),
    ("inner_maximum steps", lambda: objective.inner_maximum(NET, X, Y, 0.1, steps=0), "steps"),
    ("inner_maximum loss", lambda: objective.inner_maximum(NET, X, Y, 0.1, loss="mse"), "ce, cw, dlr"),
    ("inner_maximum images", lambda: objective.inner_maximum(NET, 255 * X, Y, 0.1), "divide by 255"),
    ("pgd_path setting", lambda: objective.pgd_path(NET, X, Y, 0.1, setting="bpda"), "bpda_ste"),
    ("pgd_path steps", lambda: objective.pgd_path(NET, X, Y, 0.1, steps=0), "steps=0"),
    ("pgd_path step_size", lambda: objective.pgd_path(NET, X, Y, 0.1, step_size=-1), "step_size=-1"),
    ("pgd_path eps", lambda: objective.pgd_path(NET, X, Y, -0.1), "eps="),
    ("pgd_path labels", lambda: objective.pgd_path(NET, X, Y[:2], 0.1), "one label for each"),
    ("noisy_pair", lambda: bound.noisy_pair(X, 16), "16/255"),
    ("noisy_pair nan", lambda: bound.noisy_pair(X, math.nan), "radius=nan"),
    ("noisy_pair text", lambda: bound.noisy_pair(X, "0.1"), "radius='0.1'"),
    ("class_losses", lambda: bound.class_losses(torch.rand(6, 1)), "at least 2"),
    ("label_loss", lambda: bound.label_loss(F(X), Y[:2]), "labels"),
    ("path_integral in float32", lambda: bound.path_integral(F, X, X), "float64"),
    ("path_integral order", lambda: bound.path_integral(DOUBLE, X.double(), X.double(), 0), "order=0"),
    ("sharp_areas", lambda: bound.sharp_areas(0, 1), "at least 1"),
]:
    refuse(f"derivations: {name}", call, words)

# statistics
for name, call, words in [
    ("wilson k > n", lambda: statistics.wilson(5, 4), "k=5"),
    ("wilson k < 0", lambda: statistics.wilson(-1, 4), "k=-1"),
    ("wilson n = 0", lambda: statistics.wilson(0, 0), "n=0"),
    ("wilson nan", lambda: statistics.wilson(math.nan, 4), "k=nan"),
    ("wilson share", lambda: statistics.wilson(0.5, 4), "k=0.5"),
    ("paired lengths", lambda: statistics.paired_difference([True], [True, False]), "same images"),
    ("paired empty", lambda: statistics.paired_difference([], []), "at least one"),
    ("paired accuracies", lambda: statistics.paired_difference([0.5], [0.7]), "boolean"),
    ("grid too small", lambda: statistics.grid_cells({"series": []}, "ce"), "2 × 2"),
    ("points outside", lambda: statistics.occupied_share([[0.2, 0.0]], 0.1), "leaves the square"),
    ("seeds without images", lambda: statistics.seeds_difference(np.ones((2, 0)), np.ones((2, 0))), "same images"),
    ("seeds of other images", lambda: statistics.seeds_difference(np.ones((2, 3)), np.ones((2, 4))), "same images"),
]:  # fmt: skip
    refuse(f"statistics: {name}", call, words)

# data
for name, call, words in [
    ("name", lambda: load("minst"), "there is 'digits'"), ("name None", lambda: load(None), "there is 'digits'"),
    ("split", lambda: load("digits", "val"), "'train' or 'test'"), ("split 0", lambda: load("digits", 0), "'train'"),
    ("download", lambda: load("digits", download="yes"), "True or False"),
    ("available", lambda: available("cifar"), "there is 'digits'"), ("root", lambda: data_root(3), "path of a folder"),
    ("subset 0", lambda: DIGITS.subset(0), "1 to 20"), ("subset 21", lambda: DIGITS.subset(21), "1 to 20"),
    ("subset share", lambda: DIGITS.subset(0.5), "1 to 20"), ("subset text", lambda: DIGITS.subset("5"), "1 to 20"),
    ("floats", lambda: Dataset(X, Y, "a", "A", "test", ("0",)), "uint8"),
    ("numpy", lambda: Dataset(X.numpy(), Y, "a", "A", "test", ("0",)), "uint8"),
    ("labels", lambda: Dataset(DIGITS.x, DIGITS.y[:3], "a", "A", "test", DIGITS.classes), "int64 labels"),
    ("label types", lambda: Dataset(DIGITS.x, DIGITS.y.float(), "a", "A", "test", DIGITS.classes), "int64 labels"),
    ("classes", lambda: Dataset(DIGITS.x, DIGITS.y, "a", "A", "test", ("0",)), "labels must be"),
    ("pad", lambda: crop_flip(X, torch.Generator(), pad=-1), "pad"),
    ("flat", lambda: crop_flip(X.flatten(), torch.Generator()), "N, C, H, W"),
    ("bytes near a threshold", lambda: pixels_near(DIGITS.x), "floats"),
    ("near a threshold", lambda: pixels_near(X, 0.5, -0.1), "eps"),
]:  # fmt: skip
    refuse(f"data: {name}", call, words)


# files
def file(folder, name, content):
    "A file with this content."
    path = Path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def record_file(folder, again=False, **change):
    "A record, changed after it was written (again: with a digest that fits)."
    path = records.save_record(Path(folder, "toy-0", "record.json"), {"hash": "a", "value": 1})
    if again:
        return records.save_record(path, {**records.load_json(path), **change})
    path.write_text(json.dumps({**records.load_json(path), **change}), encoding="utf-8")
    return path


def checkpoint(folder, **change):
    "A checkpoint, with something else in its description."
    path = save_checkpoint(Path(folder, "model.safetensors"), build("cifar_tiny"))
    with safetensors.safe_open(path, "pt") as f:
        meta, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
    about = json.loads(meta["nsq"]) | change
    safetensors.torch.save_file(tensors, path, {"nsq": json.dumps(about)})
    return path


def cut_short(path, by=9):
    "The same file without its end."
    path.write_bytes(path.read_bytes()[:-by])
    return path


LABELS = bytes((0, 0, 8, 1, 0, 0, 0))  # how a file of fewer than 256 labels begins


def mnist(folder, name, content, split="test"):
    "The set in a folder in which one of four files is other than it should be."
    for n, (images, labels) in enumerate((("train-images", "train-labels"), ("t10k-images", "t10k-labels"))):
        count, pixels = 3 + n, bytes(28 * 28 * (3 + n))
        head = bytes((0, 0, 8, 3, 0, 0, 0, count, 0, 0, 0, 28, 0, 0, 0, 28))
        file(folder, f"MNIST/raw/{images}-idx3-ubyte", head + pixels)
        file(folder, f"MNIST/raw/{labels}-idx1-ubyte", bytes((0, 0, 8, 1, 0, 0, 0, count)) + bytes(count))
    file(folder, f"MNIST/raw/{name}", content)
    return load("mnist", split, folder)


for name, call, words, *kind in [
    ("empty record", lambda d: records.load_json(file(d, "a.json", "")), "is damaged"),
    ("half a record", lambda d: records.load_json(file(d, "a.json", '{"a": 1')), "is damaged"),
    ("record of bytes", lambda d: records.load_json(file(d, "a.json", b"\xff\xfe\x00")), "is damaged"),
    ("no record", lambda d: records.load_json(d / "a.json"), "a.json", FileNotFoundError),
    ("a list for a record", lambda d: records.load_record(file(d, "a.json", "[1]")), "is damaged"),
    ("a changed record", lambda d: records.load_record(record_file(d, value=2)), "was changed"),
    ("no digest", lambda d: records.load_record(file(d, "a.json", '{"a": 1}')), "was changed"),
    ("another run's record", lambda d: records.load_record(record_file(d), "b"), "another run"),
    ("a lost file", lambda d: records.load_record(record_file(d, files={"m": "0"}, again=True)), "not the file"),
    ("a changed cell", lambda d: read_cell(record_file(d, value=3)), "was changed"),
    ("nan in a record", lambda d: records.save_json(d / "a.json", {"a": math.nan}), "JSON compliant"),
    ("no checkpoint", lambda d: load_checkpoint(d / "none.safetensors"), "no checkpoint", FileNotFoundError),
    ("text for a checkpoint", lambda d: load_checkpoint(file(d, "a.safetensors", "weights")), "not a safetensors file"),
    ("empty checkpoint", lambda d: load_checkpoint(file(d, "a.safetensors", "")), "not a safetensors file"),
    ("half a checkpoint", lambda d: load_checkpoint(cut_short(checkpoint(d))), "damaged"),
    ("a pickle", lambda d: (torch.save({}, d / "a.pt"), load_checkpoint(d / "a.pt"))[1], "not a safetensors file"),
    ("weights alone", lambda d: load_checkpoint(file(d, "a.st", safetensors.torch.save({"a": X}))), "not a checkpoint"),
    ("a changed checkpoint", lambda d: load_checkpoint(checkpoint(d, network="x")), "not those that were saved"),
    ("a folder", lambda d: load_checkpoint(d), "no checkpoint", FileNotFoundError),
    ("a network without a name", lambda d: save_checkpoint(d / "a", F), "no name to load it by"),
    ("a clash", lambda d: save_checkpoint(d / "a", build("cifar_tiny"), {"network": "x"}), "meta says"),
    ("no MNIST", lambda d: load("mnist", root=d), "NSQ_DATA", FileNotFoundError),
    ("no CIFAR-10", lambda d: load("cifar10", root=d), "NSQ_DATA", FileNotFoundError),
    ("empty IDX", lambda d: mnist(d, "t10k-images-idx3-ubyte", b""), "is damaged"),
    ("text for IDX", lambda d: mnist(d, "t10k-images-idx3-ubyte", "<html>not found</html>" * 9), "is damaged"),
    ("packed IDX", lambda d: mnist(d, "t10k-images-idx3-ubyte", b"\x1f\x8b\x08" + bytes(99)), "is damaged"),
    ("half an IDX", lambda d: mnist(d, "t10k-images-idx3-ubyte", bytes((0, 0, 8, 3)) + bytes(12) + b"1"), "is damaged"),
    ("labels for images", lambda d: mnist(d, "t10k-images-idx3-ubyte", bytes((0, 0, 8, 1)) + bytes(99)), "is damaged"),
    ("a label too few", lambda d: mnist(d, "t10k-labels-idx1-ubyte", LABELS + bytes((1, 0))), "a label for each"),
    ("a label of 11", lambda d: mnist(d, "t10k-labels-idx1-ubyte", LABELS + bytes((4, 0, 1, 2, 11))), "0 to 9"),
    ("images as numbers", lambda d: records.images_to_text(X), "uint8"),
    ("a scale", lambda d: records.best_record("fig3", "huge"), "smoke, cpu, paper"),
]:  # fmt: skip
    refuse(f"files: {name}", call, words, *kind)

# parameters of experiments, as the command line gives them
BY_TYPE = {
    "bool": ("maybe", "2", ""), "int": ("1.5", "many", "nan", ""), "float": ("much", "nan", "inf", "1/0", ""),
    "tuple[float": ("", "a", "0.1 b", "nan", "-1", "0.1 0.1"), "tuple[str": ("", "nqs", "nsq,pdg", "1"),
    "tuple[int": ("", "1.5", "a"),
}  # fmt: skip
NUMBERS = {"least": lambda v: v - 1, "above": lambda v: v, "most": lambda v: v + 1}
EXPERIMENTS = [ex.find_experiment(name) for name in ex.experiment_names()]
for e in EXPERIMENTS:
    for f in fields(e.parameters):
        if f.name in ("device", "data_root", "network") or f.metadata.get("one_of") == () and f.type == "str | None":
            continue
        values = next((v for kind, v in BY_TYPE.items() if str(f.type).startswith(kind)), ("none such",))
        limits = {k: f"{change(f.metadata[k]):g}" for k, change in NUMBERS.items() if f.metadata[k] is not None}
        for value in dict.fromkeys((*values, *limits.values())):
            refuse(
                f"{e.name} -p {f.name} {value!r}",
                lambda e=e, k=f.name, v=value: e.presets and decided(e, {"scale": "smoke", k: v}),
                rf"{f.name}=",
            )
    refuse(f"{e.name} -p K_ 1", lambda e=e: ex.read(e.parameters, {"K_": "1"}), "unknown parameter K_")
    refuse(f"{e.name} -p device gpu", lambda e=e: decided(e, {"scale": "smoke", "device": "gpu"}), "device='gpu'")
    refuse(f"{e.name} -p device cuda:99", lambda e=e: decided(e, {"scale": "smoke", "device": "cuda:99"}), "cuda:99")


def decided(e, given):
    "What an experiment would do with these parameters."
    q = ex.read(e.parameters, given)
    module = importlib.import_module(f"nsq_repro.{e.name}")
    decide = next(getattr(module, name) for name in ("protocol", "plan", "grid") if hasattr(module, name))
    ex.choose_device(q.device)
    return decide(**given)


for name, given, words in [
    ("noise 0 with nsq", {"noise": "0"}, "above 0"), ("network", {"network": "vgg"}, "network="),
    ("models twice", {"models": "nsq nsq"}, "models="), ("bytes", {"eps": "8"}, "8/255"),
    ("losses", {"losses": "ce,ce"}, "losses="), ("eps falling", {"eps": "0.2 0.1"}, "eps="),
]:  # fmt: skip
    refuse(f"mnist -p {name}", lambda g=given: decided(ex.find_experiment("mnist"), {"scale": "smoke", **g}), words)
refuse("workers on a GPU", lambda: Workers(2, "cuda"), "workers=2")
refuse("workers 0", lambda: Workers(0), "workers=0")
refuse("workers '2'", lambda: Workers("2"), "workers='2'")


@pytest.fixture(autouse=True)
def an_empty_home(tmp_path, monkeypatch):
    monkeypatch.setenv("NSQ_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize("what, call, kind, words", TABLE, ids=[row[0] for row in TABLE])
def test_one_line_refuses(what, call, kind, words, tmp_path, an_empty_home):
    with pytest.raises(kind, match=words) as refused:
        call(tmp_path) if what.startswith("files: ") else call()
    assert "\n" not in str(refused.value).removesuffix("\n") and len(str(refused.value)) < 1000
    assert not list(an_empty_home.glob("**/record.json"))


OPTIONS = [
    ("run", "invalid|required"), ("run nothing", "no experiment is called"), ("run mnits", "did you mean mnist"),
    ("run mnist -p K", "expected 2 arguments"), ("run mnist --scale huge", "invalid choice"),
    ("run mnist --lots", "unrecognized"), ("run mnist --list", "one run, not a grid"),
    ("verify --scale auto", "invalid choice"),
    ("verify fig3", "unrecognized"), ("list --xml", "unrecognized"), ("clean --no", "unrecognized"),
    ("doctor now", "unrecognized"), ("train", "invalid choice"), ("", "required"),
    ("run mnist --plain -p levels 2", "unknown parameter levels"), ("run mnist -p K 0", "K=0"),
    ("run mnist --plain -p n_test 501 --scale smoke", "only 500"), ("run mnist --plain -p models ,", "models="),
]  # fmt: skip


@pytest.mark.parametrize("line, words", OPTIONS, ids=[line or "nothing" for line, _ in OPTIONS])
def test_the_command_line_refuses(line, words, capsys, an_empty_home):
    try:
        status, said = cli.main(line.split()), ""
    except SystemExit as e:  # argparse, and what is said before a run
        status, said = (e.code, "") if isinstance(e.code, int) else (1, str(e.code))
    said += capsys.readouterr().err
    assert status in (1, 2) and "Traceback" not in said and not list(an_empty_home.glob("runs/*"))
    assert re.search(words, said.splitlines()[-1]), said


ACCEPTED = [
    ("refresh", "false", False), ("refresh", "No", False), ("refresh", "1", True), ("alpha", "1e3", 1000.0),
    ("alpha", "500 ", 500.0), ("eps", "8/255", (8 / 255,)), ("eps", "[0, 0.1]", (0.0, 0.1)), ("K", "2.0", 2),
    ("models", "nsq,pgd", ("nsq", "pgd")), ("models", "nsq", ("nsq",)), ("K", "none", None), ("seed", "7", 7),
    ("eps", " ".join(f"{k / 100}" for k in range(31)), tuple(k / 100 for k in range(31))),
]  # fmt: skip


@pytest.mark.parametrize("name, text, value", ACCEPTED)
def test_these_texts_are_right(name, text, value):
    assert getattr(ex.read(ex.find_experiment("mnist").parameters, {name: text}), name) == value
    decided(ex.find_experiment("mnist"), {"scale": "smoke", name: text})


def test_the_table_is_long_and_every_network_is_in_it():
    names = [row[0] for row in TABLE]
    assert len(names) == len(set(names)) >= 250 and len(NETWORKS) >= 5
