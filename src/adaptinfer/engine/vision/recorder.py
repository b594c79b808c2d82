"""Hooks that take note of images while a model encodes them: how many features, where they stand, what a method reads.

`generate` encodes images before the first forward call, a plain call inside it. Either way it is the model's own
``get_image_features`` that runs, in the thread and the context of the call that the features are for.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from adaptinfer.engine.layout import PromptLayout
from adaptinfer.engine.patches import Patches
from adaptinfer.engine.vision.images import Images
from adaptinfer.engine.vision.merging import TowerMerging
from adaptinfer.engine.vision.tower import RECORDING, TOWER_ATTENTION, Encoded, Tower, attention_in_tower
from adaptinfer.pruners.contracts import Merging
from adaptinfer.pruners.views import Read

_PROJECTED = frozenset({"llava", "llava_next"})  # a projector that takes tokens one by one, and nothing after it


class Recorder:
    """Records the encodings of one attached model, for a pruner that selects before the language model."""

    def __init__(self, base: Any, config: Any, reads: Sequence[Read], merging: Merging | None = None) -> None:
        """Args:
        base: the multimodal model without its head.
        config: of the model.
        reads: what the pruner reads of the vision tower.
        merging: of a pruner that merges in the tower.

        Raises:
            UnsupportedError: the tower does not have it.
        """
        self.base, self.model_type = base, config.model_type
        self.reads = reads
        vision = getattr(config, "vision_config", None)
        self.cell = getattr(config, "scale_factor", 0) * getattr(vision, "patch_size", 0)  # Idefics3, SmolVLM
        self.tower = Tower(base, self.model_type, reads) if reads else None
        self._merging = None
        if merging is not None:
            plain = Tower(base, self.model_type, ())
            keys = [Read("keys", number) for number in range(TowerMerging(plain, config, merging).blocks)]
            self.tower = Tower(base, self.model_type, keys)
            self._merging = TowerMerging(self.tower, config, merging)
        self.projector = base.multi_modal_projector if self.model_type in _PROJECTED else None
        self.kinds = {kind: _placeholders(config, kind) for kind in ("image", "video")}

    def install(self, patches: Patches, store: Callable[[], list[Encoded] | None]) -> None:
        """Put the hooks on.

        Args:
            patches: of the attached model.
            store: () -> the list that encodings of the present call go to; None if nobody wants them.
        """
        AttentionInterface.register(TOWER_ATTENTION, attention_in_tower)
        for kind in ("image", "video"):
            name = f"get_{kind}_features"
            if hasattr(self.base, name):
                patches.override(self.base, name, self._recorded(kind, getattr(self.base, name), store))
        if hasattr(self.base, "pack_image_features"):
            patches.override(self.base, "pack_image_features", self._traced(self.base.pack_image_features))
        if self.tower is None:
            return
        for module, tapped in self.tower.tapped():
            patches.config(module, tapped)
        if self._merging is not None:
            self._merging.install(patches)
        for read, block in self.tower.hidden_reads():
            patches.after(block, functools.partial(_take_output, read))
        if self.projector is not None and Read("projector") in self.reads:
            patches.before(self.projector, _take_input)

    def images(self, encoded: Sequence[Encoded], ids: Tensor, layout: PromptLayout) -> Images:
        """Encoded images, tied to the tokens of a prompt: ids int64 [B, N] and their layout."""
        return Images(encoded, ids, layout, self.kinds, self.tower, self.model_type, self.projector)

    def _recorded(self, kind: str, run: Any, store: Callable[[], list[Encoded] | None]) -> Any:
        @functools.wraps(run)
        def features(*args: Any, **kwargs: Any) -> Any:
            # A model may encode videos by its function for images.
            wanted = None if torch.compiler.is_compiling() or RECORDING.get() is not None else store()
            if wanted is None:
                return run(*args, **kwargs)
            encoded = Encoded(kind)
            arguments = inspect.signature(run).bind_partial(*args, **kwargs).arguments
            encoded.patch_grid = arguments.get(f"{kind}_grid_thw")
            token = RECORDING.set(encoded)
            try:
                output = run(*args, **kwargs)
            finally:
                RECORDING.reset(token)
            pixels = next((value for name, value in arguments.items() if name.startswith("pixel_values")), None)
            _describe(
                encoded, getattr(output, "pooler_output", output), arguments.get("image_sizes"), pixels, self.cell
            )
            wanted.append(encoded)
            return output

        return features

    def _traced(self, run: Any) -> Any:
        """Any-resolution models cut pictures into crops and pack what comes of them: follow each token through it."""

        @functools.wraps(run)
        def pack(*args: Any, **kwargs: Any) -> Any:
            recording = None if torch.compiler.is_compiling() else RECORDING.get()
            if recording is not None:
                bound = inspect.signature(run).bind(*args, **kwargs)
                _follow(recording, run, bound)
            return run(*args, **kwargs)

        return pack


def _placeholders(config: Any, kind: str) -> tuple[int, ...]:
    found = (getattr(config, f"{kind}_{name}", None) for name in ("token_id", "token_index"))
    return tuple(dict.fromkeys(token for token in found if isinstance(token, int)))


def _follow(encoded: Encoded, run: Any, bound: inspect.BoundArguments) -> None:
    """Send numbers through the packing instead of features, on the CPU: each token's own, and -1 for line ends.

    Its square goes along: what was interpolated between tokens is not the square of anything.
    """
    features: list[Tensor] = list(bound.arguments["image_features"])
    numbers, start = [], 0
    for crops in features:
        count = crops.shape[0] * crops.shape[1]
        own = torch.arange(start, start + count, dtype=torch.float64).view(*crops.shape[:2], 1)
        numbers.append(torch.cat([own, own**2], dim=-1))
        start += count
    line_end = bound.arguments.get("image_newline")
    line_end = None if line_end is None else torch.tensor([-1.0, 1.0], dtype=torch.float64)
    changed = {**bound.arguments, "image_features": numbers, "image_newline": line_end}
    packed = run(**changed)[0]
    encoded.crops, encoded.patches = [len(crops) for crops in features], features[0].shape[1]
    encoded.mixed = any(bool((each[:, 0] ** 2 != each[:, 1]).any()) for each in packed)
    if not encoded.mixed:
        encoded.packed = torch.cat([each[:, 0] for each in packed]).long()
    side = math.isqrt(encoded.patches)
    for each in packed:
        blocks = [(side, side)] if side**2 == encoded.patches else None
        rest, rows = len(each) - encoded.patches, int((each[:, 0] == -1).sum()) or 1
        if blocks is not None and rest:
            blocks.append((rows, rest // rows))
        encoded.grids.append(None if blocks is None else tuple(blocks))


def _describe(encoded: Encoded, features: Any, image_sizes: Any, pixels: Any, cell: int) -> None:
    """Fill in how many features each image has, and the grids they stand in.

    Args:
        encoded: to be filled in.
        features: as the model returned them: [n, P, d], [F, d], or a list of [F, d].
        image_sizes: rows and columns of pixels of each image, where the model takes them.
        pixels: what the model was given.
        cell: pixels along a feature's side, where the config tells; else 0.
    """
    if isinstance(features, torch.Tensor):
        encoded.counts = [features.shape[-2]] * (features.numel() // (features.shape[-1] * features.shape[-2]))
    else:
        encoded.counts = [each.numel() // each.shape[-1] for each in features]
    if encoded.grids:
        return
    shapes = [None] * len(encoded.counts)
    if encoded.patch_grid is not None:
        shapes = encoded.patch_grid.tolist()
    elif image_sizes is not None:
        shapes = [(1, *map(int, size)) for size in image_sizes]
    elif isinstance(pixels, torch.Tensor) and pixels.ndim == 5 and cell:  # all crops of a sample are one image
        grid = pixels.shape[-2] // cell, pixels.shape[-1] // cell
        encoded.grids = [(grid,) * (count // math.prod(grid)) for count in encoded.counts]
        return
    elif isinstance(pixels, torch.Tensor) and pixels.ndim >= 4:
        shapes = [(1, *pixels.shape[-2:])] * len(encoded.counts)
    if len(shapes) != len(encoded.counts):
        shapes = [None] * len(encoded.counts)
    encoded.grids = [_grids(count, shape) for count, shape in zip(encoded.counts, shapes, strict=True)]


def _grids(count: int, shape: Sequence[int] | None) -> tuple[tuple[int, int], ...] | None:
    """The grids that an image's features fill, one a frame: s x s cells (patches, pixels) of its shape to a feature.

    Rests of a cell at the right and the bottom are no feature's.
    """
    if shape is None or not count:
        return None
    frames, height, width = shape
    rows = math.isqrt(count // frames * height // width)
    for high in (rows, rows + 1):
        if high and count % (frames * high) == 0:
            wide = count // (frames * high)
            step = min(height // high, width // wide)
            if step and height // step == high and width // step == wide:
                return ((high, wide),) * frames
    return None


def _take_output(read: Read, module: Any, args: Any, output: Any) -> None:
    recording = None if torch.compiler.is_compiling() else RECORDING.get()
    if recording is not None:
        hidden = output[0] if isinstance(output, tuple) else output
        recording.taken.setdefault(read, []).append(hidden if hidden.ndim == 3 else hidden[None])


def _take_input(module: Any, args: Any, kwargs: Any) -> None:
    recording = None if torch.compiler.is_compiling() else RECORDING.get()
    if recording is not None:
        recording.taken.setdefault(Read("projector"), []).append(args[0])
