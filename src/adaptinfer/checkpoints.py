"""A checkpoint on disk or on the hub, and prompts for it: read, checked and refused before any weight is loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from adaptinfer.errors import InputError, UnsupportedError, first_line

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from adaptinfer.engine.families import Family
    from adaptinfer.pictures import Picture
    from adaptinfer.pruners.contracts import Pruner

EMBEDDED = "embedded"
"""The name of the model that comes with the package."""

DType = Literal["auto", "float32", "bfloat16", "float16"]

_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Prompt:
    """Pictures and a question, ready for the model.

    Attributes:
        pictures: what was asked about.
        question: as given, without surrounding whitespace.
        inputs: the processor's tensors, on the CPU.
        vision_tokens: how many of the prompt's tokens stand for the pictures.
        unknown_words: words of the question that the model's tokenizer has no token for.
    """

    pictures: tuple[Picture, ...]
    question: str
    inputs: dict[str, Tensor]
    vision_tokens: int
    unknown_words: tuple[str, ...]


class Checkpoint:
    """A checkpoint of a supported vision-language model. Its weights are read by `load` and not before.

    Args:
        name: ``"embedded"``, a folder, or an id on the Hugging Face hub.
        trust_remote_code: run Python code that comes with the checkpoint.
        device: where to run; ``"auto"`` takes a GPU if there is one.
        dtype: ``"auto"`` is the checkpoint's own on a GPU and float32 on a CPU.

    Raises:
        InputError: there is no such checkpoint, it cannot be read, or there is no such device.
        UnsupportedError: AdaptInfer does not support this kind of model.
    """

    def __init__(
        self, name: str = EMBEDDED, *, trust_remote_code: bool = False, device: str = "auto", dtype: DType = "auto"
    ) -> None:
        from transformers import AutoConfig

        from adaptinfer.engine.families import placeholders_of

        self.name = name
        self.device = resolve_device(device)
        self.dtype: str = "float32" if dtype == "auto" and self.device == "cpu" else dtype
        self._trust = trust_remote_code
        self._source = _source(name)
        with _reading(name, "configuration"):
            self.config: Any = AutoConfig.from_pretrained(self._source, trust_remote_code=trust_remote_code)
        self._placeholders = placeholders_of(self.config)

    @property
    def num_layers(self) -> int:
        """Decoder layers of the language model."""
        return self.config.get_text_config().num_hidden_layers

    @cached_property
    def family(self) -> Family:
        """What the engine found in the model, looked at without its weights.

        Raises:
            InputError: transformers has no class for it.
            UnsupportedError: pruning does not fit it.
        """
        import torch
        from transformers import AutoModelForImageTextToText

        from adaptinfer.engine.families import family_of

        with _reading(self.name, "model class"), torch.device("meta"):
            unloaded = AutoModelForImageTextToText.from_config(self.config, trust_remote_code=self._trust)
        return family_of(unloaded)

    @cached_property
    def processor(self) -> Any:
        """The checkpoint's processor. Raises InputError if it has none that reads pictures."""
        from transformers import AutoProcessor

        with _reading(self.name, "processor"):
            processor: Any = AutoProcessor.from_pretrained(self._source, trust_remote_code=self._trust)
        if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
            raise InputError(f"model {self.name!r}: comes without a processor for pictures and text")
        return processor

    def prompt(self, pictures: Sequence[Picture], question: str) -> Prompt:
        """Put pictures and a question in the form that the model was trained on.

        Raises:
            InputError: no picture, an empty question, one that contains a picture placeholder, or pictures that the
                model's processor refuses.
        """
        question = check_question(question)
        if not pictures:
            raise InputError("image: give at least one picture")
        processor = self.processor
        for attribute in ("image_token", "video_token"):
            token = getattr(processor, attribute, None)
            if token and token in question:
                raise InputError(f"question: must not contain {token!r}, which stands for a picture in this model")
        try:
            inputs = dict(processed(processor, [picture.image for picture in pictures], question))
        except (ValueError, IndexError, RuntimeError) as error:
            raise InputError(f"model {self.name!r}: its processor refuses this prompt ({first_line(error)})") from error
        ids = inputs["input_ids"]
        vision_tokens = sum(int((ids == token).sum()) for token in self._placeholders)
        if not vision_tokens:
            raise InputError(f"model {self.name!r}: its processor puts no vision tokens into the prompt")
        return Prompt(tuple(pictures), question, inputs, vision_tokens, _unknown_words(processor.tokenizer, question))

    def check(self, pruner: Pruner, prompt: Prompt | None = None) -> None:
        """Refuse a pruner that does not fit this model or, if one is given, this prompt.

        Raises:
            ScheduleError: a schedule for another depth, or a budget that cannot be met.
            UnsupportedError: pruning does not fit this model, or positions are compact where only 'keep' works.
        """
        if pruner.positions == "compact" and self.family.rotary is None:
            raise UnsupportedError(f"positions: {self.config.model_type} supports 'keep' only, not 'compact'")
        if pruner.schedule is not None:
            pruner.schedule.check(self.num_layers)
        if prompt is not None:
            pruner.plan(self.num_layers, prompt.vision_tokens, self.family.scoring).keeps(prompt.vision_tokens)

    def load(self) -> Any:
        """The model in evaluation mode on its device.

        Raises:
            InputError: weights are missing, damaged, not safetensors, or not those of this model.
        """
        from transformers import AutoModelForImageTextToText

        _check_weight_files(self.name, self._source)
        with _reading(self.name, "weights"):
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                self._source,
                config=self.config,
                dtype=self.dtype,
                use_safetensors=True,
                trust_remote_code=self._trust,
                output_loading_info=True,
            )
        model, found = loaded
        missing = sorted(found["missing_keys"])
        if missing:  # transformers would go on with random numbers in their place
            raise InputError(f"model {self.name!r}: {len(missing)} weights are missing, {missing[0]} among them")
        return model.eval().to(self.device)


