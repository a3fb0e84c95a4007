"""One encoder for many adapters, each with its own head: what comes of a mixed batch is what each says alone."""

import contextlib
import dataclasses
import shutil
import threading
import time

import pytest
import torch

import undula
from tests.support import tiny
from tests.support.encoders import drawn
from tests.support.numbers import shake
from undula.serve import padded
from undula.serve.encoder import Encoder
from undula.serve.heads import Body
from undula.serve.pool import Pool
from undula.serve.request import Busy, Cancelled, Draining, Failed, Part, Refused
from undula.serve.worker import Room
from undula.train import (
    CausalLM,
    Classification,
    DescribedClassification,
    ImageClassification,
    MultiLabel,
    Regression,
    Similarity,
    TokenClassification,
)
from undula.train.base import open_model

TEXTS = ["the film was good", "the food was awful and the day very very sad", "nice"]
TASKS = {
    "two": Classification(names=("bad", "good")),
    "four": Classification(names=("a", "b", "c", "d")),
    "number": Regression(),
    "sets": MultiLabel(names=("x", "y", "z")),
    "tags": TokenClassification(names=("O", "B-A", "I-A", "B-B", "I-B")),
    "near": Similarity(),
    "told": DescribedClassification(names=("bad", "good"), descriptions={"bad": "a sad day", "good": "very good food"}),
}
METHODS = [undula.LoRA(r=2), undula.LoRAN(r=2), undula.DoRA(undula.LoRA(r=3)), undula.AuroRA(r=2), undula.VeRA(r=4)]
FAMILIES = ["bert", "roberta", "distilbert", "modernbert", "deberta"]


def patient(encoder, count):
    """It begins when so many wait: what they ask is one batch."""
    chosen = encoder.worker._chosen

    def wait(waiting):
        asked = [job for job in waiting if job.inputs is not None]
        return chosen(waiting if len(asked) == count else [j for j in waiting if j.inputs is None])

    encoder.worker._chosen = wait
    return encoder


def ask_all(encoder, asked):
    """{name: answers} of threads that ask at once; asked[name] is a function of the encoder."""
    found, errors = {}, []

    def one(name):
        try:
            found[name] = asked[name](encoder)
        except Exception as error:
            errors.append(error)
            encoder.stop()

    threads = [threading.Thread(target=one, args=(name,), daemon=True) for name in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not errors
    assert len(found) == len(asked)
    return found


def same(a, b):
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    elif isinstance(a, float):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b))
    else:
        assert a == b


@pytest.fixture(scope="module", params=FAMILIES)
def places(request, tmp_path_factory):
    """{name: directory} of adapters with all kinds of heads over one base, which is beside them."""
    tmp = tmp_path_factory.mktemp(request.param)
    base = getattr(tiny, request.param)(tmp)
    made = {
        name: drawn(tmp / name, base, task, METHODS[i % len(METHODS)], seed=i)
        for i, (name, task) in enumerate(TASKS.items())
    }
    return {"": base, **made}


def test_a_mixed_batch_says_what_each_adapter_says_alone(places):
    """Heads of other sizes, problems and kinds, methods of every rung, texts of other lengths, in one batch."""
    names = list(TASKS)
    encoder, pool = opened(places)
    together = "deberta" not in places[""]  # there a batch is one adapter's
    if together:
        patient(encoder, len(names))
    given = {name: TEXTS[: 1 + i % 3] for i, name in enumerate(names)}

    def asking(name):
        return lambda encoder: encoder.classify(given[name], [Part(name)])

    with encoder:
        found = ask_all(encoder, {name: asking(name) for name in names})
    assert encoder.stats().batches == (1 if together else len(names))
    for name in names:
        same(found[name], undula.load(places[name]).predict(given[name]))
    pool.close()


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """{name: directory}: two heads of other sizes, and one that makes vectors; the base."""
    tmp = tmp_path_factory.mktemp("few")
    base = tiny.bert(tmp)
    tasks = {"two": TASKS["two"], "four": TASKS["four"], "near": TASKS["near"]}
    return {"": base, **{n: drawn(tmp / n, base, t, seed=i, where=["value"]) for i, (n, t) in enumerate(tasks.items())}}


