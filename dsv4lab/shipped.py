"""The checkpoint that comes with the package: one compressed archive, unpacked into the user's cache at its first use.

The repository's size is limited, and the archive is 36 % smaller than the files. What is unpacked is a checkpoint directory
like any other, named after the archive's digest; it appears whole or not at all. A list of sizes beside it tells of files that
were lost or cut since, which are put back.

Weights are noise but for their exponents. So eight bits of each value, the exponent's lower five and the mantissa's first three
where it has more, are bytes of their own; the others lie bit by bit, so that LZMA finds those that are always 0.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from dsv4lab.kernels._common.cache import folder as kernels_folder

NANO = Path(__file__).parent / "data" / "nano.tar.xz"
_SPLIT = ".split"  # ends the names of weight files in an archive
_DTYPES = {"F32": (4, 20), "BF16": (2, 4), "F8_E4M3": (1, 0), "I8": (1, 0)}  # bytes of a value, first of its eight bits
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 0, "pb": 0}]


def pack(source: Path, archive: Path) -> None:
    """Write all files of a flat folder into an archive, replacing it in one step. Equal files give equal bytes."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path in sorted(source.iterdir()):
            data, name = path.read_bytes(), path.name
            if path.suffix == ".safetensors":
                data, name = _split(data), name + _SPLIT
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    scratch = archive.with_name(archive.name + ".new")
    scratch.write_bytes(lzma.compress(plain.getvalue(), filters=_FILTERS))
    scratch.replace(archive)


@cache
def unpacked(archive: Path) -> Path:
    """The archive's folder in the cache, made there first if need be. Raises OSError, naming the file, on a damaged archive."""
    packed = archive.read_bytes()
    target = kernels_folder().parent / f"{archive.name.partition('.')[0]}-{hashlib.sha256(packed).hexdigest()[:16]}"
    listed = target.with_name(f"{target.name}.json")
    with suppress(OSError, ValueError, AttributeError):  # the first time there is no list
        if json.loads(listed.read_bytes()).items() <= _sizes(target).items():
            return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        with tarfile.open(fileobj=io.BytesIO(lzma.decompress(packed))) as tar:
            for entry in tar:
                file = tar.extractfile(entry)
                assert file is not None and Path(entry.name).name == entry.name  # `pack` writes plain files only
                data = file.read()
                whole = _joined(data) if entry.name.endswith(_SPLIT) else data
                (scratch / entry.name.removesuffix(_SPLIT)).write_bytes(whole)
        sizes = _sizes(scratch)
        scratch.chmod(0o755)
        try:
            scratch.rename(target)
        except OSError:  # it is there, from another process or damaged
            for path in scratch.iterdir():
                path.replace(target / path.name)
        listed.write_text(json.dumps(sizes))
    except (lzma.LZMAError, tarfile.TarError, EOFError) as error:
        raise OSError(f"{archive} must be a whole xz archive, got: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir()}


def _split(file: bytes) -> bytes:
    """A safetensors file as another one, of the parts in which LZMA takes fewer bytes."""
    data = np.frombuffer(file, np.uint8)
    other, coded, rest = np.ones(len(data), bool), [], []
    for width, first, places in _weights(data):
        bits = np.unpackbits(data[places].reshape(-1, width), axis=1, bitorder="little")
        coded.append(np.packbits(bits[:, first : first + 8], bitorder="little"))
        rest.append(np.packbits(np.delete(bits, slice(first, first + 8), axis=1).T))
        other[places] = False
    return save({"coded": np.concatenate(coded), "other": data[other], "rest": np.concatenate(rest)})


def _joined(split: bytes) -> bytes:
    """The safetensors file of which `_split` made this."""
    parts = load(split)
    coded, rest, other = (parts[name] for name in ("coded", "rest", "other"))
    weights = list(_weights(other))  # `other` begins with the header
    data = np.empty(len(other) + sum(len(places) for *_, places in weights), np.uint8)
    remain = np.ones(len(data), bool)
    for width, first, places in weights:
        count, planes = len(places) // width, 8 * width - 8
        eight = np.unpackbits(coded[:count], bitorder="little").reshape(count, 8)
        others = np.unpackbits(rest, count=planes * count).reshape(planes, count).T
        bits = np.concatenate([others[:, :first], eight, others[:, first:]], axis=1)
        data[places] = np.packbits(bits, bitorder="little")
        coded, rest = coded[count:], rest[-(-planes * count // 8) :]
        remain[places] = False
    data[remain] = other
    return data.tobytes()


def _weights(data: NDArray[np.uint8]) -> Iterator[tuple[int, int, NDArray[np.int64]]]:
    """Of each dtype in `_DTYPES`: its two numbers, and where in a safetensors file its tensors' bytes are."""
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    tensors = json.loads(data[8:start].tobytes())
    for dtype, (width, first) in _DTYPES.items():
        spans = [np.arange(*t["data_offsets"]) for t in tensors.values() if t.get("dtype") == dtype]
        yield width, first, start + np.concatenate([np.empty(0, np.int64), *spans])
