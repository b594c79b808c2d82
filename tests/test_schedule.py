"""Schedules: the published figures, an independent per-layer oracle, the solver, and every way to get a file wrong."""

from __future__ import annotations

import itertools
import json
import time
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from adaptinfer.schedule import PRESETS, Budget, ModelShape, Schedule, ScheduleError, Stage, preset, solve

LLAVA_7B = ModelShape(
    num_layers=32, hidden_size=4096, num_heads=32, num_kv_heads=32, head_dim=128, intermediate_size=11008
)
SMALL = ModelShape(num_layers=4, hidden_size=8, num_heads=2, num_kv_heads=1, head_dim=4, intermediate_size=16)


def stages(layers: Any, keeps: Any) -> tuple[Stage, ...]:
    return tuple(Stage(layer, keep) for layer, keep in zip(layers, keeps, strict=True))


def llava(*keeps: int) -> Schedule:
    return Schedule(stages((1, 10, 20), keeps), num_layers=32, vision_tokens=576)


@st.composite
def any_schedules(draw: st.DrawFn, shares: bool = True) -> Schedule:
    """Valid schedules of every kind: shares, scaled counts, literal counts, none at all."""
    num_layers = draw(st.integers(1, 40))
    layers = sorted(draw(st.sets(st.integers(0, num_layers - 2), max_size=5))) if num_layers > 1 else []
    reference = draw(st.none() | st.integers(1, 2000))
    if shares and draw(st.booleans()):
        keeps: list[Any] = [draw(st.floats(0, 1)) for _ in layers]
    else:
        keeps = sorted((draw(st.integers(0, reference or 2000)) for _ in layers), reverse=True)
    nominal = draw(st.none() | st.floats(0.01, 1e6))
    return Schedule(stages(layers, keeps), num_layers, reference, nominal, draw(st.none() | st.text(max_size=20)))


# --- published figures (arXiv 2508.06084) ---


@pytest.mark.parametrize(
    ("name", "layers", "keeps", "nominal", "theirs", "true"),
    [
        ("llava-1.5-7b/128", (1, 10, 20), (290, 72, 18), 128, 128.8, 146.2),
        ("llava-1.5-7b/64", (1, 10, 20), (133, 27, 3), 64, 65.0, 82.9),
        ("llava-1.5-7b/48", (1, 10, 20), (80, 24, 2), 48, 48.8, 66.7),
        ("llava-1.5-7b/32", (1, 10, 20), (40, 12, 0), 32, 33.0, 51.0),
        ("llava-1.5-13b/128", (1, 11, 22), (300, 94, 30), 128, 128.8, 142.4),
        ("llava-1.5-13b/64", (1, 11, 22), (148, 40, 5), 64, 64.6, 78.9),
    ],
)
def test_published_schedules_have_the_published_averages(
    name: str, layers: Any, keeps: Any, nominal: int, theirs: float, true: float
) -> None:
    schedule = preset(name)
    assert schedule.stages == stages(layers, keeps)
    assert schedule.nominal == nominal
    assert schedule.nominal_average() == pytest.approx(theirs, abs=0.051)
    assert schedule.true_average() == pytest.approx(true, abs=0.051)


@pytest.mark.parametrize(("percent", "keeps"), [(50, (700, 630, 189)), (30, (500, 300, 90)), (10, (170, 102, 31))])
def test_qwen2_presets_keep_shares_of_what_enters(percent: int, keeps: tuple[int, ...]) -> None:
    schedule = preset(f"qwen2-vl-2b/{percent}")
    assert [stage.layer for stage in schedule.stages] == [0, 9, 19]
    assert schedule.keeps(1000) == keeps
    assert schedule.nominal == percent / 100
    assert schedule.nominal_average(1000) / 1000 == pytest.approx(percent / 100, abs=0.011)