def opened(few, budget=1 << 30):
    """(an encoder, its pool) with the adapters of `few` registered."""
    body = Body(few[""], torch.float64)
    pool = Pool(body.model, budget, heads=body)
    for name in (n for n in few if n):
        pool.register(name, few[name])
    return Encoder(body, pool), pool


def test_adapters_come_and_go_within_a_budget(few):
    """There is room for one at a time: heads leave with their adapters, and come back with them."""
    size = max(row.bytes for row in opened(few)[1].describe())
    encoder, pool = opened(few, size)
    with encoder:
        for name in ("two", "four", "two", "near"):
            same(encoder.classify(TEXTS, [Part(name)]), undula.load(few[name]).predict(TEXTS))
            assert pool.stats().loaded == 1
    assert pool.stats().evictions == 3
    pool.close()


def test_a_replaced_adapter_answers_from_then_on(few, tmp_path):
    """Also where the new one has another head."""
    shutil.copytree(few["two"], tmp_path / "it")
    body = Body(few[""], torch.float64)
    pool = Pool(body.model, 1 << 30, heads=body)
    pool.register("it", tmp_path / "it")
    with Encoder(body, pool) as encoder:
        assert set(encoder.classify(["nice"], [Part("it")])[0]["probabilities"]) == {"bad", "good"}
        pool.register("it", few["four"], replace=True)
        same(encoder.classify(TEXTS, [Part("it")]), undula.load(few["four"]).predict(TEXTS))
    pool.close()


def test_vectors_are_those_of_the_adapter_and_of_the_base(few):
    """Texts and tokens; the base's own pooling; an adapter with a head gives those of its body."""
    from sentence_transformers import SentenceTransformer

    encoder, pool = opened(few)
    with encoder:
        own = SentenceTransformer(few[""], device="cpu").double().encode(TEXTS)
        same(encoder.embed(TEXTS), own.tolist())
        wanted = [answer["embedding"] for answer in undula.load(few["near"]).predict(TEXTS)]
        same(encoder.embed(TEXTS, [Part("near")]), wanted)
        same(encoder.embed(encoder.tokens(TEXTS), [Part("near")]), wanted)
        classifier = undula.load(few["two"])
        ids = classifier.processor(TEXTS[0], return_tensors="pt")
        with torch.no_grad():
            mean = classifier.model.base_model(**ids)[0][0].mean(0)
        same(encoder.embed(TEXTS[:1], [Part("two")]), [mean.tolist()])
        assert encoder.count(TEXTS) == sum(map(len, encoder.tokens(TEXTS)))
    pool.close()


def test_a_sum_of_adapters_makes_vectors_and_has_no_head(few, tmp_path):
    base = few[""]
    for i, name in enumerate("ab"):
        drawn(tmp_path / name, base, Similarity(), seed=10 + i, where=["value"])
    both = 0.5 * undula.Adapter.load(tmp_path / "a") + 2.0 * undula.Adapter.load(tmp_path / "b")
    encoder, pool = opened({"": base, "two": few["two"], "a": tmp_path / "a", "b": tmp_path / "b"})
    with encoder:
        found = encoder.embed(TEXTS, [Part("a", 0.5), Part("b", 2.0)])
        model = undula.load(tmp_path / "a")
        undula.detach(model.model)
        undula.attach(model.model, both)
        same(found, [answer["embedding"] for answer in model.predict(TEXTS)])
        with pytest.raises(Refused, match=r"'two' is served alone.* in full"):
            encoder.classify(TEXTS, [Part("two", 0.5)])
    pool.close()


