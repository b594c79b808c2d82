"""A model that answers batches of conversations, pruned or not, and counts what each prompt cost."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from adaptinfer.checkpoints import Checkpoint
from adaptinfer.engine.families import placeholders_of
from adaptinfer.engine.report import Report
from adaptinfer.errors import InputError
from adaptinfer.pruners.contracts import Pruner
from adaptinfer.resize import Resize
from adaptinfer.schedule import ModelShape, Schedule

_SENTINEL = "~~~~"  # stands for an answer while a chat template is asked what comes after one


@dataclass(frozen=True)
class PromptBatch:
    """First prompts of some samples, left-padded, on the model's device.

    Attributes:
        inputs: what ``generate`` takes.
        vision_tokens: per sample.
        text_tokens: per sample, padding excluded.
    """

    inputs: Any
    vision_tokens: tuple[int, ...]
    text_tokens: tuple[int, ...]


@dataclass(frozen=True)
class Cost:
    """What one sample's prefill costs without the padding of a batch, computed from its counts.

    Attributes:
        vision_tokens: in the prompt.
        true_average: vision tokens given to a layer, averaged over layers.
        flops: of the decoder layers, 2 x multiply-adds.
        kv_bytes: held after the prefill.
    """

    vision_tokens: int
    true_average: float
    flops: float
    kv_bytes: int


@dataclass(frozen=True)
class Outcome:
    """Answers of a batch.

    Attributes:
        answers: ``answers[turn][sample]``.
        logits: float32 [B, vocabulary], of the first token of the first answer.
        costs: one per sample, of the first prompt.
    """

    answers: list[list[str]]
    logits: Tensor
    costs: tuple[Cost, ...]


class Answerer:
    """A loaded checkpoint with its processor.

    Args:
        checkpoint: whose weights are read now.

    Raises:
        InputError: they cannot be read.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.processor, self.model = checkpoint.processor, checkpoint.load()
        self.processor.tokenizer.padding_side = "left"
        self.shape = ModelShape.from_config(checkpoint.config)
        self._placeholders = torch.tensor(placeholders_of(checkpoint.config))
        self._bytes_per_value = torch.finfo(self.model.dtype).bits // 8

    def batch(
        self, questions: Sequence[str], pictures: Sequence[Sequence[Image.Image]], resize: Resize | None = None
    ) -> PromptBatch:
        """Prompts for the first turn of each sample.

        Args:
            questions: of the samples.
            pictures: of each sample.
            resize: makes them smaller; the model then reads them inside ``with resize(model)``.

        Raises:
            InputError: the processor refuses them, or a question contains what stands for a picture in this model.
        """
        for token in filter(None, (getattr(self.processor, name, None) for name in ("image_token", "video_token"))):
            for question in questions:
                if token in question:
                    raise InputError(
                        f"question {question!r}: {token!r} stands for a picture in this model; leave it out"
                    )
        texts = [self._first_text(text, len(shown)) for text, shown in zip(questions, pictures, strict=True)]
        images = [list(shown) for shown in pictures] if any(pictures) else None
        settings, wanted = {}, 0
        if resize is not None and images:
            images, wanted, settings = resize.shrunk(self.processor, images)
        try:
            inputs = self.processor(text=texts, images=images, padding=True, return_tensors="pt", **settings)
        except (ValueError, IndexError, RuntimeError) as error:
            raise InputError(f"the model's processor refuses these prompts ({error})") from error
        if resize is not None:
            resize.check(self.processor, inputs, wanted)
        return self.counted(inputs)

    def counted(self, inputs: Any) -> PromptBatch:
        """A processor's output on the model's device, with its tokens counted."""
        vision = torch.isin(inputs["input_ids"], self._placeholders) & inputs["attention_mask"].bool()
        counts = vision.sum(dim=1)
        text = inputs["attention_mask"].sum(dim=1) - counts
        inputs = inputs.to(self.model.device, self.model.dtype)
        return PromptBatch(inputs, tuple(counts.tolist()), tuple(text.tolist()))

    @torch.no_grad()
    def answer(
        self, batch: PromptBatch, later: Sequence[Sequence[str]], max_new_tokens: int, pruner: Pruner | Resize | None
    ) -> Outcome:
        """Greedy answers to a batch's first questions and to later ones on the same cache.

        Args:
            batch: the first prompts.
            later: questions of the turns after the first, per sample, as many for each.
            max_new_tokens: longest answer.
            pruner: attached for the length of the call, or what made the batch's pictures smaller; None: neither.

        Raises:
            AdaptInferError: the pruner refuses the model or the prompts.
        """
        options = {
            "max_new_tokens": max_new_tokens,
            "do_sample": False,
            "num_beams": 1,
            "output_logits": True,
            "return_dict_in_generate": True,
        }
        with pruner(self.model) if pruner else nullcontext() as handle:
            ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
            out = self.model.generate(**batch.inputs, **options)
            logits, costs = out.logits[0].float(), self._costs(batch, handle.report if handle else None)
            answers = [self._texts(out.sequences[:, ids.shape[1] :])]
            for questions in zip(*later, strict=True):
                cache = out.past_key_values
                ids, mask = self._next_turn(out.sequences, ids.shape[1], mask, questions)
                out = self.model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **options)
                answers.append(self._texts(out.sequences[:, ids.shape[1] :]))
        return Outcome(answers, logits, costs)

    def _next_turn(self, sequences: Tensor, prompt: int, mask: Tensor, questions: Sequence[str]) -> Any:
        """Ids and mask of the whole conversation up to the next answer.

        What a sample generated after its answer's last word (the end mark, padding) stays in the cache and is masked;
        the chat template writes the end mark anew.
        """
        tokenizer, said = self.processor.tokenizer, sequences[:, prompt:]
        ends = torch.tensor(self.model.generation_config.eos_token_id or [], device=said.device).reshape(-1)
        kept = ~torch.isin(said, ends).cumsum(dim=1).bool()
        tails = tokenizer(
            [self._later_text(question) for question in questions],
            padding=True,
            add_special_tokens=False,
            return_tensors="pt",
        ).to(said.device)
        if not bool(kept[:, -1].any()):  # the last token was never fed to the model, so it need not be in the cache
            sequences, kept = sequences[:, :-1], kept[:, :-1]
        ids = torch.cat([sequences, tails["input_ids"]], dim=1)
        return ids, torch.cat([mask, kept.to(mask.dtype), tails["attention_mask"].to(mask.dtype)], dim=1)

    def _costs(self, batch: PromptBatch, report: Report | None) -> tuple[Cost, ...]:
        layers, early = self.shape.num_layers, report is None or report.early_drop
        whole = (Schedule((), layers),) * len(batch.vision_tokens)
        return tuple(
            Cost(
                vision,
                schedule.true_average(vision),
                schedule.prefill_flops(self.shape, text, vision, early_drop=early),
                schedule.kv_bytes(self.shape, text, vision, self._bytes_per_value),
            )
            for schedule, vision, text in zip(
                report.schedules if report else whole, batch.vision_tokens, batch.text_tokens, strict=True
            )
        )

    def _texts(self, tokens: Tensor) -> list[str]:
        return [text.strip() for text in self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def _first_text(self, question: str, pictures: int) -> str:
        if not getattr(self.processor, "chat_template", None):
            shown = f"{self.processor.image_token}\n" * pictures
            return f"USER: {shown}{question} ASSISTANT:"
        return self._rendered([_user(question, pictures)])

    def _later_text(self, question: str) -> str:
        """What comes between an answer and the next one."""
        if not getattr(self.processor, "chat_template", None):
            return f"{self.processor.tokenizer.eos_token}USER: {question} ASSISTANT:"
        answer = {"role": "assistant", "content": [{"type": "text", "text": _SENTINEL}]}
        return self._rendered([_user(question, 0), answer, _user(question, 0)]).rpartition(_SENTINEL)[2]

    def _rendered(self, messages: list[dict[str, Any]]) -> str:
        return self.processor.apply_chat_template(messages, add_generation_prompt=True)


def _user(question: str, pictures: int) -> dict[str, Any]:
    return {"role": "user", "content": [*[{"type": "image"}] * pictures, {"type": "text", "text": question}]}
