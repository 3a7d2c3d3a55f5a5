"""The operator map, `docs/operators.md`: for every operation its specification, oracle, kernels, tests, notebook, measurements.

    python -m dsv4lab.lab.operator_map            write the page
    python -m dsv4lab.lab.operator_map --check    exit status 1 if the page is not what the code and the baselines give

Everything is derived. An operation and its kernels are what is registered; the oracle is the function of `dsv4lab.reference`
that the operation calls; the section is what the oracle's docstring cites, or its module's; tests and notebooks are those that
name the operation in code most often; measurements are rows of `benchmarks/baselines`. What is not there is called "none".
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from dsv4lab import dispatch, ops
from dsv4lab.lab import pages
from dsv4lab.lab.baselines import lines_of
from dsv4lab.lab.machine import ROOT

PAGE = ROOT / "docs" / "operators.md"
BASELINES = ROOT / "benchmarks" / "baselines"
NONE = "none"
DEVICES = {"h200": "h200.jsonl.xz"}
FEW, MANY = 64, 1024  # tokens: a decode step has at most, a prefill at least so many

_KERNELS = "dsv4lab.kernels."
_SECTIONS = re.compile(r"\bspec(?:ification, sections?)? ((?:\d+(?:\.\d+)?(?:, | and )?)+)")
# What the suites call by other names than the operation's; a list is in order of preference, None is a part of an operation.
_ALIASES: dict[str, dict[str, str | None]] = {
    "linear": {"wo_a": "grouped_linear", "head": "lm_head", "": "linear"},
    "experts": {
        "experts": "moe_experts",
        "layer": "moe_layer",
        "router": "router_topk",
        "shared": "shared_expert",
        "permute": None,
        "product": None,
        "combine": None,
        "gather": None,
    },
    "attention": {"": "attention"},
    "attention_layer": {"": None},
    "layers": {"": None},
    "indexer": {"scores": "index_scores", "topk": "index_topk"},
    "quantizers": {"activation_values": None},
}


@dataclass(frozen=True)
class Operation:
    """One line of the map. kernels: architecture -> folders, relative to the repository's root, as all paths are."""

    name: str
    sections: str
    oracle: str
    oracle_file: str
    kernels: dict[str, tuple[str, ...]]
    tests: tuple[str, ...]
    notebooks: tuple[str, ...]


# ---- what the code says ------------------------------------------------------------------------------------------------
def operations() -> list[Operation]:
    """All operations of `dsv4lab.ops`, by name."""
    found = []
    for name in ops.implementations():
        registered = dispatch._operations[name]
        oracle = oracle_of(registered.reference)
        names = {name, oracle.__name__}
        notebooks = _most(names, sorted((ROOT / "notebooks").glob("*.py")), 2, written_about=True)
        tests = [
            t for room in ("kernels", "reference") for t in _most(names, sorted((ROOT / "tests" / room).glob("test_*.py")), 1)
        ]
        found.append(
            Operation(
                name,
                sections_of(oracle),
                f"{oracle.__module__.removeprefix('dsv4lab.reference.')}.{oracle.__name__}",
                _relative(inspect.getsourcefile(oracle)),
                {arch: folders_of(kernel.function) for arch, kernel in sorted(registered.kernels.items())},
                tuple(tests),
                tuple(notebooks),
            )
        )
    return found