def test_presets_are_listed_when_one_is_unknown_and_cannot_be_changed() -> None:
    assert len(PRESETS) == 9
    with pytest.raises(ScheduleError, match="^name: .*'llava/64'.*llava-1.5-7b/128.*qwen2-vl-2b/10"):
        preset("llava/64")
    with pytest.raises(ScheduleError, match="^name: "):
        preset(["llava-1.5-7b/64"])  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError):
        PRESETS["mine"] = llava(1, 1, 1)  # pyright: ignore[reportIndexIssue]
    for size in (64, 128):
        assert "inferred, not published" in (preset(f"llava-1.5-13b/{size}").name or "")


def test_flops_of_the_published_schedule() -> None:
    vanilla = Schedule((), 32, 576).prefill_flops(LLAVA_7B, text_tokens=92)
    schedule = preset("llava-1.5-7b/64")
    plain = schedule.prefill_flops(LLAVA_7B, text_tokens=92, early_drop=False)
    early = schedule.prefill_flops(LLAVA_7B, text_tokens=92)
    assert 100 * (1 - plain / vanilla) == pytest.approx(74.0, abs=0.05)
    assert 100 * (1 - early / vanilla) == pytest.approx(76.0, abs=0.05)
    # 76.3 % is the figure for dropped tokens that do not even get a query, which needs them known beforehand.
    queries = sum(2 * 4096 * 4096 * dropped for dropped in (576 - 133, 133 - 27, 27 - 3))
    assert 100 * (1 - (early - queries) / vanilla) == pytest.approx(76.3, abs=0.05)


def test_flops_and_kv_bytes_by_hand() -> None:
    # Layers are given 10, 10, 4, 4 vision tokens and 2 of text; layer 1 drops.
    schedule = Schedule((Stage(1, 4),), num_layers=4, vision_tokens=10)
    q, k, v, o, mlp = 8 * 8, 8 * 4, 8 * 4, 8 * 8, 3 * 8 * 16

    def full(tokens: int) -> int:
        return 2 * tokens * (q + k + v + o + mlp) + 2 * tokens * tokens * 8  # half of (Q K^T and A V), heads x dim = 8

    stage = 2 * 12 * (q + k + v) + 2 * 6 * (o + mlp) + 2 * 6 * 12 * 8
    assert schedule.prefill_flops(SMALL, 2, early_drop=False) == full(12) * 2 + full(6) * 2
    assert schedule.prefill_flops(SMALL, 2) == full(12) + stage + full(6) * 2
    assert schedule.kv_bytes(SMALL, 2, batch=3) == 3 * 2 * 2 * (1 * 4) * (12 + 12 + 6 + 6)
    assert schedule.kv_bytes(SMALL, 2, bytes_per_value=4) == 2 * 4 * 4 * 36
    share = (q + k + v) / (q + k + v + o + mlp)
    assert schedule.computed_average(SMALL) == pytest.approx((10 + 4 + 6 * share + 4 + 4) / 4)


# --- keeps and tokens per layer ---


def test_counts_scale_with_the_prompt_and_halves_round_up() -> None:
    schedule = preset("llava-1.5-7b/64")
    assert schedule.keeps() == (133, 27, 3)
    assert schedule.keeps(1152) == (266, 54, 6)
    assert schedule.keeps(288) == (67, 14, 2)  # 66.5, 13.5, 1.5
    assert schedule.keeps(1) == (0, 0, 0)
    assert schedule.keeps(0) == (0, 0, 0)


def test_shares_round_as_the_decimal_numbers_they_are_written_as() -> None:
    assert 0.145 * 100 < 14.5  # in binary
    assert Schedule((Stage(0, 0.145),), 2).keeps(100) == (15,)
    assert Schedule((Stage(0, 1.0),), 2).keeps(7) == (7,)
    assert Schedule((Stage(0, 1),), 2).keeps(7) == (1,)


