"""Open a checkpoint: validate all of it from its headers, then read it matrix by matrix.

Formats are detected from tensors, never from the configuration:

    F8_E4M3 weight + scale (E8M0, or float32 in the Base releases)   fp8_block
    I8 or U8 weight + scale                                           mxfp4
    I8 or U8 weight + weight_scale + weight_scale_2                   nvfp4
    BF16 or F32 weight                                                plain

Source: the model specification, sections 9 to 11.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from tqdm import tqdm

from dsv4lab.config import ModelConfig
from dsv4lab.formats import BF16, F32, FP8_BLOCK, MXFP4, NVFP4, Format, PackedWeight
from dsv4lab.model.checkpoint.files import StoredTensor, find_shards, read_header
from dsv4lab.model.checkpoint.inventory import (
    HALF,
    LAYOUTS,
    SINGLE,
    CheckpointError,
    Parameter,
    TensorSpec,
    expert_matrix_count,
    matrix_format,
    parameters,
    plain_dtype,
)
from dsv4lab.model.checkpoint.names import canonical_name, is_ignored_duplicate, unstack

# Stored parts of a packed matrix: file suffix -> field of PackedWeight.
_FIELDS = {"scale": "scale", "weight_scale": "scale", "weight_scale_2": "global_scale", "input_scale": "input_scale"}
_PLAIN_DTYPES = {HALF: ("BF16", "F32"), SINGLE: ("F32", "BF16")}  # re-exports widen the one and narrow the other


@dataclass(frozen=True)
class _Item:
    """One parameter and where its tensors lie; format None for a plain tensor."""

    parameter: Parameter
    format: Format | None
    parts: dict[str, StoredTensor]  # canonical tensor name -> place; the first is the parameter's own name


@dataclass(frozen=True)
class _Explained:
    """Canonical names whose absence a problem already found explains: those the index places in a broken file, or all."""

    names: frozenset[str]
    everything: bool

    def __contains__(self, name: str) -> bool:
        return self.everything or name in self.names

    def mentions_mtp(self) -> bool:
        return self.everything or any(name.startswith("mtp.") for name in self.names)


@dataclass(frozen=True)
class Checkpoint:
    """A validated checkpoint. Holds no tensor data; `read` and `items` fetch it from disk.

    config: num_nextn_predict_layers is the count actually present. layout: one of LAYOUTS, or "mixed".
    is_quantised: any matrix is packed. files: the weight files. nbytes: tensor bytes. specs: every stored tensor by
    canonical name, dtype and shape as stored. formats: the format of every matrix, by its `.weight` name.
    """

    directory: Path
    config: ModelConfig
    layout: str
    is_quantised: bool
    files: tuple[Path, ...]
    nbytes: int
    specs: dict[str, TensorSpec] = field(repr=False)
    formats: dict[str, Format] = field(repr=False)
    _items: dict[str, _Item] = field(repr=False)

    @property
    def num_mtp(self) -> int:
        """MTP blocks present."""
        return self.config.num_nextn_predict_layers

    @property
    def names(self) -> tuple[str, ...]:
        """Canonical parameter names, in the order of the files."""
        return tuple(self._items)

    def read(self, name: str) -> torch.Tensor | PackedWeight:
        """One parameter: a PackedWeight for a matrix that the official layout quantises, a tensor as stored otherwise.

        Raises KeyError on an unknown name, CheckpointError on values no model can have or a file that broke meanwhile.
        """
        if name not in self._items:
            raise KeyError(f"name must be a parameter of the checkpoint, got {name!r}")
        item = self._items[name]
        tensors = {part: stored.read() for part, stored in item.parts.items()}
        if item.format is None:
            self._check_table(name, tensors[name])
            return tensors[name]
        codes = tensors.pop(name)
        packed = PackedWeight(item.format, codes.view(torch.uint8) if codes.dtype == torch.int8 else codes)
        for part, tensor in tensors.items():
            suffix = part.rpartition(".")[2]
            if suffix in ("weight_scale_2", "input_scale"):
                tensor = tensor.reshape(())
            low, high = torch.aminmax(tensor.float())  # a NaN is both; a block of zeros may have the scale 0
            if not (low > 0 or (low == 0 and tensor.dim())) or not high < torch.inf:
                raise CheckpointError(self.directory, [f"{part}: must be finite and > 0, got {low.item()}..{high.item()}"])
            setattr(packed, _FIELDS[suffix], tensor)
        return packed

    def items(self, progress: bool) -> Iterator[tuple[str, torch.Tensor | PackedWeight]]:
        """(canonical name, value) of every parameter, shard by shard; one parameter is in memory at a time."""
        with tqdm(total=self.nbytes, unit="B", unit_scale=True, disable=not progress, desc="reading") as bar:
            for name, item in self._items.items():
                bar.set_postfix_str(next(iter(item.parts.values())).path.name, refresh=False)
                yield name, self.read(name)
                bar.update(sum(stored.nbytes for stored in item.parts.values()))

    def _check_table(self, name: str, tensor: torch.Tensor) -> None:
        """tid2eid names experts: an id out of range would read another expert's memory in a kernel."""
        if tensor.is_floating_point():
            return
        low, high = int(tensor.min()), int(tensor.max())
        if low < 0 or high >= self.config.n_routed_experts:
            rule = f"must hold expert ids in [0, {self.config.n_routed_experts}), got {low}..{high}"
            raise CheckpointError(self.directory, [f"{name}: {rule}"])


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """Validate a checkpoint directory from its configuration, index and headers.

    Raises ConfigError on the configuration, and one CheckpointError that names every other problem.
    """
    directory = Path(directory)
    config = ModelConfig.from_checkpoint(directory)
    problems: list[str] = []
    stored, explained = _collect(directory, problems)
    if not any(name.startswith("mtp.") for name in stored) and not explained.mentions_mtp():
        config = replace(config, num_nextn_predict_layers=0)  # re-exports without the block: the backbone is whole
    if expert_matrix_count(config) > 8 * len(stored) + 100_000:
        problems.append(f"config.json: describes over {expert_matrix_count(config)} tensors, the files hold {len(stored)}")
        raise CheckpointError(directory, problems)
    items: dict[str, _Item] = {}
    used: set[str] = set()
    for name, parameter in parameters(config).items():
        item = _match(name, parameter, stored, problems, explained=explained)
        if item is not None:
            items[name] = item
        used.update(part for part in _part_names(name, parameter) if item is None or part in item.parts)
    problems.extend(f"{stored[name].name}: unexpected tensor" for name in stored if name not in used)
    if problems:
        raise CheckpointError(directory, problems)
    return _checkpoint(directory, config, items)


