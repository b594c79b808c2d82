# pyright: reportMissingImports=false
"""What pruning inside vLLM would get wrong, each refused with one sentence that says what to do instead."""

from __future__ import annotations

import os
from typing import Any

from adaptinfer.errors import UnsupportedError
from adaptinfer.serving.settings import check_share, named
from adaptinfer.serving.vllm_plugin.configuration import planner_of, vision_spans
from adaptinfer.serving.vllm_plugin.plan import Planner


def check_arguments(args: Any) -> None:
    """Refuse what pruning would get wrong, as far as arguments tell."""
    refused = {
        "--model-impl": (
            args.model_impl not in ("auto", "transformers"),
            "models are pruned in vLLM's Transformers backend; leave it out",
        ),
        "--pipeline-parallel-size": (
            args.pipeline_parallel_size > 1,
            "a later rank would not know which tokens an earlier one kept; use --tensor-parallel-size",
        ),
        "--decode-context-parallel-size": (
            args.decode_context_parallel_size > 1 or args.prefill_context_parallel_size > 1,
            "ranks that share out a prompt's tokens cannot score them; use --tensor-parallel-size",
        ),
        "--speculative-config": (bool(args.speculative_config), _speculation(args.speculative_config)),
        "--kv-transfer-config": (
            args.kv_transfer_config is not None,
            "pruned layers hold fewer tokens than a connector would send; leave it out",
        ),
        "--enable-lora": (
            args.enable_lora,
            "adapters are applied by the tokens of the whole step, of which pruned layers are given some; merge them",
        ),
        "--enable-prompt-embeds": (args.enable_prompt_embeds, "placeholders cannot be told in embeddings"),
        "--kv-sharing-fast-prefill": (args.kv_sharing_fast_prefill, "it skips layers that prune; leave it out"),
        "--enable-dbo": (args.enable_dbo, "microbatches cut prompts apart; leave it out"),
        "--scheduler-cls": (args.scheduler_cls is not None, "pruning comes with its own scheduler; leave it out"),
        "--long-prefill-token-threshold": (
            args.long_prefill_token_threshold > 0,
            "a prompt with vision tokens is computed in one step; leave it out",
        ),
    }
    for option, (applies, reason) in refused.items():
        if applies:
            raise UnsupportedError(f"AdaptInfer in vLLM: {option}: {reason}")
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "0") not in ("0", "false", "False"):
        raise UnsupportedError(
            "AdaptInfer in vLLM: VLLM_USE_V2_MODEL_RUNNER: pruning works in the first model runner; unset it"
        )


def _speculation(settings: Any) -> str:
    """Why drafts of this kind are refused."""
    method = settings.get("method") if isinstance(settings, dict) else getattr(settings, "method", None)
    if method in ("ngram", "ngram_gpu", "suffix"):
        return (
            f"{method}: drafts beside preempted requests have once given an answer that differed from the request's "
            "own, for a reason not found; leave it out"
        )
    return "a draft model would be given hidden states of dropped tokens, which do not exist; leave it out"


def check_configuration(config: Any, source: str) -> None:
    """Refuse what only the finished configuration tells."""
    model, text = config.model_config, config.model_config.hf_text_config
    name = model.hf_config.model_type
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    windowed = kinds != {"full_attention"} or (not getattr(text, "layer_types", None) and model.get_sliding_window())
    refused = {
        f"{name} has no vision tokens": not model.is_multimodal_model,
        f"{name} is not served for generation": model.runner_type != "generate",
        f"{name} is an encoder-decoder": model.is_encoder_decoder,
        f"{name} has layers of several kinds ({', '.join(sorted(kinds))}); with sliding windows, vLLM frees blocks by "
        "positions that pruned layers do not have": windowed,
        f"{name} attends in both directions inside a picture, and vLLM marks pictures by positions that pruned layers "
        "do not have": model.is_mm_prefix_lm,
        f"{name} compresses keys and values (MLA), and scores need whole keys": model.use_mla,
        f"{name} adds vision features after its first layers": hasattr(
            getattr(model.hf_config, "vision_config", None), "deepstack_visual_indexes"
        ),
    }
    for reason, applies in refused.items():
        if applies:
            raise UnsupportedError(f"AdaptInfer in vLLM: {reason}; such a model cannot be pruned here")
    with named(source):
        planner = planner_of(config)  # raises if the schedule is for another depth
        check_share(planner.pruner, planner.num_layers)
    check_method(planner)


def check_method(planner: Planner) -> None:
    """Refuse methods that read what vLLM does not show a layer, or that select before the language model."""
    pruner = planner.pruner
    can = pruner.capabilities
    if can.varies:
        raise UnsupportedError(
            f"AdaptInfer in vLLM: {pruner.name} decides during the forward how many tokens of each prompt stay, and "
            "vLLM needs these counts beforehand; make them fixed (mass=None)"
        )
    if can.needs:
        raise UnsupportedError(
            f"AdaptInfer in vLLM: {pruner.name} needs {', '.join(sorted(can.needs))}, and in vLLM a method reads "
            "queries, keys and hidden states of its own layer; use one that needs only these, such as fastv"
        )
    if can.before:
        raise UnsupportedError(
            f"AdaptInfer in vLLM: {pruner.name} selects before the language model, and vLLM has counted the prompt's "
            "tokens by then; use a method that prunes inside it"
        )


def check_request(request: Any, planner: Planner) -> None:
    prompt = planner.prompt(len(request.prompt_token_ids or ()), vision_spans(request.mm_features))
    if not prompt.prunes:
        return
    if getattr(request.sampling_params, "prompt_logprobs", None) is not None:
        raise UnsupportedError(
            "prompt_logprobs: vision tokens of this prompt are dropped inside the model, so that what follows them has "
            "no log-probability; leave it out"
        )
    if request.resumable:
        raise UnsupportedError("a streaming-input session cannot hold pictures while vision tokens are pruned")
