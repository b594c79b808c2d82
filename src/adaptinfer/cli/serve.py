"""The sub-command ``adaptinfer serve``."""

from __future__ import annotations

from typing import Annotated

import typer

from adaptinfer.errors import InputError

__all__ = ["register"]


def register(app: typer.Typer, epilog: str) -> None:
    """Add the sub-command to the application."""
    app.command("serve", epilog=epilog)(_serve)


def _serve(
    model: Annotated[
        str,
        typer.Option(help="'embedded', a folder, or an id on the Hugging Face hub.", metavar="NAME"),
    ] = "embedded",
    config: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|FILE|JSON",
            envvar="ADAPTINFER_CONFIG",
            help="What to prune: a folder with adaptinfer_config.json, such a file, or JSON: '{\"budget\": 64}', "
            '\'{"preset": "llava-1.5-7b/64"}\', \'{"method": "random", "budget": 0.2}\'. Taken when nothing is said: a '
            "budget of 0.33.",
            show_default=False,
        ),
    ] = None,
    vanilla: Annotated[bool, typer.Option("--vanilla", help="Serve the model as it is, to compare.")] = False,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    device: Annotated[
        str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1; auto is a GPU if there is one.")
    ] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the checkpoint.")
    ] = False,
) -> None:
    """Serve one model on an OpenAI-compatible API, one request at a time. For many users see docs/guides/vllm.md.

    [dim]adaptinfer serve --model embedded --port 8000[/dim]
    """
    if vanilla and config is not None:
        raise InputError("--vanilla and --config: give only one of them")

    from adaptinfer.cli.app import DEFAULT_BUDGET, _progress, _quieten
    from adaptinfer.serving.settings import check_share, named, pruner_from

    pruner = None if vanilla else pruner_from({"budget": DEFAULT_BUDGET} if config is None else config, "--config")
    with _progress() as progress:
        progress("loading")
        _quieten()
        from adaptinfer.checkpoints import Checkpoint
        from adaptinfer.serving.server import run

        checkpoint = Checkpoint(model, trust_remote_code=trust_remote_code, device=device)
        if pruner is not None:
            with named("--config"):
                checkpoint.check(pruner)
                check_share(pruner, checkpoint.num_layers)
    run(checkpoint, pruner, host, port)
