"""Safetensors files, read with distrust: headers, shards and byte ranges.

A file is 8 bytes of header length (little endian), a JSON header {name: {dtype, shape, data_offsets}}, and the data that the
offsets cover without gaps or overlaps. Nothing is mapped or allocated before the header agrees with the file's size. All
findings are collected as lines for one CheckpointError. Source: the safetensors file format.
"""

from __future__ import annotations

import json
import math
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsv4lab.model.checkpoint.inventory import ITEM_BYTES, CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
SUFFIX = ".safetensors"

_MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own reader
_MAX_NAME = 300  # characters of a name quoted in a message
_KNOWN_BYTES = ITEM_BYTES | {"F64": 8, "F16": 2, "F8_E5M2": 1, "U16": 2, "I16": 2, "U32": 4, "U64": 8, "BOOL": 1}
_NUMBERED = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors$")
_TORCH_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}
DTYPE_NAMES = {dtype: name for name, dtype in _TORCH_DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A contiguous tensor inside a file."""

    path: Path
    name: str  # as the file spells it
    dtype: str
    shape: tuple[int, ...]
    start: int  # absolute byte offset

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _KNOWN_BYTES[self.dtype]

    def part(self, first: int, shape: tuple[int, ...]) -> StoredTensor:
        """The contiguous piece of `shape` that begins at element `first`."""
        start = self.start + first * _KNOWN_BYTES[self.dtype]
        return StoredTensor(self.path, self.name, self.dtype, shape, start)

    def read(self) -> torch.Tensor:
        """The tensor, bytes unchanged. Raises CheckpointError when the file changed or broke since its header was read."""
        buffer = torch.empty(self.nbytes, dtype=torch.uint8)
        view = buffer.numpy().data
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.start)
                done = 0
                while done < len(view):
                    count = file.readinto(view[done:])
                    if not count:
                        raise CheckpointError(self.path, [f"{self.name}: file ends at byte {self.start + done} of its data"])
                    done += count
        except OSError as error:
            raise CheckpointError(self.path, [f"{self.name}: not readable ({error.strerror})"]) from None
        return buffer.view(_TORCH_DTYPES[self.dtype]).reshape(self.shape)


def find_shards(directory: Path, problems: list[str]) -> tuple[list[Path], dict[str, str] | None]:
    """The weight files of a directory, and the index's tensor -> file map (None without an index).

    Files that cannot be used are left out and described in `problems`.
    """
    index_path = directory / INDEX_NAME
    if index_path.exists() or index_path.is_symlink():
        weight_map = _read_index(index_path, problems)
        names = sorted(set(weight_map.values()))
        usable = [directory / name for name in names if _is_usable(directory, name, problems)]
        return usable, weight_map
    names = sorted(p.name for p in directory.glob(f"*{SUFFIX}")) if directory.is_dir() else []
    if not names:
        problems.append(f"no {INDEX_NAME} and no *{SUFFIX} file in the directory")
    problems.extend(_missing_numbers(names))
    return [directory / name for name in names if _is_usable(directory, name, problems)], None


def read_header(path: Path, problems: list[str]) -> dict[str, StoredTensor] | None:
    """The tensors of one file by the file's own names; None when the file cannot be used, which `problems` then says."""
    found: list[str] = []
    tensors: dict[str, StoredTensor] = {}
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
                problems.append(f"{path.name}: truncated or damaged: header of {length} bytes in a file of {size}")
                return None
            header = parse_json(file.read(length))
    except OSError as error:
        problems.append(f"{path.name}: not readable ({error.strerror})")
        return None
    except (ValueError, RecursionError) as error:
        problems.append(f"{path.name}: unreadable header ({_short(error)})")
        return None
    if not isinstance(header, dict):
        problems.append(f"{path.name}: header must be a JSON object, got {type(header).__name__}")
        return None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        found.append(f"{path.name}: __metadata__ must map strings to strings")
    data_start = 8 + length
    for name, entry in header.items():
        rule = _entry_fault(entry)
        if rule is not None:
            found.append(f"{path.name}: {_short(name)}: {rule}")
            continue
        shape = tuple(entry["shape"])
        tensors[name] = StoredTensor(path, name, entry["dtype"], shape, data_start + entry["data_offsets"][0])
    if not found:  # gaps mean nothing while entries are missing
        found.extend(_coverage_faults(path, list(tensors.values()), data_start, size))
    problems.extend(found)
    return None if found else tensors


def parse_json(data: bytes | str) -> Any:
    """json.loads that refuses duplicate keys. Raises ValueError or RecursionError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            seen: set[str] = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            raise ValueError(f"key {_short(twice)!r} appears twice")
        return out

    return json.loads(data, object_pairs_hook=unique)


def allowed_roots(directory: Path) -> list[Path]:
    """The directory itself and, for a hub download (.../snapshots/<revision>), the blobs that its links point to."""
    root = directory.resolve()
    return [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]


# ---- private ---------------------------------------------------------------------------------------------------------
def _read_index(path: Path, problems: list[str]) -> dict[str, str]:
    """The index's weight_map; entries that are not name -> file name are reported and dropped."""
    try:
        if not path.is_file():
            raise ValueError("not a regular file")
        if path.stat().st_size > _MAX_HEADER_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes")
        index = parse_json(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path.name}: unreadable ({_short(error)})")
        return {}
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        problems.append(f"{path.name}: weight_map must be a non-empty object, got {_short(weight_map)}")
        return {}
    out: dict[str, str] = {}
    for name, target in weight_map.items():
        if isinstance(target, str):
            out[name] = target
        else:
            problems.append(f"{path.name}: {_short(name)}: file must be a string, got {_short(target)}")
    return out


def _is_usable(directory: Path, name: str, problems: list[str]) -> bool:
    """Whether a file named by the index or found in the directory is a plain weight file of this checkpoint."""
    unsafe = not name or name in (".", "..") or any(c in name for c in "/\\\0") or not name.isprintable() or len(name) > 255
    if unsafe or not name.endswith(SUFFIX):
        problems.append(f"{_short(name)!r}: unsafe file name in {INDEX_NAME}: must be a plain *{SUFFIX} name without a path")
        return False
    path = directory / name
    try:
        resolved = path.resolve(strict=True)
        mode = resolved.stat().st_mode
    except (OSError, RuntimeError):
        problems.append(f"{name}: missing shard")
        return False
    if not any(resolved.is_relative_to(root) for root in allowed_roots(directory)):
        problems.append(f"{name}: unsafe path: links outside the checkpoint directory, to {resolved}")
        return False
    if not stat.S_ISREG(mode):
        problems.append(f"{name}: not a regular file")
        return False
    return True


def _missing_numbers(names: list[str]) -> list[str]:
    """Shards that numbered file names promise and the directory lacks."""
    matches = [m for m in map(_NUMBERED.match, names) if m]
    series = {(m["stem"], m["count"]) for m in matches}
    out: list[str] = []
    for stem, count in sorted(series):
        have = {int(m["number"]) for m in matches if (m["stem"], m["count"]) == (stem, count)}
        lacking = [n for n in range(1, int(count) + 1) if n not in have]
        out.extend(f"{stem}-{n:05d}-of-{count}{SUFFIX}: missing shard" for n in lacking)
    return out


def _entry_fault(entry: Any) -> str | None:
    """The broken rule of one header entry, or None."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return f"header entry must have dtype, shape and data_offsets, got {_short(entry)}"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _KNOWN_BYTES:
        return f"unknown dtype {_short(dtype)}"
    if not isinstance(shape, list) or len(shape) > 8 or not all(_is_count(n) for n in shape):
        return f"shape must list at most 8 counts, got {_short(shape)}"
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(n) for n in offsets):
        return f"data_offsets must be two counts, got {_short(offsets)}"
    nbytes = math.prod(shape) * _KNOWN_BYTES[dtype]
    if offsets[1] - offsets[0] != nbytes:
        return f"data_offsets {offsets} must span the {nbytes} bytes of {dtype} {shape}"
    return None


def _coverage_faults(path: Path, tensors: list[StoredTensor], start: int, size: int) -> list[str]:
    """Overlaps, gaps, and data that the file does not have or no tensor claims."""
    out = []
    at = start
    for t in sorted(tensors, key=lambda t: (t.start, t.nbytes)):
        if t.start != at:
            what = "overlaps the tensor before it" if t.start < at else "leaves a gap before it"
            out.append(f"{path.name}: {_short(t.name)}: data at byte {t.start - start} {what}")
        at = max(at, t.start + t.nbytes)
        if at > size:
            out.append(f"{path.name}: {_short(t.name)}: truncated file: data ends at byte {at}, the file has {size}")
            return out
    if at < size and not out:
        out.append(f"{path.name}: {size - at} bytes at the end belong to no tensor")
    return out


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= _MAX_NAME else text[:_MAX_NAME] + "..."
