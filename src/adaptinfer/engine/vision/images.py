"""The selection before the language model: features of the vision tokens, tied to the prompt's tokens; the choice."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adaptinfer.errors import UnsupportedError
from adaptinfer.functional import gather_tokens
from adaptinfer.pruners.contracts import Pruner, Selection
from adaptinfer.pruners.views import FeatureView, Grids, Read

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from adaptinfer.engine.layout import PromptLayout
    from adaptinfer.engine.vision.tower import Encoded, Tower

__all__ = ["Images", "select_before"]


class Images:
    """The encoded images of a call, tied to the tokens of its prompt.

    A model puts features in place of placeholder ids row by row, so the k-th placeholder of the batch is the k-th
    feature. `generate` may have repeated each row (beams, several answers) after its images were encoded once.
    """

    def __init__(
        self,
        encoded: Sequence[Encoded],
        ids: Tensor,
        layout: PromptLayout,
        kinds: dict[str, tuple[int, ...]],
        tower: Tower | None,
        model_type: str,
        projector: Any,
    ) -> None:
        """Args:
        encoded: by the model, in this call or by `generate` before it.
        ids: int64 [B, N].
        layout: of the same tokens.
        kinds: placeholder ids of images and of videos.
        tower: None if the method reads nothing of it.
        model_type: for messages.
        projector: of models that project token by token and do nothing more; None for others.
        """
        self._encoded, self._ids, self._tower, self._model_type = encoded, ids, tower, model_type
        self.projector = projector
        self._kinds = kinds if len(encoded) > 1 else {each.kind: sum(kinds.values(), ()) for each in encoded}
        totals = list(map(sum, zip(layout.vision_counts, layout.unguided_counts, strict=True)))
        features, placeholders = sum(each.features for each in encoded), sum(totals)
        repeats = placeholders // features if features else 0
        known = bool(features) and len({each.kind for each in encoded}) == len(encoded)
        self._repeats = repeats if known and repeats * features == placeholders and len(totals) % repeats == 0 else 0
        self.pictures = self._pictures_of_rows(totals)

    def _pictures_of_rows(self, totals: list[int]) -> list[tuple[Grids, ...] | None]:
        """For each row the grids of its pictures; None for all if pictures do not add up to rows."""
        nothing: list[tuple[Grids, ...] | None] = [None] * len(totals)
        if not self._repeats or len(self._encoded) > 1:
            return nothing
        images = list(zip(self._encoded[0].counts, self._encoded[0].grids, strict=True))
        rows: list[tuple[Grids, ...] | None] = []
        for total in totals[:: self._repeats]:
            pictures, left = [], total
            while left > 0 and images:
                count, grids = images.pop(0)
                left -= count
                pictures.append(grids)
            if left:
                return nothing
            rows.append(None if None in pictures else tuple(pictures))
        return [pictures for pictures in rows for _ in range(self._repeats)]

    @functools.cached_property
    def _index(self) -> Tensor:
        """The feature that stands at each placeholder, int64 [B, N]; anything elsewhere."""
        if not self._repeats:
            raise UnsupportedError(
                f"{self._model_type}: the images of this call were encoded outside of it, or are not those of its "
                "placeholders, so what the vision tower made of them cannot be tied to its tokens; pass pixel values "
                "to this call, or take a method that needs features alone, such as divprune"
            )
        ids = self._ids[:: self._repeats]
        index, start = torch.zeros_like(ids), 0
        for each in self._encoded:
            here = functools.reduce(torch.logical_or, [ids == token for token in self._kinds[each.kind]])
            index = torch.where(here, here.flatten().cumsum(0).view(ids.shape) - 1 + start, index)
            start += each.features
        return index.repeat_interleave(self._repeats, dim=0)

    def at(self, positions: Tensor, rows: Tensor | None, values: Callable[[Encoded], Tensor]) -> Tensor:
        """Values of the features at some placeholders.

        Args:
            positions: int64 [R, V], in the prompt's rows.
            rows: int64 [R], which rows of the batch these are; None for all.
            values: [F, ...] of one encoding.

        Returns:
            [R, V, ...].
        """
        index = self._index.to(positions.device)
        index = (index if rows is None else index.index_select(0, rows)).gather(1, positions)
        parts = [values(each).to(positions.device) for each in self._encoded]
        return torch.cat(parts)[index]

    def taken(self, read: Read) -> Callable[[Encoded], Tensor]:
        assert self._tower is not None
        return functools.partial(self._tower.per_feature, read=read)

    @property
    def cropped(self) -> bool:
        return any(each.crops for each in self._encoded)

    def line_ends(self, encoded: Encoded) -> Tensor:
        """bool [F]."""
        return torch.zeros(encoded.features, dtype=torch.bool) if encoded.packed is None else encoded.packed < 0

    def crops(self, encoded: Encoded) -> Tensor:
        """The crop of each feature, counted from 0 in each image, int64 [F]."""
        if encoded.packed is None:
            if encoded.mixed:
                raise UnsupportedError(
                    f"{self._model_type}: features were interpolated between crops, so a token has no crop of its own"
                )
            return torch.zeros(encoded.features, dtype=torch.long)
        parts, first = [], 0
        for source, crops in zip(encoded.packed.split(encoded.counts), encoded.crops, strict=True):
            crop = torch.where(source < 0, source.roll(1), source) // encoded.patches - first
            parts.append(crop)
            first += crops
        return torch.cat(parts)


def select_before(
    pruner: Pruner,
    hidden: Tensor,
    images: Images,
    vision_index: Tensor,
    vision_counts: tuple[int, ...],
    text_index: Tensor,
    text_counts: tuple[int, ...],
    keeps: tuple[int, ...],
) -> tuple[Selection, Tensor]:
    """Let a method choose, rows of one shape at a time.

    Args:
        pruner: the method.
        hidden: [B, N, d], the input of layer 0.
        images: where the features come from.
        vision_index: int64 [B, V], each row's own vision tokens first and in order.
        vision_counts: how many they are.
        text_index: int64 [B, T] likewise, the guiding text.
        text_counts: likewise.
        keeps: how many vision tokens of each row stay.

    Returns:
        The selection for all rows [B, V], and the input of layer 0 with the features of methods that merge.
    """
    device, width = hidden.device, hidden.shape[2]
    groups: dict[Any, list[int]] = {}
    for row, shape in enumerate(zip(vision_counts, keeps, text_counts, images.pictures, strict=True)):
        groups.setdefault(shape, []).append(row)
    kept = torch.zeros(vision_index.shape, dtype=torch.bool, device=device)
    score = torch.zeros(vision_index.shape, device=device)
    for (count, keep, text_count, pictures), rows in groups.items():
        at = None if len(groups) == 1 else torch.tensor(rows).to(device, non_blocking=True)

        def mine(tensor: Tensor, at: Tensor | None = at) -> Tensor:
            return tensor if at is None else tensor.index_select(0, at)

        if 0 < keep < count:
            places, embeddings = mine(vision_index)[:, :count], mine(hidden)
            features = gather_tokens(embeddings, places, dim=1)
            view = FeatureView(
                features=features,
                text=gather_tokens(embeddings, mine(text_index)[:, :text_count], dim=1),
                keep=keep,
                pictures=pictures,
                rows=at,
                _images=images,
                _places=places,
            )
            chosen = pruner.select_before(view)
            if chosen.hidden is not None:
                merged = embeddings.scatter(1, places[..., None].expand(-1, -1, width), chosen.hidden.to(hidden.dtype))
                hidden = merged if at is None else hidden.index_copy(0, at, merged)
            marks, scores = chosen.kept, chosen.score.float()
        else:
            marks = torch.full((len(rows), count), keep > 0, device=device)
            scores = torch.zeros(len(rows), count, device=device)
        missing = vision_index.shape[1] - count
        marks, scores = (torch.nn.functional.pad(part, (0, missing)) for part in (marks, scores))
        kept = marks if at is None else kept.index_copy(0, at, marks)
        score = scores if at is None else score.index_copy(0, at, scores)
    return Selection(kept, score), hidden
