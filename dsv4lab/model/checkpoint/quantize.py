"""Convert a checkpoint from one layout to another, matrix by matrix.

A matrix that already has the target format is copied bit for bit. MXFP4 becomes NVFP4 by the exact cast of spec 11.2
(nibbles unchanged) where the exponents allow it; everything else goes through float32. w1 and w3 of an expert share their
global scale in NVFP4, so they are converted together. Source: the model specification, sections 8 and 11.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from dsv4lab.config import ModelConfig
from dsv4lab.formats import E8M0_BIAS, FP8_BLOCK, MXFP4, NVFP4, Format, PackedWeight
from dsv4lab.model.checkpoint.inventory import CheckpointError, Parameter, check_layout, matrix_format, parameters, plain_dtype
from dsv4lab.model.checkpoint.reader import Checkpoint, open_checkpoint
from dsv4lab.model.checkpoint.writer import DEFAULT_SHARD_BYTES, write_checkpoint
from dsv4lab.reference.quant import (
    NVFP4_RANGE,
    decode_e8m0,
    dequantize,
    encode_e4m3,
    encode_e8m0_ceil,
    nvfp4_global_scale,
    quantize,
    unpack_e2m1,
)

_PLAIN = {"F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64}
_LOW, _HIGH = -9, 8  # exponents of the powers of two that E4M3 holds

Value = torch.Tensor | PackedWeight


def quantize_checkpoint(
    src: str | Path,
    dst: str | Path,
    *,
    layout: str,
    progress: bool,
    input_amax: dict[str, float] | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Read `src` in whatever layout it has and write `dst` in `layout`, with one pair of matrices and one shard in memory.

    input_amax: the largest activation magnitude each matrix sees, by its `.weight` name; an NVFP4 matrix named there gets
    input_scale = amax / 2688, the others keep what `src` has. Tokenizer and generation files come along.
    Raises CheckpointError or ConfigError on `src`, as `writer.check_destination` on `dst`, ValueError on the layout or on
    input_amax. An interruption leaves no `dst`.
    """
    check_layout(layout)
    checkpoint = open_checkpoint(src)
    items = convert_items(_read_in_pairs(checkpoint, progress), checkpoint.config, layout=layout, input_amax=input_amax)
    write_checkpoint(dst, checkpoint.config, items, layout=layout, max_shard_bytes=max_shard_bytes, copy_from=src)


def convert_items(
    items: Iterable[tuple[str, Value]], config: ModelConfig, *, layout: str, input_amax: dict[str, float] | None = None
) -> Iterator[tuple[str, Value]]:
    """Parameters in any format -> the same in the formats and dtypes of `layout`, as `write_checkpoint` takes them.

    items: (canonical name, tensor or PackedWeight); a matrix may also be a plain float tensor. For NVFP4, w1 of an expert
    waits in memory for its w3, so both should be near each other. Raises ValueError on the layout or on input_amax,
    CheckpointError on an unknown name.
    """
    check_layout(layout)
    known = parameters(config)
    amax = _checked_amax(input_amax or {}, known, layout)
    return _convert(items, known, layout, amax)


