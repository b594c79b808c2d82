"""The plug-in for lmms-eval: ``--model adaptinfer --model_args pretrained=...,method=adaptinfer,budget=64``.

lmms-eval finds it by the entry point ``lmms_eval.models``; its tasks (GQA, MMBench, MME, POPE, ScienceQA, VQAv2,
TextVQA, VizWiz, SEED, RefCOCO, DocVQA, videos) run unchanged. Without ``method`` the same model runs unpruned, through
the same prompts and the same code.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lmms_eval import utils  # pyright: ignore[reportMissingImports]
from lmms_eval.api.instance import GenerationResult, TokenCounts  # pyright: ignore[reportMissingImports]
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from lmms_eval.models.model_utils.gen_metrics import log_metrics  # pyright: ignore[reportMissingImports]
from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]
from lmms_eval.protocol import ChatMessages  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

from adaptinfer.checkpoints import Checkpoint, DType
from adaptinfer.engine.handle import Handle
from adaptinfer.errors import InputError, UnsupportedError
from adaptinfer.evaluation.conditions import method_of, published
from adaptinfer.pruners import Pruner
from adaptinfer.pruners.config import from_pretrained

_MAX_NEW_TOKENS = 1024  # default where a task sets none, as in lmms-eval's own models


def manifest() -> Any:
    """What the entry point hands to lmms-eval's registry."""
    return ModelManifest("adaptinfer", chat_class_path=f"{__name__}.AdaptInferModel")


