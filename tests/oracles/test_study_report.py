"""Summaries and reports of made-up studies: what enters a figure, what is said about it, and files that are sound."""

import csv
import html.parser
import io
import itertools
import json
import math
import random
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from xml.etree import ElementTree

import matplotlib
import pytest
from PIL import Image

import undula
from undula.observe import drawing
from undula.observe.page.content import Drawn, Table
from undula.study import spec
from undula.study import statistics as S
from undula.study.outcome import FINAL, SWEEP, ChosenRate, Outcome
from undula.study.plan import Plan
from undula.study.power import power
from undula.study.report import latex, markdown, plots, write_report
from undula.study.report.document import document
from undula.study.report.plots import pareto
from undula.study.summary import summarise
from undula.train import Classification

HOSTILE = "<script>alert(1)</script> & `x` | **b**"


def run(arm="LoRA", seed=0, test=0.5, *, data="news", stage=FINAL, **more):
    usual = {"model": "bert", "budget": "r=8", "lr": 1e-3, "metric": "accuracy", "more_is_better": True}
    costs = {"parameters": 1000, "steps": 10, "seconds": 2.0, "peak_memory_bytes": 2**30, "validation": test}
    return Outcome(arm, data=data, stage=stage, seed=seed, **(usual | costs | {"test": test} | more))


def study(arms=("LoRA", "DoRA", "AuroRA"), data=("news", "films"), seeds=3, shared=False, **more):
    """Runs and chosen rates of a whole study, where each seed chose (or one sweep for all); the second arm is much
    better than the first."""
    draw, runs, rates = random.Random(0), [], []
    for group in data:
        for a, arm in enumerate(arms):
            level = 0.6 + (0.2 if a == 1 else 0.01 * a)
            for lr in (1e-3, 1e-2):
                v = level + 0.01 * draw.random()
                runs.append(run(arm, 7, v, data=group, stage=SWEEP, lr=lr))
            tried = tuple((lr, level - 0.1 * lr) for lr in (1e-4, 1e-3, 1e-2))
            who = [None] if shared else range(seeds)
            rates += [ChosenRate(arm, "bert", group, "r=8", 1e-3, a != 2, tried, seed) for seed in who]
            for seed in range(seeds):
                losses = tuple((i, 2.0 / (i + 1)) for i in range(0, 200, 2))
                v = level + 0.01 * draw.random()
                forms = {"deployed": {"merged": v - 0.01}, "deployed_error": {"merged": 1e-3}}
                curve = ((0, 0.1), (100, v))
                runs.append(
                    run(arm, seed, v, data=group, losses=losses, curve=curve, parameters=1000 + a, **forms, **more)
                )
    return runs, rates


def row(summary, arm, data="news"):
    return next(r for r in summary.rows if (r.arm, r.data) == (arm, data))


# What enters a figure


def test_seeds_are_paired_and_the_unpaired_left_out():
    runs = [run("LoRA", s, v) for s, v in ((0, 0.50), (1, 0.60), (2, 0.10))]
    runs += [run("DoRA", s, v) for s, v in ((1, 0.61), (0, 0.53), (5, 0.99))]
    found = row(summarise(runs, [], "LoRA"), "DoRA")
    assert (found.against.pairs, found.against.ahead) == (2, 2)
    assert found.against.difference == pytest.approx(0.02)
    assert found.quality.n == 3
    assert found.against.p == found.against.smallest_p == 0.5


def test_only_final_runs_count_and_failed_ones_are_counted():
    runs = [run("LoRA", 0), run("DoRA", 0, 0.7), run("DoRA", 0, 0.99, stage=SWEEP), run("DoRA", 1, math.nan)]
    runs += [run("DoRA", 2, None, error="it diverged"), run("DoRA", 1, None, stage=SWEEP, error="it diverged")]
    summary = summarise(runs, [], "LoRA")
    found = row(summary, "DoRA")
    assert (found.quality, found.failed, found.failed_sweep) == (S.Spread(1, 0.7), 2, 1)
    assert len(summary.failures) == 3
    assert found.against.low is None
    assert found.against.verdict == S.UNDECIDED


def test_less_is_better_turns_the_gain_and_the_order():
    runs = [run(arm, s, v + s / 1e3, metric="loss", more_is_better=False) for arm, v in (("LoRA", 2.0), ("DoRA", 1.0))
            for s in range(8)]  # fmt: skip
    summary = summarise(runs, [], "LoRA")
    assert [r.arm for r in summary.rows] == ["DoRA", "LoRA"]
    best = summary.rows[0].against
    assert (best.difference, best.gain, best.ahead) == (pytest.approx(-1.0), pytest.approx(1.0), 8)
    assert (best.verdict, best.p_holm) == (S.WIN, 2 / 2**8)


def test_three_seeds_decide_over_groups_and_never_within_one():
    summary = summarise(*study(data=("a", "b", "c")), "LoRA")
    assert {r.against.verdict for r in summary.rows if r.against} == {S.UNDECIDED}
    by_arm = {each.arm: each for each in summary.pooled}
    assert (by_arm["DoRA"].verdict, by_arm["DoRA"].p) == (S.WIN, 2 / 2**9)
    assert by_arm["DoRA"].p_holm == pytest.approx(2 * 2 / 2**9)  # two pooled comparisons are all that can be decided
    assert by_arm["DoRA"].low < 0.2 < by_arm["DoRA"].high
    assert (summary.compared, summary.corrected) == (8, 2)
    assert summary.ranks.arms[0] == "DoRA"


