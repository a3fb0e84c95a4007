"""From a folder of photographs to a report and to answers for new ones."""

import csv
import json
import re

import pytest

from ..support.walk import Walk

COLOURS = {"rust": (180, 90, 40), "moss": (80, 120, 50)}


def photo(colour, file):
    images = pytest.importorskip("PIL.Image")
    file.parent.mkdir(parents=True, exist_ok=True)
    noise = images.effect_noise((64, 64), 60).convert("RGB")
    images.blend(noise, images.new("RGB", noise.size, colour), 0.4).save(file)


def test_a_folder_of_photographs_becomes_a_report_and_answers(tmp_path, python):
    for i in range(20):
        for name, colour in COLOURS.items():
            photo(colour, tmp_path / "photos" / name / f"{i}.jpg")
    (tmp_path / "photos/moss/3.jpg").write_bytes((tmp_path / "photos/moss/3.jpg").read_bytes()[:300])  # a broken one
    photo(COLOURS["moss"], tmp_path / "new/one.jpg")
    photo(COLOURS["rust"], tmp_path / "new/two.jpg")
    walk = Walk(tmp_path, python)
    train = ("train", "--model", "bundled:efficientnet-lite0", "--data", "photos", "--task", "image-classification")
    train += ("--task-set", "size=64", "--where", "expand", "--where", "project", "--lr", "3e-3", "--max-steps", "8")

    said = walk.undula(*train, "--batch", "8", "--out", "sorter", code=2)
    assert "3.jpg" in said
    assert "--skip-faulty" in said

    walk.undula(*train, "--batch", "8", "--out", "sorter", "--skip-faulty", "0.1")
    report = json.loads((tmp_path / "sorter/report.json").read_text())
    assert report["after"]["accuracy"] == 1.0
    page = (tmp_path / "sorter/report.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert "rust" in page
    assert "data:image/" in page  # the photographs are in it
    assert not re.search(r"""(?:src|href)=["']?https?:""", page)  # and it needs nothing from elsewhere

    walk.undula("predict", "sorter", "new", "--out", "answers.csv")
    with open(tmp_path / "answers.csv", encoding="utf-8", newline="") as opened:
        found = {row["file"]: row["label"] for row in csv.DictReader(opened)}
    assert found == {"one.jpg": "moss", "two.jpg": "rust"}
    print(f"the whole walk {walk.seconds:.0f} s")
