"""CTranslate2's file, written here by its description byte by byte, and damaged in every way."""

import struct

import numpy as np
import pytest
import torch

from undula.io.ctranslate2 import CTranslate2Error, read_ctranslate2


def text(s):
    raw = s.encode() + b"\0"
    return struct.pack("<H", len(raw)) + raw


def tensor(name, array, kind):
    head = text(name) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
    return head + struct.pack("<BI", kind, array.nbytes) + array.tobytes()


ONE = np.arange(6, dtype="<f4").reshape(2, 3)
HALF = np.array([0.5, -2.0], dtype="<f2")
COUNT = np.array(4, dtype="<i2")


def content(count=3, aliases=(("other", "half"),), version=6):
    body = tensor("one", ONE, 0) + tensor("half", HALF, 4) + tensor("count", COUNT, 2)
    names = struct.pack("<I", len(aliases)) + b"".join(text(a) + text(b) for a, b in aliases)
    return struct.pack("<I", version) + text("Spec") + struct.pack("<II", 3, count) + body + names


def test_tensors_are_what_was_written(tmp_path):
    (tmp_path / "m").write_bytes(content())
    file = read_ctranslate2(tmp_path / "m")
    assert file.spec == "Spec"
    assert torch.equal(file.tensor("one"), torch.from_numpy(ONE))
    assert torch.equal(file.tensor("other"), torch.tensor([0.5, -2.0]))
    assert int(file.tensor("count")) == 4
    with pytest.raises(CTranslate2Error, match=r"no tensor 'two' among the 4 there: one, half"):
        file.tensor("two")


@pytest.mark.parametrize("length", range(0, len(content()), 7))
def test_a_file_that_is_cut_short_is_refused(length, tmp_path):
    (tmp_path / "m").write_bytes(content()[:length])
    with pytest.raises(CTranslate2Error, match="cut short"):
        read_ctranslate2(tmp_path / "m")


@pytest.mark.parametrize(
    ("damaged", "said"),
    [
        (content(version=99), "version 99"),
        (content(aliases=[("a", "nothing")]), "'a' stands for 'nothing', which is not there"),
        (content() + b"x", "1 bytes follow the end"),
        (content(count=1 << 20), "at most 65536"),
        (content().replace(struct.pack("<II", 2, 3), struct.pack("<II", 2, 4)), "which is not as many"),
        (content().replace(struct.pack("<BI", 4, 4), struct.pack("<BI", 9, 4)), "is of the type 9"),
        (content().replace(text("half"), struct.pack("<H", 5) + b"\xff\xfelf\0"), "is no text"),
    ],
)
def test_a_damaged_file_is_refused(damaged, said, tmp_path):
    (tmp_path / "m").write_bytes(damaged)
    with pytest.raises(CTranslate2Error, match=said):
        read_ctranslate2(tmp_path / "m")
