"""The rules of the house that a machine can hold: import direction, sizes, versions in step, notebooks as they should be."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import dsv4lab
from dsv4lab.lab import pairing

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES, MAX_TREE_BYTES, MAX_EXECUTED_BYTES = 600, 8 << 20, 400_000
MAX_CELL_LINES, MIN_CELLS, MAX_CELLS = 20, 15, 40

# A room may import itself and what this table allows. `dsv4lab` is the package's own front door, `load` and `nano`.
BASE = {"arguments", "config", "formats", "paging", "records"}
ALLOWED: dict[str, set[str]] = {
    "arguments": BASE,
    "config": BASE,
    "formats": BASE,
    "records": BASE,
    "paging": set(),
    "kernels": BASE,
    "reference": BASE,
    "dispatch": BASE | {"kernels", "reference", "sim"},
    "ops": BASE | {"dispatch", "kernels", "reference"},
    "model": BASE | {"ops", "reference"},
    "shipped": {"kernels"},
    "dsv4lab": BASE | {"dispatch", "model", "shipped"},
    "lab": BASE | {"dispatch", "ops", "reference", "model", "sim", "viz", "dsv4lab"},
    "cli": BASE | {"lab", "model", "sim", "dsv4lab"},
    "viz": set(),
    "sim": set(),
}
NEVER_IN_THE_PACKAGE = {"transformers", "tests", "training", "notebooks"}


def rooms_imported(source: str) -> set[str]:
    """Top names that a module imports: rooms of dsv4lab by their own name, other packages by theirs. Any depth of the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            # `from dsv4lab import ops` names a room in its second half
            names = [f"dsv4lab.{a.name}" for a in node.names] if node.module == "dsv4lab" else [str(node.module)]
        for name in names:
            parts = name.split(".")
            if parts[0] != "dsv4lab":
                found.add(parts[0])
            else:
                found.add(parts[1] if len(parts) > 1 and parts[1] in ALLOWED else "dsv4lab")
    return found


def violations(room: str, source: str) -> set[str]:
    """What a module of this room imports against the table."""
    imported = rooms_imported(source)
    return (imported & ALLOWED.keys()) - ALLOWED[room] - {room} | (imported & NEVER_IN_THE_PACKAGE)


def package_modules() -> list[Path]:
    return sorted((ROOT / "dsv4lab").rglob("*.py"))


def room_of(path: Path) -> str:
    top = path.relative_to(ROOT / "dsv4lab").parts[0]
    return "dsv4lab" if top == "__init__.py" else top.removesuffix(".py")


def tracked_files() -> list[Path]:
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no git checkout, so there is no list of tracked files")
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


# ---- imports -----------------------------------------------------------------------------------------------------------
def test_every_room_is_in_the_table() -> None:
    assert {room_of(path) for path in package_modules()} <= ALLOWED.keys()


@pytest.mark.parametrize("path", package_modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    assert not violations(room_of(path), path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("room", "source", "caught"),
    [
        ("reference", "from dsv4lab.kernels.norm import rmsnorm", {"kernels"}),
        ("kernels", "def f():\n    import dsv4lab.reference.norm", {"reference"}),
        ("config", "from dsv4lab import ops", {"ops"}),
        ("model", "import dsv4lab", {"dsv4lab"}),
        ("viz", "from dsv4lab.config import ModelConfig", {"config"}),
        ("model", "from transformers import AutoModel", {"transformers"}),
        ("ops", "from dsv4lab import dispatch, formats\nimport torch", set()),
        ("lab", "from dsv4lab.viz import style\nimport dsv4lab", set()),
    ],
)
def test_the_import_test_sees_what_it_should(room: str, source: str, caught: set[str]) -> None:
    assert violations(room, source) == caught


# ---- sizes -------------------------------------------------------------------------------------------------------------
def test_files_and_tree_stay_small() -> None:
    files = tracked_files()
    long = {
        str(p.relative_to(ROOT)): n for p in files if p.suffix == ".py" and (n := len(p.read_bytes().splitlines())) > MAX_LINES
    }
    assert not long
    assert sum(path.stat().st_size for path in files) < MAX_TREE_BYTES
    published = [path for path in files if path.suffix == ".ipynb" and path.is_relative_to(ROOT / "executed")]
    assert not [path.name for path in published if path.stat().st_size > MAX_EXECUTED_BYTES]
    assert not [path for path in files if path.is_relative_to(ROOT / "executed" / "local")]


# ---- versions ----------------------------------------------------------------------------------------------------------
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    parsed = [re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.]+)", line) for line in lines]
    assert all(parsed), "constraints.txt holds exact versions, nothing else"
    found = {canonicalize_name(match[1]): match[2] for match in parsed if match}
    assert len(found) == len(lines), "each package once"
    return found


