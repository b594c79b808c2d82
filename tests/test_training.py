"""The training script, at toy size: all phases learn, a run in pieces is the run in one go, the export loads."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import stand_in
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from adaptinfer import embedded
from adaptinfer.embedded.world.chance import Chance
from adaptinfer.embedded.world.render import render
from adaptinfer.embedded.world.scene import sample_scene
from adaptinfer.embedded.world.wordings import PLURALS
from adaptinfer.evaluation.world import WorldTask

sys.path.insert(0, str(Path(__file__).parent.parent / "research" / "training"))

import card
import measure
import train  # pyright: ignore
from config import PRESETS, Practice
from data import IGNORED, PAIR, SINGLE, TARGETS, Lessons, patch_labels
from language import practise, train_language
from lessons import describe_all, drill, hops, muster, roll_call, tally
from llava import build_tokenizer
from tower import train_tower

ROOT = Path(__file__).parent.parent
TOY = dataclasses.replace(
    PRESETS["toy"],
    tower_steps=6,
    align_steps=2,
    steps=4,
    evaluate_every=2,
    held_out=4,
    practice=Practice(steps=4, drilled=3, easy=((2, 24),)),
)
EVENLY = dict.fromkeys((*SINGLE, PAIR), 1.0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of one run in one go, and of the same in pieces that end at every save."""
    whole, pieces = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("pieces")
    assert train_tower(TOY, whole, 99) and train_language(TOY, whole, 99) and practise(TOY, whole, 99)
    calls = 1
    while not train_tower(TOY, pieces, 0):
        calls += 1
    while not train_language(TOY, pieces, 0):
        calls += 1
    while not practise(TOY, pieces, 0):
        calls += 1
    assert calls > 5
    return whole, pieces


def test_a_run_in_pieces_is_the_run_in_one_go(trained):
    for name in ("tower.pt", "language.pt", "practice.pt"):
        whole, pieces = (torch.load(folder / name, weights_only=True) for folder in trained)
        assert whole["step"] == pieces["step"]
        _same(whole["muon"], pieces["muon"])
        _same(whole["adamw"], pieces["adamw"])
        part = "tower" if name == "tower.pt" else "model"
        _same(whole[part], pieces[part])


def _same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            _same(one[key], other[key])
    elif isinstance(one, list):
        for pair in zip(one, other, strict=True):
            _same(*pair)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


