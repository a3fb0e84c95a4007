"""Files of rows: cells are what was written, whatever they look like; what is wrong is told with file, line, column."""

import csv
import io
import json
import random
import re

import datasets
import pytest

from tests.support import tiny
from undula.train.data.columns import classes, numbers, texts
from undula.train.data.faults import Faults
from undula.train.data.load import load_data, read_file
from undula.train.data.source import source_of

NASTY = [
    *("007", "1e3", "2024-01-31", "NA", "nan", "null", "None", "True", "false", "-0", "+5", "1_000", "0x1F", "1,5", ""),
    *(
        '"',
        '""',
        '"so it begins',
        'he said "no"',
        "'",
        "a\tb",
        "a;b",
        "a|b",
        "a\nb",
        "a\r\nb",
        "a\rb",
        "\\n",
        "#",
        " x ",
    ),
    *("\u2028", "\x85", "e\u0301", "\U0001f600", "\0", "=1+1", "caf\u00e9", "x" * 200_000, "a,b", "\ufeff", "\x1c"),
]


def cells(draw, rows):
    """Rows of nasty cells; the last column is never empty, so that no line is blank."""
    made = []
    for i in range(rows):
        text = (
            draw.choice(NASTY) if draw.random() < 0.7 else "".join(draw.choices('ab",;\t\n\r|\\ ', k=draw.randrange(9)))
        )
        made.append({"text": text, "label": draw.choice(NASTY) or "empty", "more": f"row {i}"})
    return made


def written_csv(delimiter, **options):
    def write(rows):
        buffer = io.StringIO(newline="")
        writer = csv.DictWriter(buffer, list(rows[0]), delimiter=delimiter, **options)
        writer.writeheader()
        writer.writerows(rows)
        return buffer.getvalue()

    return write


WRITERS = {
    "comma.csv": written_csv(","),
    "all quoted.csv": written_csv(",", quoting=csv.QUOTE_ALL),
    "unix.csv": written_csv(",", lineterminator="\n", quoting=csv.QUOTE_ALL),
    "semicolon.csv": written_csv(";"),
    "tab.csv": written_csv("\t"),
    "UPPER.CSV": written_csv("|"),
    "quoted.tsv": written_csv("\t", quoting=csv.QUOTE_ALL),
    "minimal.tsv": written_csv("\t"),
    "lines.jsonl": lambda rows: "".join(json.dumps(row) + "\n" for row in rows),
    "unicode.jsonl": lambda rows: "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
    "array.json": lambda rows: json.dumps(rows, indent=1),
    "dense.JSON": lambda rows: json.dumps(rows, ensure_ascii=False),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_what_is_written_is_read(name, encoding, tmp_path):
    """csv and json write nasty cells in all their forms and encodings; every cell comes back as the text that it is."""
    draw = random.Random(f"{name} {encoding}")
    for case in range(6):
        rows = cells(draw, draw.choice([1, 2, 30]))
        path = tmp_path / f"{case} {name}"
        path.write_bytes(WRITERS[name](rows).encode(encoding))
        assert read_file(path).to_list() == rows, case


def test_what_datasets_writes_is_read(tmp_path):
    """Its CSV, JSON, Parquet and Arrow files, with nasty cells."""
    rows = cells(random.Random(0), 40)
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "a.parquet")
    table.to_json(tmp_path / "b.jsonl")
    table.save_to_disk(tmp_path / "c")
    for path in tmp_path.iterdir():
        assert load_data(str(path))["train"].to_list() == rows, path


def test_many_rows_and_long_ones(tmp_path):
    """More rows than a chunk holds, kinds that change between chunks, and rows of megabytes."""
    rows = [{"text": f"row {i}", "label": i} for i in range(25_000)] + [{"text": "x" * 3_000_000, "label": 2.5}]
    rows.append({"late": "yes"})
    tiny.jsonl(tmp_path / "a.jsonl", rows)
    found = read_file(tmp_path / "a.jsonl")
    assert found[10_001] == {"text": "row 10001", "label": 10001.0, "late": None}
    assert found[25_000]["label"] == 2.5
    assert found[25_001] == {"text": None, "label": None, "late": "yes"}
    tiny.table(tmp_path / "b.csv", rows[:-1])
    assert read_file(tmp_path / "b.csv")["label"][24_998:] == ["24998", "24999", "2.5"]


