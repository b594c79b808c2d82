"""`adaptinfer eval` without a model: metrics, statistics, tasks, conditions, controls, the journal, the report."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import random
import resource
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from adaptinfer import AdaptInfer, PrunerError, Schedule, ScheduleError, Stage
from adaptinfer.embedded.world import sample_scene
from adaptinfer.errors import AdaptInferError, InputError
from adaptinfer.evaluation.conditions import Condition, conditions, published
from adaptinfer.evaluation.controls import VIEWS, Evidence, EvidenceBefore, evidence_tokens
from adaptinfer.evaluation.journal import Journal
from adaptinfer.evaluation.metrics import METRICS, normalise, yes_or_no
from adaptinfer.evaluation.plots import _lines, _spread, draw
from adaptinfer.evaluation.published import published_for
from adaptinfer.evaluation.report import to_html, to_markdown
from adaptinfer.evaluation.statistics import Resamples, verdict, yes_no
from adaptinfer.evaluation.summary import finite, summarise
from adaptinfer.evaluation.tasks import load_task
from adaptinfer.pruners import METHODS, PyramidDrop, Random, V2Drop

sys.path.insert(0, str(Path(__file__).parents[1] / "research" / "tables"))
import llava_1_5_7b
import llava_1_5_13b
import qwen2_vl_2b
import table as tables


def test_a_missing_extra_is_one_sentence_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "adaptinfer.evaluation")
    with pytest.raises(
        AdaptInferError, match="needs jinja2, which is not installed: pip install 'adaptinfer\\[eval\\]'"
    ):
        importlib.import_module("adaptinfer.evaluation")


# ---------------------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize(
    ("metric", "answer", "references", "score"),
    [
        ("exact", "The red star.", ["red star"], 1),
        ("exact", "two", ["2"], 1),
        ("exact", "red", ["blue", "Red"], 1),
        ("exact", "reddish", ["red"], 0),
        ("exact", "2.5", ["25"], 0),
        ("exact", "a 4", ["b 4"], 0),  # a cell, whose letter is no article
        ("exact", "a", ["the"], 0),
        ("yes_no", "Yes, there is one.", ["yes"], 1),
        ("yes_no", "No", ["yes"], 0),
        ("yes_no", "not at all", ["no"], 0),
        ("yes_no", "red", ["red"], 0),
        ("vqa", "cat", ["cat"] * 10, 1),
        ("vqa", "cat", ["cat"] * 3 + ["dog"] * 7, (3 * 2 / 3 + 7 * 1) / 10),
        ("vqa", "cat", ["cat"] + ["dog"] * 9, (1 * 0 + 9 / 3) / 10),
        ("vqa", "cow", ["cat"] * 10, 0),
        ("vqa", "cat", ["cat"], 1),
        ("anls", "Hello World", ["hello world"], 1),
        ("anls", "hallo", ["hello"], 0.8),
        ("anls", "ab", ["ax"], 0),  # a similarity of one half is too little
        ("anls", "abc", ["xyz", "abd"], 2 / 3),
    ],
)
def test_scores_worked_by_hand(metric, answer, references, score):
    assert METRICS[metric](answer, references) == pytest.approx(score)


@given(st.text("ab the.1"))
def test_normalising_twice_is_normalising_once_and_leaves_no_blanks_at_the_edges(text):
    once = normalise(text)
    assert once == once.strip() and "  " not in once
    assert normalise(once.upper()) == normalise(once)


def _distance(first: str, second: str) -> int:
    """The definition, slowly."""
    if not first or not second:
        return len(first) + len(second)
    return min(
        _distance(first[1:], second) + 1,
        _distance(first, second[1:]) + 1,
        _distance(first[1:], second[1:]) + (first[0] != second[0]),
    )


@given(st.text("abc", max_size=5), st.text("abc", max_size=5))
def test_anls_is_one_less_the_share_of_edits(first, second):
    longer = max(len(first), len(second))
    similarity = 1 - _distance(first, second) / longer if longer else 1.0
    assert METRICS["anls"](first, [second]) == pytest.approx(similarity if similarity > 0.5 else 0.0)


def test_yes_and_no_are_first_words():
    assert [yes_or_no(text) for text in ("Yes.", " no, none", "nobody", "I say yes", "")] == [
        "yes",
        "no",
        None,
        None,
        None,
    ]


# ---------------------------------------------------------------------------------------------------- statistics


def _resamples(*columns: list[float], per_group: int = 1) -> Resamples:
    sums = np.array(columns, dtype=float).T
    return Resamples(sums, np.full_like(sums, per_group))


def test_an_interval_is_the_middle_of_what_resampled_groups_say():
    # Of two groups, 1 and 0, a quarter of the resamples says 0, a quarter 1.
    alone = _resamples([1, 0]).mean(0)
    assert (alone.value, alone.low, alone.high) == (0.5, 0.0, 1.0)
    rng = random.Random(0)
    scores = [float(rng.random() < 0.7) for _ in range(300)]
    found = _resamples(scores).mean(0)
    error = math.sqrt(found.value * (1 - found.value) / 300)  # of a mean of so many; the normal interval is close here
    assert found.low == pytest.approx(found.value - 1.96 * error, abs=0.01)
    assert found.high == pytest.approx(found.value + 1.96 * error, abs=0.01)


def test_answers_about_one_picture_do_not_count_as_many():
    rng = random.Random(1)
    scores = [float(rng.random() < 0.6) for _ in range(60)]
    once, four = _resamples(scores).mean(0), _resamples([4 * score for score in scores], per_group=4).mean(0)
    assert (once.low, once.high) == pytest.approx((four.low, four.high))


def test_differences_are_paired():
    rng = random.Random(2)
    hard = [float(rng.random() < 0.5) for _ in range(100)]
    better = [min(1.0, score + (n % 10 == 0)) for n, score in enumerate(hard)]
    found = _resamples(better, hard)
    assert found.difference(0, 0) == found.difference(1, 1)
    assert (found.difference(0, 0).low, found.difference(0, 0).high) == (0, 0)
    difference = found.difference(0, 1)
    apart = [a - b for a, b in zip(better, hard, strict=True)]
    assert difference.value == pytest.approx(sum(apart) / 100) and difference.groups == sum(map(bool, apart))
    # Unpaired, two means of 100 coins lie within 0.14 of each other; paired, the few that differ decide.
    assert difference.high - difference.low < 0.12
    swapped = found.difference(1, 0)
    assert (swapped.low, swapped.high) == pytest.approx((-difference.high, -difference.low))


@pytest.mark.parametrize(("apart", "said"), [(0, "open"), (4, "open"), (5, "open"), (6, "better"), (40, "better")])
def test_better_takes_an_interval_without_zero_and_six_groups(apart, said):
    ones, others = [1.0] * 100, [0.0] * apart + [1.0] * (100 - apart)
    found = _resamples(ones, others)
    assert verdict(found.difference(0, 1)) == said
    assert verdict(found.difference(1, 0)) == said.replace("better", "worse")


def test_half_and_half_is_open():
    ours, theirs = [1.0, 0.0] * 50, [0.0, 1.0] * 50
    assert verdict(_resamples(ours, theirs).difference(0, 1)) == "open"


def test_all_right_is_not_certain():
    found = _resamples([1.0] * 20, [0.0] * 20)
    doubt = 1.959964**2 / (20 + 1.959964**2)  # Wilson's bound
    assert (found.mean(0).low, found.mean(0).high) == pytest.approx((1 - doubt, 1))
    assert (found.mean(1).low, found.mean(1).high) == pytest.approx((0, doubt))


def test_a_column_that_some_resamples_lack_is_judged_by_the_others():
    sums, counts = np.array([[1.0], [0.0], [0.0]]), np.array([[1.0], [1.0], [0.0]])
    found = Resamples(sums, counts).mean(0)
    assert found.value == 0.5 and (found.low, found.high) == (0, 1)


def test_precision_and_recall_by_hand():
    #       said:  yes    yes    no     red    yes
    #       true:  yes    no     yes    yes    yes
    found = yes_no(["Yes", "yes", "no", "red", "yes."], ["yes", "no", "yes", "yes", "yes"])
    assert (found.questions, found.precision, found.recall, found.yes_share) == (5, 2 / 3, 2 / 4, 3 / 5)
    assert math.isnan(yes_no(["no"], ["yes"]).precision) and math.isnan(yes_no(["no"], ["no"]).recall)


# ---------------------------------------------------------------------------------------------------- tasks


def test_tasks_are_the_same_every_time_and_longer_ones_begin_alike():
    for name in ("world", "world-turns", "world-pair", "world:validation"):
        few, more = load_task(name).samples(5), load_task(name).samples(9)
        assert list(few) == list(more[:5]) and len(few) == 5 and len(more) == 9
    assert len(load_task("world").samples(None)) == 500
    assert load_task("world").samples(1) != load_task("world:validation").samples(1)
    assert {len(sample.turns) for sample in load_task("world-turns").samples(3)} == {4}


def test_scenes_as_tasks():
    for name in ("world", "world-hard", "world-turns", "world-pair"):
        task = load_task(name)
        samples = task.samples(12)
        assert list(samples) == list(task.samples(12)) and len({sample.id for sample in samples}) == 12
        for sample in samples[:2]:
            pictures = task.pictures(sample)
            assert len(pictures) == (2 if name == "world-pair" else 1)
            assert all(picture.mode == "RGB" for picture in pictures)
            for turn in sample.turns:
                assert all(picture < len(pictures) and max(cell) < task.grid[0] for picture, *cell in turn.evidence)


def test_evidence_is_the_patches_of_the_things_asked_about():
    task = load_task("world")
    asked = [sample for sample in task.samples(60) if sample.turns[0].kind in ("attribute", "where", "read")]
    assert len(asked) > 8
    for sample in asked:
        scene = sample_scene(int(sample.group), task.grid[0])
        things = [{(0, *cell) for cell in thing.cells(scene.grid)} for thing in scene.things]
        assert set(sample.turns[0].evidence) in things


def _jsonl(folder: Path, *entries: object) -> str:
    path = folder / "mine.jsonl"
    path.write_text("\n".join(entry if isinstance(entry, str) else json.dumps(entry) for entry in entries))
    return str(path)


def test_a_file_of_ones_own(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    path = _jsonl(
        tmp_path,
        {"image": "a.png", "question": " What? ", "answer": "red"},
        "",
        {"id": "two", "images": ["a.png", "a.png"], "question": "Same?", "answers": ["yes", 1], "kind": "pair"},
    )
    task = load_task(f"{path}:vqa")
    first, second = task.samples(None)
    assert (task.name, task.metric, first.id, first.turns[0].question) == ("mine", "vqa", "1", "What?")
    assert second.turns[0].answers == ("yes", "1") and second.turns[0].kind == "pair"
    assert [picture.size for picture in task.pictures(second)] == [(8, 8), (8, 8)]
    assert task.identity() != load_task(path).identity()


def test_another_picture_of_the_same_name_is_another_task(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    Image.new("RGB", (8, 8), "red").save(here / "a.png")
    lines = [
        {"images": ["a.png", name], "question": "What?", "answer": "red"} for name in ("b.png", "odd\x00", "\ud800")
    ]
    path = _jsonl(here, *lines)
    task = load_task(path)
    found = {"one picture": task.identity()}
    shutil.copytree(here, there)
    assert load_task(str(there / "mine.jsonl")).identity() == found["one picture"]
    Image.new("RGB", (8, 8), "blue").save(here / "b.png")
    assert task.identity() == found["one picture"], "read once"
    found["two"] = load_task(path).identity()
    Image.new("RGB", (8, 8), "green").save(here / "a.png")
    found["replaced"] = load_task(path).identity()
    for picture in ("a.png", "b.png"):
        (here / picture).replace(here / f"{picture}.aside")
    (here / "a.png.aside").replace(here / "b.png")
    (here / "b.png.aside").replace(here / "a.png")
    found["exchanged"] = load_task(path).identity()
    assert len(set(found.values())) == len(found)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 1: not JSON"),
        ("[]", "line 1: not an object"),
        ("[" * 200_000, "line 1: not JSON that can be read"),
        ({"question": "?", "answer": "x"}, "give exactly one of image and images"),
        ({"image": "a", "images": ["a"], "question": "?", "answer": "x"}, "give exactly one of image and images"),
        ({"image": "a", "question": "?"}, "give exactly one of answer and answers"),
        ({"image": "a", "question": " ", "answer": "x"}, "question: must be text"),
        ({"image": 3.5, "question": "?", "answer": "x"}, "image: must be text"),
        ({"images": [], "question": "?", "answer": "x"}, "images: must be a list of texts"),
        ({"image": "a", "question": "?", "answers": [None]}, "answers: must be a list of texts"),
        ({"image": "a", "question": "?", "answer": "x", "label": 1}, "label: no such field"),
        ({"image": "a", "question": "?", "answer": "x", "kind": 2}, "kind: must be text"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, reason):
    with pytest.raises(InputError, match=reason):
        load_task(_jsonl(tmp_path, line))


def test_a_line_ends_at_a_newline_only(tmp_path):
    line = {"image": "a.png", "question": "What\u2028colour\x85is it?", "answer": "red"}
    (sample,) = load_task(_jsonl(tmp_path, json.dumps(line, ensure_ascii=False))).samples(None)
    assert sample.turns[0].question == line["question"]


def test_other_files_and_names_that_are_no_tasks(tmp_path):
    twice = {"id": "7", "image": "a", "question": "?", "answer": "x"}
    with pytest.raises(InputError, match="line 2: id: '7' stands on an earlier line"):
        load_task(_jsonl(tmp_path, twice, twice))
    with pytest.raises(InputError, match="is empty"):
        load_task(_jsonl(tmp_path))
    with pytest.raises(InputError, match="cannot be read"):
        load_task(str(tmp_path / "none.jsonl"))
    with pytest.raises(InputError, match="there is no metric 'bleu'"):
        load_task("a.jsonl:bleu")
    with pytest.raises(InputError, match="there is no split 'nonsense'"):
        load_task("world:nonsense")
    with pytest.raises(InputError, match="there is none of that name"):
        load_task("gqa")


# ---------------------------------------------------------------------------------------------------- conditions


def test_what_stands_side_by_side():
    found = conditions(["adaptinfer"], [0.3], seeds=2)
    assert [each.name for each in found] == [
        "vanilla", "adaptinfer 0.3", "random 0.3", "evidence 0.3", "resized 0.3", "blank", "shuffled", "wrong",
    ]  # fmt: skip
    assert [each.seeds for each in found] == [1, 1, 2, 2, 1, 1, 1, 1]
    both = conditions(["adaptinfer"], [0.3], ["keep", "compact"], controls=False)
    assert [each.name for each in both] == ["vanilla", "adaptinfer 0.3 keep", "adaptinfer 0.3 compact"]
    assert [each.series for each in both[1:]] == ["adaptinfer keep", "adaptinfer compact"]
    (published,) = conditions([], [], presets=["llava-1.5-7b/64"], controls=False)[1:]
    assert published.pruner == AdaptInfer.paper(64)


def test_a_saved_pruner_takes_part(tmp_path):
    AdaptInfer(budget=0.2, prior_weight=0.5).save_pretrained(tmp_path / "mine")
    (found,) = conditions([], [], saved=[tmp_path / "mine"], controls=False)[1:]
    assert (found.name, found.budget, found.pruner) == ("mine", 0.2, AdaptInfer(budget=0.2, prior_weight=0.5))


def test_a_schedule_from_a_file_takes_part(tmp_path):
    schedule = Schedule(stages=[Stage(1, 0.5), Stage(3, 0.25)], num_layers=6)
    for place in ("calibrated/schedule.json", "mine.json"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        schedule.save(tmp_path / place)
    names = [str(tmp_path / "calibrated/schedule.json"), f"random:{tmp_path / 'mine.json'}"]
    ours, chance = conditions([], [], schedules=names, controls=False)[1:]
    assert (ours.name, ours.seeds, ours.pruner) == ("adaptinfer calibrated", 1, AdaptInfer(schedule=schedule))
    assert (chance.name, chance.seeds, chance.pruner) == ("random mine", 3, Random(schedule=schedule))
    with pytest.raises(ScheduleError, match="cannot read 'fast:nowhere.json'"):
        conditions([], [], schedules=["fast:nowhere.json"], controls=False)


def test_a_control_that_knows_the_evidence_can_be_asked_for():
    names = [each.name for each in conditions(["evidence-before", "evidence"], [0.3])]
    assert names[1:4] == ["evidence-before 0.3", "evidence 0.3", "random 0.3"] and names.count("evidence 0.3") == 1
    (_, found) = conditions(["evidence-before"], [0.3], controls=False)
    pruner = found.pruner_for(0, 1, [[3]], [9])
    assert isinstance(pruner, EvidenceBefore) and (pruner.cells, pruner.counts) == (((3,),), (9,))
    assert found.is_control and found.seeds == 3


class Mine(Random):
    """A method from outside of the package."""

    name = "mine"


def test_a_method_of_the_users_own_takes_part_by_its_address():
    found = conditions([f"{__name__}:Mine", "adaptinfer"], [0.3], controls=False)
    assert [each.name for each in found] == ["vanilla", "mine 0.3", "adaptinfer 0.3"]
    assert type(found[1].pruner) is Mine and found[1].seeds == 3
    with pytest.raises(PrunerError, match="nowhere:Mine"):
        conditions(["nowhere:Mine"], [0.3])


def test_conditions_that_make_no_sense():
    with pytest.raises(InputError, match="there is no method 'fast'"):
        conditions(["fast"], [0.3])
    with pytest.raises(InputError, match="positions: must be one of"):
        conditions(["adaptinfer"], [0.3], ["new"])
    with pytest.raises(PrunerError, match="budget: must be a positive number"):
        conditions(["adaptinfer"], [0.0])
    with pytest.raises(InputError, match="would be run twice"):
        conditions(["adaptinfer"], [0.3, 0.3])
    with pytest.raises(InputError, match="would be run twice"):
        conditions(["adaptinfer", "adaptinfer"], [0.3])
    with pytest.raises(PrunerError, match="random has no published schedule"):
        conditions([], [], presets=["random:llava-1.5-7b/64"])
    with pytest.raises(InputError, match="there is no method 'fast'"):
        conditions([], [], presets=["fast:llava-1.5-7b/64"])


def test_chance_falls_differently_in_every_batch_and_seed():
    (found,) = conditions(["random"], [0.3], controls=False)[1:]
    drawn = {found.pruner_for(seed, batch, [], []).seed for seed in range(3) for batch in range(50)}
    assert len(drawn) == 150


# ---------------------------------------------------------------------------------------------------- controls


def test_cells_are_tokens_of_the_prompt():
    cells = [(0, 0, 0), (1, 7, 3)]
    assert evidence_tokens(cells, (8, 8), 2, 128) == [0, 64 + 59]
    # Twice as fine: each cell is four tokens of rows of 16.
    assert evidence_tokens([(0, 1, 2)], (8, 8), 1, 256) == [36, 37, 52, 53]
    with pytest.raises(InputError, match="does not say where"):
        evidence_tokens([], None, 1, 64)
    with pytest.raises(InputError, match="has 576 vision tokens, and the evidence is on a grid of 10 x 8"):
        evidence_tokens([], (10, 8), 1, 576)


@given(st.integers(0, 2**31), st.data())
def test_evidence_stays_through_all_stages(seed, data):
    counts = (12, 9)
    cells = tuple(tuple(data.draw(st.lists(st.integers(0, count - 1), max_size=3, unique=True))) for count in counts)
    pruner = Evidence(budget=0.5, cells=cells, counts=counts, seed=seed)
    alive = [list(range(count)) for count in counts]
    for keeps in ((7, 6), (4, 3)):
        width = max(map(len, alive))
        mask = torch.tensor([[n < len(row) for n in range(width)] for row in alive])
        index = torch.zeros(2, width, dtype=torch.long)
        score = pruner.score(SimpleNamespace(vision_index=index, vision_mask=None if bool(mask.all()) else mask))
        for row, keep in enumerate(keeps):
            best = score[row, : len(alive[row])].topk(keep).indices.sort().values.tolist()
            alive[row] = [alive[row][n] for n in best]
            assert set(cells[row]) <= set(alive[row])


@given(st.integers(0, 2**31), st.data())
def test_evidence_is_kept_before_the_model_too(seed, data):
    """Rows of a batch come by shape: here the first and the third are 12 tokens long, the second 9."""
    counts = (12, 9, 12)
    cells = tuple(tuple(data.draw(st.lists(st.integers(0, count - 1), max_size=3, unique=True))) for count in counts)
    pruner = EvidenceBefore(budget=0.5, cells=cells, counts=counts, seed=seed)
    for rows, count in ((torch.tensor([0, 2]), 12), (torch.tensor([1]), 9)):
        view = SimpleNamespace(features=torch.zeros(len(rows), count, 2), count=count, keep=4, rows=rows)
        kept = pruner.select_before(view).kept
        assert kept.shape == (len(rows), count) and kept.sum(dim=1).tolist() == [4] * len(rows)
        for row, marks in zip(rows, kept, strict=True):
            assert set(cells[row]) <= set(marks.nonzero()[:, 0].tolist())
    whole = SimpleNamespace(features=torch.zeros(3, 9, 2), count=9, keep=4, rows=None)
    same = EvidenceBefore(budget=0.5, cells=((0,), (3,), (8,)), counts=(9,) * 3, seed=seed)
    assert [bool(same.select_before(whole).kept[row, cell]) for row, cell in enumerate((0, 3, 8))] == [True] * 3


def test_what_is_done_to_pictures():
    pixels = np.arange(64 * 64 * 3, dtype=np.uint32).reshape(64, 64, 3) % 251
    picture = Image.fromarray(pixels.astype(np.uint8))
    blank = np.asarray(VIEWS["blank"](picture, 0))
    assert blank.shape == (64, 64, 3) and len(np.unique(blank.reshape(-1, 3), axis=0)) == 1
    shuffled = np.asarray(VIEWS["shuffled"](picture, 5))

    def tiles(values):
        return sorted(values[y : y + 8, x : x + 8].tobytes() for y in range(0, 64, 8) for x in range(0, 64, 8))

    assert tiles(shuffled) == tiles(np.asarray(picture)) and (shuffled != np.asarray(picture)).any()
    assert (shuffled == np.asarray(VIEWS["shuffled"](picture, 5))).all()
    assert (shuffled != np.asarray(VIEWS["shuffled"](picture, 6))).any()


# ---------------------------------------------------------------------------------------------------- the journal


def _block(batch: int, condition: str = "vanilla", answers: int = 2, task: str = "t", seed: int = 0) -> list[dict]:
    place = {"task": task, "batch": batch, "condition": condition, "seed": seed}
    return [{**place, "sample": f"{batch}/{n}", "answer": "ä"} for n in range(answers)]


def test_whatever_a_kill_leaves_is_cut_back_to_whole_blocks(tmp_path):
    journal = Journal(tmp_path, {"a": 1})
    assert journal.open() == set()
    path = tmp_path / "answers.jsonl"
    ends = [path.stat().st_size]
    for batch in range(3):
        journal.append(_block(batch))
        ends.append(path.stat().st_size)
    del journal
    whole = path.read_bytes()
    near = {end + step for end in ends[1:] for step in (-1, 0, 1)} & set(range(len(whole) + 1))
    for cut in sorted(near | {*range(ends[1], len(whole), 23)}):
        path.write_bytes(whole[:cut])
        done = Journal(tmp_path, {"a": 1}).open()
        finished = sum(end <= cut for end in ends[1:])
        assert done == {("t", batch, "vanilla", 0) for batch in range(finished)}
        assert path.read_bytes() == whole[: ends[finished]]


def test_other_settings_and_other_files_are_refused(tmp_path):
    Journal(tmp_path, {"budget": 1, "batch": 2}).open()
    with pytest.raises(InputError, match="holds answers of another run \\(it differs in batch\\)"):
        Journal(tmp_path, {"budget": 1, "batch": 3}).open()
    (tmp_path / "answers.jsonl").write_text("something else\n")
    with pytest.raises(InputError, match="is no file of answers"):
        Journal(tmp_path, {"budget": 1}).open()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        Journal(tmp_path / "file", {}).open()


def test_two_at_once_are_refused(tmp_path):
    first = Journal(tmp_path, {})
    first.open()
    with pytest.raises(InputError, match="another process is writing to it"):
        Journal(tmp_path, {}).open()


def test_a_full_disk_loses_nothing(tmp_path):
    journal = Journal(tmp_path, {})
    journal.open()
    journal.append(_block(0))
    before = (tmp_path / "answers.jsonl").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
        with pytest.raises(InputError, match="cannot be written .*run the same command again"):
            journal.append(_block(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "answers.jsonl").read_bytes() == before
    journal.append(_block(1))
    assert len(journal.done()) == 2


def test_files_of_several_processes_become_one_in_one_order(tmp_path):
    blocks = [_block(batch, condition, task=task) for task in "ab" for batch in (0, 1) for condition in ("v", "c")]
    whole = Journal(tmp_path / "whole", {})
    whole.open()
    for block in blocks:
        whole.append(block)
    parts = [Journal(tmp_path / "parts", {}, part) for part in (None, 1, 2)]
    for part in parts:
        part.open()
    shuffled = random.Random(3).sample(blocks, len(blocks))
    for number, block in enumerate(shuffled):
        parts[number % 3].append(block)
    parts[2].append(shuffled[0])  # twice, as when a worker died after it had written
    parts[0].merge(["a", "b"], ["v", "c"])
    assert (tmp_path / "parts" / "answers.jsonl").read_bytes() == (tmp_path / "whole" / "answers.jsonl").read_bytes()
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["answers.jsonl"]


# ---------------------------------------------------------------------------------------------------- the report


def _records() -> tuple[SimpleNamespace, list[dict]]:
    """Eight yes/no questions, about four pictures, under three conditions."""
    answers = {
        ("vanilla", 0): "yes yes no no yes yes no no",  # the last two pictures' second answers are wrong
        ("adaptinfer 0.1", 0): "yes yes no no yes no no no",
        ("random 0.1", 0): "no yes no no yes yes no no",
        ("random 0.1", 1): "yes yes no yes yes yes no no",
    }
    truth = ["yes", "yes", "no", "no", "yes", "no", "no", "yes"]
    records = []
    for (condition, seed), said in answers.items():
        for n, (answer, reference) in enumerate(zip(said.split(), truth, strict=True)):
            share = 1.0 if condition == "vanilla" else 0.1
            records.append(
                {"task": "t", "batch": 0, "condition": condition, "seed": seed, "sample": str(n), "group": str(n // 2)}
                | {"turn": 0, "kind": "exists" if n < 4 else "where", "answer": answer, "references": [reference]}
                | {"score": float(answer == reference), "top1": True, "kl": 0.5 * (condition != "vanilla")}
                | {"vision_tokens": 64, "true_average": 64 * share, "flops": 1e9 * share, "kv_bytes": 1e6 * share}
            )
    records.append(
        {"task": "t", "batch": 0, "condition": "broken 0.1", "seed": 0, "sample": "0", "refused": "cannot | <b>"}
    )
    found = (
        Condition("vanilla", "vanilla"),
        Condition("adaptinfer 0.1", "adaptinfer", 0.1, AdaptInfer(budget=0.1)),
        Condition("random 0.1", "random", 0.1, AdaptInfer(budget=0.1), seeds=2),
        Condition("broken 0.1", "broken", 0.1, AdaptInfer(budget=0.1)),
    )
    return SimpleNamespace(loaded_tasks={"t": SimpleNamespace(metric="exact")}, conditions=found), records


def test_figures_worked_by_hand():
    (task,) = summarise(*_records())
    vanilla, ours, chance = task["conditions"]
    assert (task["answers"], task["groups"], task["kinds"]) == (8, 4, {"exists": 4, "where": 4})
    assert vanilla["accuracy"]["value"] == 6 / 8 and vanilla["verdict"] is None
    assert ours["accuracy"]["value"] == 7 / 8 and ours["difference"]["value"] == pytest.approx(1 / 8)
    assert (ours["flips"], ours["correct_to_wrong"], ours["wrong_to_correct"]) == (1 / 8, 0, 1 / 8)
    assert chance["accuracy"]["value"] == pytest.approx((5 / 8 + 5 / 8) / 2)
    assert (chance["flips"], chance["correct_to_wrong"], chance["wrong_to_correct"]) == (2 / 16, 2 / 16, 0)
    assert ours["relative"]["value"] == pytest.approx(7 / 6) and ours["true_average_share"] == pytest.approx(0.1)
    assert ours["kinds"]["where"]["value"] == 3 / 4 and vanilla["kinds"]["where"]["value"] == 2 / 4
    assert ours["yes_no"]["where"]["recall"] == 1 / 2 and ours["yes_no"]["where"]["precision"] == 1
    assert (ours["kl"], ours["top1_agreement"]) == (0.5, 1)
    assert task["refused"] == {"broken 0.1": "cannot | <b>"}
    (pair,) = task["pairs"]
    assert (pair["first"], pair["second"]) == ("adaptinfer 0.1", "random 0.1")
    assert pair["difference"]["value"] == pytest.approx(2 / 8) and pair["verdict"] == "open"


def test_the_report_is_one_file_and_shows_everything():
    tasks = finite(summarise(*_records()))
    spread = {"median": 1.0, "lower_quartile": 0.9, "upper_quartile": 1.2}
    figures = {"ttft_ms": spread, "ttft_speed_up": spread, "decode_ms_per_token": spread}
    latency = {
        "task": "t",
        "rounds": 3,
        "load_average": 9.0,
        "cores": 2,
        "conditions": {"vanilla": figures, "adaptinfer 0.1": figures},
    }
    environment = dict.fromkeys(("date", "gpu", "cpu", "adaptinfer", "torch", "transformers"), "x")
    document = {
        "command": "adaptinfer eval",
        "environment": environment,
        "setup": {"model": "embedded", "device": "cpu", "dtype": "float32", "batch": 2},
        "tasks": tasks,
        "latency": latency,
    }
    json.dumps(document, allow_nan=False)
    png = draw(tasks[0], latency)
    assert png.startswith(b"\x89PNG")
    markdown, page = to_markdown(document, {"t": png}), to_html(document, {"t": png})
    for line in (
        "| vanilla |",
        "87.5",
        "| adaptinfer 0.1 |",
        "93.1 % at true 82.9",
        "(t.png)",
        "was busy",
        "4 groups of pictures are too few",
    ):
        assert line in markdown
    assert "broken 0.1: cannot | \\<b>." in markdown and "broken 0.1: cannot | &lt;b&gt;." in page
    assert "data:image/png;base64," in page and "http" not in page
    for part in markdown.split("\n\n"):
        lines = part.splitlines()
        if lines and lines[0].startswith("|"):
            assert len({line.count("|") - line.count("\\|") for line in lines}) == 1, part


def test_rows_of_one_name_are_told_apart_by_their_methods():
    """Two methods with the same fields, saved into the same folder one after the other."""
    one, other = (Condition("saved", "saved", 0.3, method(budget=0.3)) for method in (PyramidDrop, V2Drop))
    assert one.identity() != other.identity()


def test_a_row_without_a_budget_is_compared_at_the_one_that_it_meets():
    plan, records = _records()
    found = list(plan.conditions)
    for number, share in (("10", 0.1), ("13", 0.13)):
        found.append(Condition(f"schedule {number}", f"schedule {number}", None, AdaptInfer(budget=0.1)))
        of = [r | {"condition": f"schedule {number}"} for r in records if r["condition"] == "adaptinfer 0.1"]
        records += [r | {"true_average": 64 * share} for r in of]
    (task,) = summarise(SimpleNamespace(loaded_tasks=plan.loaded_tasks, conditions=found), records)  # pyright: ignore
    rows = {row["name"]: row["budget"] for row in task["conditions"]}
    assert rows["schedule 10"] == 0.1 and rows["schedule 13"] is None and rows["vanilla"] is None
    assert ("adaptinfer 0.1", "schedule 10") in {(pair["first"], pair["second"]) for pair in task["pairs"]}


def test_the_report_tells_many_methods_at_a_glance():
    """A line a method, its budgets beside each other, the best mean first; those that miss a budget come last."""
    (task,) = finite(summarise(*_records()))
    vanilla, ours, *_ = task["conditions"]

    def row(series, budget, accuracy):
        said = {"name": f"{series} {budget}", "series": series, "budget": budget}
        return ours | said | {"accuracy": {"value": accuracy, "low": None, "high": None}}

    rows = [row("a", 0.3, 0.7), row("b", 0.3, 0.8), row("c", 0.3, 0.9), row("a", 0.1, 0.5), row("b", 0.1, 0.6)]
    refused = {"c 0.1": "too little", "d 0.1": "no tower", "e 0.1": "too little"}
    document = {
        "command": "",
        "environment": dict.fromkeys(("date", "gpu", "cpu", "adaptinfer", "torch", "transformers"), "x"),
        "setup": {"model": "m", "device": "cpu", "dtype": "float32", "batch": 2},
        "tasks": [task | {"conditions": [vanilla, *rows], "pairs": [], "refused": refused}],
        "latency": None,
    }
    markdown = to_markdown(document, {})
    assert (
        "|  | 0.3 | 0.1 |\n| --- | ---: | ---: |\n| b | 80.0 | 60.0 |\n| a | 70.0 | 50.0 |\n| c | 90.0 | – |"
        in markdown
    )
    assert "c 0.1, e 0.1: too little." in markdown and "d 0.1: no tower." in markdown
    document["tasks"][0]["conditions"] = [vanilla, *rows[:3]]
    assert "at each budget" not in to_markdown(document, {}), "one budget is the main table"


def test_the_report_says_where_ours_loses_and_in_what():
    """AdaptInfer is held against the others though it does not stand first; kinds by how many answers they cost."""
    (task,) = finite(summarise(*_records()))
    vanilla, ours, _ = task["conditions"]
    right = {"value": 1.0, "low": None, "high": None}
    vanilla = vanilla | {"kinds": {"exists": right, "where": right, "odd": right}}

    def row(series, exists, where, odd):
        values = {"exists": exists, "where": where, "odd": odd}
        kinds = {kind: {"value": value, "low": None, "high": None} for kind, value in values.items()}
        return ours | {"name": f"{series} 0.1", "series": series, "kinds": kinds}

    rows = [row("fastv", 0.9, 0.9, 1.0), row("adaptinfer", 0.8, 0.95, 0.5), row("dart", 0.8, 0.9, 0.5)]
    difference = {"value": 0.04, "low": 0.01, "high": 0.06}
    pairs = [
        {"first": "fastv 0.1", "second": "adaptinfer 0.1", "difference": difference, "verdict": "better"},
        {"first": "fastv 0.1", "second": "dart 0.1", "difference": difference, "verdict": "better"},
        {"first": "adaptinfer 0.1", "second": "dart 0.1", "difference": difference, "verdict": "open"},
    ]
    counts = {"exists": 100, "where": 100, "odd": 4}
    document = {
        "command": "",
        "environment": dict.fromkeys(("date", "gpu", "cpu", "adaptinfer", "torch", "transformers"), "x"),
        "setup": {"model": "m", "device": "cpu", "dtype": "float32", "batch": 2},
        "tasks": [task | {"conditions": [vanilla, *rows], "pairs": pairs, "kinds": counts, "groups": 6}],
        "latency": None,
    }
    markdown = to_markdown(document, {})
    first, second = markdown.split("### fastv against the others")[1].split("### adaptinfer against the others")
    assert "It loses to none" in first and "dart against" not in markdown
    document["tasks"][0]["groups"] = 5
    assert "5 groups of pictures are too few to tell" in to_markdown(document, {})
    assert "| fastv 0.1 | adaptinfer 0.1 | +4.0 (+1.0 to +6.0) | better |  |" in first
    assert "It loses: adaptinfer 0.1 to fastv." in second
    assert "| adaptinfer 0.1 | fastv 0.1 | -4.0 (-6.0 to -1.0) | worse | exists (-10.0), odd (-50.0) |" in second
    assert "| adaptinfer 0.1 | dart 0.1 | +4.0 (+1.0 to +6.0) | open |  |" in second


def test_a_plot_brings_out_ours_the_oracles_and_the_best_three():
    """Of the committed run: 32 lines, seven of them in colour, each in the panel of its kind."""
    path = Path(__file__).parents[1] / "research" / "results" / "evaluation" / "summary.json"
    (task,) = json.loads(path.read_text(encoding="utf-8"))["tasks"]
    lines = _lines(task)
    coloured = ["adaptinfer+", "adaptinfer", "cdpruner", "coverage", "divprune", "evidence-before", "evidence"]
    assert [line.name for line in lines if line.colour] == coloured and len(lines) == 32
    panels = {line.name: line.panel for line in lines}
    assert [panels[name] for name in ("fastv", "divprune", "vscan", "random-before", "resized")] == [
        "inside", "before", "both", "control", "control",
    ]  # fmt: skip


@given(st.lists(st.floats(0, 100), max_size=15).map(sorted))
def test_labels_of_a_plot_never_cover_each_other(values):
    places = _spread(values, 5, 2, 98)
    assert all(2 <= place <= 98 + 1e-9 for place in places)
    assert all(after - before >= 5 - 1e-9 for before, after in itertools.pairwise(places))


def test_published_figures_stand_only_where_they_were_published():
    assert str(published_for("adaptinfer", 64 / 576)) == "93.1 % at true 82.9"
    assert published_for("adaptinfer", 0.33) is None and published_for("ours", 64 / 576) is None
    assert published_for("FastV", 0.11) is not None and published_for("STAR-Pro", 0.11) is not None
    assert published_for("sparsevlm+", 0.11) is None, "SparseVLM's figure is none of SparseVLM+"


@pytest.mark.parametrize(("module", "layers"), [(llava_1_5_7b, 32), (llava_1_5_13b, 40), (qwen2_vl_2b, 28)])
def test_every_row_of_a_published_table_can_be_run(module, layers):
    """And its true average is what the pruner of its arguments plans, within a token."""
    vanilla, *rows = module.TABLE.rows
    assert vanilla.arguments == "" and len({row.name for row in rows}) == len({row.arguments for row in rows}) == len(
        rows
    )
    for row in rows:
        settings = dict(each.split("=") for each in row.arguments.split(","))
        if "preset" in settings:
            pruner = published(settings["preset"])
        else:
            pruner = METHODS[settings["method"]](budget=float(settings["budget"]))
        found = pruner.plan(layers, 576).true_average(576)
        assert row.true_average is None or found == pytest.approx(row.true_average, abs=1), row.name


def test_the_table_of_llava_7b_holds_every_published_schedule_and_its_figure():
    rows = {row.name: row for row in llava_1_5_7b.TABLE.rows}
    assert {name: kind for name, kind in METHODS.items() if kind.published and kind.reference != "control"}.keys() == {
        name.partition(" paper ")[0] for name in rows if " paper " in name
    }
    shown = {name: (row.arguments, row.published, row.true_average) for name, row in rows.items()}
    assert shown["dart paper 64"] == ("preset=dart:llava-1.5-7b/64", "92.6–93.7", 99.8)
    assert shown["sparsevlm+ paper 64"] == ("preset=sparsevlm+:llava-1.5-7b/64", None, 81.8)
    assert shown["pyramiddrop paper 270"] == ("preset=pyramiddrop:llava-1.5-7b/270", None, 270)
    assert shown["fitprune paper 90%"] == ("preset=fitprune:llava-1.5-7b/90%", None, 72.8)
    for name, printed in (("starpro", "96.8"), ("vscan", "96.7"), ("cdpruner", "95.4"), ("fastv", "76.7")):
        assert rows[f"{name} paper 64"].published == printed
    for budget in (192, 128, 64, 32):
        assert {f"{name} true {budget}" for name in tables.SIDE_BY_SIDE} < rows.keys()
    assert "mmbench_en_dev" in llava_1_5_7b.TABLE.tasks and "mmbench_en_dev" in llava_1_5_13b.TABLE.tasks


def test_a_published_table_from_what_lmms_eval_leaves(tmp_path, capsys, monkeypatch):
    rows = (tables.Row("vanilla", true_average=576), tables.Row("paper 64", "preset=x", "93.1", 82.9))
    wanted = tables.Table("Title", "org/model", ("pope", "gqa"), rows)
    for row, pope, gqa in (("vanilla", 0.8, 0.5), ("paper_64", 0.6, 0.5)):
        folder = tmp_path / "model" / row / "org__model"
        folder.mkdir(parents=True)
        results = {"pope": {"alias": "pope", "pope_f1_score,none": pope}, "gqa": {"exact_match,none": gqa}}
        (folder / "20260101_results.json").write_text(json.dumps({"results": results}))
    monkeypatch.setattr(sys, "argv", ["table", "--output", str(tmp_path)])
    tables.run(wanted)
    assert "| paper 64 | 0.6 | 0.5 | 87.5 | 82.9 | 93.1 |" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["table", "--dry-run", "--limit", "5"])
    tables.run(wanted)
    assert "--model_args pretrained=org/model,preset=x --tasks pope,gqa" in capsys.readouterr().out
