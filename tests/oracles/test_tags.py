"""Entities of tags against a table whose values are derived by hand from seqeval's strict schemes (IOB2, IOBES, BILOU):
an entity begins with B, goes on with I of its type, and where the scheme has an end, has one."""

import pytest

from undula.train.data.tags import Scheme, agreement, in_tag_order, tagged

IOB2 = {"O", "B-X", "I-X", "B-Y", "I-Y"}
IOBES = IOB2 | {"E-X", "S-X", "E-Y", "S-Y"}
BILOU = IOB2 | {"L-X", "U-X", "L-Y", "U-Y"}
CASES = [
    (IOB2, "O O O", []),
    (IOB2, "B-X", [("X", 0, 1)]),
    (IOB2, "B-X I-X O", [("X", 0, 2)]),
    (IOB2, "B-X B-X", [("X", 0, 1), ("X", 1, 2)]),
    (IOB2, "B-X I-Y", [("X", 0, 1)]),  # the second follows no B of its type
    (IOB2, "B-X I-Y I-X", [("X", 0, 1)]),
    (IOB2, "I-X I-X O B-X", [("X", 3, 4)]),
    (IOB2, "O I-X", []),
    (IOB2, "B-X O I-X", [("X", 0, 1)]),
    (IOB2, "B-X I-X B-Y I-Y", [("X", 0, 2), ("Y", 2, 4)]),
    (IOBES, "S-X", [("X", 0, 1)]),
    (IOBES, "B-X E-X", [("X", 0, 2)]),
    (IOBES, "B-X I-X E-X", [("X", 0, 3)]),
    (IOBES, "B-X I-X O", []),  # has no end
    (IOBES, "B-X", []),
    (IOBES, "B-X E-Y", []),
    (IOBES, "E-X", []),
    (IOBES, "I-X E-X", []),
    (IOBES, "S-X E-X", [("X", 0, 1)]),
    (IOBES, "B-X E-X E-X", [("X", 0, 2)]),
    (IOBES, "B-X S-X E-X", [("X", 1, 2)]),
    (IOBES, "B-X B-X E-X", [("X", 1, 3)]),
    (IOBES, "S-X S-Y", [("X", 0, 1), ("Y", 1, 2)]),
    (BILOU, "U-X", [("X", 0, 1)]),
    (BILOU, "B-X I-X L-X U-Y", [("X", 0, 3), ("Y", 3, 4)]),
    (BILOU, "B-X I-X", []),
    (BILOU, "L-X", []),
    ({"O", "B", "I"}, "B I O B", [("", 0, 2), ("", 3, 4)]),
    ({"B_X", "I_X", "O"}, "B_X I_X", [("X", 0, 2)]),
    ({"O", "B-X-1", "I-X-1", "B-X-2"}, "B-X-1 I-X-1 B-X-2", [("X-1", 0, 2), ("X-2", 2, 3)]),
    ({"NOUN", "VERB"}, "NOUN VERB", [("NOUN", 0, 1), ("VERB", 1, 2)]),  # no scheme: each token
    ({"O", "PER"}, "PER PER O", [("PER", 0, 1), ("PER", 1, 2)]),
]


@pytest.mark.parametrize(("names", "tags", "spans"), CASES)
def test_entities_of_tags(names, tags, spans):
    assert Scheme.of(names).spans(tags.split()) == spans


def test_strays_are_what_is_in_no_entity():
    assert Scheme.of(IOB2).strays(["I-X", "B-X", "I-X", "I-Y", "O"]) == [0, 3]
    assert Scheme.of(IOBES).strays(["B-X", "I-X", "O", "S-X"]) == [0, 1]


def test_agreement_counts_whole_entities():
    """Two of three found are right, two of four that there are."""
    wanted = [[("X", 0, 2), ("Y", 3, 4)], [("X", 0, 1), ("X", 2, 3)]]
    found = [[("X", 0, 2), ("X", 3, 4)], [("X", 2, 3)]]
    made = agreement(wanted, found)
    assert made == {"precision": pytest.approx(2 / 3), "recall": 0.5, "f1": pytest.approx(4 / 7)}
    assert agreement([[]], [[]]) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}


def test_tags_of_spans_cover_the_words_that_they_touch():
    words = [(0, 3), (4, 8), (9, 12)]
    assert tagged(words, [("X", 0, 8), ("Y", 9, 12)]) == ["B-X", "I-X", "B-Y"]
    assert tagged(words, [("X", 5, 6)]) == ["O", "B-X", "O"]


def test_tags_come_in_an_order_that_people_expect():
    assert in_tag_order(["I-B", "O", "B-A", "I-A", "B-B"]) == ("O", "B-A", "I-A", "B-B", "I-B")
