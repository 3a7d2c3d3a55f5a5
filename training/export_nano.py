"""Put a trained state into the package: the official checkpoint layout, and the record of how it came to be.

    python -m training.export_nano --data .train --run FIRST_OUT [--run SECOND_OUT ...]
    python -m training.export_nano --shipped

Every `--run` is an output folder of `training.train_nano`, in the order in which they were trained, each one resuming from
the one before; the last one's weights are exported. Writes `dsv4lab/data/nano.tar.xz` (replaced in one step), and
`training/record.json.xz` with `training/curve.png`. `--shipped` exports the weights that are in the package again, and leaves
record and curve.

What stays in float32 or BF16 loses the last bits of its mantissas (`KEPT_BITS`), which are noise of the training: no compressor
makes them smaller, and they were a sixth of the archive. Names and dtypes are the official ones.
"""

from __future__ import annotations

import argparse
import json
import lzma
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import tokenizers
import torch
from safetensors.torch import load_file

import dsv4lab
from dsv4lab import shipped
from dsv4lab.config import ModelConfig
from dsv4lab.formats import PackedWeight
from dsv4lab.lab.files import write_atomically
from dsv4lab.model.checkpoint import convert_items, open_checkpoint, write_checkpoint
from training.tokenizer import BOS, EOS, PAD

Value = torch.Tensor | PackedWeight
MAX_FOLDER_BYTES = 4_000_000
MAX_CURVE_ROWS = 90  # a run
# Explicit mantissa bits that stay, by name; all other tensors keep theirs. What float32 products take keeps more than TF32's
# 10, so that a kernel which multiplies in TF32 is still found out. Compressors pool many tokens, and the errors average out;
# the embedding's and the routers' last bits decide something: rounding those to 4 costs 0.37 % and 0.15 % of perplexity.
KEPT_BITS = {
    r"\bhc_\w+_fn$": 12,
    r"compressor\.ape$": 8,  # added to scores, never multiplied; BF16 has 7
    r"attn\.compressor\.w(kv|gate)\.weight$": 2,  # of BF16's 7
    r"indexer\.compressor\.w(kv|gate)\.weight$": 4,
    r"^head\.weight$": 4,
}
_PATTERNS = {torch.float32: (torch.int32, 23), torch.bfloat16: (torch.int16, 7)}  # the integer of its width, mantissa bits
RECORD = Path(__file__).with_name("record.json.xz")
CURVE = Path(__file__).with_name("curve.png")


