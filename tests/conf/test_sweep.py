"""Search spaces, ranges and objectives of a sweep are parsed and validated before the first trial."""

import math

import pytest
from pydantic import ValidationError

from conf.compose import compile_request
from conf.sweep import Range, SweepRequest, check_sweep, list_figures, parse_objective, parse_range, parse_sweep
from tasks.errors import ConfigError

RATE = "training.learning_rate"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{RATE}=1e-6..1e-4:log", Range(low=1e-6, high=1e-4, log=True)),
        ("training.lora.rank=4..32:int", Range(low=4, high=32, integer=True)),
        ("training.lora.rank=4..32", Range(low=4, high=32, integer=True)),
        ("training.lora.rank=4..32:4", Range(low=4, high=32, step=4, integer=True)),
        ("training.lora.rank=1..64:log", Range(low=1, high=64, log=True, integer=True)),
        ("training.snr_gamma=1..20:int", Range(low=1, high=20, integer=True)),
        ("training.snr_gamma=1..20", Range(low=1, high=20)),
        ("training.ema_decay=0..0.9:0.3", Range(low=0, high=0.9, step=0.3)),
    ],
)
def test_a_range_has_the_ends_scale_and_step_that_are_written(text: str, expected: Range) -> None:
    assert parse_range(text) == expected
    assert parse_range(f"{text.partition('=')[0]}={expected}") == expected  # as it is shown


@pytest.mark.parametrize(
    "text", ["seed=1,2", "subject.source=../photos", "prior.class_prompt=a..b", "subject.source=~/a"]
)
def test_other_values_are_no_ranges(text: str) -> None:
    assert parse_range(text) is None