REFUSED = {
    "no such adapter": (lambda e: e.classify(["nice"], [Part("none")]), "'none'"),
    "an empty text": (lambda e: e.embed(["nice", " "]), "text 2 is empty"),
    "no text": (lambda e: e.embed([]), "one or more"),
    "a text that is no list": (lambda e: e.classify("nice", [Part("two")]), "a list is answered"),
    "no rows": (lambda e: e.classify([], [Part("two")]), "no rows"),
    "a row that is empty": (lambda e: e.classify(["nice", ""], [Part("two")]), "row 2"),
    "too long": (lambda e: e.embed(["good " * 60]), "62 tokens, and 40"),
    "too long a list": (lambda e: e.embed([[4] * 41], [Part("near")]), "41 tokens, and 40"),
    "strange tokens": (lambda e: e.embed([[4, 10**6]]), "tokens are numbers from 0 to"),
    "the base's head": (lambda e: e.classify(["nice"]), "name an adapter that classifies"),
    "a number for a text": (lambda e: e.classify([7], [Part("two")]), "item 1 is 7"),
}


@pytest.fixture(scope="module")
def running(few):
    encoder, pool = opened(few)
    with encoder:
        yield encoder
    pool.close()


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_answered_is_refused_with_the_reason(what, running):
    ask, said = REFUSED[what]
    with pytest.raises(Refused, match=said) as refused:
        ask(running)
    assert "/" not in str(refused.value)


def test_a_text_is_cut_only_where_its_task_does_so(few, running):
    long = ["good bad film " * 30]
    same(running.embed(long, [Part("near")]), [a["embedding"] for a in undula.load(few["near"]).predict(long)])
    same(running.classify(long, [Part("two")]), undula.load(few["two"]).predict(long))


def test_a_pooler_that_the_base_lacks_is_each_adapters_own(few, tmp_path):
    """It stands in the body, and in one batch with adapters that trained theirs otherwise."""
    from transformers import BertModel

    BertModel.from_pretrained(few[""], add_pooling_layer=False).save_pretrained(tmp_path / "base")
    tiny.tokenizer(tmp_path / "base")
    base, names = str(tmp_path / "base"), ["two", "four", "number"]
    made = {n: drawn(tmp_path / n, base, TASKS[n], seed=i, where=["value"]) for i, n in enumerate(names)}
    assert "bert.pooler.dense.weight" in undula.Adapter.load(made["two"]).full
    encoder, pool = opened({"": base, **made})
    with patient(encoder, 3):
        found = ask_all(encoder, {n: lambda e, n=n: e.classify(TEXTS, [Part(n)]) for n in names})
    assert encoder.stats().batches == 1
    for name in names:
        same(found[name], undula.load(made[name]).predict(TEXTS))
    pool.close()
    adapter = undula.Adapter.load(made["two"])
    lacking = {n: t for n, t in adapter.full.items() if "pooler" not in n}
    dataclasses.replace(adapter, full=lacking).save(made["two"], base, "SEQ_CLS")
    with pytest.raises(ValueError, match=r"base's files lack bert\.pooler.*random numbers would answer"):
        pool.register("again", made["two"])


def test_what_trained_in_full_within_the_body_is_each_rows_own_or_refused(few, tmp_path):
    """A norm sees the rows of a batch; positions are the same for all of them."""
    task, norm = TASKS["two"], ["attention.output.LayerNorm"]
    made = drawn(tmp_path / "norm", few[""], task, where=["value"], full=norm)
    encoder, pool = opened({"": few[""], "norm": made, "two": few["two"]})
    with patient(encoder, 2):
        found = ask_all(encoder, {n: lambda e, n=n: e.classify(TEXTS, [Part(n)]) for n in ("norm", "two")})
    same(found["norm"], undula.load(made).predict(TEXTS))
    same(found["two"], undula.load(few["two"]).predict(TEXTS))
    pool.close()
    made = drawn(tmp_path / "places", few[""], task, where=["value"], full=["position_embeddings"])
    with pytest.raises(ValueError, match=r"position_embeddings.* in full, and that is no head"):
        pool.register("places", made)