def check_question(question: str) -> str:
    """The question without surrounding whitespace. Raises InputError if nothing is left, or it is no text."""
    if not question.strip():
        raise InputError("question: is empty")
    try:
        question.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which tokenizers cannot take
        raise InputError(f"question: character {error.start + 1} is not Unicode text (a lone surrogate)") from None
    return question.strip()


def resolve_device(name: str) -> str:
    """The device of that name; ``"auto"`` is a GPU if there is one. Raises InputError if it cannot be used."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps", "xpu"):
            raise InputError(f"device {name!r}: not a device that models run on; use cpu, cuda, cuda:1, mps or xpu")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: torch without CUDA
        raise InputError(f"device {name!r}: cannot be used here ({first_line(error)})") from None
    return name


def _source(name: str) -> str:
    """The folder or hub id that a model's name stands for."""
    if name == EMBEDDED:
        from adaptinfer import embedded

        try:
            return str(embedded.path())
        except FileNotFoundError as error:
            raise InputError(f"model {name!r}: {error}") from None
    folder = os.path.expanduser(name)  # noqa: PTH111 - as the next lines: pathlib raises for what can be no path
    if os.path.isdir(folder):  # noqa: PTH112
        if not (Path(folder) / "config.json").is_file():
            raise InputError(f"model {name!r}: the folder has no config.json, so it is no checkpoint")
        return folder
    if os.path.exists(folder):  # noqa: PTH110
        raise InputError(f"model {name!r}: is a file; give the checkpoint's folder")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name):
        raise InputError(f"model {name!r}: no such folder, and not an id on the Hugging Face hub")
    return name


def _check_weight_files(name: str, source: str) -> None:
    folder = Path(source)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return  # the hub is asked for safetensors only
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLED)
    if pickled:
        raise InputError(
            f"model {name!r}: its weights ({pickled[0]}) are pickled, which can run code when read; "
            "only safetensors are loaded, so convert them first"
        )
    raise InputError(f"model {name!r}: the folder has no weights (*.safetensors)")


@contextmanager
def _reading(name: str, what: str) -> Iterator[None]:
    """Turn any error of transformers about a checkpoint into one clear line."""
    try:
        yield
    except Exception as error:  # a foreign checkpoint may break its reader in any way
        raise InputError(f"model {name!r}: {_why_unreadable(error, what)}") from error


def _why_unreadable(error: Exception, what: str) -> str:
    from huggingface_hub import is_offline_mode

    text = str(error)
    chain, cause = set(), error
    while cause is not None:
        chain.add(type(cause).__name__)
        cause = cause.__cause__ or cause.__context__
    if "trust_remote_code" in text:
        return "needs Python code that comes with it; pass --trust-remote-code (trust_remote_code=True) if you trust it"
    if "use_safetensors" in text:
        return "has no safetensors weights, and only safetensors are loaded"
    if "does not recognize this architecture" in text or "Unrecognized model" in text:
        return "is of no kind that transformers knows; `adaptinfer models` lists those that AdaptInfer is tested with"
    if "GatedRepoError" in chain:
        return "needs a licence to be accepted on its hub page, and a login (hf auth login)"
    if "RepositoryNotFoundError" in chain:
        return "no such folder, and no such model on the Hugging Face hub (or a private one: hf auth login)"
    if chain & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectionError"}:
        where = "offline mode is on" if is_offline_mode() else "the Hugging Face hub cannot be reached"
        return f"no such folder, not downloaded before, and {where}"
    return f"its {what} cannot be read ({type(error).__name__}: {first_line(error)})"


def processed(processor: Any, images: list[Image.Image], question: str) -> Any:
    """A question about pictures as the processor makes it for the model: its chat template, or LLaVA-1.5's prompt."""
    if getattr(processor, "chat_template", None):
        content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
        return processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    placeholders = f"{processor.image_token}\n" * len(images)
    return processor(text=f"USER: {placeholders}{question} ASSISTANT:", images=images, return_tensors="pt")


def _unknown_words(tokenizer: Any, question: str) -> tuple[str, ...]:
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return ()
    words = dict.fromkeys(re.findall(r"\w+|[^\w\s]", question))
    return tuple(word for word in words if unknown in tokenizer(word, add_special_tokens=False)["input_ids"])
