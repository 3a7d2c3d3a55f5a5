"""The kernel cache: compiled once, whole or absent, rebuilt where damaged, shared between processes, keyed by what matters."""

from __future__ import annotations

import errno
import inspect
import json
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4lab import sim
from dsv4lab.kernels._common import cache
from dsv4lab.kernels._common.cache import Compiled, DamagedEntry
from dsv4lab.kernels._common.launch import runtime_libraries
from dsv4lab.kernels.quant.rows.api import quantize_mxfp4
from tests.kernels.simulated import simulating

MODULE = "dsv4lab.kernels.quant.rows.kernel"
ENTRY = Compiled(b"object", b"cubin" * 100, "ptx")
# A process that quantises two rows with the kernel and reports how often it compiled.
WORKER = textwrap.dedent(
    """
    import pathlib, sys, torch
    import dsv4lab.kernels._common.cache as cache
    from dsv4lab import sim
    from dsv4lab.kernels._common.launch import running_on
    from dsv4lab.kernels.quant.rows.api import quantize_mxfp4
    cache.folder = lambda: pathlib.Path(sys.argv[1])
    compiled, real = [], cache._compile
    cache._compile = lambda *args: compiled.append(1) or real(*args)
    with sim.simulating("sm_100a"), running_on(sim.Host("sm_100a")):
        codes, _ = quantize_mxfp4(torch.linspace(-6, 6, 64).view(2, 32))
    print(len(compiled), codes.flatten().tolist())
    """
)


class Place:
    """A runtime that launches nothing."""

    multiprocessors = 1

    def __init__(self, arch: str = "sm_100a") -> None:
        self.arch, self.libraries = arch, (f"lib for {arch}",)
        self.known: list[str] = []

    def bind(self, host_code: bytes) -> bytes:
        return host_code

    def know(self, ptx: str, cubin: bytes) -> None:
        self.known.append(ptx)

    def call(self, function: Any, *args: Any) -> None:
        raise AssertionError("nothing is called here")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, in memory too, whose kernels are compiled and linked by stand-ins."""
    monkeypatch.setattr(cache, "folder", lambda: tmp_path)
    monkeypatch.setattr(cache, "_loaded", {})
    monkeypatch.setattr(cache, "_link", lambda code, libraries: code)
    return tmp_path


def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Architectures in the order in which something is compiled for them."""
    done: list[str] = []

    def compile_(build: Any, arch: str) -> Compiled:
        done.append(arch)
        return ENTRY

    monkeypatch.setattr(cache, "_compile", compile_)
    return done


def get(config: Any = "config", place: Place | None = None, module: str = MODULE) -> Any:
    return cache.kernel(module, config, lambda: (None, ()), place or Place())


def test_what_is_on_disk_is_not_compiled_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = built(monkeypatch)
    place = Place()
    assert get(place=place) == get(place=place) == ENTRY.object
    cache._loaded.clear()  # as in a fresh process
    assert get(place=place) == ENTRY.object
    assert done == ["sm_100a"] and place.known == ["ptx", "ptx"], "the simulator is told of every module that is loaded"


def test_the_key_has_all_that_matters(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = built(monkeypatch)
    get()
    get("another config")
    get(place=Place("sm_90a"))
    get(module="dsv4lab.kernels.gemm.w4a4.sm100")
    for owner, name, value in (
        (cache.importlib.metadata, "version", lambda name: "0.0"),
        (cache, "fingerprint", lambda module: "edited"),
    ):
        cache._loaded.clear()
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            get()
    assert len(done) == 6
    cache._loaded.clear()
    get()
    assert len(done) == 6 and len(list(folder.glob("*.kernel"))) == 6


def test_places_in_sources_are_the_compiler_s() -> None:
    from cutlass._mlir_helpers import op

    ask, frame = op._fast_frameinfo, inspect.currentframe()
    cache._remember_places()
    assert op._fast_frameinfo is not ask or "remembered" in ask.__qualname__  # else nothing is gained
    for _ in range(2):
        found = [op._fast_frameinfo(frame)]
        found += [op._fast_frameinfo(frame)]
        assert [one.lineno for one in found] == [frame.f_lineno - 2, frame.f_lineno - 1]
        assert op._find_user_frame(frame) is frame


def test_the_fingerprint_follows_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "inkpot"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "kernel.py").write_text("from inkpot.helper import tile\nimport math\n")
    (package / "helper.py").write_text("from inkpot import deep\ntile = 3\n")
    (package / "deep.py").write_text("shallow = 1\n")
    (package / "other.py").write_text("pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(cache, "_PACKAGE", "inkpot")

    def now() -> str:
        cache.fingerprint.cache_clear()
        return cache.fingerprint("inkpot.kernel")

    first = now()
    (package / "other.py").write_text("pass  # edited\n")
    assert now() == first
    (package / "helper.py").write_text("from inkpot import deep\ntile = 4\n")
    second = now()
    assert second != first
    (package / "deep.py").write_text("shallow = 2\n")
    assert now() not in (first, second), "a module that is imported as a name of its package"


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda raw: raw[:-1], "bytes follow the header, which announces"),
        (lambda raw: raw[:-3] + b"xyz", "its digest differs"),
        (lambda raw: b"", "its first line is no header"),
        (lambda raw: b"{}\n" + raw, "its first line is no header"),
    ],
)
def test_a_damaged_entry_is_rebuilt_and_said_so(folder: Path, monkeypatch: pytest.MonkeyPatch, damage: Any, why: str) -> None:
    done = built(monkeypatch)
    get()
    (path,) = folder.glob("*.kernel")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DamagedEntry, match=why):
        cache.read(path)
    cache._loaded.clear()
    with pytest.warns(UserWarning, match=f"entry {path} of the kernel cache is damaged .*{why}.*rebuilt"):
        assert get() == ENTRY.object
    assert len(done) == 2 and cache.read(path) == ENTRY