def test_layers_of_a_head_may_be_adapted(few, tmp_path):
    made = drawn(tmp_path / "it", few[""], TASKS["four"], where=["value", "classifier"], full=())
    adapter = undula.Adapter.load(made)
    assert "classifier" in adapter.factors
    encoder, pool = opened({"": few[""], "it": made, "two": few["two"]})
    with encoder:
        same(encoder.classify(TEXTS, [Part("it")]), undula.load(made).predict(TEXTS))
    pool.close()


def test_the_base_answers_by_its_own_head(few, tmp_path):
    """A whole classifier as the base; adapters with other heads beside."""
    opened_four = undula.load(few["four"])
    undula.merge(opened_four.model)
    opened_four.model.save_pretrained(tmp_path / "whole")
    opened_four.processor.save_pretrained(tmp_path / "whole")
    whole = str(tmp_path / "whole")
    made = drawn(tmp_path / "two", whole, TASKS["two"], where=["value"])
    encoder, pool = opened({"": whole, "two": made})
    with encoder:
        same(encoder.classify(TEXTS), undula.load(whole).predict(TEXTS))
        same(encoder.classify(TEXTS, [Part("two")]), undula.load(made).predict(TEXTS))
    pool.close()


def test_a_language_model_makes_no_vectors_and_classifies(tmp_path):
    base = tiny.llama(tmp_path)
    made = drawn(tmp_path / "it", base, TASKS["four"], where=["q_proj"])
    encoder, pool = opened({"": base, "it": made})
    with encoder:
        same(encoder.classify(TEXTS, [Part("it")]), undula.load(made).predict(TEXTS))
        with pytest.raises(Refused, match="is a language model"):
            encoder.embed(TEXTS)
    pool.close()


def test_images_are_classified_too_and_by_their_bytes_alone(tmp_path):
    base = tiny.vit(tmp_path)
    tasks = {n: ImageClassification(names=tuple(n)) for n in ("ab", "xyz")}
    made = {n: drawn(tmp_path / n, base, t, where=["q_proj"]) for n, t in tasks.items()}
    pictures = [row["image"] for row in tiny.pictures(3)]
    encoder, pool = opened({"": base, **made})
    with patient(encoder, 2):
        found = ask_all(encoder, {n: lambda e, n=n: e.classify(pictures, [Part(n)]) for n in made})
    assert encoder.stats().batches == 1
    for name, path in made.items():
        same(found[name], undula.load(path).predict(pictures))
    with encoder, pytest.raises(Refused, match="takes the bytes of files"):
        encoder.classify([str(tmp_path / "config.json")], [Part("ab")])
    pool.close()


def test_an_adapter_that_writes_is_refused_when_it_is_registered(tmp_path):
    base = tiny.llama(tmp_path)
    model = open_model(base, CausalLM(), torch.float32, 0)[0]
    undula.attach(model, undula.LoRA(r=2), ["q_proj"]).save(tmp_path / "it", base, "CAUSAL_LM")
    body = Body(base)
    with pytest.raises(ValueError, match="CausalLM, which writes"):
        Pool(body.model, 1 << 30, heads=body).register("it", tmp_path / "it")


def test_one_row_that_cannot_be_computed_leaves_its_neighbours_their_answers(few):
    """What fails in one batch is tried one by one."""
    encoder, pool = opened(few)
    forward = encoder.body.model.forward

    def failing(input_ids, **named):
        if len(input_ids) != 2:
            raise RuntimeError("no memory")
        return forward(input_ids=input_ids, **named)

    encoder.body.model.forward = failing
    with patient(encoder, 2), pytest.raises(AssertionError):
        ask_all(encoder, {"two": lambda e: e.classify(TEXTS[:2], [Part("two")]),
                          "four": lambda e: e.classify(TEXTS, [Part("four")])})  # fmt: skip
    assert encoder.stats().rows == 5
    pool.close()


