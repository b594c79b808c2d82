"""Phases 2 and 3: projector and language model on questions about pictures, as the frozen tower sees them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from config import Config
from data import BASICS, FOLLOW_UP, NAMES, PAIR, SINGLE, Batch, batches, validation
from llava import Model, Words, build_model, build_tokenizer
from run import Clock, device, load, log, optimizers_for, save, schedule, set_rate
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tower import look
from transformers import LlavaForConditionalGeneration

from adaptinfer.embedded.world.wordings import PLURALS
from adaptinfer.errors import InputError

_LEAST = 0.25  # how often a kind that is always right is asked, beside one that is always wrong
_PAIRS, _FOLLOW_UPS = 0.15, 0.3  # share of batches about two pictures, of conversations that refer back, about


def features_of(model: Model, batch: Batch) -> Tensor:
    """What the projector gets: [B, n * V, width], the pictures of a row one after another."""
    rows, images = batch.pictures.shape[:2]
    with torch.no_grad(), torch.autocast(device().type, torch.bfloat16):
        patches, _ = look(model, batch.pictures.flatten(0, 1))
    return patches.float().unflatten(0, (rows, images)).flatten(1, 2)


def answer_logits(
    model: Model, features: Tensor, batch: Batch, shown: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [A, vocabulary] at every token of an answer, the right tokens [A], and which question each belongs to [A].

    Args:
        model: the model; its tower is not used.
        features: [B, n * V, width] of the tower.
        batch: the conversations.
        shown: ascending numbers [B, s]: only these vision tokens are shown, at their own positions.

    Right padding needs no mask under causal attention: nothing real comes after it.
    """
    tokens = batch.tokens.to(device())
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    places = [(row, at, i) for i, (row, start, end) in enumerate(batch.answers) for at in range(start, end)]
    rows, columns, questions = torch.tensor(places, device=tokens.device).unbind(1)
    right = tokens[rows, columns]
    start, end = 2, 2 + features.shape[1]  # the pictures come after <s> USER:
    if shown is not None:
        columns = columns - (features.shape[1] - shown.shape[1])
        features = features.gather(1, shown[..., None].expand(-1, -1, features.shape[-1]))
        positions = torch.cat([positions[:, :start], start + shown, positions[:, end:]], 1)
    seen = model.model.multi_modal_projector(features)
    embedded = model.get_input_embeddings()(tokens)
    embedded = torch.cat([embedded[:, :start], seen.to(embedded.dtype), embedded[:, end:]], 1)
    mask = torch.ones_like(positions)  # or gaps in the positions would be taken for several packed sequences
    hidden = model.model.language_model(
        inputs_embeds=embedded, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    return model.lm_head(hidden[rows, columns - 1]), right, questions


def things_first(labels: Tensor, count: int, seed: int) -> Tensor:
    """Ascending numbers [B, count] of the tokens with things (their middles first), and of others to fill up.

    Args:
        labels: [B, V], 0 background, 1 part of a thing, 2 its middle.
        count: how many.
        seed: of the choice among equals.
    """
    chance = torch.rand(labels.shape, generator=torch.Generator().manual_seed(seed))
    return (chance + labels).topk(min(count, labels.shape[1])).indices.sort().values


def accuracy(model: Model, features: Tensor, batch: Batch, shown: Tensor | None) -> dict[str, float]:
    """Share of answers that are right to the last token, by kind: as greedy decoding would give them.

    Args: as of `answer_logits`.
    """
    answers: list[bool] = []
    step = 50
    for start in range(0, len(features), step):
        some = [(row - start, a, b) for row, a, b in batch.answers if start <= row < start + step]
        part = Batch(
            batch.pictures[:0], batch.labels[:0], batch.tokens[start : start + step], some, [], batch.looks[:0]
        )
        with torch.no_grad(), torch.autocast(device().type, torch.bfloat16):
            some_shown = None if shown is None else shown[start : start + step]
            logits, right, questions = answer_logits(model, features[start : start + step], part, some_shown)
        wrong = torch.zeros(len(some), device=right.device).index_add(
            0, questions, (logits.argmax(-1) != right).float()
        )
        answers += (wrong == 0).tolist()
    shares = {}
    for kind in sorted(set(batch.kinds)):
        hits = [hit for hit, own in zip(answers, batch.kinds, strict=True) if own == kind]
        shares[kind] = round(sum(hits) / len(hits), 4)
    return shares


def align(model: Model, tokenizer: Words, batch: Iterator[Batch], config: Config) -> None:
    """Train projector and word embeddings so that a patch's vision token points to the words for what it shows.

    LLaVA's feature alignment, in small: the token in the middle of a red star is to have the words "red", "star",
    "stars", ... as its nearest, a background token the padding. Afterwards one attention head can find any word in the
    picture.
    """
    tables = _word_tables(tokenizer)
    embedding = model.get_input_embeddings().weight
    parameters = [*model.model.multi_modal_projector.parameters(), embedding]
    optimizer = torch.optim.AdamW(parameters, lr=config.rate, weight_decay=0.0)
    loss = torch.zeros(())
    for step in range(1, config.align_steps + 1):
        lesson = next(batch)
        labels = lesson.labels[:, 0].to(device())
        there = (labels[..., 0] == 2)[..., None]
        named = sum(
            table.to(device())[labels[..., i].clamp(min=0)]
            for i, table in enumerate(tables, start=1)
            if table is not None
        )
        words = torch.where(there, named / named.sum(-1, keepdim=True), 0.0)  # pyright: ignore
        words[..., tokenizer.pad_token_id] += ~there[..., 0]
        weight = torch.where(there[..., 0], 1.0, 0.05)
        projected = model.model.multi_modal_projector(features_of(model, lesson))
        likely = (projected @ embedding[: len(tokenizer)].T * 4).log_softmax(-1)  # 4: as sharp as is needed
        length = (projected.norm(dim=-1) - embedding.detach().norm(dim=-1).mean()) ** 2  # as long as words
        loss = (-(likely * words).sum(-1) * weight).sum() / weight.sum() + 0.1 * length.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        set_rate(optimizer, config.rate * schedule(step, config.align_steps, 20, 0.5))
    with torch.no_grad():  # so that what was read in the picture can be said at once
        model.lm_head.weight.copy_(embedding)
    print(f"aligned: loss {loss.item():.3f}", flush=True)


def _word_tables(tokenizer: Words) -> list[Tensor]:
    """For each named target (but ``part``) its values' words, [values, vocabulary]."""
    tables = []
    for values in list(NAMES.values())[1:]:
        table = torch.zeros(len(values), len(tokenizer))
        for i, value in enumerate(values):
            for word in (value, PLURALS.get(value, "")):
                if word:
                    table[i, tokenizer.convert_tokens_to_ids(word.lower())] = 1.0
        tables.append(table)
    return tables


def _weights(shares: dict[str, float], step: int, config: Config) -> dict[str, float]:
    """How often each kind is asked after a step, from how well it is answered."""
    need = {kind: _LEAST + (1 - shares.get(kind, 0.0)) for kind in (*SINGLE, FOLLOW_UP, PAIR)}
    if step < config.basics:
        return {kind: need[kind] if kind in BASICS else 0.0 for kind in need}
    return {**need, FOLLOW_UP: _FOLLOW_UPS * need[FOLLOW_UP], PAIR: _PAIRS * need[PAIR]}


def train_language(config: Config, out: Path, minutes: float) -> bool:
    """Train for some minutes at most; returns whether the phase is done."""
    tokenizer = build_tokenizer()
    torch.manual_seed(config.seed)
    model = build_model(tokenizer, config).to(device())
    tower = torch.load(out / "tower.pt", map_location=device(), weights_only=True)["tower"]
    model.model.vision_tower.load_state_dict(tower)
    return _learn_all(model, tokenizer, config, out / "language.pt", minutes, aligned=False)


def practise(config: Config, out: Path, minutes: float, start: Path | None = None) -> bool:
    """Phase 3, for some minutes at most; returns whether it is done.

    Args:
        config: the run's; its ``practice`` says how.
        out: folder of the run.
        minutes: until the next save after these.
        start: an exported checkpoint to go on from; the run's own phase 2 if None. A run that has begun needs neither.

    Raises:
        InputError: ``start`` is no checkpoint, or one of other sizes.
    """
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, config).to(device())
    if not (out / "practice.pt").exists():
        model.load_state_dict(_exported(start, model) if start else _learnt(out))
    return _learn_all(model, tokenizer, config.practising(), out / "practice.pt", minutes, aligned=True)