def oracle_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of `dsv4lab.reference` that an operation's reference calls first. Raises ValueError where it calls none."""
    for node in ast.walk(_tree(function)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            called = _resolve(node.func, function.__globals__)
            if inspect.isfunction(called) and called.__module__.startswith("dsv4lab.reference."):
                return called
    raise ValueError(f"{function.__name__} must call a function of dsv4lab.reference, calls none")


def sections_of(oracle: Callable[..., Any]) -> str:
    """Sections that the oracle's docstring cites, or else its module's: "5.2, 5.4"; "none" where neither does."""
    for text in (oracle.__doc__, inspect.getmodule(oracle).__doc__):
        cited = [n for group in _SECTIONS.findall(" ".join((text or "").split())) for n in re.findall(r"\d+(?:\.\d+)?", group)]
        if cited:
            return ", ".join(dict.fromkeys(cited))
    return NONE


def folders_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """Folders of the kernels that a function of an `operators` module reaches, its own where it reaches no other."""
    folders: dict[str, None] = {}
    seen: set[Any] = set()

    def visit(at: Callable[..., Any]) -> None:
        if at in seen:
            return
        seen.add(at)
        for node in ast.walk(_tree(at)):
            if isinstance(node, ast.ImportFrom) and node.module:
                take(f"{node.module}.{node.names[0].name}" if node.module.endswith("kernels") else node.module)
            elif isinstance(node, ast.Attribute | ast.Name):
                value = _resolve(node, at.__globals__)
                if isinstance(value, ModuleType):
                    take(value.__name__)
                elif inspect.isfunction(value) and value.__module__.startswith(_KERNELS):
                    if value.__module__.endswith(".operators"):
                        visit(value)
                    else:
                        take(value.__module__)

    def take(module: str) -> None:
        parts = module.removeprefix(_KERNELS).split(".")
        if module.startswith(_KERNELS) and parts[0] != "_common" and parts[-1] not in ("operators", "entry"):
            path = ROOT.joinpath("dsv4lab", "kernels", *parts)
            folder = path if path.is_dir() else path.parent
            if folder.name != "kernels":
                folders[_relative(folder)] = None

    visit(function)
    own = _relative(Path(str(inspect.getsourcefile(function))).parent)
    deeper = [f for f in folders if f != own] or [own]
    return tuple(sorted(deeper))


def _tree(function: Callable[..., Any]) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(function)))


def _resolve(node: ast.expr, names: dict[str, Any]) -> Any:
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = _resolve(node.value, names)
        return getattr(owner, node.attr, None) if isinstance(owner, ModuleType) else None
    return None


def _relative(path: str | Path | None) -> str:
    return Path(str(path)).resolve().relative_to(ROOT).as_posix()


@cache
def _named(path: Path) -> tuple[tuple[str, ...], str]:
    """Names of this package that a file's code uses, and its comments, which are a notebook's text."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    imported, used = set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in ("dsv4lab", "tests"):
            imported |= {a.asname or a.name for a in node.names}
            used += [a.name for a in node.names]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in imported | {"ops", "dsv4lab"}:
                used.append(node.attr)
        elif isinstance(node, ast.Name) and node.id in imported:
            used.append(node.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            used.append(node.value)
    return tuple(used), "\n".join(line for line in source.splitlines() if line.startswith("#"))


def _most(names: set[str], files: Iterable[Path], count: int, *, written_about: bool = False) -> list[str]:
    """The files that name an operation most often, at most `count`, in order of their names' numbers."""
    scores = {}
    for path in files:
        used, text = _named(path)
        score = sum(use in names for use in used)
        if written_about:
            score += sum(len(re.findall(rf"`(?:ops\.|reference\.\w+\.)?{name}`", text)) for name in names)
        if score:
            scores[path] = score
    best = sorted(scores, key=lambda path: (-scores[path], path.name))[:count]
    return [_relative(path) for path in sorted(best)]


# ---- what was measured -------------------------------------------------------------------------------------------------
def operation_of(row: dict[str, Any], names: Iterable[str]) -> str | None:
    """The operation that a baseline's row measures; None for a part of one. Raises ValueError where nothing says which."""
    if row.get("operation") in set(names):
        return str(row["operation"])
    suite = str(row["benchmark"]).split(",")[0]
    words = str(row["shape"]).replace(",", " ").split()
    for word in words:
        if word in _ALIASES.get(suite, {}):
            return _ALIASES[suite][word]
        if word in set(names):
            return word
    if "" in _ALIASES.get(suite, {}):
        return _ALIASES[suite][""]
    raise ValueError(
        f"a row's shape must name an operation or a known part of one, got {row['shape']!r} of {row['benchmark']!r}"
    )


