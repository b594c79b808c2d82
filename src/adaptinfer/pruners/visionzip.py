"""VisionZip: dominant vision tokens by class-token attention, and a few contextual ones merged from the rest
(arXiv 2412.04467)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal, get_args

from adaptinfer.functional import gather_tokens, marked_first
from adaptinfer.pruners.before import Selector
from adaptinfer.pruners.contracts import Capabilities, PrunerError, Selection, check_setting
from adaptinfer.pruners.selecting import nearest, split, top, with_merged
from adaptinfer.pruners.views import FeatureView, Read

Merge = Literal["add", "average"]


@dataclasses.dataclass(frozen=True)
class VisionZip(Selector):
    """Tokens that the class token attends to most, and contextual ones into which all others are merged.

    54 of 64 go by attention. The other 10 stand evenly spaced among the rest; each of what is left joins the one with
    the most similar key (cosine, the mean over heads).

    Merging happens in front of the projector where a model projects token by token (LLaVA), else after it. Published
    budgets count the class token, which has no place in a prompt here: a patch takes it. Contextual tokens stay where
    they stand; the authors' code puts them after the picture.

    Attributes:
        dominant_share: of the budget.
        merge: ``add`` puts the mean of those that join on top of a contextual token, as the authors' code does;
            ``average`` is the mean of all of them, as the paper describes it.
        layer: block of the vision tower.
    """

    name: ClassVar[str] = "visionzip"
    reference: ClassVar[str] = "arXiv 2412.04467"

    dominant_share: float = 54 / 64
    merge: Merge = "add"
    layer: int = -2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_setting("dominant_share", self.dominant_share, 0, 1)
        if self.merge not in get_args(Merge):
            raise PrunerError(f"merge: must be one of {get_args(Merge)}, not {self.merge!r}")

    @property
    def capabilities(self) -> Capabilities:
        reads = Read("attention", self.layer), Read("keys", self.layer), Read("projector")
        return Capabilities(before=True, reads=reads)

    def select_before(self, view: FeatureView) -> Selection:
        attention = view.attention(self.layer).sum(dim=1)
        dominant, contextual = split(view.keep, self.dominant_share)
        kept = top(attention, dominant)
        if not contextual:
            return Selection(kept, attention)
        rest = marked_first(~kept, view.count - dominant)
        centres = rest[:, :: max(1, rest.shape[1] // contextual)][:, :contextual]
        kept = kept.scatter(1, centres, True)
        joins = nearest(view.keys(self.layer).mean(dim=2), centres, kept).float()
        tokens, project = view.unprojected()
        own, total, count = gather_tokens(tokens, centres, dim=1), joins @ tokens, joins.sum(dim=2, keepdim=True)
        merged = own + total / count.clamp(min=1) if self.merge == "add" else (own + total) / (count + 1)
        return Selection(kept, attention, with_merged(view, centres, count[..., 0] > 0, project(merged)))