# ---- private ---------------------------------------------------------------------------------------------------------
def _collect(directory: Path, problems: list[str]) -> tuple[dict[str, StoredTensor], _Explained]:
    """Every stored tensor by canonical name, and which of them need not be reported as missing."""
    shards, weight_map = find_shards(directory, problems)
    stored: dict[str, StoredTensor] = {}
    contents: dict[str, set[str]] = {}
    is_broken = bool(problems)
    for path in shards:
        header = read_header(path, problems)
        if header is None:
            is_broken = True
            continue
        contents[path.name] = set(header)
        for name, tensor in header.items():
            if weight_map is not None and weight_map.get(name) != path.name:
                where = weight_map.get(name, "nowhere")
                problems.append(f"{name}: is in {path.name}, the index says {where}")
            _add(stored, name, tensor, problems)
    if not weight_map:  # without an index, nothing tells what the broken files hold
        return stored, _Explained(frozenset(), everything=is_broken)
    hidden: set[str] = set()
    for name, target in weight_map.items():
        if target not in contents:
            hidden.add(canonical_name(name))
        elif name not in contents[target]:
            problems.append(f"{name}: the index says {target}, which lacks it")
            hidden.add(canonical_name(name))
    return stored, _Explained(frozenset(hidden), everything=False)


def _add(stored: dict[str, StoredTensor], name: str, tensor: StoredTensor, problems: list[str]) -> None:
    canonical = canonical_name(name)
    if is_ignored_duplicate(canonical):
        return
    split = unstack(canonical, tensor.shape)
    parts = [(canonical, tensor)] if split is None else [(part, tensor.part(first, shape)) for part, first, shape in split]
    for part, place in parts:
        if part in stored:
            problems.append(f"{part}: stored twice, as {stored[part].name} and as {name}")
        stored[part] = place


def _part_names(name: str, parameter: Parameter) -> list[str]:
    base = name.removesuffix(".weight")
    return [name, *(f"{base}.{suffix}" for suffix in _FIELDS)] if parameter.is_matrix else [name]


