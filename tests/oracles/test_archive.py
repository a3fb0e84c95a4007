"""Archives of studies: equal files give equal archives, and the lists in the tree fit what stands beside them."""

import importlib.util
import json
import os
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LISTS = sorted((ROOT / "bench" / "results" / "studies").glob("*/archive.json"))


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("archive", ROOT / "bench" / "archive.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def folder(at, mode, time):
    for name in ("runs.sqlite", "report/table.csv", "report/plots/b.svg", "report/plots/a.svg"):
        path = at / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"what stands in {name}")
        path.chmod(mode)
        os.utime(path, (time, time))
    return at


def test_equal_files_give_equal_archives(program, tmp_path):
    """Whatever their times, permissions and the list that lies beside them."""
    first = program.listed("one", program.files(folder(tmp_path / "a", 0o644, 1e9)))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "archive.json").write_text(json.dumps(first[0]))
    assert program.listed("one", program.files(folder(tmp_path / "b", 0o600, 1.5e9))) == first
    (tmp_path / "one.tar.xz").write_bytes(first[1])
    with tarfile.open(tmp_path / "one.tar.xz") as opened:
        opened.extractall(tmp_path / "out", filter="data")
    assert program.files(tmp_path / "out" / "one") == program.files(tmp_path / "a")
    assert program.check(tmp_path / "one.tar.xz", first[0]) == []


def test_a_changed_file_is_named(program, tmp_path):
    told, _ = program.listed("one", program.files(folder(tmp_path / "a", 0o644, 1e9)))
    (tmp_path / "a" / "report" / "table.csv").write_text("other figures")
    program.write(tmp_path / "one.tar.xz", program.listed("one", program.files(tmp_path / "a"))[1])
    assert program.check(tmp_path / "one.tar.xz", told) == ["report/table.csv"]
    (tmp_path / "a" / "report" / "plots" / "a.svg").unlink()
    program.write(tmp_path / "one.tar.xz", program.listed("one", program.files(tmp_path / "a"))[1])
    assert program.check(tmp_path / "one.tar.xz", told) == ["report/plots/a.svg", "report/table.csv"]


def test_an_open_store_is_not_archived(program, tmp_path):
    (folder(tmp_path, 0o644, 1e9) / "runs.sqlite-wal").write_text("what is not in the store yet")
    with pytest.raises(ValueError, match=r"is in use \(runs.sqlite-wal\)"):
        program.files(tmp_path)


@pytest.mark.parametrize("told", LISTS, ids=lambda told: told.parent.name)
def test_what_the_tree_keeps_of_a_study_is_what_its_archive_has(program, told):
    """But for the report, which leaves out the plots that are not kept."""
    listed, kept = json.loads(told.read_text()), program.files(told.parent)
    assert {"report/table.csv", "report/report.md"} <= kept.keys() <= listed["files"].keys()
    assert listed["archive"] == f"{told.parent.name}.tar.xz"
    for path, content in kept.items():
        if path != "report/report.md":
            assert program.digest(content) == listed["files"][path]["sha256"], path
