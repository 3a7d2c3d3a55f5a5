"""Single instructions that CuTeDSL has no name for. Addresses of shared memory are 32 bits wide, others 64."""

from typing import Any

import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32


def load_or_zeros(address: Any, wanted: Any, words: int) -> tuple[Any, ...]:
    """2 or 4 words of global memory that no running kernel writes, past the first-level cache; zeros where not wanted."""
    targets = ", ".join(f"{{$w{i}}}" for i in range(words))
    zeros = " ".join(f"mov.b32 {{$w{i}}}, 0;" for i in range(words))
    code = (
        f"{{ .reg .pred wanted; setp.ne.b32 wanted, {{$r1}}, 0; {zeros} "
        f"@wanted ld.global.L1::no_allocate.v{words}.b32 {{{targets}}}, [{{$r0}}]; }}"
    )
    found: tuple[Any, ...] = cute.arch.inline_ptx(code, write_only_types=[Uint32] * words, read_only_args=[address, wanted])
    return found


def store_byte(address: Any, value: Any) -> None:
    """The low byte of a word to shared memory."""
    code = "{ .reg .b16 low; cvt.u16.u32 low, {$r1}; st.shared.u8 [{$r0}], low; }"
    cute.arch.inline_ptx(code, read_only_args=[address, value])


def store_word(address: Any, value: Any) -> None:
    """A word to shared memory."""
    cute.arch.inline_ptx("st.shared.b32 [{$r0}], {$r1};", read_only_args=[address, value])


def to_peer(address: Any, rank: Any) -> Any:
    """How far it is from a place of this CTA's shared memory to the same place of CTA `rank`'s of the cluster."""
    code = "{ .reg .b32 there; mapa.shared::cluster.u32 there, {$r0}, {$r1}; sub.s32 {$w0}, there, {$r0}; }"
    return cute.arch.inline_ptx(code, write_only_types=[Int32], read_only_args=[address, rank])


def send(target: Any, words: Any, barrier: Any) -> None:
    """1 or 4 words to another CTA's shared memory, whose mbarrier counts the bytes when they are there."""
    values = ", ".join(f"{{$r{2 + i}}}" for i in range(len(words)))
    form, values = (".b32", values) if len(words) == 1 else (f".v{len(words)}.b32", f"{{{values}}}")
    code = f"st.async.shared::cluster.mbarrier::complete_tx::bytes{form} [{{$r0}}], {values}, [{{$r1}}];"
    cute.arch.inline_ptx(code, read_only_args=[target, barrier, *words])


def arrive_there(barrier: Any) -> None:
    """An arrival at another CTA's mbarrier. It hands over no data that this thread wrote, so its scope does not matter."""
    cute.arch.inline_ptx("mbarrier.arrive.shared::cluster.b64 _, [{$r0}];", read_only_args=[barrier])


def load_pair(address: Any) -> tuple[Any, Any]:
    """Two words of shared memory."""
    code = "ld.shared.v2.b32 {{$w0}, {$w1}}, [{$r0}];"
    low, high = cute.arch.inline_ptx(code, write_only_types=[Uint32] * 2, read_only_args=[address])
    return low, high


def load_word(address: Any) -> Any:
    """A word of shared memory."""
    return cute.arch.inline_ptx("ld.shared.b32 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[address])


def load_float(address: Any) -> Any:
    """A float of shared memory."""
    return cute.arch.inline_ptx("ld.shared.f32 {$w0}, [{$r0}];", write_only_types=[Float32], read_only_args=[address])


def permute(a: Any, b: Any, selector: Any) -> Any:
    """Bytes of a (0 to 3) and b (4 to 7) by the selector's nibbles; a nibble's top bit spreads the byte's sign."""
    code = "prmt.b32 {$w0}, {$r0}, {$r1}, {$r2};"
    return cute.arch.inline_ptx(code, write_only_types=[Uint32], read_only_args=[a, b, Uint32(selector)])
