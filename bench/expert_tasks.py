"""Tasks for a library of experts, made of WordNet's classes: 40 to train on and 8 held out of everything.

    python bench/expert_tasks.py --out build/expert-tasks

The bundled WordNet has 20 of the 45 lexicographer files (300 training glosses each).  Four of them (UNSEEN) are in no
task of the library; four held-out tasks are made of those alone, four of new combinations of the others.
OUT/library.toml has the 40, OUT/held-out.toml the 8, as `undula library` reads them; OUT/data/NAME the rows of each, as
many of each class.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

WORDS = {
    "act": "an act or action",
    "animal": "an animal",
    "artifact": "a man-made object",
    "attribute": "a quality or attribute",
    "body": "a part of the body",
    "cognition": "an idea or a field of knowledge",
    "communication": "a message or language",
    "food": "food or drink",
    "group": "a group of people or things",
    "location": "a place or region",
    "object": "a natural object",
    "person": "a person",
    "plant": "a plant",
    "possession": "money or property",
    "quantity": "a quantity or a unit of measure",
    "state": "a condition or state of affairs",
    "substance": "a substance or material",
    "change": "to change or become",
    "say": "to say or tell",
    "contact": "to touch, hit or hold",
}
NAMES = {"change": "verb.change", "say": "verb.communication", "contact": "verb.contact"}
UNSEEN = ("body", "possession", "quantity", "contact")
REST = "other"
ROWS = {"train": 960, "validation": 100, "test": 400}  # of a task, at most
KINDS = (20, 10, 10)  # pairs, one against the rest, subsets of four


@dataclass(frozen=True)
class Made:
    """One task: its classes by the words above; of `one against the rest` those that are the rest."""

    classes: tuple[str, ...]
    rest: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "-".join(self.classes) + ("-or-not" if self.rest else "")

    @property
    def prompts(self) -> dict[str, str]:
        found = {c: WORDS[c] for c in self.classes}
        return {**found, REST: "anything else"} if self.rest else found

    @property
    def description(self) -> str:
        told = ", ".join(WORDS[c] for c in self.classes)
        if self.rest:
            return f"Does the definition tell of {told}, or not?"
        return f"Which of these does the definition tell of: {told}?"


def chosen(seed: int = 0) -> tuple[list[Made], list[Made]]:
    """(the 40 of the library, the 8 that are held out)."""
    draw = random.Random(seed)
    seen = [word for word in WORDS if word not in UNSEEN]
    pairs = draw.sample(list(itertools.combinations(seen, 2)), KINDS[0] + 2)
    fours = draw.sample(list(itertools.combinations(seen, 4)), KINDS[2] + 1)
    ones = draw.sample(seen, KINDS[1] + 1)
    made = [Made(p) for p in pairs], [_against(one, seen) for one in ones], [Made(f) for f in fours]
    library = [task for tasks, n in zip(made, KINDS, strict=True) for task in tasks[:n]]
    held = [task for tasks, n in zip(made, KINDS, strict=True) for task in tasks[n:]]
    one, two, three, four = UNSEEN
    return library, [*held, Made((one, two)), Made((three, four)), _against(two, UNSEEN), Made(UNSEEN)]


def _against(one: str, every: Iterable[str]) -> Made:
    return Made((one,), tuple(word for word in every if word != one))


def write(out: Path, seed: int = 0) -> tuple[list[Made], list[Made]]:
    """Writes the rows and the two files; what `chosen` gives."""
    from undula.bundled import dataset

    data, draw = dataset("wordnet"), random.Random(seed)
    labels = data["train"].features["label"].names
    library, held = chosen(seed)
    for split, most in ROWS.items():
        texts: dict[str, list[str]] = {label: [] for label in labels}
        for row in data[split]:
            texts[labels[row["label"]]].append(row["text"])
        by_word = {word: texts[NAMES.get(word, f"noun.{word}")] for word in WORDS}
        for task in (*library, *held):
            rows = _rows(task, by_word, most, draw)
            path = out / "data" / task.name / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, tasks in (("library", library), ("held-out", held)):
        (out / f"{name}.toml").write_text(toml(tasks, out / "data"), encoding="utf-8")
    return library, held


def _rows(task: Made, texts: Mapping[str, Sequence[str]], most: int, draw: random.Random) -> list[dict[str, str]]:
    """As many of each class, in a drawn order."""
    own = {c: list(texts[c]) for c in task.classes}
    if task.rest:
        own[REST] = [text for c in task.rest for text in texts[c]]
    each = min(most // len(own), *map(len, own.values()))
    rows = [{"text": t, "label": c} for c, found in own.items() for t in draw.sample(found, each)]
    draw.shuffle(rows)
    return rows


COMMON = """model = "bundled:minilm"
method = { is = "lora", r = 2 }
where = ["query", "value"]
lr = 5e-3
max_steps = 40
batch = 16
eval_every = 0
eval_rows = 100
save_every = 1000
seed = 0
"""


def toml(tasks: Sequence[Made], data: Path) -> str:
    """The jobs of these tasks, with their descriptions."""
    parts = [COMMON]
    for task in tasks:
        prompts = ", ".join(f"{json.dumps(c)} = {json.dumps(text)}" for c, text in task.prompts.items())
        names = json.dumps(list(task.prompts))
        parts.append(
            f'\n[[jobs]]\nname = "{task.name}"\ndescription = {json.dumps(task.description)}\n'
            f"data = {json.dumps(str((data / task.name).resolve()))}\n"
            f'task = {{ is = "described-classification", max_length = 16, names = {names}, '
            f"descriptions = {{ {prompts} }} }}\n"
        )
    return "".join(parts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    library, held = write(args.out)
    print(f"{len(library)} tasks for a library, {len(held)} held out: {', '.join(task.name for task in held)}")
