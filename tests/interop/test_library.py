"""Classes that are told by descriptions, a library of such experts, and adapters that are made of it."""

import dataclasses
import json
import os
import shutil

import pytest
import torch
from typer.testing import CliRunner

import undula
from tests.support import tiny
from undula.cli.main import app
from undula.generate import Library, build, mixture, write
from undula.generate.library import embedded
from undula.generate.task_vector import task_vectors
from undula.jobs.view import Silent
from undula.train import CausalLM, Classification, DescribedClassification, Recipe, Run
from undula.train.base import open_model
from undula.train.prepared import prepare
from undula.train.tasks.segments import segments

TOLD = {"bad": "a sad day", "good": "very nice food"}
COMMON = """
model = "{base}"
data = "{data}"
task = {{ is = "described-classification", descriptions = {{ bad = "a sad day", good = "very nice food" }} }}
method = {{ is = "{method}", r = 2 }}
lr = 1e-2
max_steps = 6
batch = 4
eval_every = 0
"""
JOBS = COMMON + '[[jobs]]\nname = "one"\ndescription = "a good day"\n'
JOBS += '[[jobs]]\nname = "two"\ndescription = "bad food"\ndata = "{other}"\n'


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, rows, and a library of two experts (AuroRA's, which bend)."""
    tmp = tmp_path_factory.mktemp("library")
    base = tiny.bert(tmp / "base")
    data = tiny.jsonl(tmp / "rows.jsonl", tiny.reviews(24))
    other = tiny.jsonl(tmp / "others.jsonl", tiny.reviews(24, seed=1))
    (tmp / "tasks.toml").write_text(JOBS.format(base=base, data=data, other=other, method="aurora"))
    build(tmp / "tasks.toml", tmp / "library", checkpoints=2, share=0.5)
    return tmp


def task(**more):
    return DescribedClassification(**{"names": ("bad", "good"), "descriptions": TOLD, **more})


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_the_answer_is_the_cosine_with_the_descriptions(tmp_path, family):
    """Against a computation of its own, of the base's files, text by text; so a zero adapter is the base."""
    from transformers import AutoModel, AutoTokenizer

    base = getattr(tiny, family)(tmp_path)
    body, tokenizer = AutoModel.from_pretrained(base, dtype=torch.float64), AutoTokenizer.from_pretrained(base)
    texts = ["the film was good", "nice", "the food was very very awful"]

    @torch.no_grad()
    def vector(text):
        given = tokenizer(text, return_tensors="pt")
        return torch.nn.functional.normalize(body.eval()(**given)[0][0].mean(0), dim=0)

    prompts = torch.stack([vector(text) for text in TOLD.values()])
    wanted = 20 * torch.stack([vector(text) for text in texts]) @ prompts.T
    model, processor = open_model(base, task(), torch.float64, 0)
    undula.attach(model.eval(), undula.LoRA(r=2), "all-linear")
    with torch.no_grad():
        got = model(**processor(texts, padding=True, return_tensors="pt")).logits
    found = [answer["label"] for answer in task().answers(model, [{"text": t} for t in texts], processor, 2)]
    assert found == [list(TOLD)[i] for i in wanted.argmax(1)]
    torch.testing.assert_close(got, wanted)


def test_a_step_of_rows_in_one_is_that_of_padded_rows(place):
    """Loss and gradients of the whole batch, without dropout."""
    recipe = Recipe(str(place / "base"), str(place / "rows.jsonl"), task(), undula.LoRA(r=2), dtype=torch.float64)
    ready = prepare(Run.of(recipe, place / "nowhere"))
    ready.model.eval()
    rows = [ready.train[i] for i in range(6)]
    step = ready.run.task.step(ready.train, ready.model)
    found = {}
    for kind, gather in (("padded", ready.run.task.collator(ready.processor)), ("flat", step.gather)):
        batch = dict(gather(rows))
        with step.around(ready.model), segments(batch.pop("segments", None)):
            loss = ready.model(**batch).loss
        found[kind] = loss, torch.autograd.grad(loss, ready.adapter.parameters())
    torch.testing.assert_close(found["flat"], found["padded"])


def test_what_it_leaves_opens_and_no_head_has_trained(place):
    run = place / "library" / "experts" / "one"
    opened = undula.load(run)
    assert not opened.adapter.full
    assert opened.run.task.prompts == list(TOLD.values())
    answer = opened.predict("the film was good")
    assert set(answer["probabilities"]) == set(TOLD)
    assert undula.evaluate(run)["accuracy"] == pytest.approx(
        json.loads((run / "report.json").read_text())["after"]["accuracy"]
    )
    with pytest.raises(TypeError, match="told by descriptions"):
        opened.model.save_pretrained(place / "whole")


def test_what_leaves_undula_says_what_is_lost(place, tmp_path):
    """A LoRA leaves without its descriptions, a merged model not at all: the descriptions are the base's."""
    write(undula.attach(open_model(str(place / "base"), task(), torch.float32, 0)[0], undula.LoRA(r=2), "query"),
          tmp_path / "lora", str(place / "base"), task(), "Drawn.")  # fmt: skip
    done = CliRunner().invoke(app, ["export", str(tmp_path / "lora"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "only the adapter's own files were written: no class of transformers" in " ".join(done.output.split())
    done = CliRunner().invoke(app, ["merge", str(tmp_path / "lora"), "--out", str(tmp_path / "merged")])
    assert done.exit_code == 2
    assert "told by descriptions" in done.output
    assert not (tmp_path / "merged").exists()


def test_a_description_of_no_class_is_refused(place):
    wrong = task(names=(), descriptions={"god": "a typing mistake"})
    recipe = Recipe(str(place / "base"), str(place / "rows.jsonl"), wrong, undula.LoRA(r=2))
    with pytest.raises(ValueError, match=r"descriptions tell of 'god'.* 'bad', 'good'"):
        prepare(Run.of(recipe, place / "nowhere"))


def test_a_library_has_what_its_trainings_were(place):
    lib = Library.load(place / "library")
    assert lib.names == ["one", "two"]
    for expert in lib.experts:
        final = undula.Adapter.load(place / "library" / "experts" / expert.name)
        assert expert.checkpoints.shape == (2, lib.layout.size)
        assert expert.figures["steps"] == [4, 6] or expert.figures["steps"] == [5, 6]
        torch.testing.assert_close(lib.layout.pack(final), expert.checkpoints[-1], rtol=0, atol=0)
        torch.testing.assert_close(expert.mean, expert.checkpoints.mean(0))
        assert not torch.equal(expert.mean, lib.start)
        assert not (place / "library" / "experts" / expert.name / "snapshots").exists()
    assert float(lib.embeddings.norm(dim=1).sub(1).abs().max()) < 1e-6
    torch.testing.assert_close(lib.embed(["bad food"])[0], lib.experts[1].embedding)


def test_a_library_grows(place, tmp_path, monkeypatch):
    """By a file that has not all that it has, another description of one, and the base by another path."""
    shutil.copytree(place / "library", tmp_path / "library")
    jobs = (place / "tasks.toml").read_text().partition('[[jobs]]\nname = "two"')[0].replace("a good day", "a nice day")
    monkeypatch.chdir(place)
    jobs = jobs.replace(f'"{place / "base"}"', '"base"')
    (tmp_path / "tasks.toml").write_text(jobs + '[[jobs]]\nname = "three"\ndescription = "a place"\n')
    lib = build(tmp_path / "tasks.toml", tmp_path / "library", checkpoints=2, share=0.5, resume=True)
    assert (lib.names, lib.model) == (["one", "two", "three"], str(place / "base"))
    old = Library.load(place / "library")
    assert torch.equal(lib.without(["three"]).means, old.means)
    assert [e.description for e in lib.experts] == ["a nice day", "bad food", "a place"]
    torch.testing.assert_close(lib.embeddings[0], lib.embed(["a nice day"])[0])
    for what, words in (
        ({"model": tiny.roberta(tmp_path / "base")}, "four: model is"),
        ({"seed": 1}, "four: seed is 1"),
    ):
        other = {"four": dataclasses.replace(recipes(place)["one"], method=undula.AuroRA(r=2), **what)}
        with pytest.raises(ValueError, match=f"{words}.* in the library: experts share it"):
            build(other, tmp_path / "library", {"four": "a day"}, resume=True)
    assert not (tmp_path / "library" / "experts" / "four").exists()


def recipes(place, **more):
    common = {
        "model": str(place / "base"),
        "data": str(place / "rows.jsonl"),
        "task": task(),
        "method": undula.LoRA(r=2),
    }
    return {"one": Recipe(**common), "two": Recipe(**{**common, **more})}


@pytest.mark.parametrize(
    ("more", "told", "words"),
    [
        ({"task": Classification()}, {"one": "a", "two": "b"}, "two trains the head of Classification in full"),
        ({"seed": 1}, {"one": "a", "two": "b"}, "two: seed is 1, and 0 in the first"),
        ({"method": undula.LoRA(r=3)}, {"one": "a", "two": "b"}, r"two: method is LoRA\(r=3.*experts share it"),
        ({"where": "query"}, {"one": "a", "two": "b"}, "two: where is 'query'"),
        ({"full": ("bert.embeddings.LayerNorm.bias",)}, {"one": "a", "two": "b"}, "trains bert.embeddings"),
        ({}, {"one": "a", "two": " "}, "two has no description"),
        ({}, {"one": "a", "two": "b", "thre": "c"}, "descriptions of thre, which are no jobs"),
    ],
)
def test_what_is_no_expert_is_refused_before_anything_trains(place, tmp_path, more, told, words):
    with pytest.raises(ValueError, match=words):
        build(recipes(place, **more), tmp_path / "out", told)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_a_description_opens_as_any_other(place, tmp_path):
    lib = Library.load(place / "library")
    found = mixture(lib, "a good day")
    write(lib.layout.unpack(found.mean), tmp_path / "made", lib.model, task(), "Made of two.")
    opened = undula.load(tmp_path / "made")
    torch.testing.assert_close(lib.layout.pack(opened.adapter.copy()), found.mean, rtol=0, atol=0)
    assert opened.predict("nice")["label"] in TOLD
    assert "Made of two." in (tmp_path / "made" / "README.md").read_text()
    trained = tmp_path / "on"
    undula.train(Run(lib.model, str(place / "rows.jsonl"), task(), None, begin_from=tmp_path / "made", out=trained,
                     max_steps=2, batch=2, eval_every=0))  # fmt: skip
    assert undula.load(trained).adapter.methods == opened.adapter.methods


@pytest.mark.parametrize("how", ["mixture", "nearest", "sg-lora", "icm-lora"])
def test_the_verb_makes_one(place, tmp_path, how, monkeypatch):
    from undula.generate import icmlora, sglora

    small = {sglora: {"hidden": 4, "latent": 2}, icmlora: {"channels": (2, 2), "hidden": 4, "latent": 2}}
    for module, sizes in small.items():
        kind = {sglora: "SGLoRA", icmlora: "ICMLoRA"}[module]
        options, whole = module.Options(steps=2, batch=2, **sizes), getattr(module, kind).fit
        monkeypatch.setattr(
            f"undula.generate.{kind}.fit", lambda lib, whole=whole, options=options: whole(lib, options)
        )
    (tmp_path / "rows.txt").write_text("the film was good\n\nthe food was bad\n")
    more = ["--rows", str(tmp_path / "rows.txt")] if how == "icm-lora" else []
    asked = ["from-description", "a happy day", "--library", str(place / "library"), "--out", str(tmp_path / "made")]
    asked += ["--how", how, "--class", "bad=a sad day", "--class", "good=very nice food", *more]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    assert undula.load(tmp_path / "made").labels == ("bad", "good")
    again = CliRunner().invoke(app, asked)
    assert again.exit_code == 2


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--how", "nearest", "--k", "2"], "--k is of --how mixture"),
        (["--how", "icm-lora"], "reads rows of the task"),
        (["--seed", "1"], "mixture draws nothing"),
        (["--class", "one=a"], "two classes or more"),
        (["--class", "a=b", "--class", "c=d", "--how", "icm-lora", "--rows", "rows.csv"], "rows.csv has columns"),
        (["--class", "a=b", "--class", "c=d", "--how", "icm-lora", "--rows", "LATIN"], "latin.txt is no text in UTF-8"),
        (["--class", "a=b", "--class", "c=d", "--class", "a=e"], "the class a is given twice"),
        (["--class", "a=b", "--class", "c= "], "the class 'c' has a blank description"),
        (["--class", "a=b", "--class", "c=b"], "the classes 'a' and 'c' have one description"),
    ],
)
def test_the_verb_refuses_what_would_do_nothing(place, tmp_path, more, words):
    (tmp_path / "latin.txt").write_bytes("ein schöner Tag\n".encode("latin-1"))
    more = [str(tmp_path / "latin.txt") if word == "LATIN" else word for word in more]
    asked = ["from-description", "a happy day", "--library", str(place / "library"), "--out", str(tmp_path / "made")]
    done = CliRunner().invoke(app, [*asked, *more])
    assert done.exit_code == 2
    assert words in " ".join(done.output.split())


def test_experts_of_several_tasks_are_told_or_refused(place, tmp_path):
    shutil.copytree(place / "library", tmp_path / "library")
    two = tmp_path / "library" / "experts" / "two"
    asked = ["from-description", os.fsdecode(b"caf\xe9"), "--library", str(tmp_path / "library"), "--class", "a=b"]
    asked += ["--class", "c=d", "--out"]
    for more, code, words in (
        (task(max_length=9), 0, "The experts' tasks differ, and that of one is taken: max_length (None; 9 of two)"),
        (CausalLM(), 2, "of several tasks: one of DescribedClassification, two of CausalLM"),
    ):
        dataclasses.replace(Run.load(two), task=more).save(None)
        done = CliRunner().invoke(app, [*asked, str(tmp_path / f"made-{code}")])
        assert done.exit_code == code, done.output
        assert words in " ".join(done.output.split())


def test_vectors_of_descriptions_and_of_tasks(place):
    """Padding changes no vector; a task's is the mean of its rows', of a language model of the last tokens'."""
    texts = ["the film was good", "nice"]
    made = embedded(str(place / "base"), texts)
    torch.testing.assert_close(made, torch.cat([embedded(str(place / "base"), [t]) for t in texts]))
    one, other, both = (task_vectors(str(place / "base"), [rows])[0] for rows in ([texts[0]], [texts[1]], texts))
    torch.testing.assert_close((one + other) / 2, both)
    with pytest.raises(ValueError, match="description 2 of 2 is empty"):
        embedded(str(place / "base"), ["a", " "])


def test_a_language_model_s_task_vector_is_of_last_tokens(tmp_path):
    from transformers import AutoModel, AutoTokenizer

    base = tiny.llama(tmp_path)
    tokenizer, body = AutoTokenizer.from_pretrained(base), AutoModel.from_pretrained(base)
    ids = tokenizer("the film was good", return_tensors="pt")
    with torch.no_grad():
        wanted = body.eval()(**ids)[0][0, -1]
    torch.testing.assert_close(task_vectors(base, [["the film was good"]])[0], wanted)


def test_experts_that_write_make_a_library_too(tmp_path):
    """Causal language models have no head of their own either."""
    base = tiny.llama(tmp_path / "base", chat=True)
    rows = [{"prompt": r["text"], "completion": r["label"]} for r in tiny.reviews(8)]
    data = tiny.jsonl(tmp_path / "rows.jsonl", rows)
    common = {"model": base, "data": data, "task": CausalLM(generate=0), "method": undula.LoRAN(r=2)}
    made = {n: Recipe(**common, max_steps=2, batch=2, eval_every=0, lr=r) for n, r in (("a", 1e-3), ("b", 1e-2))}

    class Watching(Silent):
        steps = 0

        def stepped(self, job):
            self.steps += 1

    view = Watching()
    lib = build(made, tmp_path / "out", {"a": "good film", "b": "bad day"}, view=view)
    assert view.steps == 4
    found = mixture(lib, lib.experts[1].embedding, k=1)
    torch.testing.assert_close(found.mean, lib.experts[1].mean)
    write(lib.layout.unpack(found.mean), tmp_path / "made", lib.model, dataclasses.replace(common["task"]), "Made.")
    assert isinstance(undula.load(tmp_path / "made").generate("the film"), str)
