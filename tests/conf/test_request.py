"""From a request to a configuration, by every way in."""

import json
import os
import re
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from conf.compose import compile_request, compute_config_digest
from conf.groups import CONFIG_DIR, GROUPS
from conf.overrides import parse_overrides, split_sweep
from conf.request import RunRequest
from conf.schema import RunConfig
from conf.subjects import ManyRequest
from conf.sweep import SweepRequest
from tasks.errors import ConfigError
from tasks.services.config import StoreConfig

OVERRIDES = [
    "subject.source=photos", "subject.class_noun=mug", "experiment=smoke", "training.learning_rate=3e-5",
    'evaluation.prompts=["{subject}","{subject} at night"]', "prior=none",
]  # fmt: skip
FORM = {
    "subject": "folder",
    "source": "photos",
    "class_noun": "mug",
    "experiment": "smoke",
    "prior": "none",
    "settings": {"training.learning_rate": 3e-5, "evaluation.prompts": ["{subject}", "{subject} at night"]},
}


def test_the_same_request_by_four_routes_has_one_configuration_digest() -> None:
    from conf.sweep import parse_sweep

    command_line = parse_overrides(OVERRIDES)
    deployment = RunRequest.model_validate(FORM)
    schedule = RunRequest.model_validate_json(json.dumps(FORM))
    sweep = parse_sweep([*(w for w in OVERRIDES if "learning_rate" not in w), "training.learning_rate=1e-5,3e-5"])
    trial = sweep.make_trial({"training.learning_rate": 3e-5})
    digests = {compute_config_digest(compile_request(r)) for r in (command_line, deployment, schedule, trial)}
    assert len(digests) == 1


def test_request_schema_enums_match_the_option_files_in_conf() -> None:
    properties = RunRequest.model_json_schema()["properties"]
    for field, group in GROUPS.items():
        assert properties[field]["enum"] == sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml")), group


OPTIONS = [(group, path.stem) for group in GROUPS.values() for path in sorted((CONFIG_DIR / group).glob("*.yaml"))]


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_group_option_composes(group: str, option: str) -> None:
    extra = ["llm=openai"] if group == "diffusion" and option != "mini" else []
    extra += ["training.rdzv_endpoint=host:29500"] if option == "nodes" else []
    extra += ["llm.profiles.azure-nano.base_url=https://x.example/v1"] if option == "azure" else []
    words = [f"{group}={option}", "subject.source=x", "subject.class_noun=dog", *extra]
    assert isinstance(compile_request(parse_overrides([*words, "store.bucket=b"])), RunConfig)


@pytest.mark.parametrize("form", [RunRequest, ManyRequest, SweepRequest])
def test_a_form_shows_its_fields_in_order_and_without_a_toggle_for_none(form: type[BaseModel]) -> None:
    properties = form.model_json_schema()["properties"]
    assert [field["position"] for field in properties.values()] == list(range(len(form.model_fields)))
    assert list(properties) == list(form.model_fields)
    assert not any({"type": "null"} in field.get("anyOf", []) for field in properties.values())
    assert all("description" in field for field in properties.values())
    for field in properties.values():  # a person sees them before breaking them
        for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "maxLength"):
            assert name not in field or str(field[name]) in field["description"], field


def test_source_and_class_noun_are_first_and_plain_strings() -> None:
    properties = RunRequest.model_json_schema()["properties"]
    assert list(properties)[:2] == ["source", "class_noun"]
    assert [properties[name]["type"] for name in ("source", "class_noun", "seed")] == ["string", "string", "integer"]