def test_a_range_with_a_step_has_decimal_values_and_ends_at_its_last_step() -> None:
    searched = Range(low=0.1, high=0.45, step=0.1)
    assert [searched.value(index) for index in range(int(searched.count))] == [0.1, 0.2, 0.3, 0.4]
    assert searched.top == 0.4
    assert math.isinf(Range(low=0, high=1).count)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([f"{RATE}=1e-4..1e-6"], "is empty: its low end must be below its high end"),
        ([f"{RATE}=0..1e-4:log"], "must start above 0"),
        ([f"{RATE}=1e-6..1e-4:linear"], "'linear' is no scale or step of a range"),
        ([f"{RATE}=1e-6..x"], "is no range: write LOW..HIGH"),
        ([f"{RATE}=0.1..0.2:0.5"], "is narrower than its step"),
        (["training.lora.rank=1..9:log:2"], "has both log and a step"),
        (["training.lora.rank=1..2.5"], "has ends or a step that are no integers"),
        (["training.lora.rank=0..8"], "training.lora.rank: Input should be greater than or equal to 1"),
        ([f"{RATE}=1e-6..5"], "training.learning_rate: Input should be less than or equal to 1"),
        (["training.optimizer=1..2"], "is no number, so it has no range: give values, as training.optimizer=adamw,"),
        (["training.lora.rnk=1..2"], "unknown setting 'training.lora.rnk'; did you mean training.lora.rank"),
        (["seed=1..2", "seed=1..3"], "seed is given twice"),
        (["seed=1..2", "seed=1,3"], "seed has both values and a range"),
        (["seed=1,2", "seed=1,3"], "seed is given twice"),
        ([f"{RATE}=interval(1,2)"], f"give values, {RATE}=V1,V2, or a range"),
        (["diffusion=mini,sd15"], "sweep single settings, not groups"),
        (["seed=range(0,100000)"], "10,000 values to try, must be 1 to 1,000"),
    ],
)
def test_an_invalid_range_is_one_line_that_names_the_setting(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_sweep(words, {"num_trials": 3})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_hydra_ranges_and_choices_are_values_to_try() -> None:
    request = parse_sweep(["seed=range(1,6,2)", f"{RATE}=choice(1e-5,1e-4)"])
    assert request.space == {"seed": [1, 3, 5], RATE: [1e-5, 1e-4]}


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        ([f"{RATE}=1e-6..1e-4"], {"sampler": "grid"}, "sampler grid needs finite values"),
        ([f"{RATE}=1e-6..1e-4"], {}, "has no end, since training.learning_rate is a range: set --trials, --hours or"),
        (["seed=1,2"], {"sampler": "tpe"}, "has no end, since sampler tpe repeats combinations"),
        (["seed=1..5000"], {}, "5,000 combinations, at most 1,000 are accepted"),
        (["seed=1,2"], {"num_seeds": 2}, "seed is searched"),
        (["seed=1,2"], {"objectives": ["dino", "clip_t"], "publish_best": True}, "publish_best needs one objective"),
        (["seed=1,2"], {"objectives": ["dino", "clip_t"], "pruner": "median"}, "pruner needs one objective"),
        (["seed=1,2"], {"objectives": ["dino", "metrics.tuned.dino:min"]}, "must be two different figures"),
        (["seed=1,2"], {"pruner": "median"}, "set training.validation.validation_steps above 0"),
        (["seed=1,2", "tracking=none"], {"publish_best": True}, "set tracking=mlflow"),
        (["seed=1,2"], {"num_trials": 10**6}, "num_trials: Input should be less than or equal to 1000"),
        (["seed=1,2"], {"num_seeds": 51}, "num_seeds: Input should be less than or equal to 50"),
        (["seed=1,2"], {"num_parallel": 65}, "num_parallel: Input should be less than or equal to 64"),
        (["seed=1,2"], {"max_usd": float("inf")}, "max_usd: Input should be"),
        (["seed=1,2"], {"max_hours": 0}, "max_hours: Input should be greater than 0"),
        (["seed=1,2"], {"study": "a/../b"}, "study: String should match pattern"),
        (["seed=1,2"], {"sampler": "cmaes"}, "sampler: Input should be 'auto'"),
        ([], {}, "or repeat one setting with --seeds N"),
        ([], {"num_seeds": 3, "sampler": "tpe"}, "sampler needs several trials, and seeds alone are one"),
        ([], {"num_seeds": 3, "num_trials": 2}, "num_trials needs several trials"),
        ([], {"num_seeds": 3, "max_hours": 1.0}, "max_hours needs several trials"),
        ([], {"num_seeds": 3, "max_usd": 1.0}, "max_usd needs several trials"),
        ([], {"num_seeds": 3, "num_parallel": 2}, "num_parallel needs several trials"),
        (
            ["training.validation.validation_steps=2"],
            {"num_seeds": 3, "pruner": "median"},
            "pruner needs several trials",
        ),
    ],
)
def test_an_invalid_option_is_refused_with_the_way_out(
    words: list[str], options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_sweep(words, options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"ranges": {"seed": {"low": 1, "high": float("inf")}}},
        {"ranges": {"seed": {"low": 1, "high": 1e300}}},
        {"ranges": {"evil\x1b": {"low": 1, "high": 2}}},
        {"space": {f"a{number}": [1] * 900 for number in range(2)}, "num_trials": 3},
        {"space": {"seed": [1, 2]}, "objectives": ["x" * 10_000]},
        {"space": {"seed": [1, 2]}, "objectives": ["dino"] * 3},
        {"space": {"seed": [1, 2]}, "study": "x" * 200},
        {"space": {"seed": [1, 2]}, "unknown": 1},
    ],
)
def test_hostile_fields_of_the_form_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        SweepRequest.model_validate(fields)


def test_every_field_of_the_form_has_a_description_and_every_number_bounds() -> None:
    schema = SweepRequest.model_json_schema()
    fields = {**schema["properties"], **schema["$defs"]["Range"]["properties"]}
    assert all("description" in field for field in fields.values())
    for name, field in fields.items():
        kinds = [field, *field.get("anyOf", [])]
        numbers = [kind for kind in kinds if kind.get("type") in ("number", "integer")]
        assert all({"maximum", "exclusiveMaximum"} & set(kind) for kind in numbers), name


