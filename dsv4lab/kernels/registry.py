"""Which kernels there are: for each an operation, an architecture, a function in the operator's form, and what it refuses.

Importing this module imports no CuTeDSL; that happens when a kernel is first called.
"""

from __future__ import annotations

from dsv4lab.kernels.attention import operators as _attention
from dsv4lab.kernels.cache import operators as _cache
from dsv4lab.kernels.compressor import operators as _compressor
from dsv4lab.kernels.entry import Entry
from dsv4lab.kernels.gemm import operators as _gemm
from dsv4lab.kernels.head import operators as _head
from dsv4lab.kernels.indexer import operators as _indexer
from dsv4lab.kernels.indexer.query import operators as _index_query
from dsv4lab.kernels.mhc import operators as _mhc
from dsv4lab.kernels.moe import operators as _moe
from dsv4lab.kernels.quant import operators as _quant
from dsv4lab.kernels.rope import operators as _rope

KERNELS: tuple[Entry, ...] = (
    *_quant.ENTRIES,
    *_gemm.ENTRIES,
    *_moe.ENTRIES,
    *_rope.ENTRIES,
    *_cache.ENTRIES,
    *_index_query.ENTRIES,
    *_indexer.ENTRIES,
    *_compressor.ENTRIES,
    *_attention.ENTRIES,
    *_mhc.ENTRIES,
    *_head.ENTRIES,
)
