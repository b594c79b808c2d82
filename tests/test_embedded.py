"""The embedded model: its world, its questions, its checkpoint."""

import copy
import itertools
import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from adaptinfer import embedded
from adaptinfer.embedded.__main__ import main
from adaptinfer.embedded.questions import KINDS, MAX_COUNT, PLURALS, questions_for
from adaptinfer.embedded.scenes import COLOURS, GRID, SHAPES, SPLITS, render, sample_scene, split_of

SEEDS = st.integers(0, 1_199_999)
SINGULAR = {plural: shape for shape, plural in PLURALS.items()}


# ------------------------------------------------------------------------------------------------------- scenes


@given(SEEDS)
@settings(max_examples=50, deadline=None)
def test_scene_follows_its_rules(seed):
    scene = sample_scene(seed)
    assert scene == sample_scene(seed)
    assert 4 <= len(scene.objects) <= 10
    assert len({item.cell for item in scene.objects}) == len(scene.objects)
    for item in scene.objects:
        assert 0.60 <= item.size <= 0.95
        for centre in (item.x, item.y):
            assert item.size / 2 <= centre <= 1 - item.size / 2  # inside its cell
    for names in (Counter(i.shape for i in scene.objects), Counter(i.colour for i in scene.objects)):
        assert max(names.values()) <= MAX_COUNT


def test_sampling_leaves_global_randomness_alone():
    import random

    before = random.getstate(), copy.deepcopy(np.random.get_state())
    render(sample_scene(3), 64)
    questions_for(sample_scene(3), 0, 8)
    assert random.getstate() == before[0]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[1], strict=True))


@pytest.mark.parametrize("seed", [0, 1_150_000])
def test_picture_is_deterministic_and_the_same_at_every_size(seed):
    small = np.asarray(render(sample_scene(seed), 128))
    assert small.shape == (128, 128, 3)
    assert np.array_equal(small, np.asarray(render(sample_scene(seed), 128)))
    large = render(sample_scene(seed), 512).resize((128, 128), Image.Resampling.BOX)
    assert np.abs(np.asarray(large, dtype=float) - small).mean() < 2


@pytest.mark.parametrize("size", [96, 128, 200])
def test_objects_stay_in_their_cells_and_show_their_colour(size):
    scene = sample_scene(11)
    bare = np.asarray(render(type(scene)(scene.seed, (), scene.background), size), dtype=int)
    drawn = np.asarray(render(scene, size), dtype=int)
    changed = np.abs(drawn - bare).sum(-1) > 0
    for item in scene.objects:
        rows, cols = (slice(round(at * size / GRID), round((at + 1) * size / GRID)) for at in item.cell)
        assert changed[rows, cols].any()
        assert (np.abs(drawn[rows, cols] - COLOURS[item.colour]).sum(-1) <= 3).any()
        changed[rows, cols] = False
    assert not changed.any()


def test_too_small_a_picture_is_refused():
    with pytest.raises(ValueError, match="size"):
        render(sample_scene(0), 7)


def test_splits_are_disjoint():
    ranges = sorted(SPLITS.values(), key=lambda seeds: seeds.start)
    assert all(a.stop <= b.start for a, b in itertools.pairwise(ranges))
    for name, seeds in SPLITS.items():
        assert split_of(seeds[0]) == split_of(seeds[-1]) == name
    with pytest.raises(ValueError, match="no split"):
        split_of(-1)


# ---------------------------------------------------------------------------------------------------- questions


@given(SEEDS, st.integers(0, 1000))
@settings(max_examples=200, deadline=None)
def test_answers_are_what_the_scene_says(seed, question_seed):
    """Every question is read again from its text alone, and answered by looking through the scene."""
    scene = sample_scene(seed)
    questions = questions_for(scene, question_seed, 8)
    assert questions == questions_for(scene, question_seed, 8)
    assert len(questions) == 8
    for question in questions:
        words = question.text.lower().rstrip("?.").split()
        colours = [word for word in words if word in COLOURS]
        shapes = [SINGULAR.get(word, word) for word in words if SINGULAR.get(word, word) in SHAPES]
        found = [i for i in scene.objects if i.colour in (colours or COLOURS) and i.shape in (shapes or SHAPES)]
        assert question.evidence == tuple(sorted(i.cell for i in found))
        if question.kind == "exists":
            assert len(colours) == len(shapes) == 1
            assert question.answer == ("yes" if found else "no")
        elif question.kind == "count":
            assert len(colours) + len(shapes) == 1
            assert question.answer == str(len(found))
        else:
            assert len(colours) + len(shapes) == len(found) == 1
            assert question.answer == getattr(found[0], question.kind)


def test_no_answer_is_a_good_guess():
    answers: dict[str, Counter] = {kind: Counter() for kind in KINDS}
    hard = 0
    for seed in range(1000):
        scene = sample_scene(seed)
        for question in questions_for(scene, 0, 8):
            answers[question.kind][question.answer] += 1
            if question.answer == "no":
                text = question.text.lower()
                hard += any(i.shape in text for i in scene.objects) and any(i.colour in text for i in scene.objects)
    totals = {kind: sum(counter.values()) for kind, counter in answers.items()}
    assert min(totals.values()) > 0.2 * sum(totals.values())
    assert 0.45 < answers["exists"]["yes"] / totals["exists"] < 0.55
    assert hard > 0.6 * answers["exists"]["no"]
    assert max(answers["count"].values()) < 0.35 * totals["count"]
    assert min(answers["count"][str(number)] for number in range(MAX_COUNT + 1)) > 0.06 * totals["count"]
    assert all(max(answers[kind].values()) < 0.2 * totals[kind] for kind in ("colour", "shape"))


