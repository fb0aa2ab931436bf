"""What can go wrong with image sets: missing, damaged, no network, wrong arguments. No set on the machine is needed."""

import functools
import gzip
import hashlib
import http.server
import io
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import PROCESSES

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
    "What `data.load` says when it refuses."
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
    path.write_bytes(
        {
            "empty": b"",
            "header": b[:6],
            "last byte": b[:-1],
            "half": b[: len(b) // 2],
            "longer": b + b"\0",
            "gzip": gzip.compress(b),
        }[harm]
    )
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
    assert (
        "could not be downloaded" in text
        and "name resolution" in text
        and str(tmp_path / "MNIST" / "raw") in text
        and "\n" not in text
    )
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
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    monkeypatch.setattr(
        MNIST, "resources", [(f"{f}.gz", hashlib.md5((served / f"{f}.gz").read_bytes()).hexdigest()) for f in FILES]
    )
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


@pytest.mark.parametrize("kwargs", [{"t": -0.1}, {"t": 1.1}, {"eps": -0.1}, {"eps": float("nan")}])
def test_pixels_near_refuses(kwargs):
    with pytest.raises(ValueError):
        data.pixels_near(torch.zeros(1, 1, 2, 2), **kwargs)


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """CIFAR-10 as a folder of images: two training and one test image of each class, and their pixels.
    Returns root and pixels."""
    from PIL import Image

    root, pixels = tmp_path / "root", {}
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for split, n in (("train", 2), ("test", 1)):
        pixels[split] = np.random.default_rng(n).integers(0, 256, (n, 10, 32, 32, 3), np.uint8)
        for c, name in enumerate(data.CIFAR_CLASSES):
            (root / "cifar10" / split / name).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(pixels[split][i, c]).save(root / "cifar10" / split / name / f"{i:04}.png")
    return root, pixels


def test_photos_need_nothing(monkeypatch, offline, tmp_path):
    "Every patch is a piece of its photograph, inside the rectangle of its class; equal each time."
    monkeypatch.setenv("NSQ_DATA", str(tmp_path / "nowhere"))
    from sklearn.datasets import load_sample_images

    photos = [torch.from_numpy(np.array(i)).permute(2, 0, 1) for i in load_sample_images().images]
    for split, n in (("train", 375), ("test", 125)):
        d = data.load("photos", split)
        assert d.fingerprint == data.load("photos", split).fingerprint and len(d.x.flatten(1).unique(dim=0)) == 4 * n
        assert d.y.bincount().tolist() == [n] * 4 and all(
            d.y[i : i + 100].bincount(minlength=4).min() > 10 for i in range(0, 4 * n, 100)
        )
        for label, (photo, top, bottom, left, right) in enumerate(data.PHOTO_AREAS.values()):
            area = photos[photo][:, top:bottom, left:right]
            area = area[:, :, -64:] if split == "test" else area[:, :, :-64]
            windows = {
                w.numpy().tobytes()
                for w in area.unfold(1, 32, 1).unfold(2, 32, 1)[:, ::4, ::4].permute(1, 2, 0, 3, 4).flatten(0, 1)
            }
            assert all(x.numpy().tobytes() in windows for x in d.x[d.y == label])


def test_image_folder(copy):
    "Every pixel arrives, classes by turns, under a name that says what it is."
    root, pixels = copy
    assert data.available("cifar10", root)
    for split in ("train", "test"):
        d = data.load("cifar10", split, root)
        assert d.x.numpy().tobytes() == pixels[split].transpose(0, 1, 4, 2, 3).tobytes()
        assert d.y.tolist() == [*range(10)] * len(pixels[split]) and d.classes[3] == "cat"
        assert (d.name, d.title) == ("cifar10", "CIFAR-10 (30 of 60,000 images)")


def test_titles(monkeypatch):
    "A complete copy, the known one, and those with a wrong number of images; lossless files and others."
    x, y = torch.zeros(10_000, 3, 1, 1, dtype=torch.uint8), torch.arange(10).repeat(1000)
    make = lambda *args: data._copy_of_cifar10(*args[:2], "test", *args[2:])
    assert make(x, y).title == "CIFAR-10 (image-folder copy)"
    assert make(x, y.flip(0).clamp(min=1)).title.endswith("incomplete)")
    assert make(x[:9_966], y[:9_966], 59_849).title == "CIFAR-10 (59,849 of 60,000 images)"
    assert make(x, y.clamp(min=1), 60_000).title == "CIFAR-10 layout, not the original images"
    monkeypatch.setitem(data.CIFAR_COPIES, data.fingerprint(x, y), "CIFAR-10 (JPEG copy)")
    assert make(x, y, 60_000).title == "CIFAR-10 (JPEG copy)"
    assert make(x, y).title == "CIFAR-10 (JPEG copy)"


def decodings(monkeypatch):
    "A list that grows by one with each image decoded."
    seen, read = [], data._read_image
    monkeypatch.setattr(data, "_read_image", lambda path: seen.append(path) or read(path))
    return seen


def test_decoded_once(copy, monkeypatch):
    root, _ = copy
    seen = decodings(monkeypatch)
    first, second = (data.load("cifar10", root=root) for _ in range(2))
    assert len(seen) == 10 and first.fingerprint == second.fingerprint and first.title == second.title
    assert (root / "cifar10" / "decoded-test.safetensors").is_file()


@pytest.mark.parametrize("change", ["other bytes", "one more", "one less", "touched", "moved", "swapped", "same size"])
def test_changed_copy_is_noticed(copy, monkeypatch, change):
    from PIL import Image

    root, _ = copy
    before, seen = data.load("cifar10", "train", root), decodings(monkeypatch)
    file = root / "cifar10" / "train" / "frog" / "0001.png"
    cat, was = root / "cifar10" / "train" / "cat", file.stat()
    if change == "touched":
        os.utime(file, ns=(2 * 10**18, 2 * 10**18))
    elif change == "moved":  # neither sizes nor times tell
        file.rename(cat / "0002.png")
    elif change == "swapped":
        file.rename(cat / "x"), (cat / "0001.png").rename(file), (cat / "x").rename(cat / "0001.png")
    elif change == "same size":  # the time is set back
        content = bytearray(file.read_bytes())
        content[-1] ^= 1  # in the checksum of the last, empty chunk
        file.write_bytes(content)
        os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
    elif change == "one less":
        file.unlink()
    else:
        Image.new("RGB", (32, 32), "red").save(file if change == "other bytes" else file.with_name("0002.png"))
    after = data.load("cifar10", "train", root)
    assert len(seen) == len(after) == 20 + (change == "one more") - (change == "one less")
    assert (after.fingerprint == before.fingerprint) == (change in ("touched", "same size"))
    if change == "moved":
        assert after.y.bincount()[[3, 6]].tolist() == [3, 1]


@pytest.mark.parametrize("harm", ["empty", "half", "pixel", "label"])
def test_damaged_cache(copy, capsys, harm):
    root, _ = copy
    good, path = data.load("cifar10", root=root), root / "cifar10" / "decoded-test.safetensors"
    b = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(b[:8], "little")
    b[{"pixel": -1, "label": header + 1}.get(harm, 0)] ^= 1 if harm in ("pixel", "label") else 0
    path.write_bytes({"empty": b"", "half": b[: len(b) // 2]}.get(harm, b))
    assert data.load("cifar10", root=root).fingerprint == good.fingerprint
    assert f"{path} is damaged" in capsys.readouterr().out
    data.load("cifar10", root=root)
    assert not capsys.readouterr().out


def test_root_that_cannot_be_written(copy, monkeypatch, tmp_path):
    "The decoded images go to the home directory; without that too, they are decoded each time."
    root, _ = copy
    write = data.atomic_write

    def elsewhere(path, content):
        if root in path.parents:
            raise OSError(30, "Read-only file system")
        return write(path, content)

    monkeypatch.setattr(data, "atomic_write", elsewhere)
    seen, kept = (
        decodings(monkeypatch),
        tmp_path / "home" / ".cache" / "nsq-repro" / "cifar10" / "decoded-test.safetensors",
    )
    a, b = (data.load("cifar10", root=root) for _ in range(2))
    assert (
        len(seen) == 10
        and a.fingerprint == b.fingerprint
        and kept.is_file()
        and not list(root.glob("**/*.safetensors"))
    )
    kept.unlink()
    root = tmp_path
    assert data.load("cifar10", root=tmp_path / "root").fingerprint == a.fingerprint and not kept.exists()


def _image(mode="RGB", size=(32, 32)):
    from PIL import Image

    return Image.new(mode, size, 7)


def _write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def _save(image, format="PNG", name="0000.png", **how):
    return lambda folder: image().save(folder / name, format, **how)


def _cut(folder, keep):
    file = folder / "0000.png"
    file.write_bytes(file.read_bytes()[:keep])


# what is done to the folder of the dogs → what the error says, after the path of the file it names
BAD_FILES = {
    "empty file": (_write("0000.png", b""), "0000.png is damaged, or not an image (no PNG, JPEG or WebP)"),
    "text": (_write("0000.png", b"text"), "0000.png is damaged, or not an image (no PNG, JPEG or WebP). Copy it again"),
    "half": (lambda d: _cut(d, 1500), "0000.png is damaged, or not an image (image file is truncated). Copy it again"),
    "header only": (lambda d: _cut(d, 20), "0000.png is damaged, or not an image (Truncated File Read)."),
    "GIF named PNG": (_save(_image, "GIF"), "0000.png is damaged, or not an image (no PNG, JPEG or WebP)"),
    "wide": (_save(lambda: _image(size=(33, 32))), "0000.png has 33×32 pixels; CIFAR-10's images have 32×32"),
    "huge": (_save(lambda: _image("1", (20_000, 10_000))), "0000.png is damaged, or not an image (Image size"),
    "grey, 16 bits": (_save(lambda: _image("I;16")), "0000.png has 16 bits a channel; CIFAR-10's images have 8."),
    "CMYK": (_save(lambda: _image("CMYK"), "JPEG"), "0000.png is CMYK; it must be one RGB or grey image"),
    "transparent": (_save(lambda: _image("RGBA")), "0000.png is RGBA; it must be one RGB or grey image"),
    "one colour clear": (_save(_image, transparency=(7, 0, 0)), "0000.png is RGB with transparency; it must be one"),
    "animated": (
        _save(_image, save_all=True, append_images=[_image("RGB", (32, 32)).point(lambda v: v + 1)]),
        "0000.png is RGB in 2 frames; it must be one RGB or grey image",
    ),
    "no image": (_write("notes.txt", b""), "notes.txt is not named like an image (.png, .webp, .jpg, .jpeg)."),
    "folder in a class": (lambda d: (d / "more").mkdir(), "more is not named like an image"),
    "folder named PNG": (lambda d: (d / "1.png").mkdir(), "1.png cannot be read (Is a directory). Copy it again"),
    "link to nothing": (lambda d: (d / "1.png").symlink_to("no"), "1.png cannot be read (No such file or directory)"),
    "empty class": (lambda d: (d / "0000.png").unlink(), "dog holds no images; each of the 10 classes needs some"),
    "only resources": (
        lambda d: (d / "0000.png").rename(d / "._0000.png"), "dog holds no images; each of the 10 classes needs some",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_named(copy, case):
    spoil, says = BAD_FILES[case]
    folder = copy[0] / "cifar10" / "test" / "dog"
    spoil(folder)
    text = message(ValueError, "cifar10", root=copy[0])
    assert "\n" not in text and "0x" not in text and says in text
    assert text.startswith(str(folder if says.startswith("dog") else folder / says.split(" ")[0]))
    assert len(data.load("cifar10", "train", copy[0])) == 20  # the other split is whole


def test_16_bits_in_colour(copy):
    "PIL would cut 16 bits of a colour to 8 without a word."
    import struct
    import zlib

    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    rows = b"".join(b"\0" + bytes(32 * 6) for _ in range(32))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 32, 16, 2, 0, 0, 0))
    content = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (copy[0] / "cifar10" / "test" / "dog" / "0000.png").write_bytes(content)
    assert "0000.png has 16 bits a channel" in message(ValueError, "cifar10", root=copy[0])


def test_what_is_taken(copy):
    "Hidden files are passed over; a PNG named JPEG, palettes, grey images and lossless WebP are what they are."
    root, pixels = copy
    dogs = root / "cifar10" / "test" / "dog"
    (dogs / "._0000.png").write_bytes(b"resource"), (dogs / ".DS_Store").write_bytes(b""), (dogs / "Thumbs.db").touch()
    (dogs / "0000.png").rename(dogs / "0000.JPG")
    first = data.load("cifar10", root=root)
    assert len(first) == 10 and first.title == "CIFAR-10 (30 of 60,000 images)"
    _save(lambda: _image("L"), name="1.png")(dogs), _save(lambda: _image("P"), name="2.png")(dogs)
    _save(_image, "WEBP", "3.webp", lossless=True)(dogs)
    d = data.load("cifar10", root=root)
    assert len(d) == 13 and d.title == "CIFAR-10 (33 of 60,000 images)"
    assert (d.x[10] == 7).all() and d.x[12].flatten(1).unique(dim=1).flatten().tolist() == [7, 0, 0]
    for format, name in (("WEBP", "4.webp"), ("JPEG", "4.png")):
        _save(_image, format, name, quality=75)(dogs)
        assert data.load("cifar10", root=root).title == "CIFAR-10 (image-folder copy, incomplete)"
        assert data.load("cifar10", root=root).title == "CIFAR-10 (image-folder copy, incomplete)"  # from what was kept
        (dogs / name).unlink()


BAD_CALLS = [
    (lambda: data.load("cifar"), "name is 'cifar'; there is 'digits', 'mnist', 'photos', 'cifar10'"),
    (lambda: data.load(["mnist"]), "name is ['mnist']; there is"),
    (lambda: data.load(None), "name is None; there is"),
    (lambda: data.load("digits", "val"), "split is 'val'; it must be 'train' or 'test'"),
    (lambda: data.load("digits", ["test"]), "split is ['test']; it must be"),
    (lambda: data.load("digits", download="no"), "download is 'no'; it must be True or False"),
    (lambda: data.load("digits", root=5), "root is 5; it must be the path of a folder"),
    (lambda: data.load("digits", root="~nobody-of-this-name/x"), "root is '~nobody-of-this-name/x'; it must be"),
    (lambda: data.available("cifar"), "name is 'cifar'; there is"),
    (lambda: data.load("digits").subset(0), "n is 0; scikit-learn digits, resized to 28×28 (test) has 1 to 500"),
    (lambda: data.load("digits").subset(501), "n is 501;"),
    (lambda: data.load("digits").subset(2.5), "n is 2.5;"),
    (lambda: data.load("digits").subset("5"), "n is 5;"),
    (lambda: data.pixels_near(np.zeros((1, 1, 2, 2))), "x is ndarray; it must be floats in [0, 1]"),
    (lambda: data.pixels_near(torch.zeros(1, 1, 2, 2, dtype=torch.uint8)), "x is torch.uint8; it must be floats"),
    (lambda: data.pixels_near(torch.full((1, 1, 2, 2), 255.0)), "x has pixels outside [0, 1], or nan; divide bytes by"),
    (lambda: data.pixels_near(torch.full((1, 1, 2, 2), -1.0)), "x has pixels outside [0, 1]"),
    (lambda: data.pixels_near(torch.full((1, 1, 2, 2), float("nan"))), "x has pixels outside [0, 1], or nan"),
    (lambda: data.crop_flip(torch.zeros(1, 1, 2, 2), torch.Generator(), 1.5), "pad is 1.5; images must be"),
]


@pytest.mark.parametrize("case", range(len(BAD_CALLS)))
def test_bad_calls(case):
    call, says = BAD_CALLS[case]
    with pytest.raises(ValueError) as e:
        call()
    assert says in str(e.value) and "\n" not in str(e.value)


BYTES, LABELS = torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.tensor([0, 1])
BAD_SETS = [
    (BYTES.float(), LABELS, "x must be uint8 images (N, C, H, W), not torch.float32 (2, 1, 3, 3)"),
    (BYTES[0], LABELS, "x must be uint8 images (N, C, H, W), not torch.uint8 (1, 3, 3)"),
    (BYTES.numpy(), LABELS, "x must be uint8 images (N, C, H, W), not a ndarray"),
    (BYTES, LABELS.int(), "y must be int64 labels (2,), not torch.int32 (2,)"),
    (BYTES, LABELS[:1], "y must be int64 labels (2,), not torch.int64 (1,)"),
    (BYTES, [0, 1], "y must be int64 labels (2,), not a list"),
    (BYTES, LABELS + 1, "labels must be 0 to 1, not 1 to 2"),
    (BYTES, LABELS - 1, "labels must be 0 to 1, not -1 to 0"),
]


@pytest.mark.parametrize("case", range(len(BAD_SETS)))
def test_bad_sets(case):
    x, y, says = BAD_SETS[case]
    with pytest.raises(ValueError) as e:
        data.Dataset(x, y, "t", "T", "test", ("a", "b"))
    assert str(e.value) == says


def decode(root, ends):
    "Decode when told to; tell of each image, and at last what was printed and decoded."
    read, printed = data._read_image, io.StringIO()

    def slow(path):
        ends.send("decoded")
        time.sleep(0.1)
        return read(path)

    data._read_image = slow
    ends.recv()
    with redirect_stdout(printed):
        found = data.load("cifar10", "train", root).fingerprint
    ends.send((printed.getvalue(), found))


def test_two_processes_decode_once(copy):
    "Both want the same folder at once: one decodes, the other waits for it and reads what it has made."
    pipes = [PROCESSES.Pipe() for _ in range(2)]
    for _, theirs in pipes:
        PROCESSES.Process(target=decode, args=(copy[0], theirs), daemon=True).start()
    (first, _), (second, _) = pipes
    first.send("go")
    assert first.poll(120) and first.recv() == "decoded"
    second.send("go")
    told = {p: [] for p in (second, first)}
    for p, lines in told.items():
        while not lines or lines[-1] == "decoded":
            assert p.poll(120)
            lines.append(p.recv())
    (printed, found), (_, same) = (lines.pop() for lines in told.values())
    assert [len(lines) for lines in told.values()] == [0, 19] and found == same
    assert "another process; waiting" in printed and not list(copy[0].glob("**/*.part"))


@pytest.mark.parametrize("utf8", "01")
def test_any_locale(copy, tmp_path, utf8):
    "Names that the locale cannot say; what was decoded under one is read under another."
    root = copy[0].rename(tmp_path / "Größe")
    for i, file in enumerate(sorted(root.glob("cifar10/test/*/*.png"))):
        file.rename(file.with_name(f"ä{i}.png"))
    code = "import sys; from nsq_repro import data; print(data.load('cifar10', root=sys.argv[1]).fingerprint)"
    env = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": utf8}
    here = data.load("cifar10", root=root).fingerprint
    made = (root / "cifar10" / "decoded-test.safetensors").stat().st_mtime_ns
    done = subprocess.run([sys.executable, "-c", code, str(root)], env=env, capture_output=True, check=True)
    assert done.stdout.decode("ascii").strip() == here
    assert (root / "cifar10" / "decoded-test.safetensors").stat().st_mtime_ns == made


def test_a_user_without_a_home(copy, monkeypatch):
    "An unknown uid without HOME: what needs no home works, what names one says so."
    import pwd

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("NSQ_DATA", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert len(data.load("digits")) == 500 and len(data.load("cifar10", root=copy[0])) == 10
    assert f"nsq-repro-{os.getuid()}" in message(FileNotFoundError, "mnist")
    assert "root is '~/x'; it must be the path of a folder" in message(ValueError, "mnist", root="~/x")


def test_missing_cifar(tmp_path, copy, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: pytest.fail("a download nobody asked for"))
    empty = tmp_path / "empty"
    text = message(FileNotFoundError, "cifar10", root=empty)
    assert all(f in text for f in (*data.CIFAR_FILES, *data.CIFAR_CLASSES)) and "\n" not in text
    assert str(empty / "cifar-10-batches-py") in text and str(empty / "cifar10") in text
    assert all(word in text for word in ("NSQ_DATA", "download=True", "all seven", "photos"))
    assert not empty.exists() and not data.available("cifar10", empty)
    for file in (copy[0] / "cifar10" / "test" / "cat").iterdir():
        file.unlink()
    (copy[0] / "cifar10" / "test" / "cat").rmdir()
    assert "was not found" in message(FileNotFoundError, "cifar10", root=copy[0]) and not data.available(
        "cifar10", copy[0]
    )
    assert len(data.load("cifar10", "train", copy[0])) == 20


def test_no_network_for_cifar(tmp_path, offline):
    text = message(FileNotFoundError, "cifar10", root=tmp_path, download=True)
    assert (
        "could not be downloaded" in text
        and "name resolution" in text
        and "cifar-10-batches-py" in text
        and "\n" not in text
    )
    assert "was not found" in message(FileNotFoundError, "cifar10", root=tmp_path)


@pytest.fixture
def batches(copy, monkeypatch):
    """Binary files in the original's layout, beside the folder of images, whose checksums torchvision is told.
    Returns the folder and the pixels."""
    from torchvision.datasets import CIFAR10

    folder, pixels, sums = copy[0] / "cifar-10-batches-py", {}, {}
    folder.mkdir()
    for i, f in enumerate(data.CIFAR_FILES[:-1]):
        pixels[f] = np.random.default_rng(i).integers(0, 256, (4, 3072), np.uint8)
        (folder / f).write_bytes(pickle.dumps({"data": pixels[f], "labels": [i, 7, 0, 9]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(data.CIFAR_CLASSES)}))
    sums = [[f, hashlib.md5((folder / f).read_bytes()).hexdigest()] for f in data.CIFAR_FILES]
    monkeypatch.setattr(CIFAR10, "train_list", sums[:5])
    monkeypatch.setattr(CIFAR10, "test_list", sums[5:6])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": sums[6][1]})
    return folder, pixels


def test_original_files(batches):
    "The original goes before a copy, keeps its order, and has the plain name."
    folder, pixels = batches
    train, test = (data.load("cifar10", split, folder.parent) for split in ("train", "test"))
    assert train.x.numpy().tobytes() == b"".join(p.tobytes() for f, p in pixels.items() if f != "test_batch")
    assert test.x.numpy().tobytes() == pixels["test_batch"].tobytes() and test.y.tolist() == [5, 7, 0, 9]
    assert (
        train.title == test.title == "CIFAR-10"
        and train.y[:8].tolist() == [0, 7, 0, 9, 1, 7, 0, 9]
        and train.x.is_contiguous()
    )


@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
def test_wrong_checksum(batches, file):
    path = batches[0] / file
    path.write_bytes(path.read_bytes()[:-1])
    text = message(ValueError, "cifar10", root=batches[0].parent)
    assert text.startswith(str(path)) and "damaged" in text and "download=True" in text and text.count("batch_") <= 1
    path.unlink()
    assert data.load("cifar10", root=batches[0].parent).title == "CIFAR-10 (30 of 60,000 images)"  # the copy is used


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 4),
    st.integers(0, 10**6),
    st.booleans(),
)
def test_crop_flip(n, c, h, w, pad, seed, floats):
    "Equal to moving pixel after pixel."
    x = torch.randint(0, 256, (n, c, h, w), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    x = x.double() / 255 if floats else x
    got, g = data.crop_flip(x, torch.Generator().manual_seed(seed), pad), torch.Generator().manual_seed(seed)
    shift, flip = (
        torch.randint(2 * pad + 1, (2, n), generator=g).sub(pad).tolist(),
        torch.randint(2, (n,), generator=g).tolist(),
    )
    assert got.shape == x.shape and got.dtype == x.dtype
    for i in range(n):
        for r in range(h):
            for s in range(w):
                a, b = r + shift[0][i], (w - 1 - s if flip[i] else s) + shift[1][i]
                inside = 0 <= a < h and 0 <= b < w
                assert got[i, :, r, s].tolist() == (x[i, :, a, b].tolist() if inside else [0] * c)


def test_crop_flip_draws_evenly():
    """All 25 places and both directions, each as often as chance has it;
    the same image again and again is not changed itself."""
    x = torch.arange(1.0, 26).view(1, 1, 5, 5).expand(20_000, 1, 5, 5)
    got = data.crop_flip(x, torch.Generator().manual_seed(0))
    kinds, counts = got.flatten(1).unique(dim=0, return_counts=True)
    assert len(kinds) == 50 and ((counts - 400) ** 2 / 400).sum() < 100  # chi-square of 49 degrees: P = 2e-5
    assert torch.equal(x[0, 0], torch.arange(1.0, 26).view(5, 5))
    for bad in (dict(pad=-1), dict(x=x[0])):
        with pytest.raises(ValueError):
            data.crop_flip(**{"x": x, "generator": torch.Generator(), **bad})
