"""`adaptinfer eval` on a stand-in for the embedded model: batches, turns, costs, kill and resume, adapters."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import stand_in
import torch
from PIL import Image
from typer.testing import CliRunner

from adaptinfer import AdaptInfer
from adaptinfer.cli.app import app
from adaptinfer.errors import InputError, UnsupportedError
from adaptinfer.evaluation.conditions import Condition, conditions
from adaptinfer.evaluation.journal import Journal
from adaptinfer.evaluation.plan import EvaluationPlan, Unit, units
from adaptinfer.evaluation.processes import Processes
from adaptinfer.evaluation.runner import Worker, run
from adaptinfer.evaluation.tasks import load_task
from adaptinfer.evaluation.world import WorldTask
from adaptinfer.pruners import METHODS, Random
from adaptinfer.resize import Resize

ANSWERS = "answers.jsonl"


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Random weights do not know when an answer is over."""
    monkeypatch.setattr(WorldTask, "max_new_tokens", 2)


def _invoke(folder: Path, *arguments: str):
    options = ("--samples", "8", "--batch", "4", "--seeds", "1", "--latency-rounds", "0", "--no-controls")
    arguments = "--model", stand_in.folder(), "-o", str(folder), *map(str, arguments)
    return CliRunner().invoke(app, ["eval", *options, *arguments])


def _plan(*tasks: str, samples: int = 6, batch: int = 3, **settings) -> EvaluationPlan:
    return EvaluationPlan(
        stand_in.folder(), tasks, tuple(conditions(["adaptinfer"], [0.2], **settings)), samples, batch
    )


@pytest.fixture(scope="module")
def worker() -> Worker:
    return Worker(_plan("world", "world-turns", "world-pair"))


def _with_plan(worker: Worker, plan: EvaluationPlan) -> Worker:
    """The same loaded model at work on another plan."""
    other = object.__new__(Worker)
    other.__dict__.update(worker.__dict__, _plan=plan)
    return other


def _answers(worker: Worker, plan: EvaluationPlan) -> dict[tuple, dict]:
    worker = _with_plan(worker, plan)
    return {
        (record["task"], record["condition"], record["seed"], record["sample"], record["turn"]): record
        for unit in units(plan, set())
        for block in worker.blocks(unit)
        for record in block
    }


# ---------------------------------------------------------------------------------------------------- answers


def test_a_batch_is_its_samples(worker):
    # What has chance in it takes other tokens in other batches, by design.
    found = tuple(each for each in conditions(["adaptinfer"], [0.2]) if each.seeds == 1 and each.name != "wrong")
    tasks = ("world", "world-turns", "world-pair")
    together, alone = (_answers(worker, EvaluationPlan(stand_in.folder(), tasks, found, 3, batch)) for batch in (3, 1))
    assert together.keys() == alone.keys() and len(together) == 5 * 3 * (1 + 4 + 1)
    for place, record in together.items():
        assert record["answer"] == alone[place]["answer"], place
        if record["turn"] == 0:
            assert record["kl"] == pytest.approx(alone[place]["kl"], rel=1e-3, abs=1e-5)
            assert record["flops"] == alone[place]["flops"] and record["true_average"] == alone[place]["true_average"]


def test_a_later_turn_reads_what_a_whole_prompt_would_say(worker):
    """Vanilla on one cache, with holes where shorter answers end, against prompts that hold the conversation so far."""
    answerer = worker._answerer
    task = load_task("world-turns")
    samples = task.samples(4)
    questions = [[turn.question for turn in sample.turns] for sample in samples]
    pictures = [task.pictures(sample) for sample in samples]
    batch = answerer.batch([each[0] for each in questions], pictures)
    found = answerer.answer(batch, [each[1:] for each in questions], 4, None)
    for turn in (1, 2, 3):
        texts = []
        for row, asked in enumerate(questions):
            messages = []
            for number in range(turn + 1):
                parts = [{"type": "text", "text": asked[number]}]
                messages.append({"role": "user", "content": [*([{"type": "image"}] if not number else []), *parts]})
                if number < turn:
                    text = found.answers[number][row]
                    messages.append({"role": "assistant", "content": [{"type": "text", "text": text}]})
            texts.append(answerer.processor.apply_chat_template(messages, add_generation_prompt=True))
        inputs = answerer.processor(text=texts, images=pictures, padding=True, return_tensors="pt")
        whole = answerer.answer(answerer.counted(inputs), [[]] * 4, 4, None)
        assert whole.answers[0] == found.answers[turn]


