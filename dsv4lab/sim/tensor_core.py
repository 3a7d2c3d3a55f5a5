"""What Blackwell's tensor core was told and what it read: an observer that keeps every tcgen05.mma of a launch, decoded.

seen = sim.TensorCore(snapshots=8)
with sim.simulating("sm_100a", observers=[seen]):
    ...
print(seen.products[0])
seen.products[0].a_tile                 # (rows, bytes) as the descriptor finds them in shared memory
seen.products[7].tmem                   # (128, 512) 32-bit cells after the eighth product
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dsv4lab.sim import operands
from dsv4lab.sim.layouts import MatrixDescriptor, decode_descriptor, operand_index
from dsv4lab.sim.observe import Observer

if TYPE_CHECKING:
    from dsv4lab.sim.handlers.tensor_mma import Descriptor, Product
    from dsv4lab.sim.observe import Operation
    from dsv4lab.sim.state import Cta

SWIZZLES = ("none", "32 bytes", "64 bytes", "128 bytes")


@dataclass(frozen=True)
class IssuedProduct:
    """One tcgen05.mma of one CTA with A in shared memory.

    serial: place among the launch's asynchronous operations; cta: its rank in the cluster. shape: the instruction descriptor.
    a, b: matrix descriptors; a_bits, b_bits: the same as the 64 bits they are. accumulator, a_scale, b_scale: TMEM columns at
    which D and the scale factors begin (scales -1 where there are none). accumulate: whether D is added to, not overwritten.
    a_tile, b_tile: (rows, bytes) u8, the operands as read. tmem: cells after the product, None where no snapshot was asked for.
    """

    serial: int
    cta: int
    shape: Descriptor
    a: MatrixDescriptor
    b: MatrixDescriptor
    a_bits: int
    b_bits: int
    accumulator: int
    a_scale: int
    b_scale: int
    accumulate: bool
    a_tile: NDArray[np.uint8]
    b_tile: NDArray[np.uint8]
    tmem: NDArray[np.uint32] | None

    def __str__(self) -> str:
        f = self.shape
        lines = [
            f"{f.m} x {f.n} x {f.k}, A {f.a}, B {f.b}" + (f", scales {f.scales}" if self.a_scale >= 0 else ""),
            f"  D  TMEM columns {self.accumulator} to {self.accumulator + f.n - 1}, {'+=' if self.accumulate else '='}",
        ]
        for name, bits, d in (("A", self.a_bits, self.a), ("B", self.b_bits, self.b)):
            lines.append(
                f"  {name}  0x{bits:016x}: start {d.start:#x}, leading {d.leading} bytes, stride {d.stride} bytes, "
                f"swizzle {SWIZZLES[d.mode]}"
            )
        if self.a_scale >= 0:
            lines.append(f"  scales of A from TMEM column {self.a_scale}, of B from {self.b_scale}")
        return "\n".join(lines)


class TensorCore(Observer):
    """Collects `products`. snapshots: after how many of the first ones TMEM is copied (256 KiB each)."""

    def __init__(self, snapshots: int = 0) -> None:
        self.snapshots = snapshots
        self.products: list[IssuedProduct] = []

    def performed(self, operation: Operation) -> None:
        if operation.kind == "tcgen05.mma":
            product: Product = operation.performer  # type: ignore[assignment]
            if not product.a_in_tmem and not product.pair:
                self._keep(operation.serial, product)

    def _keep(self, serial: int, product: Product) -> None:
        form, scaled = product.form, product.vector > 0
        a, b = decode_descriptor(product.a, True), decode_descriptor(product.b, True)
        copied = product.cta.tensor.cells.copy() if len(self.products) < self.snapshots else None
        self.products.append(
            IssuedProduct(
                serial=serial,
                cta=product.cta.rank,
                shape=form,
                a=a,
                b=b,
                a_bits=product.a,
                b_bits=product.b,
                accumulator=product.to & 0xFFFF,
                a_scale=product.scale_a & 0xFFFF if scaled else -1,
                b_scale=product.scale_b & 0xFFFF if scaled else -1,
                accumulate=product.accumulate,
                a_tile=_tile(product.cta, a, form.m, form.k * operands.BITS[form.a] // 8),
                b_tile=_tile(product.cta, b, form.n, form.k * operands.BITS[form.b] // 8),
                tmem=copied,
            )
        )


def _tile(cta: Cta, descriptor: MatrixDescriptor, rows: int, row_bytes: int) -> NDArray[np.uint8]:
    """A K-major operand's bytes, without telling observers of a read."""
    return cta.shared.data[operand_index(descriptor, rows, row_bytes) + descriptor.start]
