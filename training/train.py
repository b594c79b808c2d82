"""Train the embedded model: a small LLaVA, from scratch, on scenes that are drawn for it.

    python training/train.py tower      # draw the pictures, train the vision tower on per-patch labels, freeze it
    python training/train.py language   # train projector and language model on questions; goes on where it stopped
    python training/train.py export     # write the checkpoint folder that the package ships

The two phases are LLaVA's: a tower that already sees, frozen, then a language model that learns to use it. The tower
learns to name shape and colour of what stands in each patch, with two linear heads that are thrown away. The language
model gets the pictures as the frozen tower's features, computed once, and eight questions a picture as turns of one
conversation; the loss is on the answers. Batches depend on the step alone, so a run that was stopped goes on exactly.

What a scene is and what is asked about it is defined in `adaptinfer.embedded`; nothing of that is repeated here.
"""

import io
import json
import math
import random
import re
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from adaptinfer.embedded.questions import MAX_COUNT, PLURALS, THINGS, WORDINGS, Question, questions_for
from adaptinfer.embedded.scenes import COLOURS, GRID, SHAPES, SPLITS, Scene, render, sample_scene


@dataclass(frozen=True)
class Config:
    """Everything that decides what comes out."""

    seed: int = 0
    pictures: int = 30_000  # training scenes, drawn once
    held_out: int = 500  # validation scenes, looked at while training
    tower_steps: int = 700
    tower_batch: int = 128
    tower_rate: float = 2e-3
    align_steps: int = 400
    easy_steps: int = 600  # in which the language model is shown few background tokens
    easy_tokens: int = 12
    steps: int = 2_600
    batch: int = 32
    questions: int = 8  # turns of one conversation
    rate: float = 1e-3  # AdamW: projector, embeddings, norms, head
    muon_rate: float = 2e-3  # Muon: the decoder layers' matrices
    warmup: int = 100
    decay: float = 0.5  # the share of the steps, at the end, over which the learning rate falls to zero
    weight_decay: float = 0.01
    clip: float = 1.0
    evaluate_every: int = 100


# transformers declares less about these than it knows.
Model = Any  # a LlavaForConditionalGeneration
Words = Any  # a PreTrainedTokenizerFast

TOKENS = GRID * GRID  # vision tokens of a picture
PATCH = 16  # pixels
SIDE = GRID * PATCH
USER, ASSISTANT, IMAGE, BEGIN, END, PAD, UNKNOWN = "USER:", "ASSISTANT:", "<image>", "<s>", "</s>", "<pad>", "<unk>"
OUT = Path("build/embedded")
CHECKPOINT = Path(__file__).parent.parent / "src" / "adaptinfer" / "embedded" / "checkpoint"

# As LLaVA-1.5's, and plain strings are taken as content too. Whitespace is nothing to the tokenizer.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ 'USER: ' }}"
    "{%- elif message['role'] == 'assistant' -%}{{ 'ASSISTANT: ' }}"
    "{%- else -%}{{ raise_exception('the embedded model knows the roles user and assistant only') }}{%- endif -%}"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}"
    "{%- for part in message['content'] if part['type'] == 'image' -%}{{ '<image>\n' }}{%- endfor -%}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}"
    "{%- endif -%}"
    "{{ '</s>' if message['role'] == 'assistant' else ' ' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
)

Out = Annotated[Path, typer.Option(help="Folder for pictures, features, logs and resumable checkpoints.")]
app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)


# ---------------------------------------------------------------------------------------------------- the model


def build_tokenizer() -> Words:
    """A fast word-level tokenizer over the words of the questions: lower case, punctuation apart."""
    text = " ".join(wording for wordings in WORDINGS.values() for wording in wordings).replace("{thing}s", "")
    words = {word.strip("?.") for word in text.lower().split() if not word.startswith("{")}
    words |= {*COLOURS, *SHAPES, *PLURALS.values(), *THINGS, *(f"{thing}s" for thing in THINGS)}
    words |= {"color", "a", "an", "yes", "no", "?", ".", ",", "!", *map(str, range(MAX_COUNT + 1))}
    special = [PAD, UNKNOWN, BEGIN, END, IMAGE, USER, ASSISTANT]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *sorted(words)])}, UNKNOWN))
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[^\w\s]"), "isolated")]
    )
    core.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # spaces between words, none before punctuation
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    core.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, core.token_to_id(BEGIN))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=BEGIN,
        eos_token=END,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def build_processor(tokenizer: Words) -> LlavaProcessor:
    """Pictures of any size become 128 x 128 pixels and 64 ``<image>`` tokens."""
    image_processor = CLIPImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        do_center_crop=False,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.25, 0.25, 0.25],
    )
    return LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )


def build_model(tokenizer: Words) -> Model:
    """The untrained model. Twelve layers, so that an average of 11 % of the tokens leaves the first one full."""
    special = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    special["eos_token_id"] = tokenizer.eos_token_id
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=96,
    )
    text = LlamaConfig(
        vocab_size=math.ceil(len(tokenizer) / 16) * 16,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        **special,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    model: Model = LlavaForConditionalGeneration(config)
    with torch.no_grad():  # words must stand out of the sum of what twelve untrained layers add to them
        model.get_input_embeddings().weight.mul_(5)
        for layer in model.model.language_model.layers:
            for added in (layer.self_attn.o_proj, layer.mlp.down_proj):
                added.weight.mul_((2 * text.num_hidden_layers) ** -0.5)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=16, **special)
    return model


def see(model: Model, pictures: np.ndarray) -> Tensor:
    """Tower features (pictures, 64, 96) of uint8 pictures (pictures, 128, 128, 3), as the projector gets them."""
    pixels = torch.tensor(pictures, device=model.device).permute(0, 3, 1, 2).float() / 255
    states = model.model.vision_tower((pixels - 0.5) / 0.25, output_hidden_states=True).hidden_states
    return states[-1][:, 1:]


# ---------------------------------------------------------------------------------------------------- pictures


def draw(seed: int) -> np.ndarray:
    """One training picture (128, 128, 3), uint8: drawn at some size, shrunk, and changed a little as files are."""
    rng = random.Random(f"picture/{seed}")
    picture = render(sample_scene(seed), rng.choice((SIDE, SIDE, 2 * SIDE, 4 * SIDE, rng.randint(140, 600))))
    if picture.width != SIDE:
        picture = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)  # what the processor does
    if rng.random() < 0.2:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.7)))
    if rng.random() < 0.25:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=rng.randint(60, 95))
        picture = Image.open(file)
    pixels = np.asarray(picture, dtype=np.float32) * rng.uniform(0.88, 1.12)
    if rng.random() < 0.5:
        pixels = pixels + np.random.default_rng(seed).normal(0, rng.uniform(0, 6), pixels.shape)
    return np.clip(pixels + 0.5, 0, 255).astype(np.uint8)