def mxfp4_to_nvfp4(weights: list[PackedWeight]) -> list[PackedWeight] | None:
    """The exact cast of MXFP4 matrices that share one global scale; None when their exponents span too far.

    global_scale = 2^(kmax - 8), block scale = 2^(k - kmax + 8), nibbles unchanged: k the E8M0 exponent, kmax the largest over
    all matrices. Blocks of zeros have no say in kmax.
    """
    exponents = [_scale(w).view(torch.uint8).to(torch.int32) - E8M0_BIAS for w in weights]
    nonzero = [(unpack_e2m1(w.codes) & 7).unflatten(-1, (-1, MXFP4.group)).amax(-1) > 0 for w in weights]
    if any(bool((k == 255 - E8M0_BIAS).any()) for k in exponents):
        return None  # NaN scales
    used = torch.cat([k[mask] for k, mask in zip(exponents, nonzero, strict=True)])
    top = int(used.max()) if used.numel() else 0
    global_exponent = top - _HIGH
    if (used.numel() and int(used.min()) - global_exponent < _LOW) or not -126 <= global_exponent <= 127:
        return None
    out = []
    for weight, k in zip(weights, exponents, strict=True):
        relative = (k - global_exponent).clamp(_LOW, _HIGH)  # only blocks of zeros are out of range
        scale = encode_e4m3(decode_e8m0((relative + E8M0_BIAS).to(torch.uint8)))
        scale = scale.repeat_interleave(MXFP4.group // NVFP4.group, dim=-1)
        out.append(PackedWeight(NVFP4, weight.codes, scale, torch.tensor(2.0**global_exponent, device=scale.device)))
    return out


# ---- private ---------------------------------------------------------------------------------------------------------
def _convert(
    items: Iterable[tuple[str, Value]], known: dict[str, Parameter], layout: str, amax: dict[str, float]
) -> Iterator[tuple[str, Value]]:
    waiting: dict[str, tuple[str, Value]] = {}
    for name, value in items:
        if name not in known:
            raise CheckpointError("items", [f"{name}: not a parameter of this configuration"])
        parameter = known[name]
        if not parameter.is_matrix:
            if isinstance(value, PackedWeight):
                raise CheckpointError("items", [f"{name}: must be a tensor, got a {value.format.name} matrix"])
            yield name, value.to(_PLAIN[plain_dtype(layout, parameter)])
            continue
        fmt = matrix_format(layout, name, parameter)
        partner = _partner(name) if fmt is NVFP4 else None
        if partner is None:
            group = [(name, value)]
        elif partner in waiting:
            group = [waiting.pop(partner), (name, value)]
        else:
            waiting[name] = (name, value)
            continue
        for (member, _), packed in zip(group, _to_format([v for _, v in group], fmt), strict=True):
            if fmt is NVFP4 and member in amax:
                packed = replace(packed, input_scale=torch.tensor(amax[member] / NVFP4_RANGE, dtype=torch.float32))
            yield member, packed
    for name, value in waiting.values():  # a partner that never came: the writer reports it
        yield name, _to_format([value], NVFP4)[0]


def _to_format(values: list[Value], fmt: Format) -> list[PackedWeight]:
    """One matrix, or w1 and w3 of one expert, in the target format."""
    if fmt is NVFP4:
        packed = [v for v in values if isinstance(v, PackedWeight)]
        if len(packed) == len(values) and all(p.format is MXFP4 for p in packed):
            exact = mxfp4_to_nvfp4(packed)
            if exact is not None:
                return exact
        open_values = [v for v in values if not _is_format(v, NVFP4)]
        if open_values:
            joint = torch.stack([_finite_amax(_float(v)) for v in open_values]).max()
            scale = nvfp4_global_scale(joint)
            return [_in_format(v, fmt, lambda x: quantize(x, NVFP4.name, global_scale=scale)) for v in values]
    return [_in_format(v, fmt, lambda x: quantize(x, fmt.name)) for v in values]


def _in_format(value: Value, fmt: Format, encode: Callable[[torch.Tensor], PackedWeight]) -> PackedWeight:
    if isinstance(value, PackedWeight) and _is_format(value, fmt):
        return value
    if isinstance(value, PackedWeight) and fmt is FP8_BLOCK and value.format is FP8_BLOCK:
        # Float32 scales (Base releases) that are powers of two keep their codes; the others are encoded anew.
        exact = encode_e8m0_ceil(_scale(value).float(), 1.0)
        if torch.equal(decode_e8m0(exact), _scale(value).float()):
            return replace(value, scale=exact)
    return encode(_float(value))


def _is_format(value: Value, fmt: Format) -> bool:
    return (
        isinstance(value, PackedWeight)
        and value.format is fmt
        and (value.scale is None or value.scale.dtype == fmt.scale_dtype)
    )


def _float(value: Value) -> torch.Tensor:
    return dequantize(value) if isinstance(value, PackedWeight) else value.float()


def _finite_amax(x: torch.Tensor) -> torch.Tensor:
    return x.abs().nan_to_num(nan=0.0, posinf=torch.finfo(torch.float32).max).amax()


def _scale(weight: PackedWeight) -> torch.Tensor:
    assert weight.scale is not None
    return weight.scale


def _partner(name: str) -> str | None:
    """w3 of an expert's w1 and the reverse, shared experts included; None for every other matrix."""
    base, _, leaf = name.removesuffix(".weight").rpartition(".")
    return f"{base}.{'w3' if leaf == 'w1' else 'w1'}.weight" if leaf in ("w1", "w3") else None


def _read_in_pairs(checkpoint: Checkpoint, progress: bool) -> Iterator[tuple[str, Value]]:
    """Every parameter in file order, w1 and w3 of an expert one after the other wherever they lie."""
    done: set[str] = set()
    with tqdm(total=len(checkpoint.names), unit="param", disable=not progress, desc="converting") as bar:
        for first in checkpoint.names:
            partner = _partner(first) if checkpoint.formats.get(first) is not None else None
            for name in (first, partner):
                if name is not None and name not in done:
                    done.add(name)
                    yield name, checkpoint.read(name)
                    bar.update(1)


def _checked_amax(input_amax: dict[str, float], known: dict[str, Parameter], layout: str) -> dict[str, float]:
    for name, value in input_amax.items():
        if name not in known or not known[name].is_matrix or matrix_format(layout, name, known[name]) is not NVFP4:
            raise ValueError(f"input_amax must name matrices that {layout!r} stores as nvfp4, got {name!r}")
        if not 0 < value < float("inf"):
            raise ValueError(f"input_amax of {name} must be finite and > 0, got {value}")
    return input_amax
