"""Several processes, several devices, several threads: each run must be the plain pruned one."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import zoo
from filelock import FileLock

import adaptinfer
from adaptinfer import AdaptInfer, AdaptInferError, Schedule, Stage, UnsupportedError, attach
from adaptinfer.engine.parallel import Ranks
from adaptinfer.pruners import Random

HERE = Path(__file__).parent
GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "eos_token_id": None}
GREEDY["suppress_tokens"] = [tiny.IMAGE, tiny.VIDEO]
TWO_STAGES = Schedule((Stage(1, 20), Stage(3, 6)), tiny.LAYERS)
MANY_FAMILIES = [name for name in zoo.SETUPS if name not in ("llava", "qwen2_5_vl", "granite4_vision")]


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


def kept(report):
    return [[row.tolist() for row in stage] for stage in report.kept]


def three(family):
    return [tiny.simple(family, after=5, seed=1), tiny.simple(family, after=13, seed=2), tiny.simple(family, seed=3)]


def python(*arguments, **options):
    """A worker script beside this file, in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [*sys.path, os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


# -- tensor parallelism ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes saw that share out the heads; started once for all workers of pytest-xdist."""
    pytest.importorskip("accelerate", reason="transformers splits a model with accelerate only")
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch cannot talk between processes")
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared

    def run(*which):
        folder = shared / "-".join(("ranks", *which))
        done = folder / "done"
        with FileLock(f"{folder}.lock"):
            if not done.exists():
                start(folder, *which)
                done.touch()
        return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]

    def start(folder, *which):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        processes = [python(HERE / "tensor_parallel_worker.py", folder, rank, 2, *which) for rank in (0, 1)]
        try:
            said = [process.communicate(timeout=600)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert not any(process.returncode for process in processes), "\n".join(said)

    return run


def check_ranks(results):
    cells = [name for name in results[0] if name not in ("not reduced", "no group") and not name.startswith("refused")]
    for name in cells:
        for rank in results:
            split, whole = rank[name]
            assert split["kept"] == whole["kept"], name
            assert split["tokens"] == whole["tokens"], name
            for one, other in zip(split["scores"], whole["scores"], strict=True):
                for ours, theirs in zip(one, other, strict=True):
                    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6), name
            torch.testing.assert_close(split["logits"], whole["logits"], atol=1e-5, rtol=0, msg=name)
            torch.testing.assert_close(split["unpruned"], whole["unpruned"], atol=1e-5, rtol=0, msg=name)
            assert not torch.allclose(split["logits"], split["unpruned"], atol=1e-2), name
        if name != "own prompts, sharded parameters":
            assert results[0][name][0]["scores"] == results[1][name][0]["scores"], "bit for bit"
    return cells


def test_ranks_choose_what_one_process_chooses(ranks):
    assert len(check_ranks(ranks())) >= 8


@pytest.mark.full
def test_ranks_choose_what_one_process_chooses_everywhere(ranks):
    assert len(check_ranks(ranks("all"))) >= 40


def test_without_the_reduction_ranks_disagree(ranks):
    """Trap 1, and the proof that the tests above would see it: each rank goes by its own heads."""
    one, other = (rank["not reduced"]["kept"] for rank in ranks())
    assert one != other
    whole = ranks()[0]["qwen2_5_vl, eager, padded"][1]["kept"]
    assert [len(stage[0]) for stage in one] == [len(stage[0]) for stage in whole]


def test_a_split_without_a_group_is_refused(ranks, models):
    assert "holds 2 of 4 attention heads, but the process group" in ranks()[0]["no group"]


@pytest.mark.parametrize("name", ["fitprune", "sparsevlm+", "textguided"])
def test_a_score_that_is_no_sum_over_heads_is_refused(ranks, name):
    assert f"{name} " in (said := ranks()[0][f"refused {name}"]) and "holds some of the heads only" in said


def test_a_model_that_says_it_is_split_must_show_its_group(models):
    model = tiny.llava()
    model._tp_size = 2
    with pytest.raises(UnsupportedError, match="split over 2 ranks, but the process group"):
        attach(model, AdaptInfer(budget=20))
    assert "_adaptinfer_handle" not in model.__dict__
    model._tp_size = 1  # FSDP alone
    with attach(model, AdaptInfer(schedule=TWO_STAGES)):
        logits(model, tiny.batch("llava", three("llava")))


