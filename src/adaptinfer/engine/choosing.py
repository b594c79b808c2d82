"""A stage: what the pruner is shown of the model, what it chooses, and the segment of tokens that goes on."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adaptinfer.engine.cache.access import history_of
from adaptinfer.engine.layout import PromptLayout, rectangle
from adaptinfer.engine.masks import visible_keys
from adaptinfer.engine.report import StageRecord
from adaptinfer.engine.rotary import Rotation
from adaptinfer.engine.selection import Images, select_before
from adaptinfer.errors import UnsupportedError
from adaptinfer.functional import positions_of
from adaptinfer.pruners.views import PromptView, StageView
from adaptinfer.schedule import BEFORE

if TYPE_CHECKING:
    from collections.abc import Callable

    from adaptinfer.engine.families import Family
    from adaptinfer.engine.parallel import Ranks
    from adaptinfer.engine.vision.tower import Encoded
    from adaptinfer.pruners.contracts import Pruner, Selection

__all__ = ["Segment", "Stages"]


@dataclass(frozen=True)
class Segment:
    """The tokens that the layers behind one stage see, [B, n].

    Attributes:
        layer: the stage's layer; this segment is given to the layers after it.
        index: int64, positions among the call's N tokens, ascending but for fillers, which stand first.
        relative: int64, positions among the tokens of the segment before.
        valid: bool or None; False marks a filler: a token that was dropped (or padding) and only completes the
            rectangle of a batch whose samples keep different numbers. It is never attended.
        vision: bool, the surviving vision tokens.
        text: bool, the guiding text tokens.
    """

    layer: int
    index: Tensor
    relative: Tensor
    valid: Tensor | None
    vision: Tensor
    text: Tensor

    def to(self, device: torch.device) -> Segment:
        """The same on the device of a later layer, should accelerate have put that elsewhere."""
        if self.index.device == device:
            return self
        parts = (self.index, self.relative, self.valid, self.vision, self.text)
        return Segment(self.layer, *(part if part is None else part.to(device) for part in parts))  # pyright: ignore


class Stages:
    """The stages of one call, as they are met. Arguments are those of `Forward`."""

    def __init__(
        self,
        family: Family,
        pruner: Pruner,
        past: int | None,
        length: int,
        layout: PromptLayout | None,
        stages: dict[int, tuple[int, ...]],
        early_drop: bool,
        ranks: Ranks,
    ) -> None:
        self.past, self.length, self.layout = past, length, layout
        self.records: list[StageRecord] = []
        self.keeps: dict[int, tuple[int, ...]] = {}  # of each stage that was met, per sample
        self._observed: set[int] = set()
        self.cache: Any = None
        self.segment: Segment | None = None
        self.upcoming: Segment | None = None
        self.encoded: list[Encoded] = []  # images, if the call itself encodes them
        self.images: Callable[[], Images] | None = None
        self._family, self._pruner, self._early_drop, self._ranks = family, pruner, early_drop, ranks
        self.stages = stages
        self._counts = layout.vision_counts if layout else ()
        self._behind = frozenset(layer for layer in stages if layer >= 0) if pruner.acts_behind else frozenset()
        self._waiting: StageView | None = None  # of a stage that acts behind its layer, while that runs
        self._entered: tuple[Tensor, Any] | None = None  # hidden states and rotary embedding given to a stage's layer
        self._embeddings: Tensor | None = None

    @property
    def prunes(self) -> bool:
        """Whether any stage drops a token."""
        return bool(self.stages)

    def scores_in(self, layer: int) -> bool:
        """Whether this layer's attention is where a stage looks; some look at the layer behind theirs."""
        return layer in self.stages and "next" not in self._pruner.needs

    def check_stages(self) -> None:
        """Raise unless every stage was met: a layer whose attention went another way would go on unpruned."""
        missed = set(self.stages) - self._observed - {record.layer for record in self.records}
        if missed:
            raise UnsupportedError(
                f"layers {sorted(missed)} were to prune, but their attention did not pass through transformers' "
                "attention interface, so the answer is not a pruned one; please report this model"
            )

    def dropping(self, layer: int) -> Tensor | None:
        """Rows that go on, if this layer need not compute the others' outputs; None for every other layer."""
        upcoming = self.upcoming
        return upcoming.relative if self._early_drop and upcoming is not None and upcoming.layer == layer else None

    @torch.no_grad()
    def choose(
        self, layer: int, query: Tensor, key: Tensor, mask: Any, options: dict[str, Any]
    ) -> tuple[int, Callable[[Tensor], Tensor]]:
        """Score the vision tokens inside the stage's layer and settle which tokens the next layer is given.

        Args:
            layer: the stage's.
            query: [B, H, n, D].
            key: [B, K, L, D].
            mask: the layer's own, of any kind.
            options: the other arguments of the layer's attention function.

        Returns:
            How many of the key columns are in use, and what query rows may see of them, as `StageView.visible`.
        """
        used = self._entries_in_use(layer, key.shape[2])
        view = self._view(layer, query, key[:, :, :used], mask, options)  # a static cache has room behind
        if self._pruner.observes:  # no segment, and so no gathers and no masks of its own
            self._pruner.score(view)
            self._observed.add(layer)
            self._entered = None
        elif layer in self._behind:
            self._waiting = view
        else:
            self._select(view)
        return used, view.visible

    def _select(self, view: StageView) -> Selection:
        """Let the pruner choose, and settle it."""
        # No more than entered: where counts vary, an earlier stage may have kept fewer than was planned for this one.
        planned = tuple(map(min, self.stages[view.layer], self._counts))
        with _without_autocast(view.query.device):
            selection = self._pruner.select(view, planned)
        candidates = view.vision_mask
        if candidates is None:
            candidates = torch.ones_like(view.vision_index, dtype=torch.bool)
        keeps = selection.keeps or planned
        self._settle(view.layer, view.vision_index, candidates, selection.kept, selection.score, keeps)
        self._entered = self._waiting = None
        if len(self.records) == len(self.stages):
            self._embeddings = None
        return selection

    @torch.no_grad()
    def _choose_before(self, hidden: Tensor) -> Tensor:
        """Choose before the language model: [B, N, d], the input of layer 0, comes back with merged features in it."""
        layout, device = self.layout, hidden.device
        assert layout is not None and self.images is not None
        vision, text, _ = self._tokens(device)
        text_index, _ = layout.text_rectangle(text)
        vision_index, vision_mask = rectangle(vision, self._counts)
        with _without_autocast(device):
            selection, hidden = select_before(
                self._pruner,  # pyright: ignore - `Handle` lets no other pruner have such a stage
                hidden,
                self.images(),
                vision_index,
                self._counts,
                text_index,
                layout.text_counts,
                self.stages[BEFORE],
            )
        candidates = torch.ones_like(selection.kept) if vision_mask is None else vision_mask
        self._settle(BEFORE, vision_index, candidates, selection.kept, selection.score, self.stages[BEFORE])
        return hidden

    def _view(self, layer: int, query: Tensor, key: Tensor, mask: Any, options: dict[str, Any]) -> StageView:
        """What the pruner sees; ``key`` [B, K, P + n, D] holds entries in use only."""
        layout, device, needs = self.layout, query.device, self._pruner.needs
        assert layout is not None and self._entered is not None
        vision, text, valid = self._tokens(device)
        text_index, text_mask = layout.text_rectangle(text)
        vision_index, vision_mask = rectangle(vision, self._counts)
        length = key.shape[2]
        past = length - query.shape[2]

        def visible(rows: Tensor) -> Tensor:
            return visible_keys(mask, rows, past, length, options.get("sliding_window"))

        hidden, rotary = self._entered
        rotation = None
        if "rotary" in needs:
            if rotary is None:
                raise UnsupportedError(
                    f"{self._pruner.name} looks at rotary embedding, but layer {layer} is given none; use another one"
                )
            rotation = Rotation(self._family.rotate[layer + ("next" in needs)], *rotary)
        return StageView(
            layer=layer,
            query=query,
            key=key,
            visible=visible,
            scaling=options.get("scaling") or query.shape[3] ** -0.5,
            softcap=options.get("softcap"),
            text_index=text_index,
            text_mask=text_mask,
            vision_index=vision_index,
            vision_mask=vision_mask,
            vision_counts=self._counts,
            valid=valid,
            first=not any(record.layer >= 0 for record in self.records),
            total=self._ranks.total(query.shape[1], self._family.heads),
            all_heads=self._family.heads,
            hidden=hidden.to(device),
            prompt=self._prompt(device) if "embeddings" in needs else None,
            rotation=rotation,
            final_norm=self._family.final_norm if "norm" in needs else None,
        )

    def _prompt(self, device: torch.device) -> PromptView:
        layout, embeddings = self.layout, self._embeddings
        assert layout is not None and embeddings is not None
        text = layout.text_rectangle(layout.text.to(device))
        vision = rectangle(layout.vision.to(device), layout.vision_counts)
        return PromptView(embeddings.to(device), *text, *vision)

    def _tokens(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of the tokens that the present layer was given: which are vision, guide and are real; bool [B, n]."""
        if self.segment is not None:
            segment = self.segment.to(device)
            return segment.vision, segment.text, segment.valid
        assert self.layout is not None
        real = self.layout.real
        return self.layout.vision.to(device), self.layout.text.to(device), None if real is None else real.to(device)

    def _settle(
        self,
        layer: int,
        vision_index: Tensor,
        candidates: Tensor,
        chosen: Tensor,
        score: Tensor,
        keeps: tuple[int, ...],
    ) -> None:
        """Make the segment of what goes on behind a stage, and its record.

        Args:
            layer: the stage's.
            vision_index: int64 [B, V], the vision tokens among those that the layer was given.
            candidates: bool [B, V], which of them are real.
            chosen: bool [B, V], which of them stay.
            score: [B, V].
            keeps: how many those are in each sample.
        """
        layout, segment = self.layout, self.segment
        assert layout is not None and self.past is not None
        segment = None if segment is None else segment.to(vision_index.device)
        vision, text, valid = self._tokens(vision_index.device)
        kept_vision = torch.zeros_like(vision).scatter(1, vision_index, chosen)
        survivors = kept_vision | ~vision if valid is None else kept_vision | (valid & ~vision)
        totals = [
            real - entered + keep
            for real, entered, keep in zip(layout.real_counts, layout.vision_counts, keeps, strict=True)
        ]
        relative = positions_of(survivors, max(totals))
        upcoming = Segment(
            layer=layer,
            index=relative if segment is None else segment.index.gather(1, relative),
            relative=relative,
            valid=None if layout.all_real(totals) else survivors.gather(1, relative),
            vision=kept_vision.gather(1, relative),
            text=text.gather(1, relative),
        )
        self._announce(upcoming)
        entered = vision_index if segment is None else segment.index.gather(1, vision_index)
        self.records.append(
            StageRecord(
                layer=layer,
                entered=self.past + entered,
                entered_mask=candidates,
                scores=score,
                kept=self.past + upcoming.index,
                kept_mask=upcoming.vision,
                tokens=relative.shape[1],
            )
        )
        self._counts = self.keeps[layer] = keeps

    def _announce(self, segment: Segment) -> None:
        """Say which tokens go on behind a stage."""
        self.upcoming = segment

    def _entries_in_use(self, layer: int, columns: int) -> int:
        """How many of a layer's key columns hold something; the last of them are those of this call."""
        assert self.past is not None
        history = history_of(self.cache, layer)
        dropped = 0 if history is None else history.dropped
        return min(columns, self.past + self.length - dropped)


def _without_autocast(device: torch.device) -> Any:
    """Scores are float32 whatever the model computes in; some devices have no autocast to switch off."""
    on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)  # pyright: ignore
    return torch.autocast(device.type, enabled=False) if on else nullcontext()
