"""From a table as an office has it to a classifier that a colleague without undula opens."""

import csv
import json

import pytest

from undula.bundled import model_path

from ..support.walk import Walk

TICKETS = {
    "Rechnung": ("die Rechnung ist falsch", "ich wurde doppelt belastet", "wo ist die Rechnung für März"),
    "Versand": ("mein Paket ist nicht da", "wann kommt die Lieferung", "das Paket ist beschädigt"),
    "Konto": ("das Passwort ist weg", "bitte löschen Sie mein Konto", "wie ändere ich meine Adresse"),
}
COLLEAGUE = """
import json
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

config = AutoConfig.from_pretrained("theirs", subfolder="base")
base = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], config=config)
model = PeftModel.from_pretrained(base, "theirs").eval()
tokenizer = AutoTokenizer.from_pretrained("theirs")
with torch.no_grad():
    found = model(**tokenizer(json.loads(sys.argv[2]), padding=True, return_tensors="pt")).logits.softmax(-1)
best = found.max(-1)
print("FOUND", json.dumps([[model.config.id2label[int(i)], float(p)] for p, i in zip(*best)]))
"""


def table(folder):
    """Semicolons, the encoding of a German Windows, a column nobody needs, an empty label, one written otherwise."""
    rows = [f"{i};Hallo, {text} ({i});{label}" for i in range(9) for label, texts in TICKETS.items() for text in texts]
    rows[4] = rows[4].replace("Versand", "versand ")
    rows[7] = rows[7].rpartition(";")[0] + ";"
    lines = ["Nr;Nachricht;Kategorie", *rows, rows[0]]
    (folder / "tickets.csv").write_bytes("\r\n".join(lines).encode("cp1252"))


def test_a_messy_table_becomes_a_classifier_that_a_colleague_opens(tmp_path, record_property, python):
    table(tmp_path)
    walk, file = Walk(tmp_path, python), tmp_path / "tickets.csv"
    train = (
        "train",
        "--model",
        "bundled:minilm",
        "--data",
        "tickets.csv",
        "--task",
        "classification",
        "--out",
        "sorter",
    )
    train += ("--max-steps", "16", "--lr", "3e-3")

    said = walk.undula(*train, code=2)  # all that is wrong with the file, and what to do
    assert "tickets.csv is not UTF-8" in said
    assert "--encoding" in said
    assert "--column text=..." in said
    assert "their columns are: Nr, Nachricht, Kategorie" in said

    train += ("--encoding", "cp1252", "--column", "text=Nachricht", "--column", "label=Kategorie")
    said = walk.undula(*train, code=2)
    assert "column 'Kategorie' is empty: line 9" in said
    assert "'versand ' (1 rows, first line 6)" in said
    assert "--skip-faulty" in said

    file.write_bytes(file.read_bytes().replace(b"versand ", b"Versand"))
    said = walk.undula(*train, "--skip-faulty", "0.05")
    assert "1 of 82 rows are left out" in said
    assert "separated by semicolons" in said
    assert "same input as an earlier row" in said
    first = walk.seconds
    report = json.loads((tmp_path / "sorter/report.json").read_text())
    assert report["after"]["accuracy"] > 0.8 > report["before"]["accuracy"]

    texts = ["wo bleibt mein Paket", "die Rechnung stimmt nicht, bitte prüfen", "Passwort vergessen"]
    (tmp_path / "new.txt").write_text("\n".join(texts), encoding="utf-8")
    walk.undula("predict", "sorter", "new.txt", "--out", "answers.csv")
    with open(tmp_path / "answers.csv", encoding="utf-8", newline="") as opened:
        answers = [(row["label"], float(row["probability"])) for row in csv.DictReader(opened)]
    assert [label for label, _ in answers] == ["Versand", "Rechnung", "Konto"]

    walk.undula("export", "sorter", "--out", "theirs")
    said = walk.python(COLLEAGUE, model_path("minilm"), json.dumps(texts))
    found = json.loads(said.partition("FOUND ")[2].partition("]]")[0] + "]]")
    assert [label for label, _ in found] == [label for label, _ in answers]
    assert [p for _, p in found] == pytest.approx([p for _, p in answers], abs=1e-3)
    record_property("seconds", walk.seconds)
    print(f"first result after {first:.0f} s (two refusals included), the whole walk {walk.seconds:.0f} s")