def draw_clean(seed: int) -> np.ndarray:
    """One validation picture (128, 128, 3), uint8: a 512-pixel picture as the processor shrinks it."""
    picture = render(sample_scene(seed), 4 * SIDE)
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def pictures(config: Config, out: Path) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation pictures, drawn in all processes and kept on disk."""
    results = []
    for name, function, seeds in (
        ("train", draw, SPLITS["train"][: config.pictures]),
        ("validation", draw_clean, SPLITS["validation"][: config.held_out]),
    ):
        path = out / f"{name}-{len(seeds)}.npy"
        if not path.exists():
            with ProcessPoolExecutor() as pool:
                drawn = np.stack(list(pool.map(function, seeds, chunksize=64)))
            np.save(path, drawn)
        results.append(np.load(path, mmap_mode="r"))
    return results[0], results[1]


# ---------------------------------------------------------------------------------------------------- phase 1


def patch_labels(scenes: list[Scene]) -> Tensor:
    """(scenes, 64, 2): the shape and the colour in each patch, 0 for none."""
    labels = torch.zeros(len(scenes), TOKENS, 2, dtype=torch.long)
    for i, scene in enumerate(scenes):
        for item in scene.objects:
            named = (list(SHAPES).index(item.shape) + 1, list(COLOURS).index(item.colour) + 1)
            labels[i, item.row * GRID + item.col] = torch.tensor(named)
    return labels


@app.command()
def tower(out: Out = OUT, steps: int = Config.tower_steps) -> None:
    """Train the vision tower on per-patch labels, freeze it, and compute its features of every picture."""
    config = Config(tower_steps=steps)
    out.mkdir(parents=True, exist_ok=True)
    train, held_out = pictures(config, out)
    labels = patch_labels([sample_scene(seed) for seed in SPLITS["train"][: config.pictures]])
    held_out_labels = patch_labels([sample_scene(seed) for seed in SPLITS["validation"][: config.held_out]])

    torch.manual_seed(config.seed)
    model = build_model(build_tokenizer()).to(_device())
    width = model.config.vision_config.hidden_size
    heads = nn.ModuleList([nn.Linear(width, 1 + len(SHAPES)), nn.Linear(width, 1 + len(COLOURS))]).to(_device())
    weights = torch.tensor([0.15] + [1.0] * len(SHAPES), device=_device())  # nine patches in ten are background
    parameters = [*model.model.vision_tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.tower_rate, betas=(0.9, 0.95), weight_decay=0.01)
    started = time.perf_counter()
    for step in range(config.tower_steps):
        picked = np.sort(np.random.default_rng([config.seed, step]).integers(0, config.pictures, config.tower_batch))
        features = see(model, train[picked])
        target = labels[picked].to(features.device)
        losses = [
            cross_entropy(head(features).flatten(0, 1), target[..., i].flatten(), weights)
            for i, head in enumerate(heads)
        ]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, config.clip)
        _set_rate(optimizer, config.tower_rate * _schedule(step, config.tower_steps, 100, 0.5))
        optimizer.step()
        if (step + 1) % 100 == 0 or step + 1 == config.tower_steps:
            with torch.no_grad():
                features = see(model, held_out[:])
                right = torch.stack([head(features).argmax(-1) for head in heads], -1).cpu() == held_out_labels
            shown = held_out_labels[..., 0] > 0
            _log(
                out / "tower.jsonl",
                step=step + 1,
                loss=loss.item(),
                seconds=time.perf_counter() - started,
                patches=right.all(-1).float().mean().item(),
                shape=right[shown][:, 0].float().mean().item(),
                colour=right[shown][:, 1].float().mean().item(),
            )

    # Round to what is shipped, so that the language model learns on exactly the features it will get.
    model.model.vision_tower.to(torch.bfloat16).float()
    torch.save(model.model.vision_tower.state_dict(), out / "tower.pt")
    with torch.no_grad():
        for name, array in (("train", train), ("validation", held_out)):
            parts = [see(model, array[i : i + 256]).bfloat16().cpu() for i in range(0, len(array), 256)]
            torch.save(torch.cat(parts), out / f"features-{name}.pt")


# ---------------------------------------------------------------------------------------------------- phase 2


def conversation(tokenizer: Words, questions: list[Question]) -> tuple[list[int], list[int]]:
    """Token ids of a picture and its questions as turns, and the positions of the answers' tokens (word and end)."""
    user, assistant, image, begin, end = tokenizer.convert_tokens_to_ids([USER, ASSISTANT, IMAGE, BEGIN, END])
    asked = tokenizer([question.text for question in questions], add_special_tokens=False)["input_ids"]
    ids, answers = [begin], []
    for i, (question, text) in enumerate(zip(questions, asked, strict=True)):
        ids += [user, *([image] * TOKENS if i == 0 else []), *text, assistant]
        answers += [len(ids), len(ids) + 1]
        ids += [tokenizer.convert_tokens_to_ids(question.answer), end]
    return ids, answers


