"""The model that is measured: a shape with random weights, or a checkpoint. Nothing large is made before `load`."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from adaptinfer.bench.memory import free_bytes
from adaptinfer.bench.prompts import NoisePicture, picture_by_processor, picture_for
from adaptinfer.bench.shapes import fill, outline, shape_named
from adaptinfer.checkpoints import DType, resolve_device
from adaptinfer.engine.families import Family
from adaptinfer.errors import InputError
from adaptinfer.schedule import ModelShape, Schedule


def checked_device(name: str) -> str:
    """A device that can be measured; ``"auto"`` is a GPU if there is one.

    Raises:
        InputError: it is neither a CPU nor a CUDA device, or there is no such device here.
    """
    if name != "auto" and name.partition(":")[0] not in ("cpu", "cuda"):
        raise InputError(f"device {name!r}: only cpu, cuda and cuda:N can be measured")
    return resolve_device(name)


class Subject:
    """What is measured.

    Args:
        shape: a name in `shapes.SHAPES`; or None for a checkpoint.
        model: ``"embedded"``, a checkpoint folder or a hub id; or None for a shape.
        dtype: ``"auto"`` is float32 on a CPU; on a GPU a checkpoint's own, and bfloat16 for a shape.
        device: from `checked_device`.
        attention: backend of vanilla and all variants alike.
        seed: of random weights.

    Raises:
        InputError: there is no such shape or checkpoint, or the backend cannot be used here.
        UnsupportedError: pruning does not fit the model.
    """

    def __init__(
        self, shape: str | None, model: str | None, dtype: DType, device: str, attention: str, seed: int = 0
    ) -> None:
        self.name = shape or model or ""
        self.device, self._attention, self._seed = device, attention, seed
        self._checkpoint = None
        if shape is not None:
            self.config, own = shape_named(shape).config(), "bfloat16"
        else:
            from adaptinfer.checkpoints import Checkpoint

            self._checkpoint = Checkpoint(self.name, device=device)
            self.config = self._checkpoint.config
            own = str(self.config.dtype or "bfloat16").removeprefix("torch.")
        self.dtype = dtype if dtype != "auto" else "float32" if device == "cpu" else own
        if self._checkpoint is not None:
            self._checkpoint.dtype = self.dtype
        self._outline: Any = outline(self.config, self.dtype, attention)
        self.parameters = sum(parameter.numel() for parameter in self._outline.parameters())
        self.shape = ModelShape.from_config(self.config)

    @property
    def description(self) -> str:
        """Its name, and what a shape stands for."""
        if self._checkpoint is not None:
            return f"checkpoint {self.name}"
        return f"{self.name} ({shape_named(self.name).stands_for}), random weights"

    @property
    def bytes_per_value(self) -> int:
        """Of a weight, and of a value in the cache."""
        return 4 if self.dtype == "float32" else 2

    @cached_property
    def family(self) -> Family:
        """What the engine finds in the model, looked at without its weights."""
        from adaptinfer.engine.families import family_of

        return family_of(self._outline)

    def picture(self, image_size: int | None) -> NoisePicture:
        """A picture of noise. Raises InputError for a size that the model cannot take."""
        if self._checkpoint is not None:
            return picture_by_processor(self._checkpoint, image_size)
        return picture_for(self.config, image_size)

    def check_memory(self, vision_tokens: int, text_tokens: int, batch: int) -> None:
        """Refuse what cannot fit: the weights and vanilla's cache are more than is free. Activations come on top.

        Raises:
            InputError: with both figures.
        """
        free = free_bytes(self.device)
        weights = self.parameters * self.bytes_per_value
        keep_all = Schedule((), self.shape.num_layers, vision_tokens)
        cache = keep_all.kv_bytes(self.shape, text_tokens, bytes_per_value=self.bytes_per_value, batch=batch)
        if free is not None and weights + cache > free:
            raise InputError(
                f"{self.name}: its weights in {self.dtype} ({weights / 1e9:.1f} GB) and the KV cache of batch {batch} "
                f"({cache / 1e9:.1f} GB) do not fit into the {free / 1e9:.1f} GB that are free on {self.device}; take "
                "a smaller shape, batch or dtype"
            )

    def load(self) -> Any:
        """The model in evaluation mode on its device. Raises InputError if a checkpoint's weights cannot be read."""
        if self._checkpoint is None:
            model, self._outline = fill(self._outline, self.device, self._seed), None
            return model
        model = self._checkpoint.load()
        model.set_attn_implementation(self._attention)
        return model
