"""What can go wrong with image sets: missing, damaged, no network, wrong arguments. No set on the machine is needed."""
import functools
import gzip
import hashlib
import http.server
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsq_repro import data

FILES = [f for pair in data.MNIST_FILES.values() for f in pair]


def idx(array):
    "The bytes of an IDX file."
    return np.array([0x800 + array.ndim, *array.shape], ">u4").tobytes() + array.astype(np.uint8).tobytes()


@pytest.fixture
def fake(tmp_path):
    "A small set in MNIST's layout: 7 training and 5 test images. Returns its root."
    raw, rng = tmp_path / "root" / "MNIST" / "raw", np.random.default_rng(0)
    raw.mkdir(parents=True)
    for n, (images, labels) in zip((7, 5), data.MNIST_FILES.values()):
        (raw / images).write_bytes(idx(rng.integers(0, 256, (n, 28, 28))))
        (raw / labels).write_bytes(idx(np.arange(n)))
    return tmp_path / "root"


@pytest.fixture
def offline(monkeypatch):
    "No name resolves and no proxy is known."
    def refuse(*args, **kwargs):
        raise socket.gaierror(-3, "Temporary failure in name resolution")
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def message(error, *args, **kwargs):
    with pytest.raises(error) as e:
        data.load(*args, **kwargs)
    return str(e.value)


def test_digits_need_nothing(monkeypatch, offline, tmp_path):
    monkeypatch.setenv("NSQ_DATA", str(tmp_path / "nowhere"))
    train, test = data.load("digits", "train"), data.load("digits")
    assert len(train) + len(test) == 1797 and data.available("digits") and not data.available("mnist")
    assert not (tmp_path / "nowhere").exists()
    from sklearn.datasets import load_digits
    assert torch.cat([train.y, test.y]).tolist() == load_digits().target.tolist()


def test_import_is_light():
    "The module itself loads neither torchvision nor scikit-learn."
    code = "import sys, nsq_repro.data; assert not {'torchvision', 'sklearn', 'matplotlib', 'fastcore'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_files_as_they_are(fake):
    "Every byte and label arrives where it was, under a name that does not claim to be MNIST."
    for split, n in (("train", 7), ("test", 5)):
        images, labels = (fake / "MNIST" / "raw" / f for f in data.MNIST_FILES[split])
        d = data.load("mnist", split, root=fake)
        assert d.x.numpy().tobytes() == images.read_bytes()[16:] and d.y.tolist() == list(range(n))
        assert (d.name, d.title) == ("mnist", "MNIST layout, not the canonical images")


def test_root(fake, monkeypatch, tmp_path):
    "The argument, else NSQ_DATA, else a folder in the home directory."
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NSQ_DATA", str(fake))
    assert len(data.load("mnist")) == 5 and data.available("mnist")
    assert str(tmp_path / "other") in message(FileNotFoundError, "mnist", root=tmp_path / "other")
    monkeypatch.setenv("NSQ_DATA", "")
    assert str(tmp_path / "home" / ".cache" / "nsq-repro") in message(FileNotFoundError, "mnist")
    assert str(tmp_path / "home" / "x") in message(FileNotFoundError, "mnist", root="~/x")


def test_missing_says_what_where_and_how(tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: pytest.fail("a download nobody asked for"))
    text = message(FileNotFoundError, "mnist", root=tmp_path)
    assert all(f in text for f in FILES) and str(tmp_path / "MNIST" / "raw") in text
    assert "NSQ_DATA" in text and "download=True" in text and "all four" in text
    assert not list(tmp_path.iterdir())


def test_one_file_missing(fake):
    (fake / "MNIST" / "raw" / FILES[1]).unlink()
    assert f"missing: {FILES[1]}." in message(FileNotFoundError, "mnist", root=fake)


def test_root_is_a_file(tmp_path):
    (tmp_path / "f").write_text("")
    assert str(tmp_path / "f") in message(FileNotFoundError, "mnist", root=tmp_path / "f")
    assert str(tmp_path / "f") in message(FileNotFoundError, "mnist", root=tmp_path / "f", download=True)


