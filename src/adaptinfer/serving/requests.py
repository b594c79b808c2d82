"""What a request to the small server may say, checked before the model's own code sees it; knows no web framework."""

from __future__ import annotations

import base64
import io
import json
import urllib.request
from collections.abc import Iterator
from typing import Any

from PIL import Image

from adaptinfer.errors import InputError, first_line

_ROLES = ("system", "developer", "user", "assistant", "tool")
_TIMEOUT_SECONDS = 20
_LARGEST_BYTES = 64 * 2**20


def check_chat(body: dict[str, Any]) -> None:
    """Check the body of a chat completion.

    Raises:
        InputError: a field has a value that it cannot have; the message names it.
    """
    _check_sampling(body)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InputError("messages: must be a list of at least one message")
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            raise InputError(f"{where}: must be an object with role and content")
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES:
            raise InputError(f"{where}.role: must be one of {', '.join(_ROLES)}, not {role!r}")
        if isinstance(content, str) or (content is None and role == "assistant"):
            continue
        if not isinstance(content, list) or not content:
            raise InputError(f"{where}.content: must be text or a list of at least one part")
        for place, part in enumerate(content):
            _check_part(part, f"{where}.content[{place}]")


def check_completion(body: dict[str, Any]) -> None:
    """Check the body of a completion without a chat.

    Raises:
        InputError: as `check_chat`.
    """
    _check_sampling(body)
    if not isinstance(body.get("prompt"), str) or not body["prompt"]:
        raise InputError("prompt: must be text, and not empty")


def inline_pictures(body: dict[str, Any]) -> None:
    """Fetch the pictures of a checked chat and put them into it, so that nothing later reads the web or a disk.

    Raises:
        InputError: a picture cannot be fetched or decoded.
    """
    for part, where in _pictures(body):
        url = _url(part)
        data = _decoded(url, where) if url.startswith("data:") else _fetched(url, where)
        try:
            with Image.open(io.BytesIO(data)) as picture:
                picture.load()
        except Exception as error:  # decoders raise of all kinds: OSError, SyntaxError, struct.error, a bomb's own
            raise InputError(f"{where}: is no picture that can be read ({first_line(error)})") from error
        part["image_url"] = {"url": "data:image/any;base64," + base64.b64encode(data).decode()}


def _check_part(part: Any, where: str) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise InputError(f"{where}.text: must be text")
    elif kind == "image_url":
        url = _url(part)
        # A path would be read from the server's own disk.
        if not isinstance(url, str) or not url.startswith(("data:", "http://", "https://")):
            raise InputError(f"{where}.image_url: must start with data:, http:// or https://")
    else:
        raise InputError(f"{where}.type: must be text or image_url, not {kind!r}")


def _check_sampling(body: dict[str, Any]) -> None:
    """Ranges of what sampling reads; a field that is absent or null has its default."""
    numbers = {
        "temperature": (lambda value: 0 <= value <= 2, "a number from 0 to 2"),
        "top_p": (lambda value: 0 < value <= 1, "a number above 0 and at most 1"),
        "frequency_penalty": (lambda value: -1 < value <= 2, "a number above -1 and at most 2"),
    }
    whole = {
        "max_tokens": (lambda value: value >= 1, "a whole number of at least 1"),
        "max_completion_tokens": (lambda value: value >= 1, "a whole number of at least 1"),
        "seed": (lambda value: 0 <= value < 2**63, "a whole number from 0 to 2**63 - 1"),
        "n": (lambda value: value == 1, "1; this server gives one answer"),
    }
    for fields, types in ((numbers, (int, float)), (whole, (int,))):
        for name, (fits, range_) in fields.items():
            value = body.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, types) or not fits(value):
                raise InputError(f"{name}: must be {range_}, not {value!r}")
    _check_promises(body)
    if not isinstance(body.get("stream") or False, bool):
        raise InputError(f"stream: must be true or false, not {body['stream']!r}")
    stop = body.get("stop")
    texts = stop if isinstance(stop, list) else [stop]
    if stop is not None and not (texts and all(isinstance(text, str) and text for text in texts)):
        raise InputError("stop: must be text or a list of texts, none of them empty")


def _check_promises(body: dict[str, Any]) -> None:
    """Refuse what transformers' server takes and then leaves undone, and shapes that it would trip over."""
    for name, unasked in (
        ("logprobs", (False, 0)),
        ("top_logprobs", (0,)),
        ("presence_penalty", (0,)),
        ("response_format", ({"type": "text"},)),
        ("tools", ([],)),
        ("tool_choice", ("none", "auto")),
        ("best_of", (1,)),
        ("suffix", ("",)),
    ):
        value = body.get(name)
        if value is not None and value not in unasked:
            raise InputError(f"{name}: this server does not do that; leave it out")
    bias = body.get("logit_bias")
    if bias is not None and not (isinstance(bias, dict) and all(map(_is_bias, bias.items()))):
        raise InputError('logit_bias: must be an object of token numbers and biases, such as {"7": -1.5}')
    if bias is not None:
        body["logit_bias"] = {token: float(value) for token, value in bias.items()}  # transformers takes only floats
    if not isinstance(body.get("stream_options") or {}, dict):
        raise InputError("stream_options: must be an object")
    if body.get("generation_config") is not None:
        try:
            settings = json.loads(body["generation_config"])
        except (TypeError, ValueError):
            settings = None
        if not isinstance(settings, dict):
            raise InputError("generation_config: must be text that holds a JSON object")


def _is_bias(entry: tuple[str, Any]) -> bool:
    token, bias = entry
    return token.isdecimal() and isinstance(bias, (int, float)) and not isinstance(bias, bool)


def _pictures(body: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    for number, message in enumerate(body["messages"]):
        if isinstance(message.get("content"), list):
            for place, part in enumerate(message["content"]):
                if part["type"] == "image_url":
                    yield part, f"messages[{number}].content[{place}].image_url"


def _url(part: dict[str, Any]) -> Any:
    url = part.get("image_url")
    return url.get("url") if isinstance(url, dict) else url


def _decoded(url: str, where: str) -> bytes:
    head, comma, text = url.partition(",")
    try:
        if not comma or not head.endswith(";base64"):
            raise ValueError("data:image/png;base64,... is the form")
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise InputError(f"{where}: is no base64 data URL ({first_line(error)})") from error


def _fetched(url: str, where: str) -> bytes:
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "adaptinfer"})
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:  # http or https only
            data = response.read(_LARGEST_BYTES + 1)
    except Exception as error:  # OSError, HTTPException, ValueError of an odd address
        raise InputError(f"{where}: cannot be fetched ({first_line(error)})") from error
    if len(data) > _LARGEST_BYTES:
        raise InputError(f"{where}: is larger than {_LARGEST_BYTES // 2**20} MiB")
    return data
