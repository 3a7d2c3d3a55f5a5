"""Put a trained state into the package: the official checkpoint layout, and the record of how it came to be.

    python -m training.export_nano --data .train --run FIRST_OUT [--run SECOND_OUT ...]

Every `--run` is an output folder of `training.train_nano`, in the order in which they were trained, each one resuming from
the one before; the last one's weights are exported. Writes `dsv4lab/data/nano.tar.xz` (replaced in one step), and
`training/record.json` with `training/curve.png`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
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
from dsv4lab.model.checkpoint import convert_items, write_checkpoint
from training.tokenizer import BOS, EOS, PAD

MAX_FOLDER_BYTES = 4_000_000
MAX_CURVE_ROWS = 90  # a run
RECORD = Path(__file__).with_name("record.json")
CURVE = Path(__file__).with_name("curve.png")


def export(state: dict[str, torch.Tensor], data: Path, out: Path) -> int:
    """Write `state` (official names, float32) as an official checkpoint at `out`, replacing what is there; -> its bytes.

    data: the corpus folder, for the tokenizer. Raises CheckpointError on a wrong state, ValueError on too large a folder;
    `out` is then as before.
    """
    config = ModelConfig.nano()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        work, previous = Path(scratch) / "new", Path(scratch) / "previous"
        items = convert_items(state.items(), config, layout="official")
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
    parser.add_argument("--run", type=Path, action="append", required=True, help="output folder of train_nano, in order")
    parser.add_argument("--out", type=Path, default=shipped.NANO, help="archive of the checkpoint directory")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "nano"
        size = export(load_file(args.run[-1] / "state.safetensors"), args.data, folder)
        shipped.pack(folder, args.out)
    record = training_record(args.run, args.data)
    RECORD.write_text(json.dumps(record, separators=(",", ":"), ensure_ascii=False) + "\n", encoding="utf-8")
    draw_curve(record, CURVE)
    print(f"{args.out}: {args.out.stat().st_size} bytes, {size} unpacked")
    print(f"{RECORD}: {RECORD.stat().st_size} bytes; {CURVE}: {CURVE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
