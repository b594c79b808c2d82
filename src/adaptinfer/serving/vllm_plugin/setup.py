# pyright: reportMissingImports=false
"""From what a user asked for to an engine that can do it, or one sentence that says why not."""

from __future__ import annotations

import functools
import json
import logging
import os
from typing import TYPE_CHECKING, Any

from adaptinfer.errors import AdaptInferError, UnsupportedError
from adaptinfer.pruners.before import SelectsBefore
from adaptinfer.serving.settings import check_share, named, pruner_from, to_json
from adaptinfer.serving.vllm_plugin.plan import Planner

if TYPE_CHECKING:
    from collections.abc import Iterable

    from adaptinfer.pruners import Pruner

__all__ = ["CONFIG", "SCORING", "planner_of", "pruner_of", "vision_spans", "watch_configuration"]

CONFIG = "ADAPTINFER_CONFIG"
SCORING = "adaptinfer_scoring_seconds"  # attribute of a model runner's output, on its way to the scheduler
_PROCESSES = "ADAPTINFER_VLLM"  # set for the engine's and workers' processes, whose configuration comes ready made
_KEY = "adaptinfer"  # in --additional-config
_MODELS = {
    "TransformersMultiModalForCausalLM": "PrunedModel",
    "TransformersMultiModalMoEForCausalLM": "PrunedMoEModel",
}
_PACKAGE = "adaptinfer.serving.vllm_plugin"
_log = logging.getLogger("vllm.adaptinfer")  # vLLM's own format and level


def watch_configuration() -> None:
    """Wrap the one function in which vLLM turns arguments into a configuration; once, however often it is called."""
    from vllm.engine.arg_utils import EngineArgs

    create = EngineArgs.create_engine_config
    if not hasattr(create, _KEY):

        @functools.wraps(create)
        def create_engine_config(args: Any, *more: Any, **named: Any) -> Any:
            pruner, source = _asked(args)
            if pruner is None:
                os.environ.pop(_PROCESSES, None)
                return create(args, *more, **named)
            _check_arguments(args)
            wanted = args.max_num_scheduled_tokens or args.max_num_batched_tokens  # before vLLM fills in defaults
            _set_arguments(args, pruner)
            _take_part()
            config = create(args, *more, **named)
            _check_configuration(config, source)
            _set_configuration(config, wanted)
            return config

        setattr(create_engine_config, _KEY, True)
        EngineArgs.create_engine_config = create_engine_config
    if os.environ.get(_PROCESSES):
        _take_part()


def pruner_of(vllm_config: Any) -> Pruner | None:
    """The pruner of an engine; None if it has none."""
    settings = vllm_config.additional_config
    document = settings.get(_KEY) if isinstance(settings, dict) else None
    return None if document is None else pruner_from(document, f"additional_config: {_KEY}")


def planner_of(vllm_config: Any) -> Planner:
    """The planner of an engine that prunes."""
    document = json.dumps(vllm_config.additional_config[_KEY])
    return _planner(document, vllm_config.model_config.hf_text_config.num_hidden_layers)


@functools.cache
def _planner(document: str, num_layers: int) -> Planner:
    return Planner(pruner_from(document, f"additional_config: {_KEY}"), num_layers)


def vision_spans(features: Iterable[Any]) -> list[tuple[int, int]]:
    """Half-open ranges of the prompt's vision tokens, from vLLM's multimodal features."""
    return [
        (start, last + 1)
        for feature in features
        if feature.modality in ("image", "video")
        for start, last in feature.mm_position.extract_embeds_range()
    ]


def _asked(args: Any) -> tuple[Pruner | None, str]:
    """The pruner that is asked for, and the name of the setting that does."""
    from_arguments = (args.additional_config or {}).get(_KEY)
    source = CONFIG if from_arguments is None else f"--additional-config: {_KEY}"
    setting = os.environ.get(CONFIG) if from_arguments is None else from_arguments
    return (None if setting is None or setting == "" else pruner_from(setting, source)), source


def _check_arguments(args: Any) -> None:
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
        "--scheduler-cls": (args.scheduler_cls is not None, "pruning brings a scheduler of its own; leave it out"),
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


def _set_arguments(args: Any, pruner: Pruner) -> None:
    os.environ[_PROCESSES] = "1"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    args.additional_config = {**(args.additional_config or {}), _KEY: json.loads(to_json(pruner))}
    args.model_impl = "transformers"
    if not args.enforce_eager:
        _log.info("AdaptInfer: eager execution, for a CUDA graph gives all layers the same tokens")
        args.enforce_eager = True


def _take_part() -> None:
    """Put the pruned model classes in the place of vLLM's, and let each model runner tell its model of batches."""
    from vllm import ModelRegistry
    from vllm.model_executor.model_loader.utils import _MODEL_ARCH_BY_HASH
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    for architecture, name in _MODELS.items():
        ours = f"{_PACKAGE}.model:{name}"
        if getattr(ModelRegistry.models.get(architecture), "class_name", None) != name:
            logging.getLogger("vllm.model_executor.models.registry").addFilter(_expected)
            ModelRegistry.register_model(architecture, ours)
            _MODEL_ARCH_BY_HASH.clear()  # it may remember vLLM's class from an engine that did not ask
    for runner in (GPUModelRunner, CPUModelRunner):
        if not hasattr(runner.load_model, _KEY):
            runner.load_model = _binding(runner.load_model)
    if not hasattr(InputProcessor.process_inputs, _KEY):
        InputProcessor.process_inputs = _checking(InputProcessor.process_inputs)


