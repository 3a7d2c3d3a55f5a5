"""The shipped checkpoint's archive: what goes in comes out, once, also under several processes at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dsv4lab import shipped


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of three files, and a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "source"
    folder.mkdir()
    for name, data in {"model.safetensors": bytes(range(256)) * 300, "config.json": b"{}", "empty": b""}.items():
        (folder / name).write_bytes(data)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_goes_in_comes_out(source: Path, tmp_path: Path) -> None:
    archive, again = tmp_path / "small.tar.xz", tmp_path / "again.tar.xz"
    shipped.pack(source, archive)
    shipped.pack(source, again)
    assert archive.read_bytes() == again.read_bytes()
    found = shipped.unpacked(archive)
    assert contents(found) == contents(source) and found.is_relative_to(tmp_path / "cache")
    stamp = (found / "config.json").stat().st_mtime_ns
    shipped.unpacked.cache_clear()
    assert shipped.unpacked(archive) == found and (found / "config.json").stat().st_mtime_ns == stamp
    (source / "config.json").write_bytes(b"{1}")
    shipped.pack(source, again)
    assert contents(shipped.unpacked(again))["config.json"] == b"{1}" and contents(found)["config.json"] == b"{}"


def test_processes_may_unpack_at_once(source: Path, tmp_path: Path) -> None:
    archive = tmp_path / "small.tar.xz"
    shipped.pack(source, archive)
    code = f"from pathlib import Path; from dsv4lab import shipped; print(shipped.unpacked(Path({str(archive)!r})))"
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    places = {run.communicate()[0].strip() for run in runs}
    assert len(places) == 1 and contents(Path(places.pop())) == contents(source)
    assert [path.name for path in (tmp_path / "cache" / "dsv4lab").iterdir() if path.name.startswith(".")] == []


def test_a_damaged_archive_is_named(source: Path, tmp_path: Path) -> None:
    archive = tmp_path / "small.tar.xz"
    shipped.pack(source, archive)
    archive.write_bytes(archive.read_bytes()[:-40])
    with pytest.raises(OSError, match=r"small\.tar\.xz must be a whole xz archive"):
        shipped.unpacked(archive)
    assert list((tmp_path / "cache" / "dsv4lab").iterdir()) == []
