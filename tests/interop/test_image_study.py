"""Studies of images: the committed files on stand-ins, leaks by pixels, deployed forms on convolutions."""

import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

import undula
from tests.support import tiny
from undula.cli.main import app
from undula.study.drive import run, warnings
from undula.study.outcome import FINAL
from undula.study.read import parse, read
from undula.study.spec import Arm, Base, Rows, Study
from undula.train import ImageClassification

STUDIES = Path(__file__).parents[2] / "studies"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    splits = {"train": tiny.pictures(60), "test": tiny.pictures(30, seed=1)}
    return tiny.classes(tmp_path_factory.mktemp("pictures"), splits)


@pytest.fixture(scope="module")
def fine(folder, tmp_path_factory):
    """The same images under the names of the columns of CIFAR-100."""
    from undula.train.data.load import load_data

    path = tmp_path_factory.mktemp("fine")
    for split, rows in load_data(folder).items():
        rows.rename_columns({"image": "img", "label": "fine_label"}).to_parquet(path / f"{split}.parquet")
    return str(path)


def sources(path):
    return re.findall(r'^source = "(.*)"', path.read_text(), re.M)


def shortened(path, steps, arms):
    """A study file with few steps, one final seed, one rate, its last data set and some of its arms."""
    text = re.sub(r"(\[sweep\]\n)seeds = .*\n", r"\1", path.read_text())
    for old, new in (
        ("steps|epochs", steps),
        ("evaluations", 1),
        ("batch", 8),
        ("seeds", [1]),
        ("rates", [1e-2]),
        ("extend", 0),
    ):
        text = re.sub(rf"^({old}) = .*", f"{'steps' if '|' in old else old} = {new}", text, flags=re.M)
    text, *methods = text.split("[[methods]]")
    head, *data = text.split("[[data]]")
    kept = ["[[methods]]" + part for part in methods if re.search(r'name = "(.*)"', part)[1] in arms]
    return "".join([head, "[[data]]" + data[-1], *kept])


def test_the_vision_transformer_study(folder, fine, tmp_path):
    """The file as it is, on a tiny transformer and tiny images: its plan, then a short version to the end."""
    path = STUDIES / "papers" / "vit.toml"
    model, *data = sources(path)
    assert model == "google/vit-base-patch16-224-in21k"
    assert data[-1] == "uoft-cs/cifar100"
    replace = {model: tiny.vit(tmp_path / "vit"), **dict.fromkeys(data, folder), data[-1]: fine}
    study = read(path, replace)
    assert study.arm("AuroRA r=2").method == undula.AuroRA(r=2, alpha=4.0)
    assert study.arm("LoRA r=16").method.r == 16
    assert study.train.epochs == 10
    words = [word for pair in replace.items() for word in ("--replace", "=".join(pair))]
    done = CliRunner().invoke(app, ["study", str(path), "--dry-run", "--no-pilot", "--json", "-", *words])
    told = json.loads(done.stdout)
    assert len(told["cells"]) == len(data) * len(study.arms)
    distinct = 2  # data sets among the stand-ins: a rate of a method on one of them is one run
    assert told["runs"]["least"] == len(study.arms) * distinct * 3 * 5 + len(told["cells"]) * 5
    assert told["warnings"] == []

    found = run(parse(shortened(path, 3, {a.name for a in study.arms}), "short", replace), tmp_path / "o")
    assert not [o.error for o in found.outcomes if o.error]
    final = {o.arm: o for o in found.outcomes if o.stage == FINAL}
    assert {arm: set(o.deployed) for arm, o in final.items()} == {
        "LoRA r=16": {"merged"},
        "AuroRA r=2": {"least squares", "substituted"},
        "LoRA r=2": {"merged"},
        "AuroRA static r=2": {"merged"},
        "head only": set(),
        "full fine-tuning": set(),
    }
    assert final["LoRA r=16"].parameters == 2 * 2 * 16 * 64  # query and value of two layers
    assert "CIFAR-100" in (tmp_path / "o" / "report" / "report.html").read_text()


def test_the_study_of_convolutions(folder, tmp_path):
    """The file on a tiny network, AuroRA on convolutions collapsed by least squares, LoRA merged without a loss."""
    path = STUDIES / "vision.toml"
    text = shortened(path, 4, ("LoRA r=8", "AuroRA r=2", "full fine-tuning"))
    text = text.replace("size = 64", "size = 16")
    replace = {"bundled:efficientnet-lite0": tiny.efficientnet(tmp_path / "lite"), "bundled:fashion-mnist": folder}
    assert len(parse(path.read_text(), "whole", replace).arms) == 10
    found = run(parse(text, "short", replace), tmp_path / "o")
    assert not [o.error for o in found.outcomes if o.error]
    final = {o.arm: o for o in found.outcomes if o.stage == FINAL}
    forms = {arm: set(o.deployed) for arm, o in final.items()}
    assert forms == {
        "LoRA r=8": {"merged"},
        "AuroRA r=2": {"least squares", "substituted"},
        "full fine-tuning": set(),
    }
    assert final["LoRA r=8"].deployed["merged"] == final["LoRA r=8"].test
    assert final["LoRA r=8"].deployed_error["merged"] < 1e-5
    assert final["AuroRA r=2"].deployed_error["least squares"] < final["AuroRA r=2"].deployed_error["substituted"]


def test_images_in_two_splits_are_reported_however_they_are_stored(tmp_path):
    """The same pixels as another file (a bitmap in the place of a PNG) are the same image."""
    train, test = tiny.pictures(30), tiny.pictures(12, seed=1)
    again = [{**row, "image": _bitmap(row["image"])} for row in train[:3]]
    assert again[0]["image"] != train[0]["image"]
    data = tiny.classes(tmp_path / "d", {"train": train, "test": [*test, *again], "validation": tiny.pictures(9, 2)})
    study = Study(
        "leaky",
        arms=(Arm("LoRA", undula.LoRA(r=2)),),
        models=(Base("none"),),
        data=(Rows(data, ImageClassification(), label="pictures"),),
    )
    assert warnings(study) == ["pictures: 3 of 15 test rows stand in train too"]


def _bitmap(png):
    Image.open(io.BytesIO(png)).save(buffer := io.BytesIO(), "BMP")
    return buffer.getvalue()
