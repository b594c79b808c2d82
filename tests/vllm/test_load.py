"""Right under load: preemption, aborts, reused blocks, prefixes, chunks; and nothing left over."""

from __future__ import annotations

import random
from typing import Any

import pytest
from conftest import Request, engine, inputs, parameters, picture, request, served, words
from test_tokens import THREE, mixed

from adaptinfer import AdaptInfer

PRUNER = AdaptInfer(schedule=THREE)


def scheduler_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def runner_of(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.model_runner


def assert_nothing_left(llm: Any) -> None:
    """No request, no block, no state of a finished or aborted request remains in scheduler, runner or model."""
    scheduler, runner = scheduler_of(llm), runner_of(llm)
    assert not scheduler.requests and not scheduler.running and not scheduler.waiting
    pool = scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1  # all but the null block
    if scheduler.finished_req_ids:  # the runner hears of them with the next step
        served(llm, [Request("USER: what ASSISTANT:")])
    assert len(runner.requests) <= 1
    pruning = runner.get_model().pruning
    assert pruning._step is None and pruning._batch is None


def drive(llm: Any, requests: list[Request], act: Any = None) -> dict[str, list[int]]:
    """Add all requests and step until the engine is idle; `act(step, engine)` may interfere. Tokens by request id."""
    engine, finished = llm.llm_engine, {}
    for number, (prompt, settings) in enumerate(zip(inputs(requests), parameters(requests), strict=True)):
        engine.add_request(str(number), prompt, settings)
    step = 0
    while engine.has_unfinished_requests():
        if act is not None:
            act(step, engine)
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = list(output.outputs[0].token_ids)
        step += 1
    return finished


def counted(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often a method is called from now on."""
    calls, method = [0], getattr(owner, name)

    def count(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, count)
    return calls


def test_preemption_and_recomputation(folder, reference, monkeypatch):
    requests = mixed(48)
    for each in requests:
        each.new_tokens += 40
    wanted = reference("llava").tokens(PRUNER, requests)
    with engine(folder("llava"), PRUNER, kv_blocks=40, max_model_len=512) as llm:
        preemptions = counted(scheduler_of(llm), "_preempt_request", monkeypatch)
        assert served(llm, requests) == wanted
        assert preemptions[0] >= 5
        assert_nothing_left(llm)


def test_abort_storm(folder, reference):
    requests = mixed(96)
    for each in requests:
        each.new_tokens += 10
    wanted = reference("llava").tokens(PRUNER, requests)
    chance = random.Random(0)
    doomed = {str(number) for number in range(len(requests)) if chance.random() < 0.4}
    when = {name: chance.randint(0, 25) for name in doomed}

    def abort(step: int, engine: Any) -> None:
        engine.abort_request([name for name in doomed if when[name] == step])

    with engine(folder("llava"), PRUNER, kv_blocks=64) as llm:
        finished = drive(llm, requests, abort)
        survivors = {str(n): tokens for n, tokens in enumerate(wanted) if str(n) not in doomed}
        assert {name: finished.get(name) for name in survivors} == survivors
        assert len(finished) < len(requests)
        assert_nothing_left(llm)
        assert served(llm, requests[:20]) == wanted[:20]  # in blocks that the aborted ones left half written


def test_long_run_in_reused_blocks(folder, reference):
    requests = mixed(30)
    wanted = reference("llava").tokens(PRUNER, requests)
    with engine(folder("llava"), PRUNER, kv_blocks=48) as llm:
        chance = random.Random(1)
        for _ in range(6):
            order = chance.sample(range(len(requests)), len(requests))
            assert served(llm, [requests[n] for n in order]) == [wanted[n] for n in order]
        assert_nothing_left(llm)


def test_requests_that_arrive_while_others_decode(folder, reference):
    requests = mixed(40)
    wanted = reference("llava").tokens(PRUNER, requests)
    late = dict(enumerate(zip(inputs(requests), parameters(requests), strict=True)))

    with engine(folder("llava"), PRUNER) as llm:

        def arrive(step: int, engine: Any) -> None:
            if step and step in late:
                engine.add_request(str(step), *late[step])

        finished = drive(llm, requests[:1], arrive)
        assert len(finished) > 30  # one arrived in each step
        assert all(tokens == wanted[int(name)] for name, tokens in finished.items())


def test_prefixes_are_shared_before_the_picture_and_never_after(folder, reference, monkeypatch):
    """The same system prompt and picture with other questions, and with nothing after the picture: kept whole then."""
    system, first, second = words(40, 9), picture(1), picture(2)
    requests = []
    for seed in range(8):
        requests += [
            Request(f"{system} {words(6, seed)} ASSISTANT:"),
            Request(f"{system} <image>\n {words(9, seed)} ASSISTANT:", [first], 40),
            Request(f"{system} <image>\n {words(9, seed)} ASSISTANT: {words(30, seed)} <image>", [first, second], 6),
            Request(f"{system} <image>\n {words(9, 0)} ASSISTANT:", [(first, second)[seed % 2]], 6),
        ]
    wanted = reference("llava").tokens(PRUNER, requests)
    with engine(folder("llava"), PRUNER, enable_prefix_caching=True) as llm:
        hits = []
        manager = scheduler_of(llm).kv_cache_manager
        lookup = manager.get_computed_blocks
        monkeypatch.setattr(
            manager,
            "get_computed_blocks",
            lambda r: (found := lookup(r), hits.append((r.adaptinfer_prompt, found[1])))[0],
        )
        for _ in range(2):
            assert [served(llm, [each])[0] for each in requests] == wanted
            assert served(llm, requests) == wanted
        assert any(tokens for prompt, tokens in hits if not prompt.vision)  # text finds what stands before pictures
        assert not any(tokens for prompt, tokens in hits if prompt.prunes)


def test_long_text_in_chunks_beside_pictures(folder, reference):
    """Text alone is chunked as ever; a prompt with a picture waits until a step takes it whole."""
    requests = [request(seed, images=seed % 2) for seed in range(24)]
    for each in requests[::2]:
        each.text = f"USER: {words(900, len(each.text))} ASSISTANT:"
    wanted = reference("llava").tokens(PRUNER, requests)
    with engine(folder("llava"), PRUNER, max_model_len=1024, max_num_seqs=8, max_num_batched_tokens=1040) as llm:
        chunks = []
        scheduler = scheduler_of(llm)
        after = scheduler._update_after_schedule

        def watch(output: Any) -> None:
            chunks.extend(
                (scheduler.requests[name].adaptinfer_prompt, scheduler.requests[name].num_computed_tokens, new)
                for name, new in output.num_scheduled_tokens.items()
            )
            after(output)

        scheduler._update_after_schedule = watch
        assert served(llm, requests) == wanted
    parts = [(prompt, before, new) for prompt, before, new in chunks if before < prompt.length]
    assert any(new < prompt.length for prompt, _, new in parts if not prompt.vision)
    assert all((before, new) == (0, prompt.length) for prompt, before, new in parts if prompt.prunes)
