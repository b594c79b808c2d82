"""`adaptinfer calibrate`: what is recorded, what a kill costs, what is refused, and runs as a user makes them."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import stand_in
import tiny
import torch
import zoo
from PIL import Image
from typer.testing import CliRunner

import adaptinfer
from adaptinfer import AdaptInfer, AdaptInferError, InputError, Schedule, ScheduleError, Stage, attach
from adaptinfer.calibration import run as running
from adaptinfer.calibration import store
from adaptinfer.calibration.distributed import processes
from adaptinfer.calibration.objective import KeptMass
from adaptinfer.calibration.plots import budget_in_words
from adaptinfer.calibration.record import Reader, Reading, fingerprint
from adaptinfer.calibration.result import Calibration
from adaptinfer.calibration.run import Target, analyse, record
from adaptinfer.calibration.samples import Sample
from adaptinfer.calibration.sources import DataSetSource, FolderSource, ListSource, open_source
from adaptinfer.calibration.store import PART, Recording, check_skipped, record_part
from adaptinfer.checkpoints import Checkpoint
from adaptinfer.cli.app import app
from adaptinfer.cli.calibrate import _print
from adaptinfer.errors import UnsupportedError
from adaptinfer.functional import text_guided_score
from adaptinfer.pruners import METHODS
from adaptinfer.schedule import ModelShape

SCORE = AdaptInfer(budget=0.5)


@pytest.fixture(scope="module")
def checkpoint():
    return Checkpoint(stand_in.folder(), device="cpu")


@pytest.fixture(scope="module")
def model(checkpoint):
    return checkpoint.load()


@pytest.fixture
def reader(checkpoint, model):
    with Reader(model, checkpoint.processor, SCORE) as made:
        yield made


def quiet(_: str) -> None:
    """No progress."""


# ---------------------------------------------------------------------------------------------------- readings


class Prepared:
    """A processor that has the inputs ready."""

    image_token = "<image>"

    def __init__(self, inputs) -> None:
        self.inputs = inputs

    def __call__(self, **_):
        return self.inputs


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_reading_is_what_the_models_own_attention_says(models, family, attention):
    inputs = tiny.batch(family, [tiny.simple(family, images=2, after=6)])
    with torch.no_grad():
        whole = models(family, "eager")(**inputs, output_attentions=True).attentions
    model = models(family, attention)
    sample = Sample("one", (), "a question")
    with Reader(model, Prepared(inputs), AdaptInfer(budget=0.5, prior_weight=0.7)) as reader:
        reading = reader.read(4, sample)
    ids = inputs["input_ids"][0]
    vision = (ids == tiny.IMAGE).nonzero()[:, 0]
    text = torch.arange(int(vision[-1]) + 1, len(ids))
    assert reading.index == 4 and reading.text_tokens == len(ids) - len(vision)
    for layer, rows in enumerate(whole):
        to_vision, to_text = rows[:, :, text][..., vision], rows[:, :, text][..., text]
        assert reading.mass[layer] == pytest.approx(to_vision[0].mean(dim=(0, 1)).numpy(), abs=1e-6)
        score = text_guided_score(to_text, to_vision, 0.7)[0]
        assert reading.score[layer] == pytest.approx(score.numpy(), rel=1e-3, abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_reading_changes_nothing(models, family, attention):
    model = models(family, attention)
    inputs = tiny.batch(family, [tiny.simple(family)])
    ragged = tiny.batch(family, [tiny.simple(family, images=2, after=3), tiny.simple(family)])
    vanilla = [model(**each).logits for each in (inputs, ragged)]
    with Reader(model, Prepared(inputs), SCORE) as reader:
        for each, logits in zip((inputs, ragged), vanilla, strict=True):
            assert torch.equal(model(**each).logits, logits), "the backend stays, and nothing is dropped"
        assert reader._handle.report.stages == ()
        assert model.config.get_text_config()._attn_implementation == attention
        reader.read(0, Sample("one", (), "a question"))
        assert reader._observer.seen == [], "nothing stays in memory"
    assert torch.equal(model(**inputs).logits, vanilla[0])


@pytest.mark.full
@torch.no_grad()
def test_thousands_of_vision_tokens_leave_no_square_behind(models):
    """Nothing of the size of tokens x tokens is made beside what vanilla makes."""
    model = models("qwen2_5_vl")
    inputs = tiny.batch("qwen2_5_vl", [tiny.simple("qwen2_5_vl", grid=(1, 80, 80))])
    length = inputs["input_ids"].shape[1]
    assert length > 1600

    def largest(run) -> int:
        with torch.profiler.profile(profile_memory=True) as profile:
            run()
        return max(event.self_cpu_memory_usage for event in profile.events())

    vanilla = largest(lambda: model.base_model(**inputs, use_cache=False))
    with Reader(model, Prepared(inputs), SCORE) as reader:
        read = largest(lambda: reader.read(0, Sample("one", (), "a question")))
    assert read <= max(vanilla, 4 * 9 * length * 4 * 2), "a few times heads x text rows x tokens in float32"


@pytest.mark.full
@pytest.mark.parametrize("family", [name for name in zoo.SETUPS if name != "granite4_vision"])
@torch.no_grad()
def test_every_family_is_read_and_left_as_it_is(family):
    eager = zoo.SETUPS[family].build("eager")
    model = eager if family == "paligemma2" else zoo.SETUPS[family].build("sdpa")  # Gemma 2 has no sdpa
    inputs = zoo.batch(family, [zoo.simple(family)])
    vanilla, ids = model(**inputs).logits, inputs["input_ids"][0]
    with Reader(model, Prepared(inputs), SCORE) as reader:
        assert torch.equal(model(**inputs).logits, vanilla)
        reading = reader.read(0, Sample("one", (), "a question"))
    vision = torch.isin(ids, torch.tensor(zoo.PLACEHOLDERS)).nonzero()[:, 0]
    text = torch.arange(int(vision[-1]) + 1, len(ids))
    silent = set(range(reader.shape.num_layers)) - set(reader.scoring)
    assert not reading.mass[sorted(silent)].any() and reading.vision_tokens == len(vision)
    rows = eager(**inputs, output_attentions=True).attentions
    if rows and len(rows) == reader.shape.num_layers:  # a hybrid's list has gaps
        for layer in reader.scoring:
            paid = rows[layer][0][:, text][..., vision].mean(dim=(0, 1)).numpy()
            assert reading.mass[layer] == pytest.approx(paid, abs=2e-6)


def test_the_first_stage_keeps_in_a_run_what_the_objective_says(checkpoint, model, reader):
    """Later stages score what is left in a pruned model; the first scores just what was recorded."""
    source = open_source("scenes")
    made = [reader.read(index, source[index]) for index in range(3)]
    reader._handle.detach()
    mass = KeptMass(made, range(12))
    for row, reading in enumerate(made):
        inputs = reader._inputs(source[row])
        with torch.no_grad(), attach(model, AdaptInfer(schedule=Schedule((Stage(2, 9),), 12))) as handle:
            model(**inputs)
        first = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[0, 0])
        kept = handle.report.kept[0][0].numpy() - first
        later = reading.mass[3:, kept].sum() + reading.mass[:3].sum()
        schedule = Schedule((Stage(2, 9),), 12, 256)
        assert mass.of(schedule)[row] == pytest.approx(later / reading.mass.sum(), abs=1e-6)


def test_a_fingerprint_tells_models_apart(models):
    model = models("llava")
    before = fingerprint(model)
    assert fingerprint(tiny.llava()) == before
    assert fingerprint(tiny.llava(seed=1)) != before
    assert fingerprint(tiny.llava(text="qwen2")) != before


def test_a_pruner_in_the_way_is_refused(checkpoint, model):
    with SCORE(model), pytest.raises(AdaptInferError, match="attached to this model already"):
        Reader(model, checkpoint.processor, SCORE)


# ---------------------------------------------------------------------------------------------------- on disk


class Source:
    """Samples that need no pictures; some cannot be used, and one can end the run."""

    def __init__(self, bad=(), kill_at=None) -> None:
        self.identity = {"samples": "of the test"}
        self.bad, self.kill_at, self.asked = bad, kill_at, []

    def __getitem__(self, index: int) -> Sample:
        if index == self.kill_at:
            raise KeyboardInterrupt
        self.asked.append(index)
        if index in self.bad:
            raise InputError(f"sample {index} is bad")
        return Sample(f"sample {index}", (), f"question {index}?", "even" if index % 2 == 0 else "odd")


class FakeReader:
    """A reading is a function of the sample, as with a model, and takes no time."""

    shape, scoring = ModelShape(5, 8, 2, 2, 4, 16), (0, 1, 2, 3, 4)

    def read(self, index: int, sample: Sample) -> Reading:
        mass, score = np.random.default_rng(index).random((2, 5, 7 + index % 3), dtype=np.float32)
        return Reading(index, sample.id, sample.kind, mass, score, 11)


ABOUT = store.about(
    FakeReader(), {"name": "fake", "dtype": "float32", "fingerprint": "abc"}, {"name": "adaptinfer"}, Source().identity
)


def parts(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.fixture
def whole(tmp_path):
    """A recording of 20 samples made in one go."""
    recording = Recording(tmp_path / "whole", ABOUT)
    record(FakeReader(), Source(), recording, 20, quiet)
    return recording


def test_a_recording_is_read_back(whole):
    readings = list(whole.readings(20))
    assert [reading.index for reading in readings] == list(range(20))
    again = FakeReader().read(13, Source()[13])
    assert (again.mass == readings[13].mass).all() and (again.score == readings[13].score).all()
    assert (again.id, again.kind, again.text_tokens) == (readings[13].id, readings[13].kind, readings[13].text_tokens)
    assert whole.missing(20) == [] and whole.skipped(20) == []
    assert not list(whole.folder.glob("*.part"))


def test_a_kill_costs_the_part_in_hand_and_nothing_counts_twice(tmp_path, whole):
    killed = Source(kill_at=PART + 3)
    recording = Recording(tmp_path / "killed", ABOUT)
    with pytest.raises(KeyboardInterrupt):
        record(FakeReader(), killed, recording, 20, quiet)
    assert killed.asked == list(range(PART + 3))
    with pytest.raises(InputError, match="missing or damaged"):
        list(recording.readings(20))
    resumed = Source()
    again = Recording(tmp_path / "killed", ABOUT)
    record(FakeReader(), resumed, again, 20, quiet)
    assert resumed.asked == list(range(PART, 20))
    assert parts(again.folder) == parts(whole.folder)


def test_a_damaged_part_and_one_of_fewer_samples_are_read_again(whole):
    before = parts(whole.folder)
    first, last = whole.folder / "part-000000.safetensors", whole.folder / "part-000002.safetensors"
    first.write_bytes(first.read_bytes()[:-100])
    assert [part.start for part in whole.missing(20)] == [0]
    source = Source()
    record(FakeReader(), source, whole, 20, quiet)
    assert source.asked == list(range(PART)) and parts(whole.folder) == before
    assert whole.missing(18) == [range(16, 18)] and whole.missing(23) == [range(16, 23)]
    record(FakeReader(), source, whole, 23, quiet)
    assert len(list(whole.readings(23))) == 23 and last.read_bytes() != before[last.name]


def test_shares_of_several_processes_make_the_same_recording(tmp_path, whole):
    sources = Source(), Source()
    for number, source in enumerate(sources):
        recording = Recording(tmp_path / "shared", ABOUT)
        record(FakeReader(), source, recording, 20, quiet, share=(number, 2))
    assert sorted(sources[0].asked + sources[1].asked) == list(range(20))
    assert parts(tmp_path / "shared") == parts(whole.folder)


def test_a_recording_of_something_else_is_refused(whole):
    content = whole.about
    other = {**content, "model": {**content["model"], "fingerprint": "0"}}
    with pytest.raises(InputError, match=r"holds a recording of another model \(fake\); take another folder"):
        Recording(whole.folder, other)
    with pytest.raises(InputError, match="other data"):
        Recording(whole.folder, {**content, "data": {"scenes": "others"}})
    with pytest.raises(InputError, match="another method's scores"):
        Recording(whole.folder, {**content, "method": {"name": "random"}})
    with pytest.raises(InputError, match="another version of adaptinfer"):
        Recording(whole.folder, {**content, "version": 2})
    Recording(whole.folder, {**content, "model": {**content["model"], "name": "moved"}})
    half = {**content["model"], "dtype": "bfloat16", "fingerprint": "0"}
    with pytest.raises(InputError, match=r"holds a recording of this model in float32, not in bfloat16, \(fake\)"):
        Recording(whole.folder, {**content, "model": half})
    with pytest.raises(InputError, match=r"another model, or of this one in float32 \(fake\)"):
        Recording(whole.folder, {**content, "model": {**half, "name": "moved"}})
    stray = whole.folder / "part-000001.safetensors"
    stray.write_bytes(record_part(FakeReader(), Source(), range(8, 16), store.digest_of(other)))
    assert whole.missing(20) == [range(8, 16)], "a part of another recording is none of this one"
    (whole.folder / "recording.json").write_text("{}")
    with pytest.raises(InputError, match="no description of a recording"):
        Recording(whole.folder, content)


def test_a_full_disk(whole, monkeypatch, tmp_path):
    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "write_whole", full)
    with pytest.raises(InputError, match="No space left on device.*what was recorded so far is kept"):
        whole.write(range(0, 8), b"")
    with pytest.raises(InputError, match=r"cannot be written \(No space left"):
        Recording(tmp_path / "new", whole.about)


def test_bad_samples_are_named_skipped_and_counted(tmp_path):
    source = Source(bad=(3, 17))
    recording = Recording(tmp_path / "r", ABOUT)
    record(FakeReader(), source, recording, 24, quiet)
    assert [each.index for each in recording.skipped(24)] == [3, 17]
    assert [reading.index for reading in recording.readings(24)] == [*range(3), *range(4, 17), *range(18, 24)]


def test_too_many_bad_samples_end_the_run(tmp_path):
    source = Source(bad=(1, 2, 4))
    recording = Recording(tmp_path / "r", ABOUT)
    with pytest.raises(InputError, match="3 of 24 samples cannot be used, more than 10%: sample 1 is bad; sample 2"):
        record(FakeReader(), source, recording, 24, quiet)
    assert max(source.asked) < PART, "at once, and not after all of them"
    check_skipped([], 0)


def test_skipped_samples_are_tried_again_and_parts_without_stay(tmp_path):
    """A picture that was repaired is read; one that still cannot be used costs a look at it alone."""
    recording = Recording(tmp_path / "r", ABOUT)
    with pytest.raises(InputError, match="cannot be used"):
        record(FakeReader(), Source(bad=(1, 2, 17)), recording, 20, quiet)
    record(FakeReader(), Source(bad=(17,)), recording, 20, quiet)
    assert [each.index for each in recording.skipped(20)] == [17]
    before, same = parts(recording.folder), Source(bad=(17,))
    record(FakeReader(), same, recording, 20, quiet)
    assert same.asked == [17] and parts(recording.folder) == before
    other = Source()
    record(FakeReader(), other, recording, 20, quiet, share=(1, 2))
    assert other.asked == [], "the first process sees to it"
    record(FakeReader(), other, recording, 20, quiet)
    assert recording.skipped(20) == [] and set(other.asked) == set(range(16, 20))
    assert parts(Recording(tmp_path / "whole", ABOUT).folder).keys() <= parts(recording.folder).keys()
    assert len(list(recording.readings(20))) == 20


# ---------------------------------------------------------------------------------------------------- samples


@pytest.fixture
def folder(tmp_path):
    """Pictures and questions, some of them of no use."""
    home = tmp_path / "data"
    home.mkdir()
    for name in ("a.png", "b.jpg"):
        Image.new("RGB", (40, 30), "red").save(home / name)
    (home / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    rows = [
        {"image": "a.png", "question": "What colour is it?", "kind": "colour"},
        {"images": ["a.png", "b.jpg"], "text": " Which is larger? "},
        {"image": "broken.png", "question": "What is this?"},
        {"image": "a.png", "question": "  "},
        {"image": "none.png", "question": "Where?"},
        {"question": "What?"},
    ]
    lines = [json.dumps(row) for row in rows]
    (home / "questions.jsonl").write_text("\n\n".join([*lines, "{not json", "[1]"]) + "\n")
    return home


def test_a_folder_of_pictures_with_questions(folder):
    source = open_source(str(folder))
    assert isinstance(source, FolderSource) and len(source) == 8
    assert source[0].question == "What colour is it?" and source[0].kind == "colour"
    assert source[1].question == "Which is larger?" and [image.size for image in source[1].images] == [(40, 30)] * 2
    for index, message in {
        2: "questions.jsonl line 5: .*is not a picture|damaged",
        3: "line 7: no question",
        4: "line 9: .*no such file",
        5: "line 11: no image",
        6: "line 13: not JSON",
        7: "line 15: not a JSON object",
    }.items():
        with pytest.raises(InputError, match=message):
            source[index]
    assert open_source(str(folder / "questions.jsonl")).identity == source.identity
    (folder / "more.jsonl").write_text("")
    with pytest.raises(InputError, match="must hold one .jsonl file of questions, and holds more.jsonl, questions"):
        open_source(str(folder))
    with pytest.raises(InputError, match="holds no questions"):
        open_source(str(folder / "more.jsonl"))
    with pytest.raises(InputError, match="no such folder; give a folder with a JSONL file"):
        open_source(str(folder / "nowhere"))


def picture_file(path: Path, seed: int) -> None:
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(path)


def test_other_pictures_under_the_same_names_are_refused_and_mended_ones_read(tmp_path):
    home = tmp_path / "data"
    home.mkdir()
    for index in range(12):
        picture_file(home / f"{index}.png", index)
    rows = [json.dumps({"image": f"{index}.png", "question": "What is it?"}) for index in range(12)]
    (home / "q.jsonl").write_text("\n".join(rows))
    whole = (home / "5.png").read_bytes()
    (home / "5.png").write_bytes(whole[:60])
    source = open_source(str(home))
    recording = Recording(tmp_path / "r", {**ABOUT, "data": source.identity})
    record(FakeReader(), source, recording, 12, quiet)
    assert [each.index for each in recording.skipped(12)] == [5]
    (home / "5.png").write_bytes(whole)
    record(FakeReader(), source, recording, 12, quiet)
    assert recording.skipped(12) == []
    (home / "11.png").unlink()
    record(FakeReader(), source, recording, 12, quiet)  # what can no longer be read is taken to be the same
    picture_file(home / "3.png", 99)
    with pytest.raises(InputError, match=r"other data \(q.jsonl line 4 had another picture\); take another folder"):
        record(FakeReader(), source, recording, 12, quiet)


def test_other_pixels_in_a_list_are_refused(tmp_path):
    picture_file(tmp_path / "a.png", 1)
    pixels = Image.new("RGB", (8, 8), "red")

    def samples(picture):
        given = [(picture, "Q?"), {"image": tmp_path / "a.png", "question": "Q?"}, Sample("x", (picture,), "Q?")]
        return ListSource(given)

    source = samples(pixels)
    recording = Recording(tmp_path / "r", {**ABOUT, "data": source.identity})
    record(FakeReader(), source, recording, 3, quiet)
    record(FakeReader(), samples(pixels.copy()), recording, 3, quiet)
    other = samples(Image.new("RGB", (8, 8), "blue"))
    assert [other.mark(index) == source.mark(index) for index in range(3)] == [False, True, False]
    with pytest.raises(InputError, match="other data .sample 0 had another picture"):
        record(FakeReader(), other, recording, 3, quiet)
    picture_file(tmp_path / "a.png", 2)
    with pytest.raises(InputError, match="other data .sample 1 had another picture"):
        record(FakeReader(), source, recording, 3, quiet)


def test_a_line_ends_at_a_newline_only(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    asked = ["What\u2028colour?", "Is\x85it red?", "Where?"]
    lines = [json.dumps({"image": "a.png", "question": text}, ensure_ascii=False) for text in asked]
    (tmp_path / "q.jsonl").write_bytes("\r\n".join(lines).encode())
    source = FolderSource(tmp_path)
    assert [source[index].question for index in range(len(source))] == asked


def test_any_one_bad_row_costs_that_row(tmp_path, reader):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    picture_file(tmp_path / "b.png", 3)
    rows = ['{"image": "a.png", "question": "what \\ud800 is it"}', "[" * 200_000]
    (tmp_path / "q.jsonl").write_text("\n".join(rows))
    folder = FolderSource(tmp_path)
    with pytest.raises(InputError, match="q.jsonl line 1: question: character 6 is not Unicode text"):
        reader.read(0, folder[0])
    with pytest.raises(InputError, match="q.jsonl line 2: not JSON that can be read"):
        folder[1]
    assert folder.mark(1) is None
    data = io.BytesIO((tmp_path / "b.png").read_bytes()[:600])
    listed = ListSource([(Image.open(data), "What?"), Sample("x", (Image.open(data),), "What?")])
    for index, name in enumerate(("sample 0", "x")):
        assert listed.mark(index) is None
        with pytest.raises(InputError, match=f"{name}: an image cannot be decoded"):
            listed[index]


def test_whatever_the_processor_raises_costs_one_sample(models):
    class Broken(Prepared):
        def __call__(self, **_):
            raise TypeError("no text")

    with Reader(models("llava"), Broken({}), SCORE) as made, pytest.raises(InputError, match="refuses it .no text"):
        made.read(0, Sample("x", (), "a question"))


def test_evaluation_scenes_are_refused():
    assert open_source("scenes").identity == open_source("scenes:train").identity
    for split in ("test", "validation"):
        with pytest.raises(InputError, match="evaluation scenes are refused"):
            open_source(f"scenes:{split}")
    with pytest.raises(InputError, match="'scenes:bogus': there is no such split"):
        open_source("scenes:bogus")
    drawn = [open_source("scenes")[index] for index in range(4)]
    again = open_source("scenes")[3]
    assert (again.id, again.question) == (drawn[3].id, drawn[3].question)
    assert len({sample.id for sample in drawn}) == 4 and open_source("scenes", seed=1)[0].id != drawn[0].id


def test_samples_given_in_python():
    picture = Image.new("RGB", (8, 8))
    given = [Sample("x", (picture,), "Q?"), (picture, "Q?"), {"images": [picture] * 2, "question": "Q?"}, (picture, "")]
    source = ListSource(given)
    assert [len(source[index].images) for index in range(3)] == [1, 1, 2]
    with pytest.raises(InputError, match="sample 3: no question"):
        source[3]
    same = ListSource([(Image.new("RGB", (8, 8)), "Q?")]).identity
    assert same == ListSource([(picture, "Q?")]).identity != ListSource([(picture, "R?")]).identity
    with pytest.raises(InputError, match="there are none"):
        ListSource([])
    with pytest.raises(InputError, match="must be a Sample"):
        ListSource([3])[0]


def test_a_data_set_needs_its_columns():
    class Rows(list):
        column_names = ("image", "question")

    picture = Image.new("L", (8, 8))
    source = DataSetSource(Rows([{"image": picture, "question": "Q?", "kind": None}]), {})
    assert source[0].images[0].mode == "RGB" and source[0].kind == ""
    with pytest.raises(InputError, match="row 5: cannot be read"):
        source[5]
    with pytest.raises(InputError, match="there are image, label"):
        DataSetSource(SimpleNamespace(column_names=["image", "label"]), {})


@pytest.mark.parametrize("package", ["matplotlib", "ruptures"])
def test_a_missing_extra_is_named_before_any_recording(package):
    """As in an environment without the package: one sentence with the pip command, when calibration is asked for."""
    code = f"import sys; sys.modules[{package!r}] = None\nimport adaptinfer\nadaptinfer.calibrate"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    message = f"adaptinfer.calibration needs {package}, which is not installed: pip install 'adaptinfer[calibrate]'"
    assert run.returncode and message in run.stderr


def test_hugging_face_data_sets_name_their_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'adaptinfer\[datasets\]'"):
        open_source("hf:some/where")


def test_questions_that_the_model_cannot_take(reader):
    picture = Image.new("RGB", (64, 64))
    with pytest.raises(InputError, match="is empty"):
        reader.read(0, Sample("x", (picture,), "  "))
    with pytest.raises(InputError, match="x: the question holds '<image>'"):
        reader.read(0, Sample("x", (picture,), "What is <image>?"))


def test_no_text_after_the_image(models):
    ids = tiny.llava_image(tiny.words(tiny.Prompt(), 5, 0), 1)
    prepared = Prepared(tiny.batch("llava", [ids]))
    message = "x: no text after the last image"
    with Reader(models("llava"), prepared, SCORE) as reader, pytest.raises(InputError, match=message):
        reader.read(0, Sample("x", (), "before it"))


# ---------------------------------------------------------------------------------------------------- in one call


def test_calibrate_in_python(checkpoint, model, tmp_path):
    picture = [open_source("scenes")[index].images[0] for index in range(2)]
    samples = [(picture[0], "Is there a red star?"), (picture[1], "How many circles are there?")] * 5
    made = adaptinfer.calibrate(model, checkpoint.processor, samples, budget=0.25, stages=2)
    assert isinstance(made, Calibration) and made.schedule.true_average() <= 64
    assert made.provenance["samples"] == 10 and made.chosen.schedule is made.schedule
    assert [each.name for each in made.candidates] == [
        "published shape",
        "published detector",
        "attention shifts",
        "optimised",
    ]
    assert made.chosen.low <= made.chosen.kept_mass <= made.chosen.high
    assert made.chosen.kept_mass >= made.candidates[0].kept_mass
    made.plot(tmp_path / "why.svg")
    assert (tmp_path / "why.svg").read_text().count("<path") > 50
    with pytest.raises(InputError, match="must end in one of .png"):
        made.plot(tmp_path / "why.gif")
    assert not adaptinfer.engine.handle.is_attached(model)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_methods_without_a_score_of_their_own_are_refused_before_any_work(checkpoint, model, method):
    made = METHODS[method](budget=64)
    samples = [(Image.new("RGB", (64, 64)), "Is there a star?")]
    with contextlib.ExitStack() as stack:
        if method in ("adaptinfer", "random", "fastv", "pyramiddrop", "fitprune", "textguided", "adaptinfer+", "vscan"):
            with Reader(model, checkpoint.processor, made) as each:
                assert each.read(0, ListSource(samples)[0]).score.any()
            return
        stack.enter_context(pytest.raises(UnsupportedError, match="does not rank tokens by a score"))
        adaptinfer.calibrate(model, checkpoint.processor, samples, method=made)


def test_arguments_that_make_no_sense(checkpoint, model, tmp_path, monkeypatch):
    one = [(Image.new("RGB", (64, 64)), "Is there a star?")]

    def refused(error, match, samples=one, **arguments):
        with pytest.raises(error, match=match):
            adaptinfer.calibrate(model, checkpoint.processor, samples, **arguments)

    for value in (-1, 0, 2.5, True):
        refused(InputError, "count: must be a whole number from 1 on", count=value)
        refused(ScheduleError, "stages: must be a whole number from 1 on", stages=value)
    refused(InputError, "seed: must be a whole number from 0 on", seed=-1)
    for value in (None, "64", True):
        refused(ScheduleError, "budget: must be a positive number of tokens", budget=value)
    refused(InputError, "no such folder", samples=tmp_path / "nowhere")
    with pytest.raises(InputError, match="no such user's home"):
        open_source("~nobody-of-that-name/x")
    monkeypatch.setenv("RANK", "abc")
    with pytest.raises(InputError, match="environment: RANK must be a whole number.*'abc'"):
        processes()


def test_a_budget_out_of_reach_is_refused_before_anything_is_read(checkpoint, model, monkeypatch):
    monkeypatch.setattr(Reader, "read", lambda *_: pytest.fail("was read"))
    picture = Image.new("RGB", (64, 64))
    for amount, flops in ((1.0, False), (0.01, False), (0.01, True), (300, False)):
        with pytest.raises(ScheduleError, match="no schedule meets|is more than") as refusal:
            adaptinfer.calibrate(model, checkpoint.processor, [(picture, "Is it?")] * 9, budget=amount, flops=flops)
        if amount == 1:
            assert "a budget below 1 is a share of them" in str(refusal.value)


def test_no_gain_over_a_published_shape_that_cannot_be(tmp_path, capsys):
    """FLOPs that leave room for one early cut alone: nothing is compared with it, and no difference to 0 is told."""

    class Deep(FakeReader):
        shape, scoring = ModelShape(12, 256, 8, 4, 32, 704), tuple(range(12))

        def read(self, index: int, sample: Sample) -> Reading:
            mass, score = np.random.default_rng(index).random((2, 12, 256), dtype=np.float32)
            return Reading(index, sample.id, sample.kind, mass, score, 11)

    recording = Recording(tmp_path / "r", store.about(Deep(), ABOUT["model"], ABOUT["method"], ABOUT["data"]))
    record(Deep(), Source(), recording, 9, quiet)
    least, whole = (Schedule(each, 12, 256).prefill_flops(Deep.shape, 11) for each in ((Stage(0, 0),), ()))
    made = analyse(recording, 9, Target(1.001 * least / whole, flops=True), Deep.shape, stages=1)
    published, chosen = made.candidates[0], made.chosen
    assert published.schedule is None and chosen.schedule is not None
    assert chosen.gain is chosen.gain_low is chosen.gain_high is None
    _print(made)
    out = capsys.readouterr().out
    assert "cannot meet the budget" in out.partition("published detector")[0] and "points" not in out
    assert made.provenance["stages"] == 1
    made.save(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "curves.json").read_text())["candidates"][-1]["gain"] is None


@pytest.mark.parametrize(
    "budget, told, words",
    [
        (Target(0.22), {"true_average": 56.32, "vision_tokens": 256, "share": 0.22}, "true average 56.3 of 256 (22 %)"),
        (Target(64), {"true_average": 64, "vision_tokens": 256, "share": 0.25}, "true average 64.0 of 256 (25 %)"),
        (Target(0.5, flops=True), {"flops_share": 0.5}, "FLOPs share 0.5"),
    ],
)
def test_a_budget_is_told_in_tokens_and_as_a_share(budget, told, words):
    said = budget.described(SimpleNamespace(vision_tokens=256))
    assert said == pytest.approx(told) and budget_in_words(said) == words


def test_budgets_that_make_no_sense(checkpoint, model):
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ScheduleError, match="must be a positive number"):
            Target(wrong)
    with pytest.raises(ScheduleError, match="lies between 0 and 1, not at 64"):
        Target(64, flops=True)
    picture = Image.new("RGB", (64, 64))
    for budget, message in ((257, "257 is more than the 256 vision tokens"), (0.01, "no schedule meets 2.5")):
        with pytest.raises(ScheduleError, match=message):
            adaptinfer.calibrate(model, checkpoint.processor, [(picture, "Is there a star?")], budget=budget)


def invoke(command, *arguments):
    model = ("--model", stand_in.folder()) if command in ("calibrate", "ask") else ()
    return CliRunner().invoke(app, [command, *model, *map(str, arguments)])


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """What the command writes."""
    folder = tmp_path_factory.mktemp("calibrated")
    result = invoke("calibrate", "--budget", "0.3", "--samples", 12, "-o", folder, "--device", "cpu")
    assert result.exit_code == 0, result.output
    return folder, result.output


def test_the_command_writes_schedule_curves_and_plot(calibrated):
    folder, output = calibrated
    assert "optimised" in output and "published shape" in output and "12 samples (0 skipped)" in output
    schedule = Schedule.load(folder / "schedule.json")
    assert schedule.num_layers == 12 and 0.95 * 0.3 * 256 < schedule.true_average() <= 0.3 * 256
    provenance = json.loads((folder / "schedule.json").read_text())["provenance"]
    assert provenance["model"]["name"] == stand_in.folder() and provenance["data"] == {"scenes": "train", "seed": 0}
    told = {"true_average": pytest.approx(76.8), "vision_tokens": 256, "share": 0.3}
    assert provenance["samples"] == 12 and provenance["budget"] == told and provenance["stages"] is None
    assert set(provenance["versions"]) == {"adaptinfer", "python", "torch", "transformers"}
    curves = json.loads((folder / "curves.json").read_text())
    assert sum(curves["mass_by_layer"]["mean"]) == pytest.approx(1)
    assert sum(curves["published_detector"]["counts"]) == 12 * 25  # samples, and a tenth of the vision tokens
    assert curves["candidates"][-1]["kept_mass"] == provenance["kept_mass"]
    assert curves["frontier"] == sorted(curves["frontier"], key=lambda point: point["optimised"])
    assert Image.open(folder / "calibration.png").size[0] > 1500


def test_another_budget_needs_no_new_recording_and_the_same_makes_the_same_files(calibrated, monkeypatch):
    folder, _ = calibrated
    before = {name: (folder / name).read_bytes() for name in ("schedule.json", "curves.json")}

    def nothing(*_):
        raise AssertionError("was recorded again")

    monkeypatch.setattr(running, "record_part", nothing)
    flops = invoke("calibrate", "--flops", "0.5", "--samples", 12, "--stages", 1, "-o", folder, "--device", "cpu")
    assert flops.exit_code == 0, flops.output
    schedule = Schedule.load(folder / "schedule.json")
    assert len(schedule.stages) == 1
    assert invoke("calibrate", "--budget", "0.3", "--samples", 12, "-o", folder, "--device", "cpu").exit_code == 0
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_ask_and_bench_take_the_schedule(calibrated):
    file = calibrated[0] / "schedule.json"
    asked = invoke("ask", "examples/scene.png", "What colour is the star?", "--schedule", file, "--json")
    assert json.loads(asked.output)["schedule"]["stages"] == json.loads(file.read_text())["stages"]
    arguments = ["bench", "--shape", "tiny", "--device", "cpu", "--rounds", 1, "--warmup", 0, "--new-tokens", 0]
    benched = invoke(*arguments, "--schedule", file)
    assert benched.exit_code == 0 and "schedule.json" in benched.output, benched.output


def test_the_command_says_what_is_wrong(calibrated, tmp_path, folder, monkeypatch):
    def refused(*arguments) -> str:
        result = invoke("calibrate", *arguments)
        assert result.exit_code == 2, result.output
        return " ".join(result.output.split())

    here = ["-o", tmp_path / "o", "--device", "cpu"]
    assert "give only one of them" in refused(*here, "--budget", 9, "--flops", "0.5")
    assert "evaluation scenes are refused" in refused(*here, "--data", "scenes:test")
    assert "6 of 8 samples cannot be used" in refused(*here, "--data", folder)
    assert "other data" in refused("--data", "scenes", "--seed", 5, "-o", calibrated[0], "--device", "cpu")
    assert "no schedule meets" in refused("--budget", "0.02", "--samples", 12, "-o", calibrated[0], "--device", "cpu")
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused("-o", tmp_path / "file" / "x", "--samples", 8, "--device", "cpu")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "record_part", interrupted)
    message = refused(*here[:1], tmp_path / "i", "--samples", 8, "--device", "cpu")
    assert "interrupted; what was recorded is in" in message and "goes on from there" in message


def test_a_schedule_file_may_tell_where_it_comes_from():
    content = json.loads(Schedule((Stage(1, 3),), 8, 9).to_json())
    old = {**content, "provenance": {"budget": {"true_average": 0.22}}}
    assert Schedule.from_json(json.dumps(old)) == Schedule.from_json(json.dumps(content))
    assert Schedule.from_json(json.dumps({**content, "provenance": {"model": "m"}})) == Schedule((Stage(1, 3),), 8, 9)
    with pytest.raises(ScheduleError, match="provenance: must be an object"):
        Schedule.from_json(json.dumps({**content, "provenance": "m"}))


def test_the_documents_tables_are_those_of_the_committed_run(monkeypatch):
    root = Path(__file__).parent.parent
    monkeypatch.syspath_prepend(root / "research")
    study = importlib.import_module("calibration_study")
    document = (root / "docs/results/calibration-study.md").read_text(encoding="utf-8")
    for part, table in study._TABLES.items():
        results = json.loads((root / f"research/results/calibration_study/{part}.json").read_text())["results"]
        assert table(results) in document, part


# ---------------------------------------------------------------------------------------------------- by many

COMMAND = [sys.executable, "-m", "adaptinfer", "calibrate", "--budget", "0.3", "--samples", "20", "--device", "cpu"]
COMMAND += ["--model", stand_in.folder()]
OUTPUTS = ("schedule.json", "curves.json")


def environment(**more):
    import os

    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


@pytest.mark.slow
def test_two_launched_processes_make_what_one_does(tmp_path):
    subprocess.run([*COMMAND, "-o", tmp_path / "one"], env=environment(), check=True, capture_output=True)
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m"]
    subprocess.run([*launch, *COMMAND[2:], "-o", tmp_path / "two"], env=environment(), check=True, timeout=600)
    assert parts(tmp_path / "one" / "recording") == parts(tmp_path / "two" / "recording")
    for name in OUTPUTS:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.slow
def test_two_ray_actors_one_of_them_killed_make_what_one_process_does(tmp_path):
    pytest.importorskip("ray.data")
    psutil = pytest.importorskip("psutil")
    one = [*COMMAND, "--samples", "48", "-o", tmp_path / "one"]
    subprocess.run(one, env=environment(), check=True, capture_output=True)
    folder = tmp_path / "ray" / "recording"
    many = subprocess.Popen(
        [*COMMAND, "--samples", "48", "--ray", "2", "-o", tmp_path / "ray"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    killed = 0
    while many.poll() is None and not killed:
        time.sleep(0.2)
        if len(list(folder.glob("part-*.safetensors"))) >= 1:
            workers = psutil.Process(many.pid).children(recursive=True)
            for worker in [each for each in workers if each.name().startswith("ray::MapWorker")][:1]:
                worker.kill()
                killed += 1
    output, errors = many.communicate(timeout=500)
    assert many.returncode == 0, errors
    assert killed and "48 samples (0 skipped)" in output
    assert parts(tmp_path / "one" / "recording") == parts(folder)
    for name in OUTPUTS:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "ray" / name).read_bytes()