def test_values_of_a_form_are_validated_like_those_of_the_command_line() -> None:
    ranges = {"training.lora.rank": Range(low=0, high=8, integer=True)}
    with pytest.raises(ConfigError, match="greater than or equal to 1"):
        check_sweep(SweepRequest(ranges=ranges, num_trials=2))
    with pytest.raises(ConfigError, match="takes integers"):
        check_sweep(SweepRequest(ranges={"training.lora.rank": Range(low=1, high=8)}, num_trials=2))
    with pytest.raises(ConfigError, match="is set in conf/ on the worker's machine"):
        check_sweep(SweepRequest(space={"tracking.uri": ["", "sqlite:///x.db"]}), roots=())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("dino", "metrics.tuned.dino:max"),
        ("dino_x_clip_t", "dino_x_clip_t:max"),
        ("pres", "metrics.tuned.pres:min"),
        ("prompt_following", "scores.tuned.prompt_following:max"),
        ("metrics.base.dino", "metrics.base.dino:max"),
        ("cost_usd", "cost_usd:min"),
        ("wall_seconds:max", "wall_seconds:max"),
        ("stages.training.seconds", "stages.training.seconds:min"),
        ("stages.training.counts.steps:min", "stages.training.counts.steps:min"),
        ("judge.alpha.image_quality", "judge.alpha.image_quality:max"),
        ("judge.pairs.tuned_strength", "judge.pairs.tuned_strength:max"),
    ],
)
def test_an_objective_has_a_full_name_and_a_direction(text: str, shown: str) -> None:
    assert str(parse_objective(text)) == shown


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dinoo", "unknown objective 'dinoo'; did you mean dino"),
        ("metrics.tuned.clip", "did you mean metrics.tuned.clip_t"),
        ("zzzzz", "flows/README.md lists the figures"),
        ("dino:up", "write dino:min or dino:max"),
        ("run_id", "unknown objective 'run_id'"),
    ],
)
def test_an_unknown_objective_names_the_closest_figures(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_sweep(["seed=1,2"], {"objectives": [text]})
    assert message in str(caught.value)


def test_figures_are_numbers_of_the_summary_alone() -> None:
    figures = list_figures()
    assert {"cost_usd", "metrics.tuned.dino", "stages.prior.seconds", "scores.base.image_quality"} <= set(figures)
    assert not {"schema_version", "run_id", "status"} & set(figures)


def test_the_grid_is_the_default_where_every_combination_is_wanted() -> None:
    words = ["seed=1,2", "training.lora.rank=4..8:2"]
    assert parse_sweep(words).is_grid
    assert parse_sweep(words).num_combinations == 6
    assert parse_sweep(words, {"num_trials": 6}).is_grid
    assert not parse_sweep(words, {"num_trials": 5}).is_grid
    assert parse_sweep(words, {"num_trials": 5, "sampler": "grid"}).is_grid
    assert len(parse_sweep(words).combinations()) == 6


def test_seeds_alone_are_a_study_of_one_setting() -> None:
    request = parse_sweep([f"{RATE}=1e-5"], {"num_seeds": 3})
    assert request.is_grid
    assert request.combinations() == [{}]
    assert request.max_trials == 1
    assert request.study_name.startswith("seeds-")
    assert parse_sweep([f"{RATE}=1e-5"], {"num_seeds": 4}).study_name != request.study_name


def test_a_searched_seed_or_source_replaces_that_of_the_base() -> None:
    request = SweepRequest.model_validate({"base": {"seed": 5}, "space": {"seed": [1, 2]}})
    assert compile_request(request.make_trial({"seed": 2})).seed == 2


def test_only_what_changes_the_values_is_part_of_the_derived_study_name() -> None:
    words = ["seed=1,2"]
    name = parse_sweep(words).study_name
    assert parse_sweep(words, {"num_trials": 9, "max_hours": 1.0, "num_parallel": 2}).study_name == name
    changed = [{"objectives": ["dino"]}, {"objectives": ["dino_x_clip_t:min"]}]
    assert all(parse_sweep(words, options).study_name != name for options in changed)
    assert (
        parse_sweep([f"{RATE}=1e-5,2e-5"], {"num_seeds": 2}).study_name != parse_sweep([f"{RATE}=1e-5,2e-5"]).study_name
    )
    assert parse_sweep(words, {"study": "mine"}).study_name == "mine"
