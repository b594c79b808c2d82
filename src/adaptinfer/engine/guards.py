"""What is refused, before any work, each with what to do instead."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from transformers.cache_utils import StaticLayer

from adaptinfer.engine.cache.access import cache_argument, is_plain
from adaptinfer.engine.cache.checks import check_cache
from adaptinfer.engine.families import Family, check_backend
from adaptinfer.errors import UnsupportedError
from adaptinfer.pruners.contracts import Pruner

_ESCAPE = "or run this call inside adaptinfer.disabled(model)"


def arguments_of(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call by name, whichever way they were passed."""
    if not args:
        return kwargs
    bound = inspect.signature(forward).bind_partial(*args, **kwargs).arguments
    return {**bound, **bound.pop("kwargs", {})}


def prompt_length(arguments: dict[str, Any]) -> int | None:
    """Tokens of the whole prompt, cached ones included, of a call of generate; None without ids.

    In a later turn generate may be given the new ids alone; the mask is then that of the whole.
    """
    ids, mask = arguments.get("input_ids", arguments.get("inputs")), arguments.get("attention_mask")
    if ids is None:
        return None
    return max(ids.shape[1], mask.shape[1] if isinstance(mask, Tensor) and mask.ndim == 2 else 0)


def most_new_tokens(model: Any, arguments: dict[str, Any], prompt: int) -> int:
    """New tokens that a call of generate may make; transformers' default is 20 tokens."""
    new, longest = (_setting(model, arguments, name) for name in ("max_new_tokens", "max_length"))
    return new if new is not None else 20 if longest is None else max(1, longest - prompt)


def _setting(model: Any, arguments: dict[str, Any], name: str) -> Any:
    """What generate goes by: transformers fills what a call leaves open from the config that was passed, and then from
    the model's own."""
    configs = (arguments.get("generation_config"), getattr(model, "generation_config", None))
    values = [arguments.get(name), *(getattr(config, name, None) for config in configs)]
    return next((value for value in values if value is not None), None)


def check_generate(model: Any, kwargs: dict[str, Any]) -> None:
    """Refuse ways of decoding that pruning would get wrong or does not support yet.

    Raises:
        UnsupportedError: naming the argument.
    """
    setting = functools.partial(_setting, model, kwargs)
    if kwargs.get("inputs_embeds") is not None and kwargs.get("input_ids", kwargs.get("inputs")) is None:
        raise UnsupportedError(_NO_IDS)
    if setting("prefill_chunk_size"):
        raise UnsupportedError(
            "chunked prefill (prefill_chunk_size) splits the image from its question, which then cannot guide the "
            f"pruning; leave it unset, {_ESCAPE}"
        )
    if setting("cache_implementation") == "paged":
        raise UnsupportedError(
            f"cache_implementation='paged' (continuous batching) is not supported; leave it unset, {_ESCAPE}"
        )
    if setting("assistant_early_exit"):
        raise UnsupportedError(
            "assistant_early_exit drafts with the first layers of this very model, whose pruned cache it cannot share; "
            f"use prompt_lookup_num_tokens or an assistant_model, {_ESCAPE}"
        )
    for flag in ("output_attentions", "output_hidden_states"):
        if setting(flag):
            raise UnsupportedError(_outputs_of_different_length(flag))
    cache = cache_argument(kwargs)
    if cache is not None:
        check_cache(cache, pruning=False)


def check_forward(model: Any, arguments: dict[str, Any]) -> None:
    """Refuse a forward call whose vision tokens are about to be pruned, if the result would be wrong.

    Raises:
        UnsupportedError: naming the argument.
    """
    if model.training:
        raise UnsupportedError(f"the model is in training mode; call model.eval() first, {_ESCAPE}")
    config = model.config.get_text_config()
    check_backend(config)
    for flag in ("output_attentions", "output_hidden_states"):
        wanted = arguments.get(flag)
        if getattr(config, flag, False) if wanted is None else wanted:
            raise UnsupportedError(_outputs_of_different_length(flag))


def check_flash(sources: dict[int, int], stages: Iterable[int]) -> None:
    """Refuse stages between layers that share keys under FlashAttention: the later layer's queries would be some of its
    keys' tokens only, and a kernel that is causal by the order of tokens cannot tell which.

    Args:
        sources: for layers that read the keys of an earlier layer, which one.
        stages: layers about to prune.

    Raises:
        UnsupportedError: naming the layers.
    """
    for layer, source in sources.items():
        stage = next((stage for stage in stages if source <= stage < layer), None)
        if stage is not None:
            raise UnsupportedError(
                f"FlashAttention cannot prune in layer {stage}: layer {layer} reads the keys of layer {source} and "
                f"would be given fewer tokens; prune in layers before {min(sources.values())} only, or load the "
                "model with attn_implementation='sdpa'"
            )