def lesson(scene: Scene, seed: int, count: int) -> list[Question]:
    """Questions to learn from, in random order: every second one is a count, which takes longest to learn."""
    asked = questions_for(scene, seed, 4 * count)
    counts = [question for question in asked if question.kind == "count"][: count // 2]
    others = [question for question in asked if question.kind != "count"][: count - len(counts)]
    return random.Random(f"lesson/{scene.seed}/{seed}").sample(counts + others, count)


def answer_logits(
    model: Model,
    features: Tensor,
    conversations: list[tuple[list[int], list[int]]],
    shown: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits (answer tokens, vocabulary) at every answer token of a batch, and the right tokens (answer tokens,).

    Args:
        model: the model; its tower is not used.
        features: (pictures, 64, width) of the tower.
        conversations: token ids and positions of the answers' tokens, for each picture.
        shown: ascending token numbers (pictures, tokens): only these vision tokens are shown, at their own positions.

    Right padding needs no mask under causal attention: nothing real comes after it.
    """
    longest = max(len(ids) for ids, _ in conversations)
    padding = model.config.text_config.pad_token_id
    tokens = torch.tensor([ids + [padding] * (longest - len(ids)) for ids, _ in conversations], device=model.device)
    positions = torch.arange(longest, device=model.device).expand_as(tokens)
    rows = torch.tensor([i for i, (_, answers) in enumerate(conversations) for _ in answers], device=model.device)
    columns = torch.tensor([at for _, answers in conversations for at in answers], device=model.device)
    right = tokens[rows, columns]
    start, end = 2, 2 + TOKENS  # the picture comes after <s> USER:
    if shown is not None:
        features = features.gather(1, shown[..., None].expand(-1, -1, features.shape[-1]))
        positions = torch.cat([positions[:, :start], start + shown, positions[:, end:]], 1)
        columns = columns - (TOKENS - shown.shape[1])
    pictures = model.model.multi_modal_projector(features)
    embedded = model.get_input_embeddings()(tokens)
    embedded = torch.cat([embedded[:, :start], pictures.to(embedded.dtype), embedded[:, end:]], 1)
    seen = torch.ones_like(positions)  # or gaps in the positions would be taken for several packed sequences
    hidden = model.model.language_model(
        inputs_embeds=embedded, attention_mask=seen, position_ids=positions, use_cache=False
    )
    return model.lm_head(hidden.last_hidden_state[rows, columns - 1]), right


def objects_first(labels: Tensor, count: int, seed: int) -> Tensor:
    """(pictures, count): ascending numbers of the tokens with objects, and of others at random to fill up."""
    chance = torch.rand(labels.shape[:2], generator=torch.Generator().manual_seed(seed))
    return (chance + (labels[..., 0] > 0)).topk(count).indices.sort().values


def accuracy(
    model: Model,
    tokenizer: Words,
    features: Tensor,
    config: Config,
    turns: int,
) -> dict[str, float]:
    """Share of right answers by kind on validation scenes, each asked ``turns`` questions in one conversation."""
    right: dict[str, list[bool]] = {}
    for start in range(0, len(features), 64):
        seeds = SPLITS["validation"][start : min(start + 64, len(features))]
        asked = [questions_for(sample_scene(seed), 1, turns) for seed in seeds]
        with torch.no_grad():
            logits, target = answer_logits(
                model,
                features[start : start + 64].to(model.device).float(),
                [conversation(tokenizer, questions) for questions in asked],
            )
        hits = (logits.argmax(-1) == target)[0::2].tolist()  # the word; the end comes after it
        for question, hit in zip((question for questions in asked for question in questions), hits, strict=True):
            right.setdefault(question.kind, []).append(hit)
    return {kind: sum(hits) / len(hits) for kind, hits in sorted(right.items())}


def align(
    model: Model,
    tokenizer: Words,
    features: Tensor,
    labels: Tensor,
    config: Config,
) -> None:
    """Train projector and word embeddings so that a patch's vision token points to the words for what it shows.

    LLaVA's feature alignment, in small: a red star's token is to have the words "red", "star" and "stars" as its
    nearest, a background token the padding. Afterwards one attention head can find any word in the picture.
    """
    words = torch.zeros(1 + len(SHAPES), 1 + len(COLOURS), len(tokenizer))
    words[0, 0, tokenizer.pad_token_id] = 1
    for i, (shape, plural) in enumerate(PLURALS.items()):
        for k, colour in enumerate(COLOURS):
            words[i + 1, k + 1, tokenizer.convert_tokens_to_ids([shape, plural, colour])] = 1 / 3
    embedding = model.get_input_embeddings().weight
    parameters = [*model.model.multi_modal_projector.parameters(), embedding]
    optimizer = torch.optim.AdamW(parameters, lr=config.rate, weight_decay=0.0)
    loss = torch.zeros(())
    for step in range(config.align_steps):
        picked = np.random.default_rng([config.seed, 1, step]).integers(0, len(features), config.batch)
        named = labels[picked].to(model.device)
        weight = torch.where(named[..., 0] > 0, 1.0, 0.05)
        projected = model.model.multi_modal_projector(features[picked].to(model.device).float())
        likely = (projected @ embedding[: len(tokenizer)].T * 4).log_softmax(-1)  # 4: as sharp as is needed
        named_right = -(likely * words.to(model.device)[named[..., 0], named[..., 1]]).sum(-1)
        length = (projected.norm(dim=-1) - embedding.detach().norm(dim=-1).mean()) ** 2  # as long as words
        loss = (named_right * weight).sum() / weight.sum() + 0.1 * length.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        _set_rate(optimizer, config.rate * _schedule(step, config.align_steps, 20, 0.5))
    print(f"aligned: loss {loss.item():.3f}", flush=True)


@app.command()
def language(out: Out = OUT, steps: int = Config.steps, autocast: bool = False) -> None:
    """Train projector and language model on questions. Goes on from the last save, exactly as if never stopped."""
    config = Config(steps=steps)
    tokenizer = build_tokenizer()
    torch.manual_seed(config.seed)
    model = build_model(tokenizer).to(_device())
    model.model.vision_tower.load_state_dict(torch.load(out / "tower.pt", map_location=_device(), weights_only=True))
    features = torch.load(out / "features-train.pt", weights_only=True)
    held_out = torch.load(out / "features-validation.pt", weights_only=True)
    scenes = [sample_scene(seed) for seed in SPLITS["train"][: len(features)]]
    labels = patch_labels(scenes)

    model.model.vision_tower.requires_grad_(False)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [p for p in model.model.language_model.layers.parameters() if p.ndim == 2]
    others = [p for p in parameters if all(p is not matrix for matrix in matrices)]
    optimizers = {
        "muon": torch.optim.Muon(
            matrices, lr=config.rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        "adamw": torch.optim.AdamW(others, lr=config.rate, betas=(0.9, 0.95), weight_decay=0.0),
    }
    saved, done, seconds = out / "language.pt", 0, 0.0
    if saved.exists():
        state = torch.load(saved, map_location=_device(), weights_only=True)
        model.load_state_dict(state["model"])
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(state[name])
        done, seconds = state["step"], state["seconds"]
    else:
        align(model, tokenizer, features, labels, config)
    started, losses = time.perf_counter() - seconds, []
    for step in range(done + 1, config.steps + 1):
        picked = np.random.default_rng([config.seed, step]).integers(0, len(features), config.batch)
        batch = [conversation(tokenizer, lesson(scenes[i], step, config.questions)) for i in picked]
        shown = None
        if step <= config.easy_steps:
            shown = objects_first(labels[picked], config.easy_tokens, step).to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
            logits, target = answer_logits(model, features[picked].to(model.device).float(), batch, shown)
        loss = cross_entropy(logits.float(), target)
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, config.clip)
        share = _schedule(step, config.steps, config.warmup, config.decay)
        for name, optimizer in optimizers.items():
            _set_rate(optimizer, share * (config.muon_rate if name == "muon" else config.rate))
            optimizer.step()
        losses.append(loss.detach())
        if step % 20 == 0:
            print(
                f"{step} loss {torch.stack(losses[-20:]).mean():.3f} {(time.perf_counter() - started):.0f} s",
                flush=True,
            )
        if step % config.evaluate_every == 0 or step == config.steps:
            seconds = time.perf_counter() - started
            few = None if step == config.steps else 100
            _log(
                out / "language.jsonl",
                step=step,
                seconds=seconds,
                loss=torch.stack(losses).mean().item(),
                later=accuracy(model, tokenizer, held_out[:few], config, config.questions),
                first=accuracy(model, tokenizer, held_out[: few and 3 * few], config, 1),
            )
            losses = []
            state = {
                "model": model.state_dict(),
                **{name: optimizer.state_dict() for name, optimizer in optimizers.items()},
                "step": step,
                "seconds": seconds,
            }
            torch.save(state, saved.with_suffix(".new"))
            saved.with_suffix(".new").rename(saved)
    _curve(out)


@app.command()
def export(out: Out = OUT, to: Annotated[Path, typer.Option(help="The checkpoint folder.")] = CHECKPOINT) -> None:
    """Write model (bfloat16 safetensors), tokenizer and processor as an ordinary checkpoint folder."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    model.load_state_dict(torch.load(out / "language.pt", map_location="cpu", weights_only=True)["model"])
    model.to(torch.bfloat16).save_pretrained(to)
    build_processor(tokenizer).save_pretrained(to)
    # The published LLaVA's names of the tower's weights, which every transformers reads; 5.3 knows no others.
    file = to / "model.safetensors"
    weights = {
        re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name): tensor
        for name, tensor in load_file(file).items()
    }
    save_file(weights, file, metadata={"format": "pt"})
    file.chmod(0o644)  # it is written for the owner alone
    print(f"{to}: {model.num_parameters():,} parameters")


# ---------------------------------------------------------------------------------------------------- small things


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _schedule(step: int, steps: int, warmup: int, decay: float) -> float:
    """Learning rate as a share of its peak: a linear rise, level, a linear fall to zero at the end."""
    return min(1.0, (step + 1) / warmup, max(0.0, (steps - step) / (decay * steps)))


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _log(path: Path, **values: Any) -> None:
    line = json.dumps(values)
    print(line, flush=True)
    with path.open("a") as file:
        file.write(line + "\n")


def _curve(out: Path) -> None:
    """Draw loss and held-out accuracy over the steps."""
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in (out / "language.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows]
    figure, (upper, lower) = plt.subplots(2, 1, sharex=True, figsize=(8, 7))
    upper.plot(steps, [row["loss"] for row in rows])
    upper.set_ylabel("loss on answers")
    for kind in rows[-1]["later"]:
        lower.plot(steps, [100 * row["later"][kind] for row in rows], label=kind)
    lower.set(xlabel="step", ylabel="right answers on validation scenes, %")
    lower.legend()
    figure.savefig(out / "curve.png", dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    app()