def _learnt(out: Path) -> dict[str, Tensor]:
    """What phase 2 ended with."""
    return torch.load(out / "language.pt", map_location=device(), weights_only=True)["model"]


def _exported(folder: Path, model: Model) -> dict[str, Tensor]:
    """The weights of an exported checkpoint of the model's sizes. Raises InputError if it is none."""
    try:
        weights = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).state_dict()
    except OSError as error:
        raise InputError(f"{folder}: is no checkpoint ({str(error).splitlines()[0]})") from None
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if wanted != {name: tensor.shape for name, tensor in weights.items()}:
        raise InputError(f"{folder}: is a checkpoint of other sizes than the preset's")
    return weights


def _learn_all(model: Model, tokenizer: Words, config: Config, saved: Path, minutes: float, aligned: bool) -> bool:
    """All steps of a phase, from its last save on; ``aligned``: projector and words fit each other already."""
    clock = Clock(minutes)
    # Rounded to what is shipped, so that the language model learns on exactly the features it will get.
    model.model.vision_tower.to(torch.bfloat16).float().requires_grad_(False)
    if device().type == "cpu":
        model.set_attn_implementation("eager")  # up to three times as fast there in bfloat16
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizers = optimizers_for(
        model.model.language_model.layers, learning, config.rate, config.muon_rate, config.weight_decay
    )
    parts = {"model": model, **optimizers}
    weights = _weights({}, 0, config)
    begun = saved.exists()
    step = load(saved, parts, clock, weights=weights)
    if step == config.steps:
        return True
    later, first = validation(config, tokenizer, config.turns), validation(config, tokenizer, 1)
    pairs = validation(config, tokenizer, config.turns, pair=True)
    sets = {"later": later, "first": first, "pairs": pairs}
    seen = {name: features_of(model, batch) for name, batch in sets.items()}
    if not begun:
        if not aligned:
            align(model, tokenizer, batches(config, tokenizer, range(-config.align_steps, 0), weights), config)
        save(saved, parts, 0, clock, weights=weights)
    losses: list[Tensor] = []
    while step < config.steps:
        end = min(step + config.evaluate_every, config.steps)
        for batch in batches(config, tokenizer, range(step + 1, end + 1), weights):
            step += 1
            losses.append(_learn(model, optimizers, batch, step, config))
            if step % 20 == 0:
                print(f"{step} loss {torch.stack(losses[-20:]).mean():.3f} {clock.total:.0f} s", flush=True)
        shares = {name: accuracy(model, seen[name], batch, _shown(batch, step, config)) for name, batch in sets.items()}
        weights = _weights({**shares["later"], **shares["pairs"]}, step, config)
        mean = torch.stack(losses).mean().item()
        losses = []
        log(saved.with_suffix(".jsonl"), step=step, seconds=round(clock.total), loss=round(mean, 4), **shares)
        save(saved, parts, step, clock, weights=weights)
        if clock.is_over:
            break
    return step == config.steps


def _shown(batch: Batch, step: int, config: Config) -> Tensor | None:
    """The vision tokens that are shown at a step, as `answer_logits` takes them; None for all."""
    count = next((count for until, count in config.easy if step <= until), None)
    if count is None:
        return None
    return things_first(batch.labels[..., 0].flatten(1), batch.labels.shape[1] * count, step).to(device())


def _learn(model: Model, optimizers: dict[str, Any], batch: Batch, step: int, config: Config) -> Tensor:
    """One step; returns the loss."""
    features, shown = features_of(model, batch), _shown(batch, step, config)
    with torch.autocast(device().type, torch.bfloat16):
        logits, right, _ = answer_logits(model, features, batch, shown)
    loss = cross_entropy(logits.float(), right)
    model.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], config.clip)
    share = schedule(step, config.steps, config.warmup, config.decay)
    for name, optimizer in optimizers.items():
        set_rate(optimizer, share * (config.muon_rate if name == "muon" else config.rate))
        optimizer.step()
    return loss.detach()