def test_budgets_are_no_new_evidence():
    """One data set under two budgets: as many pairs as seeds, whether the runs are the same or not."""
    few = [replace(o, budget=b) for b in ("r=8", "parameters of LoRA") for o in study(data=("news",))[0]]
    assert {each.verdict for each in summarise(few, [], "LoRA").pooled} == {S.UNDECIDED}
    draw, runs = random.Random(1), []
    for arm, s, b in itertools.product(("LoRA", "DoRA"), range(3), ("r=8", "r=2")):
        runs.append(run(arm, s, draw.random(), budget=b))
    (pooled,) = summarise(runs, [], "LoRA").pooled
    value = {(o.arm, o.seed, o.budget): o.test for o in runs}
    gains = [sum(value["DoRA", s, b] - value["LoRA", s, b] for b in ("r=8", "r=2")) / 2 for s in range(3)]
    assert (pooled.groups, pooled.pairs, pooled.smallest_p) == (2, 3, 0.25)
    assert pooled.p == S.sign_flip(gains)
    once = study(data=("news", "films"))[0]
    twice = [replace(o, budget=b) for b in ("r=8", "parameters of LoRA") for o in once]
    assert summarise(twice, [], "LoRA").ranks == summarise(once, [], "LoRA").ranks
    assert pooled.gain == pytest.approx(sum(gains) / 3)
    assert (pooled.low, pooled.high) == (None, None)  # three pairs have no interval


@pytest.mark.parametrize(
    "again",
    [
        {"model": "bert (4 bits)", "model_source": "bert"},
        {"model": spec.Base("bert", bits=8, dtype="bfloat16").label},
        {"model": spec.Base("bert", dtype="float16").label},
        {"model": "bert (bfloat16)", "model_source": "bert"},
        {"data": "news, 64 tokens", "data_source": "news"},
        {"budget": "r=2"},
    ],
)
def test_one_source_is_one_place_however_often_it_is_measured(again):
    """In two precisions, with two options or budgets: seeds, rows and order are the same, and so is much of the luck.
    Figures that agree wholly must say no more together than each alone."""
    once = [o for seed in range(4) for arm in ("LoRA", "DoRA", "VeRA")
            for o in [run(arm, seed, 0.5 + 0.01 * seed + 0.1 * (arm == "DoRA"))]]  # fmt: skip
    twice = [*once, *(replace(o, **again) for o in once)]
    found = {each.arm: each for each in summarise(twice, [], "LoRA").pooled}
    assert (found["DoRA"].groups, found["DoRA"].pairs, found["DoRA"].p) == (2, 4, 2 / 2**4)
    assert found["DoRA"].gain == pytest.approx(0.1)
    assert summarise(twice, [], "LoRA").places == 1
    assert summarise(twice, [], "LoRA").ranks is None
    other = [*once, *(replace(o, model="roberta") for o in once)]
    assert summarise(other, [], "LoRA").pooled[0].pairs == 8
    mixed = [*twice, *(replace(o, data="mail") for o in once)]
    assert summarise(mixed, [], "LoRA").ranks.groups == 2


def test_metrics_of_one_place_that_differ_are_no_one_unit():
    runs = [run(a, s, v + 0.01 * s, data=d, data_source="one", metric=m, more_is_better=m != "loss")
            for d, m, by in (("a", "accuracy", 0.1), ("b", "loss", -30.0)) for s in range(8)
            for a, v in (("LoRA", 0.5), ("DoRA", 0.5 + by))]  # fmt: skip
    (pooled,) = summarise(runs, [], "LoRA").pooled
    assert (pooled.pairs, pooled.gain, pooled.low, pooled.p) == (8, None, None, 2 / 2**8)
    assert (pooled.lean, pooled.verdict) == (pytest.approx(1.0), S.WIN)


def test_one_rate_for_all_seeds_is_never_a_win_or_a_loss():
    """However many seeds: the luck of the one choice is in all of them."""
    runs, rates = study(seeds=13, shared=True)
    summary = summarise(runs, rates, "LoRA")
    assert {r.against.verdict for r in summary.rows if r.against} == {S.SHARED}
    assert {(p.verdict, p.p_holm) for p in summary.pooled} == {(S.SHARED, None)}
    assert row(summary, "DoRA").against.p == 2 / 2**13
    text = words(runs, rates)
    assert "better than LoRA" not in text
    assert "at these chosen rates" in text
    own = study(seeds=13)
    assert row(summarise(*own, "LoRA"), "DoRA").against.verdict == S.WIN
    only_base = [*(c for c in own[1] if c.arm != "LoRA"), *(c for c in rates if c.arm == "LoRA")]
    assert {r.against.verdict for r in summarise(own[0], only_base, "LoRA").rows if r.against} == {S.SHARED}
    only_arm = [*(c for c in own[1] if c.arm != "DoRA"), *(c for c in rates if c.arm == "DoRA")]
    told = summarise(own[0], only_arm, "LoRA")
    assert row(told, "DoRA").against.verdict == S.SHARED
    assert row(told, "AuroRA").against.verdict != S.SHARED