def _match(
    name: str, parameter: Parameter, stored: dict[str, StoredTensor], problems: list[str], *, explained: _Explained
) -> _Item | None:
    """The stored tensors of one parameter, checked; None, with the reasons in `problems`, when they do not fit."""
    known = len(problems)
    parts: dict[str, StoredTensor] = {}

    def take(part: str, dtypes: tuple[str, ...], shapes: tuple[tuple[int, ...], ...], why: str = "") -> None:
        tensor = stored.get(part)
        if tensor is None:
            if part not in explained:
                problems.append(f"{part}: missing{why}")
            return
        if tensor.dtype not in dtypes:
            problems.append(f"{part}: dtype must be {' or '.join(dtypes)}{why}, got {tensor.dtype}")
        if tensor.shape not in shapes:
            problems.append(f"{part}: shape must be {list(shapes[0])}{why}, got {list(tensor.shape)}")
        parts[part] = tensor

    if not parameter.is_matrix:
        take(name, _PLAIN_DTYPES.get(parameter.kind, ("I64", "I32")), (parameter.shape,))
        return _Item(parameter, None, parts) if len(problems) == known and parts else None

    base, weight = name.removesuffix(".weight"), stored.get(name)
    rows, columns = parameter.shape
    if weight is None:
        if name not in explained:
            problems.append(f"{name}: missing")
        return None
    fmt = _detect(base, weight, stored)
    if fmt is None:
        problems.append(f"{name}: dtype must be F8_E4M3, I8, U8, BF16 or F32, got {weight.dtype}")
        return None
    why = f" ({fmt.name})"
    take(name, (weight.dtype,), (fmt.code_shape(rows, columns),), why)
    scale_shape = fmt.scale_shape(rows, columns)
    if scale_shape is not None and fmt is not FP8_BLOCK and columns % fmt.group:
        problems.append(f"{name}: in must be a multiple of {fmt.group}{why}, got {columns}")
    elif scale_shape is not None and fmt is NVFP4:
        take(f"{base}.weight_scale", ("F8_E4M3",), (scale_shape,), why)
        take(f"{base}.weight_scale_2", ("F32",), ((), (1,)), why)
        if f"{base}.input_scale" in stored:
            take(f"{base}.input_scale", ("F32",), ((), (1,)), why)
    elif scale_shape is not None:
        dtypes = ("F8_E8M0", "F32") if fmt is FP8_BLOCK else ("F8_E8M0",)
        take(f"{base}.scale", dtypes, (scale_shape,), why)
    complete = len(problems) == known and (scale_shape is None or len(parts) > 1 + (fmt is NVFP4))
    return _Item(parameter, fmt, parts) if complete else None


def _detect(base: str, weight: StoredTensor, stored: dict[str, StoredTensor]) -> Format | None:
    if weight.dtype in ("I8", "U8"):
        is_nvfp4 = f"{base}.weight_scale" in stored or f"{base}.weight_scale_2" in stored
        return NVFP4 if is_nvfp4 else MXFP4
    return {"F8_E4M3": FP8_BLOCK, "BF16": BF16, "F32": F32}.get(weight.dtype)


def _checkpoint(directory: Path, config: ModelConfig, items: dict[str, _Item]) -> Checkpoint:
    places = [stored for item in items.values() for stored in item.parts.values()]
    files = tuple(sorted({stored.path for stored in places}))
    in_file_order = dict(sorted(items.items(), key=lambda kv: (kv[1].parts[kv[0]].path, kv[1].parts[kv[0]].start)))
    specs = {part: TensorSpec(s.dtype, s.shape) for item in in_file_order.values() for part, s in item.parts.items()}
    formats = {name: item.format for name, item in in_file_order.items() if item.format is not None}
    return Checkpoint(
        directory=directory,
        config=config,
        layout=next((layout for layout in LAYOUTS if _is_layout(layout, items, specs)), "mixed"),
        is_quantised=any(fmt.block is not None for fmt in formats.values()),
        files=files,
        nbytes=sum(stored.nbytes for stored in places),
        specs=specs,
        formats=formats,
        _items=in_file_order,
    )


def _is_layout(layout: str, items: dict[str, _Item], specs: dict[str, TensorSpec]) -> bool:
    """Whether every matrix has the layout's format, and every plain tensor and scale its dtype."""
    for name, item in items.items():
        if item.format is None:
            if specs[name].dtype != plain_dtype(layout, item.parameter):
                return False
            continue
        is_base = item.format is FP8_BLOCK and specs[f"{name.removesuffix('.weight')}.scale"].dtype != "F8_E8M0"
        if item.format is not matrix_format(layout, name, item.parameter) or is_base:
            return False
    return True