def test_holes_of_a_conversation_change_no_logits(worker):
    """The second turn's ids and mask, built by hand after answers of different length."""
    answerer = worker._answerer
    tokenizer = answerer.processor.tokenizer
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    red, star = tokenizer("red star", add_special_tokens=False)["input_ids"]
    said = torch.tensor([[9, 9, red, end, pad], [9, 9, red, star, end]])
    mask = torch.tensor([[0, 1], [1, 1]])
    ids, after = answerer._next_turn(said, 2, mask, ["What colour is the star?", "How many red things are there?"])
    kept = [row[flags.bool()].tolist() for row, flags in zip(ids, after, strict=True)]
    for row, answer in enumerate(([red], [red, star])):
        begin = 1 if row == 0 else 2
        assert kept[row][:begin] == [9] * begin and kept[row][begin : begin + len(answer)] == answer
        assert kept[row][begin + len(answer)] == end  # written by the template, once
        assert kept[row].count(end) == 1 and pad not in kept[row]


def test_records_say_what_the_engine_did(worker):
    plan = _plan("world", samples=3)
    unit = Unit("world", 0, (("vanilla", 0), ("adaptinfer 0.2", 0)))
    vanilla, pruned = _with_plan(worker, plan).blocks(unit)
    batch, _ = _with_plan(worker, plan).first_prompt("world")(plan.conditions[0])
    with AdaptInfer(budget=0.2)(worker.model) as handle:
        out = worker.model.generate(**batch.inputs, max_new_tokens=WorldTask.max_new_tokens, do_sample=False)
        report = handle.report
    text = worker._answerer.processor.tokenizer.decode(
        out[0, batch.inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    first = pruned[0]
    assert first["answer"] == text and first["true_average"] == report.true_average[0]
    assert (first["flops"], first["kv_bytes"]) == (report.flops, report.kv_bytes)
    assert (vanilla[0]["flops"], vanilla[0]["kv_bytes"]) == (report.vanilla_flops, report.vanilla_kv_bytes)
    assert all(record["kl"] == 0 and record["top1"] for record in vanilla)
    assert all(record["kl"] > 0 for record in pruned)


def test_a_resized_picture_costs_what_it_shows(worker):
    """A batch of one picture's questions, conversations, and pairs, against the control used by hand."""
    found = tuple(each for each in conditions(["adaptinfer"], [0.2]) if each.name in ("vanilla", "resized 0.2"))
    tasks = ("world", "world-turns", "world-pair")
    plan = EvaluationPlan(stand_in.folder(), tasks, found, 2, 2)
    records = _answers(worker, plan)
    for (task, name, _, sample, turn), record in records.items():
        if name != "vanilla" and turn == 0:
            assert record["vision_tokens"] == (2 * 49 if task == "world-pair" else 49)  # 7 x 7 of 51
            assert record["true_average"] == record["vision_tokens"]
            assert record["flops"] < 0.45 * records[task, "vanilla", 0, sample, 0]["flops"]
    sample = plan.loaded_samples["world"][0]
    inputs = Resize(0.2).inputs(
        worker._answerer.processor,
        worker._answerer._first_text(sample.turns[0].question, 1),
        plan.loaded_tasks["world"].pictures(sample),
    )
    with Resize(0.2)(worker.model):
        out = worker.model.generate(**inputs, max_new_tokens=2, do_sample=False)
    text = worker._answerer._texts(out[:, inputs["input_ids"].shape[1] :])
    assert text == [records["world", "resized 0.2", 0, sample.id, 0]["answer"]]


def test_divergence_is_taken_from_vanilla():
    from adaptinfer.evaluation.runner import _compared

    vanilla, ours = torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 1.0]])
    p, q = vanilla.softmax(-1)[0], ours.softmax(-1)[0]
    tops, divergences = _compared(ours, vanilla)
    assert tops == [False] and divergences[0] == pytest.approx(float((p * (p / q).log()).sum()), abs=1e-6)


