"""What a kernel that stores keys must know of them at compile time. Imports no CuTeDSL."""

from __future__ import annotations

from dataclasses import dataclass

from dsv4lab.records import INDEX_RECORDS, KV_RECORDS, Record, index_record, kv_record

WARP = 32
ROPE_DIM = 64  # a warp turns a pair a lane
INDEX_DIM = 128
MAX_SLOTS = 2**31  # of a pool: a slot is 32 bits wide on the device
_WIDTH = {"kv": 16, "index": 4}  # consecutive dims of a key that a lane holds
_MIN_DIM, _MAX_DIM = ROPE_DIM + _WIDTH["kv"], WARP * _WIDTH["kv"]
_BYTES = {"bf16": 2, "f32": 4}


@dataclass(frozen=True)
class KeyPlan:
    """kind: "kv" (window keys and compressed entries) or "index". record: of `dsv4lab.records`. dim: of a key.
    element: what keys are rounded to between norm, rotation and storage, the input's dtype in the reference, "bf16" or "f32".
    weight: the norm weight's element. stored: a plain pool's element, "u8" for the packed records.
    """

    kind: str
    record: str
    dim: int
    page_size: int
    element: str = "bf16"
    weight: str = "bf16"
    stored: str = "u8"

    @property
    def width(self) -> int:
        """Consecutive dims of a lane."""
        return _WIDTH[self.kind]

    @property
    def words(self) -> int:
        """32-bit words that those take as `element`."""
        return self.width // 2 if self.element == "bf16" else self.width

    @property
    def lanes(self) -> int:
        """Lanes that hold dims at all."""
        return self.dim // self.width

    @property
    def nope_lanes(self) -> int:
        """Lanes that hold dims which are not rotary; those that hold rotary ones follow."""
        return (self.dim - ROPE_DIM) // self.width

    @property
    def layout(self) -> Record:
        """Bytes of a record; a plain one has no scales and no padding."""
        if self.record == "plain":
            return Record(self.dim * _BYTES[self.stored], 0, page_align=1)
        return kv_record(self.dim, ROPE_DIM, self.record) if self.kind == "kv" else index_record(self.record, self.dim)

    @property
    def page_bytes(self) -> int:
        return self.layout.page_bytes(self.page_size)

    def check(self) -> None:
        """Raises ValueError naming the choice that cannot be."""
        if self.kind not in _WIDTH:
            raise ValueError(f"kind must be kv or index, got {self.kind!r}")
        records = KV_RECORDS if self.kind == "kv" else INDEX_RECORDS
        if self.record not in records:
            raise ValueError(f"{self.kind} record must be one of {records}, got {self.record!r}")
        why = refuse_dim(self.kind, self.dim)
        if why is not None:
            raise ValueError(why)
        if self.page_size < 1:
            raise ValueError(f"page_size must be positive, got {self.page_size}")
        if self.element not in _BYTES or self.weight not in _BYTES:
            raise ValueError(f"element and weight must be bf16 or f32, got {self.element!r} and {self.weight!r}")
        if (self.stored in _BYTES) != (self.record == "plain") or self.stored not in (*_BYTES, "u8"):
            raise ValueError(f"stored must be bf16 or f32 for plain records, else u8, got {self.stored!r} for {self.record!r}")


def refuse_dim(kind: str, dim: int) -> str | None:
    """Why a warp cannot hold keys of this size; None where it can."""
    if kind == "index":
        return None if dim == INDEX_DIM else f"index keys must have {INDEX_DIM} dims, got {dim}"
    if dim % _WIDTH["kv"] or not _MIN_DIM <= dim <= _MAX_DIM:
        return f"keys must have a multiple of {_WIDTH['kv']} dims from {_MIN_DIM} to {_MAX_DIM}, got {dim}"
    return None