def test_negative_number_of_questions_is_refused():
    with pytest.raises(ValueError, match="count"):
        questions_for(sample_scene(0), 0, -1)


# --------------------------------------------------------------------------------------------------- checkpoint


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(embedded.path(), local_files_only=True)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def model(request):
    return AutoModelForImageTextToText.from_pretrained(embedded.path(), dtype=request.param, local_files_only=True)


def _user(text, images=0):
    return {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def _assistant(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def _ask(model, processor, picture, messages):
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=prompt, images=picture, return_tensors="pt").to(model.dtype)
    out = model.generate(**inputs, max_new_tokens=4)
    return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_checkpoint_is_whole_and_small():
    names = {file.name for file in embedded.path().iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert sum(file.stat().st_size for file in embedded.path().iterdir()) < 8e6
    config = json.loads((embedded.path() / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]


def test_missing_checkpoint_says_where_it_should_be(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(FileNotFoundError, match="checkpoint"):
        embedded.path()


@pytest.mark.parametrize("size", [(512, 512), (128, 128), (37, 90), (640, 480)])
def test_any_picture_is_64_tokens(processor, size):
    inputs = processor(text="USER: <image>\nWhat is it? ASSISTANT:", images=Image.new("RGB", size), return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 64
    assert inputs["pixel_values"].shape == (1, 3, 128, 128)


def test_chat_template(processor):
    turns = [_user("What colour is the star?", 1), _assistant("red"), _user("How many stars are there?")]
    two = processor.apply_chat_template(turns, add_generation_prompt=True)
    assert two == (
        "USER: <image>\nWhat colour is the star? ASSISTANT: red</s>USER: How many stars are there? ASSISTANT:"
    )
    pictures = processor.apply_chat_template([_user("Is any star red?", 2)], add_generation_prompt=True)
    assert pictures == "USER: <image>\n<image>\nIs any star red? ASSISTANT:"
    inputs = processor(text=pictures, images=[Image.new("RGB", (99, 99))] * 2, return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 128
    assert inputs["input_ids"][0, 0] == processor.tokenizer.bos_token_id
    with pytest.raises(Exception, match="roles"):
        processor.apply_chat_template([{"role": "system", "content": "Hello"}])


def test_tokenizer_reads_every_question_in_any_case(processor):
    tokenizer = processor.tokenizer
    for seed in range(200):
        for question in questions_for(sample_scene(seed), 0, 4):
            ids = tokenizer(f"USER: {question.text} ASSISTANT: {question.answer}</s>")["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
            assert tokenizer.decode(tokenizer(question.text)["input_ids"], skip_special_tokens=True) == (
                question.text.lower()
            )
            upper = tokenizer(question.text.upper())["input_ids"]
            assert upper == tokenizer(question.text)["input_ids"]


def test_pictures_reach_the_tower_as_in_training(processor):
    """Training divides bytes by 255, subtracts 0.5 and divides by 0.25; so must the processor."""
    picture = render(sample_scene(5), 512)
    small = np.asarray(picture.resize((128, 128), Image.Resampling.BICUBIC), dtype=np.float64)
    pixels = processor.image_processor(picture, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(pixels, (small.transpose(2, 0, 1) / 255 - 0.5) / 0.25, atol=1e-5)


def test_answers_held_out_questions(model, processor):
    right = []
    for seed in SPLITS["validation"][2000:2010]:
        scene = sample_scene(seed)
        picture = render(scene, 512)
        for question in questions_for(scene, 0, 4):
            right.append(_ask(model, processor, picture, [_user(question.text, 1)]) == question.answer)
    assert np.mean(right) >= 0.9


def test_answers_in_a_later_turn(model, processor):
    right = []
    for seed in SPLITS["validation"][3000:3020]:
        scene = sample_scene(seed)
        first, second, asked = questions_for(scene, 0, 3)
        turns = [_user(first.text, 1), _assistant(first.answer), _user(second.text), _assistant(second.answer)]
        answer = _ask(model, processor, render(scene, 512), [*turns, _user(asked.text)])
        right.append(answer == asked.answer)
    assert np.mean(right) >= 0.85


# ------------------------------------------------------------------------------------------------- command line


def test_draw_writes_a_held_out_scene(tmp_path, capsys):
    file = tmp_path / "scene.png"
    assert main(["draw", str(file), "--seed", "7", "--size", "160", "--questions", "3"]) == 0
    expected = render(sample_scene(SPLITS["test"][7]), 160)
    assert np.array_equal(np.asarray(Image.open(file)), np.asarray(expected))
    assert len(capsys.readouterr().out.splitlines()) == 4


@pytest.mark.parametrize("wrong", [["--seed", "-1"], ["--size", "3"], ["--size", "100000"], ["--questions", "-1"]])
def test_draw_refuses_bad_numbers(tmp_path, wrong):
    with pytest.raises(SystemExit) as stop:
        main(["draw", str(tmp_path / "scene.png"), *wrong])
    assert stop.value.code == 2
    assert not list(tmp_path.iterdir())


def test_draw_refuses_an_unwritable_file(tmp_path):
    for file in (tmp_path / "none" / "scene.png", tmp_path / "scene.unknown"):
        with pytest.raises(SystemExit) as stop:
            main(["draw", str(file)])
        assert stop.value.code == 2


def test_importing_it_is_light():
    code = (
        "import sys, adaptinfer; before = set(sys.modules); import adaptinfer.embedded; "
        "print(*{'numpy', 'PIL', 'torch', 'transformers'} & (set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
