"""`undula compare` on tiny adapters that `undula train` made."""

import dataclasses
import json
import shutil

import pytest
import torch
from scipy import stats

from tests.support import tiny
from undula.study import statistics as S
from undula.study.compare import SETTINGS, _baseline, _entries, brief, compare
from undula.train import restored
from undula.train.run import Run

from .test_cli import call, call_raw, fails


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny.bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for i, (split, n) in enumerate((("train", 48), ("validation", 24), ("test", 40))):
        tiny.jsonl(folder / f"{split}.jsonl", tiny.reviews(n, i))
    return folder


@pytest.fixture(scope="module")
def trained(bert, data, tmp_path_factory):
    """{(method, seed): directory}."""
    out = tmp_path_factory.mktemp("trained")
    usual = (
        "--model",
        bert,
        "--data",
        data,
        "--task",
        "classification",
        "--max-steps",
        4,
        "--batch",
        8,
        "--lr",
        "1e-2",
    )
    made = {}
    for method, rank in (("lora", 2), ("dora", None)):
        options = ("--set", f"r={rank}") if rank else ("--set", "inner=lora", "--set", "inner.r=2")
        for seed in (0, 1):
            made[method, seed] = out / f"{method}{seed}"
            call("train", *usual, "--method", method, *options, "--seed", seed, "--out", made[method, seed])
    return made


def test_runs_of_one_arm_differ_in_nothing_but_the_seed():
    """Every field of a run tells arms apart, but those that all have in common and those that change no figure."""
    common, beside = (
        {"model", "data", "task"},
        {"method", "seed", "out", "eval_rows", "save_every", "gradient_checkpointing", "plain"},
    )
    assert {f.name for f in dataclasses.fields(Run)} == {*SETTINGS, *common, *beside}


def test_a_baseline_may_be_called_as_on_the_command_line(trained):
    entries = _entries([trained["lora", 0], trained["dora", 0]])
    assert _baseline(entries, "DoRA") == _baseline(entries, "do-ra") == _baseline(entries, str(trained["dora", 0]))


def test_two_arms_with_two_seeds(trained, tmp_path):
    shown, said = call("compare", *trained.values(), "--out", tmp_path / "r", "--json", tmp_path / "c.json")
    found = json.loads((tmp_path / "c.json").read_text())
    assert (found["baseline"], found["split"], found["rows"]) == ("LoRA(r=2)", "test", 40)
    by_arm = {row["arm"]: row for row in found["arms"]}
    assert set(by_arm) == {"LoRA(r=2)", "DoRA(LoRA(r=2))"}
    quality = {key: restored(path).score(split="test")["accuracy"] for key, path in trained.items()}
    dora = by_arm["DoRA(LoRA(r=2))"]
    assert dora["n"] == dora["against_baseline_pairs"] == 2
    assert dora["mean"] == pytest.approx((quality["dora", 0] + quality["dora", 1]) / 2)
    wanted = sum(quality["dora", s] - quality["lora", s] for s in (0, 1)) / 2
    assert dora["against_baseline_difference"] == pytest.approx(wanted)
    assert dora["against_baseline_verdict"] == "undecided"
    assert found["row_by_row"] == []
    assert "undecidable with these seeds: DoRA(LoRA(r=2))" in shown
    assert "40 rows of test" in shown
    assert "seed 1" in said
    page = (tmp_path / "r" / "report.html").read_text()
    assert all(str(path) in page for path in trained.values())
    assert {"report.md", "runs.csv", "runs.parquet", "table.csv", "plots"} <= {
        p.name for p in (tmp_path / "r").iterdir()
    }


def test_parameters_are_those_of_the_adapter(trained):
    found = compare([trained["lora", 0], trained["dora", 0]])
    report = json.loads((trained["lora", 0] / "report.json").read_text())
    row = next(r for r in found.summary.rows if r.arm == "LoRA(r=2)")
    assert row.parameters + row.head_parameters == report["trainable_parameters"]
    assert row.head_parameters > 0
    assert found.summary.runs[0].losses