def rounded(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Float32 or BF16 values with at most `bits` explicit mantissa bits, to nearest, ties to even, in the same dtype.

    Raises TypeError on another dtype, ValueError on `bits` outside [0, the dtype's] or where a value is or becomes infinite.
    """
    if x.dtype not in _PATTERNS:
        raise TypeError(f"x must be float32 or bfloat16, got {x.dtype}")
    pattern, present = _PATTERNS[x.dtype]
    if not 0 <= bits <= present:
        raise ValueError(f"bits must be in [0, {present}] for {x.dtype}, got {bits}")
    if not bool(x.isfinite().all()):
        raise ValueError("x must be finite, got an infinity or a NaN")
    drop = present - bits
    if drop == 0:
        return x.clone()
    code = x.contiguous().view(pattern)  # sign and magnitude: adding to the pattern goes away from zero
    code = (code + ((1 << drop - 1) - 1) + (code >> drop & 1)) >> drop << drop
    out = code.view(x.dtype)
    if not bool(out.isfinite().all()):
        raise ValueError(f"x must stay finite when rounded to {bits} bits, got values up to {x.abs().max().item()}")
    return out


def thinned_items(items: Iterable[tuple[str, Value]]) -> Iterator[tuple[str, Value]]:
    """Items of a checkpoint with the mantissas of `KEPT_BITS`. Doing it again changes nothing."""
    for name, value in items:
        bits = [count for pattern, count in KEPT_BITS.items() if re.search(pattern, name)]
        yield name, (rounded(value, bits[0]) if bits and isinstance(value, torch.Tensor) else value)


def export(state: Mapping[str, Value], data: Path, out: Path) -> int:
    """Write `state` (official names, float32 or official) as a checkpoint at `out`, replacing what is there; -> its bytes.

    data: the corpus or checkpoint folder, for the tokenizer. Raises CheckpointError on a wrong state, ValueError on too large a
    folder or on weights that are not finite; `out` is then as before.
    """
    config = ModelConfig.nano()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        work, previous = Path(scratch) / "new", Path(scratch) / "previous"
        items = thinned_items(convert_items(state.items(), config, layout="official"))
        write_checkpoint(work, config, items, layout="official", copy_from=data)
        generation = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "do_sample": False}
        (work / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
        size = folder_bytes(work)
        if size >= MAX_FOLDER_BYTES:
            raise ValueError(f"the folder must be smaller than {MAX_FOLDER_BYTES} bytes, got {size}")
        if out.exists():
            out.rename(previous)
        work.rename(out)
    return size


def folder_bytes(folder: Path) -> int:
    """Sum of the sizes of all files below a folder."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def thinned(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """At most `count` rows, evenly spread, first and last among them."""
    if len(rows) <= count:
        return rows
    return [rows[i] for i in np.linspace(0, len(rows) - 1, count).round().astype(int)]


def training_record(runs: list[Path], data: Path) -> dict[str, Any]:
    """What anyone needs to judge or repeat the training: data, machine, settings, curve, evaluations, one entry a run."""
    entries = []
    for run in runs:
        log = json.loads((run / "log.json").read_text(encoding="utf-8"))
        log["curve"] = thinned(log["curve"], MAX_CURVE_ROWS)
        entries.append(log)
    return {
        "date": date.today().isoformat(),
        "licence": "Trained on the Python standard library's sources (PSF licence); see README.md.",
        "corpus": json.loads((data / "corpus.json").read_text(encoding="utf-8")),
        "export_versions": {
            "dsv4lab": dsv4lab.__version__,
            "torch": torch.__version__,
            "safetensors": safetensors.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "runs": entries,
    }


def read_record() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(lzma.decompress(RECORD.read_bytes()))
    return found


def write_record(record: dict[str, Any]) -> None:
    """Whole or not at all; the same record gives the same bytes."""
    text = json.dumps(record, separators=(",", ":"), ensure_ascii=False) + "\n"
    write_atomically(RECORD, lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))


def curve_points(record: dict[str, Any]) -> tuple[list[list[float]], list[list[float]]]:
    """([tokens, training loss] rows, [tokens, held-out loss in float32] rows) over all runs, tokens counted through."""
    training, held_out, seen = [], [], 0
    for run in record["runs"]:
        per_step = run["final"]["tokens"] / run["final"]["steps"]
        training += [[seen + per_step * row["step"], row["loss"]] for row in run["curve"]]
        held_out += [[seen + per_step * row["step"], row["loss"]] for row in run["evaluations"] if row["mode"] == "exact"]
        seen += run["final"]["tokens"]
    return training, held_out


def draw_curve(record: dict[str, Any], path: Path) -> None:
    """The loss curve of all runs as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from dsv4lab.viz import plot_training_curve, use_style

    use_style()
    training, held_out = (np.asarray(points, dtype=np.float64).T for points in curve_points(record))
    ax = plot_training_curve(*training, held_out=tuple(held_out))
    ax.set_title("nano: next-token loss")
    ax.figure.savefig(path, dpi=100)
    plt.close(ax.figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path(".train"))
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, action="append", help="output folder of train_nano, in order")
    source.add_argument("--shipped", action="store_true", help="the package's own weights once more")
    parser.add_argument("--out", type=Path, default=shipped.NANO, help="archive of the checkpoint directory")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "nano"
        if args.shipped:
            size = export(dict(open_checkpoint(dsv4lab.nano()).items(progress=False)), dsv4lab.nano(), folder)
        else:
            record = training_record(args.run, args.data)
            size = export(load_file(args.run[-1] / "state.safetensors"), args.data, folder)
        shipped.pack(folder, args.out)
    if args.shipped:
        print(f"{args.out}: {args.out.stat().st_size} bytes, {size} unpacked")
        return
    write_record(record)
    draw_curve(record, CURVE)
    print(f"{args.out}: {args.out.stat().st_size} bytes, {size} unpacked")
    print(f"{RECORD}: {RECORD.stat().st_size} bytes; {CURVE}: {CURVE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
