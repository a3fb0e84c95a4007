"""What stands before several replicas reads the name of the adapter, and nothing else."""

import json

import pytest

pytest.importorskip("fastapi")
from undula.serve.ray import adapter_of

BASES = ("smollm2", "org/smollm2")


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ({"model": "red"}, "red"),
        ({"model": "smollm2"}, ""),
        ({"model": "smollm2:red"}, "red"),
        ({"model": "org/smollm2:red"}, "red"),
        ({"model": "smollm2", "adapters": [{"name": "green", "scale": 0.5}, {"name": "red"}]}, "green"),
        ({"model": 7}, ""),
        ({"model": "x" * 300}, ""),
        ({"adapters": "red"}, ""),
        ({"adapters": [{}]}, ""),
        ([1], ""),
        ("", ""),
        ({}, ""),
    ],
    ids=str,
)
def test_a_request_goes_where_its_adapter_is_and_what_names_none_anywhere(asked, name):
    """What is malformed too: the server behind says what is wrong with it."""
    assert adapter_of(b"" if asked == "" else json.dumps(asked).encode(), BASES) == name


def test_what_is_no_json_goes_anywhere():
    assert adapter_of(b"{" * 100_000, BASES) == ""
    assert adapter_of(b"\xff\x00", BASES) == ""
