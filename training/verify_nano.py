"""Measure the shipped nano model through dsv4lab itself and add the figures to `training/record.json.xz`.

    python -m training.verify_nano --run LAST_OUT
    python -m training.verify_nano --before ARCHIVE

Perplexity of the shipped official checkpoint and of its BF16 and full NVFP4 conversions, on the same held-out tokens; and of
the trained weights before any rounding (`--run`, without it the record keeps what it has of them), or of an earlier archive
such as `git show COMMIT:dsv4lab/data/nano.tar.xz` (`--before`). Acceptance of one to three MTP drafts in greedy generation,
which must equal plain decoding.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import dsv4lab
from dsv4lab import shipped
from dsv4lab.config import ModelConfig
from dsv4lab.lab.perplexity import (
    held_out_files,
    held_out_windows,
    log_probabilities,
    paired_difference,
    perplexity,
    token_losses,
)
from dsv4lab.model.checkpoint import convert_items, quantize_checkpoint, write_checkpoint
from training.evaluate import PROMPTS
from training.export_nano import read_record, write_record

MAX_DRAFTS = 3
CONTEXT = 64  # tokens of each held-out file that generation continues


def measure_formats(state: dict[str, torch.Tensor] | None, before: Path | None, count: int, length: int) -> dict[str, Any]:
    """Perplexity of each format on `count` windows of `length` tokens, and what it loses against the BF16 model of the same
    weights, in nats per token. `trained` is the training's float32 weights rounded to BF16, which the file cannot hold, and
    `before` the official checkpoint of an earlier archive; each is measured where it is given."""
    config, nano = ModelConfig.nano(), dsv4lab.nano()
    found: dict[str, Any] = {"windows": count, "window_tokens": length}
    with tempfile.TemporaryDirectory() as scratch:
        folders = {"bf16": Path(scratch) / "bf16", "official": nano, "nvfp4": Path(scratch) / "nvfp4"}
        for layout in ("bf16", "nvfp4"):
            quantize_checkpoint(nano, folders[layout], layout=layout, progress=False)
        if state is not None:
            folders["trained"] = Path(scratch) / "trained"
            items = convert_items(state.items(), config, layout="bf16")
            write_checkpoint(folders["trained"], config, items, layout="bf16", copy_from=nano)
        if before is not None:
            folders["before"] = shipped.unpacked(before)
        base = None
        for name, path in folders.items():
            model = dsv4lab.load(path)
            assert model.tokenizer is not None
            windows = held_out_windows(model.tokenizer, count=count, length=length)
            losses = token_losses(log_probabilities(model, windows), windows)
            base = losses if base is None else base
            mean, error = paired_difference(losses, base)
            found[name] = {
                "numerics": model.numerics.name,
                "perplexity": round(perplexity(losses), 4),
                "perplexity_against_bf16": round(perplexity(losses) / perplexity(base) - 1, 5),
                "loss_minus_bf16": round(mean, 5),
                "standard_error": round(error, 5),
            }
            print(name, json.dumps(found[name]), flush=True)
    return found


def against(earlier: dict[str, Any], base: float) -> dict[str, Any]:
    """An entry of an earlier record on the same tokens, compared with another base's perplexity; its error is not known."""
    ratio = earlier["perplexity"] / base
    kept = {key: value for key, value in earlier.items() if key != "standard_error"}
    return kept | {"perplexity_against_bf16": round(ratio - 1, 5), "loss_minus_bf16": round(math.log(ratio), 5)}


def measure_generation(new_tokens: int) -> dict[str, Any]:
    """Greedy text of the shipped model, and the share of drafts kept; raises AssertionError where drafts change the text."""
    model = dsv4lab.load(dsv4lab.nano())
    tokenizer = model.tokenizer
    assert tokenizer is not None
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    prompts += [[tokenizer.bos_id, *tokenizer.encode(text)[: CONTEXT - 1]] for text in held_out_files().values()]
    plain = model.complete(prompts, max_new_tokens=new_tokens)
    found: dict[str, Any] = {"prompts": len(prompts), "new_tokens": new_tokens, "acceptance": {}, "tokens_per_step": {}}
    for drafts in range(1, MAX_DRAFTS + 1):
        done = model.complete(prompts, max_new_tokens=new_tokens, num_drafts=drafts)
        assert [c.ids for c in done] == [c.ids for c in plain], f"{drafts} drafts must not change greedy text"
        drafted = [sum(c.drafted[k] for c in done) for k in range(drafts)]
        accepted = [sum(c.accepted[k] for c in done) for k in range(drafts)]
        found["acceptance"][str(drafts)] = [round(a / max(1, d), 4) for a, d in zip(accepted, drafted, strict=True)]
        found.setdefault("tokens_per_step", {})[str(drafts)] = round(
            sum(len(c.ids) for c in done) / sum(c.steps for c in done), 3
        )
    found["text"] = {text: text + tokenizer.decode(c.ids) for text, c in zip(PROMPTS, plain, strict=False)}
    print(json.dumps(found, indent=1, ensure_ascii=False), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, help="the exported run: output folder of train_nano")
    parser.add_argument("--before", type=Path, help="an earlier archive of nano, to compare with")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--only", choices=("held_out", "generation"), help="leave the other part of the record as it is")
    args = parser.parse_args()
    state = load_file(args.run / "state.safetensors") if args.run else None
    record = read_record()
    measured = record.setdefault("measured_with_dsv4lab", {})
    if args.only != "generation":
        found = measure_formats(state, args.before, args.windows, args.length)
        if state is None and "trained" in measured.get("held_out", {}):
            found["trained"] = against(measured["held_out"]["trained"], found["bf16"]["perplexity"])
        measured["held_out"] = found
    if args.only != "held_out":
        measured["generation"] = measure_generation(args.new_tokens)
    write_record(record)


if __name__ == "__main__":
    main()