class AdaptInferModel(lmms):
    """A transformers VLM with a pruner attached, as lmms-eval wants it.

    Args:
        pretrained: ``"embedded"``, a checkpoint folder, or an id on the Hugging Face hub.
        method: a name, or ``package.module:Class`` for a method of yours; None prunes nothing.
        budget: true average of vision tokens given to a layer, or below 1 a share of them.
        preset: a published schedule in place of all settings of a method, such as ``llava-1.5-7b/64``.
        pruner: a folder that `Pruner.save_pretrained` wrote, in place of all settings of a method.
        positions: of a method: ``"keep"`` or ``"compact"``; None leaves it its own.
        seed: of a method with chance in it.
        batch_size: prompts answered at once.
        device: ``"auto"`` takes a GPU if there is one; each process of ``accelerate launch`` takes its own.
        dtype: ``"auto"`` is the checkpoint's own on a GPU and float32 on a CPU.
        num_frames: of a video.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        InputError: settings that make no sense together, or a checkpoint that cannot be read.
        UnsupportedError: pruning does not fit the model.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "embedded",
        method: str | None = None,
        budget: float | None = None,
        preset: str | None = None,
        pruner: str | None = None,
        positions: str | None = None,
        seed: int | None = None,
        batch_size: int | str = 1,
        device: str | None = "auto",
        dtype: DType = "auto",
        num_frames: int = 8,
        trust_remote_code: bool = False,
    ) -> None:
        from accelerate import Accelerator

        super().__init__()
        self.pruner = _pruner(method, budget, preset, pruner, positions, seed)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size > 1:
            device = str(self.accelerator.device)
        checkpoint = Checkpoint(pretrained, trust_remote_code=trust_remote_code, device=device or "auto", dtype=dtype)
        self.processor, self.model = checkpoint.processor, checkpoint.load()
        if not getattr(self.processor, "chat_template", None):
            raise InputError(
                f"model {pretrained!r}: its processor has no chat template, which lmms-eval's prompts need"
            )
        self.processor.tokenizer.padding_side = "left"
        self.batch_size_per_gpu = int(batch_size)
        self._num_frames = int(num_frames)
        self.true_averages: list[float] = []

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Greedy or sampled answers, as each task's generation settings say; in the order of the requests."""
        ordered = utils.Collator([request.args for request in requests], _by_length, group_fn=_settings, grouping=True)
        answers: list[Any] = []
        started, tokens = time.perf_counter(), 0
        with self._attached() as handle:
            bar = tqdm(total=len(requests), disable=self.rank != 0, desc="adaptinfer")
            for chunk in ordered.get_batched(n=self.batch_size_per_gpu, batch_fn=None):
                texts, counts = self._answer(chunk, handle)
                tokens += sum(counts)
                for (context, *_), text, count in zip(chunk, texts, counts, strict=True):
                    answers.append(GenerationResult(text=text, token_counts=TokenCounts(output_tokens=count)))
                    self.cache_hook.add_partial("generate_until", (context, chunk[0][2]), text)
                bar.update(len(chunk))
            bar.close()
        elapsed = time.perf_counter() - started
        average = sum(self.true_averages) / len(self.true_averages) if self.true_averages else None
        log_metrics(
            total_gen_tokens=tokens,
            total_elapsed_time=elapsed,
            avg_speed=tokens / elapsed,
            additional_metrics={"rank": self.rank, "true_average": average},
        )
        return ordered.get_original(answers)

    def loglikelihood(self, requests: Any) -> Any:
        raise UnsupportedError(
            "tasks that score given answers (loglikelihood) are not supported; choose their generating form"
        )

    def generate_until_multi_round(self, requests: Any) -> Any:
        raise UnsupportedError("tasks of several rounds are not supported here; adaptinfer eval has conversations")

    def _attached(self) -> Handle | nullcontext[None]:
        return self.pruner(self.model) if self.pruner else nullcontext()

    def _answer(self, chunk: Sequence[Any], handle: Handle | None) -> tuple[list[str], list[int]]:
        """Texts and numbers of new tokens of requests that share generation settings."""
        conversations = []
        for _, to_messages, _, number, task, split in chunk:
            messages = ChatMessages(messages=to_messages(self.task_dict[task][split][number]))
            conversations.append(messages.to_hf_messages())
        inputs = self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
            **({"num_frames": self._num_frames} if _has_video(conversations) else {}),
        ).to(self.model.device, self.model.dtype)
        with torch.no_grad():
            out = self.model.generate(**inputs, **_generation(chunk[0][2]))
        if handle is not None and handle.report is not None:
            self.true_averages += handle.report.true_average
        new = out[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        stops = chunk[0][2].get("until", [])
        stops = [stops] if isinstance(stops, str) else stops
        padding = self.processor.tokenizer.pad_token_id
        return [_until(text, stops) for text in texts], (new != padding).sum(dim=1).tolist()


def _pruner(
    method: str | None,
    budget: float | None,
    preset: str | None,
    pruner: str | None,
    positions: str | None,
    seed: int | None,
) -> Pruner | None:
    """What the arguments ask for; each argument is used, or rejected.

    Raises:
        InputError: arguments that do not go together, or an unknown method.
        PrunerError, ScheduleError: a setting, preset or folder that makes no sense.
    """
    sources = {"method": method, "preset": preset, "pruner": pruner}
    given = [name for name, value in sources.items() if value is not None]
    if len(given) > 1:
        raise InputError(f"model_args: give one of method, preset and pruner, not {' and '.join(given)}")
    settings: dict[str, Any] = {
        name: value
        for name, value in (("budget", budget), ("positions", positions), ("seed", seed))
        if value is not None
    }
    if given in (["preset"], ["pruner"]) and settings:
        raise InputError(
            f"model_args: {given[0]} brings its own settings, so leave out {' and '.join(settings)}, or give "
            f"method in place of {given[0]}"
        )
    if pruner is not None:
        return from_pretrained(Path(pruner))
    if preset is not None:
        return published(preset)
    if method is None:
        if settings:
            raise InputError(f"model_args: {' and '.join(settings)} needs a method, such as method=adaptinfer")
        return None
    kind = method_of(method, "model_args")
    if seed is not None and "seed" not in {field.name for field in dataclasses.fields(kind)}:
        raise InputError(f"model_args: {method} has no chance in it, so leave out seed")
    return kind(**settings)


def _generation(settings: dict[str, Any]) -> dict[str, Any]:
    """A task's settings as `generate` takes them; greedy unless it asks for a temperature."""
    sampled = (settings.get("temperature") or 0) > 0
    chosen = {
        "max_new_tokens": settings.get("max_new_tokens", _MAX_NEW_TOKENS),
        "num_beams": settings.get("num_beams") or 1,
        "do_sample": sampled,
    }
    return chosen | ({"temperature": settings["temperature"], "top_p": settings.get("top_p")} if sampled else {})


def _until(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0] if stop else text
    return text.strip()


def _has_video(conversations: Sequence[Any]) -> bool:
    return any(
        part["type"] == "video" for messages in conversations for message in messages for part in message["content"]
    )


def _by_length(arguments: Any) -> Any:
    return -len(arguments[0]), arguments[0]


def _settings(arguments: Any) -> Any:
    return arguments[2]
