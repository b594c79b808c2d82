"""AdaptInfer inside vLLM: prunes vision tokens inside the language model, on paged keys and values.

    plan.py       what each layer is given in a step: arithmetic on counts; knows neither torch nor vLLM
    step.py       one forward: scores, survivors, gathers
    model.py      vLLM's Transformers-backend models with hooks
    runner.py     whose tokens a step holds; attention metadata for fewer of them
    scheduler.py  prompts with vision tokens in one step; cache blocks that other requests may not read
    setup.py      what was asked for, and what is set for it
    refusals.py   what cannot be pruned, and why
    configuration.py  what an engine prunes with
    counts.py     numbers on their way to the front end; metrics.py puts them on the Prometheus endpoint

vLLM calls `register` in each of its processes (entry point ``vllm.general_plugins``). Nothing changes unless a pruner
is asked for: ``ADAPTINFER_CONFIG=... vllm serve MODEL`` or
``--additional-config '{"adaptinfer": {"budget": 64}}'``.
"""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Let vLLM ask, when an engine is configured, whether it is to prune."""
    from adaptinfer.serving.vllm_plugin import setup

    setup.watch_configuration()
