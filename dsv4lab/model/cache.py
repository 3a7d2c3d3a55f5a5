"""The heterogeneous cache: window rings, paged compressed entries, index keys and compressor state (spec 12).

Everything is addressed by absolute position, so going back (rejected drafts) copies nothing. Compressed entries live in blocks
of lcm(csa_ratio, hca_ratio) tokens; block b of a sequence is the same page number in every layer, so one block table serves
all layers. The window of sequence s is a ring: position p in slot s * ring_len + p mod ring_len.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsv4lab.config import CSA, HCA, SWA, ModelConfig
from dsv4lab.model.numerics import Numerics
from dsv4lab.records import allocate_index_pages, allocate_kv_pages

DEFAULT_STEP = 512  # tokens of a sequence in one prefill step: bounds activations, not results
WINDOW_PAGE = 64  # records a window page holds (spec 12.2)


class CacheFull(RuntimeError):
    """No free sequence place or no free block; the message says which and how many there are."""


@dataclass
class LayerCache:
    """What one layer keeps. Entry parts are None in SWA layers, index parts in all but CSA layers."""

    window_pages: torch.Tensor
    entry_pages: torch.Tensor | None = None
    state: torch.Tensor | None = None  # (num_seqs, R, 2, o*d) f32: compressor ring
    index_pages: torch.Tensor | None = None
    index_state: torch.Tensor | None = None


class Cache:
    """Cache of up to `max_seqs` sequences that share `max_blocks` blocks of compressed entries.

    max_step: most tokens of one sequence in one forward step, and most that `rewind` may go back. Sequences take a place with
    `open`, grow with `reserve` before a step and `advance` after it, and give it back with `close`.
    """

    def __init__(
        self,
        config: ModelConfig,
        numerics: Numerics,
        *,
        max_seqs: int,
        max_tokens: int,
        max_step: int,
        max_rewind: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        """max_tokens: tokens of all sequences together, rounded up to whole blocks for each of them."""
        for name, value in {"max_seqs": max_seqs, "max_tokens": max_tokens, "max_step": max_step}.items():
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if not 0 <= max_rewind <= max_step:
            raise ValueError(f"max_rewind must be in [0, max_step {max_step}], got {max_rewind}")
        self.config, self.numerics = config, numerics
        self.max_seqs, self.max_step, self.max_rewind = max_seqs, max_step, max_rewind
        self.block_tokens = config.block_tokens
        self.num_blocks = -(-max_tokens // self.block_tokens) + max_seqs - 1
        self.ring_len = -(-(config.sliding_window + max_step) // WINDOW_PAGE) * WINDOW_PAGE
        self.device = torch.device(device)
        self.block_table = torch.full((max_seqs, self.num_blocks), -1, dtype=torch.int32, device=device)
        self.layers = [self._layer(kind, dtype) for kind in config.layer_kinds]
        self.mtp = [self._layer(SWA, dtype) for _ in range(config.num_nextn_predict_layers)]
        self.lengths = [0] * max_seqs
        self._high = [0] * max_seqs  # positions below this were written at some time: what a ring may have overwritten
        self._blocks: list[list[int]] = [[] for _ in range(max_seqs)]
        self._free_blocks = list(range(self.num_blocks))[::-1]
        self._free_seqs = list(range(max_seqs))[::-1]

    def _layer(self, kind: str, dtype: torch.dtype) -> LayerCache:
        c = self.config

        def key_pages(num_pages: int, page_size: int) -> torch.Tensor:
            return allocate_kv_pages(
                self.numerics.kv_record,
                num_pages=num_pages,
                page_size=page_size,
                dim=c.head_dim,
                rope_dim=c.qk_rope_head_dim,
                dtype=dtype,
                device=self.device,
            )

        layer = LayerCache(key_pages(self.max_seqs * self.ring_len // WINDOW_PAGE, WINDOW_PAGE))
        if kind == SWA:
            return layer
        layer.entry_pages = key_pages(self.num_blocks, self.page_size(kind))
        overlap = kind == CSA
        layer.state = self._state(c.ratio(kind), overlap, c.head_dim)
        if kind == CSA:
            layer.index_pages = allocate_index_pages(
                self.numerics.index_record,
                num_pages=self.num_blocks,
                page_size=self.page_size(kind),
                dim=c.index_head_dim,
                dtype=dtype,
                device=self.device,
            )
            layer.index_state = self._state(c.ratio(kind), overlap, c.index_head_dim)
        return layer

    def _state(self, ratio: int, overlap: bool, dim: int) -> torch.Tensor:
        """Values 0, scores -inf (spec 12.1): the ring spans what pooling looks back on, and what a rewind may uncover."""
        fold = 2 if overlap else 1
        state = torch.zeros(self.max_seqs, fold * ratio + self.max_rewind, 2, fold * dim, device=self.device)
        state[:, :, 1] = -torch.inf
        return state

    def page_size(self, kind: str) -> int:
        """Compressed entries a block holds: 32 for CSA, 1 for HCA."""
        return self.block_tokens // self.config.ratio(kind)

    @property
    def entry_kinds(self) -> tuple[str, ...]:
        """The kinds of layers that have compressed entries."""
        return tuple(kind for kind in (CSA, HCA) if kind in self.config.layer_kinds)

    @property
    def nbytes(self) -> int:
        """Bytes of every pool and ring."""
        parts = [t for layer in self.layers + self.mtp for t in vars(layer).values() if t is not None]
        return sum(t.nbytes for t in parts) + self.block_table.nbytes

    @property
    def free_blocks(self) -> int:
        return len(self._free_blocks)

    def blocks(self, seq: int) -> tuple[int, ...]:
        """The page numbers a sequence holds, in order."""
        return tuple(self._blocks[seq])

    # ---- life of a sequence --------------------------------------------------------------------------------------------
    def open(self) -> int:
        """Take a free place for a new, empty sequence. Raises CacheFull."""
        if not self._free_seqs:
            raise CacheFull(f"all {self.max_seqs} sequence places are taken")
        return self._free_seqs.pop()

    def close(self, seq: int) -> None:
        """Give back a sequence's place and blocks."""
        self._check_open(seq)
        self._release(seq, 0)
        self.lengths[seq] = self._high[seq] = 0
        self._free_seqs.append(seq)

    def reserve(self, seq: int, num_new: int) -> None:
        """Make room for `num_new` more tokens. Raises CacheFull and changes nothing when there are too few blocks."""
        self._check_open(seq)
        if not 0 <= num_new <= self.max_step:
            raise ValueError(f"num_new must be in [0, max_step {self.max_step}], got {num_new}")
        total = self.lengths[seq] + num_new
        limit = self.config.max_position_embeddings
        if total > limit + self.max_rewind:  # a step's last tokens may be drafts that nobody wants any more
            most = f"max_position_embeddings {limit} + max_rewind {self.max_rewind}"
            raise ValueError(f"sequence length must be <= {most}, got {total}")
        missing = -(-total // self.block_tokens) - len(self._blocks[seq])
        if missing > len(self._free_blocks):
            raise CacheFull(f"{missing} more blocks of {self.block_tokens} tokens needed, {len(self._free_blocks)} are free")
        for _ in range(missing):
            block = self._free_blocks.pop()
            self.block_table[seq, len(self._blocks[seq])] = block
            self._blocks[seq].append(block)

    def advance(self, seq: int, num_new: int) -> None:
        """Count the tokens of a step that has been written."""
        self._check_open(seq)
        self.lengths[seq] += num_new
        self._high[seq] = max(self._high[seq], self.lengths[seq])

    def rewind(self, seq: int, length: int) -> None:
        """Forget the tokens from `length` on: they may be written anew. Raises ValueError beyond what the rings still hold."""
        self._check_open(seq)
        oldest = max(self._high[seq] - self.max_rewind, 0)
        if not oldest <= length <= self.lengths[seq]:
            raise ValueError(
                f"rewind of sequence {seq} must be to a length in [{oldest}, {self.lengths[seq]}] "
                f"(max_rewind {self.max_rewind}), got {length}"
            )
        self.lengths[seq] = length
        self._release(seq, -(-length // self.block_tokens))

    def _release(self, seq: int, keep: int) -> None:
        for place in range(keep, len(self._blocks[seq])):
            self._free_blocks.append(self._blocks[seq][place])
            self.block_table[seq, place] = -1
        del self._blocks[seq][keep:]

    def _check_open(self, seq: int) -> None:
        if not 0 <= seq < self.max_seqs or seq in self._free_seqs:
            raise ValueError(f"sequence must be an open place in [0, {self.max_seqs}), got {seq}")

    # ---- addresses -----------------------------------------------------------------------------------------------------
    def window_slot(self, seq: int, position: int) -> int:
        return seq * self.ring_len + position % self.ring_len


@dataclass(frozen=True)
class EntryPlan:
    """What a step's tokens may see of the compressed entries of one ratio.

    num_visible (M,): entries each token of the step may attend to; max_visible: the largest of them.
    """

    num_visible: torch.Tensor
    max_visible: int


@dataclass(frozen=True)
class Batch:
    """One forward step: the tokens of one or more sequences, flat, with every address the layers need. All int64 but noted.

    token_ids, positions, seq_idx, window_slots, first_row, last_position (M,); last_rows (B,): each sequence's last row.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    seq_idx: torch.Tensor
    window_slots: torch.Tensor
    first_row: torch.Tensor
    last_position: torch.Tensor
    last_rows: torch.Tensor
    entries: dict[str, EntryPlan]  # by attention kind, CSA and HCA
    cache: Cache

    @classmethod
    def plan(
        cls, cache: Cache, steps: list[tuple[int, list[int]]], *, starts: list[int] | None = None, fixed: bool = False
    ) -> Batch:
        """Lay out (sequence, token ids) pairs, each sequence once, its blocks reserved.

        `starts`: first positions, the sequences' lengths if absent. With them the step is the prediction block's, which runs
        at places of its own and has a window only: no entries are planned. `fixed`: for a CUDA graph, what is launched must
        not depend on positions, so queries are said to see as many entries as the block table has places for; see `copy_`.
        """
        seqs = [seq for seq, _ in steps]
        if len(set(seqs)) != len(seqs):
            raise ValueError(f"a step must name each sequence once, got {seqs}")
        if not steps or any(not ids for _, ids in steps):
            raise ValueError("a step must have at least one token for each of its sequences, got an empty one")
        compressed = starts is None
        starts = [cache.lengths[seq] for seq in seqs] if starts is None else starts
        token_ids: list[int] = []
        positions: list[int] = []
        seq_idx: list[int] = []
        first_row: list[int] = []
        last_position: list[int] = []
        last_rows: list[int] = []
        for (seq, ids), start in zip(steps, starts, strict=True):
            first_row += [len(token_ids)] * len(ids)
            token_ids += ids
            positions += range(start, start + len(ids))
            seq_idx += [seq] * len(ids)
            last_position += [start + len(ids) - 1] * len(ids)
            last_rows.append(len(token_ids) - 1)
        slots = [cache.window_slot(s, p) for s, p in zip(seq_idx, positions, strict=True)]

        def tensor(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int64, device=cache.device)

        entries = {}
        for kind in cache.entry_kinds if compressed else ():
            ratio = cache.config.ratio(kind)
            visible = [(p + 1) // ratio for p in positions]
            places = min(cache.num_blocks * cache.page_size(kind), cache.config.max_position_embeddings // ratio)
            most = max(places, *visible) if fixed else max(visible)
            entries[kind] = EntryPlan(num_visible=tensor(visible), max_visible=most)
        return cls(
            token_ids=tensor(token_ids),
            positions=tensor(positions),
            seq_idx=tensor(seq_idx),
            window_slots=tensor(slots),
            first_row=tensor(first_row),
            last_position=tensor(last_position),
            last_rows=tensor(last_rows),
            entries=entries,
            cache=cache,
        )

    @classmethod
    def laid_out(
        cls,
        cache: Cache,
        token_ids: torch.Tensor,
        places: torch.Tensor,
        first_row: torch.Tensor,
        last_rows: torch.Tensor,
        longest: int,
    ) -> Batch:
        """A step by addresses that were found on the device.

        places: of `ops.decode_plan` with the ratios of `cache.entry_kinds`; longest: tokens of the longest sequence with this
        step's; for a CUDA graph, of the longest one it will see.
        """
        positions, seq_idx, window_slots, last_position, *visible = places
        entries = {
            kind: EntryPlan(num_visible, longest // cache.config.ratio(kind))
            for kind, num_visible in zip(cache.entry_kinds, visible, strict=True)
        }
        return cls(token_ids, positions, seq_idx, window_slots, first_row, last_position, last_rows, entries, cache)

    def copy_(self, other: Batch) -> None:
        """Take another step's values, in place: a CUDA graph captured with this batch runs that step next.

        Raises ValueError, and changes nothing, where the steps differ in shape, or the other sees more entries than this may.
        """
        mine, theirs = self._tensors(), other._tensors()
        shapes, wanted = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (theirs, mine))
        if shapes != wanted:
            raise ValueError(f"a batch to copy must have the shapes {wanted}, got {shapes}")
        for kind, plan in self.entries.items():
            if other.entries[kind].max_visible > plan.max_visible:
                most = other.entries[kind].max_visible
                raise ValueError(f"a batch to copy must have max_visible <= {plan.max_visible} for {kind}, got {most}")
        for name, tensor in mine.items():
            tensor.copy_(theirs[name])

    def _tensors(self) -> dict[str, torch.Tensor]:
        found = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return found | {kind: plan.num_visible for kind, plan in self.entries.items()}
