"""Write a checkpoint directory: shards, index and configuration, finished or not there at all.

Everything goes into a hidden sibling of the destination. Shards get their final names, and the configuration is written,
only when the last parameter is in; then the directory is renamed. Source: the model specification, sections 1.2, 9 and 11.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsv4lab.config import ModelConfig
from dsv4lab.formats import F32, FP8_BLOCK, MXFP4, NVFP4, PackedWeight
from dsv4lab.model.checkpoint.files import DTYPE_NAMES, INDEX_NAME, SINGLE_NAME, SUFFIX, allowed_roots
from dsv4lab.model.checkpoint.inventory import CheckpointError, TensorSpec, check_layout, inventory, parameters

DEFAULT_SHARD_BYTES = 2 << 30  # one shard is in memory while it fills

# What a user of the checkpoint needs besides weights; copied as they are.
_COPIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
)
_COPIED_FOLDERS = ("encoding",)
_FP8_MANIFEST: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": list(FP8_BLOCK.block_shape),
    "scale_fmt": "ue8m0",
}


def write_checkpoint(
    dst: str | Path,
    config: ModelConfig,
    items: Iterable[tuple[str, torch.Tensor | PackedWeight]],
    *,
    layout: str,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    copy_from: str | Path | None = None,
) -> None:
    """Stream parameters into a new checkpoint directory.

    items: (canonical name, PackedWeight for the matrices of the layout, tensor otherwise), each parameter once, any order, in
    exactly the formats and dtypes of `inventory(config, layout)` (`convert_items` makes them so). copy_from: a checkpoint
    directory whose tokenizer, generation and encoding files come along. A parameter larger than max_shard_bytes gets a
    shard of its own.
    Raises CheckpointError naming every wrong, missing or unexpected item, ValueError on the layout, ConfigError where the
    configuration has no official spelling, and as `check_destination`. On any error, and on a kill, the destination does not
    exist.
    """
    dst = check_destination(dst)
    check_layout(layout)
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be >= 1, got {max_shard_bytes}")
    manifest = config_dict(config, layout)
    expected = inventory(config, layout)
    dst.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{dst.name}.partial-", dir=dst.parent))
    try:
        shards = _Shards(work, max_shard_bytes)
        _fill(shards, config, items, expected, dst)
        shards.finish()
        if copy_from is not None:
            _copy_companions(Path(copy_from), work)
        if layout == "nvidia":
            _write_json(work / "hf_quant_config.json", _nvidia_manifest_file(manifest["quantization_config"]))
        _write_json(work / "config.json", manifest)
        umask = os.umask(0)
        os.umask(umask)
        work.chmod(0o777 & ~umask)  # mkdtemp made it private
        work.rename(dst)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def check_destination(dst: str | Path) -> Path:
    """The path, links resolved, if a folder may be renamed to it. Raises FileExistsError or NotADirectoryError."""
    path = Path(dst).resolve()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"destination must not exist or be an empty directory, got {dst}")
    if path == Path.cwd() or path.is_mount():
        raise FileExistsError(f"destination must not be the current directory or a mount point, got {dst}")
    if not next(parent for parent in path.parents if parent.exists()).is_dir():
        raise NotADirectoryError(f"destination must not be below a file, got {dst}")
    return path


def packed_tensors(name: str, weight: PackedWeight) -> dict[str, torch.Tensor]:
    """The file tensors of a packed matrix, by canonical tensor name."""
    base = name.removesuffix(".weight")
    codes = weight.codes.view(torch.int8) if weight.format is MXFP4 else weight.codes  # I8 in the official layout
    nvfp4 = weight.format is NVFP4
    parts = {
        name: codes,
        f"{base}.weight_scale" if nvfp4 else f"{base}.scale": weight.scale,
        f"{base}.weight_scale_2": weight.global_scale,
        f"{base}.input_scale": weight.input_scale,
    }
    return {part: tensor for part, tensor in parts.items() if tensor is not None}


def config_dict(config: ModelConfig, layout: str) -> dict[str, Any]:
    """`config.json` of a layout: the official keys and a quantization_config that says what the files hold."""
    out = config.to_dict() | {"torch_dtype": "float32" if layout == F32.name else "bfloat16"}
    if layout in ("official", "nvidia"):
        out["expert_dtype"] = "fp4"
        out["quantization_config"] = dict(_FP8_MANIFEST)
    if layout == "nvidia":
        out["quantization_config"] |= _nvidia_manifest(config)
    if layout == "nvfp4":
        out["expert_dtype"] = "nvfp4"
        out["quantization_config"] = {
            "quant_method": "modelopt",
            "quant_algo": "NVFP4",
            "group_size": NVFP4.group,
            "kv_cache_quant_algo": None,
            "producer": {"name": "dsv4lab"},
            "exclude_modules": _plain_modules(config),
        }
    return out


# ---- private ---------------------------------------------------------------------------------------------------------
class _Shards:
    """Tensors gathered into safetensors files of bounded size, under names that no reader takes for a checkpoint."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self.directory = directory
        self.max_bytes = max_bytes
        self.pending: dict[str, torch.Tensor] = {}
        self.pending_bytes = 0
        self.written: list[tuple[Path, list[str]]] = []
        self.total_bytes = 0

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        """The tensors of one parameter; they stay together."""
        nbytes = sum(t.nbytes for t in tensors.values())
        if self.pending and self.pending_bytes + nbytes > self.max_bytes:
            self._flush()
        self.pending |= tensors
        self.pending_bytes += nbytes

    def finish(self) -> None:
        """Write the rest, give the shards their final names, and write the index, which a single file does without."""
        if self.pending:
            self._flush()
        if len(self.written) == 1:
            self.written[0][0].rename(self.directory / SINGLE_NAME)
            return
        weight_map: dict[str, str] = {}
        for number, (path, names) in enumerate(self.written, start=1):
            final = f"model-{number:05d}-of-{len(self.written):05d}{SUFFIX}"
            path.rename(self.directory / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(self.directory / INDEX_NAME, index)

    def _flush(self) -> None:
        path = self.directory / f"shard-{len(self.written) + 1:05d}.partial"
        # Wide elements first keeps every tensor aligned to its element size, as other readers map the file.
        ordered = sorted(self.pending.items(), key=lambda kv: -kv[1].element_size())
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, tensor in ordered:
            header[name] = {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [at, at + tensor.nbytes],
            }
            at += tensor.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, tensor in ordered:
                file.write(_raw_bytes(tensor).data)
            file.flush()
            os.fsync(file.fileno())
        self.written.append((path, [name for name, _ in ordered]))
        self.total_bytes += at
        self.pending, self.pending_bytes = {}, 0


def _fill(
    shards: _Shards,
    config: ModelConfig,
    items: Iterable[tuple[str, torch.Tensor | PackedWeight]],
    expected: dict[str, TensorSpec],
    dst: Path,
) -> None:
    """Add every item; what does not fit the inventory is collected and raised at the end."""
    known = parameters(config)
    problems: list[str] = []
    done: set[str] = set()
    for name, value in items:
        if name not in known or name in done:
            problems.append(f"{name}: {'written twice' if name in done else 'not a parameter of this configuration'}")
            continue
        done.add(name)
        tensors = packed_tensors(name, value) if isinstance(value, PackedWeight) else {name: value}
        faults = list(_faults(name, tensors, expected))
        problems.extend(faults)
        if not faults and not problems:  # once something is wrong nothing is kept, so nothing needs writing
            shards.add({part: tensor.detach().cpu() for part, tensor in tensors.items()})
    problems.extend(f"{name}: missing" for name in known if name not in done)
    if problems:
        raise CheckpointError(dst, problems)


def _faults(name: str, tensors: dict[str, torch.Tensor], expected: dict[str, TensorSpec]) -> Iterator[str]:
    base = name.removesuffix(".weight")
    candidates = [name, *(f"{base}.{s}" for s in ("scale", "weight_scale", "weight_scale_2", "input_scale"))]
    wanted = {part: expected[part] for part in candidates if part in expected} if name.endswith(".weight") else {}
    wanted.setdefault(name, expected[name])
    for part, spec in wanted.items():
        if part not in tensors:
            if not spec.optional:
                yield f"{part}: missing"
            continue
        got = DTYPE_NAMES.get(tensors[part].dtype, str(tensors[part].dtype))
        if got != spec.dtype or tuple(tensors[part].shape) != spec.shape:
            yield f"{part}: must be {spec.dtype} {list(spec.shape)}, got {got} {list(tensors[part].shape)}"
    for part in tensors:
        if part not in wanted:
            yield f"{part}: the layout has no such tensor"


def _raw_bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def _copy_companions(src: Path, dst: Path) -> None:
    """Tokenizer, generation settings and chat encoding. Links inside folders that lead out of the checkpoint are skipped."""
    roots = allowed_roots(src)
    for name in _COPIED_FILES:
        if (src / name).is_file():
            shutil.copyfile(src / name, dst / name)
    for folder in _COPIED_FOLDERS:
        if (src / folder).is_dir():
            for path in sorted((src / folder).rglob("*")):
                if path.is_file() and (not path.is_symlink() or any(map(path.resolve().is_relative_to, roots))):
                    target = dst / path.relative_to(src)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, target)


