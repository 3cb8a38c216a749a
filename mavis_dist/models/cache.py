"""What a decoder works on: its keys and values by slot, and the tokens of one forward pass.

Shapes: L layers, B rows of a forward pass, T tokens of the longest row, N tokens of all rows, concatenated, C tokens of
the caller, S visible cells, Z slots, H heads, D head size, R tokens whose outputs are read, O outputs of the head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch

from mavis_dist.native.memory import zeros


class Layout:
    """Which tokens a forward pass computes for a caller's rows: the same for all passes over these rows.

    A pass may cover more slots, and more tokens of each, than the caller asks for: those are computed and dropped, so
    that shapes stay the same. The caller may name rows that are not here: nothing is computed for them.
    """

    def __init__(
        self,
        slots: Sequence[int],
        widths: Sequence[int],
        rows: Sequence[int],
        counts: Sequence[int],
        device: torch.device,
        num_slots: int,
        is_static: bool = False,
    ):
        """
        Args:
            slots: of each row of the pass, ascending.
            widths: tokens of each row of the pass.
            rows: the caller's row that each row of the pass is; -1: none.
            counts: tokens of each row of the caller.
            is_static: what is computed depends only on the number of rows, on their width, which is the same for all,
                and on whether they are the first slots, also where it could be simpler.
        """
        self.slots, self.widths, self.is_static = slots, widths, is_static
        self._rows, self._counts = rows, counts
        slot_B, width_B, caller_B, count_A = (np.array(x, np.int64) for x in (slots, widths, rows, counts))
        row_N = np.repeat(np.arange(len(slot_B)), width_B)
        column_N = np.arange(len(row_N)) - np.repeat(width_B.cumsum() - width_B, width_B)
        num_callers, is_simple = int(count_A.sum()), not is_static and list(rows) == list(range(len(counts)))

        def put(x: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(x).to(device)

        self.slot_B, self.slot_N, self.row_N, self.column_N = (put(x) for x in (slot_B, slot_B[row_N], row_N, column_N))
        count_Z = np.zeros(num_slots, np.int64)
        count_Z[slot_B] = np.where(caller_B >= 0, count_A[caller_B], 0)
        self.count_Z = put(count_Z)  # tokens of the caller, by slot
        self.read_C = self.read_R = put(np.arange(num_callers))  # the token of the pass that each of the caller is
        # None where the tokens of the pass are those of the caller, in the same order.
        self.is_known_C: torch.Tensor | None = None  # tokens of the caller whose rows are here
        self._source_N: torch.Tensor | None = None  # the caller's token that each is
        self._is_asked_N: torch.Tensor | None = None
        self._output_C: torch.Tensor | None = None
        if is_simple:
            return
        caller_N = caller_B[row_N]
        is_asked_N = (caller_N >= 0) & (column_N < count_A[caller_N])
        source_N = np.where(is_asked_N, (count_A.cumsum() - count_A)[caller_N] + column_N, 0)
        read_C, is_known_C = np.zeros(num_callers, np.int64), np.zeros(num_callers, bool)
        read_C[source_N[is_asked_N]] = is_asked_N.nonzero()[0]
        is_known_C[source_N[is_asked_N]] = True
        self.read_C = self.read_R = put(read_C)
        self._source_N = put(source_N)
        if is_static:
            self.is_known_C, self._is_asked_N = put(is_known_C), put(is_asked_N)
        elif not is_known_C.all():
            self.is_known_C = put(is_known_C)
            # No output is read twice.
            self.read_R, self._output_C = put(read_C[is_known_C]), put(np.maximum(is_known_C.cumsum() - 1, 0))

    def spread(self, x_C: torch.Tensor) -> torch.Tensor:
        """The caller's integers [N] in the order of the pass; 0 where it does not ask."""
        if self._source_N is None:
            return x_C
        x_N = x_C[self._source_N]
        return x_N if self._is_asked_N is None else x_N * self._is_asked_N

    def outputs(self, out_RO: torch.Tensor) -> torch.Tensor:
        """[R, O], read at `read_R` -> [C, O]; undefined where the caller's row is not here."""
        return out_RO if self._output_C is None else out_RO[self._output_C]

    @cached_property
    def start_Z(self) -> torch.Tensor:
        """The first token of the caller, by slot; 0 where it does not ask."""
        count_A, start_Z = np.array(self._counts, np.int64), np.zeros(len(self.count_Z), np.int64)
        is_asked_B = np.array(self._rows) >= 0
        start_Z[np.array(self.slots)[is_asked_B]] = (count_A.cumsum() - count_A)[np.array(self._rows)[is_asked_B]]
        return torch.from_numpy(start_Z).to(self.count_Z.device)

    @cached_property
    def is_rectangular(self) -> bool:
        return min(self.widths) == max(self.widths)

    @cached_property
    def has_first_slots(self) -> bool:
        return self.slots[-1] + 1 == len(self.slots)

    @property
    def slot_index(self) -> slice | torch.Tensor:
        """Selects the rows' slots: a view where they are contiguous."""
        is_view = self.has_first_slots if self.is_static else self.slots[-1] - self.slots[0] + 1 == len(self.slots)
        return slice(self.slots[0], self.slots[-1] + 1) if is_view else self.slot_B

    def at(self, slot_B: torch.Tensor, slot_N: torch.Tensor) -> Layout:
        """The same pass for other slots."""
        other = copy(self)
        other.slot_B, other.slot_N = slot_B, slot_N
        return other