def test_quotes_in_a_tsv_are_text_unless_they_mean_something(tmp_path):
    """GLUE's files begin fields with quotes that nothing ends: no row may be swallowed."""
    glue = 'text\tlabel\nrow 1\t1\n"so it begins\t0\nrow 3\t1\nand "ends"\t1\n"all of it"\t0\nit ends"\t1\n'
    (tmp_path / "a.tsv").write_text(glue)
    assert read_file(tmp_path / "a.tsv")["text"][:] == [line.split("\t")[0] for line in glue.splitlines()[1:]]
    assert any("quotes are text" in note for note in source_of(read_file(tmp_path / "a.tsv")).notes)
    (tmp_path / "b.tsv").write_text('"text"\t"label"\n"a\tb"\t1\n')
    assert read_file(tmp_path / "b.tsv")["text"][:] == ["a\tb"]


@pytest.mark.parametrize("delimiter", [";", ",", "\t", "|", "^"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_first_line_for_spreadsheets_is_no_header(delimiter, encoding, tmp_path):
    """`sep=;` says what is between the fields; faults are still told with the lines of the file."""
    rows = [["text", "label"], ["a, b; c", "007"], ["d", "1"]]
    quoted = [delimiter.join(f'"{cell}"' for cell in row) for row in rows]
    path = tmp_path / "a.csv"
    path.write_bytes("\r\n".join([f"sep={delimiter}", *quoted, ""]).encode(encoding))
    found = read_file(path)
    assert found.to_list() == [{"text": "a, b; c", "label": "007"}, {"text": "d", "label": "1"}]
    assert source_of(found).place(0) == "line 3"
    path.write_bytes("\r\n".join([f"sep={delimiter}", *quoted, "e", ""]).encode(encoding))
    with pytest.raises(ValueError, match="line 5 has 1"):
        read_file(path)


def test_columns_are_the_union_of_all_rows_keys(tmp_path):
    """Whichever row comes first."""
    rows = [{"text": "a"}, {"pair": "b", "text": "c"}, {"label": 1}]
    for order in ([0, 1, 2], [2, 1, 0]):
        for name, write in (("a.jsonl", WRITERS["lines.jsonl"]), ("a.json", WRITERS["array.json"])):
            (tmp_path / name).write_text(write([rows[i] for i in order]))
            assert set(read_file(tmp_path / name).column_names) == {"text", "pair", "label"}
            assert read_file(tmp_path / name)[order.index(1)] == {"text": "c", "pair": "b", "label": None}


def test_numbers_of_any_length_keep_their_digits(tmp_path):
    rows = [{"text": "a", "label": 10**21 + 7}, {"text": "b", "label": 7}]
    tiny.jsonl(tmp_path / "a.jsonl", rows)
    assert read_file(tmp_path / "a.jsonl")["label"][:] == ["1000000000000000000007", "7"]


BAD = {
    "latin.csv": ("text,label\nthe cat,a\ncaf\u00e9,b\nna\u00efve,b\n".encode("latin-1"),
                  r"not UTF-8: line 3 has the byte 0xe9 .*Windows-1252.*, line 4 .*save it as UTF-8"),
    "cp1252.jsonl": ('{"text": "\u201chi\u201d"}\n'.encode("cp1252"), "not UTF-8: line 1 has the byte 0x93"),
    "nomark.csv": ("text,label\na,b\n".encode("utf-16-le"), "seems to be UTF-16"),
    "odd.csv": ("text,label\na,b\n".encode("utf-16")[:-1], "is not the utf-16"),
    "mixed.jsonl": (b'{"label": "a"}\n\n{"label": 1}\n',
                    "column 'label': .*line 1 has a text as most have, but: line 3 has a number"),
    "object.jsonl": (b'{"text": "a"}\n{"text": {"b": 1}}\n', "'text': .*line 1 has a text .*: line 2 has an object"),
    "bool.jsonl": (b'{"text": true}\n{"text": 1}\n',
                   "column 'text': .*line 1 has true or false .*: line 2 has a number"),
    "half.jsonl": (b'{"text": "a"}\n{"text": "\\ud83d"}\n', "column 'text': half of a surrogate pair.*: line 2"),
    "twice.jsonl": (b'{"a": 1, "a": 2}\n', "line 1 .*key 'a' stands twice"),
    "twice.csv": (b"text,label,label\na,b,c\n", "line 1, the header: column 'label' stands 2 times"),
    "ragged.csv": (b'text,label\n"a\nb",c\nd\ne,f\ng,h,i\n', r"\(2: text, label\): line 4 has 1, line 6 has 3"),
    "open.csv": (b'text,label\na,b\nc,"d\ne,f\n', "quoted field does not end .*: line 3"),
    "inner.csv": (b'text,label\n"a" b,c\n', "quoted field does not end .*: line 2"),
    "ragged.tsv": (b'text\tlabel\n"a\tb\nc\n', "line 3 has 1"),
    "numbers.json": (b"[1, 2]", "every line or item is an object: line 1 has a number"),
    "lists.json": (b'[\n[1],\n{"a": 1}]', "every line or item is an object: line 2 has a list"),
    "deep.json": (b"[" * 100_000, "not JSON: .*line 1 .*nested too deeply"),
    "deep.jsonl": (b'{"a": 1}\n' + b'{"a":' * 100_000, "not JSON: line 2 .*nested too deeply"),
    "more.json": (b'[{"a": 1}]\n]', "line 1 .*after the array's end|line 2"),
    "comma.json": (b'[{"a": 1}\n{"a": 2}]', "line 2 .*a comma or ]"),
    "cut.json": (b'[{"a": 1},\n{"a": ', "the item that begins in line 2"),
    "object.json": (b'{"data":\n [{"a": 1}]}', "not JSON: line 1"),
    "cut.parquet": (b"PAR1 and nothing", "could not be read as Parquet"),
    "none.jsonl": (b"\n \n", "has no rows"),
    "none.csv": (b"", "has no rows"),
    "zero.csv": (b"text,la\0bel\na,b\n", r"the name of column 'la\\x00bel' has a character 0"),
    "zero.jsonl": (b'{"text": "a", "la\\u0000bel": "b"}\n', r"the name of column 'la\\x00bel' has a character 0"),
    "zero alone.csv": (b"la\0bel\na\n", r"the name of column 'la\\x00bel' has a character 0"),
    "no key.jsonl": (b"{}\n{}\n", "has no rows"),
    "nameless.csv": (b",,\na,b,c\n", "line 1, the header: no column has a name"),
    "header.csv": (b"text,label\n", "has no rows"),
    "none.json": (b"[]", "has no rows"),
}  # fmt: skip


@pytest.mark.parametrize("content", [b"text;label;;\na;x;;\nb;y;;\n", b";text;label\n0;a;x\n1;b;y\n"])
def test_columns_without_a_name_are_left_out_and_told(content, tmp_path):
    """A spreadsheet's empty columns, an index that pandas wrote."""
    (tmp_path / "a.csv").write_bytes(content)
    found = read_file(tmp_path / "a.csv")
    assert found.to_list() == [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    assert any("has no name in the header and is left out" in note for note in source_of(found).notes)


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_with_a_file_is_told_with_its_lines(name, tmp_path):
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)) as error:
        read_file(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_all_faults_are_told_at_once_the_first_ten_of_each_kind(tmp_path):
    (tmp_path / "a.jsonl").write_text("{\n" * 30 + "[1]\n" * 3 + '{"a": 1}\n')
    told = re.compile(r"faults of 2 kinds.*30 in all, the first 10.*line 1 .*line 31 ", re.DOTALL)
    with pytest.raises(ValueError, match=told) as error:
        read_file(tmp_path / "a.jsonl")
    assert "line 10 " in str(error.value)
    assert "line 11 " not in str(error.value)


def test_damaged_parquet_ends_in_one_kind_of_error(tmp_path):
    """Bytes changed anywhere in a file: it is read, or refused with ValueError."""
    import pyarrow
    from pyarrow import parquet

    draw = random.Random(3)
    table = pyarrow.table({"text": ["caf\u00e9", "b"] * 20, "label": list(range(40)), "more": [[1.5]] * 40})
    parquet.write_table(table, tmp_path / "a.parquet", compression="none")
    whole = (tmp_path / "a.parquet").read_bytes()
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(draw.choice([1, 4, 30])):
            damaged[draw.randrange(len(whole))] = draw.randrange(256)
        (tmp_path / "b.parquet").write_bytes(damaged)
        try:
            read_file(tmp_path / "b.parquet").to_list()
        except ValueError as error:
            refused += "b.parquet" in str(error)
    assert refused > 20


def test_a_damaged_folder_of_datasets_is_refused(tmp_path):
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(tmp_path / "a")
    next((tmp_path / "a").glob("*.arrow")).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="saved by `datasets` and could not be read"):
        load_data(str(tmp_path / "a"))


def test_a_folder_has_one_file_for_a_split(tmp_path):
    """dev, val and valid are the validation split; two files for one split are refused."""
    tiny.table(tmp_path / "TRAIN.TSV", tiny.reviews(4), "\t")
    tiny.table(tmp_path / "dev.tsv", tiny.reviews(3), "\t")
    assert {k: len(v) for k, v in load_data(str(tmp_path)).items()} == {"train": 4, "validation": 3}
    tiny.jsonl(tmp_path / "validation.jsonl", tiny.reviews(2))
    with pytest.raises(ValueError, match=r"dev.tsv and .*validation.jsonl are both the split 'validation'"):
        load_data(str(tmp_path))


def test_columns_are_checked_by_line(tmp_path):
    """Texts, numbers and classes of a CSV file, whose quoted cells take several lines."""
    (tmp_path / "a.csv").write_text('text,n,label\n"a\nb",1e3,x\n  ,1_0,\nc,"3,5",y\nd,inf,y\ne,,"  "\n')
    rows, faults = read_file(tmp_path / "a.csv"), Faults()
    assert texts(rows, "text", faults) == ["a\nb", "  ", "c", "d", "e"]
    assert numbers(rows, "n", faults)[0] == 1000
    assert classes(rows, "label", faults)[2] == "y"
    with pytest.raises(ValueError, match="faults of 4 kinds") as error:
        faults.check()
    for told in ("'text' is empty: line 4", "'n' holds what is no number: line 4 has '1_0', line 5 has '3,5', line 6",
                 "'n' is empty: line 7", "'label' is empty: line 4, line 7"):  # fmt: skip
        assert told in str(error.value)


def test_files_of_a_folder_that_are_not_read_are_told(tmp_path):
    """`eval.csv` beside `train.csv` is no split, and a part of train was measured in its place without a word."""
    for name in ("train.csv", "test.csv"):
        tiny.table(tmp_path / name, tiny.reviews(4))
    assert source_of(load_data(str(tmp_path))["train"]).notes == ()
    tiny.table(tmp_path / "eval.csv", tiny.reviews(4))
    data = load_data(str(tmp_path))
    (told,) = source_of(data["train"]).notes
    assert list(data) == ["test", "train"]
    assert "not read: eval.csv; splits are called train, validation, test" in told
    assert source_of(data["train"]).place(0) == "line 2"


def test_files_of_a_class_that_are_no_images_are_told(tmp_path):
    """Photographs of a telephone (HEIC), and images that lie beside the classes, were left out without a word."""
    for name in ("train/a/1.png", "train/b/2.JPG", "train/b/Thumbs.db", "train/b/.DS_Store"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    rows = load_data(str(tmp_path))["train"]
    assert (len(rows), source_of(rows).notes) == (2, ())
    for name in ("train/a/3.HEIC", "train/a/4.heic", "train/b/notes", "train/5.png"):
        (tmp_path / name).write_bytes(b"")
    rows = load_data(str(tmp_path))["train"]
    unread, loose = source_of(rows).notes
    assert len(rows) == 2
    assert unread.startswith("files that are not read: 2 .heic, 1 notes; images are .bmp")
    assert loose == "images that are in no class's folder are not read: 5.png (1 in all)"
