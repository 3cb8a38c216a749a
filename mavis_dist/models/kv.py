"""Rows of different lengths in one batch, which can be opened, forked, extended, branched and closed at any time.

`SlotModel` tracks which row occupies which slot of the key-value cache, and its length: on the host to plan the passes,
and on the device so that a pass copies nothing there but the new tokens. A `Decoder` does the arithmetic in one call,
`step`. The rows in use always occupy the first slots, so that a step over all of them uses views without copying.

Shapes: B rows, C tokens of the caller, N tokens of a forward pass, Z slots, R tokens whose outputs are read, O outputs
of the model's head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, islice

import torch

from mavis_dist.models.cache import Decoder, KVCache, Layout, Step
from mavis_dist.models.decoder import step_all

__all__ = ["Decoder", "KVCache", "Layout", "SlotModel", "Step", "bucket"]

SLOTS_PER_GROWTH, CELLS_PER_GROWTH = 8, 64
CELLS_RESERVED, CELLS_RESERVED_STATIC = 256, 1024  # at most, before they are needed
FEWEST_SLOTS = 4  # of a pass over some of the slots, where shapes are static
MAX_LAYOUTS = 64  # kept: a caller asks for few while its rows stay the same


def bucket(count: int) -> int:
    """The number of rows, at least `count`, that batches of similar size share: at most a third of them is empty above
    16 rows, and there are few sizes to record a graph of.
    """
    power = 1 << max(count - 1, 0).bit_length()
    return next(size for size in (power // 2 + power // 4, power) if size >= count and (size > 16 or size == power))


class SlotModel:
    """A decoder with its rows. The caller numbers the rows and keeps their tokens."""

    reads_answers = True

    def __init__(self, decoder: Decoder, static_shapes: bool | None = None):
        """`static_shapes`: the shapes of `append`, `branch` and `keep` depend on buckets only, so that a device can
        replay them; passes then cover more tokens than needed. None: on all devices but CPUs.
        """
        self._decoder, self._device = decoder, decoder.device
        self._is_static = decoder.device.type != "cpu" if static_shapes is None else static_shapes
        self._num_slots, self._num_cells, self._longest = 0, 0, 0
        self._slot_of: dict[int, int] = {}
        self._rows: list[int] = []  # slot -> row
        self._lengths: list[int] = []  # slot -> tokens in the cache
        self._branched: list[int] = []  # slot -> alternatives in the cells after those
        self._length_Z, self._branched_Z = self._zeros(0), self._zeros(0)  # the same on the device
        self._layouts: dict[tuple[tuple[int, ...], tuple[int, ...]], Layout] = {}
        self.states: torch.Tensor | None = None

    def __contains__(self, row: int) -> bool:
        return row in self._slot_of

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def is_batch_invariant(self) -> bool:
        """Whether no row's outputs depend on the other rows, to the last bit."""
        return self._decoder.is_batch_invariant

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows whose keys and values are in the cache."""
        return sum(self._lengths)

    def length(self, row: int) -> int:
        """Tokens of this row whose keys and values are in the cache."""
        return self._lengths[self._slot_of[row]]

    @torch.inference_mode()
    def reserve(self, num_rows: int, longest: int) -> None:
        """Make room at once for rows to be opened, of which none becomes longer than `longest`: growing copies."""
        self._longest = max(self._longest, longest)
        num_slots = self._slots_for(num_rows) if num_rows > self._num_slots else self._num_slots
        reserved = CELLS_RESERVED_STATIC if self._is_static else CELLS_RESERVED
        num_cells = max(self._num_cells, self._cells_for(min(longest, reserved)))
        if (num_slots, num_cells) != (self._num_slots, self._num_cells):
            self._resize(num_slots, num_cells)

    @torch.inference_mode()
    def open(self, row: int, source: int | None = None, shared: int = 0) -> int:
        """Start a row with the first `shared` tokens of another row; returns how many were available."""
        assert row not in self._slot_of
        slot = len(self._rows)
        if slot == self._num_slots:
            self._resize(self._slots_for(slot + 1), self._num_cells)
        origin, length = slot, 0
        if source is not None and source in self._slot_of:
            origin, length = self._slot_of[source], min(shared, self.length(source))
        self._slot_of[row] = slot
        self._rows.append(row)
        self._lengths.append(length)
        self._branched.append(0)
        self._length_Z[slot], self._branched_Z[slot] = length, 0
        self._decoder.cache.copy(origin, slot, length)
        self._layouts.clear()
        return length

    @torch.inference_mode()
    def close(self, row: int) -> None:
        """Free a row; the row in the last slot moves into its place."""
        slot, last = self._slot_of.pop(row), len(self._rows) - 1
        if slot != last:
            self._decoder.cache.copy(last, slot, self._lengths[last] + self._branched[last])
            for column in (self._rows, self._lengths, self._branched):
                column[slot] = column[last]
            self._length_Z[slot], self._branched_Z[slot] = self._lengths[slot], self._branched[slot]
            self._slot_of[self._rows[slot]] = slot
        for column in (self._rows, self._lengths, self._branched):
            column.pop()
        self._length_Z[last], self._branched_Z[last] = 0, 0
        self._layouts.clear()
        if not self._rows and not self._is_static:  # recordings need the memory where it is
            self._clear()

    @torch.inference_mode()
    def extend(
        self, rows: Sequence[int], tokens: Sequence[Sequence[int]], num_read: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Append tokens to rows; the head's outputs [R, O] at the last `num_read[b]` new tokens of each row, grouped by
        row. None: at the last one.
        """
        counts = [len(t) for t in tokens]
        layout = self._exact_layout(rows, counts)
        ends = accumulate(counts)
        read = [n for end, num in zip(ends, num_read or [1] * len(rows), strict=True) for n in range(end - num, end)]
        flat_C = torch.tensor([token for row_tokens in tokens for token in row_tokens], device=self._device)
        return self._append(layout, rows, counts, flat_C, layout.read_C[torch.tensor(read, dtype=torch.long)])

    @torch.inference_mode()
    def append(self, rows: Sequence[int], tokens_B: torch.Tensor) -> torch.Tensor:
        """Append one token to each row; the head's outputs [B, O]. Rows that are not here have undefined outputs."""
        counts = [1] * len(rows)
        layout = self.layout(rows, counts)
        out_BO = layout.outputs(self._append(layout, rows, counts, tokens_B, layout.read_R))
        states_RC = self._decoder.states
        self.states = None if states_RC is None else layout.outputs(states_RC)
        return out_BO

    def read_states(self, layer: int | None) -> bool:
        """From now on, `append` also sets `states`: those of the same tokens behind so many layers and the final norm,
        [B, C]. None: no more. False: the decoder cannot.
        """
        return self._decoder.read_states(layer)

    @torch.inference_mode()
    def branch(self, rows: Sequence[int], counts: Sequence[int], candidates_C: torch.Tensor) -> torch.Tensor:
        """The head's outputs [C, O] for alternative next tokens, `counts[b]` of row b, grouped by row.

        An alternative attends only to its row and itself. Alternatives of several calls accumulate until one is kept or
        the row is extended. Rows that are not here have undefined outputs.
        """
        [out_CO] = branch_all([self], rows, counts, candidates_C)
        return out_CO

    @torch.inference_mode()
    def keep(self, rows: Sequence[int], index_B: torch.Tensor) -> None:
        """Append one alternative with its keys and values; they are numbered over all calls since the last token.

        Nothing happens to rows that are not here.
        """
        layout = self.layout(rows, [1] * len(rows))
        length_N = self._length_Z[layout.slot_N]
        index_N = layout.spread(index_B.to(self._device))
        self._decoder.cache.move_cells(layout.slot_N, length_N + index_N, length_N)
        self._lengthen(layout, rows, [1] * len(rows))

    def layout(self, rows: Sequence[int], counts: Sequence[int]) -> Layout:
        """The forward pass for `counts[b]` tokens of each row; the same object while no row is opened or closed."""
        key = tuple(rows), tuple(counts)
        if key not in self._layouts:
            if len(self._layouts) == MAX_LAYOUTS:
                self._layouts.clear()
            self._layouts[key] = self._static_layout(*key) if self._is_static else self._exact_layout(*key)
        return self._layouts[key]

    def _exact_layout(self, rows: Sequence[int], counts: Sequence[int]) -> Layout:
        """Nothing but the caller's tokens."""
        present = sorted(self._present(rows))
        slots, callers = [slot for slot, _ in present], [b for _, b in present]
        return Layout(slots, [counts[b] for b in callers], callers, counts, self._device, self._num_slots)

    def _static_layout(self, rows: Sequence[int], counts: Sequence[int]) -> Layout:
        """As many tokens for all of the first slots, or for a few slots; those of other rows get alternatives that
        nobody keeps.
        """
        caller = dict(self._present(rows))
        num_rows, num_present = bucket(len(self._rows)), bucket(max(len(caller), FEWEST_SLOTS))
        slots: Sequence[int] = range(num_rows)
        if num_present < num_rows:
            others = (slot for slot in range(num_rows) if slot not in caller)
            slots = sorted([*caller, *islice(others, num_present - len(caller))])
        width = max(counts[b] for b in caller.values())
        callers = [caller.get(slot, -1) for slot in slots]
        return Layout(slots, [width] * len(slots), callers, counts, self._device, self._num_slots, True)

    def _present(self, rows: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Slot and index of every row that is here."""
        return ((self._slot_of[row], b) for b, row in enumerate(rows) if row in self._slot_of)

    def _append(
        self, layout: Layout, rows: Sequence[int], counts: Sequence[int], tokens_C: torch.Tensor, read_R: torch.Tensor
    ) -> torch.Tensor:
        self._drop_alternatives(layout, rows)
        out_RO = self._decoder.step(self._step(layout, tokens_C, read_R, is_appended=True))
        self._lengthen(layout, rows, counts)
        return out_RO

    def _lengthen(self, layout: Layout, rows: Sequence[int], counts: Sequence[int]) -> None:
        self._drop_alternatives(layout, rows)
        self._length_Z += layout.count_Z
        for slot, b in self._present(rows):
            self._lengths[slot] += counts[b]

    def _drop_alternatives(self, layout: Layout, rows: Sequence[int]) -> None:
        if any(self._branched):
            self._branched_Z.masked_fill_(layout.count_Z > 0, 0)
            for slot, _ in self._present(rows):
                self._branched[slot] = 0

    def _step(self, layout: Layout, tokens_C: torch.Tensor, read_R: torch.Tensor, is_appended: bool) -> Step:
        """A forward pass; alternatives are all at the next position of their row."""
        num_visible = self._make_room(layout)
        length_N = self._length_Z[layout.slot_N]
        cells_N = length_N + layout.column_N + self._branched_Z[layout.slot_N]
        positions_N = length_N + layout.column_N if is_appended else length_N
        tokens_N = layout.spread(tokens_C)
        return Step(layout, tokens_N, positions_N, cells_N, read_R, num_visible, self._num_cells)

    def _add_alternatives(self, layout: Layout, rows: Sequence[int], counts: Sequence[int]) -> None:
        self._branched_Z += layout.count_Z
        for slot, b in self._present(rows):
            self._branched[slot] += counts[b]

    def _make_room(self, layout: Layout) -> int:
        """The number of cells that a pass sees; all of them exist afterwards."""
        used = [length + branched for length, branched in zip(self._lengths, self._branched, strict=True)]
        used += [0] * (self._num_slots - len(used))
        last = max(used[slot] + width for slot, width in zip(layout.slots, layout.widths, strict=True))
        if last > self._num_cells:
            self._resize(self._num_slots, self._cells_for(max(last, min(self._longest, self._num_cells * 3 // 2))))
        return min(self._cells_for(last), self._num_cells) if self._is_static else last

    def _slots_for(self, count: int) -> int:
        return bucket(count) if self._is_static else -(-count // SLOTS_PER_GROWTH) * SLOTS_PER_GROWTH

    def _cells_for(self, count: int) -> int:
        return bucket(_rounded(count)) if self._is_static else _rounded(count)

    def _resize(self, num_slots: int, num_cells: int) -> None:
        self._num_slots, self._num_cells = num_slots, num_cells
        self._decoder.cache.resize(num_slots, num_cells)
        self._length_Z, self._branched_Z = (
            torch.cat([old, self._zeros(num_slots - len(old))]) for old in (self._length_Z, self._branched_Z)
        )

    def _clear(self) -> None:
        """Free the memory: one long row would hold it for ever."""
        self._num_slots, self._num_cells, self._longest = 0, 0, 0
        self._length_Z, self._branched_Z = self._zeros(0), self._zeros(0)
        self._decoder.cache.clear()

    def _zeros(self, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.int64, device=self._device)


def _rounded(num_cells: int) -> int:
    return -(-num_cells // CELLS_PER_GROWTH) * CELLS_PER_GROWTH


@torch.inference_mode()
def branch_all(
    models: Sequence[SlotModel], rows: Sequence[int], counts: Sequence[int], candidates_C: torch.Tensor
) -> list[torch.Tensor]:
    """`SlotModel.branch` of several models, in one call where they are native."""
    layouts = [model.layout(rows, counts) for model in models]
    steps = [
        model._step(layout, candidates_C.to(model._device), layout.read_R, is_appended=False)
        for model, layout in zip(models, layouts, strict=True)
    ]
    outputs = step_all([model._decoder for model in models], steps)
    for model, layout in zip(models, layouts, strict=True):
        model._add_alternatives(layout, rows, counts)
    return [layout.outputs(out_RO) for layout, out_RO in zip(layouts, outputs, strict=True)]