def check_needs(family: Family, pruner: Pruner) -> None:
    """Refuse a method that looks at rotary embedding or the last normalisation of a model that does not show it.

    Raises:
        UnsupportedError: naming both.
    """
    if "rotary" in pruner.capabilities.needs and len(family.rotate) < len(family.scoring):
        raise UnsupportedError(
            f"{pruner.name} takes rotary embedding off again, and {family.model_type} does not show how it is put on; "
            "use another method, or a newer transformers"
        )
    if "norm" in pruner.capabilities.needs and family.final_norm is None:
        raise UnsupportedError(
            f"{pruner.name} compares hidden states after the model's last normalisation, which was not found in "
            f"{family.model_type}; use another method"
        )


def check_positions(family: Family, pruner: Pruner) -> None:
    """Refuse to renumber survivors where that is not defined.

    Raises:
        UnsupportedError: naming the model.
    """
    if pruner.positions == "compact" and family.rotary is None:
        raise UnsupportedError(
            "positions='compact' renumbers survivors as the published LLaVA code does, which is defined for one rotary "
            f"embedding of one-dimensional positions; {family.model_type} has another, so use positions='keep'"
        )


def check_past(pruner: Pruner, cache: Any, past: int) -> None:
    """Refuse a new image on a cache that a method would have to read, unless it lies there in the open.

    Raises:
        UnsupportedError: naming the method.
    """
    plain = all(map(is_plain, cache.layers))
    if past and not plain and "next" in pruner.capabilities.needs:
        raise UnsupportedError(
            f"{pruner.name} reads the cached keys of the layer after a stage, so a new image in a later turn needs a "
            f"plain DynamicCache; begin with an empty cache, {_ESCAPE}"
        )


def check_counts(pruner: Pruner, cache: Any) -> None:
    """Refuse static caches for a pruner that settles how many tokens stay while it runs.

    Args:
        pruner: about to prune.
        cache: that the call was given.

    Raises:
        UnsupportedError: some layer of the cache is static.
    """
    if pruner.capabilities.varies and any(isinstance(layer, StaticLayer) for layer in cache.layers):
        raise UnsupportedError(
            f"{pruner.name} settles how many tokens of each sample stay while it runs, and a static cache must be told "
            "beforehand; leave cache_implementation unset, or let counts be fixed (mass=None)"
        )


def check_padding(on_the_right: bool) -> None:
    """Refuse to generate from prompts that end with padding: its last rows are padding.

    Raises:
        UnsupportedError: a prompt does.
    """
    if on_the_right:
        raise UnsupportedError(
            "a prompt of the batch is padded on its right, so generate would go on from padding; pad on the left "
            f"(processor.tokenizer.padding_side = 'left'), {_ESCAPE}"
        )


def refuse_continuous_batching(name: str, *args: Any, **kwargs: Any) -> Any:
    """Stand in for a method that batches requests as they come.

    Raises:
        UnsupportedError: always.
    """
    raise UnsupportedError(
        f"{name}: continuous batching packs requests into one row and pages their caches, which pruning does not "
        "support; call generate, or detach first"
    )


def check_mask(mask: Any) -> None:
    """Refuse masks of a user's own making, which may hide more than padding.

    Raises:
        UnsupportedError: it is no [batch, tokens] tensor.
    """
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        raise UnsupportedError(f"pruning needs a two-dimensional attention_mask [batch, tokens] (or none), {_ESCAPE}")


def check_labels(arguments: dict[str, Any]) -> None:
    """Refuse a loss over a prompt whose tokens are partly gone.

    Raises:
        UnsupportedError: ``labels`` were passed.
    """
    if arguments.get("labels") is not None:
        raise UnsupportedError(f"labels: a loss over pruned tokens is not defined; leave labels out, {_ESCAPE}")


_NO_IDS = (
    "inputs_embeds without input_ids do not tell which tokens are vision tokens; pass input_ids and pixel_values, "
    f"{_ESCAPE}"
)


def check_ids(arguments: dict[str, Any]) -> Tensor:
    """The token ids of a call.

    Raises:
        UnsupportedError: only embeddings were passed.
    """
    ids = arguments.get("input_ids")
    if ids is None:
        raise UnsupportedError(_NO_IDS)
    return ids


def _outputs_of_different_length(flag: str) -> str:
    return (
        f"{flag}: layers of a pruned model return different numbers of tokens, and attention outputs would switch the "
        f"fast attention off; leave it off, {_ESCAPE}"
    )