@dataclass(frozen=True)
class Step:
    """The tokens of one forward pass, grouped by row, rows in the order of their slots.

    A token at position p attends to the first p cells of its slot and to its own cell. That is causal attention when
    tokens are appended (cell = position), and isolates alternatives from each other (same position, a cell each).
    """

    layout: Layout
    tokens_N: torch.Tensor
    positions_N: torch.Tensor
    cells_N: torch.Tensor
    read_R: torch.Tensor  # indices of the tokens whose outputs are read
    num_visible: int
    num_cells: int  # of a slot

    @property
    def slot_N(self) -> torch.Tensor:
        """The slot of each token."""
        return self.layout.slot_N

    @cached_property
    def place_N(self) -> torch.Tensor:
        """The cell of each token, numbered over all slots."""
        return self.slot_N * self.num_cells + self.cells_N

    @cached_property
    def mask_BTS(self) -> torch.Tensor:
        """The cells that each token attends to; padding attends to the first."""
        cell_S = torch.arange(self.num_visible, device=self.tokens_N.device)
        positions_BT, cells_BT = self.pad(self.positions_N), self.pad(self.cells_N)
        return (cell_S < positions_BT[:, :, None]) | (cell_S == cells_BT[:, :, None])

    @property
    def key_positions_BTS(self) -> torch.Tensor:
        """The positions of the cells that each token attends to: an alternative's own cell may lie beyond its own."""
        cell_S = torch.arange(self.num_visible, device=self.tokens_N.device)
        return torch.minimum(cell_S, self.pad(self.positions_N)[:, :, None])

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """[N, ...] -> [B, T, ...], shorter rows padded with zeros at the end."""
        shape = (len(self.layout.widths), max(self.layout.widths), *x.shape[1:])
        if self.layout.is_rectangular:
            return x.reshape(shape)
        padded = x.new_zeros(shape)
        padded[self.layout.row_N, self.layout.column_N] = x
        return padded

    def unpad(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, ...] -> [N, ...]."""
        return x.flatten(0, 1) if self.layout.is_rectangular else x[self.layout.row_N, self.layout.column_N]


class KVCache:
    """Keys and values of all layers by slot and cell.

    One tensor `storage` [L, 2, slots, cells, H, D] if their shape is given, so that moving cells takes as many
    operations as moving those of one layer. Otherwise a tensor per layer for its keys, and one for its values,
    allocated at the first write: there are models whose layers differ.
    """

    def __init__(self, num_layers: int, like: torch.Tensor | None = None, is_masked: bool = True):
        """
        Args:
            like: an example of the keys and values of a token, [H, D], with their type and device.
            is_masked: cells that a row does not have are read, and masked: if they are nan, they still spoil sums.
        """
        self._is_masked = is_masked
        self.generation = 0  # changes whenever the memory does
        self.storage: torch.Tensor | None = None
        self._num_slots, self._num_cells, self._like = 0, 0, like
        self._parts: list[list[torch.Tensor | None]] = [[None, None] for _ in range(num_layers)]

    @property
    def num_layers(self) -> int:
        return len(self._parts)

    def write(
        self, layer: int, step: Step, keys_NHD: torch.Tensor, values_NHD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the step's keys and values; returns all visible ones of its rows, [B, H, S, D] each."""
        seen = []
        for kind, new in enumerate((keys_NHD, values_NHD)):
            cells = self._cells(layer, kind, new)
            cells.flatten(0, 1).index_copy_(0, step.place_N, new)
            seen.append(cells[step.layout.slot_index, : step.num_visible].transpose(1, 2))
        return seen[0], seen[1]

    def resize(self, num_slots: int, num_cells: int) -> None:
        self._num_slots, self._num_cells = num_slots, num_cells
        self.generation += 1
        if self._like is not None:
            shape = (self.num_layers, 2, num_slots, num_cells, *self._like.shape)
            is_on_cpu = self._like.device.type == "cpu"
            whole = zeros(shape, self._like.dtype) if is_on_cpu else self._like.new_zeros(shape)
            self.storage = whole if self.storage is None else _grown(self.storage, whole)
        for parts in self._parts:
            for kind, old in enumerate(parts):
                if old is not None:
                    parts[kind] = _grown(old, self._empty(old))

    def clear(self) -> None:
        """Free the memory."""
        self.storage = None
        self.generation += 1
        self._parts = [[None, None] for _ in self._parts]
        self._num_slots, self._num_cells = 0, 0

    @property
    def is_empty(self) -> bool:
        """Whether it holds no memory."""
        return not list(self._tensors())

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first cells of a slot to another; where masked cells are read, the rest become 0."""
        for cells in self._tensors():
            if source != target:
                cells[:, target, :length] = cells[:, source, :length]
            if self._is_masked:
                cells[:, target, length:] = 0

    def move_cells(self, slot_B: torch.Tensor, source_B: torch.Tensor, target_B: torch.Tensor) -> None:
        """Copy one cell of each of these slots to another of its cells."""
        first_B = slot_B * self._num_cells
        for cells in self._tensors():
            flat = cells.flatten(1, 2)
            flat.index_copy_(1, first_B + target_B, flat.index_select(1, first_B + source_B))

    def _tensors(self) -> Iterator[torch.Tensor]:
        """All memory, as views [parts, slots, cells, H, D]."""
        if self.storage is not None:
            yield self.storage.flatten(0, 1)
        for parts in self._parts:
            yield from (part[None] for part in parts if part is not None)

    def _cells(self, layer: int, kind: int, like_NHD: torch.Tensor) -> torch.Tensor:
        """The keys (kind 0) or values (1) of a layer, [slots, cells, H, D]."""
        if self.storage is not None:
            return self.storage[layer, kind]
        part = self._parts[layer][kind]
        if part is None:
            part = self._parts[layer][kind] = self._empty(like_NHD)
        return part

    def _empty(self, like: torch.Tensor) -> torch.Tensor:
        return like.new_zeros(self._num_slots, self._num_cells, *like.shape[-2:])


def _grown(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """The larger tensor with the content of the smaller one; the last two dimensions are the same."""
    new[..., : old.shape[-4], : old.shape[-3], :, :] = old
    return new


class Decoder(Protocol):
    """A model with its keys and values by slots: the part that one process, or a group in lockstep, computes.

    `step` returns the outputs [R, O] of the tokens that are read, in the order of `step.read_R`, and stores the keys
    and values of all tokens.
    """

    cache: KVCache
    device: torch.device
    is_batch_invariant: bool  # no output depends on the other rows and tokens of a step, to the last bit
    states: torch.Tensor | None  # of the same tokens, after a step [R, C], if `read_states` has asked for them

    def step(self, step: Step) -> torch.Tensor: ...

    def read_states(self, layer: int | None) -> bool:
        """From now on, also return the hidden states behind so many layers and the final norm; None: none any more.

        False: this decoder cannot.
        """
        ...
