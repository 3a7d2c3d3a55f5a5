"""Instruction handlers, by family. Importing a module registers its families with the decoder."""

from __future__ import annotations

from importlib import import_module

MODULES = (
    "control",
    "printing",
    "alu",
    "integer",
    "floating",
    "convert",
    "loadstore",
    "collective",
    "barrier",
    "copy",
    "wgmma",
    "mma",
    "tensor",
)


def load() -> None:
    """Register every family."""
    for name in MODULES:
        import_module(f"{__name__}.{name}")
