"""The OpenAI API of vLLM through a real client: streaming, bad requests beside good ones, metrics, the log line."""

from __future__ import annotations

import base64
import concurrent.futures
import io
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest
from conftest import picture, words
from reference import chat_answers

from adaptinfer import AdaptInfer, Schedule, Stage, embedded
from adaptinfer.serving.settings import to_json

# The embedded model's chat template leaves the first token to the tokenizer, which vLLM's chat calls only if told to.
EXTRA = {"ignore_eos": True, "add_special_tokens": True}
PRUNER = AdaptInfer(schedule=Schedule((Stage(1, 120), Stage(4, 48), Stage(8, 16)), 12, vision_tokens=256))


def data_url(image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def message(text: str, *urls: str) -> list[dict]:
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Base URL and log file of a server that runs the embedded model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("VLLM_ENABLE", "VLLM_LOGGING"))
    }
    environment |= {"ADAPTINFER_CONFIG": to_json(PRUNER), "VLLM_LOG_STATS_INTERVAL": "1"}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(embedded.path())]
    command += ["--served-model-name", "scenes", "--port", str(port), "--dtype", "float32", "--max-model-len", "1024"]
    command += ["--limit-mm-per-prompt", '{"image": 2}', "--kv-cache-memory-bytes", str(2**28)]
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file, env=environment) as process:
        url = f"http://127.0.0.1:{port}"
        try:
            for _ in range(600):
                if process.poll() is not None:
                    pytest.fail(log.read_text()[-3000:])
                try:
                    if httpx.get(f"{url}/health", timeout=1).status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(1)
            yield url, log
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0, timeout=300)


def ask(client: openai.OpenAI, messages: list[dict], **more) -> str:
    answer = client.chat.completions.create(
        model="scenes", messages=messages, temperature=0, max_tokens=8, extra_body=EXTRA, **more
    )
    return answer.choices[0].message.content.strip()


def test_many_clients_and_bad_requests(server, client, processes):
    good = [(f"{words(2 + seed % 9, seed)}?", [picture(seed), picture(seed + 50)][: seed % 3]) for seed in range(64)]
    wanted = processes.submit(chat_answers, str(embedded.path()), PRUNER, good, 8).result()
    corrupt = "data:image/png;base64," + base64.b64encode(b"no picture").decode()
    three = [data_url(picture(seed)) for seed in range(3)]
    bad = [
        lambda: ask(client, message("what?", corrupt)),
        lambda: ask(client, message("what?", *three)),
        lambda: ask(client, message(words(1100, 1), three[0])),
        lambda: client.chat.completions.create(
            model="scenes", messages=message("what?", three[0]), max_tokens=4, extra_body={"prompt_logprobs": 1}
        ),
    ]

    def refused(send) -> int:
        with pytest.raises(openai.APIStatusError) as caught:
            send()
        return caught.value.status_code

    def dropped(text: str) -> None:
        """A client that hangs up in the middle of a stream."""
        body = {
            "model": "scenes",
            "messages": message(text, three[1]),
            "max_tokens": 300,
            "stream": True,
            "ignore_eos": True,
        }
        with httpx.stream("POST", f"{server[0]}/v1/chat/completions", json=body, timeout=60) as response:
            next(response.iter_lines())

    with concurrent.futures.ThreadPoolExecutor(32) as threads:
        answers = [threads.submit(ask, client, message(text, *map(data_url, pictures))) for text, pictures in good]
        refusals = [threads.submit(refused, send) for send in bad * 4]
        drops = [threads.submit(dropped, words(5, seed)) for seed in range(8)]
        assert [answer.result() for answer in answers] == [text.strip() for text in wanted]
        assert {refusal.result() for refusal in refusals} == {400}
        for drop in drops:
            drop.result()
    text, pictures = good[1]
    assert ask(client, message(text, *map(data_url, pictures))) == wanted[1].strip()
    assert ask(client, message("what?", three[0]))  # a picture that came with refused requests


def test_streaming_says_the_same(client):
    messages = message("what colour is the star?", data_url(picture(3)))
    stream = client.chat.completions.create(
        model="scenes", messages=messages, temperature=0, max_tokens=8, stream=True, extra_body=EXTRA
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert len(pieces) > 4
    assert "".join(pieces).strip() == ask(client, messages)


def test_metrics_and_log_line(server, client):
    def metrics() -> dict[str, float]:
        lines = httpx.get(f"{server[0]}/metrics").text.splitlines()
        ours = [line.rsplit(" ", 1) for line in lines if line.startswith("adaptinfer:") and "_created" not in line]
        return {
            name.replace('engine="0",', "").replace(',model_name="scenes"', ""): float(value) for name, value in ours
        }

    time.sleep(2)
    before = metrics()
    for seed in range(3):
        ask(client, message("what?", data_url(picture(seed)), data_url(picture(seed + 1))))
    ask(client, message("what?"))
    time.sleep(3)
    grown = {name: value - before.get(name, 0) for name, value in metrics().items()}
    total = {name.partition("{")[0]: value for name, value in grown.items() if "layer=" not in name}
    assert total["adaptinfer:vision_tokens_in_total"] == 3 * 512
    assert total["adaptinfer:pruned_prefills_total"] == 3
    assert total["adaptinfer:vision_token_layers_total"] == 3 * sum(PRUNER.plan(12, 512).tokens_per_layer(512))
    assert total["adaptinfer:scoring_seconds_total"] > 0
    kept = {name.split('layer="')[1].split('"')[0]: value for name, value in grown.items() if "layer=" in name}
    assert kept == {"1": 3 * 240, "4": 3 * 96, "8": 3 * 32}
    assert "AdaptInfer: pruned prefills: " in Path(server[1]).read_text()
