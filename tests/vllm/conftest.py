"""Engines of vLLM in this process, on the CPU, and the same prompts through transformers and our engine.

Run by ``make test-vllm`` in an environment of its own.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
)

import vision  # noqa: F401 - before anybody looks for torchvision

# isort: split
import checkpoints
import pytest
from PIL import Image
from reference import reference_tokens

import adaptinfer

MiB = 2**20
WORDS = ("red", "green", "blue", "star", "heart", "circle", "square", "what", "colour", "how", "many", "you", "see")


@dataclass
class Request:
    """One prompt and how long its answer shall be."""

    text: str
    images: list[Image.Image] = field(default_factory=list)
    new_tokens: int = 8


def picture(seed: int, width: int = 28, height: int = 28) -> Image.Image:
    """Coloured noise."""
    return Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(3 * width * height))


def words(count: int, seed: int) -> str:
    """Text of that many words."""
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def request(seed: int, images: int = 1, sizes: tuple[tuple[int, int], ...] = ((28, 28),)) -> Request:
    """Some text, pictures with text between them, a question."""
    chance = random.Random(seed)
    parts = [f"USER: {words(chance.randint(0, 12), seed)}"]
    pictures = []
    for number in range(images):
        pictures.append(picture(seed * 10 + number, *chance.choice(sizes)))
        parts.append(f"<image>\n{words(chance.randint(0, 5), seed + number)}")
    parts.append(f"{words(chance.randint(1, 20), seed + 100)} ASSISTANT:")
    return Request(" ".join(parts), pictures, chance.randint(1, 16))


@pytest.fixture(scope="session")
def processes():
    """One process without vLLM, which changes transformers' classes where it runs."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.fixture(scope="session")
def folder(tmp_path_factory, processes):
    """Checkpoint folders by the name of their builder."""
    made = {}

    def of(name: str) -> str:
        if name not in made:
            build = getattr(checkpoints, name)
            made[name] = str(processes.submit(build, tmp_path_factory.mktemp(name)).result())
        return made[name]

    return of


@contextlib.contextmanager
def engine(model: str, pruner: adaptinfer.Pruner | None, **options: Any) -> Iterator[Any]:
    """vLLM's offline engine; with ``kv_blocks`` that many blocks of 32 tokens."""
    from adaptinfer.serving.settings import to_json
    from adaptinfer.serving.vllm_plugin import register

    os.environ.pop("ADAPTINFER_CONFIG", None)
    os.environ.pop("VLLM_USE_V2_MODEL_RUNNER", None)
    if pruner is not None:
        os.environ["ADAPTINFER_CONFIG"] = to_json(pruner)
    register()
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    if "kv_blocks" in options:
        options["num_gpu_blocks_override"] = options.pop("kv_blocks")
    options = {
        "model_impl": "transformers",
        "enforce_eager": True,
        "dtype": "float32",
        "max_model_len": 512,
        "max_num_seqs": 128,
        "block_size": 32,
        "kv_cache_memory_bytes": 64 * MiB,
        "limit_mm_per_prompt": {"image": 3},
        "disable_log_stats": True,
        **options,
    }
    llm = LLM(model, **options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def served(llm: Any, requests: list[Request]) -> list[list[int]]:
    """Greedy tokens of all requests at once."""
    outputs = llm.generate(inputs(requests), parameters(requests), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def inputs(requests: list[Request]) -> list[dict[str, Any]]:
    """Requests as vLLM takes them."""
    return [
        {"prompt": each.text, **({"multi_modal_data": {"image": each.images}} if each.images else {})}
        for each in requests
    ]


def parameters(requests: list[Request]) -> list[Any]:
    """Greedy, each with its own length."""
    from vllm import SamplingParams

    return [SamplingParams(temperature=0, max_tokens=each.new_tokens, ignore_eos=True) for each in requests]


class Reference:
    """Our engine on transformers."""

    def __init__(self, processes: ProcessPoolExecutor, model: str) -> None:
        self.processes, self.model = processes, model

    def tokens(self, pruner: adaptinfer.Pruner | None, requests: list[Request]) -> list[list[int]]:
        plain = [(each.text, each.images, each.new_tokens) for each in requests]
        return self.processes.submit(reference_tokens, self.model, pruner, plain).result()


@pytest.fixture(scope="session")
def reference(folder, processes):
    """References by the name of their checkpoint."""
    return lambda name: Reference(processes, folder(name))