def test_wrong_pictures_are_anothers_and_a_sample_keeps_its_own(worker):
    plan = _plan("world", samples=5, batch=5)
    other = _with_plan(worker, plan)
    task = plan.loaded_tasks["world"]
    sample = plan.loaded_samples["world"][0]
    assert other._others(task, sample)[0].tobytes() == task.pictures(plan.loaded_samples["world"][4])[0].tobytes()
    only = _plan("world", samples=4)
    with pytest.raises(InputError, match="all samples of this task are about the same pictures"):
        _with_plan(worker, only)._others(task, sample)


# ---------------------------------------------------------------------------------------------------- as a user runs it


def test_a_run_killed_anywhere_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    arguments = ("--task", "world", "--task", "world-turns", "--budget", "0.2")
    whole = _invoke(tmp_path / "whole", *arguments)
    assert whole.exit_code == 0, whole.output
    assert "adaptinfer 0.2" in whole.output and "report: " in whole.output
    append, written = Journal.append, []

    def killed(self, block):
        if len(written) == 3:
            with self._path.open("ab") as file:  # half a block, as a kill leaves it
                file.write(json.dumps({**block[0], "left": 1}).encode() + b'\n{"task": "sce')
            raise KeyboardInterrupt
        written.append(block)
        append(self, block)

    monkeypatch.setattr(Journal, "append", killed)
    stopped = _invoke(tmp_path / "resumed", *arguments)
    assert stopped.exit_code == 130 and "interrupted; 3 blocks" in " ".join(stopped.output.split())
    again = []
    monkeypatch.setattr(Journal, "append", lambda self, block: (again.append(block), append(self, block)))
    assert _invoke(tmp_path / "resumed", *arguments).exit_code == 0
    assert len(again) == 2 * (2 + 2) - 3  # two batches of two tasks under two conditions, three blocks of them done
    assert (tmp_path / "resumed" / ANSWERS).read_bytes() == (tmp_path / "whole" / ANSWERS).read_bytes()
    other = _invoke(tmp_path / "whole", *arguments, "--batch", "2")
    assert other.exit_code == 2 and "it differs in batch" in other.output
    folder = tmp_path / "whole"
    assert json.loads((folder / "summary.json").read_text())["setup"]["model"] == stand_in.folder()
    assert "## world-turns" in (folder / "report.md").read_text() and (folder / "world.png").exists()


def _file(folder: Path, bad: int) -> str:
    lines = []
    task = load_task("world")
    for number, sample in enumerate(task.samples(12)):
        path = folder / f"{sample.group}-{number}.png"
        if number < bad:
            path.write_bytes(b"no picture")
        else:
            task.pictures(sample)[0].resize((128, 128)).save(path)
        turn = sample.turns[0]
        lines.append(json.dumps({"image": path.name, "question": turn.question, "answer": turn.answers[0]}))
    (folder / "mine.jsonl").write_text("\n".join(lines))
    return str(folder / "mine.jsonl")


