# pyright: reportMissingImports=false
"""From what a user asked for to an engine that can do it, or one sentence that says why not."""

from __future__ import annotations

import functools
import json
import logging
import os
from typing import Any

from adaptinfer.errors import AdaptInferError, UnsupportedError
from adaptinfer.pruners import Pruner
from adaptinfer.serving.settings import pruner_from, to_json
from adaptinfer.serving.vllm_plugin.configuration import KEY, planner_of, pruner_of
from adaptinfer.serving.vllm_plugin.refusals import check_arguments, check_configuration, check_request

CONFIG = "ADAPTINFER_CONFIG"
_PROCESSES = "ADAPTINFER_VLLM"  # set for the engine's and workers' processes, whose configuration comes ready made
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
    if not hasattr(create, KEY):

        @functools.wraps(create)
        def create_engine_config(args: Any, *more: Any, **named: Any) -> Any:
            pruner, source = _asked(args)
            if pruner is None:
                os.environ.pop(_PROCESSES, None)
                return create(args, *more, **named)
            check_arguments(args)
            wanted = args.max_num_scheduled_tokens or args.max_num_batched_tokens  # before vLLM fills in defaults
            _set_arguments(args, pruner)
            _take_part()
            config = create(args, *more, **named)
            check_configuration(config, source)
            _set_configuration(config, wanted)
            return config

        setattr(create_engine_config, KEY, True)
        EngineArgs.create_engine_config = create_engine_config
    if os.environ.get(_PROCESSES):
        _take_part()


def _asked(args: Any) -> tuple[Pruner | None, str]:
    """The pruner that is asked for, and the name of the setting that does."""
    from_arguments = (args.additional_config or {}).get(KEY)
    source = CONFIG if from_arguments is None else f"--additional-config: {KEY}"
    setting = os.environ.get(CONFIG) if from_arguments is None else from_arguments
    return (None if setting is None or setting == "" else pruner_from(setting, source)), source


def _set_arguments(args: Any, pruner: Pruner) -> None:
    os.environ[_PROCESSES] = "1"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    args.additional_config = {**(args.additional_config or {}), KEY: json.loads(to_json(pruner))}
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
        if not hasattr(runner.load_model, KEY):
            runner.load_model = _binding(runner.load_model)
    if not hasattr(InputProcessor.process_inputs, KEY):
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

    setattr(load_model, KEY, True)
    return load_model


def _checking(process: Any) -> Any:
    """Refuse single requests before they reach the engine; the server answers such an error with status 400."""
    from vllm.exceptions import VLLMValidationError

    @functools.wraps(process)
    def process_inputs(processor: Any, *args: Any, **kwargs: Any) -> Any:
        request = process(processor, *args, **kwargs)
        if request.mm_features and pruner_of(processor.vllm_config) is not None:
            try:
                check_request(request, planner_of(processor.vllm_config))
            except AdaptInferError as error:
                cache = processor.renderer.mm_processor_cache
                if cache is not None:  # it thinks that the engine has these pictures now, and would not send them again
                    for feature in request.mm_features:
                        cache.invalidate(feature.mm_hash or feature.identifier)
                raise VLLMValidationError(str(error)) from None
        return request

    setattr(process_inputs, KEY, True)
    return process_inputs


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