def _expected(record: logging.LogRecord) -> bool:
    """Drops vLLM's warning that an architecture is registered already: to take its place is what was asked for."""
    return f"{_PACKAGE}.model" not in record.getMessage()


def _binding(load: Any) -> Any:
    @functools.wraps(load)
    def load_model(runner: Any, *args: Any, **kwargs: Any) -> Any:
        result = load(runner, *args, **kwargs)
        if pruner_of(runner.vllm_config) is not None:
            from adaptinfer.serving.vllm_plugin.runner import bind

            bind(runner)
        return result

    setattr(load_model, _KEY, True)
    return load_model


def _checking(process: Any) -> Any:
    """Refuse single requests before they reach the engine; the server answers such an error with status 400."""
    from vllm.exceptions import VLLMValidationError

    @functools.wraps(process)
    def process_inputs(processor: Any, *args: Any, **kwargs: Any) -> Any:
        request = process(processor, *args, **kwargs)
        if request.mm_features and pruner_of(processor.vllm_config) is not None:
            try:
                _check_request(request, planner_of(processor.vllm_config))
            except AdaptInferError as error:
                cache = processor.renderer.mm_processor_cache
                if cache is not None:  # it thinks that the engine has these pictures now, and would not send them again
                    for feature in request.mm_features:
                        cache.invalidate(feature.mm_hash or feature.identifier)
                raise VLLMValidationError(str(error)) from None
        return request

    setattr(process_inputs, _KEY, True)
    return process_inputs


def _check_request(request: Any, planner: Planner) -> None:
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


def _check_configuration(config: Any, source: str) -> None:
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
        f"{name} adds vision features behind its first layers": hasattr(
            getattr(model.hf_config, "vision_config", None), "deepstack_visual_indexes"
        ),
    }
    for reason, applies in refused.items():
        if applies:
            raise UnsupportedError(f"AdaptInfer in vLLM: {reason}; such a model cannot be pruned here")
    with named(source):
        planner = planner_of(config)  # raises if the schedule is for another depth
        check_share(planner.pruner, planner.num_layers)
    _check_method(planner)


def _check_method(planner: Planner) -> None:
    """Refuse methods that read what vLLM does not show a layer, or that select before the language model."""
    pruner = planner.pruner
    if pruner.varies:
        raise UnsupportedError(
            f"AdaptInfer in vLLM: {pruner.name} settles how many tokens of each prompt stay while it runs, and vLLM "
            "must be told beforehand; let counts be fixed (mass=None)"
        )
    if pruner.needs:
        raise UnsupportedError(
            f"AdaptInfer in vLLM: {pruner.name} needs {', '.join(sorted(pruner.needs))}, and in vLLM a method reads "
            "queries, keys and hidden states of its own layer; use one that does with these, such as fastv"
        )
    if isinstance(pruner, SelectsBefore):
        raise UnsupportedError(
            f"AdaptInfer in vLLM: {pruner.name} selects before the language model, and vLLM has counted the prompt's "
            "tokens by then; use a method that prunes inside it"
        )


def _set_configuration(config: Any, wanted: int | None) -> None:
    """Scheduler and step size. ``wanted`` is what a user said a step takes."""
    scheduler = config.scheduler_config
    kind = "PruningAsyncScheduler" if scheduler.async_scheduling else "PruningScheduler"
    scheduler.scheduler_cls = f"{_PACKAGE}.scheduler.{kind}"
    # A step must take the longest prompt beside one token of each running request, or a prompt could wait for ever.
    needed = config.model_config.max_model_len + scheduler.max_num_seqs
    takes = min(scheduler.max_num_batched_tokens, scheduler.max_num_scheduled_tokens or needed)
    if takes >= needed:
        return
    if wanted is not None:
        raise UnsupportedError(
            f"AdaptInfer in vLLM: --max-num-batched-tokens: a step must take a whole prompt, so give at least {needed} "
            f"(--max-model-len, and the new tokens of --max-num-seqs answers), or leave it out; {wanted} is too few"
        )
    _log.info("AdaptInfer: a step takes up to %d tokens, to hold a whole prompt; --max-model-len lowers it", needed)
    scheduler.max_num_batched_tokens = max(scheduler.max_num_batched_tokens, needed)
    if scheduler.max_num_scheduled_tokens is not None:
        scheduler.max_num_scheduled_tokens = max(scheduler.max_num_scheduled_tokens, needed)
    scheduler.max_num_encoder_input_tokens = max(scheduler.max_num_encoder_input_tokens, needed)
    scheduler.encoder_cache_size = max(scheduler.encoder_cache_size, needed)
