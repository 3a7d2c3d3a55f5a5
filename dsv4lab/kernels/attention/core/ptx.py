"""Single instructions that CuTeDSL has no name for. Addresses of shared memory are 32 bits wide, others 64."""

from typing import Any

import cutlass.cute as cute
from cutlass import Int32, Uint32


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


def store_global(address: Any, words: Any) -> None:
    """Two words to global memory."""
    cute.arch.inline_ptx("st.global.v2.b32 [{$r0}], {{$r1}, {$r2}};", read_only_args=[address, *words])


def load_pair(address: Any) -> tuple[Any, Any]:
    """Two words of shared memory."""
    code = "ld.shared.v2.b32 {{$w0}, {$w1}}, [{$r0}];"
    low, high = cute.arch.inline_ptx(code, write_only_types=[Uint32] * 2, read_only_args=[address])
    return low, high


def load_word(address: Any) -> Any:
    """A word of shared memory."""
    return cute.arch.inline_ptx("ld.shared.b32 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[address])


def permute(a: Any, b: Any, selector: Any) -> Any:
    """Bytes of a (0 to 3) and b (4 to 7) by the selector's nibbles; a nibble's top bit spreads the byte's sign."""
    code = "prmt.b32 {$w0}, {$r0}, {$r1}, {$r2};"
    return cute.arch.inline_ptx(code, write_only_types=[Uint32], read_only_args=[a, b, Uint32(selector)])