def test_an_empty_field_of_a_form_is_no_value() -> None:
    assert RunRequest.model_validate({"source": "", "class_noun": " "}) == RunRequest(source=None, class_noun=None)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("training.lerning_rate=1", "did you mean training.learning_rate"),
        ("learning_rate=1", "did you mean training.learning_rate"),
        ("training.learning_rate=nan", "training.learning_rate: .*finite"),
        ("training.learning_rate=-1", "training.learning_rate: .*greater than 0"),
        ("training.max_train_steps=abc", "training.max_train_steps: .*integer"),
        ("diffusion=sdxx", "diffusion: must be one of flux-dev, mini, sd15"),
        ("nonsense", "not of the form key=value"),
        ("+training.new=1", "use key=value"),
        ("~training", "not of the form"),
        ("training.max_train_steps=1,2", "one value"),
        ("training={max_train_steps: 3}", "give single values"),
        ("prior.num_class_images=0", "prior.num_class_images is 0: set prior=none"),
        ("diffusion=sd15", "knows only the drawn world.*set llm=openai"),
        ("evaluation.prompts=[a dog]", "lacks {subject}"),
        ("subject.identifier_token='a b'", "subject.identifier_token"),
        ("tracking.kind=none", "publishing.is_registered needs"),
        ("subject.min_images=30", "above subject.max_images"),
        ("prior.class_prompt='a {foo}'", "prior.class_prompt: .*only"),
        ("tracking.uri='http://me:secret@host'", "would be stored and logged"),
    ],
)
def test_an_invalid_override_raises_an_error_that_suggests_the_fix(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compile_request(parse_overrides([word]))


def test_a_missing_class_noun_raises_an_error_with_the_override_to_add() -> None:
    with pytest.raises(ConfigError, match=r"subject.class_noun is not set; add subject.class_noun="):
        compile_request(parse_overrides(["subject.source=photos"]))


@pytest.mark.parametrize(
    "settings",
    [
        {"_target_": "os.system"},
        {"training._target_": "x"},
        {"hydra/launcher": "x"},
        {"training.max_train_steps": {"nested": 1}},
        {"+training.x": 1},
        {"training..x": 1},
        {"trаining.max_train_steps": 1},  # a Cyrillic letter
    ],
)
def test_request_settings_accept_only_dotted_names_and_plain_values(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        RunRequest.model_validate({"settings": settings})


def test_unknown_request_fields_are_refused() -> None:
    with pytest.raises(ValidationError, match="extra_forbidden"):
        RunRequest.model_validate({"sauce": "x"})


def test_explicit_group_choices_override_model_and_provider_presets() -> None:
    config = compile_request(parse_overrides(["prior=none", "llm=openai", "scoring=sync", "experiment=smoke"]))
    assert config.prior.num_class_images == 0
    assert config.scoring.executor == "sync"
    assert compile_request(parse_overrides(["llm=vllm"])).scoring.executor == "sync"
    assert not compile_request(parse_overrides(["tracking=none"])).publishing.is_registered


def test_paths_inside_the_allowed_folders_are_accepted(tmp_path: Path) -> None:
    settings = {"subject.source": str(tmp_path / "photos"), "output_dir": str(tmp_path / "runs")}
    request = RunRequest.model_validate({"settings": settings, "class_noun": "dog"})
    assert compile_request(request, roots=(tmp_path,)).output_dir == str(tmp_path / "runs")


def test_split_sweep_separates_fixed_settings_from_the_search_space() -> None:
    fixed, space = split_sweep(["experiment=smoke", "training.learning_rate=1e-5,3e-5", "seed=1,2"])
    assert fixed == ["experiment=smoke"]
    assert space == {"training.learning_rate": [1e-5, 3e-5], "seed": [1, 2]}
    with pytest.raises(ConfigError, match="not groups"):
        split_sweep(["prior=none,class_images"])


def test_a_changed_file_of_options_is_composed_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    option = tmp_path / "experiment" / "mine.yaml"
    option.parent.mkdir()
    monkeypatch.setenv("LIKENESS_CONF", str(tmp_path))
    monkeypatch.setenv("MY_SEED", "21")
    seeds = []
    for time_ns, text in enumerate(["seed: 11", "seed: 12", "seed: ${oc.decode:${oc.env:MY_SEED}}"], 1):
        option.write_text(f"# @package _global_\n{text}\n")
        os.utime(option, ns=(time_ns, time_ns))
        seeds.append(compile_request(RunRequest(experiment="mine")).seed)
    monkeypatch.setenv("MY_SEED", "22")
    assert [*seeds, compile_request(RunRequest(experiment="mine")).seed] == [11, 12, 21, 22]


def test_a_request_does_not_change_what_the_next_one_starts_from() -> None:
    changed = compile_request(RunRequest(settings={"evaluation.prompts": ["{subject}"], "training.learning_rate": 1.0}))
    plain = compile_request(RunRequest())
    assert changed.training.learning_rate == 1.0
    assert plain.training.learning_rate != 1.0
    assert len(plain.evaluation.prompts) > 1


def test_composing_from_many_threads_is_safe() -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        digests = set(pool.map(lambda _: compute_config_digest(compile_request(RunRequest())), range(24)))
    assert len(digests) == 1


def test_a_tracking_list_selects_the_tracker_and_additional_loggers() -> None:
    config = compile_request(parse_overrides(["tracking=[mlflow,tensorboard]"]))
    assert (config.tracking.kind, config.tracking.loggers) == ("mlflow", ("tensorboard",))
    config = compile_request(parse_overrides(["tracking=[wandb]"]))
    assert (config.tracking.kind, config.tracking.loggers) == ("none", ("wandb",))
    with pytest.raises(ConfigError, match="'tensorboard' or 'wandb'"):
        compile_request(parse_overrides(["tracking=[mlflow,tensorbord]"]))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], 768),
        (["diffusion=sd15", "llm=openai"], 768),
        (["diffusion=sd21", "llm=openai"], 1152),
        (["diffusion=sdxl", "llm=openai"], 1536),
        (["diffusion=sdxl", "llm=openai", "subject.working_side=2048"], 2048),
    ],
)
def test_working_side_scales_with_the_training_resolution(words: list[str], expected: int) -> None:
    assert compile_request(parse_overrides(words)).subject.working_side == expected


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training/methd=lora", "unknown config group 'training/methd'; did you mean training/method"),
        ("training/method=", "training/method: must be one of auto, "),
    ],
)
def test_a_mistyped_config_group_is_refused_with_the_nearest_names(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_overrides([override])


def test_a_workers_output_folder_is_the_default_of_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIKENESS_OUTPUT_DIR", "/srv/runs")
    assert compile_request(RunRequest()).output_dir == "/srv/runs"
    assert compile_request(RunRequest(settings={"output_dir": "/elsewhere"})).output_dir == "/elsewhere"
    monkeypatch.delenv("LIKENESS_OUTPUT_DIR")
    assert compile_request(RunRequest()).output_dir == "runs"


def test_a_workers_bucket_and_tracking_server_are_defaults_of_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIKENESS_STORE_URL", "s3://a-bucket/team/one")
    monkeypatch.setenv("LIKENESS_TRACKING_URI", "http://127.0.0.1:5000")
    config = compile_request(RunRequest())
    assert (config.store.kind, config.store.bucket, config.store.prefix) == ("s3", "a-bucket", "team/one")
    assert config.tracking.uri == "http://127.0.0.1:5000"
    assert compile_request(RunRequest(settings={"store.kind": "local"})).store.kind == "local"
    monkeypatch.setenv("LIKENESS_STORE_URL", "s3://a-bucket")
    assert compile_request(RunRequest()).store.prefix == "likeness"
    for wrong in ("http://a-bucket", "s3://", "s3://A", "s3://a-bucket/${x}"):
        monkeypatch.setenv("LIKENESS_STORE_URL", wrong)
        with pytest.raises(ConfigError, match="LIKENESS_STORE_URL takes s3://BUCKET"):
            compile_request(RunRequest())


@pytest.mark.parametrize("kind", ["command line", "form"])
def test_a_store_that_a_request_chooses_wins_over_the_environment(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIKENESS_STORE_URL", "s3://a-bucket/team")

    def compose_store(*words: str) -> StoreConfig:
        request = parse_overrides(words)
        # The form sends every field, with the default of those that were not touched.
        return compile_request(request if kind == "command line" else RunRequest(**request.model_dump())).store

    assert compose_store("store=local").kind == "local"
    untouched = compose_store("experiment=smoke")
    assert (untouched.kind, untouched.bucket, untouched.prefix) == ("s3", "a-bucket", "team")
    shared = compose_store("store=s3")
    assert (shared.kind, shared.bucket, shared.prefix) == ("s3", "a-bucket", "team")
    # Fields are of the store that was chosen, and never mixed with those of the environment.
    other = compose_store("store=s3", "store.bucket=other")
    assert (other.kind, other.bucket, other.prefix) == ("s3", "other", "likeness")
    assert compose_store("store.kind=local").kind == "local"
    assert compose_store("store.prefix=mine").prefix == "mine"


def test_an_operators_own_store_wins_over_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "store").mkdir()
    text = "# @package _global_\nstore:\n  kind: s3\n  bucket: ours\n  prefix: p\n"
    (tmp_path / "store" / "ours.yaml").write_text(text)
    monkeypatch.setenv("LIKENESS_CONF", str(tmp_path))
    monkeypatch.setenv("LIKENESS_STORE_URL", "s3://a-bucket/team")
    store = compile_request(RunRequest(store="ours")).store
    assert (store.bucket, store.prefix) == ("ours", "p")
