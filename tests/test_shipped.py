"""The shipped checkpoint's archive: what goes in comes out, once, also under several processes at a time."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from dsv4lab import shipped


def weights() -> dict[str, torch.Tensor]:
    """Of every dtype that is split and some that are not, of several scales; odd numbers of values, one, and none."""
    x = torch.randn(5, 333, generator=torch.Generator().manual_seed(3)) * torch.tensor([[1e-30], [1e-3], [1.0], [9.0], [1e30]])
    dtypes = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.float64)
    cast = {str(dtype): x.to(dtype) for dtype in dtypes}
    return cast | {"one": x[0, :1].clone(), "none": x[:, :0].clone(), "i8": torch.arange(-128, 127).to(torch.int8)}


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of three files, one of them weights, and a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "source"
    folder.mkdir()
    for name, data in {"model.safetensors": save(weights()), "config.json": b"{}", "empty": b""}.items():
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
    (found / "config.json").unlink()
    (found / "model.safetensors").write_bytes(b"cut")
    shipped.unpacked.cache_clear()
    assert shipped.unpacked(archive) == found and contents(found) == contents(source)
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


def test_weight_files_may_lack_what_is_split() -> None:
    for tensors in ({}, {"ids": torch.arange(7)}, {"scale": torch.tensor(0.5)}):
        file = save(tensors, {"format": "pt"})
        assert shipped._joined(shipped._split(file)) == file


def test_archives_from_before_files_were_split_are_read(source: Path, tmp_path: Path) -> None:
    archive = tmp_path / "before.tar.xz"
    with tarfile.open(archive, "w:xz") as tar:
        for path in source.iterdir():
            tar.add(path, path.name)
    assert contents(shipped.unpacked(archive)) == contents(source)