def measured(path: Path, names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Rows of a baseline with a percent of bound, by operation; of one shape's rows the newest, which is the last."""
    newest: dict[tuple[Any, ...], tuple[str, dict[str, Any]]] = {}
    for line in lines_of(path):
        row = json.loads(line)
        name = operation_of(row, names)
        if name is not None and row.get("percent_of_bound") is not None:
            key = (name, row["shape"], *(row.get(what) for what in ("format", "m", "n", "k")))
            if key not in newest or row.get("date", "") >= newest[key][1].get("date", ""):
                newest[key] = (name, row)
    found: dict[str, list[dict[str, Any]]] = {}
    for name, row in newest.values():
        found.setdefault(name, []).append(row)
    return found


def best(rows: Sequence[dict[str, Any]]) -> str:
    """The row nearest to its bound, with its shape and peer; behind it how far all rows lie apart."""
    if not rows:
        return NONE
    row = max(rows, key=lambda r: r["percent_of_bound"])
    shape = " ".join(filter(None, [row["shape"], row.get("format")]))
    shape = shape if str(row.get("m", "")) in shape.split() else f"{shape}, {row.get('m')}"
    text = f"{row['percent_of_bound']:.0f} % ({shape})"
    peers = {name: peer["ratio"] for name, peer in (row.get("peers") or {}).items() if peer.get("ratio")}
    if peers:
        nearest = min(peers, key=lambda name: peers[name])
        text += f", {peers[nearest]:.2f}x {nearest}"
    lowest = min(r["percent_of_bound"] for r in rows)
    return f"{text}; lowest of {len(rows)}: {lowest:.0f} %" if len(rows) > 1 else text


# ---- the page ----------------------------------------------------------------------------------------------------------
def _links(paths: Iterable[str], known: dict[str, str]) -> str:
    """Names of files; known takes where each leads, which the page says once."""
    found = {_short(path): path for path in paths}
    known |= found
    return ", ".join(f"[{name}]" for name in found) or NONE


def _short(path: str) -> str:
    if path.startswith("dsv4lab/kernels/"):
        return path.removeprefix("dsv4lab/kernels/")
    return Path(path).stem if path.startswith("notebooks/") else path.removeprefix("tests/").removesuffix(".py")


def render() -> str:
    """The page as text."""
    listed = operations()
    names = [operation.name for operation in listed]
    arches = sorted({arch for operation in listed for arch in operation.kernels}, key=lambda arch: int(re.sub(r"\D", "", arch)))
    lines = [
        "# Operators",
        "",
        "Written by `python -m dsv4lab.lab.operator_map`; `make lint` fails where it is out of step with the code.",
        "Spec: sections of the model specification that the oracle cites. Tests, notebooks: those that use the operation most.",
        "",
        f"| Operation | Spec | Oracle | {' | '.join(arches)} | Tests | Notebooks |",
        "|---" * (5 + len(arches)) + "|",
    ]
    known: dict[str, str] = {}
    for operation in listed:
        module, _, function = operation.oracle.partition(".")
        known[f"reference.{module}"] = operation.oracle_file
        cells = [f"`{operation.name}`", operation.sections, f"[reference.{module}].{function}"]
        notebooks = (Path(n).with_suffix(".ipynb").as_posix() for n in operation.notebooks)
        cells += [_links(operation.kernels.get(arch, ()), known) for arch in arches]
        cells += [_links(operation.tests, known), _links(notebooks, known)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "## Measured",
        "",
        f"Percent of the byte or flop bound, from `benchmarks/baselines`: decode is up to {FEW} tokens, prefill from {MANY}.",
        "The best shape is named (its number is the tokens), with the fastest peer's time over ours; then the lowest of all.",
        "",
        "| Operation | Device | Decode | Prefill |",
        "|---|---|---|---|",
    ]
    tables = {device: measured(BASELINES / name, names) for device, name in DEVICES.items()}
    for name in names:
        there = [device for device in DEVICES if tables[device].get(name)]
        for device in there:
            rows = tables[device][name]
            few = [row for row in rows if row.get("m", 0) <= FEW]
            many = [row for row in rows if row.get("m", 0) >= MANY]
            lines.append(f"| `{name}` | {device.upper()} | {best(few)} | {best(many)} |")
        if not there:
            lines.append(f"| `{name}` | {NONE} | {NONE} | {NONE} |")
    lines += ["", *(f"[{name}]: ../{path}" for name, path in sorted(known.items()))]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line above; returns the exit status."""
    return pages.keep("dsv4lab.lab.operator_map", PAGE, render, argv)


if __name__ == "__main__":
    sys.exit(main())
