"""The data sets debian-synopsis and debian-section: what a Debian package does, at length and in one line, written by
its maintainer; and the section of the archive in which it stands.

The texts are in the package index that apt downloads. Each is under the licence of its own package, so they are
fetched, never distributed with undula. Where apt is set up to skip the long texts (as in most containers), or is not
up to date, does not matter: see apt.py.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from .apt import APT_HELPER, check_apt, updated
from .asset import Asset, AssetError, Progress
from .rows import Row, fingerprint, split_rows, write_rows

TEXT_CHARS = (150, 2000)
SUMMARY_CHARS = (15, 100)
GROUP_WORDS = 6
INDEX_BYTES = 16_000_000  # of the package index, about
# Their descriptions say what the package is for the packaging, not what it does.
NOT_REAL = re.compile(r"transitional|dummy|meta-?package|debug(ging)? symbols", re.IGNORECASE)


SECTIONS = 20  # the largest; the rest are small


def build_synopses(asset: Asset, out: Path, progress: Progress) -> None:
    """One row for each source package: the text of the binary package of the same name, else of the first."""
    splits, release = synopses(asset, progress)
    write_rows(out, splits, origin=release)


def synopses(asset: Asset, progress: Progress) -> tuple[dict[str, list[Row]], str]:
    """({split: rows {text, summary}}, the release of the distribution)."""
    rows, release = _rows(asset, progress)
    pairs = [(group, {"text": row["text"], "summary": row["summary"]}) for group, row in rows]
    return split_rows(pairs), release


def build_sections(asset: Asset, out: Path, progress: Progress) -> None:
    """The same packages: synopsis -> section, those of the largest sections."""
    rows, release = _rows(asset, progress)
    sizes = Counter(row["section"] for _, row in rows)
    labels = sorted(sorted(sizes, key=lambda s: (-sizes[s], s))[:SECTIONS])
    pairs = [
        (group, {"text": row["summary"], "label": labels.index(row["section"])})
        for group, row in rows
        if row["section"] in labels
    ]
    write_rows(out, split_rows(pairs), release, labels)


def _rows(asset: Asset, progress: Progress) -> tuple[list[tuple[str, Row]], str]:
    """((group, row) of every package, the release of the distribution)."""
    check_apt(asset, "read from the package index", "use the data set 'docstrings', which needs nothing")
    with tempfile.TemporaryDirectory() as scratch:
        progress(f"{asset.name}: downloading a package index with long descriptions ({INDEX_BYTES / 1e6:.0f} MB) ...")
        packages, translations, release = _index(Path(scratch))
    rows = pair_rows(packages, translations)
    if len(rows) < 1000:
        raise AssetError(
            f"{asset.name}: asked apt for all packages, found {len(rows)} with a long description.\n"
            "What to do: check that the main component of Debian or Ubuntu is among apt's sources."
        )
    return rows, release


def pair_rows(packages: str, translations: str) -> list[tuple[str, Row]]:
    """(group, row) from the texts of Packages and Translation-en files, in order of the source package's name.

    Families of packages (gcc-11 and gcc-12, the plugins of one program) begin their texts with the same words: these
    words are the group, so that no family is torn apart by the split.
    """
    long = {f["Description-md5"]: f["Description-en"] for f in stanzas(translations) if "Description-en" in f}
    best: dict[str, tuple[tuple[bool, str], Row]] = {}
    for fields in stanzas(packages):
        name = fields["Package"]
        source = fields.get("Source", name).split(" ")[0]
        section = fields.get("Section", "").rpartition("/")[2]
        row = _row(long.get(fields.get("Description-md5", ""), ""), section)
        rank = (name != source, name)
        if row and (source not in best or rank < best[source][0]):
            best[source] = (rank, row)
    rows = [best[source][1] for source in sorted(best)]
    return [(" ".join(fingerprint(row["text"]).split()[:GROUP_WORDS]), row) for row in rows]


def stanzas(content: str) -> Iterator[dict[str, str]]:
    """The paragraphs of a Debian control file, as {field: value}; continued lines lose their leading space."""
    for paragraph in content.split("\n\n"):
        if paragraph.strip():
            unfolded = re.findall(r"^([^\s:]+):[ \t]*(.*(?:\n[ \t].*)*)", paragraph, re.MULTILINE)
            yield {field: re.sub(r"\n[ \t]", "\n", value) for field, value in unfolded}


def _row(description: str, section: str) -> Row | None:
    """The first line is the synopsis, a line with only a dot is an empty line."""
    summary, _, text = description.partition("\n")
    summary, text = summary.strip(), re.sub(r"^\.$", "", text, flags=re.MULTILINE).strip()
    fits = TEXT_CHARS[0] <= len(text) <= TEXT_CHARS[1] and SUMMARY_CHARS[0] <= len(summary) <= SUMMARY_CHARS[1]
    return {"text": text, "summary": summary, "section": section} if fits and not NOT_REAL.search(summary) else None


def _index(scratch: Path) -> tuple[str, str, str]:
    """Let apt download its index into `scratch`: (all Packages files, all Translation-en files, their release)."""
    options, complaint = updated(scratch, "en")
    fields = "$(CREATED_BY)\t$(ORIGIN)\t$(COMPONENT)\t$(SUITE)\t$(VERSION)\t$(FILENAME)"
    query = ["indextargets", "--format", fields]
    listing = subprocess.run(["apt-get", *options, *query], capture_output=True, text=True, check=False)
    contents, releases = {"Packages": "", "Translations": ""}, set()
    for line in sorted(listing.stdout.splitlines()):
        kind, origin, component, suite, version, path = line.split("\t")
        ours = origin in ("Debian", "Ubuntu") and component in ("main", "universe") and "-" not in suite
        if kind in contents and ours and Path(path).exists():  # updates ("stable-updates") come and go
            cat = subprocess.run([APT_HELPER, "cat-file", path], capture_output=True, check=True)
            contents[kind] += cat.stdout.decode("utf-8", "replace") + "\n\n"
            releases.add(f"{origin} {version}")
    if not all(contents.values()):  # that some other source failed is no reason to stop
        said = (complaint or listing.stderr).strip()[-600:] or "nothing"
        raise AssetError(
            f"asked apt for the package index with long descriptions, but it has none. It said: {said}\n"
            "What to do: check that `apt-get update` works for the main component of Debian or Ubuntu."
        )
    return contents["Packages"], contents["Translations"], ", ".join(sorted(releases))