def test_who_is_no_better_than_the_commonest_class_is_named():
    runs = [run("LoRA", s, 0.3854) for s in range(3)] + [run("DoRA", s, 0.3854) for s in range(3)]
    text, floors = words(runs, floors={"news": 0.3854}), {"news": 0.3854}
    assert "Every arm has the same mean accuracy, 0.3854." in text
    assert "highest" not in text
    assert "Always answering the commonest class of the training rows gives 0.3854" in text
    assert "no better than that: every arm" in text
    assert "the commonest class" in hints(drawings(runs, floors=floors, only="seeds")["seeds-1"])
    rounded = [replace(o, test=o.test + 1e-16 * (o.arm == "DoRA")) for o in runs]
    assert "Every arm has the same mean accuracy" in words(rounded, floors=floors)
    assert "no better than that: every arm" in words(rounded, floors=floors)
    runs += [run("AuroRA", s, 0.6) for s in range(3)]
    assert "no better than that: DoRA and LoRA." in words(runs, floors={"news": 0.3854})


def test_a_report_compares_no_times_and_no_memory():
    """They follow what else the machine did while a run was made."""
    text = words(*study())
    assert not re.search(r"(?i)ms per step|MiB|time and memory", text)
    assert not {"time-1", "memory-1"} & {f.name for f in figures(*study())}


def test_a_column_in_which_nothing_stands_is_left_out():
    text = words(*study(data=("news",)))  # three seeds: no comparison is corrected
    assert "p (Holm)" not in text
    assert "p (Holm)" in words(*study(data=("news",), seeds=9))


def test_open_ranks_are_told():
    runs = [run(), run("AdaLoRA", 0, ranks=25), run("AdaLoRA", 1, ranks=6)]
    assert row(summarise(runs, [], "LoRA"), "AdaLoRA").ranks == 15.5
    text = words(runs)
    assert "open ranks" in text
    assert "| 15.5 |" in text


def test_nothing_is_pooled_over_one_group():
    runs = [o for o in study(seeds=8)[0] if (o.arm, o.data) != ("AuroRA", "films")]
    summary = summarise(runs, [], "LoRA")
    assert [each.arm for each in summary.pooled] == ["DoRA"]
    assert row(summary, "AuroRA").against.p_holm < 0.05


def test_a_baseline_without_a_figure_leaves_the_figures_of_the_others():
    runs = [run("LoRA", stage=SWEEP, error="it diverged"), run("DoRA", 0, 0.9), run("DoRA", data="films")]
    summary = summarise(runs, [], "LoRA")
    assert (row(summary, "LoRA").quality, row(summary, "DoRA").against) == (None, None)
    assert "The baseline LoRA has no figure, so nothing is compared with it" in words(runs)


def test_an_arm_that_never_worked_has_a_row():
    runs, rates = study()
    runs += [run("SHiRA", 7, None, stage=SWEEP, error="it diverged")]
    found = row(summarise(runs, rates, "LoRA"), "SHiRA")
    assert (found.quality, found.failed, found.failed_sweep) == (None, 0, 1)
    text = words(runs, rates)
    assert "No final run has given a figure of: SHiRA (bert, news, r=8)." in text
    assert "4 arms in 2 groups" in text


def test_an_arm_that_is_missing_somewhere_has_no_rank():
    runs = [o for o in study()[0] if (o.arm, o.data) != ("AuroRA", "films")]
    summary = summarise([*runs, run("SHiRA"), run("SHiRA", data="films")], [], "LoRA")
    assert summary.unranked == ("AuroRA",)
    assert set(summary.ranks.arms) == {"LoRA", "DoRA", "SHiRA"}


def test_the_order_of_the_runs_does_not_matter():
    runs, rates = study()
    assert summarise(runs, rates, "LoRA") == summarise(reversed(runs), reversed(rates), "LoRA")


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match=r"2 final runs of bert, news, r=8, LoRA, seed 0; .* by accuracy and loss"):
        summarise([run(), run(), run("DoRA", metric="loss")], [], "LoRA")
    with pytest.raises(ValueError, match=r"none of the 1 runs is a final one$"):
        summarise([run(stage=SWEEP)], [], "LoRA")
    broken = [run(stage=SWEEP, seed=seed, error="OSError: gone") for seed in (0, 1)]
    with pytest.raises(ValueError, match="none of the 2 runs is a final one\n  2 of them failed: OSError: gone"):
        summarise(broken, [], "LoRA")


def test_pareto_front():
    runs = [run(a, 0, v, parameters=n) for a, n, v in
            (("LoRA", 10, 0.5), ("a", 20, 0.4), ("b", 20, 0.6), ("c", 40, 0.6), ("d", 80, 0.7))]  # fmt: skip
    assert [r.arm for r in pareto(summarise(runs, [], "LoRA").rows)] == ["LoRA", "b", "d"]
    worse = [replace(o, more_is_better=False) for o in runs]
    assert [r.arm for r in pareto(summarise(worse, [], "LoRA").rows)] == ["LoRA", "a"]


