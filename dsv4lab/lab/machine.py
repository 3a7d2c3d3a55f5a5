"""Where a run happened: device choice, versions, commit; and the fixed opening of every notebook."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import random
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dsv4lab.lab.checks import publish_environment

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[2]
DEVICES = ("auto", "cpu", "cuda")
_PACKAGES = ("dsv4lab", "torch", "numpy", "safetensors", "tokenizers", "nvidia-cutlass-dsl", "papermill")


def resolve_device(device: str = "auto") -> torch.device:
    """`cpu`, `cuda` (or `cuda:N`), or `auto` for cuda where there is one. Raises ValueError where cuda is asked and absent."""
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = device.partition(":")[0]
    if kind not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {device!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be present, got 'cuda' but torch sees no CUDA device; `dsv4lab doctor` says more")
    return torch.device(device)


def setup(seed: int, device: str = "auto") -> torch.device:
    """Open a notebook: the house style for figures, every random generator seeded, and the device that `device` means."""
    import torch

    from dsv4lab.lab.figures import prepare_figures
    from dsv4lab.viz import style

    style.use_style()
    prepare_figures()
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - a cell may reach for the global generator
    torch.manual_seed(seed)
    return resolve_device(device)


def commit() -> str:
    """The commit of this checkout, marked when tracked files differ from it; `unknown` outside a git checkout."""
    found = revision(12)
    return "unknown" if found is None else f"{found[0]} with local changes" if found[1] else found[0]


def revision(digits: int, *, apart_from: str = "") -> tuple[str, bool] | None:
    """The commit of this checkout, and whether tracked files differ from it, a folder left aside; None outside of git.

    DSV4LAB_COMMIT where it is set: for copies that git does not know, or knows as an older commit with changes.
    """
    if given := os.environ.get("DSV4LAB_COMMIT"):
        return given[:digits], False
    aside = ("--", ".", f":(exclude){apart_from}") if apart_from else ()
    try:
        head = _git("rev-parse", f"--short={digits}", "HEAD")
        return head, bool(_git("status", "--porcelain", "--untracked-files=no", *aside))
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


def version_of(package: str) -> str:
    """Installed version of a distribution, or `not installed`."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """The CPU's name and the number of cores this process may use."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass  # not Linux: the platform's own name stands
    return f"{name}, {usable_cores()} cores"


def usable_cores() -> int:
    """Cores that this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


def accelerators() -> list[str]:
    """Name and architecture of each CUDA device that torch sees, such as `NVIDIA H200 (sm_90a)`."""
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        # From Hopper on, the tensor-core instructions live in the architecture-specific target.
        suffix = "a" if major >= 9 else ""
        found.append(f"{torch.cuda.get_device_name(index)} (sm_{major}{minor}{suffix})")
    return found


def facts(device: torch.device | str = "auto") -> dict[str, str]:
    """What a result depends on, by name: time, commit, device, versions."""
    chosen = resolve_device(device) if isinstance(device, str) else device
    named = processor()
    if chosen.type == "cuda":
        named = accelerators()[chosen.index or 0]
    found = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "device": f"{chosen.type}: {named}",
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    return found | {package: version_of(package) for package in _PACKAGES}


def environment(device: torch.device | str = "auto") -> None:
    """Show and store versions, device and commit: the fourth cell of every notebook."""
    publish_environment(facts(device))
