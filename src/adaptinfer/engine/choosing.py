"""The stages of one call: what the pruner is shown of the model, what it chooses, and the tokens that go on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from adaptinfer.engine.attachment import Attachment
from adaptinfer.engine.layout import rectangle
from adaptinfer.engine.masks import visible_keys
from adaptinfer.engine.report import StageRecord
from adaptinfer.engine.rotary import Rotation
from adaptinfer.engine.segment import CallPlan, Segment
from adaptinfer.engine.vision.images import Images, select_before
from adaptinfer.engine.vision.tower import Encoded
from adaptinfer.errors import UnsupportedError
from adaptinfer.functional import positions_of
from adaptinfer.pruners.contracts import Selection
from adaptinfer.pruners.views import PromptView, StageView
from adaptinfer.schedule import BEFORE


class Stages:
    """The stages of one call, as they are met.

    Attributes:
        segment: the tokens that the present layer is given; None for all.
        upcoming: the tokens that go on after the present layer, if that prunes.
        segments: every segment that was made, by the layer of its stage.
        records: what the report shows of each stage.
        keeps: vision tokens that each sample really kept, by the layer of the stage.
        acting_after: layers of the stages that choose once their layer has run.
        waiting: the view of such a stage while its layer runs.
        entered: hidden states [B, n, d] that were given to a stage's layer, and ``rotary`` its rotary embedding.
        embeddings: [B, N, d], the input of layer 0, for pruners that need it.
        encoded: images, if the call itself encodes them.
        images: ties encoded images to the tokens of the prompt; set if a stage sits before layer 0.
    """

    def __init__(self, owner: Attachment, plan: CallPlan) -> None:
        self._family, self._pruner, self._ranks, self._plan = owner.family, owner.pruner, owner.ranks, plan
        self._can = owner.pruner.capabilities
        self.segment: Segment | None = None
        self.upcoming: Segment | None = None
        self.segments: dict[int, Segment] = {}
        self.records: list[StageRecord] = []
        self.keeps: dict[int, tuple[int, ...]] = {}
        self.acting_after = frozenset(layer for layer in plan.stages if layer >= 0 and self._can.acts_after)
        self.waiting: StageView | None = None
        self.entered: Tensor | None = None
        self.rotary: Any = None
        self.embeddings: Tensor | None = None
        self.encoded: list[Encoded] = []
        self.images: Callable[[list[Encoded]], Images] | None = None
        self._observed: set[int] = set()
        self._counts = plan.layout.vision_counts if plan.layout else ()

    def check(self) -> None:
        """Raise unless every stage was met: a layer whose attention went another way would go on unpruned."""
        missed = set(self._plan.stages) - self._observed - {record.layer for record in self.records}
        if missed:
            raise UnsupportedError(
                f"layers {sorted(missed)} were to prune, but their attention did not pass through transformers' "
                "attention interface, so the answer is not a pruned one; please report this model"
            )

    @torch.no_grad()
    def look(
        self, layer: int, query: Tensor, key: Tensor, mask: Any, options: dict[str, Any]
    ) -> Callable[[Tensor], Tensor]:
        """Let the pruner look at its layer, and choose unless it needs the layer's output for that.

        Args:
            As `Forward.choose`; ``key`` [B, K, P + n, D] holds entries in use only.

        Returns:
            `StageView.visible`.
        """
        view = self.view(layer, query, key, mask, options)
        if self._can.observes:  # no segment, and so no gathers and no masks of its own
            self._pruner.score(view)
            self._observed.add(layer)
            self.entered = None
        elif layer in self.acting_after:
            self.waiting = view
        else:
            self.select(view)
        return view.visible

    def select(self, view: StageView) -> Selection:
        """Let the pruner choose, and settle it."""
        # No more than entered: where counts vary, an earlier stage may have kept fewer than was planned for this one.
        planned = tuple(map(min, self._plan.stages[view.layer], self._counts))
        with _without_autocast(view.query.device):
            selection = self._pruner.select(view, planned)
        candidates = view.vision_mask
        if candidates is None:
            candidates = torch.ones_like(view.vision_index, dtype=torch.bool)
        keeps = selection.keeps or planned
        self._settle(view.layer, view.vision_index, candidates, selection.kept, selection.score, keeps)
        self.entered = self.waiting = None
        if len(self.records) == len(self._plan.stages):
            self.embeddings = None
        return selection

    @torch.no_grad()
    def choose_before(self, hidden: Tensor) -> Tensor:
        """Choose before the language model: [B, N, d], the input of layer 0, comes back with merged features in it."""
        layout, device = self._plan.layout, hidden.device
        assert layout is not None and self.images is not None
        vision, text, _ = self._tokens(device)
        text_index, _ = layout.text_rectangle(text)
        vision_index, vision_mask = rectangle(vision, self._counts)
        with _without_autocast(device):
            selection, hidden = select_before(
                self._pruner,  # pyright: ignore - `Handle` lets no other pruner have such a stage
                hidden,
                self.images(self.encoded),
                vision_index,
                self._counts,
                text_index,
                layout.text_counts,
                self._plan.stages[BEFORE],
            )
        candidates = torch.ones_like(selection.kept) if vision_mask is None else vision_mask
        self._settle(BEFORE, vision_index, candidates, selection.kept, selection.score, self._plan.stages[BEFORE])
        return hidden

    def view(self, layer: int, query: Tensor, key: Tensor, mask: Any, options: dict[str, Any]) -> StageView:
        """What the pruner sees; ``key`` [B, K, P + n, D] holds entries in use only."""
        layout, device, needs = self._plan.layout, query.device, self._can.needs
        assert layout is not None and self.entered is not None
        vision, text, valid = self._tokens(device)
        text_index, text_mask = layout.text_rectangle(text)
        vision_index, vision_mask = rectangle(vision, self._counts)
        length = key.shape[2]
        past = length - query.shape[2]

        def visible(rows: Tensor) -> Tensor:
            return visible_keys(mask, rows, past, length, options.get("sliding_window"))

        rotary = self.rotary
        rotation = None
        if "rotary" in needs:
            if rotary is None:
                raise UnsupportedError(
                    f"{self._pruner.name} looks at rotary embedding, but layer {layer} is given none; use another one"
                )
            rotation = Rotation(self._family.rotate[layer + ("next" in needs)], *rotary)
        stage = StageView(
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
            hidden=self.entered.to(device),
            prompt=self._prompt(device) if "embeddings" in needs else None,
            rotation=rotation,
            final_norm=self._family.final_norm if "norm" in needs else None,
        )
        if self._can.all_heads:
            stage.need_all_heads(f"{self._pruner.name} {self._can.all_heads}")
        return stage

    def _prompt(self, device: torch.device) -> PromptView:
        layout, embeddings = self._plan.layout, self.embeddings
        assert layout is not None and embeddings is not None
        text = layout.text_rectangle(layout.text.to(device))
        vision = rectangle(layout.vision.to(device), layout.vision_counts)
        return PromptView(embeddings.to(device), *text, *vision)

    def _tokens(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of the tokens that the present layer was given: which are vision, guide and are real; bool [B, n]."""
        if self.segment is not None:
            segment = self.segment.to(device)
            return segment.vision, segment.text, segment.valid
        layout = self._plan.layout
        assert layout is not None
        real = layout.real
        return layout.vision.to(device), layout.text.to(device), None if real is None else real.to(device)

    def _settle(
        self,
        layer: int,
        vision_index: Tensor,
        candidates: Tensor,
        chosen: Tensor,
        score: Tensor,
        keeps: tuple[int, ...],
    ) -> None:
        """Make the segment of what goes on after a stage, and its record.

        Args:
            layer: the stage's.
            vision_index: int64 [B, V], the vision tokens among those that the layer was given.
            candidates: bool [B, V], which of them are real.
            chosen: bool [B, V], which of them stay.
            score: [B, V].
            keeps: how many those are in each sample.
        """
        layout, segment, past = self._plan.layout, self.segment, self._plan.past
        assert layout is not None and past is not None
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
        self.upcoming = self.segments[layer] = upcoming
        entered = vision_index if segment is None else segment.index.gather(1, vision_index)
        self.records.append(
            StageRecord(
                layer=layer,
                entered=past + entered,
                entered_mask=candidates,
                scores=score,
                kept=past + upcoming.index,
                kept_mask=upcoming.vision,
                tokens=relative.shape[1],
            )
        )
        self._counts = self.keeps[layer] = keeps


def _without_autocast(device: torch.device) -> Any:
    """Scores are float32 whatever the model computes in; some devices have no autocast to switch off."""
    on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)  # pyright: ignore
    return torch.autocast(device.type, enabled=False) if on else nullcontext()
