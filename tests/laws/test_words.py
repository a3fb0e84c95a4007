"""Text comes out of tokens whole: no half characters, nothing of a stop text, nothing lost."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from undula.serve.words import Words

TEXT = "Grüße, naïve 東京 🙂🙃 café — the end of the end. \n\n  two  spaces ."


@pytest.fixture(scope="module")
def byte_level():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        ["the end of the end and two spaces"],
        trainers.BpeTrainer(
            vocab_size=280, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")


@pytest.fixture(scope="module")
def word_level():
    """Whose tokens are joined by spaces."""
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[UNK]", "a", "b", "c"])}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")


def pieces(tokenizer, tokens, stop=()):
    words = Words(tokenizer, stop)
    found = []
    for token in tokens:
        found.append(words.add(token))
        if words.stopped:
            return found, True
    return [*found, words.end()], words.stopped


def test_pieces_are_whole_characters_and_together_the_text(byte_level):
    tokens = byte_level.encode(TEXT)
    assert len(byte_level.encode("é🙂")) == 6  # characters of several tokens
    found, stopped = pieces(byte_level, tokens)
    assert "".join(found) == TEXT
    assert not any("\ufffd" in piece for piece in found)
    assert not stopped


def test_spaces_between_words_are_kept(word_level):
    assert pieces(word_level, [1, 2, 3, 1])[0] == ["a", " b", " c", " a", ""]


def test_special_tokens_have_no_text(byte_level):
    end = byte_level.eos_token_id
    tokens = [end, *byte_level.encode("the"), *[end] * 30, *byte_level.encode(" end")]
    assert "".join(pieces(byte_level, tokens)[0]) == "the end"


def test_bytes_that_are_no_character_come_out_in_the_end(byte_level):
    """And hold nothing back for ever: what follows comes too."""
    half = byte_level.encode("é")[:1]
    found, _ = pieces(byte_level, byte_level.encode("the") + half * 40 + byte_level.encode(" end"))
    assert "".join(found).startswith("the\ufffd")
    assert "".join(found).endswith(" end")
    assert "".join(found[:20]) != "the"
    assert pieces(byte_level, byte_level.encode("the") + half)[0][-1] == "\ufffd"


@pytest.mark.parametrize("seed", range(20))
def test_a_text_ends_before_its_first_stop_text_wherever_tokens_are_cut(byte_level, seed):
    draw = random.Random(seed)
    text = "".join(draw.choice("abé. ") for _ in range(40))
    stop = tuple("".join(draw.choice("abé. ") for _ in range(draw.randint(1, 4))) for _ in range(2))
    found, stopped = pieces(byte_level, byte_level.encode(text), stop)
    first = min([at for at in map(text.find, stop) if at >= 0], default=len(text))
    assert "".join(found) == text[:first]
    assert stopped == (first < len(text))


def test_what_may_begin_a_stop_text_is_held_back_and_no_more(byte_level):
    words = Words(byte_level, ("end.",))
    given = [words.add(t) for t in byte_level.encode("x") + byte_level.encode("en") + byte_level.encode("y")]
    assert "".join(given) == "xeny"
    assert given[0] == "x"
    words = Words(byte_level, ("end.",))
    assert "".join(words.add(t) for t in byte_level.encode("an en")) == "an "
    assert words.end() == "en"