def test_the_group_of_the_right_size_is_taken(monkeypatch):
    """A mesh of several kinds of parallelism; of groups that share out other things, none is asked."""

    def mesh(names, *groups):
        return SimpleNamespace(
            ndim=len(groups),
            mesh_dim_names=names,
            get_group=lambda at: groups[at if names is None else 0 if at == 0 else names.index(at)],
        )

    import adaptinfer.engine.parallel as parallel

    model = SimpleNamespace(_tp_size=4, _device_mesh=mesh(("pp", "fsdp", "tp"), "p", "f", "t"))
    module = torch.nn.Linear(1, 1)
    module._hf_device_mesh = mesh(None, "u")
    model.get_decoder = lambda: module
    sizes = {"t": 4, "u": 2, "p": 2, "f": 2}
    monkeypatch.setattr(parallel.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(parallel.dist, "get_world_size", sizes.__getitem__)
    monkeypatch.setattr(parallel, "sum_over_ranks", lambda tensor, group: group)
    found = Ranks(model)
    assert found.total(8, 32)(None) == "t"
    assert found.total(16, 32)(None) == "u"
    assert found.total(32, 32)(7) == 7
    with pytest.raises(UnsupportedError, match="holds 4 of 32"):
        found.total(4, 32)


# -- layers on several devices ---------------------------------------------------------------------------------------


def spread_over_devices(*names):
    backend = pytest.importorskip("torch.utils.backend_registration")
    if not hasattr(backend, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch cannot pretend to have devices")
    process = python(HERE / "two_devices_worker.py", *names)
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0 and "as on one device" in said, said
    return said


def test_layers_on_several_devices():
    assert "cannot be run" not in spread_over_devices("llava")


@pytest.mark.full
def test_layers_of_other_families_on_several_devices():
    said = spread_over_devices("qwen2_5_vl", *MANY_FAMILIES)
    assert {line.split(": ")[1] for line in said.splitlines() if line.startswith("cannot be run")} <= {
        "gemma4, sdpa",  # transformers itself: the last layers' keys stay where the earlier layers are
        "gemma4, eager",
    }


def per_layer(model, place):
    """A device map that names every layer of the decoder, and whatever else there is as coarsely as it goes."""
    layers = list(model.get_decoder().layers)
    found = {}

    def walk(name, module):
        if any(module is layer for layer in layers):
            found[name] = place(module.self_attn.layer_idx)
        elif not any(part is layer for part in module.modules() for layer in layers):
            found[name] = "cpu"
        else:
            for child, part in module.named_children():
                walk(f"{name}.{child}" if name else child, part)

    walk("", model)
    return found


def dispatch_hooks(model, folder):
    return dispatch(model, device_map=per_layer(model, lambda layer: "cpu"), main_device="cpu", force_hooks=True)


def dispatch_halves(model, folder):
    """One hook for the whole multimodal model, whose forward is the one that a pruner wraps."""
    return dispatch(model, device_map={"model": "cpu", "lm_head": "cpu"}, main_device="cpu", force_hooks=True)


def dispatch_disk(model, folder):
    places = per_layer(model, lambda layer: "disk" if layer % 2 else "cpu")
    return dispatch(model, device_map=places, main_device="cpu", offload_dir=folder, force_hooks=True)


def dispatch(model, **options):
    from accelerate import dispatch_model

    return dispatch_model(model, **options)


def offload_cpu(model, folder):
    from accelerate import cpu_offload

    return cpu_offload(model, execution_device=torch.device("cpu"))


def offload_disk(model, folder):
    from accelerate import disk_offload

    return disk_offload(model, folder, execution_device=torch.device("cpu"))


DISPATCHING = [dispatch_hooks, dispatch_halves, dispatch_disk, offload_cpu, offload_disk]
each_dispatch = pytest.mark.parametrize("spread", DISPATCHING, ids=lambda f: f.__name__)


def forwards(model):
    """accelerate puts its own forward on the instances."""
    return {name: (vars(module).get("forward"), vars(module).get("_hf_hook")) for name, module in model.named_modules()}


@pytest.fixture(scope="module")
def plain():
    """Logits, tokens and kept positions of a plain model, pruned and not."""
    seen = {}

    def results(family):
        if family not in seen:
            model, inputs = tiny.FAMILIES[family](), tiny.batch(family, three(family))
            vanilla = logits(model, inputs), model.generate(**inputs, **GREEDY)
            with attach(model, AdaptInfer(schedule=TWO_STAGES)) as handle:
                pruned = logits(model, inputs), model.generate(**inputs, **GREEDY)
                seen[family] = inputs, vanilla, pruned, kept(handle.report)
        return seen[family]

    return results


def same(model, inputs, expected):
    assert torch.equal(logits(model, inputs), expected[0])
    assert torch.equal(model.generate(**inputs, **GREEDY), expected[1])


@each_dispatch
@pytest.mark.parametrize("family", ["llava", pytest.param("qwen2_5_vl", marks=pytest.mark.full)])
def test_attached_to_a_dispatched_model(plain, spread, family, tmp_path):
    pytest.importorskip("accelerate")
    inputs, vanilla, pruned, positions = plain(family)
    model = spread(tiny.FAMILIES[family](), tmp_path)
    if spread not in (dispatch_hooks, dispatch_halves):
        assert any(parameter.device.type == "meta" for parameter in model.parameters())
    same(model, inputs, vanilla)
    before = forwards(model)
    with attach(model, AdaptInfer(schedule=TWO_STAGES)) as handle:
        same(model, inputs, pruned)
        assert kept(handle.report) == positions
        with adaptinfer.disabled(model):
            same(model, inputs, vanilla)
    assert forwards(model) == before
    same(model, inputs, vanilla)


@each_dispatch
def test_dispatched_while_attached(plain, spread, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    inputs, vanilla, pruned, positions = plain("llava")
    model = tiny.llava()
    handle = attach(model, AdaptInfer(schedule=TWO_STAGES))
    spread(model, tmp_path)
    same(model, inputs, pruned)
    assert kept(handle.report) == positions
    before = forwards(model)
    handle.detach()
    after = forwards(model)
    if spread is not dispatch_halves:  # else accelerate hooked the multimodal model itself, around the pruner
        assert before.pop("model")[0] is not None and after.pop("model") == (None, None)
    assert after == before, "accelerate's own stay"
    same(model, inputs, vanilla)
    with attach(model, AdaptInfer(schedule=TWO_STAGES)):
        same(model, inputs, pruned)
    if spread in (dispatch_hooks, dispatch_halves):
        accelerate.hooks.remove_hook_from_submodules(model)
        same(model, inputs, vanilla)


def test_accelerate_lets_go_of_an_attached_model(plain):
    """It puts back the forward of before. If that was the pruner's, all is well; if not, it is said."""
    accelerate = pytest.importorskip("accelerate")
    inputs, vanilla, pruned, _ = plain("llava")
    model = tiny.llava()
    with attach(model, AdaptInfer(schedule=TWO_STAGES)):
        accelerate.hooks.remove_hook_from_submodules(dispatch_halves(model, None))
        same(model, inputs, pruned)
    same(model, inputs, vanilla)
    model = dispatch_halves(tiny.llava(), None)
    handle = attach(model, AdaptInfer(schedule=TWO_STAGES))
    accelerate.hooks.remove_hook_from_submodules(model)
    with pytest.raises(AdaptInferError, match="was replaced while a pruner is attached"):
        logits(model, inputs)
    handle.detach()
    same(model, inputs, vanilla)


def test_an_unknown_model_is_probed_though_its_weights_are_away(monkeypatch, tmp_path):
    pytest.importorskip("accelerate")
    from adaptinfer.engine import families

    monkeypatch.delitem(families.TESTED, "llava")
    inputs = tiny.batch("llava", three("llava"))
    whole, away = tiny.llava(), offload_disk(tiny.llava(), tmp_path)
    with attach(whole, AdaptInfer(schedule=TWO_STAGES)), attach(away, AdaptInfer(schedule=TWO_STAGES)):
        assert torch.equal(logits(away, inputs), logits(whole, inputs))


@pytest.mark.parametrize("change", ["bfloat16", "half", "float64"])
def test_a_model_may_be_cast_and_moved_while_attached(change):
    inputs = tiny.batch("llava", three("llava"))
    dtype = {"bfloat16": torch.bfloat16, "half": torch.half, "float64": torch.float64}[change]
    before, after = tiny.llava().to(dtype), tiny.llava()
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with (
        attach(before, AdaptInfer(schedule=TWO_STAGES)) as first,
        attach(after, AdaptInfer(schedule=TWO_STAGES)) as second,
    ):
        if change == "half":
            after.half()
        else:
            after.to("cpu", dtype)
        same(after, inputs, (logits(before, inputs), before.generate(**inputs, **GREEDY)))
        assert kept(first.report) == kept(second.report)


# -- threads and tasks -----------------------------------------------------------------------------------------------


def together(*works):
    """Run functions at once, each in a thread of its own, switching inside forwards; returns what they raised."""
    start, failures = threading.Barrier(len(works)), []

    def run(work):
        try:
            start.wait()
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    return failures


def expected_of(model, handle, inputs, **options):
    tokens = model.generate(**inputs, **GREEDY, **options)
    return tokens, kept(handle.report), logits(model, inputs)


def repeatedly(model, handle, inputs, expected, rounds, **options):
    def work():
        for _ in range(rounds):
            tokens, chosen, whole = expected_of(model, handle, inputs, **options)
            assert torch.equal(tokens, expected[0]) and chosen == expected[1] and torch.equal(whole, expected[2])

    return work


def test_threads_with_prompts_of_their_own(models):
    """Assisted decoding reads the prompt's length, which differs from thread to thread, out of a context variable."""
    model = models("llava")
    prompts = [tiny.batch("llava", [tiny.simple("llava", seed=s, before=3 + 9 * s, after=4 + 5 * s)]) for s in range(2)]
    prompts.append(tiny.batch("llava", three("llava")))
    guesses = [{"prompt_lookup_num_tokens": 3}, {}, {}]
    if not transformers_at_least(5, 15):
        guesses[0] = {}
    with attach(model, AdaptInfer(schedule=TWO_STAGES)) as handle:
        expected = [expected_of(model, handle, p, **o) for p, o in zip(prompts, guesses, strict=True)]
        works = [repeatedly(model, handle, p, e, 6, **o) for p, e, o in zip(prompts, expected, guesses, strict=True)]
        assert not together(*works)


def transformers_at_least(*version):
    import transformers

    return tuple(map(int, transformers.__version__.split(".")[:2])) >= version


def test_two_models_with_two_pruners_in_two_threads(models):
    one, other = models("llava"), models("qwen2_5_vl")
    first, second = (tiny.batch(family, three(family)) for family in ("llava", "qwen2_5_vl"))
    schedule = Schedule((Stage(1, 11), Stage(2, 5)), tiny.LAYERS)
    with (
        attach(one, AdaptInfer(schedule=TWO_STAGES, positions="compact")) as a,
        attach(other, Random(schedule=schedule)) as b,
    ):
        expected = expected_of(one, a, first), expected_of(other, b, second)
        assert not together(
            repeatedly(one, a, first, expected[0], 6),
            repeatedly(other, b, second, expected[1], 6),
        )


def test_one_thread_prunes_while_the_other_does_not(models):
    model, inputs = models("llava"), tiny.batch("llava", three("llava"))
    vanilla = logits(model, inputs), model.generate(**inputs, **GREEDY)
    with attach(model, AdaptInfer(schedule=TWO_STAGES)) as handle:
        expected = expected_of(model, handle, inputs)

        def without():
            for _ in range(6):
                with adaptinfer.disabled(model):
                    same(model, inputs, vanilla)
                assert torch.equal(logits(model, inputs), expected[2])

        assert not together(without, repeatedly(model, handle, inputs, expected, 6))


def test_threads_whose_prompts_are_pruned_at_other_layers(models):
    """A budget gives each number of vision tokens stages of its own, and hooks come to layers while others run."""
    model = models("qwen2_5_vl")
    grids = [(1, 12, 16), (1, 8, 8), (1, 16, 20)]
    inputs = [tiny.batch("qwen2_5_vl", [tiny.simple("qwen2_5_vl", seed=4, grid=grid)]) for grid in grids]
    expected = []
    for item in inputs:
        with attach(model, AdaptInfer(budget=14)) as handle:
            expected.append((logits(model, item), kept(handle.report), [stage.layer for stage in handle.report.stages]))
    with attach(model, AdaptInfer(budget=14)) as handle:

        def run(item, right):
            def work():
                for _ in range(6):
                    assert torch.equal(logits(model, item), right[0])
                    assert kept(handle.report) == right[1]

            return work

        assert not together(*map(run, inputs, expected))


def test_detach_waits_for_nobody(models):
    """While another thread runs the model, detach refuses instead of pulling the hooks out from under it."""
    model, inputs = models("llava"), tiny.batch("llava", three("llava"))
    handle, inside, go_on = attach(model, AdaptInfer(schedule=TWO_STAGES)), threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        go_on.wait(30)

    hook = model.get_decoder().layers[2].register_forward_pre_hook(wait)
    thread = threading.Thread(target=logits, args=(model, inputs))
    try:
        thread.start()
        assert inside.wait(30)
        with pytest.raises(AdaptInferError, match="is running"):
            handle.detach()
    finally:
        go_on.set()
        thread.join()
        hook.remove()
        handle.detach()


def test_tasks_of_one_thread_do_not_share_disabled(models):
    model, inputs = models("llava"), tiny.batch("llava", three("llava"))
    vanilla = logits(model, inputs)

    async def without(turns):
        with adaptinfer.disabled(model):
            for _ in range(4):
                await turns.wait()
                assert torch.equal(logits(model, inputs), vanilla)
                # to_thread takes the task's context along, a thread of its own does not.
                assert torch.equal(await asyncio.to_thread(logits, model, inputs), vanilla)
        assert torch.equal(logits(model, inputs), pruned)

    async def within(turns):
        turns.set()
        for _ in range(4):
            await asyncio.sleep(0)
            assert torch.equal(logits(model, inputs), pruned)
            assert torch.equal(await asyncio.to_thread(logits, model, inputs), pruned)

    async def both():
        turns = asyncio.Event()
        await asyncio.gather(without(turns), within(turns), without(turns))

    with attach(model, AdaptInfer(schedule=TWO_STAGES)):
        pruned = logits(model, inputs)
        assert not torch.equal(pruned, vanilla)
        asyncio.run(both())
        assert torch.equal(logits(model, inputs), pruned)
