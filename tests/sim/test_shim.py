"""The runtime stand-in: built once, cached by its source, and what is said where it cannot be built."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dsv4lab import sim
from dsv4lab.sim import contract, shim


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.delenv("CC", raising=False)


needs_compiler = pytest.mark.skipif(shim.find_compiler() is None, reason="needs a C compiler")


@needs_compiler
def test_it_is_built_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = shim.build()
    assert first.is_relative_to(cache)
    assert [path.name for path in first.parent.iterdir()] == [shim.LIBRARY]
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CC", "/no/such/compiler")
    assert shim.build() == first  # without a compiler: it comes from the cache


@needs_compiler
def test_another_source_is_another_library(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = shim.build()
    changed = tmp_path / "runtime.c"
    changed.write_text(shim.SOURCE.read_text(encoding="utf-8") + "/* changed */\n", encoding="utf-8")
    monkeypatch.setattr(shim, "SOURCE", changed)
    second = shim.build()
    assert first != second
    assert first.exists() and second.exists()


@needs_compiler
def test_processes_may_build_at_the_same_time(cache: Path) -> None:
    script = "from dsv4lab.sim import shim; shim.load(shim.build())"
    running = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert [path.name for path in shim.library_path().parent.iterdir()] == [shim.LIBRARY]


@needs_compiler
def test_a_failing_compiler_is_quoted_and_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "runtime.c"
    broken.write_text("int f( { nonsense", encoding="utf-8")
    monkeypatch.setattr(shim, "SOURCE", broken)
    with pytest.raises(sim.ShimError, match=r"(?s)could not build runtime\.c:.*error"):
        shim.build()
    assert list(shim.library_path().parent.iterdir()) == []


def test_without_a_compiler_the_message_says_what_to_do(cache: Path, no_compiler: None) -> None:
    with pytest.raises(sim.ShimError, match=r"needs a C compiler once.*apt install gcc.*CC"):
        shim.build()


def test_cc_names_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", f"{sys.executable} -x")
    assert shim.find_compiler() == [sys.executable, "-x"]


@needs_compiler
def test_it_exports_every_entry_point_of_the_contract(cache: Path) -> None:
    assert contract.missing_symbols(shim.build()) == []
    library = shim.load(shim.build())
    assert all(hasattr(library, name) for name in contract.SYMBOLS)


def test_the_doctor_says_what_is_there_and_what_to_do(cache: Path, no_compiler: None) -> None:
    runtime, core, rules = sim.doctor()
    assert (runtime[0], runtime[1]) == ("simulator runtime", False)
    assert "gcc" in runtime[3]
    assert not core[1] and "numpy" in core[2] and "gcc" in core[3]
    assert rules[1] == (contract.installed_version() is not None and bool(contract.runtime_libraries()))


@needs_compiler
def test_the_doctor_builds_nothing(cache: Path) -> None:
    (_, ok, detail, remedy), (_, fast, how, _), _ = sim.doctor()
    assert ok and "first use" in detail and not remedy
    assert fast and "will be built" in how
    assert list(cache.iterdir()) == []
    shim.build()
    assert "built" in sim.doctor()[0][2]


def test_a_missing_cutedsl_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "installed_version", lambda: None)
    found = contract.probe_library()
    assert not found.ok
    assert f"{contract.PACKAGE} is not installed" in str(found)
