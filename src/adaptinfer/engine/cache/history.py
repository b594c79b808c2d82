"""What a pruned layer was given of the prompt, and which key columns its attention meets."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class History:
    """What a pruned layer was given of the first ``length`` tokens; of everything after them it is given all.

    Attributes:
        columns: int64 [B, M], the logical positions of the M entries, real ones ascending.
        valid: bool [B, M] or None; False marks a filler that must never be attended (None: there is none).
        length: logical tokens seen when the layer was last pruned.
        shift: int64 [B, 1], how far later positions move down when survivors are renumbered; None to keep positions.
    """

    columns: Tensor
    valid: Tensor | None
    length: int
    shift: Tensor | None
    _memo: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def dropped(self) -> int:
        """Tokens seen and not held."""
        return self.length - self.columns.shape[1]

    def rows(self, indices: Tensor) -> History:
        """The history of a re-ordered, repeated or cut batch; one object for all layers that share this one."""
        if self._memo.get("indices") is not indices or self._memo["version"] != indices._version:
            at = indices.to(self.columns.device)
            moved = replace(
                self,
                columns=self.columns[at],
                valid=None if self.valid is None else self.valid[at],
                shift=None if self.shift is None else self.shift[at],
                _memo={},
            )
            self._memo.update(indices=indices, version=indices._version, history=moved)
        return self._memo["history"]

    def entries(self, first: int, count: int) -> Keys:
        """Logical positions of ``count`` entries from number ``first`` on, those after the history included."""
        held, device = self.columns.shape[1], self.columns.device
        ahead = max(0, held - first)
        pruned = self.columns[:, first : first + count] if ahead else self.columns[:, :0]
        after = torch.arange(count - pruned.shape[1], device=device) + (self.length + max(0, first - held))
        columns = torch.cat([pruned, after.expand(pruned.shape[0], -1)], dim=1)
        valid = None
        if self.valid is not None and ahead:
            real = self.valid[:, first : first + count]
            valid = torch.cat([real, torch.ones_like(columns[:, real.shape[1] :], dtype=torch.bool)], dim=1)
        return Keys(columns, valid)

    def room(self, capacity: int) -> Keys:
        """Logical positions of a static layer's ``capacity`` entries, used or not; one object for layers that share it.

        After a second pruning there is more room than tokens to come; the mask ends before those columns.
        """
        if capacity not in self._memo:
            entries = self.entries(0, capacity)
            self._memo[capacity] = replace(entries, room=True)
        return self._memo[capacity]


def whole_history(batch: Tensor) -> History:
    """The history of a layer that dropped nothing so far, for the rows of a tensor [B, ...]."""
    return History(torch.zeros(batch.shape[0], 0, dtype=torch.long, device=batch.device), None, 0, None)


@dataclass(frozen=True)
class Keys:
    """The key columns that a layer's attention meets in one call.

    Attributes:
        columns: int64 [B, L], the logical position of each.
        valid: bool [B, L]; False for fillers; None if there are none.
        room: whether columns of later tokens stand among them, as in a static cache.
    """

    columns: Tensor
    valid: Tensor | None
    room: bool = False

    def first(self, count: int) -> Keys:
        """The first ``count`` columns."""
        return replace(
            self, columns=self.columns[:, :count], valid=None if self.valid is None else self.valid[:, :count]
        )