def _cut(path):
    (path / "adapter_model.safetensors").write_bytes(b"cut")


DAMAGE = {
    "tensors": (_cut, "bad.*adapter_model.safetensors"),
    "config": (lambda path: (path / "adapter_config.json").write_text("{"), "bad.adapter_config.json"),
    "report": (lambda path: (path / "report.json").write_text("["), "bad.report.json is no report"),
    "run": (lambda path: (path / "run.json").write_text("{}"), "bad.run.json is not a run"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_file_is_told_before_what_differs(what, trained, tmp_path):
    """The two directories are one arm with one seed besides: that is no use to know of a file that cannot be read."""
    damage, message = DAMAGE[what]
    shutil.copytree(trained["lora", 0], tmp_path / "bad")
    damage(tmp_path / "bad")
    with pytest.raises(ValueError, match=message) as refused:
        compare([trained["lora", 0], tmp_path / "bad"])
    assert "seed" not in str(refused.value)


def test_single_runs_are_compared_row_by_row(trained):
    found = compare([trained["lora", 0], trained["dora", 1]])
    assert found.row_by_row == ()  # no seed that both have
    found = compare([trained["lora", 1], trained["dora", 1]], baseline="lora")
    (pair,) = found.row_by_row
    right = {}
    for method in ("lora", "dora"):
        opened = restored(trained[method, 1])
        examples = opened.examples(split="test")
        logits = opened.run.task.logits(opened.model, examples, 8)
        right[method] = logits.argmax(1) == torch.tensor(examples.rows["label"][:])
    more, less = int((right["dora"] & ~right["lora"]).sum()), int((right["lora"] & ~right["dora"]).sum())
    assert (pair.rows, pair.only_arm, pair.only_baseline) == (40, more, less)
    assert pair.difference == pytest.approx((more - less) / 40)
    assert pair.p == pytest.approx(stats.binomtest(more, more + less).pvalue if more + less else 1.0)
    assert pair.low <= pair.difference <= pair.high


def test_rows_and_split_are_the_same_for_all(trained):
    found = compare(list(trained.values()), split="validation", rows=10, baseline=str(trained["dora", 0]))
    assert (found.rows, found.split, found.summary.baseline) == (10, "validation", "DoRA(LoRA(r=2))")


def test_one_seed_says_so(trained, tmp_path):
    call("compare", trained["lora", 0], trained["dora", 0], "--out", tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "one run says nothing about the next" in text
    assert "## Row by row" in text
    assert "One run per arm" in text


def test_json_alone(trained):
    found = json.loads(call_raw("compare", trained["lora", 0], trained["dora", 0], "--json", "-"))
    assert found["split"] == "test"


def edited(source, out, **changes):
    """A copy of a run that claims to be another."""
    shutil.copytree(source, out)
    content = json.loads((out / "run.json").read_text())
    content["run"] |= changes
    (out / "run.json").write_text(json.dumps(content))
    return out


def test_all_that_is_wrong_is_told_at_once(trained, tmp_path):
    one = trained["lora", 0]
    other = edited(one, tmp_path / "other", model="/elsewhere", data="/nowhere", seed=4)
    task = json.loads((one / "run.json").read_text())["run"]["task"] | {"max_length": 7}
    third = edited(one, tmp_path / "third", task=task)
    said = fails("compare", one, other, third)
    assert all(f"the {what} is not the same" in said for what in ("model", "data", "task"))
    assert f"/elsewhere in {other}" in said
    assert "2 directories hold LoRA(r=2) with seed 0" in said
    assert "there is one arm alone" in said


def test_what_is_no_finished_run_is_refused(trained, tmp_path):
    unfinished = edited(trained["lora", 0], tmp_path / "unfinished")
    (unfinished / "adapter_config.json").unlink()
    said = fails("compare", trained["lora", 0], trained["lora", 0], tmp_path, unfinished)
    assert f"{tmp_path} is not the directory of a run" in said
    assert f"{unfinished} holds no adapter: its training has not finished" in said
    assert "is named 2 times" in said


def test_bad_names(trained):
    pair = trained["lora", 0], trained["dora", 0]
    assert "no split 'exam'; there are: " in fails("compare", *pair, "--split", "exam")
    said = fails("compare", *pair, "--baseline", "sora")
    assert "baseline='sora' is no arm, method or directory here; the arms are: LoRA(r=2); DoRA(LoRA(r=2))" in said


def test_rows_that_one_run_held_out_and_another_learned_are_refused(trained, tmp_path):
    """Without a validation split the held-out rows follow the seed: the pair (0, 0) may be compared, (0, 1) not."""
    rows = tiny.jsonl(tmp_path / "all.jsonl", tiny.reviews(60))
    made = [edited(path, tmp_path / path.name, data=rows) for path in trained.values()]
    said = fails("compare", *made)
    assert "each run held out rows by its own seed (0, 1)" in said
    assert compare([made[0], made[2]]).rows == 6


def test_settings_that_vary_are_in_the_name(trained, tmp_path):
    faster = edited(trained["lora", 0], tmp_path / "faster", lr=0.5)
    found = compare([trained["lora", 0], faster, trained["lora", 1]])
    assert set(found.summary.arms) == {"LoRA(r=2) lr=0.01", "LoRA(r=2) lr=0.5"}
    assert found.summary.baseline == "LoRA(r=2) lr=0.01"  # two LoRAs: the first


def test_runs_on_more_processes_are_another_arm(trained, tmp_path):
    """Their steps are of more rows, which no setting of the run says."""
    shutil.copytree(trained["lora", 1], tmp_path / "two")
    report = json.loads((tmp_path / "two/report.json").read_text())
    (tmp_path / "two/report.json").write_text(json.dumps({**report, "processes": 2}))
    arms = [e.arm for e in _entries([trained["lora", 0], tmp_path / "two"])]
    assert arms[1] == f"{arms[0]} on 2 processes"
    assert len({e.arm for e in _entries([trained["lora", 0], trained["lora", 1]])}) == 1


def test_a_collapsed_adapter_is_told_from_a_trained_one(trained, tmp_path):
    call("collapse", trained["dora", 0], "--out", tmp_path / "flat", "--how", "truncate", "--set", "r=2", "--rows", 8)
    found = compare([trained["dora", 0], tmp_path / "flat"])
    assert set(found.summary.arms) == {"DoRA(LoRA(r=2))", "LoRA(r=2, alpha=2.0) from flat"}
    assert found.summary.baseline == "DoRA(LoRA(r=2))"  # the first: the other was not trained as a LoRA


def test_regression_has_no_rows_of_its_own(bert, tmp_path):
    rows = [{"text": r["text"], "label": float(r["label"] == "good")} for r in tiny.reviews(40)]
    source = tiny.jsonl(tmp_path / "numbers.jsonl", rows)
    usual = ("--model", bert, "--data", source, "--task", "regression", "--max-steps", 1, "--batch", 4)
    for rank in (1, 2):
        call("train", *usual, "--set", f"r={rank}", "--out", tmp_path / f"r{rank}")
    found = compare([tmp_path / "r1", tmp_path / "r2"], baseline="LoRA(r=2)")
    assert found.row_by_row == ()
    assert found.summary.rows[0].metric == "pearson"


def test_names_tell_what_is_not_the_default():
    import undula

    assert brief(undula.LoRA()) == "LoRA(r=8)"
    assert brief(undula.Dropout(undula.DoRA(undula.LoRAN(r=3)), p=0.2)) == "Dropout(DoRA(LoRAN(r=3)), p=0.2)"
    assert brief(undula.LoRA(alpha=4.0)) == "LoRA(r=8, alpha=4.0)"
    assert S.UNDECIDED == "undecided"
