"""The CuTeDSL kernel around a group's PTX. Importing this module imports CuTeDSL, which reads its annotations as objects."""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass._mlir.dialects import llvm
from cutlass.memory import SmemAllocator


def host_function(text: str, *, blocks: int, threads: int, cluster: int, shared: int, **more: Any) -> Any:
    """A host function of two byte tensors; in `text`, $0 and $1 are their addresses and $2 that of `shared` bytes."""

    @cute.kernel
    def device(source: cute.Tensor, target: cute.Tensor):
        place = SmemAllocator().allocate_array(cutlass.Uint8, max(shared, 16), byte_alignment=1024)
        operands = [pointer.toint().ir_value() for pointer in (source.iterator, target.iterator, place)]
        dialect = llvm.AsmDialect.AD_ATT
        llvm.inline_asm(None, operands, text, "l,l,r", has_side_effects=True, is_align_stack=False, asm_dialect=dialect)

    @cute.jit
    def launch(source: cute.Tensor, target: cute.Tensor):
        device(source, target).launch(grid=[blocks, 1, 1], block=[threads, 1, 1], cluster=[cluster, 1, 1], **more)

    return launch
