"""The command ``adaptinfer serve``."""

from __future__ import annotations

from typing import Annotated

import typer

from adaptinfer.cli import terminal
from adaptinfer.cli.options import DEFAULT_BUDGET, Device, Model, TrustRemoteCode
from adaptinfer.errors import InputError


def serve(
    model: Model = "embedded",
    config: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|FILE|JSON",
            envvar="ADAPTINFER_CONFIG",
            help="What to prune: a folder with adaptinfer_config.json, such a file, or JSON: '{\"budget\": 64}', "
            '\'{"preset": "llava-1.5-7b/64"}\', \'{"method": "random", "budget": 0.2}\'. Default: a budget of '
            f"{DEFAULT_BUDGET}.",
            show_default=False,
        ),
    ] = None,
    vanilla: Annotated[bool, typer.Option("--vanilla", help="Serve the model as it is, to compare.")] = False,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Serve one model on an OpenAI-compatible API, one request at a time. For many users see docs/guides/vllm.md.

    [dim]adaptinfer serve --model embedded --port 8000[/dim]
    """
    if vanilla and config is not None:
        raise InputError("--vanilla and --config: give only one of them")

    from adaptinfer.serving.settings import check_share, named, pruner_from

    pruner = None if vanilla else pruner_from({"budget": DEFAULT_BUDGET} if config is None else config, "--config")
    with terminal.spinner() as progress:
        progress("loading")
        terminal.quieten()
        from adaptinfer.checkpoints import Checkpoint
        from adaptinfer.serving.server import run

        checkpoint = Checkpoint(model, trust_remote_code=trust_remote_code, device=device)
        if pruner is not None:
            with named("--config"):
                checkpoint.check(pruner)
                check_share(pruner, checkpoint.num_layers)
    run(checkpoint, pruner, host, port)
