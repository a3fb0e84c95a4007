"""Training on images: it learns, the base's statistics stay, every form of data gives the same rows, bad ones are
named."""

import io
import json
import subprocess

import datasets
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from typer.testing import CliRunner

import undula
from tests.support import tiny
from undula.cli.main import app
from undula.train import (
    ImageClassification,
    Run,
    evaluate,
    prepare,
    restored,
    trainer,
)
from undula.train.base import open_model
from undula.train.data.images import fingerprint, opened
from undula.train.data.load import load_data

WHERE = ("stem", "expand", "project", "top")


@pytest.fixture(scope="module")
def lite(tmp_path_factory):
    return tiny.efficientnet(tmp_path_factory.mktemp("lite"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    splits = {"train": tiny.pictures(96), "test": tiny.pictures(40, seed=1)}
    return tiny.classes(tmp_path_factory.mktemp("pictures"), splits)


def run_of(model, data, out, **changes):
    usual = {"lr": 1e-2, "max_steps": 6, "batch": 8, "seed": 3, "where": WHERE, "method": undula.LoRA(r=2)}
    return Run(model=model, data=data, task=ImageClassification(), out=out, **(usual | changes))


@pytest.fixture(scope="module")
def aurora(lite, folder, tmp_path_factory):
    """A trained AuroRA on convolutions: its directory and report."""
    out = tmp_path_factory.mktemp("aurora") / "out"
    return out, undula.train(run_of(lite, folder, out, method=undula.AuroRA(), max_steps=30))


# --- training ------------------------------------------------------------------------------------------------------


def test_it_learns(aurora):
    out, report = aurora
    assert report["before"]["accuracy"] < 0.8 < report["after"]["accuracy"]
    assert report["after"]["loss"] < report["before"]["loss"] - 0.1
    assert set(report["after"]) == {"loss", "accuracy", "macro_f1", "mcc"}
    assert Run.load(out).task.names == ("green", "red")
    adapter = undula.Adapter.load(out)
    assert set(adapter.full) == {"classifier.weight", "classifier.bias"}
    assert len(adapter.methods) == 2 + 2 * 3 - 1  # the first block has nothing to expand
    assert evaluate(out) == report["after"]
    assert evaluate(out, split="test")["accuracy"] > 0.7


def test_a_vision_transformer(folder, tmp_path):
    model = tiny.vit(tmp_path / "vit")
    done = undula.train(run_of(model, folder, tmp_path / "o", where="all-linear", max_steps=40, lr=1e-2))
    assert done["sites"] == 2 * 6
    assert done["after"]["accuracy"] > 0.8 > done["before"]["accuracy"]
    assert evaluate(tmp_path / "o") == done["after"]


def statistics(model):
    return {n: b.clone() for n, b in model.named_buffers()}


ARMS = {
    "LoRA": {},
    "AuroRA": {"method": undula.AuroRA()},
    "DoRA": {"method": undula.DoRA(undula.LoRA(r=2))},
    "head only": {"method": None},
    "full fine-tuning": {"method": None, "full": ("*",)},
}


@pytest.mark.parametrize("arm", ARMS)
def test_statistics_of_the_base_stay(arm, lite, folder, tmp_path):
    """Bit for bit, in the Trainer that `train` and studies share; and detaching gives the base back."""
    ready = prepare(run_of(lite, folder, tmp_path, **ARMS[arm]))
    x = ready.train[0]["pixel_values"][None]
    buffers = statistics(ready.model)
    assert sum("running" in n for n in buffers) == 2 * 10
    weights = {n: p.clone() for n, p in ready.model.named_parameters() if "undula" not in n}
    trainer.trainer(ready.run, ready.model, ready.train, ()).train()
    assert ready.model.training
    assert all(torch.equal(b, buffers[n]) for n, b in ready.model.named_buffers())
    moved = {n for n, p in ready.model.named_parameters() if n in weights and not torch.equal(p, weights[n])}
    assert moved == (set(weights) if arm == "full fine-tuning" else {"classifier.weight", "classifier.bias"})
    undula.detach(ready.model)
    base, _ = open_model(lite, ready.run.task, torch.float32, 3)
    torch.testing.assert_close(ready.model.eval()(x).logits, base(x).logits)
    ready.model.train()(torch.cat([x, -x]))  # what would have happened: these statistics do move
    assert not any(torch.equal(b, buffers[n]) for n, b in ready.model.named_buffers())


PREDICT = """
import sys, torch, undula
from undula.train import restored
opened = restored(sys.argv[1])
torch.save(opened.run.task.logits(opened.model, opened.examples(), 7), sys.argv[2])
"""


def test_a_fresh_process_predicts_the_same(aurora, tmp_path, python):
    """The logits of the model that was just trained, from the saved adapter on the pristine base, also in other batches
    than those of the training."""
    ready = prepare(run_of(*_sources(aurora[0]), tmp_path / "o", method=undula.AuroRA()))
    trainer.trainer(ready.run, ready.model, ready.train, ()).train()
    ready.run.save(None)
    ready.adapter.save(tmp_path / "o", base=ready.run.model)
    want = ready.run.task.logits(ready.model, ready.held, 7)
    subprocess.run([python, "-c", PREDICT, tmp_path / "o", tmp_path / "y.pt"], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "y.pt", weights_only=True), want)


def _sources(out):
    run = Run.load(out)
    return run.model, run.data


def test_the_size_is_the_processors_or_ours(lite, folder, tmp_path):
    task = ImageClassification(size=24).fitted(load_data(folder)["train"])
    model, processor = open_model(lite, task, torch.float32, 0)
    example = task.example(task.rows(load_data(folder)["train"])[0], processor)
    assert example["pixel_values"].shape == (3, 24, 24)
    assert model(example["pixel_values"][None]).logits.shape == (1, 2)
    with pytest.raises(ValueError, match=r"ImageClassification\.size is at least 1"):
        ImageClassification(size=0)


def test_resumes_to_the_bit(lite, folder, tmp_path):
    undula.train(run_of(lite, folder, tmp_path / "whole", save_every=3))
    out = tmp_path / "halved"
    undula.train(run_of(lite, folder, out, save_every=3))
    for p in [out / "report.json", *(out / "checkpoints" / "checkpoint-6").iterdir()]:
        p.unlink()
    assert undula.train(Run.load(out), resume=True)["resumed_from_step"] == 3
    both = [undula.Adapter.load(p) for p in (tmp_path / "whole", out)]
    assert all(torch.equal(a, b) for a, b in zip(*(x.parameters() for x in both), strict=True))


# --- the verbs -----------------------------------------------------------------------------------------------------


def verb(*words):
    done = CliRunner().invoke(app, [str(w) for w in words])
    assert done.exit_code == 0, done.output
    return done.output


def test_verbs_from_end_to_end(lite, folder, tmp_path):
    out = tmp_path / "lora"
    verb("train", "--model", lite, "--data", folder, "--task", "image-classification", "--method", "lora", "--where",
         "project", "--set", "r=2", "--max-steps", 4, "--batch", 8, "--full", "top_norm", "--out", out)  # fmt: skip
    assert "efficientnet.top_norm.weight" in undula.Adapter.load(out).full
    found = json.loads(verb("eval", out, "--json", "-"))
    assert found == restored(out).score()
    assert "project" in verb("show", out, "--rows", 8)
    verb("merge", out, "--out", tmp_path / "merged")
    verb("export", out, "--out", tmp_path / "plain")
    verb("collapse", out, "--out", tmp_path / "smaller", "--set", "r=1", "--rows", 16)
    exported = undula.Adapter.load(tmp_path / "plain")
    assert set(exported.full) == set(undula.Adapter.load(out).full)
    x = torch.randn(2, 3, 16, 16)
    trained = restored(out).model
    other = restored(out)
    undula.detach(other.model)
    undula.attach(other.model, exported)
    torch.testing.assert_close(other.model(x).logits, trained(x).logits)
    opened = restored(tmp_path / "plain")
    assert type(opened.run.task) is type(restored(out).run.task)
    torch.testing.assert_close(opened.model(x).logits, trained(x).logits)
    (tmp_path / "plain" / "base" / "config.json").unlink()  # which says the task: an adapter of somebody else's
    with pytest.raises(ValueError, match=r"says no task type, and no class .* has its layers .*Attach it in Python"):
        restored(tmp_path / "plain")


OPEN = """
import sys, torch, transformers, undula
from undula import bundled; bundled.enable()
model = transformers.AutoModelForImageClassification.from_pretrained(sys.argv[1])
processor = transformers.AutoImageProcessor.from_pretrained(sys.argv[1])
assert processor.size["height"] == 16 and model.config.id2label == {0: "green", 1: "red"}
torch.save(model(torch.ones(1, 3, 16, 16)).logits, sys.argv[2])
"""


def test_a_merged_folder_opens_in_another_process_and_trains_again(lite, folder, tmp_path, python):
    undula.train(run_of(lite, folder, tmp_path / "o"))
    verb("merge", tmp_path / "o", "--out", tmp_path / "merged")
    subprocess.run([python, "-c", OPEN, tmp_path / "merged", tmp_path / "y.pt"], check=True)
    want = restored(tmp_path / "o").model(torch.ones(1, 3, 16, 16)).logits
    torch.testing.assert_close(torch.load(tmp_path / "y.pt", weights_only=True), want)
    again = undula.train(run_of(str(tmp_path / "merged"), folder, tmp_path / "again", max_steps=1))
    assert again["before"]["accuracy"] == pytest.approx(evaluate(tmp_path / "o")["accuracy"])


def test_aurora_on_convolutions_collapses(aurora, tmp_path):
    """By least squares on patches; the error that is reported is that of the outputs."""
    opened = restored(aurora[0])
    calibration, held = (list(opened.batches(opened.examples(split=s, rows=48))) for s in ("train", "test"))
    done = undula.collapse(opened.model, undula.LeastSquares(4, calibration), held_out=held)
    outputs = []
    for name, adapter in {"new": done.adapter, "none": undula.Adapter({}, {}, {}, done.adapter.full)}.items():
        undula.attach(opened.model, adapter, name=name)
        outputs.append(torch.cat([opened.model(**b).logits.detach() for b in held]))
    undula.select(opened.model, "default")
    own, (new, none) = torch.cat([opened.model(**b).logits.detach() for b in held]), outputs
    assert done.error == pytest.approx(float((new - own).norm() / (own - none).norm()), rel=1e-4)
    assert 1e-4 < done.error < 0.5
    verb("export", aurora[0], "--out", tmp_path / "lora", "--set", "r=4", "--rows", 48)
    assert undula.Adapter.load(tmp_path / "lora").rung is undula.LowRank


def test_peft_reads_the_directory(folder, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = tiny.vit(tmp_path / "vit")
    undula.train(run_of(model, folder, tmp_path / "o", where="all-linear", max_steps=3))
    config = json.loads((tmp_path / "o" / "adapter_config.json").read_text())
    assert config["task_type"] is None  # PEFT has no type for images, and refuses what it does not know
    undula.enable_peft()
    base = transformers.AutoModelForImageClassification.from_pretrained(model, num_labels=2)
    hosted = peft.PeftModel.from_pretrained(base, tmp_path / "o").eval()
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(hosted(pixel_values=x).logits, restored(tmp_path / "o").model(x).logits)


# --- data ----------------------------------------------------------------------------------------------------------


def seen(data, task=None):
    """{(pixels, class)} of every split, as the task reads them."""
    task = (task or ImageClassification()).fitted(data["train"])
    return {
        split: sorted((fingerprint(row["image"]), task.names[row["label"]]) for row in task.rows(rows))
        for split, rows in data.items()
    }


def test_every_form_of_data_gives_the_same_rows(folder, tmp_path):
    want = seen(load_data(folder))
    assert len(dict(want["train"])) == 96  # every image another one
    splits = {"train": tiny.pictures(96), "test": tiny.pictures(40, seed=1)}
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["green", "red"])})
    plain = datasets.Features({"image": datasets.Value("binary"), "label": datasets.Value("string")})
    for name in ("parquet", "bytes"):
        (tmp_path / name).mkdir()
    saved = {}
    for split, rows in splits.items():
        pictures = [{"img": Image.open(io.BytesIO(r["image"])), "label": r["label"]} for r in rows]
        saved[split] = datasets.Dataset.from_list(pictures, features=features)
        saved[split].to_parquet(tmp_path / "parquet" / f"{split}.parquet")
        datasets.Dataset.from_list(rows, features=plain).to_parquet(tmp_path / "bytes" / f"{split}.parquet")
    datasets.DatasetDict(saved).save_to_disk(tmp_path / "disk")
    kinds = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}), pyarrow.large_binary()
    for name, kind in zip(("struct", "large"), kinds, strict=True):  # as other programs write them
        (tmp_path / name).mkdir()
        for split, rows in splits.items():
            files = [r["image"] if name == "large" else {"bytes": r["image"], "path": None} for r in rows]
            columns = {"image": pyarrow.array(files, kind), "label": [r["label"] for r in rows]}
            parquet.write_table(pyarrow.table(columns), tmp_path / name / f"{split}.parquet")
    for name in ("parquet", "bytes", "disk", "struct", "large"):
        assert seen(load_data(str(tmp_path / name))) == want


