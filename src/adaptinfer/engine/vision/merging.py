"""Merging inside the vision tower (ToMe), with shapes left as they are: members of a group hold the same states.

A token of size s in ToMe's proportional attention counts like s equal ones, so a tower that is given the members as s
equal tokens computes the same. Groups form between a block's attention and its MLP.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from adaptinfer.engine.patches import Patches
from adaptinfer.engine.vision.tower import RECORDING, Encoded, Tower
from adaptinfer.errors import UnsupportedError
from adaptinfer.pruners.contracts import Merging
from adaptinfer.pruners.views import Read
from adaptinfer.schedule import ModelShape

_TOWERS = ("clip_vision_model", "siglip_vision_model")  # whose blocks add attention straight to their input
GROUPS = Read("groups")


class TowerMerging:
    """Merges tokens in the first blocks of a tower, those in front of the features that the model reads."""

    def __init__(self, tower: Tower, config: Any, merging: Merging) -> None:
        """Args:
        tower: the vision tower.
        config: of the multimodal model.
        merging: the method's.

        Raises:
            UnsupportedError: the tower is of another kind.
        """
        kind = tower.module.config.model_type
        if kind not in _TOWERS:
            raise UnsupportedError(f"tome merges inside CLIP and SigLIP towers; {config.model_type} has {kind}")
        layers = config.vision_feature_layer if hasattr(config, "vision_feature_layer") else -1
        layers = [layers] if isinstance(layers, int) else list(layers)
        depth = len(tower.blocks)
        self.blocks = max(layer if layer >= 0 else depth + 1 + layer for layer in layers)
        self.tower, self._step = tower, merging.step
        self._groups = functools.partial(merging.groups, ModelShape.from_config(config).num_layers)

    def install(self, patches: Patches) -> None:
        """Put the hooks on; the keys come from the tower's taps."""
        for number in range(self.blocks):
            entered: dict[int, Tensor] = {}

            def enter(module: Any, args: Any, kwargs: Any, entered: dict[int, Tensor] = entered) -> None:
                recording = None if torch.compiler.is_compiling() else RECORDING.get()
                if recording is not None:
                    entered[id(recording)] = args[0] if args else kwargs["hidden_states"]

            def leave(
                module: Any, args: Any, output: Any, number: int = number, entered: dict[int, Tensor] = entered
            ) -> Any:
                recording = None if torch.compiler.is_compiling() else RECORDING.get()
                if recording is None:
                    return None
                hidden = entered.pop(id(recording))
                tokens = hidden.shape[1] - self.tower.class_tokens
                if self._groups(tokens) >= tokens:
                    return None  # nothing merges: not even a rounding
                attended = output[0] if isinstance(output, tuple) else output
                merged = self._merge(recording, number, hidden + attended) - hidden
                return (merged, *output[1:]) if isinstance(output, tuple) else merged

            patches.before(self.tower.blocks[number], enter)
            patches.after(self.tower.attention(number), leave)

    @torch.no_grad()
    def _merge(self, recording: Encoded, number: int, states: Tensor) -> Tensor:
        """Merge what this block's keys say: [n, S, d] with equal states in each group."""
        first = self.tower.class_tokens
        keys = recording.taken.pop(Read("keys", number))[-1][:, first:].float().mean(dim=2)
        batch, tokens = keys.shape[:2]
        if number == 0:
            member = torch.arange(tokens, device=keys.device).expand(batch, -1)
            recording.groups = member, member, tokens
        assert recording.groups is not None
        group, active, left = recording.groups
        goal = self._groups(tokens)
        count = min(math.ceil(max(0, left - goal) / (self.blocks - number)), left // 2)
        with torch.autocast(states.device.type, enabled=False):
            patches, group, active = self._step(states[:, first:].float(), keys, group, active, count, first)
        recording.groups = group, active, left - count
        if number == self.blocks - 1:
            sizes = (group[:, :, None] == active[:, None, :]).sum(dim=1).float()
            marks = states.new_zeros(batch, tokens, dtype=torch.float32).scatter(1, active, sizes)
            recording.taken[GROUPS] = [torch.nn.functional.pad(marks, (first, 0))[..., None]]
        return torch.cat([states[:, :first], patches.to(states.dtype)], dim=1)
