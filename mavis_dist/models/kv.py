"""A key-value cache of slots: rows of different lengths in one batch, forked, extended, branched and closed at will.

The rows in use always fill the first slots, so that a step over all of them reads views and copies nothing.

Shapes: B rows, T new tokens of a row, S visible cells, K candidates, O outputs of the model's head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

CELLS_PER_GROWTH = 64


@dataclass
class _Window:
    """Where the forward pass under way writes and reads; shared by all layers."""

    slots: slice | torch.Tensor
    cells_BT: torch.Tensor
    num_visible: int


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer: [slots, heads, cells, head size], made when the first ones arrive."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, num_slots: int, num_cells: int):
        super().__init__()
        self.num_slots, self.num_cells = num_slots, num_cells
        self.window: _Window | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys, self.values = (
            torch.zeros(self.num_slots, x.shape[1], self.num_cells, x.shape[3], dtype=x.dtype, device=x.device)
            for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.window is not None
        slots, cells_BT, num_visible = self.window.slots, self.window.cells_BT, self.window.num_visible
        if isinstance(slots, slice):
            rows_B1 = torch.arange(slots.start, slots.stop, device=cells_BT.device)[:, None]
        else:
            rows_B1 = slots[:, None]
        for store, new in ((self.keys, key_states), (self.values, value_states)):
            store[rows_B1, :, cells_BT] = new.transpose(1, 2)
        return self.keys[slots, :, :num_visible], self.values[slots, :, :num_visible]

    def resize(self, num_slots: int, num_cells: int) -> None:
        self.num_slots, self.num_cells = num_slots, num_cells
        if not self.is_initialized:
            return
        old_keys, old_values = self.keys, self.values
        self.lazy_initialization(old_keys, old_values)
        for store, old in ((self.keys, old_keys), (self.values, old_values)):
            store[: old.shape[0], :, : old.shape[2]] = old

    def copy(self, source: int, target: int, length: int) -> None:
        """Give a slot the first cells of another, and nothing else: a masked cell that is nan still spoils the sums."""
        if self.is_initialized:
            for store in (self.keys, self.values):
                store[target, :, :length] = store[source, :, :length]
                store[target, :, length:] = 0

    def move_cells(self, slots_B: torch.Tensor, source_B: torch.Tensor, target_B: torch.Tensor) -> None:
        for store in (self.keys, self.values):
            store[slots_B, :, target_B] = store[slots_B, :, source_B]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        assert self.window is not None
        return self.window.num_visible, 0

    def get_seq_length(self) -> int:
        return 0  # positions and masks are always given explicitly

    def get_max_length(self) -> int:
        return -1


class SlotModel:
    """A decoder with its rows. Row names are the caller's; a row's tokens are the caller's to remember.

    `forward` is any callable with the interface of a Hugging Face decoder that returns head outputs [B, T, O];
    `backbone` is the same model without the head, for tokens whose outputs nobody reads.
    """

    def __init__(self, forward: Callable[..., torch.Tensor], backbone: PreTrainedModel, num_slots: int = 8):
        self._forward, self._backbone = forward, backbone
        self._device = backbone.device
        self._layers = [_SlotLayer(num_slots, CELLS_PER_GROWTH) for _ in range(backbone.config.num_hidden_layers)]
        self._cache = Cache(layers=list(self._layers))
        self._slot_of: dict[int, int] = {}
        self._rows: list[int] = []  # slot -> row
        self._lengths: list[int] = []  # slot -> tokens in the cache
        self._branched: list[int] = []  # slot -> alternatives in the cells behind them

    def __contains__(self, row: int) -> bool:
        return row in self._slot_of

    def length(self, row: int) -> int:
        """Tokens of this row whose keys and values are in the cache."""
        return self._lengths[self._slot_of[row]]

    @torch.inference_mode()
    def open(self, row: int, source: int | None = None, shared: int = 0) -> int:
        """Start a row, with the first `shared` tokens of another row; returns how many it really has."""
        assert row not in self._slot_of
        slot = len(self._rows)
        if slot == self._layers[0].num_slots:
            self._resize(2 * slot, self._layers[0].num_cells)
        self._slot_of[row] = slot
        self._rows.append(row)
        self._lengths.append(0)
        self._branched.append(0)
        origin = slot
        if source is not None and source in self._slot_of:
            origin, self._lengths[slot] = self._slot_of[source], min(shared, self.length(source))
        for layer in self._layers:
            layer.copy(origin, slot, self._lengths[slot])
        return self._lengths[slot]

    @torch.inference_mode()
    def close(self, row: int) -> None:
        """Free a row; the row in the last slot moves into its place."""
        slot, last = self._slot_of.pop(row), len(self._rows) - 1
        if slot != last:
            for layer in self._layers:
                layer.copy(last, slot, self._lengths[last] + self._branched[last])
            for column in (self._rows, self._lengths, self._branched):
                column[slot] = column[last]
            self._slot_of[self._rows[slot]] = slot
        for column in (self._rows, self._lengths, self._branched):
            column.pop()

    @torch.inference_mode()
    def extend(self, rows: Sequence[int], tokens: Sequence[Sequence[int]], outputs: bool = True) -> torch.Tensor | None:
        """Append tokens to rows; the head's outputs at each row's last new token [B, O], or None if unwanted."""
        counts = [len(t) for t in tokens]
        longest = max(counts)
        tokens_BT = torch.tensor([[*t, *[0] * (longest - len(t))] for t in tokens], device=self._device)
        lengths_B1 = self._lengths_tensor(rows)[:, None]
        positions_BT = lengths_B1 + torch.arange(longest, device=self._device)
        # Padding writes behind its row's end, where nothing is visible until it is overwritten.
        num_visible = max(self.length(row) for row in rows) + longest
        mask_BTS = torch.arange(num_visible, device=self._device) <= positions_BT[:, :, None]
        out_BTO = self._step(rows, tokens_BT, positions_BT, positions_BT, mask_BTS, outputs)
        for row, count in zip(rows, counts, strict=True):
            self._append(row, count)
        if out_BTO is None:
            return None
        return out_BTO[torch.arange(len(rows)), torch.tensor(counts, device=self._device) - 1]

    @torch.inference_mode()
    def branch(self, rows: Sequence[int], candidates_BK: torch.Tensor) -> torch.Tensor:
        """The head's outputs [B, K, O] for K alternative next tokens, which see their row and themselves only.

        Alternatives of several calls add up until one is kept or the row is extended.
        """
        num_candidates = candidates_BK.shape[1]
        lengths_B1 = self._lengths_tensor(rows)[:, None]
        branched = [self._branched[self._slot_of[row]] for row in rows]
        first_B1 = lengths_B1 + torch.tensor(branched, device=self._device)[:, None]
        cells_BK = first_B1 + torch.arange(num_candidates, device=self._device)
        num_visible = int(first_B1.max()) + num_candidates
        cell_S = torch.arange(num_visible, device=self._device)
        mask_BKS = (cell_S < lengths_B1[:, :, None]) | (cell_S == cells_BK[:, :, None])
        positions_BK = lengths_B1.expand(-1, num_candidates)
        out_BKO = self._step(rows, candidates_BK.to(self._device), positions_BK, cells_BK, mask_BKS, True)
        assert out_BKO is not None
        for row in rows:
            self._branched[self._slot_of[row]] += num_candidates
        return out_BKO

    @torch.inference_mode()
    def keep(self, rows: Sequence[int], index_B: torch.Tensor) -> None:
        """Append one alternative, counted over all branches since the row's last token, with its keys and values."""
        slots_B = torch.tensor([self._slot_of[row] for row in rows], device=self._device)
        lengths_B = self._lengths_tensor(rows)
        for layer in self._layers:
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
        tokens_BT: torch.Tensor,
        positions_BT: torch.Tensor,
        cells_BT: torch.Tensor,
        mask_BTS: torch.Tensor,
        outputs: bool,
    ) -> torch.Tensor | None:
        """One forward pass over rows in slot order, so that rows side by side are read in place."""
        num_visible = mask_BTS.shape[2]
        if num_visible > self._layers[0].num_cells:
            self._resize(self._layers[0].num_slots, -(-num_visible // CELLS_PER_GROWTH) * CELLS_PER_GROWTH)
        slots_B = torch.tensor([self._slot_of[row] for row in rows])
        order_B = slots_B.argsort()
        first, last = int(slots_B.min()), int(slots_B.max())
        side_by_side = last - first + 1 == len(rows)
        slots = slice(first, last + 1) if side_by_side else slots_B[order_B].to(self._device)
        order_B = order_B.to(self._device)
        window = _Window(slots, cells_BT[order_B], num_visible)
        for layer in self._layers:
            layer.window = window
        run = self._forward if outputs else self._backbone
        out = run(
            input_ids=tokens_BT[order_B],
            position_ids=positions_BT[order_B],
            attention_mask=mask_BTS[order_B][:, None],
            past_key_values=self._cache,
            use_cache=True,
        )
        return out[order_B.argsort()] if outputs else None

    def _lengths_tensor(self, rows: Sequence[int]) -> torch.Tensor:
        return torch.tensor([self.length(row) for row in rows], device=self._device)

    def _resize(self, num_slots: int, num_cells: int) -> None:
        for layer in self._layers:
            layer.resize(num_slots, num_cells)