def test_grey_palette_turned_and_transparent_images_become_rgb():
    pixels = Image.new("RGB", (4, 2), (0, 0, 0))
    pixels.putpixel((0, 0), (204, 204, 204))
    for mode in ("L", "P", "RGBA"):
        pixels.convert(mode).save(buffer := io.BytesIO(), "PNG")
        image = opened({"bytes": buffer.getvalue(), "path": None})
        assert (image.mode, image.size) == ("RGB", (4, 2))
        assert image.getpixel((0, 0)) == (204, 204, 204)
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera that was held upright
    pixels.save(buffer := io.BytesIO(), "PNG", exif=exif)
    assert opened({"bytes": buffer.getvalue(), "path": None}).size == (2, 4)


def test_columns_without_images_are_named():
    rows = datasets.Dataset.from_list([{"image": 3, "label": 0}, {"image": 4, "label": 1}])
    with pytest.raises(ValueError, match=r"'image' holds no images \(it holds int64, as in row 1: 3\)"):
        ImageClassification(names=("0", "1")).rows(rows)
    with pytest.raises(
        LookupError, match=r"no column for image \(looked for image, img, file_name\); their columns are: text"
    ):
        ImageClassification(names=("0", "1")).rows(rows.rename_column("image", "text"))


@pytest.mark.parametrize("cut", [0, 20, -40])
def test_unreadable_images_are_named(cut, lite, tmp_path):
    """Empty, cut before its size is known, and cut in its pixels: the last is found when it is read."""
    tiny.classes(tmp_path / "d", {"train": tiny.pictures(30)})
    bad = sorted((tmp_path / "d").rglob("*.png"))[7]
    bad.write_bytes(bad.read_bytes()[:cut])
    with pytest.raises(ValueError, match=rf"{bad.name} \(a file\) cannot be read as an image .*: repair or remove it"):
        undula.train(run_of(lite, str(tmp_path / "d"), tmp_path / "o", max_steps=8, eval_rows=None))