def test_literal_counts_are_never_exceeded_silently() -> None:
    literal = Schedule((Stage(0, 100), Stage(1, 20)), num_layers=4)
    assert literal.keeps(100) == (100, 20)
    assert literal.keeps(0) == (0, 0)
    with pytest.raises(ScheduleError, match=r"^stages\[0\].keep: 100 .* only 99 enter .*vision_tokens"):
        literal.keeps(99)
    with pytest.raises(ScheduleError, match=r"^stages\[1\].keep: 20 .* only 19 enter"):
        Schedule((Stage(0, 0.5), Stage(1, 20)), num_layers=4).keeps(38)


@given(any_schedules(), st.integers(0, 3000))
def test_tokens_per_layer_against_a_walk_through_the_layers(schedule: Schedule, tokens: int) -> None:
    if schedule.vision_tokens is None:
        assume(all(isinstance(stage.keep, float) or stage.keep <= tokens for stage in schedule.stages))
    alive, expected = tokens, []
    for layer in range(schedule.num_layers):
        expected.append(alive)
        for stage in schedule.stages:
            if stage.layer == layer:
                of = Fraction(str(stage.keep)) * alive
                if isinstance(stage.keep, int):
                    of = Fraction(stage.keep * tokens, schedule.vision_tokens or tokens or 1)
                alive = int(of * 2 + 1) // 2
    assert schedule.tokens_per_layer(tokens) == tuple(expected)
    assert schedule.true_average(tokens) == pytest.approx(sum(expected) / schedule.num_layers)
    keeps = (tokens, *schedule.keeps(tokens))
    assert list(keeps) == sorted(keeps, reverse=True)


@given(any_schedules(), st.integers(0, 3000), st.integers(0, 500))
def test_the_three_averages_are_ordered_and_so_are_the_flops(schedule: Schedule, tokens: int, text: int) -> None:
    if schedule.vision_tokens is None:
        assume(all(isinstance(stage.keep, float) or stage.keep <= tokens for stage in schedule.stages))
    shape = ModelShape(schedule.num_layers, 64, 4, 2, 16, 128)
    nominal, true = schedule.nominal_average(tokens), schedule.true_average(tokens)
    assert nominal - 1e-9 <= schedule.computed_average(shape, tokens) <= true + 1e-9
    early = schedule.prefill_flops(shape, text, tokens)
    plain = schedule.prefill_flops(shape, text, tokens, early_drop=False)
    assert early <= plain <= Schedule((), schedule.num_layers).prefill_flops(shape, text, tokens)
    assert (early < plain) == (nominal < true)


def test_a_count_of_vision_tokens_is_needed_from_somewhere() -> None:
    for method in (Schedule.keeps, Schedule.tokens_per_layer, Schedule.true_average, Schedule.nominal_average):
        with pytest.raises(ScheduleError, match="^vision_tokens: "):
            method(preset("qwen2-vl-2b/50"))
        with pytest.raises(ScheduleError, match="^vision_tokens: must be at least 0"):
            method(preset("llava-1.5-7b/64"), -1)


# --- validation ---