@pytest.mark.parametrize("file", data.MNIST_FILES["test"])
@pytest.mark.parametrize("harm", ["empty", "header", "last byte", "half", "longer", "gzip"])
def test_damaged_file_is_named(fake, file, harm):
    path = fake / "MNIST" / "raw" / file
    b = path.read_bytes()
    path.write_bytes({"empty": b"", "header": b[:6], "last byte": b[:-1], "half": b[:len(b) // 2], "longer": b + b"\0", "gzip": gzip.compress(b)}[harm])
    text = message(ValueError, "mnist", root=fake)
    assert text.startswith(str(path)) and "damaged" in text and "Delete it" in text
    assert len(data.load("mnist", "train", root=fake)) == 7  # the other split is whole


def test_files_that_do_not_fit(fake):
    images, labels = (fake / "MNIST" / "raw" / f for f in data.MNIST_FILES["test"])
    labels.write_bytes(idx(np.arange(4)))
    assert str(labels) in message(ValueError, "mnist", root=fake)
    labels.write_bytes(idx(np.arange(5) + 8))
    assert "labels must be 0 to 9" in message(ValueError, "mnist", root=fake)
    images.write_bytes(idx(np.zeros((5, 32, 32))))
    assert "28×28" in message(ValueError, "mnist", root=fake)


def test_no_network(tmp_path, offline):
    "A failed download says so in one line, and leaves nothing that a later load would take for the set."
    text = message(FileNotFoundError, "mnist", root=tmp_path, download=True)
    assert "could not be downloaded" in text and "name resolution" in text and str(tmp_path / "MNIST" / "raw") in text and "\n" not in text
    assert "was not found" in message(FileNotFoundError, "mnist", root=tmp_path)


@pytest.fixture
def mirror(fake, tmp_path, monkeypatch):
    "The folder of a server on this machine, with the small set packed as the download's server packs it."
    from torchvision.datasets import MNIST
    served = tmp_path / "mirror"
    served.mkdir()
    for f in FILES:
        (served / f"{f}.gz").write_bytes(gzip.compress((fake / "MNIST" / "raw" / f).read_bytes()))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=served)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(.05,), daemon=True).start()
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    monkeypatch.setattr(MNIST, "resources", [(f"{f}.gz", hashlib.md5((served / f"{f}.gz").read_bytes()).hexdigest()) for f in FILES])
    yield served
    server.shutdown()
    server.server_close()


def test_download(fake, mirror, tmp_path, monkeypatch):
    "What was downloaded equals what was served, and is not downloaded twice."
    new = tmp_path / "new"
    d = data.load("mnist", root=new, download=True)
    assert d.fingerprint == data.load("mnist", root=fake).fingerprint
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: pytest.fail("downloaded twice"))
    assert data.load("mnist", root=new, download=True).fingerprint == d.fingerprint


def test_damaged_download(mirror, tmp_path):
    "A file that arrives cut short fails its checksum and is not unpacked."
    f = mirror / f"{FILES[0]}.gz"
    f.write_bytes(f.read_bytes()[:-20])
    assert "could not be downloaded" in message(FileNotFoundError, "mnist", root=tmp_path / "new", download=True)
    assert not data.available("mnist", root=tmp_path / "new")


@pytest.mark.parametrize("args", [("cifar",), ("MNIST",), ("",), ("mnist", "valid"), ("digits", None)])
def test_wrong_arguments(args):
    text = message(ValueError, *args)
    assert repr(args[-1]) in text and ("'mnist'" in text or "'test'" in text)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 255), min_size=1, max_size=30), st.integers(0, 255), st.integers(0, 255))
def test_pixels_near(values, t, eps):
    "Counting in floats gives what counting in whole 255ths gives."
    x = (torch.tensor(values, dtype=torch.uint8).float() / 255).view(1, 1, 1, -1)
    assert data.pixels_near(x, t / 255, eps / 255).tolist() == [sum(abs(v - t) <= eps for v in values)]


@pytest.mark.parametrize("kwargs", [{"t": -.1}, {"t": 1.1}, {"eps": -.1}, {"eps": float("nan")}])
def test_pixels_near_refuses(kwargs):
    with pytest.raises(ValueError):
        data.pixels_near(torch.zeros(1, 1, 2, 2), **kwargs)
