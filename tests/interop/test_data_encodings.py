"""Files in encodings that they do not say, sheets, decimal commas: what is done is what was said, and told."""

import codecs

import pytest

import undula
from tests.support import tiny
from undula.train import Classification, Regression, Run, evaluate, prepare
from undula.train.data.faults import Faults
from undula.train.data.load import load_data
from undula.train.data.readers import read_file

TEXTS = {  # an encoding, and a text that it holds
    "cp1252": "café “naïve”",
    "latin-1": "über älter",
    "iso-8859-15": "10 € für œuvre",
    "cp1251": "привет мир",
    "mac_roman": "été à Paris",
    "shift_jis": "猫がいた",
    "gb18030": "猫在这里",
    "iso2022_jp": "猫がいた",  # of bytes that are ASCII
    "utf-16-le": "the cat, naïve",
    "utf-16-be": "猫",
}


def lines(kind, text):
    if kind == "jsonl":
        return f'{{"text": "{text}", "label": "a"}}\n{{"text": "b", "label": "b"}}\n'
    between = {"csv": ",", "tsv": "\t"}[kind]
    return f"text{between}label\n" + (f'"{text}"' if kind == "csv" else text) + f"{between}a\nb{between}b\n"


@pytest.mark.parametrize("encoding", TEXTS)
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_a_file_is_read_in_the_encoding_that_was_said(kind, encoding, tmp_path):
    path = tmp_path / f"d.{kind}"
    path.write_bytes(lines(kind, TEXTS[encoding]).encode(encoding))
    faults = Faults(encoding=encoding)
    rows = read_file(path, faults)
    faults.check()
    assert rows["text"][:] == [TEXTS[encoding], "b"]
    assert any(f"read as {encoding.upper()}" == note for note in rows._undula_source.notes)


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8, "utf-16"])
def test_a_file_that_says_or_shows_what_it_is_is_read_as_that(mark, tmp_path):
    """Said to be cp1252, its letters would silently be others."""
    text = lines("csv", "café")
    path = tmp_path / "d.csv"
    path.write_bytes(text.encode(mark) if isinstance(mark, str) else mark + text.encode())
    assert read_file(path, Faults(encoding="cp1252"))["text"][0] == "café"


def test_what_is_not_of_the_encoding_is_refused(tmp_path):
    path = tmp_path / "d.csv"
    path.write_bytes(b"text,label\na,b\nc\x81d,b\n")
    with pytest.raises(ValueError, match=r"d.csv is not cp1252: line \d or later"):
        read_file(path, Faults(encoding="cp1252"))
    path.write_bytes(lines("csv", "the cat").encode("utf-16-le"))
    with pytest.raises(ValueError, match=r"is not cp1252: .* as UTF-16 is"):
        read_file(path, Faults(encoding="cp1252"))


@pytest.mark.parametrize("name", ["latin9000", "gzip", "hex", ""])
def test_what_is_no_encoding_is_refused(name, tmp_path):
    with pytest.raises(LookupError, match=r"no encoding is called .*; some are: cp1252"):
        Run("m", "d", Classification(), undula.LoRA(), tmp_path, encoding=name)


def test_the_message_names_the_option(tmp_path):
    (tmp_path / "d.csv").write_bytes(lines("csv", "café").encode("cp1252"))
    with pytest.raises(ValueError, match=r"--encoding cp1252 .*Run\(\.\.\., encoding='cp1252'\)"):
        read_file(tmp_path / "d.csv")


def test_a_run_says_its_encoding(tmp_path):
    """To its evaluation too, and to what is written; runs without one are written as before."""
    rows = "".join(f"the {w} café,{'yes' if i % 2 else 'no'}\n" for i, w in enumerate(tiny.WORDS))
    data = tmp_path / "d.csv"
    data.write_bytes(f"text,label\n{rows}".encode("cp1252"))
    run = Run(tiny.bert(tmp_path / "m"), str(data), Classification(), undula.LoRA(r=1), tmp_path / "o", max_steps=1)
    assert "encoding" not in run.encode()
    with pytest.raises(ValueError, match="is not UTF-8"):
        prepare(run)
    said = Run(**{**vars(run), "encoding": "CP1252"})
    assert Run.decode(said.encode(), said.out).encoding == "cp1252"
    report = undula.train(said)
    assert any("read as CP1252" in note for note in report["data"]["notes"])
    assert evaluate(said.out) == pytest.approx(report["after"])


@pytest.mark.parametrize(
    ("name", "clicks"), [("a.xlsx", "in Excel File > Save As > CSV UTF-8"), ("a.ODS", "in LibreOffice")]
)
def test_a_sheet_is_refused_with_the_clicks_that_save_it(name, clicks, tmp_path):
    (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(ValueError, match=clicks):
        load_data(str(tmp_path / name))


def test_a_decimal_comma_is_told(tmp_path):
    path = tiny.table(tmp_path / "d.csv", [{"text": "a", "label": "3"}, {"text": "b", "label": "3,5"}], separator=";")
    with pytest.raises(ValueError, match=r"line 3 has '3,5'.*a decimal comma is written as a point \(3,5 as 3\.5\)"):
        Regression().read(load_data(path), "train")
