"""compute-sanitizer's racecheck over the kernels, and what of it to believe; on a machine with a GPU, nvcc and the tool:

python tests/kernels/racecheck.py FOLDER    which gets the outputs

Reports are put in classes: kernel, function that writes, function that reads. KNOWN are instances of patterns (`racecheck.cu`)
that the tool reports though they are right. Fails where a class is not known, where the race that is one is not reported, and
where a pattern is not: then the tool has learnt, and what it reports of the pattern's classes is to be believed.

Open, and failing, are the classes in UNEXPLAINED: by the PTX memory model they are right, but no pattern that says so was seen
reported (H200, CUDA 13.0).
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
SCRIPTS = ("sanitize", "sanitize_attention", "sanitize_model")
TOOL = "timeout 540 compute-sanitizer --tool racecheck --print-limit 0 --show-backtrace no --strip-paths no"
# Pattern: its classes. A read without a write is one of another CTA's memory ("-"), which might be gone.
KNOWN = {
    "elected": [
        "AttentionSm90 store_byte load_pair",
        "AttentionSm90 store_word load_word",
        "AttentionSm90 store_word load_pair",
        *(f"IndexScoresSm90 copy_bulk {load}" for load in ("load_words", "_load_byte", "_load_float")),
        *(f"MixedLinearSm90 copy_bulk {load}" for load in ("load_words", "_load_half", "_load_word", "_load_two_words")),
    ],
    "handover": ["Finish hand_over sinkhorn", "AttentionSm90 _probabilities _follow"],
    "remote": ["MixedLinearSm90 _store_sums _load_cluster"],
    "remote -": ["MixedLinearSm90 - _load_cluster"],
}
# The same for patterns that may turn out to be reported.
UNEXPLAINED = {
    "exchange": ["AttentionSm90 _finish _finish"],
}
_PLACE = re.compile(r"\bat (\S+)\+0x\w+ in (\S+):(\d+)")


def classes(text: str) -> Counter[str]:
    """Of a run's reports; whatever else the tool has to say is a class of its own."""
    found: Counter[str] = Counter()
    head = ""
    for line in text.splitlines():
        place = _PLACE.search(line)
        if re.match("========= [^ ]", line):
            head = line[10:]
            if not re.match("COMPUTE-SANITIZER|RACECHECK SUMMARY|(Error|Warning): Race reported|Potential invalid", head):
                found[head] += 1
        elif place:
            both = ["-" if head.startswith("Potential") else _function(_PLACE.search(head)), _function(place)]
            kernel = re.search(r"dsv4labkernels[a-z0-9]*([A-Z]\w*?)_object", place[1])  # behind its module
            found[" ".join([kernel[1] if kernel else place[1], *(both[::-1] if "between Read" in head else both)])] += 1
    return found


@cache
def _functions(path: str) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(Path(path).read_text())) if isinstance(node, ast.FunctionDef)]


def _function(place: re.Match[str] | None) -> str:
    """The innermost one around a line."""
    assert place
    line = int(place[3])
    around = [f for f in _functions(place[2]) if f.lineno <= line <= (f.end_lineno or 0)]
    return max(around, key=lambda f: f.lineno).name if around else f"{place[2]}:{line}"


def faults(reported: set[str], found: set[str]) -> list[str]:
    """Of the patterns that were reported, and of the kernels' classes."""
    known = {key for keys in KNOWN.values() for key in keys}
    unexplained = {key: name for name, keys in UNEXPLAINED.items() for key in keys}
    wrong = []
    for key in sorted(found - known):
        name = unexplained.get(key, "")
        like = f", perhaps like {name}, which is {'' if name in reported else 'not '}reported" if name else ""
        wrong.append(f"{'unexplained' if name else 'of no class'}: {key}{like}")
    return wrong + [f"not reported: {name}" for name in sorted({"race", *KNOWN} - reported)]


def _run(output: Path, *command: str) -> str:
    environment = os.environ | {"PYTHONPATH": f"{HERE.parent.parent}:{os.environ.get('PYTHONPATH', '')}"}
    with output.open("w") as file:
        subprocess.run([*TOOL.split(" "), *command], stdout=file, stderr=subprocess.STDOUT, env=environment)
    return output.read_text()


def main(folder: Path) -> list[str]:
    program = str(folder / "racecheck")
    subprocess.run(["nvcc", "-arch=sm_90a", "-lineinfo", "-o", program, HERE / "racecheck.cu"], check=True)
    names = ["race", *(name for name in {**KNOWN, **UNEXPLAINED} if "-" not in name)]
    with ThreadPoolExecutor() as pool:
        runs = pool.map(lambda name: _run(folder / f"{name}.txt", sys.executable, str(HERE / f"{name}.py")), SCRIPTS)
        patterns = {name: _run(folder / f"{name}.txt", program, name) for name in names}
        texts = dict(zip(SCRIPTS, runs, strict=True))
    reported = {name for name, text in patterns.items() if ": Race reported" in text}
    reported |= {f"{name} -" for name, text in patterns.items() if "= Potential invalid" in text}
    print("reported:", ", ".join(sorted(reported)))
    found = sum(map(classes, texts.values()), Counter[str]())
    print(*(f"{count:6} {key}" for key, count in sorted(found.items())), sep="\n")
    ends = {name: "\nright\n" in text for name, text in patterns.items()}
    ends |= {name: "\nall as the reference has it\n" in text for name, text in texts.items()}
    return [f"not right: {name}" for name, right in ends.items() if not right] + faults(reported, set(found))


if __name__ == "__main__":
    complaints = main(Path(sys.argv[1]))
    print(*complaints, sep="\n")
    sys.exit(bool(complaints))
