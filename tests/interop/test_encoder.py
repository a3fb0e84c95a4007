"""One encoder for many adapters, each with its own head: what comes of a mixed batch is what each says alone."""

import threading

import pytest
import torch

import undula
from tests.support import tiny
from tests.support.encoders import drawn
from undula.serve.encoder import Encoder
from undula.serve.heads import Body
from undula.serve.hung import Hung
from undula.serve.request import Part
from undula.train import Classification, ImageClassification, MultiLabel, Regression, Similarity, TokenClassification

TEXTS = ["the film was good", "the food was awful and the day very very sad", "nice"]
TASKS = {
    "two": Classification(names=("bad", "good")),
    "four": Classification(names=("a", "b", "c", "d")),
    "number": Regression(),
    "sets": MultiLabel(names=("x", "y", "z")),
    "tags": TokenClassification(names=("O", "B-A", "I-A", "B-B", "I-B")),
    "near": Similarity(),
}
METHODS = [undula.LoRA(r=2), undula.LoRAN(r=2), undula.DoRA(undula.LoRA(r=3)), undula.AuroRA(r=2), undula.VeRA(r=4)]
FAMILIES = ["bert", "roberta", "distilbert", "modernbert", "deberta"]


class Patient(Encoder):
    """Begins when so many wait: what they ask is one batch."""

    count = 1

    def _chosen(self, waiting):
        asked = [job for job in waiting if job.inputs is not None]
        return super()._chosen(waiting if len(asked) == self.count else [j for j in waiting if j.inputs is None])


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
    assert not errors and len(found) == len(asked), errors
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
    body = Body(places[""], torch.float64)
    encoder = Patient(body, Hung(body, {name: places[name] for name in names}))
    together = "deberta" not in places[""]  # there a batch is one adapter's
    encoder.count = len(names) if together else 1
    given = {name: TEXTS[: 1 + i % 3] for i, name in enumerate(names)}

    def asking(name):
        return lambda encoder: encoder.classify(given[name], [Part(name)])

    if together:
        with encoder:
            found = ask_all(encoder, {name: asking(name) for name in names})
    else:
        with Encoder(body, encoder.held) as encoder:
            found = ask_all(encoder, {name: asking(name) for name in names})
    assert encoder.stats().batches == (1 if together else len(names))
    for name in names:
        same(found[name], undula.load(places[name]).predict(given[name]))
