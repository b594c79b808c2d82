# pyright: reportMissingImports=false
"""An OpenAI-compatible server for one user or a laptop: transformers' own request handling around a pruned model.

Requests are answered one after the other, as ``model.generate`` does. For many users there is the vLLM plug-in.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any

from adaptinfer.checkpoints import Checkpoint
from adaptinfer.engine.attach import attach
from adaptinfer.errors import InputError, first_line
from adaptinfer.pruners import Pruner
from adaptinfer.serving.requests import check_chat, check_completion, inline_pictures

_MISSING = (
    "adaptinfer serve needs the server that comes with transformers 5.19 and newer: pip install 'adaptinfer[serve]'"
)
_CHAT, _COMPLETION = "/v1/chat/completions", "/v1/completions"


def application(checkpoint: Checkpoint, pruner: Pruner | None) -> Any:
    """The web application: ``/v1/chat/completions``, ``/v1/completions``, ``/v1/models`` and ``/health``.

    Args:
        checkpoint: its weights are loaded here.
        pruner: attached to the model; None serves the model as it is.

    Raises:
        InputError: packages for serving are missing, or the weights cannot be read.
        UnsupportedError: the model cannot be pruned.
    """
    try:
        from fastapi import FastAPI, HTTPException, Request
        from fastapi.responses import JSONResponse
        from jinja2 import TemplateError
        from starlette.exceptions import HTTPException as AnyHTTPException
        from transformers.cli.serving.chat_completion import ChatCompletionHandler
        from transformers.cli.serving.completion import CompletionHandler
        from transformers.cli.serving.model_manager import ModelManager
        from transformers.cli.serving.utils import GenerationState
    except ImportError:
        raise InputError(_MISSING) from None

    processor, model = checkpoint.processor, checkpoint.load()
    if pruner is not None:
        attach(model, pruner)
    longest = getattr(checkpoint.config.get_text_config(), "max_position_embeddings", None)
    model.generate = _bounded(model.generate, longest)

    class OneModel(ModelManager):
        """Holds the model that is there, whatever name a request gives it."""

        def _load_model(self, *args: Any, **kwargs: Any) -> Any:
            return model

        def _load_processor(self, *args: Any, **kwargs: Any) -> Any:
            return processor

    parts: dict[str, Any] = {
        "model_manager": OneModel(force_model=checkpoint.name, device=checkpoint.device),
        "generation_state": GenerationState(),
    }
    handlers = {
        _CHAT: ChatCompletionHandler(**parts, chat_template_kwargs={}),
        _COMPLETION: CompletionHandler(**parts),
    }
    app = FastAPI(title="adaptinfer serve", docs_url=None, redoc_url=None)
    started = int(time.time())

    async def answer(request: Request) -> Any:
        try:
            body = await request.json()
        except ValueError:
            raise HTTPException(400, "the body is not valid JSON") from None
        if not isinstance(body, dict):
            raise HTTPException(400, "the body must be a JSON object")
        if body.pop("model", checkpoint.name) != checkpoint.name:
            raise HTTPException(404, f"this server has one model, {checkpoint.name!r}")
        path = request.url.path
        try:
            if path == _CHAT:
                check_chat(body)
                await asyncio.to_thread(inline_pictures, body)
            else:
                check_completion(body)
            return await handlers[path].handle_request(body, f"chatcmpl-{uuid.uuid4().hex}")
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, TemplateError) as error:
            # The last five: fields that handlers and chat templates read unchecked, such as tools.
            raise HTTPException(400, _why(error)) from error

    for path in handlers:
        app.add_route(path, answer, methods=["POST"])

    @app.get("/v1/models")
    def models() -> Any:
        entry = {"id": checkpoint.name, "object": "model", "created": started, "owned_by": "adaptinfer"}
        return {"object": "list", "data": [entry]}

    @app.get("/health")
    def health() -> Any:
        return {"status": "ok"}

    def told(status: int, message: str) -> Any:
        kind = "invalid_request_error" if status < 500 else "server_error"
        content = {"error": {"message": message, "type": kind, "param": None, "code": status}}
        return JSONResponse(content, status_code=status)

    @app.exception_handler(AnyHTTPException)
    async def refuse(request: Request, error: AnyHTTPException) -> Any:
        return told(error.status_code, str(error.detail))

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> Any:
        return told(500, f"{type(error).__name__}: {_why(error)}")

    return app


def run(checkpoint: Checkpoint, pruner: Pruner | None, host: str, port: int) -> None:
    """Serve until interrupted.

    Raises:
        InputError: as `application`, or the address is taken.
    """
    try:
        import uvicorn
    except ImportError:
        raise InputError(_MISSING) from None
    app = application(checkpoint, pruner)
    config = uvicorn.Config(app, host=host, port=port, log_level="info")
    try:
        server_socket = config.bind_socket()
    except SystemExit:  # how uvicorn reports it
        raise InputError(f"--host {host} --port {port}: the address is invalid or in use") from None
    uvicorn.Server(config).run(sockets=[server_socket])


def _bounded(generate: Any, longest: int | None) -> Any:
    """Refuse prompts that are longer than the model's positions, which transformers would answer with nonsense."""

    def checked(*args: Any, **kwargs: Any) -> Any:
        ids = kwargs.get("input_ids")
        if longest is not None and ids is not None and ids.shape[-1] >= longest:
            raise InputError(f"the prompt has {ids.shape[-1]} tokens, and this model takes {longest - 1} at most")
        return generate(*args, **kwargs)

    return checked


def _why(error: BaseException) -> str:
    if isinstance(error, KeyError):
        return f"{error.args[0]!r} is missing"
    return first_line(error)