def test_draining_answers_what_waits_and_refuses_what_comes(few, running):
    encoder, pool = opened(few)
    encoder.start()
    found = []
    thread = threading.Thread(target=lambda: found.append(encoder.embed(TEXTS)))
    thread.start()
    thread.join()
    assert encoder.drain(5)
    with pytest.raises(Draining):
        encoder.embed(TEXTS)
    assert len(found[0]) == 3
    encoder.stop()
    assert not encoder.alive
    pool.close()


def test_the_base_says_what_it_does_whatever_somebody_selects_on_it(few):
    encoder, pool = opened(few)
    with encoder:
        want, own = encoder.embed(TEXTS), encoder.embed(TEXTS, [Part("near")])
        shake(undula.attach(encoder.body.model, undula.LoRA(r=2), ["value"], name="mine"), 0.3)
        same(encoder.embed(TEXTS), want)
        same(encoder.embed(TEXTS, [Part("near")]), own)
    pool.close()


def test_one_body_is_one_encoders(few):
    encoder, pool = opened(few)
    with encoder, pytest.raises(RuntimeError, match="another engine"):
        Encoder(encoder.body, pool).start()
    with Encoder(encoder.body, pool) as other:
        assert len(other.embed(TEXTS)) == 3
    pool.close()


def test_when_the_thread_dies_nobody_waits_for_ever(few, monkeypatch):
    encoder, pool = opened(few)
    with encoder:
        monkeypatch.setattr(encoder.worker, "_chosen", lambda waiting: (_ for _ in ()).throw(SystemError("gone")))
        with pytest.raises(Failed, match="died"):
            encoder.embed(TEXTS)
        with pytest.raises(Draining):
            encoder.embed(TEXTS)
    pool.close()


def test_more_than_may_wait_are_told_to_come_again(few):
    body = Body(few[""], torch.float64)
    with Encoder(body, Pool(body.model, 1 << 30, heads=body), Room(waiting=3)) as encoder:
        encoder.worker._chosen = lambda waiting: ([], [])  # nothing goes on

        def one():
            with contextlib.suppress(Cancelled):
                encoder.embed(TEXTS)

        thread = threading.Thread(target=one)
        thread.start()
        while not encoder.stats().waiting:
            time.sleep(0.001)
        with pytest.raises(Busy) as busy:
            encoder.embed(TEXTS)
        assert busy.value.retry_after >= 1
        encoder.stop()
        thread.join()


def test_a_head_that_nobody_holds_is_refused(few, tmp_path):
    """Neither the adapter nor the base's files: random numbers would answer."""
    made = drawn(tmp_path / "it", few[""], TASKS["four"], where=["value"])
    adapter = undula.Adapter.load(made)
    dataclasses.replace(adapter, full={}).save(made, few[""], "SEQ_CLS")
    body = Body(few[""], torch.float64)
    with pytest.raises(ValueError, match=r"lack classifier\.weight.*random numbers would answer"):
        Pool(body.model, 1 << 30, heads=body).register("it", made)


def test_what_is_padded_on_the_left_is_cut_there():
    """And what is padded on the right at the right, each with its own value."""

    class Words:
        pad_token_id, pad_token_type_id = 9, 1

        def __init__(self, side):
            self.padding_side = side

    every = [{k: torch.full((1, n), v) for k, v in {"input_ids": n, "attention_mask": 1}.items()} for n in (2, 4)]
    for side, wanted in {"left": [9, 9, 2, 2], "right": [2, 2, 9, 9]}.items():
        made = padded.together(every, Words(side))
        assert made["input_ids"].tolist() == [wanted, [4] * 4]
        assert made["attention_mask"].sum(1).tolist() == [2, 4]
        assert padded.cut(made["input_ids"][:1], 2, Words(side)).tolist() == [[2, 2]]
    every[1]["token_type_ids"] = torch.ones(1, 4, dtype=torch.long)
    assert padded.together(every, Words("right"))["token_type_ids"].tolist() == [[0, 0, 1, 1], [1] * 4]