def test_a_corrupt_sample_is_named_left_out_and_counted(tmp_path):
    result = _invoke(tmp_path / "out", "--task", _file(tmp_path, 1), "--budget", "0.2", "--samples", "12")
    assert result.exit_code == 0, result.output
    assert "mine: 11 answers" in result.output and "1 samples could not be used: 1" in result.output
    assert "1 samples could not be used" in (tmp_path / "out" / "report.md").read_text()
    lines = [json.loads(line) for line in (tmp_path / "out" / ANSWERS).read_text().splitlines()[1:]]
    assert {line["sample"] for line in lines if "skipped" in line} == {"1"}
    broken = _invoke(tmp_path / "out2", "--task", _file(tmp_path, 2), "--budget", "0.2", "--samples", "12")
    assert broken.exit_code == 2 and "2 of 12 samples cannot be used" in " ".join(broken.output.split())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--method", "fast"), "there is no method 'fast'"),
        (("--budget", "1"), "budget"),
        (("--budget", "-3"), "budget: must be a positive number"),
        (("--task", "nonsense"), "there is none of that name"),
        (("--task", "world", "--task", "world"), "two have the same name"),
        (("--preset", "llava-1.5-7b/63"), "llava-1.5-7b/63"),
        (("--positions", "middle"), "positions: must be one of"),
        (("--model", "/no/such/folder"), "no such folder"),
        (("--task", "FILE:exact", "--skip", "2"), "has no samples after the first 2"),
    ],
)
def test_what_cannot_run_is_one_line_before_any_work(tmp_path, arguments, sentence):
    file = tmp_path / "two.jsonl"
    file.write_text('{"image": "x.png", "question": "a", "answer": "b"}\n' * 2)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    arguments = [part.replace("FILE", str(file)) for part in arguments]
    result = _invoke(tmp_path / "out", *arguments)
    assert result.exit_code == 2 and sentence in result.output, result.output
    assert not (tmp_path / "out" / ANSWERS).exists()


def test_samples_that_are_left_out_are_those_before():
    whole, rest = (
        EvaluationPlan("embedded", ("world",), (), samples, skip=skip) for samples, skip in ((12, 0), (8, 4))
    )
    assert rest.loaded_samples["world"] == whole.loaded_samples["world"][4:]
    assert rest.config() != dataclasses.replace(rest, skip=0).config()


def test_what_is_left_out_needs_a_number_of_what_is_not(tmp_path):
    result = CliRunner().invoke(app, ["eval", "--skip", "2", "-o", str(tmp_path / "out")])
    assert result.exit_code == 2 and "--skip: also give --samples, how many" in result.output


@pytest.mark.parametrize(
    ("named", "first"),
    [
        ((), ["adaptinfer"]),
        (("dart", "all"), ["dart", "adaptinfer"]),
        (("all", "evidence-before"), ["evidence-before"]),
    ],
)
def test_all_methods_come_after_those_that_are_named(tmp_path, monkeypatch, named, first):
    def caught(chosen, *rest, **options):
        raise InputError(" ".join(chosen))

    monkeypatch.setattr("adaptinfer.evaluation.conditions.conditions", caught)
    result = _invoke(tmp_path / "out", *(part for name in named for part in ("--method", name)))
    chosen = " ".join(result.output.split()).removeprefix("error: ").split()
    assert chosen[: len(first)] == first and len(set(chosen)) == len(chosen)
    assert set(chosen) == ({*METHODS, *named} - {"all"} if named else {"adaptinfer"})


def test_a_budget_that_one_method_cannot_meet_is_a_row_with_its_sentence(tmp_path):
    result = _invoke(tmp_path / "out", "--budget", "1", "--budget", "0.2")
    assert result.exit_code == 0, result.output
    assert "adaptinfer 1: not run: budget" in result.output
    report = (tmp_path / "out" / "report.md").read_text()
    assert "adaptinfer 1: budget" in report and "| adaptinfer 0.2 |" in report


def test_a_method_that_refuses_while_it_runs_is_a_row_too(worker):
    class Refuses(Random):
        def score(self, view):
            raise UnsupportedError("this tower has no class token")

    found = Condition("vanilla", "vanilla"), Condition("x", "x", 0.2, Refuses(budget=0.2))
    plan = EvaluationPlan(stand_in.folder(), ("world",), found, 2)
    vanilla, refused = _with_plan(worker, plan).blocks(units(plan, set())[0])
    assert all("score" in record for record in vanilla)
    assert [record["refused"] for record in refused] == ["this tower has no class token"] * 2
    assert not hasattr(worker.model, "_adaptinfer_handle")


def test_too_little_memory_ends_the_run_with_what_to_do(worker, monkeypatch):
    def answer(*_):
        raise torch.OutOfMemoryError("2 GiB")

    monkeypatch.setattr(worker._answerer, "answer", answer)
    plan = _plan("world")
    with pytest.raises(InputError, match="--batch 3: cpu has too little memory"):
        list(_with_plan(worker, plan).blocks(units(plan, set())[0]))


