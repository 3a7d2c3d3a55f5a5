"""The checkpoint that comes with the package: one compressed archive, unpacked into the user's cache at its first use.

The repository's size is limited, and the archive is a third smaller than the files. What is unpacked is a checkpoint directory
like any other, named after the archive's digest; it appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import shutil
import tarfile
import tempfile
from functools import cache
from pathlib import Path

from dsv4lab.kernels._common.cache import folder as kernels_folder

NANO = Path(__file__).parent / "data" / "nano.tar.xz"
# Literals are told apart by their place in a float32, matches by theirs in a BF16: much of nano is such, with few repeats.
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 2, "pb": 1}]


def pack(source: Path, archive: Path) -> None:
    """Write all files of a flat folder into an archive, replacing it in one step. Equal files give equal bytes."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path in sorted(source.iterdir()):
            entry = tarfile.TarInfo(path.name)
            entry.size = path.stat().st_size
            with path.open("rb") as file:
                tar.addfile(entry, file)
    scratch = archive.with_name(archive.name + ".new")
    scratch.write_bytes(lzma.compress(plain.getvalue(), filters=_FILTERS))
    scratch.replace(archive)


@cache
def unpacked(archive: Path) -> Path:
    """The archive's folder in the cache, made there first if need be. Raises OSError, naming the file, on a damaged archive."""
    packed = archive.read_bytes()
    target = kernels_folder().parent / f"{archive.name.partition('.')[0]}-{hashlib.sha256(packed).hexdigest()[:16]}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        with tarfile.open(fileobj=io.BytesIO(lzma.decompress(packed))) as tar:
            for entry in tar:
                file = tar.extractfile(entry)
                assert file is not None and Path(entry.name).name == entry.name  # `pack` writes plain files only
                (scratch / entry.name).write_bytes(file.read())
        scratch.chmod(0o755)
        scratch.rename(target)
    except (lzma.LZMAError, tarfile.TarError, EOFError) as error:
        raise OSError(f"{archive} must be a whole xz archive, got: {error}") from error
    except OSError:
        if not target.is_dir():  # otherwise another process was quicker
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target
