# pyright: reportMissingImports=false
"""Requests per second and time to first token of vLLM's server, with and without the plug-in, side by side.

    python research/vllm_throughput.py [--shape llava-1b] [--budget 64] [--concurrency 4] [--requests 12] [--rounds 3]

Run it in vLLM's own environment (docs/guides/vllm.md) on a machine that does nothing else. One server for each variant:
vLLM as it comes, its Transformers backend in eager mode (what pruning runs in), and that with a pruner. All have the
same random weights and stay up; rounds go through them in turn, so that a slow minute meets all alike. Each request has
a picture of its own, or vLLM's caches would answer in the model's place.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from common import write
from PIL import Image

from adaptinfer import AdaptInfer, embedded
from adaptinfer.bench.shapes import shape_named
from adaptinfer.serving.settings import to_json

WORDS = ("red", "green", "blue", "star", "heart", "circle", "what", "colour", "is", "the", "how", "many")
PLAIN = ("--model-impl", "transformers", "--enforce-eager")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llava-1b", help="a LLaVA shape of adaptinfer bench")
    parser.add_argument("--budget", type=float, default=64, help="true average of vision tokens a layer gets")
    parser.add_argument("--concurrency", type=int, default=4, help="requests under way at a time")
    parser.add_argument("--requests", type=int, default=12, help="in each round, for each variant")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--text", type=int, default=57, help="words of the question")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint(options.shape, Path(folder))
        pruner = AdaptInfer(budget=options.budget)
        vision = (336 // 14) ** 2
        variants: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
            **({"vLLM as it comes": ((), {})} if has_torchvision() else {}),
            "Transformers backend, eager": (PLAIN, {}),
            f"with AdaptInfer, {options.budget:g} of {vision}": ((), {"ADAPTINFER_CONFIG": to_json(pruner)}),
        }
        servers = {name: Server(folder, options.dtype, *how) for name, how in variants.items()}
        try:
            for server in servers.values():
                server.wait()
                asyncio.run(load(server, options, 2, seed=-1))  # warms up, and is not counted
            rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in servers}
            for number in range(options.rounds):
                for name, server in servers.items():
                    rounds[name].append(asyncio.run(load(server, options, options.requests, seed=number)))
        finally:
            for server in servers.values():
                server.stop()
    show(rounds, "Transformers backend, eager")
    command = " ".join(["python", *sys.argv])
    setup = {key: value for key, value in vars(options).items() if key != "json"}
    print(f"results: {write('vllm_throughput', {'command': command, 'setup': setup, 'rounds': rounds}, options.json)}")


def checkpoint(shape: str, folder: Path) -> None:
    """A folder with config, tokenizer and processor; vLLM makes the weights up (--load-format dummy)."""
    config = shape_named(shape).config()
    config.architectures = ["LlavaForConditionalGeneration"]
    config.image_token_index = config.image_token_id = 4  # of the tokenizer below
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(embedded.path() / name, folder / name)
    processor = json.loads((embedded.path() / "processor_config.json").read_text())
    size = {"height": 336, "width": 336}
    processor["image_processor"] |= {"size": size, "crop_size": size}
    processor |= {"patch_size": 14}
    (folder / "processor_config.json").write_text(json.dumps(processor))


def has_torchvision() -> bool:
    """vLLM's own classes for LLaVA import it; beside a CPU build of torch PyPI's does not import."""
    try:
        import torchvision  # noqa: F401  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError):
        print("left out: vLLM as it comes, whose classes need torchvision")
        return False
    return True


class Server:
    """One vLLM server."""

    def __init__(self, folder: str, dtype: str, arguments: tuple[str, ...], environment: dict[str, str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
        command += [
            "--served-model-name",
            "bench",
            "--port",
            str(self.port),
            "--dtype",
            dtype,
            "--max-model-len",
            "1024",
        ]
        command += ["--load-format", "dummy", "--kv-cache-memory-bytes", str(2**30), "--max-num-seqs", "32", *arguments]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, env={**os.environ, **environment})

    def wait(self) -> None:
        """Until it answers."""
        while True:
            if self.process.poll() is not None:
                self.log.seek(0)
                sys.exit(f"a server ended:\n{self.log.read()[-3000:]}")
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(1)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)
        self.log.close()


async def load(server: Server, options: argparse.Namespace, count: int, seed: int) -> dict[str, Any]:
    """Send requests, some at a time; seconds in all, and to each request's first token."""
    gate, first = asyncio.Semaphore(options.concurrency), []
    async with httpx.AsyncClient(timeout=None) as client:

        async def one(number: int) -> None:
            async with gate:
                body = request(options, seed * 10_000 + number)
                started = time.perf_counter()
                async with client.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
                    response.raise_for_status()
                    seen = False
                    async for line in response.aiter_lines():
                        if not seen and line.startswith("data:"):  # vLLM sends nothing before the first token
                            first.append(time.perf_counter() - started)
                            seen = True

        started = time.perf_counter()
        await asyncio.gather(*map(one, range(count)))
        seconds = time.perf_counter() - started
    return {"requests": count, "seconds": seconds, "requests_per_second": count / seconds, "ttft_seconds": first}


def request(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """A question about a picture of its own."""
    chance, file = random.Random(seed), io.BytesIO()
    Image.frombytes("RGB", (336, 336), chance.randbytes(3 * 336 * 336)).save(file, "PNG", compress_level=1)
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": " ".join(chance.choices(WORDS, k=options.text))},
    ]
    messages = [{"role": "user", "content": content}]
    return {
        "model": "bench",
        "messages": messages,
        "max_tokens": options.new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }


def show(rounds: dict[str, list[dict[str, Any]]], base: str) -> None:
    """A table with paired ratios: each round beside the same round of the baseline."""
    print("| variant | requests/s, median (min-max) | ratio | TTFT, median s | ratio |")
    print("|---|---|---|---|---|")
    for name, measured in rounds.items():
        rates = [each["requests_per_second"] for each in measured]
        first = [statistics.median(each["ttft_seconds"]) for each in measured]
        faster = [own / each["requests_per_second"] for own, each in zip(rates, rounds[base], strict=True)]
        sooner = [statistics.median(each["ttft_seconds"]) / own for own, each in zip(first, rounds[base], strict=True)]
        print(
            f"| {name} | {statistics.median(rates):.3f} ({min(rates):.3f}-{max(rates):.3f}) | "
            f"{statistics.median(faster):.2f}x | {statistics.median(first):.2f} | {statistics.median(sooner):.2f}x |"
        )


if __name__ == "__main__":
    main()