def test_a_question_with_a_picture_token_is_refused(worker):
    with pytest.raises(InputError, match="'<image>' stands for a picture"):
        worker._answerer.batch(["What is <image>?"], [[Image.new("RGB", (8, 8))]])


# ---------------------------------------------------------------------------------------------------- several processes


def test_shares_of_several_processes_make_the_same_file(tmp_path, worker, monkeypatch):
    plan = _plan("world", "world-turns", samples=4, batch=2, seeds=2, controls=False)
    monkeypatch.setattr("adaptinfer.evaluation.runner.Worker", lambda plan: _with_plan(worker, plan))
    for folder, count in (("one", 1), ("three", 3)):
        ranks = [Processes(index, count) for index in range(count)]
        journals, done = zip(*(rank.journal(tmp_path / folder, plan) for rank in ranks), strict=True)
        shares = [rank.share(units(plan, done[0])) for rank in ranks]
        assert sum(map(len, shares)) == 4
        for journal, share in reversed(list(zip(journals, shares, strict=True))):
            run(plan, journal, share, lambda task, name: None)
        assert [rank.finish(plan, journal) for rank, journal in zip(ranks[::-1], journals[::-1], strict=True)][-1]
    assert (tmp_path / "one" / ANSWERS).read_bytes() == (tmp_path / "three" / ANSWERS).read_bytes()


def _as_rank(monkeypatch, index: int, at_barrier) -> list[Unit]:
    """Be one of two processes; ``at_barrier`` is called at each barrier. The units that this one is to answer."""
    taken: list[Unit] = []
    ranks = Processes(index, 2, state=SimpleNamespace(wait_for_everyone=at_barrier))
    monkeypatch.setattr(Processes, "of_environment", lambda device: ranks)
    monkeypatch.setattr("adaptinfer.evaluation.runner.run", lambda plan, journal, todo, done: taken.extend(todo))
    return taken


def test_a_late_process_takes_its_own_share(tmp_path, monkeypatch):
    """The faster one has answered all of its share before this one looks at what is left."""
    assert _invoke(tmp_path / "one", "--budget", "0.2").exit_code == 0
    header, *lines = (tmp_path / "one" / ANSWERS).read_bytes().splitlines(keepends=True)
    first = [line for line in lines if json.loads(line)["batch"] == 0]
    assert 0 < len(first) < len(lines)
    (tmp_path / "two").mkdir()
    barriers = []

    def wait():
        barriers.append(len(barriers))
        (tmp_path / "two" / ANSWERS).write_bytes(b"".join([header, *(first if len(barriers) > 1 else [])]))

    taken = _as_rank(monkeypatch, 1, wait)
    assert _invoke(tmp_path / "two", "--budget", "0.2").exit_code == 0
    assert [unit.batch for unit in taken] == [1]