def test_logs_tell_of_every_kind(trained):
    for name in ("language", "practice"):
        rows = [json.loads(line) for line in (trained[0] / f"{name}.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [2, 4]
        assert set(rows[-1]["later"]) <= {*SINGLE, "follow_up"} and set(rows[-1]["pairs"]) == {PAIR}
    train.draw_curves(rows, trained[0] / "curve.png")
    assert (trained[0] / "curve.png").stat().st_size > 1000


def test_the_export_loads_and_answers(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "toy", TOY)
    train.export("toy", trained[0], tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(tmp_path)
    weights = torch.load(trained[0] / "practice.pt", weights_only=True)["model"]
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, weights[name].bfloat16().float()), name
    inputs = processor(text="USER: <image>\nWhere is it? ASSISTANT:", images=_picture(), return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == TOY.tokens
    assert model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2


def test_practice_goes_on_from_an_export(trained, tmp_path, monkeypatch):
    """It starts at the exported weights, tower included: at a rate of zero it exports the same."""
    short = dataclasses.replace(TOY, practice=Practice(steps=1, drilled=0, easy=(), rate=0.0, muon_rate=0.0))
    monkeypatch.setitem(PRESETS, "toy", short)
    train.export("toy", trained[0], tmp_path / "first")
    (tmp_path / "run").mkdir()
    assert practise(short, tmp_path / "run", 99, start=tmp_path / "first")
    train.practice("toy", tmp_path / "run")  # goes on, or is done, without being told again
    train.export("toy", tmp_path / "run", tmp_path / "second")
    one, other = (AutoModelForImageTextToText.from_pretrained(tmp_path / name) for name in ("first", "second"))
    _same(dict(one.state_dict()), dict(other.state_dict()))
    with pytest.raises(train.typer.BadParameter, match="give --start"):
        train.practice("toy", tmp_path / "nothing")
    for wrong, message in (
        (embedded.path(), "of other sizes than the preset's"),
        (tmp_path / "no", "is no checkpoint"),
    ):
        with pytest.raises(train.typer.BadParameter, match=message):
            train.practice("toy", tmp_path / "other", start=wrong)
    with pytest.raises(train.typer.BadParameter, match="train the tower first"):
        train.language("toy", tmp_path / "nothing")
    with pytest.raises(train.typer.BadParameter, match="nothing to export"):
        train.export("toy", tmp_path / "nothing", tmp_path / "third")


def test_the_record_keeps_the_phases_before(trained, tmp_path):
    """A run that went on from an export has no logs of what came before; its card still tells of it."""
    train.export("toy", trained[0], tmp_path / "model")
    card.record("toy", TOY, trained[0], tmp_path / "model", tmp_path)
    whole = json.loads((tmp_path / "training.json").read_text())
    assert [*whole["phases"]] == ["tower", "language", "practice"]
    assert [row["step"] for row in whole["curve"]] == [2, 4, 6, 8]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "practice.jsonl").write_text((trained[0] / "practice.jsonl").read_text())
    card.record("toy", TOY, tmp_path / "run", tmp_path / "model", tmp_path)
    again = json.loads((tmp_path / "training.json").read_text())
    assert (again["phases"], again["curve"]) == (whole["phases"], whole["curve"])
    with pytest.raises(ValueError, match="tells of the preset toy"):
        card.record("cpu", PRESETS["cpu"], tmp_path / "run", tmp_path / "model", tmp_path)


def _picture() -> Any:
    from PIL import Image

    return Image.fromarray(render(sample_scene(0, TOY.grid), 20))


def test_lessons_depend_on_the_step_alone():
    tokenizer = build_tokenizer()
    one, other = (Lessons(TOY, tokenizer, steps, EVENLY) for steps in (range(3, 9), range(7, 8)))
    first, second = one[4], other[0]
    for name in ("pictures", "labels", "tokens", "looks"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert first.answers == second.answers and first.kinds == second.kinds
    assert tokenizer.unk_token_id not in first.tokens
    for (row, start, end), _ in zip(first.answers, first.kinds, strict=True):
        assert first.tokens[row, start - 1] == tokenizer.convert_tokens_to_ids("ASSISTANT:")
        assert first.tokens[row, end - 1] == tokenizer.eos_token_id


@pytest.mark.parametrize("seed", range(12))
def test_descriptions_say_all_that_is_there_and_roll_calls_the_truth(seed):
    scene = sample_scene(seed, 16, hard=seed % 3 == 2)
    chance = Chance("test", seed)
    said = describe_all(scene, chance).answer.split(" , ")
    assert len(said) == len(scene.things)
    looks = [{thing.shape, thing.colour, thing.pattern, thing.size, thing.text} - {""} for thing in scene.things]
    for words in said:
        looks.remove(next(look for look in looks if look <= set(words.split())))
    calls = roll_call(scene, chance, 60)
    assert 15 < sum(question.answer == "yes" for question in calls) < 45
    for question in calls:
        named = {question.text.split()[-1], question.text.split()[-2]} - {"a", "an", "thing", "object"}
        there = any(named <= {thing.shape, thing.colour} for thing in scene.things)
        assert question.answer == ("yes" if there else "no"), question


@pytest.mark.parametrize("seed", range(24))
def test_drills_tell_the_truth(seed):
    scene = sample_scene(seed, 16, hard=seed % 3 == 2)
    chance = Chance("test", seed)
    things = scene.things

    def fitting(words: str) -> list[Any]:
        """The things that a phrase fits; "with the letter A", "that says cat" are told by the text."""
        named = set(words.split()) - {"with", "the", "letter", "number", "that", "says", "thing", "object"}
        return [t for t in things if named <= {t.shape, t.colour, t.pattern, t.size, t.text}]

    for _ in range(4):
        for entry in tally(scene, chance).answer.split(" , "):
            words, count = entry.rsplit(" ", 1)
            assert len(fitting(words)) == int(count), entry
    for question in muster(scene, chance):
        value = question.text.split()[2]
        value = next((one for one, many in PLURALS.items() if many == value), value)
        group = [t for t in things if value in (t.shape, t.colour)]
        if question.text.endswith("shapes"):
            group = [t for t in things if value in (t.pattern, t.size) and t.shape != "sign"]
        said = [{t.colour, t.shape} - {value} for t in group]
        assert [set(entry.split()) for entry in question.answer.split(" , ")] == said, question
    tokenizer = build_tokenizer()
    for question in (hops(scene, chance), *drill(scene, chance)):
        assert tokenizer.unk_token_id not in tokenizer(f"{question.text} {question.answer}")["input_ids"]
        assert question.answer or question.text == "name the other things"
    for entry in filter(None, hops(scene, chance).answer.split(" , ")):
        words = entry.split()
        if "same" in words:
            at = words.index("same")
            (start,), link, end = fitting(" ".join(words[:at])), words[at + 1], words[at + 2 :]
            others = [t for t in things if t is not start and getattr(t, link) == getattr(start, link)]
            assert len(others) == 1 and set(end) <= {others[0].colour, others[0].shape}, entry
        else:
            at = next(i for i, word in enumerate(words) if word in ("left", "right", "above", "below"))
            (start,), side = fitting(" ".join(words[:at])), words[at]
            right, down = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}[side]
            beside = [
                t
                for t in things
                if {t.colour, t.shape} == set(words[at + 1 :])
                and 1 <= right * (t.x - start.x) + down * (t.y - start.y) <= 3
            ]
            assert beside, entry


def test_labels_name_the_middle_of_each_thing():
    scene = sample_scene(5, 16)
    labels = patch_labels(scene).reshape(16, 16, -1)
    assert (labels[..., 0] == 2).sum() == len(scene.things)
    for thing in scene.things:
        row, col = thing.anchor
        assert labels[row, col, 0] == 2
        assert labels[row, col, -2:].tolist() == [row, col]
    elsewhere = labels[labels[..., 0] != 2]
    assert (elsewhere[:, [1, 3, 4, 5]] == IGNORED).all() and len(TARGETS) == labels.shape[-1]


# ------------------------------------------------------------------------------------------------------ the model card


def test_the_card_is_made_of_results_alone(trained, tmp_path, monkeypatch):
    """Every run of `measure` on a stand-in, then the card with its picture, then both again without work."""
    monkeypatch.setattr(measure, "EMBEDDED", stand_in.folder())
    monkeypatch.setattr(WorldTask, "max_new_tokens", 1)
    monkeypatch.setattr(train, "CHECKPOINT", ROOT / "src/adaptinfer/embedded/checkpoint")
    monkeypatch.setitem(PRESETS, "toy", TOY)
    results, made = tmp_path / "results", tmp_path / "made"
    with pytest.raises(FileNotFoundError, match="training.json is missing; it is made by: .*card --out"):
        card.read(results)
    train.measured(["validation"], 2, results, tmp_path / "work", "cpu")
    document = json.loads((results / "validation.json").read_text())
    assert document["weights"] and [task["answers"] for task in document["tasks"]] == [2, 2]
    answers = tmp_path / "work" / "validation" / "answers.jsonl"
    before = answers.read_bytes()
    train.measured(["validation"], 2, results, tmp_path / "work", "cpu")
    assert answers.read_bytes() == before
    with pytest.raises(train.typer.BadParameter, match="measure --only validation-more"):
        train.card("toy", trained[0], results, made, False)
    train.measured([name for name in measure.RUNS if name != "validation"], 2, results, tmp_path / "work", "cpu")
    train.card("toy", trained[0], results, made, False)
    text = (made / "src/adaptinfer/embedded/checkpoint/README.md").read_text()
    documents = card.read(results)
    assert text == card.card(documents) and "4 × 4 pictures" in text  # steps and batch of the toy
    assert (made / "research" / "training" / "curve.png").stat().st_size > 1000
    table = card.pruned(documents)
    assert table in text and table in (made / card.PAGE).read_text()
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in table.splitlines()}
    (task,) = documents["pruned"]["tasks"]
    found = next(row for row in task["conditions"] if row["name"] == "adaptinfer 64")
    assert rows["64, adaptinfer"][1:3] == [
        f"{found['true_average']:.1f}",
        f"{100 * found['accuracy']['value']:.1f} ± {50 * (found['accuracy']['high'] - found['accuracy']['low']):.1f}",
    ]
    assert rows["16, adaptinfer"][2] == "not met" and float(rows["16, divprune >> adaptinfer"][1]) <= 16


def test_what_stands_between_the_marks_is_replaced():
    text = f"before\n{card.BEGIN}\nold\n{card.END}\nafter"
    assert card.into(text, "new") == f"before\n{card.BEGIN}\n\nnew\n\n{card.END}\nafter"
    assert card.into(card.into(text, "x"), "new") == card.into(text, "new")
    with pytest.raises(ValueError, match="substring not found"):
        card.into("no marks", "new")
