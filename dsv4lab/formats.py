"""Number formats as frozen descriptors, and the packed containers that carry them.

One descriptor a format; nothing else re-derives a block size or a scale dtype. A weight is a `PackedWeight`: the bytes of
the checkpoint, untouched, with the descriptor that says how to read them. Arithmetic on them lives in `reference.quant`
and in the kernels.

Directions: `global_scale` is the decode factor, x = code * block_scale * global_scale. Codes of 4-bit formats are packed
two a byte along K, the even element in the low nibble. Block scales are stored in one of two layouts: `linear`, a matrix
(rows, K blocks) in row-major order, as in every checkpoint, or `atom128x4`, the tiles that Blackwell's block-scaled tensor
cores read. Source: the model specification, sections 8 and 11.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

E2M1_MAX = 6.0
E4M3_MAX = 448.0
E8M0_BIAS = 127


@dataclass(frozen=True)
class Format:
    """How one kind of weight or activation is stored.

    block: (rows, columns) that share a scale, columns along K; None for formats without scales.
    """

    name: str
    code_dtype: torch.dtype
    codes_per_byte: int  # 2 for packed 4-bit codes, 1 where a code is one tensor element
    block: tuple[int, int] | None
    scale_dtype: torch.dtype | None
    max_code: float  # largest magnitude a code represents
    has_global_scale: bool = False

    @property
    def block_shape(self) -> tuple[int, int]:
        """`block` of a format that has scales. Raises ValueError for one without."""
        if self.block is None:
            raise ValueError(f"format must have block scales, got {self.name!r}")
        return self.block

    @property
    def group(self) -> int:
        """Consecutive values along K that share a scale. Raises ValueError for a format without scales."""
        return self.block_shape[1]

    def code_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Stored shape of the codes of a (rows, columns) matrix."""
        return rows, columns // self.codes_per_byte

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int] | None:
        """Stored shape of the block scales; partial blocks have a scale of their own."""
        if self.block is None:
            return None
        return -(-rows // self.block[0]), -(-columns // self.block[1])


NVFP4 = Format("nvfp4", torch.uint8, 2, (1, 16), torch.float8_e4m3fn, E2M1_MAX, has_global_scale=True)
MXFP4 = Format("mxfp4", torch.uint8, 2, (1, 32), torch.float8_e8m0fnu, E2M1_MAX)
FP8_BLOCK = Format("fp8_block", torch.float8_e4m3fn, 1, (128, 128), torch.float8_e8m0fnu, E4M3_MAX)
FP8_ROW = Format("fp8_row", torch.float8_e4m3fn, 1, (1, 128), torch.float8_e8m0fnu, E4M3_MAX)
BF16 = Format("bf16", torch.bfloat16, 1, None, None, torch.finfo(torch.bfloat16).max)
F32 = Format("f32", torch.float32, 1, None, None, torch.finfo(torch.float32).max)

# Scales that are read besides E8M0: its bytes, and floats, as the Base releases have them.
_FP8_SCALES = (torch.uint8, torch.float32, torch.bfloat16)
_OTHER_SCALES = {"mxfp4": (torch.uint8,), "fp8_block": _FP8_SCALES, "fp8_row": _FP8_SCALES}

FORMATS = {f.name: f for f in (NVFP4, MXFP4, FP8_BLOCK, FP8_ROW, BF16, F32)}


def get_format(name: str) -> Format:
    """The descriptor of a format name. Raises ValueError naming the known ones."""
    if name not in FORMATS:
        raise ValueError(f"format must be one of {sorted(FORMATS)}, got {name!r}")
    return FORMATS[name]


@dataclass
class PackedWeight:
    """One weight matrix (rows, columns), or a stack of them with leading dims, as stored.

    codes (..., rows, columns / codes_per_byte); scale (..., scale_shape) or None; global_scale (...) f32, decode
    direction, or None; input_scale (...) f32, the static activation global scale of NVFP4, or None.
    """

    format: Format
    codes: torch.Tensor
    scale: torch.Tensor | None = None
    global_scale: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape, unpacked."""
        return *self.codes.shape[:-1], self.codes.shape[-1] * self.format.codes_per_byte

    @property
    def nbytes(self) -> int:
        """Stored bytes, scales included."""
        return sum(t.nbytes for t in self.tensors().values())

    def check(self) -> None:
        """Raises ValueError on a part that is missing, too much or of another shape, TypeError on dtypes. Reads no values."""
        form, packed = self.format, self.format.codes_per_byte > 1
        if self.codes.dtype != form.code_dtype and not (packed and self.codes.dtype == torch.int8):
            raise TypeError(f"codes of a {form.name} weight must be {form.code_dtype}, got {self.codes.dtype}")
        if self.codes.dim() < 2 or (packed and self.shape[-1] % form.group):
            rule = f" with K % {form.group} == 0" if packed else ""
            raise ValueError(f"a {form.name} weight must be (..., N, K){rule}, got {self.shape}")
        *stack, n, k = self.shape
        blocks, one = form.scale_shape(n, k), (*stack,)
        for part, value, shape in (
            ("scale", self.scale, None if blocks is None else (*stack, *blocks)),
            ("global_scale", self.global_scale, one if form.has_global_scale else None),
            ("input_scale", self.input_scale, None if self.input_scale is None else one),
        ):
            if value is None and shape is None:
                continue
            if value is None or shape is None:
                have = f"a {part}, got None" if value is None else f"no {part}, got one"
                raise ValueError(f"a {form.name} weight must have {have}")
            want = form.scale_dtype if part == "scale" else torch.float32
            if value.dtype != want and not (part == "scale" and value.dtype in _OTHER_SCALES.get(form.name, ())):
                raise TypeError(f"{part} of a {form.name} weight must be {want}, got {value.dtype}")
            if value.shape != shape:
                raise ValueError(f"{part} of a {self.shape} {form.name} weight must be {shape}, got {tuple(value.shape)}")

    def check_input(self) -> None:
        """`check`, where input_scale is no such weight's: for each call; the rest is checked where it is prepared."""
        scale = self.input_scale
        if scale is not None and (scale.dtype != torch.float32 or scale.shape != self.codes.shape[:-2]):
            self.check()

    def __getitem__(self, index: int) -> PackedWeight:
        """One matrix of a stack."""
        return PackedWeight(self.format, **{name: t[index] for name, t in self.tensors().items()})

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same bytes on another device."""
        return PackedWeight(self.format, **{name: t.to(device) for name, t in self.tensors().items()})

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors present, by field name."""
        parts = {"codes": self.codes, "scale": self.scale, "global_scale": self.global_scale, "input_scale": self.input_scale}
        return {name: t for name, t in parts.items() if t is not None}


def weights_of(fmts: str, *parts: list[torch.Tensor]) -> list[PackedWeight]:
    """Weights from lists of their parts (codes, scales, ...), as operators take them; a missing part is an empty tensor.

    fmts: the formats' names, commas between. Raises as `PackedWeight.check_input`.
    """
    columns = [[t if t.numel() else None for t in part] for part in parts[1:]]
    found = [PackedWeight(get_format(name), parts[0][i], *(c[i] for c in columns)) for i, name in enumerate(fmts.split(","))]
    for weight in found:
        weight.check_input()
    return found


# ---- scale layout atom128x4 ------------------------------------------------------------------------------------------
ATOM_ROWS, ATOM_COLUMNS = 128, 4  # scales of one tile: 128 rows by 4 consecutive K blocks, 512 bytes


def atom128x4_offset(row: int, column: int, num_columns: int) -> int:
    """Byte offset of scale (row, column) of a linear (rows, num_columns) scale matrix in its atom128x4 form."""
    tile = (row // ATOM_ROWS) * -(-num_columns // ATOM_COLUMNS) + column // ATOM_COLUMNS
    r, c = row % ATOM_ROWS, column % ATOM_COLUMNS
    return tile * ATOM_ROWS * ATOM_COLUMNS + (r % 32) * 16 + (r // 32) * 4 + c


def to_atom128x4(scale: torch.Tensor) -> torch.Tensor:
    """Linear block scales -> the tensor core's tiles.

    scale (..., rows, columns), a one-byte dtype -> (..., ceil(rows/128), ceil(columns/4), 512), contiguous, same dtype. Rows
    and columns added to fill the tiles are zero bytes. Raises TypeError on wider dtypes.
    """
    if scale.element_size() != 1:
        raise TypeError(f"scale must have a one-byte dtype for atom128x4, got {scale.dtype}")
    rows, columns = scale.shape[-2:]
    row_tiles, column_tiles = -(-rows // ATOM_ROWS), -(-columns // ATOM_COLUMNS)
    raw = torch.nn.functional.pad(scale.view(torch.uint8), (0, -columns % ATOM_COLUMNS, 0, -rows % ATOM_ROWS))
    tiles = raw.unflatten(-1, (column_tiles, ATOM_COLUMNS)).unflatten(-3, (row_tiles, 4, 32))
    # (..., row tile, r // 32, r % 32, column tile, c)
    tiles = tiles.movedim(-2, -4).transpose(-3, -2)  # (..., row tile, column tile, r % 32, r // 32, c)
    return tiles.contiguous().flatten(-3).view(scale.dtype)


def from_atom128x4(tiles: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The inverse of `to_atom128x4`: (..., row tiles, column tiles, 512) -> linear (..., rows, columns), contiguous.

    Raises ValueError when the tiles are not those of a (rows, columns) matrix.
    """
    want = (-(-rows // ATOM_ROWS), -(-columns // ATOM_COLUMNS), ATOM_ROWS * ATOM_COLUMNS)
    if tuple(tiles.shape[-3:]) != want:
        raise ValueError(f"tiles of a {rows}x{columns} scale must have shape (..., {want}), got {tuple(tiles.shape)}")
    raw = tiles.view(torch.uint8).unflatten(-1, (32, 4, ATOM_COLUMNS)).transpose(-3, -2).movedim(-4, -2)
    raw = raw.flatten(-2).flatten(-4, -2)
    return raw[..., :rows, :columns].contiguous().view(tiles.dtype)