def _plain_modules(config: ModelConfig) -> list[str]:
    """Modules whose `.weight` no layout quantises, without layer numbers."""
    names = (name for name, p in parameters(config).items() if not p.is_matrix and name.endswith(".weight"))
    return sorted({".".join("*" if s.isdigit() else s for s in name.split(".")[:-1]) for name in names})


def _nvidia_manifest(config: ModelConfig) -> dict[str, Any]:
    """The keys that section 11.3 adds to the official quantization_config."""
    excluded = ["embed", "head", "*attn*", "*ffn.shared_experts*", "*ffn.gate*", "mtp.*"]
    group = {"num_bits": 4, "type": "float", "group_size": NVFP4.group}
    return {
        "quant_algo": "MIXED_PRECISION",
        "moe_quant_algo": "NVFP4",
        "group_size": NVFP4.group,
        "kv_cache_quant_algo": None,
        "producer": {"name": "dsv4lab"},
        "quantized_layers": {
            f"layers.{i}.ffn.experts": {"quant_algo": "NVFP4", "group_size": NVFP4.group}
            for i in range(config.num_hidden_layers)
        },
        "exclude_modules": excluded,
        "ignore": excluded,
        "config_groups": {"group_0": {"weights": group, "input_activations": group, "targets": ["Linear"]}},
    }


def _nvidia_manifest_file(manifest: dict[str, Any]) -> dict[str, Any]:
    """`hf_quant_config.json`: the same, under producer and quantization."""
    inner = {k: v for k, v in manifest.items() if k not in _FP8_MANIFEST and k != "producer"}
    return {"producer": manifest["producer"], "quantization": inner}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
