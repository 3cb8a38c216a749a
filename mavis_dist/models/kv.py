"""Rows of different lengths in one batch, which can be opened, forked, extended, branched and closed at any time.

`SlotModel` tracks which row occupies which slot of the key-value cache, and its length. A `Decoder` does the arithmetic
in one call, `step`. The rows in use always occupy the first slots, so that a step over all of them uses views without
copying.

Shapes: B rows, N tokens of all rows, concatenated, T tokens of the longest row, S visible cells, R tokens whose outputs
are read, O outputs of the model's head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Protocol

import torch

SLOTS_PER_GROWTH, CELLS_PER_GROWTH = 8, 64


@dataclass(frozen=True)
class Step:
    """The tokens of one forward pass, grouped by row, rows in the order of their slots.

    A token at position p attends to the first p cells of its slot and to its own cell. That is causal attention when
    tokens are appended (cell = position), and isolates alternatives from each other (same position, a cell each).
    """

    slots: Sequence[int]  # of each row, ascending
    counts: Sequence[int]  # tokens of each row
    tokens_N: torch.Tensor
    positions_N: torch.Tensor
    cells_N: torch.Tensor
    read_R: torch.Tensor  # indices of the tokens whose outputs are read
    num_visible: int
    num_cells: int  # of a slot

    @cached_property
    def is_rectangular(self) -> bool:
        return min(self.counts) == max(self.counts)

    @cached_property
    def row_N(self) -> torch.Tensor:
        """The row of each token: b of its slot."""
        counts_B = torch.tensor(self.counts, device=self.tokens_N.device)
        return torch.arange(len(self.counts), device=counts_B.device).repeat_interleave(counts_B)

    @cached_property
    def column_N(self) -> torch.Tensor:
        """The index of each token within its row."""
        counts_B = torch.tensor(self.counts, device=self.tokens_N.device)
        starts_B = counts_B.cumsum(0) - counts_B
        return torch.arange(len(self.tokens_N), device=counts_B.device) - starts_B[self.row_N]

    @cached_property
    def place_N(self) -> torch.Tensor:
        """The cell of each token, numbered over all slots."""
        slot_N = torch.tensor(self.slots, device=self.tokens_N.device)[self.row_N]
        return slot_N * self.num_cells + self.cells_N

    @cached_property
    def slot_index(self) -> slice | torch.Tensor:
        """Selects the rows' slots: a view where they are contiguous."""
        if self.slots[-1] - self.slots[0] + 1 == len(self.slots):
            return slice(self.slots[0], self.slots[-1] + 1)
        return torch.tensor(self.slots, device=self.tokens_N.device)

    @cached_property
    def mask_BTS(self) -> torch.Tensor:
        """The cells that each token attends to; padding attends to the first."""
        cell_S = torch.arange(self.num_visible, device=self.tokens_N.device)
        positions_BT, cells_BT = self.pad(self.positions_N), self.pad(self.cells_N)
        return (cell_S < positions_BT[:, :, None]) | (cell_S == cells_BT[:, :, None])

    def windowed_mask_BTS(self, window: int) -> torch.Tensor:
        """The cells that each token attends to among the last `window` tokens, itself included."""
        cell_S = torch.arange(self.num_visible, device=self.tokens_N.device)
        return self.mask_BTS & (cell_S > self.pad(self.positions_N)[:, :, None] - window)

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """[N, ...] -> [B, T, ...], shorter rows padded with zeros at the end."""
        shape = (len(self.counts), max(self.counts), *x.shape[1:])
        if self.is_rectangular:
            return x.reshape(shape)
        padded = x.new_zeros(shape)
        padded[self.row_N, self.column_N] = x
        return padded

    def unpad(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, ...] -> [N, ...]."""
        return x.flatten(0, 1) if self.is_rectangular else x[self.row_N, self.column_N]


class KVLayer:
    """Keys and values of one layer: [slots, cells, heads, head size], allocated at the first write."""

    def __init__(self) -> None:
        self._num_slots, self._num_cells = 0, 0
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None

    def write(self, step: Step, keys_NHD: torch.Tensor, values_NHD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the step's keys and values; returns all visible ones of its rows, [B, H, S, D] each."""
        if self._keys is None or self._values is None:
            self._keys, self._values = self._empty(keys_NHD), self._empty(values_NHD)
        seen = []
        for store, new in ((self._keys, keys_NHD), (self._values, values_NHD)):
            store.flatten(0, 1).index_copy_(0, step.place_N, new)
            seen.append(store[step.slot_index, : step.num_visible].transpose(1, 2))
        return seen[0], seen[1]

    def resize(self, num_slots: int, num_cells: int) -> None:
        self._num_slots, self._num_cells = num_slots, num_cells
        if self._keys is not None and self._values is not None:
            self._keys, self._values = self._grown(self._keys), self._grown(self._values)

    def clear(self) -> None:
        """Free the memory."""
        self._keys = self._values = None

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first cells of a slot to another and zero the rest: masked cells that are nan still spoil sums."""
        for store in (self._keys, self._values):
            if store is not None:
                store[target, :length] = store[source, :length]
                store[target, length:] = 0

    def move_cells(self, slots_B: torch.Tensor, source_B: torch.Tensor, target_B: torch.Tensor) -> None:
        for store in (self._keys, self._values):
            assert store is not None
            store[slots_B, target_B] = store[slots_B, source_B]

    def _empty(self, like: torch.Tensor) -> torch.Tensor:
        return like.new_zeros(self._num_slots, self._num_cells, *like.shape[-2:])

    def _grown(self, old: torch.Tensor) -> torch.Tensor:
        new = self._empty(old)
        new[: old.shape[0], : old.shape[1]] = old
        return new


class Decoder(Protocol):
    """A model with its keys and values by slots: the part that one process, or a group in lockstep, computes.

    `step` returns the outputs [R, O] of the tokens that are read, in the order of `step.read_R`, and stores the keys
    and values of all tokens.
    """

    layers: list[KVLayer]
    device: torch.device

    def step(self, step: Step) -> torch.Tensor: ...


class SlotModel:
    """A decoder with its rows. The caller numbers the rows and keeps their tokens."""

    def __init__(self, decoder: Decoder):
        self._decoder, self._device = decoder, decoder.device
        self._num_slots, self._num_cells = 0, 0
        self._slot_of: dict[int, int] = {}
        self._rows: list[int] = []  # slot -> row
        self._lengths: list[int] = []  # slot -> tokens in the cache
        self._branched: list[int] = []  # slot -> alternatives in the cells after those

    def __contains__(self, row: int) -> bool:
        return row in self._slot_of

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows whose keys and values are in the cache."""
        return sum(self._lengths)

    def length(self, row: int) -> int:
        """Tokens of this row whose keys and values are in the cache."""
        return self._lengths[self._slot_of[row]]

    @torch.inference_mode()
    def open(self, row: int, source: int | None = None, shared: int = 0) -> int:
        """Start a row with the first `shared` tokens of another row; returns how many were available."""
        assert row not in self._slot_of
        slot = len(self._rows)
        if slot == self._num_slots:
            self._resize(slot + SLOTS_PER_GROWTH, self._num_cells)
        self._slot_of[row] = slot
        self._rows.append(row)
        self._lengths.append(0)
        self._branched.append(0)
        origin = slot
        if source is not None and source in self._slot_of:
            origin, self._lengths[slot] = self._slot_of[source], min(shared, self.length(source))
        for layer in self._decoder.layers:
            layer.copy(origin, slot, self._lengths[slot])
        return self._lengths[slot]

    @torch.inference_mode()
    def close(self, row: int) -> None:
        """Free a row; the row in the last slot moves into its place."""
        slot, last = self._slot_of.pop(row), len(self._rows) - 1
        if slot != last:
            for layer in self._decoder.layers:
                layer.copy(last, slot, self._lengths[last] + self._branched[last])
            for column in (self._rows, self._lengths, self._branched):
                column[slot] = column[last]
            self._slot_of[self._rows[slot]] = slot
        for column in (self._rows, self._lengths, self._branched):
            column.pop()
        if not self._rows:
            self._clear()

    @torch.inference_mode()
    def extend(
        self, rows: Sequence[int], tokens: Sequence[Sequence[int]], num_read: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Append tokens to rows; the head's outputs [R, O] at the last `num_read[b]` new tokens of each row, grouped by
        row. None: at the last one.
        """
        counts = [len(t) for t in tokens]
        flat = [token for row_tokens in tokens for token in row_tokens]
        positions = [
            p for row, n in zip(rows, counts, strict=True) for p in range(self.length(row), self.length(row) + n)
        ]
        tokens_N, positions_N = (torch.tensor(x, device=self._device) for x in (flat, positions))
        ends = accumulate(counts)
        read = [n for end, num in zip(ends, num_read or [1] * len(rows), strict=True) for n in range(end - num, end)]
        read_R = torch.tensor(read, dtype=torch.long, device=self._device)
        out_RO = self._step(rows, counts, tokens_N, positions_N, positions_N, read_R)
        for row, count in zip(rows, counts, strict=True):
            self._append(row, count)
        return out_RO

    @torch.inference_mode()
    def branch(self, rows: Sequence[int], counts: Sequence[int], candidates_N: torch.Tensor) -> torch.Tensor:
        """The head's outputs [N, O] for alternative next tokens, `counts[b]` of row b, grouped by row.

        An alternative attends only to its row and itself. Alternatives of several calls accumulate until one is kept or
        the row is extended.
        """
        slots = [self._slot_of[row] for row in rows]
        counts_B = torch.tensor(counts, device=self._device)
        starts_B = counts_B.cumsum(0) - counts_B
        lengths_B = torch.tensor([self._lengths[slot] for slot in slots], device=self._device)
        branched_B = torch.tensor([self._branched[slot] for slot in slots], device=self._device)
        every_N = torch.arange(len(candidates_N), device=self._device)
        positions_N = lengths_B.repeat_interleave(counts_B)
        cells_N = every_N + (lengths_B + branched_B - starts_B).repeat_interleave(counts_B)
        out_NO = self._step(rows, counts, candidates_N.to(self._device), positions_N, cells_N, every_N)
        for slot, count in zip(slots, counts, strict=True):
            self._branched[slot] += count
        return out_NO

    @torch.inference_mode()
    def keep(self, rows: Sequence[int], index_B: torch.Tensor) -> None:
        """Append one alternative with its keys and values; they are numbered over all calls since the last token."""
        slots = [self._slot_of[row] for row in rows]
        slots_B = torch.tensor(slots, device=self._device)
        lengths_B = torch.tensor([self._lengths[slot] for slot in slots], device=self._device)
        for layer in self._decoder.layers:
            layer.move_cells(slots_B, lengths_B + index_B.to(self._device), lengths_B)
        for row in rows:
            self._append(row, 1)

    def _append(self, row: int, count: int) -> None:
        slot = self._slot_of[row]
        self._lengths[slot] += count
        self._branched[slot] = 0

    def _step(
        self,
        rows: Sequence[int],
        counts: Sequence[int],
        tokens_N: torch.Tensor,
        positions_N: torch.Tensor,
        cells_N: torch.Tensor,
        read_R: torch.Tensor,
    ) -> torch.Tensor:
        """One forward pass, with the rows sorted by slot."""
        slots = [self._slot_of[row] for row in rows]
        if any(first > second for first, second in pairwise(slots)):
            order = sorted(range(len(rows)), key=slots.__getitem__)
            spans = torch.arange(len(tokens_N), device=self._device).split(list(counts))
            moved_N = torch.cat([spans[b] for b in order])
            slots, counts = [slots[b] for b in order], [counts[b] for b in order]
            tokens_N, positions_N, cells_N = tokens_N[moved_N], positions_N[moved_N], cells_N[moved_N]
            read_R = moved_N.argsort()[read_R]
        num_visible = int(cells_N.max()) + 1
        if num_visible > self._num_cells:
            self._resize(self._num_slots, -(-num_visible // CELLS_PER_GROWTH) * CELLS_PER_GROWTH)
        return self._decoder.step(
            Step(slots, counts, tokens_N, positions_N, cells_N, read_R, num_visible, self._num_cells)
        )

    def _resize(self, num_slots: int, num_cells: int) -> None:
        self._num_slots, self._num_cells = num_slots, num_cells
        for layer in self._decoder.layers:
            layer.resize(num_slots, num_cells)

    def _clear(self) -> None:
        """Free the memory: one long row would hold it for ever."""
        self._num_slots, self._num_cells = 0, 0
        for layer in self._decoder.layers:
            layer.clear()
