"""Phase 1: the vision tower by itself, on what stands in each patch and on matching pictures with captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from config import Config
from data import IGNORED, NAMES, TARGETS, Batch, batches, validation
from llava import DEVIATION, MEAN, Model, build_model, build_tokenizer
from run import Clock, device, load, log, optimizers_for, save, schedule, set_rate
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from adaptinfer.embedded.world.things import COLOURS

_BACKGROUND = 0.15  # weight of a patch without a thing, of which there are nine in ten
_UNWRITTEN = 0.15  # weight of a thing without a text, of which there are four in five
_SHARPNESS = 10.0  # of the matching


class Teacher(nn.Module):
    """Used to train the tower, then dropped: a linear head for each target, and words for captions."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.tower[0]
        sizes = [*(len(values) for values in NAMES.values()), config.grid, config.grid]
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleList(nn.Linear(width, size) for size in sizes)
        self.picture = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self.look = nn.Embedding(len(NAMES["shape"]) * len(COLOURS), width)

    def losses(self, patches: Tensor, summary: Tensor, batch: Batch, config: Config) -> dict[str, Tensor]:
        """The loss of each target and of matching.

        Args:
            patches: [B, V, width], the features that the language model will get.
            summary: [B, width], the CLS token's last state.
            batch: with labels on the device of the features.
            config: the run's.
        """
        shown, labels = self.norm(patches), batch.labels[:, 0]
        losses = {}
        for i, (name, head) in enumerate(zip(TARGETS, self.heads, strict=True)):
            label = labels[..., i].flatten()
            if name == "part":
                weights = shown.new_tensor([_BACKGROUND, 0.5, 1.0])
                losses[name] = cross_entropy(head(shown).flatten(0, 1), label, weights)
                continue
            if name in ("row", "col"):  # where it is, wherever something is
                label = label.where(labels[..., 0].flatten() > 0, IGNORED)
            picked = (label != IGNORED).nonzero().squeeze(1)
            weights = shown.new_ones(head.out_features)
            if name == "text":
                weights[0] = _UNWRITTEN
            losses[name] = cross_entropy(head(shown.flatten(0, 1)[picked]), label[picked], weights)
        there = batch.looks >= 0
        caption = (self.look(batch.looks.clamp(min=0)) * there[..., None]).sum(1)
        likeness = normalize(self.picture(summary), dim=-1) @ normalize(caption, dim=-1).T * _SHARPNESS
        right = torch.arange(len(likeness), device=likeness.device)
        losses["match"] = (cross_entropy(likeness, right) + cross_entropy(likeness.T, right)) / 2 * config.match_weight
        return losses

    def right(self, patches: Tensor, labels: Tensor) -> dict[str, float]:
        """Share of right answers for each target, over the patches that have one."""
        shown, shares = self.norm(patches), {}
        for i, (name, head) in enumerate(zip(TARGETS, self.heads, strict=True)):
            asked = labels[..., i] != IGNORED
            if name in ("row", "col"):
                asked &= labels[..., 0] == 2
            shares[name] = (head(shown).argmax(-1) == labels[..., i])[asked].float().mean().item()
            if name == "text":
                written = asked & (labels[..., i] > 0)
                shares["written"] = (head(shown).argmax(-1) == labels[..., i])[written].float().mean().item()
        return shares


def look(model: Model, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Patch features [B, V, width] as the projector gets them, and the CLS token's last state [B, width].

    Args:
        model: the whole model.
        pictures: uint8 [B, side, side, 3].
    """
    pixels = pictures.to(model.device).permute(0, 3, 1, 2).float() / 255
    states = model.model.vision_tower((pixels - MEAN) / DEVIATION, output_hidden_states=True).hidden_states
    return states[-2][:, 1:], states[-1][:, 0]


def train_tower(config: Config, out: Path, minutes: float) -> bool:
    """Train for some minutes at most; returns whether the phase is done."""
    saved, clock = out / "tower.pt", Clock(minutes)
    tokenizer = build_tokenizer()
    torch.manual_seed(config.seed)
    model = build_model(tokenizer, config).to(device())
    teacher = Teacher(config).to(device())
    tower = model.model.vision_tower
    if device().type == "cpu":
        tower.set_attn_implementation("eager")  # as in language.py
    parameters = [*tower.parameters(), *teacher.parameters()]
    optimizers = optimizers_for(
        _blocks(tower), parameters, config.tower_rate, config.tower_muon_rate, config.weight_decay
    )
    parts = {"tower": tower, "teacher": teacher, **optimizers}
    step = load(saved, parts, clock)
    if step == config.tower_steps:
        return True
    held_out = validation(config, None, 0)
    for batch in batches(config, None, range(step, config.tower_steps), {}):
        step += 1
        batch.labels, batch.looks = batch.labels.to(device()), batch.looks.to(device())
        with torch.autocast(device().type, torch.bfloat16):
            patches, summary = look(model, batch.pictures[:, 0])
        losses = teacher.losses(patches.float(), summary.float(), batch, config)
        loss = torch.stack(list(losses.values())).sum()
        tower.zero_grad()
        teacher.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, config.clip)
        share = schedule(step, config.tower_steps, config.warmup, config.decay)
        set_rate(optimizers["muon"], share * config.tower_muon_rate)
        set_rate(optimizers["adamw"], share * config.tower_rate)
        for optimizer in optimizers.values():
            optimizer.step()
        if step % config.evaluate_every == 0 or step == config.tower_steps:
            with torch.no_grad():
                patches, _ = look(model, held_out.pictures[:, 0])
                shares = teacher.right(patches, held_out.labels[:, 0].to(device()))
            rounded = {name: round(value.item(), 3) for name, value in losses.items()}
            log(out / "tower.jsonl", step=step, seconds=round(clock.total), losses=rounded, right=shares)
        if step == config.tower_steps or step % config.evaluate_every == 0 or clock.is_over:
            save(saved, parts, step, clock)
            if clock.is_over:
                return step == config.tower_steps
    return True


def _blocks(tower: Any) -> nn.Module:
    return getattr(tower, "vision_model", tower).encoder