def test_no_report_of_a_run_with_missing_answers(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        _as_rank(patched, 0, lambda: None)
        result = _invoke(tmp_path, "--budget", "0.2")
    assert result.exit_code == 2 and not (tmp_path / "report.md").exists()
    assert "4 blocks of answers are missing" in result.output and "run the same command again" in result.output
    assert _invoke(tmp_path, "--budget", "0.2").exit_code == 0
    assert (tmp_path / "report.md").exists()


def test_the_launcher_is_told_by_the_environment(monkeypatch):
    for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert Processes.of_environment("cpu") == Processes()
    monkeypatch.setenv("WORLD_SIZE", "4")
    state = SimpleNamespace(process_index=2, num_processes=4, local_process_index=2)
    monkeypatch.setattr("accelerate.PartialState", lambda cpu: state)
    ranks = Processes.of_environment("cpu")
    assert (ranks.index, ranks.count, ranks.is_main, ranks.device("cpu")) == (2, 4, False, "cpu")


_SMALL = ["--samples", "8", "--batch", "4", "--seeds", "1", "--latency-rounds", "0", "--budget", "0.2"]


def _command(launcher: list[str], folder: Path, *more: str) -> None:
    command = [sys.executable, *launcher, "-m", "adaptinfer", "eval", "--model", stand_in.folder(), *_SMALL]
    command += ["-o", str(folder), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_two_processes_of_a_launcher_give_the_same_file(tmp_path):
    _command([], tmp_path / "one")
    _command(["-m", "torch.distributed.run", "--nproc-per-node", "2"], tmp_path / "two")
    assert (tmp_path / "one" / ANSWERS).read_bytes() == (tmp_path / "two" / ANSWERS).read_bytes()


@pytest.mark.slow
def test_two_ray_actors_give_the_same_file(tmp_path):
    pytest.importorskip("ray")
    _command([], tmp_path / "one")
    _command([], tmp_path / "two", "--ray", "2")
    assert (tmp_path / "one" / ANSWERS).read_bytes() == (tmp_path / "two" / ANSWERS).read_bytes()


def test_ray_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    result = _invoke(tmp_path / "out", "--budget", "0.2", "--ray", "2")
    assert result.exit_code == 2 and "pip install 'adaptinfer[ray]'" in result.output


# ---------------------------------------------------------------------------------------------------- lmms-eval


@pytest.fixture
def lmms(monkeypatch):
    """The plug-in, on lmms-eval itself where it is installed, else on the few names of it that the plug-in uses."""
    with contextlib.suppress(ImportError):
        import adaptinfer.evaluation.lmms as plug_in

        return plug_in

    def module(name: str, **names: object) -> None:
        made = types.ModuleType(f"lmms_eval.{name}" if name else "lmms_eval")
        made.__dict__.update(names)
        monkeypatch.setitem(sys.modules, made.__name__, made)
        if name:
            parent = sys.modules[made.__name__.rpartition(".")[0]]
            setattr(parent, name.rpartition(".")[2], made)

    class Collator:
        """Groups by settings, sorts by a key, and can undo it."""

        def __init__(self, items, key, group_fn, grouping):
            self.order = sorted(range(len(items)), key=lambda n: (str(group_fn(items[n])), key(items[n])))
            self.items, self.group = items, group_fn

        def get_batched(self, n, batch_fn):
            batch = []
            for number in self.order:
                if batch and (len(batch) == n or self.group(batch[0]) != self.group(self.items[number])):
                    yield batch
                    batch = []
                batch.append(self.items[number])
            yield batch

        def get_original(self, answers):
            return [answer for _, answer in sorted(zip(self.order, answers, strict=True), key=lambda pair: pair[0])]

    class Base:
        rank = property(lambda self: self._rank)

        def __init__(self):
            self.task_dict, self.cache_hook = {}, SimpleNamespace(add_partial=lambda *_: None)

    class Messages:
        def __init__(self, messages):
            self.messages = messages

        def to_hf_messages(self):
            names = {"image": "image", "text": "text"}
            return [
                {
                    "role": message["role"],
                    "content": [
                        {"type": part["type"], names[part["type"]]: part.get("url", part.get("text"))}
                        for part in message["content"]
                    ],
                }
                for message in self.messages
            ]

    module("")
    for name in ("api", "models", "models.model_utils"):
        module(name)
    module("utils", Collator=Collator)
    module("api.instance", GenerationResult=SimpleNamespace, TokenCounts=SimpleNamespace)
    module("api.model", lmms=Base)
    module("models.model_utils.gen_metrics", log_metrics=lambda **_: None)
    module("models.registry_v2", ModelManifest=lambda name, chat_class_path: (name, chat_class_path))
    module("protocol", ChatMessages=Messages)
    import adaptinfer.evaluation.lmms as plug_in

    monkeypatch.delitem(sys.modules, "adaptinfer.evaluation.lmms")
    return plug_in


def _requests(count: int) -> tuple[list[SimpleNamespace], list[str]]:
    task = load_task("world")
    docs = [(task.pictures(sample)[0], sample.turns[0]) for sample in task.samples(count)]

    def messages(doc):
        picture, turn = doc
        return [
            {"role": "user", "content": [{"type": "image", "url": picture}, {"type": "text", "text": turn.question}]}
        ]

    settings = [{"max_new_tokens": 2, "until": ["\n\n"]}, {"max_new_tokens": 2}]
    requests = [
        SimpleNamespace(args=(turn.question, messages, settings[number % 2], number, "t", "test"))
        for number, (_, turn) in enumerate(docs)
    ]
    return requests, docs


def test_lmms_eval_gets_the_answers_that_eval_gets(lmms, worker):
    requests, docs = _requests(6)
    answers = {}
    for name, settings in (("vanilla", {}), ("adaptinfer 0.2", {"method": "adaptinfer", "budget": 0.2})):
        model = lmms.AdaptInferModel(stand_in.folder(), batch_size=2, device="cpu", **settings)
        model.task_dict = {"t": {"test": docs}}
        answers[name] = [found.text for found in model.generate_until(requests)]
        assert (model.true_averages != []) == (name != "vanilla")
        assert not hasattr(model.model, "_adaptinfer_handle")
    plan = _plan("world", controls=False)
    ours = _answers(worker, plan)
    for name, texts in answers.items():
        assert texts == [ours["world", name, 0, sample.id, 0]["answer"] for sample in plan.loaded_samples["world"]]
    with pytest.raises(UnsupportedError, match="loglikelihood"):
        model.loglikelihood([])


def test_lmms_eval_arguments_that_make_no_sense(lmms):
    for settings, sentence in (
        ({"budget": 3}, "budget needs a method"),
        ({"positions": "keep", "seed": 0}, "positions and seed needs a method"),
        ({"method": "fast", "budget": 3}, "there is no method 'fast'"),
        ({"method": "adaptinfer", "budget": 3, "preset": "llava-1.5-7b/64"}, "pruner, not method and preset"),
        ({"preset": "llava-1.5-7b/64", "budget": 64}, "preset brings its own settings, so leave out budget,"),
        ({"preset": "llava-1.5-7b/64", "positions": "keep"}, "preset brings .* leave out positions,"),
        ({"pruner": "folder", "budget": 64, "seed": 0}, "pruner brings .* leave out budget and seed,"),
        ({"pruner": "folder", "method": "fastv"}, "not method and pruner"),
        ({"method": "fastv", "budget": 64, "seed": 1}, "fastv has no chance in it, so leave out seed"),
    ):
        with pytest.raises(InputError, match=sentence):
            lmms.AdaptInferModel(**settings)
    assert lmms._pruner(None, None, "llava-1.5-7b/64", None, None, None) == AdaptInfer.paper(64)
    assert lmms._pruner("random", 3, None, None, None, 7) == Random(budget=3, seed=7)


def test_settings_of_lmms_eval_tasks(lmms):
    assert lmms._generation({"max_new_tokens": 5, "temperature": 0, "top_p": 1.0}) == {
        "max_new_tokens": 5, "num_beams": 1, "do_sample": False,
    }  # fmt: skip
    assert lmms._generation({"temperature": 0.5, "top_p": 0.9})["do_sample"]
    assert lmms._until("yes\n\nbut", ["\n\n", ""]) == "yes"


def test_two_pictures_of_different_size_in_a_batch(tmp_path, worker):
    for name, size in (("a", (64, 40)), ("b", (200, 300))):
        Image.new("RGB", size, "grey").save(tmp_path / f"{name}.png")
    lines = [
        {"image": "a.png", "question": "Is there a red star?", "answer": "no"},
        {"images": ["a.png", "b.png"], "question": "Is there a red star?", "answer": "no"},
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = tuple(conditions(["adaptinfer"], [0.2], seeds=1))
    plan = EvaluationPlan(stand_in.folder(), (str(tmp_path / "mine.jsonl"),), found, None)
    found = _answers(worker, plan)
    assert found["mine", "adaptinfer 0.2", 0, "2", 0]["vision_tokens"] == 512
    assert "does not say where" in found["mine", "evidence 0.2", 0, "1", 0]["refused"]
    assert "score" in found["mine", "wrong", 0, "1", 0]