# The report


class Page(html.parser.HTMLParser):
    """Checks that tags close in order; keeps tags, addresses and texts."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.addresses, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in ("href", "src", "data", "action", "xlink:href")]
        if tag not in ("meta", "br", "img", "link", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    runs, rates = study(("LoRA", "DoRA", HOSTILE), data=("news", "films"))
    runs.append(run("DoRA", 9, None, error=f"it broke: {HOSTILE}"))
    about = {"command": "undula study run", "machine": HOSTILE}
    out = tmp_path_factory.mktemp("report")
    assert (
        write_report(out, runs, rates, title=f"Which? {HOSTILE}", baseline="LoRA", about=about) == out / "report.html"
    )
    return out


def test_the_page_is_sound_and_alone(written):
    text = (written / "report.html").read_text()
    page = Page(text)
    assert "script" not in page.tags
    assert all(a.startswith("#") for a in page.addresses)
    assert not re.search(r"https?://|url\((?!#)|@import|//[a-z]", text)
    assert "default-src 'none'" in text
    shown = " ".join(page.text)
    assert all(word in shown for word in ("LoRA", "DoRA", HOSTILE, f"it broke: {HOSTILE}", "undula study run"))
    assert len(set(page.addresses)) == len(page.addresses) == text.count("<section")


def test_the_page_is_light_and_dark(written):
    """Its drawings too: all their colours are those of the page."""
    page = (written / "report.html").read_text()
    head, _, body = page.partition("</style>")
    assert "prefers-color-scheme: dark" in head
    assert drawing.LIGHT.keys() == drawing.DARK.keys() >= set(re.findall(r"var\(--(\w+)\)", page))
    assert "var(--ink)" in body
    assert not re.search(r"(fill|stroke): #", body)


def test_every_figure_is_a_file_of_its_own(written):
    page, text = (written / "report.html").read_text(), (written / "report.md").read_text()
    files = sorted((written / "plots").glob("*.svg"))
    kinds = {f.name.rpartition("-")[0] or f.stem for f in files}
    assert kinds == {"seeds", "differences", "ranks", "front", "rates", "losses", "curves"}
    assert len(files) == page.count("<svg")
    assert sorted(re.findall(r"\(plots/(.*?)\)", text)) == [f.name for f in files]
    others = {end: {f.stem for f in (written / "plots").glob(f"*.{end}")} for end in ("pdf", "png")}
    assert others == {end: {f.stem for f in files} for end in ("pdf", "png")}
    for f in files:
        size = ElementTree.parse(f).getroot().get("viewBox").split()[2:]
        with Image.open(f.with_suffix(".png")) as drawn:
            assert drawn.size == pytest.approx([float(v) * drawing.SHARP / 72 for v in size], abs=1)
        assert f.with_suffix(".pdf").read_bytes().startswith(b"%PDF")


def test_every_figure_says_what_it_shows(written):
    """To those who do not see it; and no id stands twice in the page."""
    page = (written / "report.html").read_text()
    for f in (written / "plots").glob("*.svg"):
        root = ElementTree.parse(f).getroot()
        assert root.get("role") == "img"
        assert root.get("aria-label") == root.findtext("{*}title") != ""
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(set(ids)) == len(ids)
    assert set(re.findall(r"url\(#([^)]*)\)", page)) <= set(ids)


def test_markdown_holds_no_foreign_markup(written):
    text = (written / "report.md").read_text()
    outside = re.sub(r"(?s)(`{3,})text\n.*?\n\1", "", text)
    assert "<script>" not in outside.replace(r"\<script\>", "")
    tables = re.findall(r"(?m)^\|.*\|$", text)
    columns = [len(re.findall(r"(?<!\\)\|", line)) for line in tables]
    heads = [i for i, line in enumerate(tables) if set(line) <= set("|-: ")]
    assert all(columns[i] == columns[i - 1] == columns[i + 1] for i in heads)
    assert len(heads) == (written / "report.html").read_text().count("<table")


def test_equal_input_gives_equal_files(written, tmp_path):
    runs, rates = study(("LoRA", "DoRA", HOSTILE), data=("news", "films"))
    runs.append(run("DoRA", 9, None, error=f"it broke: {HOSTILE}"))
    about = {"command": "undula study run", "machine": HOSTILE}
    write_report(tmp_path, runs[::-1], rates, title=f"Which? {HOSTILE}", baseline="LoRA", about=about)
    names = sorted(p.relative_to(written) for p in written.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    assert all((written / n).read_bytes() == (tmp_path / n).read_bytes() for n in names)


def test_the_numbers_come_back(tmp_path):
    from pyarrow import parquet

    runs, rates = study(data=("news",))
    runs.append(run("DoRA", 9, math.nan, error=None))
    write_report(tmp_path, runs, rates, title="t", baseline="LoRA", about={})
    summary = summarise(runs, rates, "LoRA")
    lines = list(csv.DictReader((tmp_path / "runs.csv").open()))
    stored = parquet.read_table(tmp_path / "runs.parquet").to_pylist()
    assert len(lines) == len(stored) == len(runs)
    for given, line, entry in zip(summary.runs, lines, stored, strict=True):
        assert line["arm"] == entry["arm"] == given.arm
        assert json.loads(line["deployed"]) == dict(entry["deployed"]) == given.deployed
        assert [(p["step"], p["value"]) for p in entry["losses"]] == list(given.losses)
        assert entry["test"] == given.test or math.isnan(given.test)
        assert float(line["test"]) == given.test or math.isnan(given.test)
    table = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [(r["arm"], r["data"]) for r in table] == [(r.arm, r.data) for r in summary.rows]
    assert [float(r["mean"]) for r in table] == [r.quality.mean for r in summary.rows]


def words(runs, rates=(), floors=None):
    """The report as text, without its drawings, which take longer."""
    return markdown.page("t", document(summarise(runs, rates, "LoRA", floors=floors), {}))


def figures(runs, rates=(), floors=None):
    blocks = [b for s in document(summarise(runs, rates, "LoRA", floors=floors), {}) for b in s.blocks]
    return [f for b in blocks if isinstance(b, Drawn) for f in b.figures]


def drawings(runs, rates=(), floors=None, only=""):
    """{name: SVG} of the figures whose name begins so."""
    with drawing.styled():
        return {
            f.name: drawing.rendered(f.draw(), "svg").decode()
            for f in figures(runs, rates, floors)
            if f.name.startswith(only)
        }


def texts(svg):
    """All texts of an SVG, in order; those of several lines are several."""
    return [t.text for t in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def hints(svg):
    """What a pointer finds."""
    return [t.text for t in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}title")]


def test_the_words_say_what_three_seeds_are_worth():
    text = words(*study(data=("news",)))
    assert "the smallest p that the exact test can give is 0.25" in text
    assert "6 seeds would do for a single comparison, 7 for all 2 of this report" in text
    assert "with fewer than 6 pairs there is none" in text
    assert "Unbracketed" in text
    assert "AuroRA (bert, news, r=8)" in text
    assert "Over all groups" not in text


@pytest.mark.parametrize("seeds", [2, 3, 4, 6, 9])
@pytest.mark.parametrize("sets", [1, 3])
def test_what_seeds_could_decide_is_what_the_summary_decides_of_the_largest_differences(seeds, sets):
    names = ("news", "films", "mail")[:sets]
    arms = [spec.Arm(a, undula.LoRA(r=r)) for r, a in enumerate(("LoRA", *"abcdefgh"), 1)]
    data = tuple(spec.Rows(n, Classification()) for n in names)
    planned = spec.Study("t", tuple(arms), (spec.Base("bert"),), data, seeds=tuple(range(1, seeds + 1)))
    foreseen = power(Plan(planned))
    runs = [run(a.name, s, float(a.name != "LoRA"), data=n) for a in arms for s in range(seeds) for n in names]
    found = summarise(runs, (), "LoRA")
    single = [r.against.verdict for r in found.rows if r.against]
    assert (foreseen.single, foreseen.single_decidable) == (len(single), single.count(S.WIN))
    over = [p.verdict for p in found.pooled]
    assert (foreseen.pooled, foreseen.pooled_decidable) == (len(over), over.count(S.WIN))
    for needed, decided in ((foreseen.seeds_for_pooled, over), (foreseen.seeds_for_every, single + over)):
        assert (seeds >= needed) == all(v == S.WIN for v in decided)


def test_the_seeds_of_an_untrained_model_are_not_asked_for():
    runs, rates = study(data=("news",))
    runs += [run("untrained", 0, 0.1, parameters=0, head_parameters=0)]
    assert "7 for all 2 of this report" in words(runs, rates)
    runs, rates = study(arms=("LoRA", "DoRA"))
    runs += [run("untrained", 0, 0.1, data=d, parameters=0, head_parameters=0) for d in ("news", "films")]
    assert "7 for all 3 of this report" in words(runs, rates)
    runs, rates = study(arms=("LoRA", "DoRA"), data=("news",), seeds=8)
    runs += [run("untrained", 0, 0.1, parameters=0, head_parameters=0)]
    assert "would do for a single comparison" not in words(runs, rates)


def test_an_arm_with_a_single_pair_is_told():
    text = words([*study(data=("news",))[0], run("SHiRA")])
    assert "An arm with one pair of seeds has no interval and no test" in text


def test_equal_bests_are_all_named():
    text = words([run(), run("DoRA", 0, 0.9), run("AuroRA", 0, 0.9)])
    assert "The highest mean accuracy is that of AuroRA and DoRA, 0.9000" in text


def test_what_halving_ended_is_told():
    runs, rates = study(arms=("LoRA", "DoRA"))
    assert "Every chosen rate lies between rates that did no better." in words(runs, rates)
    runs = [replace(o, pruned=o.stage == SWEEP and o.lr == 1e-2) for o in runs]
    assert "Successive halving ended 4 of its runs early." in words(runs, rates)


def test_an_interval_that_is_cut_has_an_arrow():
    noisy = [run(a, s, v) for a in ("LoRA", "DoRA") for s, v in enumerate((0.5, 0.6, 0.7 + 0.1 * (a == "DoRA")))]
    low, high = drawing.limits((0.5, 0.8), 0.25)
    student = [r.quality for r in summarise(noisy, (), "LoRA").rows]  # of three figures: wide
    ends = [end for q in student for end in (q.low, q.high) if not low <= end <= high]
    found = hints(drawings(noisy, only="seeds")["seeds-1"])
    assert [h for h in found if "goes on" in h] == [f"goes on to {end:.4g}" for end in ends]
    assert len(ends) == 3
    calm = [run(a, s, 0.5 + 0.001 * s) for a in ("LoRA", "DoRA") for s in range(9)]
    assert not [h for h in hints(drawings(calm, only="seeds")["seeds-1"]) if "goes on" in h]


def test_the_rows_are_called_what_they_are():
    summary = summarise(study()[0], [], "LoRA", split="validation")
    text = markdown.page("t", document(summary, {}))
    assert text.count("validation rows") >= 5  # the opening, two tables and two forms of deployment
    assert "test rows" not in text.replace("other test rows", "")


def test_an_arm_of_a_head_alone_is_named_where_it_cannot_be_drawn():
    runs = [run(), run("head only", parameters=0), run("DoRA", parameters=900)]
    assert "Not shown, because only a head trains: head only" in words(runs)
    drawn = drawings(runs, only="front")["front-1"]
    assert "DoRA" in texts(drawn)
    assert "head only" not in drawn


def test_six_seeds_decide_one_comparison():
    text = words(*study(arms=("LoRA", "DoRA"), data=("news",), seeds=6))
    assert "better than LoRA: DoRA" in text
    assert "ndecidable" not in text


def test_one_seed_has_no_interval_and_says_so():
    text = words([run(), run("DoRA", 0, 0.9)])
    assert "An arm with one pair of seeds has no interval and no test" in text
    assert "| 1 of 1 |" in text
    assert "| p |" not in text
    assert "interval |" not in text  # a column of nothing but "none"
    assert "No learning rate was searched for" in text


def test_a_group_without_figures_or_baseline_is_still_reported():
    runs = [
        run(),
        run("DoRA", 0, 0.9),
        run("DoRA", data="films"),
        run("AuroRA", 0, None, data="plays", error="no memory"),
    ]
    text = words(runs)
    assert "bert, plays, r=8: nothing could be compared. No run gave a figure." in text
    assert "bert, films, r=8: nothing could be compared. The highest mean accuracy is DoRA's" in text
    assert "no memory" in text


def test_of_many_points_those_that_say_nothing_have_no_name():
    """Lines from 28 names to grey points hide the points.  All points are drawn, and a pointer finds their names."""
    arms = {f"arm {i}": 0.5 - 0.001 * i for i in range(14)} | {"winner": 0.7, "loser": 0.1}
    base = [run("LoRA", s, 0.6, parameters=10) for s in range(13)]
    runs = [run(a, s, v, parameters=1000 + i) for i, (a, v) in enumerate(arms.items()) for s in range(2)]
    for name in ("winner", "loser"):
        runs += [run(name, s, arms[name], parameters=1000) for s in range(2, 13)]
    drawn = drawings([*base, *runs], only="front")["front-1"]
    assert {"LoRA", "winner", "loser"} == set(texts(drawn)) & {"LoRA", *arms}
    assert all(f"{arm}: " in " ".join(hints(drawn)) for arm in ("LoRA", *arms))
    assert drawn.count(f"stroke: {drawing.LIGHT['back']}") == 3  # a line to each name
    assert "Named: the front, the baseline, and arms with a verdict" in words([*base, *runs])
    few = [o for o in (*base, *runs) if o.arm in ("LoRA", "arm 1", "arm 2", "winner")]
    assert {"LoRA", "arm 1", "arm 2", "winner"} <= set(texts(drawings(few, only="front")["front-1"]))
    assert "Named:" not in words(few)


def test_no_table_has_a_column_in_which_nothing_stands():
    """In any section: corrected p where none could be decided, forms that no arm has, intervals of two pairs."""
    runs, rates = study(seeds=2)
    runs.append(run("DoRA", 9, None, error="it broke"))
    for section in document(summarise(runs, rates, "LoRA"), {}):
        for table in (b for b in section.blocks if isinstance(b, Table)):
            for i, name in enumerate(table.head):
                assert any(row[i] not in ("", "none") for row in table.rows), (section.title, name)


# LaTeX


def read_back(text):
    """What LaTeX makes of it."""
    for plain, escaped in [*sorted(latex.SPECIAL.items(), key=lambda kv: -len(kv[1])), ("-", "$-$")]:
        text = text.replace(escaped, f"\0{ord(plain)};")
    text = text.replace("-{}", "-")
    assert not set(text) & set("&%$#_{}~^\\")
    return re.sub(r"\0(\d+);", lambda m: chr(int(m[1])), text)


@pytest.mark.parametrize(
    "text",
    [HOSTILE, r"\input{/etc/passwd}", "50 % of $x_1^2$ & #3 ~ {a}", "-0.1092 to -0.0550", "1e-12", "r=8, a-b", "''\"``",
     "Größe … 模型", "^^41", "a -- b --- -1 --x"],
)  # fmt: skip
def test_no_text_is_latex(text):
    assert read_back(latex.plain(text)) == text
    assert latex.plain("a\nb\tc\r\0d") == "a b c d"
    assert "--" not in latex.plain(text)  # which would be set as a dash


def test_the_tables_are_there_as_latex(written):
    text, page = (written / "tables.tex").read_text(), (written / "report.html").read_text()
    tables = re.findall(r"(?s)\\begin\{table\}.*?\\end\{table\}", text)
    assert len(tables) == page.count("<table")
    assert len(set(re.findall(r"\\label\{(.*?)\}", text))) == len(tables)
    for table in tables:
        (columns,) = re.findall(r"\\begin\{tabular\}\{(.*)\}", table)
        (body,) = re.findall(r"(?s)\\toprule\n(.*)\\bottomrule", table)
        rows = body.replace("\\midrule\n", "").splitlines()
        assert all(row.endswith(r" \\") for row in rows)
        count = len(re.sub(r"p\{.*?\}", "p", columns))
        assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {count}
    assert text.count(r"\textbf{LoRA}") == page.count('<b class="base">LoRA</b>') > 0
    assert re.findall(r"(?m)^(?!%).*<script", text) == []


def test_a_title_is_one_comment():
    assert latex.page("two\nlines", ()).splitlines()[0] == "% two lines"


# Drawing


def boxes(figure):
    """(text, its box in pixels of the figure) of all that is written."""
    from matplotlib.text import Text

    renderer = figure.canvas.get_renderer()
    figure.draw(renderer)
    found = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text()]
    return [(t.get_text(), Text.get_window_extent(t, renderer)) for t in found]


def check_texts(figure, name):
    """No text leaves its figure, none lies on another."""
    found = boxes(figure)
    wide, high = figure.bbox.size
    for text, box in found:
        assert -1 <= box.x0 <= box.x1 <= wide + 1, (name, text)
        assert -1 <= box.y0 <= box.y1 <= high + 1, (name, text)
    for (one, a), (other, b) in itertools.combinations(found, 2):
        beside = a.x1 <= b.x0 + 0.5 or b.x1 <= a.x0 + 0.5 or a.y1 <= b.y0 + 1.5 or b.y1 <= a.y0 + 1.5
        assert beside, (name, one, other)


AWKWARD = {  # figures that need long labels, steps that end at a tick, names and metrics of some length
    "close": {"values": (0.75251, 0.75252, 0.75254), "metric": "accuracy"},
    "tiny": {"values": (1.31e-5, 1.32e-5, 1.36e-5), "metric": "loss"},
    "negative": {"values": (-0.00251, -0.00252, 0.0), "metric": "matthews correlation"},
    "large": {"values": (123456.0, 123457.0, 123459.0), "metric": "perplexity of the whole validation text, per word"},
    "equal": {"values": (0.5, 0.5, 0.5), "metric": "accuracy"},
}


LONG = ("LoRA", "a name of some length, with all of its options", "aVeryLongNameWithoutAnySpaceInIt")


@pytest.mark.parametrize(
    ("case", "steps", "names"),
    [(case, (80, 1200, 100_000)[i % 3], LONG[i % 3]) for i, case in enumerate(AWKWARD)] + [("large", 100_000, LONG[2])],
)
def test_no_text_leaves_its_drawing_and_none_lies_on_another(case, steps, names):
    """By matplotlib's own boxes, in the wide font that it brings."""
    values, metric = AWKWARD[case]["values"], AWKWARD[case]["metric"]
    runs, rates = [], []
    arms = ["LoRA", *(f"{names} {i}" for i in range(3))]
    for d, (a, arm), s in itertools.product(("news", "films"), enumerate(arms), range(3)):
        v = values[(a + s) % 3]
        curve = tuple((i, v) for i in range(0, steps + 1, steps // 4))
        more = {"losses": curve, "curve": curve, "parameters": 10 ** (3 + a), "metric": metric, "more_is_better": False}
        runs.append(run(arm, s, v, data=d, **more))
        tried = tuple((3.16e-5 * 10 ** (0.5 * k), values[k % 3]) for k in range(3 + 3 * (a == 1)))
        rates.append(ChosenRate(arm, "bert", d, "r=8", tried[1][0], False, tried, s))
    made = [f for f in figures(runs, rates) if not f.name.endswith("-2")]
    assert len(made) == 7
    for figure in made:
        with drawing.styled():
            check_texts(figure.draw(), figure.name)


def test_twenty_arms_have_labels_that_do_not_overlap():
    arms = ["LoRA", *(f"a method with quite a long name and number {i}" for i in range(19))]
    runs = [run(arm, s, 0.5 + 1e-4 * i, parameters=1000 * (1 + i % 3)) for i, arm in enumerate(arms) for s in range(2)]
    for figure in figures(runs):
        with drawing.styled():
            drawn = figure.draw()
            check_texts(drawn, figure.name)
            said = {" ".join(text.split()) for text, _ in boxes(drawn)}
        if figure.name in ("seeds-1", "differences-1"):
            assert set(arms[1:]) <= said  # whole


@pytest.mark.parametrize("kind", plots.COLOURS)
def test_pixels_have_the_colours_of_the_page(kind):
    """The points of each verdict, as painted; marks differ in shape too."""
    with drawing.styled():
        figure = drawing.blank(60, 60)
        axis = drawing.axes(figure, 0, 0, 60, 60)
        axis.set_axis_off()
        axis.set(xlim=(0, 1), ylim=(0, 1))
        plots.mark(axis, 0.5, 0.5, kind, size=16)
        png = drawing.rendered(figure, "png")
    with Image.open(io.BytesIO(png)) as file:
        drawn = file.convert("RGB")
    colours = {tuple(bytes.fromhex(drawing.LIGHT[n][1:])) for n in ("win", "loss", "open", "ink")}
    seen = {colour for count, colour in drawn.getcolors() if count > 100}
    assert seen & colours == {tuple(bytes.fromhex(plots.COLOURS[kind][1:]))}
    assert drawn.getpixel((2, 2)) == (255, 255, 255)
    assert len(set(plots.MARKS.values())) == len(set(plots.COLOURS.values())) == len(plots.MARKS)


def test_every_seed_is_a_dot():
    """And every pair of seeds, beside the mean and its bar."""
    runs, rates = study(seeds=7)
    for figure in figures(runs, rates):
        if figure.name in ("seeds-1", "differences-1"):
            with drawing.styled():
                (axis,) = figure.draw().axes
            dots = [line for line in axis.lines if line.get_alpha() is not None]
            assert [len(line.get_xdata()) for line in dots] == [7] * (3 if figure.name == "seeds-1" else 2)


def test_texts_are_drawn_as_they_are():
    """An arm may be called what matplotlib would read as mathematics, or HTML as markup; texts stay texts."""
    name = r"$\frac{1$ <b>&amp; LoRA"
    made = drawings([run(), run(name, 0, 0.6)], only="seeds")["seeds-1"]
    assert name in " ".join(texts(made))
    assert any(h.startswith(f"{name}: ") for h in hints(made))


def test_settings_of_the_user_change_no_drawing(tmp_path):
    """And are what they were afterwards; nothing goes through pyplot."""
    runs = [run(), run("DoRA", 0, 0.6)]
    usual = drawings(runs)
    mine = {"font.size": 30.0, "axes.grid": True, "svg.fonttype": "path", "figure.facecolor": "red"}
    with matplotlib.rc_context(mine):
        assert drawings(runs) == usual
        assert {k: matplotlib.rcParams[k] for k in mine} == mine
    with ThreadPoolExecutor(4) as pool:
        assert all(found == usual for found in pool.map(lambda _: drawings(runs), range(4)))


def test_names_that_are_cut_stay_different():
    names = [f"{'x' * 30}{i}{'y' * 30}" for i in range(12)]
    made = drawing.labels(names, 20)
    assert len(set(made.values())) == 12
    assert all(len(short) <= 20 for short in made.values())
    assert drawing.labels(["short"], 20) == {"short": "short"}


def test_rounding_alone_does_not_look_like_a_difference():
    low, high = drawing.limits([0.3, 0.1 + 0.2])
    assert high - low > 0.01
    low, high = drawing.limits([0.3, 0.3001])
    assert high - low < 0.001


def test_long_texts_are_wrapped():
    text = "a title with so many words that it takes more than one line of two hundred pixels"
    made = drawing.wrapped(text, 200)
    assert made.split() == text.split()
    assert made.count("\n") >= 2
    assert drawing.wide(made) <= 200
    assert drawing.wrapped("short", 200) == "short"


def test_labels_are_pushed_apart_as_little_as_needed():
    assert drawing.apart([10, 11, 50], 10, 0, 100) == pytest.approx([5.5, 15.5, 50])
    assert drawing.apart([0, 0, 0], 10, 0, 100) == pytest.approx([0, 10, 20])
    assert drawing.apart([100, 100], 10, 0, 100) == pytest.approx([90, 100])
    assert drawing.apart([5] * 11, 20, 0, 100) == pytest.approx(list(range(0, 101, 10)))


@pytest.mark.parametrize(("low", "high"), [(0.61, 0.64), (-3, 17), (1e-9, 3e-9), (1000, 1000000)])
def test_ticks_are_round_and_within(low, high):
    ticks = drawing.ticks(low, high, 5)
    assert 2 <= len(ticks) <= 6
    room = 1e-9 * (high - low)
    assert all(low - room <= t <= high + room for t, _ in ticks)
    assert len({label for _, label in ticks}) == len(ticks)


def test_logarithmic_ticks():
    def at(low, high, most):
        return [t for t, _ in drawing.ticks(low, high, most, log=True)]

    assert at(9e-5, 0.02, 4) == pytest.approx([1e-4, 1e-3, 1e-2])
    assert at(900, 5100, 4) == pytest.approx([1000, 2000, 3000, 5000])
    assert at(900, 5100, 3) == pytest.approx([1000, 2000, 5000])
    assert [drawing.number(v) for v in (1e-4, 0.65, 37632, 1.2e6, 0, 2.5e-5)] == [
        *("1e-4", "0.65", "37.6k", "1.2M", "0", "2.5e-5")
    ]
