"""``adaptinfer serve``: the embedded model answers on an OpenAI-compatible API, with a picture in the request."""

from __future__ import annotations

import base64
import concurrent.futures
import functools
import http.server
import json
import socket
import subprocess
import sys
import threading
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
from adaptinfer.ask import ask
from adaptinfer.checkpoints import Checkpoint
from adaptinfer.cli.app import app
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


def said(*parts: dict) -> dict:
    return {"model": "embedded", "messages": [{"role": "user", "content": list(parts)}]}


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
    unasked = {"logprobs": False, "presence_penalty": 0, "response_format": {"type": "text"}, "tools": []}
    assert answer(url, body(questions[0], scene, **unasked, logit_bias={"7": -1})) == wanted(questions[0])[0]
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
        (body(question, data_url(b"no picture")), 400, "messages[0].content[0].image_url: is no picture"),
        (body(question, data_url(SCENE.read_bytes()[:900])), 400, "image_url: is no picture"),
        (body(question, "data:image/png;base64,@@"), 400, "image_url: is no base64 data URL"),
        (body(question, str(SCENE)), 400, "image_url: must start with data:"),
        (body(question, "file:///etc/hostname"), 400, "image_url: must start with data:"),
        (body(question, "http://127.0.0.1:1/x.png"), 400, "image_url: cannot be fetched"),
        (said({"type": "video_url", "video_url": {"url": scene}}), 400, "type: must be text or image_url"),
        (said(), 400, "messages[0].content: must be text or a list"),
        ({"model": "embedded", "messages": []}, 400, "messages: must be a list of at least one message"),
        ({"model": "embedded", "messages": [{"role": "wizard", "content": "hi"}]}, 400, "not 'wizard'"),
        # What the embedded model's own chat template refuses.
        ({"model": "embedded", "messages": [{"role": "system", "content": "hi"}]}, 400, "user and assistant only"),
        (body(question, scene, temperature=-1), 400, "temperature: must be a number from 0 to 2, not -1"),
        (body(question, scene, top_p=5), 400, "top_p: must be a number above 0 and at most 1, not 5"),
        (body(question, scene, max_tokens=0), 400, "max_tokens: must be a whole number of at least 1"),
        (body(question, scene, seed="x"), 400, "seed: must be a whole number"),
        (body(question, scene, n=2), 400, "n: must be 1"),
        (body(question, scene, stop=[""]), 400, "stop: must be text"),
        (body(question, scene, logprobs=True, top_logprobs=3), 400, "logprobs: this server does not do that"),
        (body(question, scene, response_format={"type": "json_object"}), 400, "response_format: this server does not"),
        (body(question, scene, presence_penalty=1), 400, "presence_penalty: this server does not"),
        (body(question, scene, logit_bias={"a": 1}), 400, "logit_bias: must be an object of token numbers"),
        (body(question, scene, stream_options=5), 400, "stream_options: must be an object"),
        (body(question, scene, generation_config="x"), 400, "generation_config: must be text that holds a JSON object"),
        (body("star " * 5000, scene), 400, "tokens, and this model takes"),
        ({"model": "embedded"}, 400, "messages: must be a list"),
        ({**body(question, scene), "model": "another"}, 404, "this server has one model"),
        ({**body(question, scene), "colour": 1}, 422, "Unexpected fields"),
    ]
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        good = [threads.submit(answer, url, body(question, scene)) for _ in range(4)]
        refused = [threads.submit(send, url, content) for content, _, _ in bad]
        for (_, status, message), future in zip(bad, refused, strict=True):
            got, text = future.result()
            error = json.loads(text)["error"]
            assert (got, message in error["message"]) == (status, True), text
            assert (error["type"], error["code"]) == ("invalid_request_error", status)
        assert {each.result() for each in good} == set(wanted(question))


@needs_server
def test_completions_and_unknown_paths(url):
    text = {"model": "embedded", "prompt": "USER: hi ASSISTANT:", "max_tokens": 4}
    assert send(url, text, "/v1/completions")[0] == 200
    for content, path, status, message in [
        ({**text, "prompt": ""}, "/v1/completions", 400, "prompt: must be text"),
        ({**text, "temperature": "hot"}, "/v1/completions", 400, "temperature: must be a number"),
        (text, "/v1/embeddings", 404, "Not Found"),
    ]:
        got, answered = send(url, content, path)
        assert (got, message in json.loads(answered)["error"]["message"]) == (status, True), answered


@needs_server
def test_a_picture_from_the_web(url):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=SCENE.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        question, base = "What colour is the star?", f"http://127.0.0.1:{web.server_port}"
        try:
            assert answer(url, body(question, f"{base}/{SCENE.name}")) == wanted(question)[0]
            status, text = send(url, body(question, f"{base}/none.png"))
        finally:
            web.shutdown()
    assert (status, "cannot be fetched (HTTP Error 404" in text) == (400, True), text


@needs_server
def test_the_model_is_given_one_first_token(url):
    """As `ask` gives it: one, whether the chat template or the tokenizer writes it."""
    question, scene = "What colour is the star?", data_url(SCENE.read_bytes())
    used = json.loads(send(url, body(question, scene))[1])["usage"]["prompt_tokens"]
    checkpoint = Checkpoint("embedded")
    ids = checkpoint.prompt([Picture(str(SCENE), Image.open(SCENE).convert("RGB"))], question).inputs["input_ids"]
    assert used == ids.shape[1]
    assert ids[0].tolist().count(checkpoint.processor.tokenizer.bos_token_id) == 1


def test_a_chat_template_that_writes_the_first_token():
    """The request handling of transformers, as `adaptinfer serve` uses it, adds none to such a template's."""
    processor = Checkpoint("embedded").processor
    first, template = processor.tokenizer.bos_token, processor.chat_template
    message = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    written = [
        processor.apply_chat_template(message, chat_template=each, tokenize=True, return_dict=True)["input_ids"][0]
        for each in (template.removeprefix("{{ bos_token }}").removeprefix(first), f"{first}{template}")
    ]
    assert written[0] == written[1]
    assert list(written[0]).count(processor.tokenizer.bos_token_id) == 1


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
        (["--config", '{"preset": "llava-1.5-7b/64"}'], "--config: num_layers: the schedule is for 32 layers"),
        (["--config", '{"preset": "no/64"}'], "--config: name: there is no preset 'no/64'"),
        (["--config", '{"budget": 0}'], "--config: budget: must be a positive number"),
        (["--config", '{"budget": 0.01}'], "--config: budget: no picture can meet a share of 0.01"),
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