def test_other_bad_data(lite, tmp_path):
    one = tiny.classes(tmp_path / "one", {"train": [{**r, "label": "red"} for r in tiny.pictures(5)]})
    with pytest.raises(ValueError, match=r"two classes or more; column 'label' holds only \['red'\]"):
        undula.train(run_of(lite, one, tmp_path / "o"))
    new = [*tiny.pictures(3, seed=1), {**tiny.pictures(1)[0], "label": "up"}]
    strange = tiny.classes(tmp_path / "new", {"train": tiny.pictures(9), "validation": new})
    with pytest.raises(ValueError, match=r"classes that are not known: row 4 has 'up'\. The classes are: green, red"):
        undula.train(run_of(lite, strange, tmp_path / "o"))
    (tmp_path / "new" / "train" / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no images \(.*\.png.*\); it has: nothing"):
        load_data(strange)
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.png").write_bytes(b"")
    with pytest.raises(
        FileNotFoundError, match=r"nor one with images or sounds in train/CLASS/ or CLASS/; it has: a.png"
    ):
        load_data(str(tmp_path / "flat"))
    hole = datasets.Dataset.from_list([*tiny.pictures(2), {"image": None, "label": "red"}])
    with pytest.raises(ValueError, match="column 'image' is empty: row 3"):
        ImageClassification(names=("green", "red")).rows(hole)


def test_an_image_task_on_a_model_of_texts(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no model could be opened in it"):
        undula.train(run_of(tiny.bert(tmp_path / "bert"), folder, tmp_path / "o"))