def test_an_entry_says_what_it_was_made_from(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built(monkeypatch)
    get("tile_n=128")
    (path,) = folder.glob("*.kernel")
    source = json.loads(path.read_bytes().partition(b"\n")[0])["source"]
    assert source["config"] == "'tile_n=128'" and source["arch"] == "sm_100a" and source["module"] == MODULE
    assert set(source["versions"]) == set(cache.LIBRARIES)


def test_a_killed_writer_leaves_no_entry(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, young = folder / "old.part", folder / "young.part"
    for part in (old, young):
        part.write_bytes(b"half an en")
    os.utime(old, (0, 0))
    built(monkeypatch)
    monkeypatch.setattr(cache.os, "fsync", _killed)
    with pytest.raises(KeyboardInterrupt):
        get()
    assert not list(folder.glob("*.kernel"))
    assert list(folder.glob("*.part")) == [young], "its own file is gone, and the litter of a day ago"


def _killed(_: int) -> None:
    raise KeyboardInterrupt


def test_a_folder_that_cannot_be_written_costs_only_a_warning(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = built(monkeypatch)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(cache, "folder", lambda: tmp_path / "file")
    with pytest.warns(UserWarning, match="compiled kernels cannot be kept in"):
        assert get() == ENTRY.object
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get()
    assert len(done) == 1


def test_what_the_compiler_cannot_write_is_not_the_cache_s(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []

    def full(*_: object) -> Compiled:
        done.append(1)
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(cache, "_compile", full)
    with warnings.catch_warnings(), pytest.raises(OSError, match="no space left"):
        warnings.simplefilter("error")
        get()
    assert len(done) == 1


NATIVE = """
import sys
from pathlib import Path
import torch
from dsv4lab.kernels._common import cache

host = cache._link(cache.read(Path(sys.argv[1])).object, (sys.argv[2],))
words, codes, scales = torch.ones(1, 32).view(torch.uint32), torch.zeros(1, 4, dtype=torch.uint32), torch.zeros(1, 1)
one = torch.ones(1)
try:
    host(words, words, one, one, codes, scales.view(torch.uint8), one, 1, 1.0, 0.0, 0.0, 1)
except (ValueError, TypeError) as error:
    print(error)
"""


def test_an_entry_serves_the_gpu_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The object that the simulator ran links to CuTeDSL's own runtime, which then asks for tensors on a GPU.

    In a process of its own: what `cute.compile` links later would find that runtime, too.
    """
    monkeypatch.setattr(cache, "folder", lambda: tmp_path)
    with simulating("sm_100a"):
        quantize_mxfp4(torch.ones(1, 32))
    (path,) = tmp_path.glob("*.kernel")
    (library,) = runtime_libraries()
    assert Path(library).is_file() and library not in sim.Host("sm_100a").libraries
    command = [sys.executable, "-c", NATIVE, str(path), library]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Mismatched" in done.stdout and "cuda" in done.stdout, done.stdout + done.stderr[-2000:]


def test_processes_compile_a_kernel_once_between_them(tmp_path: Path) -> None:
    """Two at the same time, then a third: one compiles, all compute the same."""

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path)], stdout=subprocess.PIPE, text=True)

    together = [start() for _ in range(2)]
    results = [process.communicate(timeout=120)[0].split(maxsplit=1) for process in together]
    results.append(start().communicate(timeout=120)[0].split(maxsplit=1))
    assert sorted(count for count, _ in results) == ["0", "0", "1"]
    assert results[-1][0] == "0" and len({codes for _, codes in results}) == 1
