"""Which kernels there are: for each an operation, an architecture, a function in the operator's form, and what it refuses.

Importing this module imports no CuTeDSL; that happens when a kernel is first called.
"""

from __future__ import annotations

from dsv4lab.kernels.entry import Entry
from dsv4lab.kernels.gemm import operators as _gemm
from dsv4lab.kernels.moe import operators as _moe
from dsv4lab.kernels.quant import operators as _quant

KERNELS: tuple[Entry, ...] = (*_quant.ENTRIES, *_gemm.ENTRIES, *_moe.ENTRIES)
