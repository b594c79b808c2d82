"""`adaptinfer ask` and its sisters as a user calls them: what they print, and one clear line for every mistake."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from typer.testing import CliRunner

from adaptinfer import AdaptInfer, pictures
from adaptinfer import ask as asking
from adaptinfer.ask import Comparison, Latency
from adaptinfer.checkpoints import Checkpoint
from adaptinfer.cli.app import app
from adaptinfer.embedded.__main__ import main as embedded
from adaptinfer.errors import InputError
from adaptinfer.pictures import read_pictures
from adaptinfer.schedule import PRESETS, Schedule, Stage

QUESTION = "what colour is the star?"
SOURCE = Path(asking.__file__).parents[1]


# ---------------------------------------------------------------------------------------------------- set-up


def _tokenizer() -> PreTrainedTokenizerFast:
    words = ["USER", "ASSISTANT", ":", "?", *QUESTION.strip("?").split()]
    names = {0: "<pad>", 1: "<s>", 2: "</s>", 3: "<unk>", tiny.IMAGE: "<image>", **dict(enumerate(words, 4))}
    vocabulary = {names.get(number, f"word{number}"): number for number in range(100)}
    core = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    core.normalizer = normalizers.Replace("\n", " ")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[:?]"), "isolated")]
    )
    core.add_special_tokens([AddedToken(names[number], normalized=False) for number in (0, 1, 2, tiny.IMAGE)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip


def _save(folder: Path, layers: int = tiny.LAYERS) -> str:
    """A random LLaVA as an ordinary checkpoint folder: 49 vision tokens, pictures cropped in the middle."""
    model = tiny.llava()
    if layers != tiny.LAYERS:
        model.config.text_config.num_hidden_layers = layers
        model = type(model)._from_config(model.config)
    model.save_pretrained(folder)
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    LlavaProcessor(
        image_processor, _tokenizer(), patch_size=4, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return _save(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("pictures") / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few repeats: these tests are about what is printed."""
    monkeypatch.setattr(asking, "REPEATS", 3)
    monkeypatch.setattr(asking, "WARM_UPS", 1)
    monkeypatch.setattr(asking, "DECODED_TOKENS", 2)


