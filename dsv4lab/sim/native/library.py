"""Builds and loads the C code of the native core, once for each source and machine."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

from dsv4lab.sim import shim

SOURCES = tuple(sorted(Path(__file__).parent.glob("*.c")))
HEADERS = tuple(sorted(Path(__file__).parent.glob("*.h")))
# Every operation rounds once, as numpy's do: no fused multiply-adds but those that are written. -O1 as it builds in half the
# time of -O2, and what remains of a kernel's time is mostly spent in Python.
FLAGS = ("-O1", "-std=gnu11", "-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC")
NAME = "libdsv4lab_sim_core.so"
CHOICE = "DSV4LAB_SIM_CORE"  # environment: "numpy" or "native"
CORES = ("native", "numpy")


def path() -> Path:
    """Where the library of this source belongs; it need not exist yet."""
    return shim.place(NAME, (*SOURCES, *HEADERS), FLAGS)


@cache
def load() -> ctypes.PyDLL:
    """The library, built if need be. Raises ShimError where that cannot be done."""
    library = ctypes.PyDLL(str(shim.build_at(path(), SOURCES, FLAGS, ("-lm",))))
    library.native_find.argtypes = [ctypes.c_char_p]
    library.native_find.restype = ctypes.c_uint64
    library.native_name.argtypes = [ctypes.c_int64]
    library.native_name.restype = ctypes.c_char_p
    library.native_step_bytes.restype = ctypes.c_uint64
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.native_run.argtypes = [
        pointer,
        integer,
        integer,
        integer,
        pointer,
        pointer,
        ctypes.c_int,
        ctypes.c_int,
        pointer,
    ]
    library.native_run.restype = ctypes.c_int
    library.native_tensor_sums.argtypes = [pointer] * 8 + [integer] * 8 + [ctypes.c_int]
    library.native_tensor_sums.restype = ctypes.c_int
    return library


@cache
def find(name: str) -> int:
    """The address of an operation; 0 if there is none of that name."""
    return int(load().native_find(name.encode()))


def names() -> list[str]:
    """Every operation."""
    library = load()
    found: list[str] = []
    while (name := library.native_name(len(found))) is not None:
        found.append(name.decode())
    return found


def choose(core: str | None = None) -> str:
    """The core to use: the one asked for, else the one that the environment names, else native where it can be built."""
    wanted = core or os.environ.get(CHOICE)
    if wanted is not None:
        if wanted not in CORES:
            raise ValueError(f"the simulator's core must be native or numpy, got {wanted!r}")
        if wanted == "native":
            load()
        return wanted
    return "native" if _can_be_built() else "numpy"


@cache
def _can_be_built() -> bool:
    """Asked once: a build that fails takes seconds, and the tensor core's sums ask for every product."""
    try:
        load()
    except shim.ShimError:
        return False
    return True
