"""``adaptinfer serve``: the embedded model answers on an OpenAI-compatible API, with a picture in the request."""

from __future__ import annotations

import base64
import concurrent.futures
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image
from transformers.utils.import_utils import is_serve_available
from typer.testing import CliRunner

import adaptinfer
from adaptinfer import AdaptInfer
from adaptinfer.ask import Checkpoint, ask
from adaptinfer.cli import app
from adaptinfer.pictures import Picture
from adaptinfer.serving import server as serving

SCENE = Path(__file__).parent.parent / "examples" / "scene.png"
PRUNER = AdaptInfer(budget=0.33)
needs_server = pytest.mark.skipif(not is_serve_available(), reason="needs the extra serve: fastapi, uvicorn, openai")


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def body(text: str, *pictures: str, **more) -> dict:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    return {"model": "embedded", "messages": messages, "max_tokens": 8, "temperature": 0, **more}


@pytest.fixture(scope="module")
def url():
    """A server started as a user starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "adaptinfer", "serve", "--port", str(port), "--config", '{"budget": 0.33}']
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        base = f"http://127.0.0.1:{port}"
        try:
            for _ in range(300):
                if process.poll() is not None:
                    pytest.fail(process.communicate()[0])
                try:
                    with urllib.request.urlopen(f"{base}/health", timeout=5):
                        break
                except (urllib.error.URLError, OSError):
                    time.sleep(0.5)
            yield base
        finally:
            process.terminate()
            process.communicate()


def send(url: str, content: dict | bytes, path: str = "/v1/chat/completions") -> tuple[int, str]:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def answer(url: str, content: dict) -> str:
    status, text = send(url, content)
    assert status == 200, text
    return json.loads(text)["choices"][0]["message"]["content"].strip()


def wanted(*questions: str) -> list[str]:
    checkpoint = Checkpoint("embedded")
    picture = Picture(str(SCENE), Image.open(SCENE).convert("RGB"))
    return [ask(checkpoint, checkpoint.prompt([picture], each), PRUNER, max_new_tokens=8).text for each in questions]


@needs_server
def test_a_picture_in_the_request(url):
    questions = ["What colour is the star?", "How many circles do you see?"]
    scene = data_url(SCENE.read_bytes())
    assert [answer(url, body(question, scene)) for question in questions] == wanted(*questions)
    with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as response:
        assert [entry["id"] for entry in json.load(response)["data"]] == ["embedded"]


@needs_server
def test_streaming(url):
    question, scene = "What colour is the star?", data_url(SCENE.read_bytes())
    status, text = send(url, body(question, scene, stream=True))
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    pieces = [event["choices"][0]["delta"].get("content") or "" for event in events]
    assert (status, "".join(pieces).strip()) == (200, wanted(question)[0])


@needs_server
def test_bad_requests_are_told_so_while_others_go_on(url):
    scene, question = data_url(SCENE.read_bytes()), "What colour is the star?"
    bad = [
        (b"{", 400, "not valid JSON"),
        (b"[]", 400, "must be a JSON object"),
        (body(question, data_url(b"no picture")), 400, ""),
        (body(question, str(SCENE)), 400, "image_url: must start with data:"),
        (body(question, "file:///etc/hostname"), 400, "image_url: must start with data:"),
        (body("star " * 5000, scene), 400, "tokens, and this model takes"),
        ({"model": "embedded"}, 400, "'messages' is missing"),
        ({**body(question, scene), "model": "another"}, 404, "this server has one model"),
        ({**body(question, scene), "colour": 1}, 422, "Unexpected fields"),
    ]
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        good = [threads.submit(answer, url, body(question, scene)) for _ in range(4)]
        refused = [threads.submit(send, url, content) for content, _, _ in bad]
        for (_, status, message), future in zip(bad, refused, strict=True):
            got, text = future.result()
            assert (got, message in json.loads(text)["error"]["message"]) == (status, True), text
        assert {each.result() for each in good} == set(wanted(question))


@needs_server
def test_the_address_is_taken():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = CliRunner().invoke(app, ["serve", "--port", str(taken.getsockname()[1])])
    assert result.exit_code == 2
    assert last_line(result).startswith("error: --host 127.0.0.1 --port")


def test_without_the_packages_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(adaptinfer.InputError, match="pip install 'adaptinfer\\[serve\\]'"):
        serving.application(Checkpoint("embedded"), PRUNER)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "{"], "--config: not valid JSON"),
        (["--config", '{"preset": "llava-1.5-7b/64"}'], "num_layers: the schedule is for 32 layers"),
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--vanilla", "--config", "{}"], "--vanilla and --config: give only one"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_refused_before_any_work(arguments, message, monkeypatch):
    monkeypatch.delenv("ADAPTINFER_CONFIG", raising=False)
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == 2
    assert last_line(result).startswith("error: ")
    assert message in result.stderr


def last_line(result) -> str:
    return result.stderr.strip().splitlines()[-1]