BAD_FIELDS = [
    ({"stages": [(3, 5)]}, r"stages\[0\].layer: must be at most 2 with 4 layers, not 3"),
    ({"stages": [(-2, 5)]}, r"stages\[0\].layer: must be at least -1"),
    ({"stages": [(1, 5), (1, 4)]}, r"stages\[1\].layer: 1 does not come after 1"),
    ({"stages": [(2, 5), (1, 4)]}, r"stages\[1\].layer: 1 does not come after 2"),
    ({"stages": [(True, 5)]}, r"stages\[0\].layer: must be a whole number, not True"),
    ({"stages": [(1.0, 5)]}, r"stages\[0\].layer: must be a whole number, not 1.0"),
    ({"stages": [("1", 5)]}, r"stages\[0\].layer: must be a whole number, not '1'"),
    ({"stages": [(-1, 6), (0, 5), (1, 4), (2, 3), (3, 2)]}, "stages: 5 stages, but 4 layers have room for 4"),
    ({"stages": [(0, 11)]}, r"stages\[0\].keep: 11 is more than the 10"),
    ({"stages": [(0, 5), (1, 6)]}, r"stages\[1\].keep: 6 is more than the 5"),
    ({"stages": [(0, 0.5), (1, 6)]}, r"stages\[1\].keep: 6 is more than the 5"),
    ({"stages": [(0, 5), (1, 6)], "vision_tokens": None}, r"stages\[1\].keep: 6 is more than the 5"),
    ({"stages": [(0, 4), (1, 0.5), (2, 3)], "vision_tokens": None}, r"stages\[2\].keep: 3 is more than the 2"),
    ({"stages": [(0, -1)]}, r"stages\[0\].keep: must be at least 0, not -1"),
    ({"stages": [(0, -0.1)]}, r"stages\[0\].keep: a float is a share from 0 to 1"),
    ({"stages": [(0, 5.0)]}, r"stages\[0\].keep: a float is a share from 0 to 1, not 5.0; write a count as an int"),
    ({"stages": [(0, float("nan"))]}, r"stages\[0\].keep: a float is a share"),
    ({"stages": [(0, float("inf"))]}, r"stages\[0\].keep: a float is a share"),
    ({"stages": [(0, True)]}, r"stages\[0\].keep: must be a whole number of tokens or a share"),
    ({"stages": [(0, "5")]}, r"stages\[0\].keep: must be a whole number of tokens or a share"),
    ({"stages": [(0, None)]}, r"stages\[0\].keep: must be a whole number of tokens or a share"),
    ({"num_layers": 0}, "num_layers: must be at least 1, not 0"),
    ({"num_layers": True}, "num_layers: must be a whole number"),
    ({"num_layers": "4"}, "num_layers: must be a whole number"),
    ({"num_layers": None}, "num_layers: must be a whole number"),
    ({"vision_tokens": 0}, "vision_tokens: must be at least 1"),
    ({"vision_tokens": 10.0}, "vision_tokens: must be a whole number"),
    ({"nominal": 0}, "nominal: must be above 0"),
    ({"nominal": float("nan")}, "nominal: must be a finite number"),
    ({"nominal": 10**400}, "nominal: must be a finite number"),
    ({"nominal": False}, "nominal: must be a finite number"),
    ({"name": 7}, "name: must be text"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_FIELDS)
def test_what_makes_no_sense_is_refused_by_field_in_python_and_in_a_file(fields: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"stages": [(0, 5)], "num_layers": 4, "vision_tokens": 10, "nominal": None, "name": None}
    assert Schedule(**{**good, "stages": stages(*zip(*good["stages"], strict=True))})
    made = {**good, **fields}
    with pytest.raises(ScheduleError, match=f"^{message}"):
        Schedule(**{**made, "stages": tuple(Stage(*pair) for pair in made["stages"])})
    entries = [{"layer": layer, "keep": keep} for layer, keep in made["stages"]]
    with pytest.raises(ScheduleError, match=f"^{message}"):
        Schedule.from_json(json.dumps({"format": "adaptinfer.schedule", "version": 1, **made, "stages": entries}))


@pytest.mark.parametrize("value", [None, 5, "12", {1: 2}, [(0, 5)], [None]])
def test_stages_must_be_stages(value: Any) -> None:
    with pytest.raises(ScheduleError, match=r"^stages(\[0\])?: must be a "):
        Schedule(value, 4)


def test_values_are_normalised() -> None:
    numpy = pytest.importorskip("numpy")
    schedule = Schedule([Stage(numpy.int64(0), numpy.float32(0.5))], numpy.int32(4), numpy.int64(10))  # type: ignore[arg-type]
    assert schedule == Schedule((Stage(0, 0.5),), 4, 10)
    assert hash(schedule) == hash(Schedule.from_json(schedule.to_json()))


def test_check_against_a_model() -> None:
    schedule = preset("llava-1.5-7b/64")
    schedule.check(32)
    other = ModelShape(16, 64, 4, 4, 16, 128)
    for call in (
        lambda: schedule.check(16),
        lambda: schedule.computed_average(other),
        lambda: schedule.prefill_flops(other, 1),
        lambda: schedule.kv_bytes(other, 1),
    ):
        with pytest.raises(ScheduleError, match="^num_layers: the schedule is for 32 layers, the model has 16"):
            call()


# --- model shapes ---


def test_model_shape_from_a_config() -> None:
    text = SimpleNamespace(
        num_hidden_layers=28, hidden_size=1536, num_attention_heads=12, num_key_value_heads=2, intermediate_size=8960
    )
    expected = ModelShape(28, 1536, 12, 2, 128, 8960)
    assert ModelShape.from_config(text) == expected
    assert ModelShape.from_config(SimpleNamespace(get_text_config=lambda: text)) == expected
    text.head_dim = None
    assert ModelShape.from_config(text) == expected
    text.head_dim, text.num_key_value_heads = 256, None
    assert ModelShape.from_config(text) == ModelShape(28, 1536, 12, 12, 256, 8960)
    del text.intermediate_size
    with pytest.raises(ScheduleError, match="^config.intermediate_size: must be a whole number, not None"):
        ModelShape.from_config(text)


def test_model_shape_from_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    assert ModelShape.from_config(transformers.LlavaConfig()) == LLAVA_7B
    assert ModelShape.from_config(transformers.LlavaConfig().text_config) == LLAVA_7B


def test_model_shape_refuses_nonsense() -> None:
    with pytest.raises(ScheduleError, match="^num_kv_heads: must be at least 1, not 0"):
        ModelShape(32, 4096, 32, 0, 128, 11008)
    with pytest.raises(ScheduleError, match="^hidden_size: must be a whole number"):
        ModelShape(32, 4096.0, 32, 32, 128, 11008)  # type: ignore[arg-type]


# --- solver ---


@pytest.mark.parametrize(
    ("budget", "keeps", "shape"),
    [
        (64, (79, 16, 2), (133, 27, 3)),
        (128, (242, 60, 15), (290, 72, 18)),
        (192, (410, 102, 25), (290, 72, 18)),
    ],
)
def test_solver_finds_the_published_shapes_at_a_true_average(budget: int, keeps: Any, shape: Any) -> None:
    schedule = solve(budget, num_layers=32, vision_tokens=576)
    assert schedule == llava(*keeps)
    assert schedule == solve(budget, 32, 576, layers=(1, 10, 20), shape=shape)
    assert schedule == solve(Fraction(budget, 576).numerator / Fraction(budget, 576).denominator, 32, 576)


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    num_layers = draw(st.integers(1, 48))
    vision_tokens = draw(st.sampled_from([1, 2, 7, 64, 576, 4000, 16384]) | st.integers(1, 3000))
    layers, shape = None, None
    if num_layers > 1 and draw(st.booleans()):
        layers = sorted(draw(st.sets(st.integers(0, num_layers - 2), min_size=1, max_size=5)))
        tail = st.lists(st.integers(0, 300) | st.floats(0, 300), min_size=len(layers) - 1, max_size=len(layers) - 1)
        shape = [301, *sorted(draw(tail), reverse=True)]
    budget = draw(st.floats(0.001, 0.999) | st.floats(1, vision_tokens) | st.integers(1, vision_tokens))
    return {
        "budget": budget,
        "num_layers": num_layers,
        "vision_tokens": vision_tokens,
        "layers": layers,
        "shape": shape,
    }


@settings(max_examples=300, deadline=None)
@given(problems())
def test_solver_meets_the_budget_or_says_that_it_cannot(problem: dict[str, Any]) -> None:
    budget, num_layers, tokens, layers = (problem[key] for key in ("budget", "num_layers", "vision_tokens", "layers"))
    wanted = budget * tokens if budget < 1 else budget
    try:
        schedule = solve(**problem)
    except ScheduleError as error:
        assert str(error).startswith("budget: ")
        first = layers[0] if layers else min(0, num_layers - 2)  # without layers the first stage may go down to 0
        least = tokens * (first + 1) if num_layers > 1 else tokens
        assert wanted * num_layers < least + 1e-6
        return
    assert schedule.vision_tokens == tokens
    assert schedule.num_layers == num_layers
    assert [tokens, *schedule.keeps()] == sorted({tokens, *schedule.keeps()}, reverse=True)  # every stage drops some
    used = [stage.layer for stage in schedule.stages]
    if layers:
        assert set(used) <= set(layers)
        ends = [*layers, num_layers - 1]
    else:
        ends = [0, *(round(depth * num_layers / 32) for depth in (10, 20)), num_layers - 1]
    longest_span = max(after - before for before, after in itertools.pairwise(ends)) + (layers is None)
    error = schedule.true_average() - wanted
    assert abs(error) <= max(wanted / 100, longest_span / 2 / num_layers) + 1e-9
    if tokens >= 500 and wanted >= tokens / 10:  # what budgets are for
        assert abs(error) <= wanted / 100
    assert schedule == solve(**problem)


@pytest.mark.parametrize(
    ("share", "true", "keeps"), [(0.33, 21.12, (36, 9, 3)), (0.22, 14.08, (21, 5, 0)), (0.11, 7.04, (4, 1, 0))]
)
def test_solver_on_a_small_model(share: float, true: float, keeps: Any) -> None:
    schedule = solve(share, num_layers=12, vision_tokens=64)
    assert schedule.stages == stages((0, 4, 8), keeps)
    assert schedule.true_average() == pytest.approx(true, rel=0.01)
    assert schedule.true_average() <= true


def test_solver_stays_below_the_budget_where_it_can() -> None:
    averages = {budget: solve(budget, 32, 576).true_average() for budget in range(30, 577)}
    assert all(0.99 * budget <= average <= budget for budget, average in averages.items())


def test_solver_fills_later_stages_when_earlier_ones_are_full() -> None:
    schedule = solve(500, 32, 576)
    assert schedule.stages == (Stage(20, 354),)  # 576, 576, 354: the first two would drop nothing
    assert schedule.true_average() == pytest.approx(500, rel=0.01)
    assert solve(500, 32, 576, layers=(1, 10), shape=(1, 0)).true_average() == pytest.approx(500, rel=0.01)
    assert solve(576, 32, 576) == Schedule((), 32, 576)
    assert solve(1, 1, 1) == Schedule((), 1, 1)


def test_solver_puts_the_first_stage_earlier_only_when_it_must() -> None:
    first = {budget: solve(budget, 32, 576).stages[0].layer for budget in (128, 64, 48, 47, 32, 18)}
    assert first == {128: 1, 64: 1, 48: 1, 47: 0, 32: 0, 18: 0}
    assert solve(37, 32, 576, layers=(1, 10, 20)).stages[0].layer == 1
    assert solve(0.3, 80, 576).stages[0].layer == 3  # 1 of 32 is 2.5 of 80


BAD_BUDGETS = [
    ({"budget": 17.9}, "budget: .* out of reach: all 576 pass through layer 0, which makes 18 on 32 layers"),
    ({"budget": 35, "layers": (1, 10, 20)}, "budget: .* makes 36 on 32 layers.* or an earlier first stage"),
    ({"budget": 0.03}, "budget: a true average of 17.28 .* makes 18 "),
    ({"budget": 9, "num_layers": 1}, "budget: .* the last layer, 0, which makes 576 on 1 "),
    ({"budget": 577}, "budget: 577 is more than the 576"),
    ({"budget": 0}, "budget: must be a positive number"),
    ({"budget": -1}, "budget: must be a positive number"),
    ({"budget": True}, "budget: must be a positive number .*, not True"),
    ({"budget": float("nan")}, "budget: must be a positive number"),
    ({"budget": float("inf")}, "budget: must be a positive number"),
    ({"budget": 10**400}, "budget: must be a positive number"),
    ({"budget": "64"}, "budget: must be a positive number"),
    ({"budget": None}, "budget: must be a positive number"),
    ({"num_layers": 0}, "num_layers: must be at least 1"),
    ({"vision_tokens": 0}, "vision_tokens: must be at least 1"),
    ({"layers": (10, 1, 20)}, r"layers\[1\]: 1 does not come after 10"),
    ({"layers": (1, 10, 31)}, r"layers\[2\]: must be at most 30 with 32 layers"),
    ({"layers": range(32)}, "layers: 32 stages, but 32 layers have room for 31"),
    ({"layers": (1, 2, 3, 4)}, r"shape: 4 stages \(at layers \[1, 2, 3, 4\]\) need as many numbers, not 3"),
    ({"shape": (1, 2, 0)}, r"shape\[1\]: 2 is more than 1"),
    ({"shape": (0, 0, 0)}, r"shape\[0\]: must be above 0"),
    ({"shape": (1, -1, 0)}, r"shape\[1\]: must be at least 0"),
    ({"shape": (1, 1)}, "shape: 3 stages .* need as many numbers, not 2"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_BUDGETS)
def test_solver_refuses_by_field(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ScheduleError, match=f"^{message}"):
        solve(**{"budget": 64, "num_layers": 32, "vision_tokens": 576, **arguments})


def test_solver_is_fast() -> None:
    solve(64, 32, 576)
    start = time.process_time()
    for budget in range(100, 200):
        solve(budget, 32, 576)
    assert (time.process_time() - start) / 100 < 0.005


# --- files ---


@given(any_schedules())
def test_json_brings_back_the_same_schedule(schedule: Schedule) -> None:
    again = Schedule.from_json(schedule.to_json())
    assert again == schedule
    assert [type(stage.keep) for stage in again.stages] == [type(stage.keep) for stage in schedule.stages]


def test_save_and_load(tmp_path: Any) -> None:
    path = tmp_path / "schedule.json"
    preset("llava-1.5-7b/64").save(path)
    assert Schedule.load(path) == Schedule.load(str(path)) == preset("llava-1.5-7b/64")
    document = json.loads(path.read_text())
    assert (document["format"], document["version"]) == ("adaptinfer.schedule", 1)
    path.write_text("\ufeff" + path.read_text(), encoding="utf-8")  # a Windows editor has been here
    assert Schedule.load(path) == preset("llava-1.5-7b/64")


def document(**changes: Any) -> str:
    """A good schedule file with keys changed, or left out where `changes` says `...`."""
    data = {**json.loads(llava(133, 27, 3).to_json()), **changes}
    return json.dumps({key: value for key, value in data.items() if value is not ...})


def test_optional_keys_may_be_left_out() -> None:
    text = document(vision_tokens=..., nominal=..., name=...)
    assert Schedule.from_json(text) == Schedule(llava(133, 27, 3).stages, 32)


BAD_DOCUMENTS = [
    ("", "line 1, column 1: not JSON"),
    ('{\n  "format": oops}', "line 2, column 13: not JSON"),
    (document()[:-20], "line 1, column .*: not JSON"),
    ("[" * 100_000, "document: not readable as JSON"),
    ('{"version": ' + "9" * 5000 + "}", "document: not readable as JSON"),
    ("[]", r"document: must be a JSON object, not \[\]"),
    ("null", "document: must be a JSON object"),
    ("{}", "format: missing"),
    (document(format=...), "format: missing"),
    (document(format="kvpress"), "format: must be 'adaptinfer.schedule', not 'kvpress'"),
    (document(version=...), "version: missing"),
    (document(version=2, extra=1), "version: 2 was written by a newer adaptinfer, .*; upgrade"),
    (document(version=0), "version: must be at least 1"),
    (document(version="1"), "version: must be a whole number"),
    (document(version=True), "version: must be a whole number"),
    (document(num_layers=...), "num_layers: missing"),
    (document(stages=...), "stages: missing"),
    (document(extra=1), "extra: unknown key; known are format, version, num_layers, stages"),
    (document(stages={}), "stages: must be an array"),
    (document(stages="none"), "stages: must be an array"),
    (document(stages=[[1, 133]]), r"stages\[0\]: must be an object"),
    (document(stages=[{"layer": 1, "keep": 5}, {"layer": 2}]), r"stages\[1\].keep: missing"),
    (document(stages=[{"keep": 5}]), r"stages\[0\].layer: missing"),
    (document(stages=[{"layer": 1, "keep": 5, "k": 1}]), r"stages\[0\].k: unknown key; known are layer, keep"),
]


@pytest.mark.parametrize(("text", "message"), BAD_DOCUMENTS)
def test_broken_files_are_refused_by_field_and_by_name(text: str, message: str, tmp_path: Any) -> None:
    with pytest.raises(ScheduleError, match=f"^{message}"):
        Schedule.from_json(text)
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ScheduleError, match=rf"^{message}.*broken\.json"):
        Schedule.load(path)


def test_files_that_cannot_be_read_or_written_are_named(tmp_path: Any) -> None:
    with pytest.raises(ScheduleError, match=r"^path: .*none\.json.*No such file"):
        Schedule.load(tmp_path / "none.json")
    with pytest.raises(ScheduleError, match=f"^path: .*{tmp_path.name}.*directory"):
        Schedule.load(tmp_path)
    (tmp_path / "photo.json").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(ScheduleError, match=r"^path: .*photo\.json' is not UTF-8"):
        Schedule.load(tmp_path / "photo.json")
    with pytest.raises(ScheduleError, match=r"^path: cannot write .*a\.json"):
        llava(3, 2, 1).save(tmp_path / "missing" / "a.json")


@pytest.mark.parametrize(
    ("given", "amount", "is_share", "tokens", "share"),
    [
        (64, 64, False, 64, Fraction(1, 9)),
        ("64", 64, False, 64, Fraction(1, 9)),
        ("0.25", 0.25, True, 144, Fraction(1, 4)),
        (0.7, 0.7, True, Fraction("403.2"), Fraction(7, 10)),
        ("1e2", 100.0, False, 100, Fraction(100, 576)),
        (1, 1, False, 1, Fraction(1, 576)),
        (Budget(0.5), 0.5, True, 288, Fraction(1, 2)),
    ],
)
def test_a_budget_is_a_number_of_tokens_or_below_one_a_share(
    given: Any, amount: float, is_share: bool, tokens: Fraction | int, share: Fraction
) -> None:
    budget = Budget.parse(given)
    assert (budget, budget.is_share) == (Budget(amount), is_share)
    assert (budget.tokens(576), budget.share(576)) == (tokens, share)
    assert str(budget) == str(amount)


def test_a_budget_in_whole_tokens_and_inside_a_selection() -> None:
    assert [Budget(0.5).whole_tokens(n) for n in (1, 3, 4)] == [1, 2, 2]
    assert Budget(64).whole_tokens(576, 1.25) == 80
    assert Budget(400).whole_tokens(576, 2) == 576
    assert Budget(0.7).within(10, 8) == Budget(7)
    assert Budget(0.05).within(10, 5) == Budget(0.1)
    assert Budget(577).share(576) > 1
    for refused in (Budget(577).tokens, Budget(577).whole_tokens, lambda n: Budget(577).within(n, 3)):
        with pytest.raises(ScheduleError, match="budget: 577 is more than the 576 vision tokens there are"):
            refused(576)
    with pytest.raises(ScheduleError, match="less than half a token"):
        Budget(0.0001).whole_tokens(576)


@pytest.mark.parametrize("wrong", ["", "many", "-1", "nan", "inf", 0, -0.5, True, None, [64], float("nan")])
def test_no_budget(wrong: Any) -> None:
    with pytest.raises(ScheduleError, match="budget: must be a positive number of tokens, or a share below 1, not"):
        Budget.parse(wrong)