def run(*arguments: object, stdin: bytes | None = None):
    result = CliRunner().invoke(app, list(map(str, arguments)), input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def ask(checkpoint, photo):
    def ask(*arguments: object, stdin: bytes | None = None):
        result = run("ask", photo, QUESTION, "--model", checkpoint, "--max-new-tokens", 4, *arguments, stdin=stdin)
        assert result.exit_code == 0, result.output
        return result

    return ask


def vanilla_answer(checkpoint: str, photo: str) -> str:
    """What transformers answers without us."""
    model: torch.nn.Module = AutoModelForImageTextToText.from_pretrained(checkpoint)
    processor = AutoProcessor.from_pretrained(checkpoint)
    inputs = processor(text=f"USER: <image>\n{QUESTION} ASSISTANT:", images=Image.open(photo), return_tensors="pt")
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()


# ---------------------------------------------------------------------------------------------------- what is printed


def test_answer_and_one_line(ask):
    answer, summary = ask().stdout.splitlines()
    assert answer.startswith("word")
    assert summary.startswith("49 vision tokens -> ") and "budget 0.33 (default)" in summary
    assert "FLOPs" in summary and "KV cache" in summary and "after layer 0" in summary


def test_keeping_all_answers_as_transformers_does(ask, checkpoint, photo):
    document = json.loads(ask("--budget", 49, "--json", "--compare").stdout)
    assert document["answer"] == document["vanilla_answer"] == vanilla_answer(checkpoint, photo) != ""
    assert document["stages"] == [] and document["true_average"] == 49


def test_vanilla_column_is_vanilla(ask, checkpoint, photo):
    document = json.loads(ask("--budget", 0.25, "--json", "--compare").stdout)
    assert document["vanilla_answer"] == vanilla_answer(checkpoint, photo)
    assert document["answer"] != document["vanilla_answer"]  # a random model that lost most of what it saw


def test_json_is_one_object_and_consistent(ask):
    result = ask("--json", "--budget", 20, "--compare")
    document = json.loads(result.stdout)
    assert result.stderr == ""
    per_layer = document["vision_tokens_per_layer"]
    assert len(per_layer) == tiny.LAYERS and per_layer[0] == document["vision_tokens"] == 49
    assert document["true_average"] == pytest.approx(sum(per_layer) / tiny.LAYERS) == pytest.approx(20, abs=0.5)
    for stage in document["stages"]:
        assert stage["entered"] == per_layer[stage["layer"]]
        assert len(stage["kept_positions"]) == per_layer[stage["layer"] + 1]
        assert stage["kept_positions"] == sorted(set(stage["kept_positions"]))
    assert Schedule.from_json(json.dumps(document["schedule"])).tokens_per_layer() == tuple(per_layer)
    assert document["prefill_flops"]["pruned"] < document["prefill_flops"]["vanilla"]
    tokens = sum(per_layer) + tiny.LAYERS * document["text_tokens"]
    assert document["kv_bytes"]["pruned"] == tokens * 2 * 2 * 16 * 4  # keys and values, heads, width, float32
    assert {"question", "images", "model", "versions", "warnings", "positions"} < set(document)
    for way in ("vanilla", "pruned"):
        assert all(len(values) == 3 and min(values) > 0 for values in document["latency"][way].values())


def test_compare_prints_a_plain_table_into_a_pipe(ask):
    output = ask("--compare", "--budget", 20).stdout
    assert "\x1b" not in output and not set(output) & set("─│┃━╭")
    rows = {line[:22].strip(): line[22:].split() for line in output.splitlines()}
    assert rows[""][:2] == ["vanilla", "AdaptInfer"]
    assert rows["vision tokens x layers"][:2] == ["49x6", "49x1"]
    assert {"answer", "true average", "decoder prefill FLOPs", "KV cache", "TTFT, ms", "decode, ms/token"} < set(rows)
    assert "3 repeats" in output


def test_overlay_is_drawn(ask, tmp_path):
    path = tmp_path / "kept.png"
    assert f"overlay: {path}" in ask("--overlay", path).stdout
    with Image.open(path) as image:
        assert image.format == "PNG" and image.width > 600


def test_picture_from_standard_input(ask, checkpoint, photo):
    piped = run("ask", "-", QUESTION, "--model", checkpoint, "--json", stdin=Path(photo).read_bytes())
    assert json.loads(piped.stdout)["images"] == ["-"]
    kept = [json.loads(text)["stages"] for text in (piped.stdout, ask("--json").stdout)]
    assert kept[0] == kept[1]


def test_several_pictures(checkpoint, photo):
    result = run("ask", photo, photo, QUESTION, "--model", checkpoint, "--json")
    assert json.loads(result.stdout)["vision_tokens"] == 98


def test_unknown_words_are_a_warning(checkpoint, photo):
    result = run("ask", photo, "what colour is the wombat?", "--model", checkpoint, "--json")
    assert result.exit_code == 0
    assert result.stderr.startswith("warning: ") and "'wombat'" in result.stderr and "colour" not in result.stderr
    assert json.loads(result.stdout)["warnings"] == [result.stderr.removeprefix("warning: ").strip()]


def test_schedule_file(ask, tmp_path):
    Schedule((Stage(1, 10), Stage(3, 5)), tiny.LAYERS, 49).save(tmp_path / "schedule.json")
    document = json.loads(ask("--schedule", tmp_path / "schedule.json", "--json").stdout)
    assert document["vision_tokens_per_layer"] == [49, 49, 10, 10, 5, 5] and document["budget"] is None


def test_preset_takes_its_positions_unless_told(tmp_path, photo):
    checkpoint = _save(tmp_path, layers=32)
    for extra, positions in ((), "compact"), (("--positions", "keep"), "keep"):
        result = run("ask", photo, QUESTION, "--model", checkpoint, "--preset", "llava-1.5-7b/64", "--json", *extra)
        document = json.loads(result.stdout)
        assert document["positions"] == positions
        assert document["true_average"] == pytest.approx(PRESETS["llava-1.5-7b/64"].true_average(49))


def test_answers_are_not_read_as_markup(ask, monkeypatch):
    monkeypatch.setattr(PreTrainedTokenizerFast, "decode", lambda *_, **__: "[red]a[/red] [/]")
    assert ask().stdout.startswith("[red]a[/red] [/]\n")
    assert "[red]a[/red] [/]" in ask("--compare").stdout


def test_speed_ups_are_not_claimed_without_need(ask, monkeypatch):
    ratios = iter([(1.2, 1.1, 1.3), (0.7, 0.5, 1.1), (0.7, 0.6, 0.8)])
    notes = ["No speed-up to the first token was measured", "includes 1: too noisy", "median (least-most)"]
    for ratio, note in zip(ratios, notes, strict=True):
        monkeypatch.setattr(Comparison, "ratio", lambda *_, ratio=ratio: ratio)
        output = ask("--compare").stdout
        assert [other in output for other in notes] == [note == other or other == notes[2] for other in notes]


def test_embedded_model_is_the_default(tmp_path):
    picture = tmp_path / "scene.webp"
    embedded(["draw", str(picture), "--seed", "6", "--size", "256"])
    document = json.loads(run("ask", picture, "What colour is the star?", "--json", "--compare").stdout)
    assert document["model"] == "embedded" and document["vision_tokens"] == 256 and document["warnings"] == []
    assert document["answer"] and document["vanilla_answer"]  # right ones: tests/test_embedded.py
    warned = run("ask", picture, "What colour is the zebra?")
    assert warned.exit_code == 0 and "only knows drawn scenes" in warned.stderr and "'zebra'" in warned.stderr


def test_lists():
    assert re.search(r"^adaptinfer +arXiv 2508.06084", run("methods").stdout, flags=re.MULTILINE)
    assert "qwen2_5_vl" in run("models").stdout
    lines = {line.split()[0]: line for line in run("presets").stdout.splitlines()}
    assert set(PRESETS) < set(lines)
    assert "133/27/3" in lines["llava-1.5-7b/64"] and "82.9 of 576" in lines["llava-1.5-7b/64"]
    assert run("--version").stdout.startswith("adaptinfer ")


def test_help_documents_form_and_exit_codes():
    text = " ".join(run("ask", "--help").output.split())
    assert "IMAGE... QUESTION" in text and "last the question" in text and "Exit codes: 0 done, 2" in text


# ---------------------------------------------------------------------------------------------------- mistakes


def refused(*arguments: object, stdin: bytes | None = None) -> str:
    """The error of a call that must fail as a user's mistake: exit code 2, one line, nothing on standard output."""
    result = run("ask", *arguments, stdin=stdin)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


@pytest.fixture
def no_weights(monkeypatch):
    """Fails a test that reads weights before it finds the mistake."""

    def load(self):
        raise AssertionError("weights were read")

    monkeypatch.setattr(Checkpoint, "load", load)


def _truncated(tmp_path: Path, photo: str) -> bytes:
    return Path(photo).read_bytes()[:3000]


def _gif(tmp_path: Path, photo: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "GIF")
    return buffer.getvalue()


def _bomb(tmp_path: Path, photo: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (12_000, 9_000)).save(buffer, "PNG")  # beyond Pillow's warning, below its error
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda *_: b"", "is empty"),
        (lambda *_: b"hello, world" * 9, "is not a picture"),
        (_truncated, "damaged or truncated"),
        (_gif, "is a GIF picture; PNG, JPEG and WebP are read"),
        (_bomb, "decompression bomb"),
    ],
    ids=["zero bytes", "text", "truncated", "gif", "bomb"],
)
def test_bad_pictures(content, message, tmp_path, photo, checkpoint, no_weights):
    path = tmp_path / "bad.png"
    path.write_bytes(content(tmp_path, photo))
    for source, stdin in ((path, None), ("-", path.read_bytes())):
        error = refused(photo, source, QUESTION, "--model", checkpoint, stdin=stdin)
        assert f"image {str(source)!r}" in error and message in error