def requirements() -> list[Requirement]:
    declared = project()["dependencies"] + [r for extra in project()["optional-dependencies"].values() for r in extra]
    return [Requirement(text) for text in declared]


def test_the_package_has_one_version() -> None:
    assert project()["version"] == dsv4lab.__version__


def test_every_requirement_is_pinned_within_its_range() -> None:
    pinned = pins()
    for requirement in requirements():
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} is not in constraints.txt"
        assert requirement.specifier.contains(pinned[name]), f"{requirement} does not admit {pinned[name]}"


def test_every_pin_is_for_the_oldest_python_too() -> None:
    """A micro release, too: 3.11.2 is what Debian 12 has, and pip would find no version that it may install there."""
    oldest = min(spec.version for spec in SpecifierSet(project()["requires-python"])) + ".0"
    for name, version in pins().items():
        try:
            found = importlib.metadata.metadata(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for other platforms
        if found["Version"].split("+")[0] == version:
            assert SpecifierSet(found["Requires-Python"] or "").contains(oldest), f"{name} {version} is not for {oldest}"


def test_both_supported_torch_versions_are_in_range() -> None:
    (torch_range,) = [r.specifier for r in requirements() if r.name == "torch"]
    assert torch_range.contains("2.11.0") and torch_range.contains("2.13.0")


def test_everything_that_gets_installed_is_pinned() -> None:
    pinned, seen = pins(), set()
    waiting = [(r, {""}) for r in requirements()]
    while waiting:
        requirement, extras = waiting.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        assert name in pinned, f"{name} is installed but not in constraints.txt; run `make constraints`"
        key = (name, tuple(sorted(requirement.extras)))
        cuda_build = name == "torch" and torch.version.cuda is not None  # brings CUDA libraries that CI does not have
        if key in seen or cuda_build:
            continue
        seen.add(key)
        installed = importlib.metadata.requires(name) or []
        waiting += [(Requirement(text), requirement.extras or {""}) for text in installed]
    assert len(seen) > len(requirements())


def test_conda_users_get_the_same_versions() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, through_pip = environment["dependencies"]
    assert through_pip == {"pip": ["-c constraints.txt", "setuptools", "-e .[test]"]}
    assert [Requirement(text).name for text in conda] == ["python", "pip"]
    assert Requirement(conda[0]).specifier == SpecifierSet(project()["requires-python"])
    makefile = (ROOT / "Makefile").read_text()
    assert "-c constraints.txt setuptools" in makefile and "-c constraints.txt --no-build-isolation -e '.[test]'" in makefile


def test_ci_runs_what_developers_run() -> None:
    script = ROOT / ".ci" / "run"
    assert script.read_text().splitlines()[-1] == "exec make test"
    assert script.stat().st_mode & 0o100


def test_no_file_names_a_package_index() -> None:
    forbidden = re.compile("index" + "-url|py" + r"pi\.org|python" + r"hosted|find" + "-links")
    texts = [
        path
        for path in tracked_files()
        if path.suffix in (".py", ".md", ".txt", ".toml", ".yml", ".yaml", "") and path.stat().st_size < 1 << 20
    ]
    assert len(texts) > 10
    assert not [path.name for path in texts if forbidden.search(path.read_text(encoding="utf-8", errors="replace"))]


# ---- notebooks ---------------------------------------------------------------------------------------------------------
NOTEBOOKS = sorted(pairing.NOTEBOOKS.glob("*.ipynb"))


def test_pairs_are_in_step() -> None:
    assert pairing.out_of_step(pairing.NOTEBOOKS) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_as_the_house_wants_it(path: Path) -> None:
    assert re.fullmatch(r"\d\d_[a-z0-9_]+", path.stem)
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert MIN_CELLS <= len(cells) <= MAX_CELLS
    assert cells[0]["cell_type"] == "markdown" and cells[0]["source"].startswith("# ")
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert [cell for cell in code if "parameters" in cell["metadata"].get("tags", [])] == code[:1]
    too_long = [cell["source"][:60] for cell in code if len(cell["source"].splitlines()) > MAX_CELL_LINES]
    assert not too_long
    sources = "\n".join(cell["source"] for cell in code)
    assert "lab.check" in sources, "an unattended run has no reader: notebooks assert"
