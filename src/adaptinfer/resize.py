"""The control that prunes nothing: the picture made so small that it yields no more vision tokens than a budget.

    resize = Resize(budget=64)
    inputs = resize.inputs(processor, text, images)   # the processor's tensors, of smaller pictures
    with resize(model):                               # a tower of fixed size reads them too
        model.generate(**inputs)

Towers whose token count follows the picture (Qwen-VL, Pixtral) are simply given a smaller one. Those of fixed size
(CLIP, SigLIP) run on fewer patches with interpolated position embeddings, on what they would have seen of the picture.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adaptinfer.errors import InputError, UnsupportedError
from adaptinfer.pruners.selecting import shared_out
from adaptinfer.schedule import Budget

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Resize", "grid_of"]


@dataclass(frozen=True)
class Resize:
    """Smaller pictures instead of fewer tokens of large ones.

    Attributes:
        budget: vision tokens of a prompt, or, below 1, a share of those that its pictures yield in full size. Pictures
            get parts in proportion to their tokens. Rows x columns rarely meet a number exactly: it is a limit.
    """

    budget: float

    def inputs(self, processor: Any, text: str, images: Sequence[Image]) -> Any:
        """A prompt's tensors, with pictures of at most ``budget`` vision tokens in all.

        Args:
            processor: of a model whose tokens are a grid of patches: rows x columns of each picture, and nothing else.
            text: with the processor's placeholder for each picture.
            images: in the order of the text.

        Raises:
            InputError: a budget below one token a picture.
            UnsupportedError: the processor's token count does not follow from a picture's size.
        """
        (small,), wanted, settings = self.shrunk(processor, [images])
        inputs = processor(text=text, images=small, return_tensors="pt", **settings)
        self.check(processor, inputs, wanted)
        return inputs

    def shrunk(
        self, processor: Any, images: Sequence[Sequence[Image]]
    ) -> tuple[list[list[Image]], int, dict[str, bool]]:
        """The smaller pictures of each prompt, their vision tokens in all, and what tells the processor to take them
        as they are.

        Raises:
            As `inputs`.
        """
        cell, fixed = _cell(processor), _fixed_size(processor)
        prompts, wanted = [], 0
        for shown in images:
            whole = [_tokens(processor, processor(text=processor.image_token, images=image)) for image in shown]
            parts = shared_out(Budget(self.budget).whole_tokens(sum(whole)), whole)
            if min(parts, default=1) < 1:
                raise InputError(f"budget: {self.budget} is less than one vision token a picture")
            small = []
            for image, most in zip(shown, parts, strict=True):
                seen = _seen(processor, image, fixed) if fixed else image
                rows, columns = grid_of(seen.height, seen.width, most)
                small.append(seen.resize((columns * cell, rows * cell)))
                wanted += rows * columns
            prompts.append(small)
        return prompts, wanted, {"do_resize": False, **({"do_center_crop": False} if fixed else {})}

    def check(self, processor: Any, inputs: Any, wanted: int) -> None:
        """Raise UnsupportedError if a processor made another number of vision tokens of smaller pictures."""
        found = _tokens(processor, inputs)
        if found != wanted:
            raise UnsupportedError(
                f"{type(processor).__name__} makes {found} vision tokens of pictures that hold {wanted} patches; its "
                "token count does not follow the picture's size, so a resized picture is no control for it"
            )

    @contextmanager
    def __call__(self, model: Any) -> Iterator[None]:
        """Let a tower of fixed size read smaller pictures for the length of a ``with`` block; others need nothing."""
        from adaptinfer.engine.vision.tower import tower_of

        tower = tower_of(model.base_model)
        if tower is None or "interpolate_pos_encoding" not in inspect.signature(tower.forward).parameters:
            yield
            return
        own = vars(tower).get("forward")
        tower.forward = functools.partial(tower.forward, interpolate_pos_encoding=True)
        try:
            yield
        finally:
            del tower.forward
            if own is not None:
                tower.forward = own


def grid_of(height: int, width: int, most: int) -> tuple[int, int]:
    """Rows and columns of at most ``most`` cells that use them up and keep a picture's shape, as well as both go.

    Args:
        height, width: of the picture.
        most: at least 1.

    Returns:
        The grid with the least sum of cells left unused (as a share of all) and distortion (the logarithm of how much
        the picture's sides are stretched against each other).
    """

    def loss(rows: int) -> float:
        columns = most // rows
        return (1 - rows * columns / most) + abs(math.log(rows * width / (columns * height)))

    rows = min(range(1, most + 1), key=loss)
    return rows, most // rows


def _tokens(processor: Any, inputs: Any) -> int:
    """Placeholders in a processor's result."""
    ids = inputs["input_ids"]
    rows = ids.tolist() if hasattr(ids, "tolist") else ids
    return sum(row.count(processor.image_token_id) for row in rows)


def _cell(processor: Any) -> int:
    """Pixels along the side of the square that becomes one vision token."""
    images = processor.image_processor
    patch = getattr(images, "patch_size", None) or getattr(processor, "patch_size", None)
    patch = patch.get("height") if isinstance(patch, dict) else getattr(patch, "height", patch)
    if not isinstance(patch, int):
        raise UnsupportedError(
            f"{type(processor).__name__} does not say how large a patch is, so it cannot be resized for"
        )
    return patch * (getattr(images, "merge_size", None) or getattr(processor, "spatial_merge_size", None) or 1)


def _fixed_size(processor: Any) -> tuple[int, int] | None:
    """Height and width to which every picture is brought; None if they follow the picture."""
    images = processor.image_processor
    for name in ("crop_size", "size") if getattr(images, "do_center_crop", False) else ("size",):
        size = getattr(images, name, None)
        sides = [
            size.get(side) if isinstance(size, dict) else getattr(size, side, None) for side in ("height", "width")
        ]
        if all(sides):
            return int(sides[0]), int(sides[1])  # pyright: ignore
    return None


def _seen(processor: Any, image: Image, size: tuple[int, int]) -> Image:
    """What a tower of fixed size sees of a picture: its middle if the processor crops, else all of it, squeezed."""
    height, width = size
    if not getattr(processor.image_processor, "do_center_crop", False):
        return image.resize((width, height))
    scale = max(height / image.height, width / image.width)
    large = image.resize((max(width, round(image.width * scale)), max(height, round(image.height * scale))))
    left, top = (large.width - width) // 2, (large.height - height) // 2
    return large.crop((left, top, left + width, top + height))