def test_large_bomb_and_large_file(tmp_path, monkeypatch, checkpoint, no_weights):
    path = tmp_path / "large.png"
    Image.new("RGB", (100, 100)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2_000)  # more than twice as many is an error in Pillow itself
    assert "decompression bomb" in refused(path, QUESTION, "--model", checkpoint)
    monkeypatch.setattr(pictures, "_LARGEST_FILE", 10)
    assert "larger than" in refused(path, QUESTION, "--model", checkpoint)


def test_files_that_cannot_be_opened(tmp_path, no_weights):
    assert "no such file" in refused(tmp_path / "none.png", QUESTION)
    assert "is a folder" in refused(tmp_path, QUESTION)
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    assert "cannot be read" in refused(tmp_path / "loop.png", QUESTION)
    assert "only once" in refused("-", "-", QUESTION, stdin=b"")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path, no_weights):
    path = tmp_path / "secret.png"
    path.write_bytes(b"x")
    path.chmod(0)
    assert "cannot be read (Permission denied)" in refused(path, QUESTION)


def test_arguments_in_another_order(photo, no_weights):
    assert "the question comes last" in refused(QUESTION, photo)
    assert "image files and then the question" in refused(photo)
    assert "Missing argument" in refused()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "nan"], "budget: must be a positive number"),
        (["--budget", "inf"], "budget: must be a positive number"),
        (["--budget", "-3"], "budget: must be a positive number"),
        (["--budget", "0"], "budget: must be a positive number"),
        (["--budget", "many"], "'--budget'"),
        (["--budget", "50"], "budget: 50.0 is more than the 49 vision tokens"),
        (["--budget", "2"], "budget: a true average of 2 vision tokens is out of reach"),
        (["--budget", "9", "--preset", "llava-1.5-7b/64"], "--budget and --preset: give only one"),
        (["--preset", "llava/1"], "there is no preset 'llava/1'"),
        (["--preset", "llava-1.5-7b/64"], "num_layers: the schedule is for 32 layers, the model has 6"),
        (["--schedule", "nowhere.json"], "cannot read 'nowhere.json'"),
        (["--positions", "odd"], "'--positions'"),
        (["--max-new-tokens", "0"], "'--max-new-tokens'"),
        (["--device", "abacus"], "device 'abacus'"),
        (["--dtype", "int4"], "'--dtype'"),
        (["--overlay", "no/such/folder/kept.png"], "there is no folder 'no/such/folder'"),
        (["--overlay", "kept.gif"], "must end in one of .png"),
        (["--overlay", "k" * 300 + ".png"], "cannot be written (File name too long)"),
        (["--overlay", "/proc/version.png"], "overlay '/proc/version.png'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options(arguments, message, photo, checkpoint, no_weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "/proc/version.png" in arguments and os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    assert message in refused(photo, QUESTION, "--model", checkpoint, *arguments)
    assert not list(tmp_path.iterdir())


def test_question_too_long_for_a_file_name(photo, checkpoint):
    assert run("ask", photo, "what colour " * 60, "--model", checkpoint).exit_code == 0


@pytest.mark.parametrize("question", ["", "  \n"])
def test_empty_question(question, photo, no_weights):
    assert "question: is empty" in refused(photo, question)


def test_question_with_a_picture_placeholder(photo, checkpoint, no_weights):
    assert "must not contain '<image>'" in refused(photo, "what is <image> here", "--model", checkpoint)


def test_broken_and_newer_schedule_files(photo, checkpoint, tmp_path, no_weights):
    path = tmp_path / "schedule.json"
    path.write_text("{")
    assert "not JSON" in refused(photo, QUESTION, "--model", checkpoint, "--schedule", path)
    path.write_text(json.dumps({**json.loads(Schedule((), 6).to_json()), "version": 99}))
    assert "newer adaptinfer" in refused(photo, QUESTION, "--model", checkpoint, "--schedule", path)
    Schedule((Stage(1, 50),), 6).save(path)
    assert "only 49 enter" in refused(photo, QUESTION, "--model", checkpoint, "--schedule", path)


def test_overlay_never_replaces_a_picture_asked_about(photo, no_weights):
    before = Path(photo).read_bytes()
    assert "would overwrite" in refused(photo, QUESTION, "--overlay", photo)
    assert Path(photo).read_bytes() == before


# ---------------------------------------------------------------------------------------------------- bad checkpoints


def _config(folder: Path, **content: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def test_models_that_are_none_or_not_supported(photo, tmp_path, no_weights):
    text = refused(photo, QUESTION, "--model", _config(tmp_path / "text", model_type="llama"))
    assert "llama is not a vision-language model" in text
    other = refused(photo, QUESTION, "--model", _config(tmp_path / "other", model_type="florence2"))
    assert "encoder-decoder" in other
    unknown = refused(photo, QUESTION, "--model", _config(tmp_path / "unknown", model_type="whoknows"))
    assert "no kind that transformers knows" in unknown and "`adaptinfer models` lists" in unknown
    assert "configuration cannot be read" in refused(photo, QUESTION, "--model", _broken(tmp_path / "broken"))
    assert "no config.json" in refused(photo, QUESTION, "--model", tmp_path)
    assert "is a file" in refused(photo, QUESTION, "--model", photo)
    assert "no such folder" in refused(photo, QUESTION, "--model", tmp_path / "nowhere")
    assert "no such folder" in refused(photo, QUESTION, "--model", "m" * 300 + "/.")
    hub = refused(photo, QUESTION, "--model", "nobody/nothing")
    assert "no such folder, not downloaded before, and offline mode is on" in hub


def _broken(folder: Path) -> Path:
    _config(folder)
    (folder / "config.json").write_text("{")
    return folder


def test_remote_code_only_on_request(photo, tmp_path, no_weights):
    folder = _config(tmp_path / "remote", model_type="own", auto_map={"AutoConfig": "own.Config"})
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert "--trust-remote-code" in refused(photo, QUESTION, "--model", folder)
    assert not (tmp_path / "ran").exists()
    refused(photo, QUESTION, "--model", folder, "--trust-remote-code")
    assert (tmp_path / "ran").exists()


def test_compact_positions_where_there_are_none(photo, tmp_path, no_weights):
    tiny.qwen2_5_vl().config.save_pretrained(tmp_path)
    assert "'keep' only" in refused(photo, QUESTION, "--model", tmp_path, "--positions", "compact")


def test_processor_that_cannot_be_read(photo, checkpoint, tmp_path, no_weights):
    shutil.copy(Path(checkpoint) / "config.json", tmp_path)
    assert "processor" in refused(photo, QUESTION, "--model", tmp_path)


def test_weights_are_safetensors_whole_and_complete(photo, checkpoint, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    file = folder / "model.safetensors"
    weights = load_file(file)

    def error() -> str:
        return refused(photo, QUESTION, "--model", folder, "--overlay", tmp_path / "kept.png")

    file.unlink()
    assert "no weights" in error()
    torch.save(weights, folder / "pytorch_model.bin")
    assert "only safetensors are loaded" in error()
    file.write_bytes((Path(checkpoint) / "model.safetensors").read_bytes()[:5000])
    assert "weights cannot be read" in error()
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    save_file({key: value for key, value in weights.items() if key != name}, file, {"format": "pt"})
    assert "1 weights are missing" in error()
    save_file({**weights, name: weights[name][:8].clone()}, file, {"format": "pt"})
    assert "weights cannot be read" in error()
    assert not (tmp_path / "kept.png").exists()


def test_a_bug_is_no_user_error(photo, checkpoint, monkeypatch):
    def load(self):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Checkpoint, "load", load)
    with pytest.raises(ZeroDivisionError):
        run("ask", photo, QUESTION, "--model", checkpoint)


# ---------------------------------------------------------------------------------------------------- pictures


def _read(tmp_path: Path, image: Image.Image, name: str = "a.png", **options: object) -> np.ndarray:
    image.save(tmp_path / name, **options)
    picture = read_pictures([tmp_path / name])[0].image
    assert picture.mode == "RGB"
    return np.asarray(picture)


def test_every_mode_becomes_rgb(tmp_path):
    ramp = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    assert (_read(tmp_path, Image.fromarray(ramp))[..., 0] == (ramp // 257)).all()  # 16 bits: scaled, not clipped
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    half.paste((255, 0, 0, 255), (0, 0, 2, 4))
    pixels = _read(tmp_path, half)
    assert (pixels[0, 0] == (255, 0, 0)).all() and (pixels[0, 3] == 255).all()  # transparent black shows white
    palette = half.convert("RGB").convert("P")
    assert (_read(tmp_path, palette, transparency=palette.getpixel((3, 0)))[0, 3] == 255).all()
    assert (_read(tmp_path, Image.new("L", (4, 4), 77)) == 77).all()
    assert (_read(tmp_path, Image.new("1", (4, 4), 1)) == 255).all()
    cyan = _read(tmp_path, Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "a.jpg")
    assert cyan[0, 0, 0] < 20 and cyan[0, 0, 1] > 235
    assert _read(tmp_path, Image.new("RGB", (4, 4), "red"), "a.webp", lossless=True)[0, 0].tolist() == [255, 0, 0]


def test_camera_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (6, 4), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned right by a quarter
    pixels = _read(tmp_path, image, exif=exif)
    assert pixels.shape == (6, 4, 3) and pixels[0, 3].min() == 255


def test_nothing_is_read_from_a_terminal():
    class Terminal(io.BytesIO):
        def isatty(self) -> bool:
            return True

    with pytest.raises(InputError, match="nothing is piped"):
        read_pictures(["-"], Terminal())


def test_both_ways_are_measured_in_turn(monkeypatch, models):
    from adaptinfer.engine import calls

    order = []

    def timed(*_):
        order.append("vanilla" if calls.PAUSED.get() else "pruned")
        return float(len(order)), 1.0

    monkeypatch.setattr(asking, "timed", timed)
    monkeypatch.setattr(asking, "REPEATS", 9)
    monkeypatch.setattr(asking, "MEASURING_SECONDS", 0.0)
    model = models("llava")
    with AdaptInfer(budget=20)(model):
        vanilla, pruned = asking._measure(model, {}, "cpu", lambda _: None)
    assert order == ["vanilla", "pruned", "pruned", "vanilla", "vanilla", "pruned", "pruned", "vanilla"]
    assert vanilla.ttft_ms == (4, 5, 8) and pruned.ttft_ms == (3, 6, 7)  # no warm-up; the least although time is up


def test_ratio_is_of_neighbouring_repeats():
    slow_then_fast = Comparison("", Latency((10.0, 1.0, 4.0), (1.0,)), Latency((5.0, 0.5, 4.0), (1.0,)))
    assert slow_then_fast.ratio("ttft_ms") == (0.5, 0.5, 1.0)


# ---------------------------------------------------------------------------------------------------- real processes


def test_in_a_process_of_its_own(photo, checkpoint, tmp_path):
    def call(*arguments: str):
        command = [sys.executable, "-m", "adaptinfer", "ask", *arguments, "--model", checkpoint]
        environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)

    done = call(photo, QUESTION)
    assert done.returncode == 0 and done.stderr == "" and len(done.stdout.splitlines()) == 2
    failed = call("none.png", QUESTION)
    assert failed.returncode == 2 and failed.stdout == ""
    assert failed.stderr == "error: image 'none.png': no such file\n"


def test_the_command_line_alone_imports_nothing_heavy():
    code = (
        "import sys, types\n"
        "package = types.ModuleType('adaptinfer')\n"  # without what adaptinfer/__init__.py may import
        f"package.__path__ = [{str(SOURCE / 'adaptinfer')!r}]\n"
        "sys.modules['adaptinfer'] = package\n"
        "import adaptinfer.cli.app\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'PIL', 'matplotlib'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_standard_output():
    command = [sys.executable, "-m", "adaptinfer", "presets"]
    with Path("/dev/full").open("w") as full:
        run = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr == "error: standard output cannot be written (No space left on device)\n"


def test_without_arguments_there_is_help_and_no_empty_error():
    run = subprocess.run([sys.executable, "-m", "adaptinfer"], capture_output=True, text=True, check=False)
    assert run.returncode == 2 and "ask" in run.stdout + run.stderr and "error:" not in run.stderr


def test_devices_that_run_nothing(photo, checkpoint):
    with pytest.raises(InputError, match="device 'meta'"):
        Checkpoint(str(checkpoint), device="meta")
