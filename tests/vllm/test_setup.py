"""What is set when a pruner is asked for, what is refused with a sentence, and that nothing changes otherwise."""

from __future__ import annotations

import json
import re

import pytest
from conftest import engine, request, served
from test_tokens import SERVED, THREE

from adaptinfer import AdaptInfer, ScheduleError, UnsupportedError
from adaptinfer.pruners import METHODS, PrunerError
from adaptinfer.serving.settings import to_json
from adaptinfer.serving.vllm_plugin import register
from adaptinfer.serving.vllm_plugin.configuration import pruner_of
from adaptinfer.serving.vllm_plugin.setup import CONFIG

PRUNER = AdaptInfer(schedule=THREE)
ALL = {name: method(budget=0.4) for name, method in METHODS.items()}


@pytest.fixture
def configured(folder, monkeypatch):
    """The configuration of an engine, which is not started."""
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    monkeypatch.delenv("ADAPTINFER_VLLM", raising=False)
    register()
    from vllm.engine.arg_utils import EngineArgs

    def configure(pruner=PRUNER, model="llava", **options):
        monkeypatch.setenv(CONFIG, to_json(pruner) if isinstance(pruner, AdaptInfer) else pruner)
        options = {"dtype": "float32", "max_model_len": 512, "kv_cache_memory_bytes": 2**26, **options}
        return EngineArgs(model=folder(model) if model.isidentifier() else model, **options).create_engine_config()

    return configure


def test_nothing_changes_unless_asked(configured):
    config = configured("", model_impl="transformers")  # vLLM's own classes need torchvision
    assert config.scheduler_config.scheduler_cls is None
    assert not config.model_config.enforce_eager
    assert not config.additional_config
    assert pruner_of(config) is None


def test_what_is_set(configured, monkeypatch):
    config = configured()
    assert config.scheduler_config.scheduler_cls.startswith("adaptinfer.serving.vllm_plugin.scheduler.Pruning")
    assert config.model_config.model_impl == "transformers"
    assert config.model_config.enforce_eager
    assert config.cache_config.enable_prefix_caching
    assert config.scheduler_config.enable_chunked_prefill
    assert config.scheduler_config.max_num_batched_tokens >= 512 + config.scheduler_config.max_num_seqs
    assert pruner_of(config) == PRUNER
    by_argument = configured("", additional_config={"adaptinfer": {"budget": 0.4}})
    assert pruner_of(by_argument) == AdaptInfer(budget=0.4)
    assert pruner_of(configured("", model_impl="transformers")) is None  # the engine before was asked, this one is not


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"model_impl": "vllm"}, "--model-impl: models are pruned in vLLM's Transformers backend"),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size: a later rank would not know"),
        ({"decode_context_parallel_size": 2}, "--decode-context-parallel-size: ranks that share out a prompt"),
        (
            {"speculative_config": {"method": "eagle", "model": "x", "num_speculative_tokens": 1}},
            "--speculative-config: a draft model",
        ),
        *(
            (
                {"speculative_config": {"method": method, "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
                f"--speculative-config: {method}: drafts beside preempted requests",
            )
            for method in ("ngram", "ngram_gpu", "suffix")
        ),
        ({"kv_transfer_config": {"kv_connector": "x"}}, "--kv-transfer-config: pruned layers hold fewer tokens"),
        ({"enable_lora": True}, "--enable-lora: adapters are applied"),
        ({"enable_prompt_embeds": True}, "--enable-prompt-embeds: placeholders cannot be told"),
        ({"scheduler_cls": "some.Scheduler"}, "--scheduler-cls: pruning comes with its own scheduler"),
        ({"long_prefill_token_threshold": 64}, "--long-prefill-token-threshold: a prompt with vision tokens"),
        ({"max_num_batched_tokens": 256, "max_num_seqs": 8}, "--max-num-batched-tokens: a step must take"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused_with_a_sentence(configured, options, sentence):
    with pytest.raises(UnsupportedError, match=f"AdaptInfer in vLLM: {sentence}"):
        configured(**options)


def test_the_second_model_runner_is_refused(configured, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(UnsupportedError, match="VLLM_USE_V2_MODEL_RUNNER: pruning works in the first model runner"):
        configured()


def test_settings_that_do_not_fit(configured):
    with pytest.raises(ScheduleError, match="num_layers: the schedule is for 32 layers, the model has 6"):
        configured('{"preset": "llava-1.5-7b/64"}')
    for setting, field in [
        ('{"preset": "llava-1.5-7b/64"}', "num_layers: "),
        ('{"preset": "none/64"}', "name: there is no preset"),
        ('{"budget": 0}', "budget: must be a positive number"),
        ('{"budget": 0.01}', "budget: no picture can meet a share of 0.01"),
    ]:
        with pytest.raises((PrunerError, ScheduleError), match=f"^{CONFIG}: {field}"):
            configured(setting)
    with pytest.raises(ScheduleError, match="^--additional-config: adaptinfer: budget: no picture"):
        configured("", additional_config={"adaptinfer": {"budget": 0.01}})
    with pytest.raises(PrunerError, match=f"{CONFIG}: method: there is no method 'magic'"):
        configured('{"method": "magic"}')


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        (
            name,
            f"{name} needs {', '.join(sorted(each.capabilities.needs))}"
            if each.capabilities.needs
            else f"{name} selects before the language",
        )
        for name, each in ALL.items()
        if name not in SERVED
    ],
)
def test_methods_that_vllm_cannot_run(configured, method, sentence):
    with pytest.raises(UnsupportedError, match=re.escape(sentence)):
        configured(f'{{"method": "{method}", "budget": 0.4}}')


def test_models_that_cannot_be_pruned(configured, folder, tmp_path):
    import shutil

    windowed = shutil.copytree(folder("llava"), tmp_path / "windowed")
    config = json.loads((windowed / "config.json").read_text())
    config["text_config"] |= {"model_type": "mistral", "sliding_window": 64}
    (windowed / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="llava has layers of several kinds .* cannot be pruned here"):
        configured(model=str(windowed))


def test_an_engine_that_was_not_asked_after_one_that_was(folder, reference):
    requests = [request(seed) for seed in range(4)]
    with engine(folder("llava"), PRUNER) as llm:
        assert served(llm, requests) == reference("llava").tokens(PRUNER, requests)
    with engine(folder("llava"), None) as llm:
        assert served(llm, requests) == reference("llava").tokens(None, requests)
