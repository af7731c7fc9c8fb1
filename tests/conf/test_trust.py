"""What a request through a deployment may set: an allow-list; its values are data."""

from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, ValidationError

from conf.compose import compile_request
from conf.overrides import parse_overrides
from conf.request import RunRequest
from conf.schema import RunConfig
from conf.trust import NON_PATH_VALUES, check_path, list_rules, walk_rules
from tasks.config_base import RequestRule, Section
from tasks.errors import ConfigError
from tasks.redaction import redact
from tests.support.cli_sandbox import ROOT

CANARY = "canary-7f3a9c1e0b5d"


def ask(roots: tuple[Path, ...], **fields: Any) -> RunConfig:
    """Compile a request as a deployment does."""
    settings = {"output_dir": str(roots[0] / "runs"), **fields.pop("settings", {})}
    return compile_request(RunRequest.model_validate({**fields, "settings": settings}), roots=roots)


def test_every_setting_has_a_request_rule() -> None:
    rules = list_rules()
    assert len(rules) > 140
    assert not [name for name, rule in rules.items() if rule is None]


def test_a_string_field_without_a_request_rule_is_detected() -> None:
    class Nested(Section):
        """A section."""

        hosts: tuple[str, ...] = ()
        number: int = 1
        choice: Annotated[str, RequestRule("operator_only")] = ""

    class Whole(BaseModel):
        """A configuration."""

        nested: Nested
        mapping: dict[str, object]

    rules = dict(walk_rules(Whole))
    assert [name for name, rule in rules.items() if rule is None] == ["nested.hosts", "mapping"]


def test_settings_that_reach_other_hosts_or_programs_are_operator_only() -> None:
    owned = {name for name, rule in list_rules().items() if rule and rule.kind == "operator_only"}
    assert owned == {
        "llm.profiles", "store.bucket", "store.prefix", "store.endpoint_url", "store.region", "tracking.uri",
        "tracking.wandb_mode", "training.rdzv_endpoint",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("llm.profiles.local.batch_command", ["sh", "-c", "touch /tmp/owned"]),
        ("llm.profiles.local.capabilities.batch", "file"),
        ("llm.profiles.local.base_url", "http://elsewhere/v1"),
        ("llm.profiles.local.api_key_variable", "AWS_SECRET_ACCESS_KEY"),
        ("llm.profiles.local.extra_body", "x"),
        ("llm.profiles.mine.model", "x"),
        ("store.bucket", "somebody-elses"),
        ("store.prefix", "other/tenant"),
        ("store.endpoint_url", "http://elsewhere"),
        ("tracking.uri", "http://elsewhere"),
        ("tracking.uri", "sqlite:///file:/x.db?uri=true"),
        ("tracking.uri", "file:/etc"),
        ("tracking.uri", "databricks"),
        ("tracking.wandb_mode", "online"),
        ("training.rdzv_endpoint", "elsewhere:29500"),
    ],
)
def test_a_request_cannot_set_operator_only_settings(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{name} is set in conf/ on the worker's machine, not by a request"):
        ask((tmp_path,), settings={name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("subject.source", "/etc"),
        ("subject.source", "../.."),
        ("output_dir", "/tmp/elsewhere"),
        ("store.folder", "/"),
        ("subject.captions", "/etc/passwd"),
        ("scoring.labels", "/etc/passwd"),
        ("diffusion.pretrained_model_name_or_path", "../../models/evil"),
        ("diffusion.pretrained_model_name_or_path", "/models"),
        ("evaluation.encoders.clip", "/models"),
        ("output_dir", "store:/../../../tmp/x"),
        ("subject.source", "~/photos"),
    ],
)
def test_paths_outside_the_allowed_folders_are_rejected(tmp_path: Path, name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: .*outside the allowed folders"):
        ask((tmp_path,), class_noun="dog", settings={name: value})


def test_a_symlink_that_leaves_the_allowed_folders_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "photos").symlink_to("/etc")
    with pytest.raises(ConfigError, match=r"subject.source: .*outside the allowed folders"):
        ask((tmp_path,), class_noun="dog", source=str(tmp_path / "photos"))


@pytest.mark.parametrize("source", ["store:../../", "store:/etc", "store:", "store:a/../../b", "store:a\\..\\b"])
def test_a_store_prefix_cannot_escape_the_store(tmp_path: Path, source: str) -> None:
    with pytest.raises(
        ConfigError, match=r"subject.source: .*(must be a folder, or store:PREFIX|no folder of uploads)"
    ):
        ask((tmp_path,), class_noun="dog", source=source)


@pytest.mark.parametrize("source", ["store:01-subject/abc/images/", "store:llm/pictures/", "store:0", "store:u"])
def test_a_request_reads_photos_only_from_the_uploads_prefix_of_the_store(tmp_path: Path, source: str) -> None:
    with pytest.raises(ConfigError, match=r"subject.source: .*no folder of uploads"):
        ask((tmp_path,), class_noun="dog", source=source)
    assert ask((tmp_path,), class_noun="dog", source="store:uploads/rex/").subject.source == "store:uploads/rex/"


@pytest.mark.parametrize(
    ("source", "folder"),
    [
        ("{root}/runs/store/01-subject/abc/images", None),
        ("{root}/link", None),
        ("{root}/runs/store/llm/pictures", ""),
        ("{root}/runs/work/x/data", None),
        ("{root}/runs/store-cache", None),
        ("{root}/mine/01-subject", "{root}/mine"),
        ("{root}/operators/01-subject/abc", "{root}/mine"),
        ("store:store/01-subject/abc/", "{root}/runs"),
        ("store:store/", "{root}/runs"),
        ("store:abc/images/", "{root}/runs/store/01-subject"),
        ("store:operators/", "{root}"),
    ],
)
def test_a_request_cannot_use_internal_store_folders_as_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, folder: str | None
) -> None:
    option = tmp_path / "conf" / "experiment" / "kept.yaml"
    option.parent.mkdir(parents=True)
    option.write_text(f"# @package _global_\nstore: {{folder: {tmp_path}/operators}}\n")
    monkeypatch.setenv("LIKENESS_CONF", str(tmp_path / "conf"))
    (tmp_path / "runs" / "store" / "01-subject").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "runs" / "store" / "01-subject")
    settings = {} if folder is None else {"store.folder": folder.format(root=tmp_path)}
    experiment = "kept" if folder else "none"
    with pytest.raises(ConfigError, match=r"subject.source: .*what runs keep"):
        ask(
            (tmp_path,), class_noun="dog", source=source.format(root=tmp_path), settings=settings, experiment=experiment
        )
    uploads = () if "01-subject" in (folder or "") else ("store:uploads/rex/",)
    for good in (f"{tmp_path}/photos", f"{tmp_path}/runs/store/uploads/rex", *uploads):
        assert ask((tmp_path,), class_noun="dog", source=good, settings=settings).subject.source == good


def test_keywords_in_place_of_paths_are_accepted_only_by_their_own_setting(tmp_path: Path) -> None:
    rules = list_rules()
    assert all((rule := rules[name]) and rule.kind in ("path", "photos", "model") for name in NON_PATH_VALUES)
    for name, rule in rules.items():
        if rule is None or rule.kind not in ("path", "photos", "model"):
            continue
        for word in ("", "demo", "mini", "auto", "none"):
            if word in NON_PATH_VALUES.get(name, ()):
                check_path(name, word, (tmp_path,), rule=rule)
            else:
                with pytest.raises(ConfigError, match=f"{name}: .*outside the allowed folders"):
                    check_path(name, word, (tmp_path,), rule=rule)


@pytest.mark.parametrize("roots", [None, "some"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("source", "${oc.env:LIKENESS_CANARY}"),
        ("source", "x/${oc.env:LIKENESS_CANARY}/../.."),
        ("subject.web_lookup.query", "${oc.env:LIKENESS_CANARY}"),
        ("publishing.title", "${oc.env:LIKENESS_CANARY}"),
        ("output_dir", "${oc.env:LIKENESS_CANARY}"),
        ("tracking.experiment", "${output_dir}"),
    ],
)
def test_interpolations_in_request_values_are_not_resolved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, roots: str | None
) -> None:
    monkeypatch.setenv("LIKENESS_CANARY", CANARY)
    monkeypatch.chdir(tmp_path)
    fields = {"class_noun": "dog", **({name: text} if name == "source" else {"settings": {name: text}})}
    request = RunRequest.model_validate(fields)
    try:
        config = compile_request(request, roots=(tmp_path,) if roots else None)
    except ConfigError as error:
        assert CANARY not in str(error)
    else:
        assert CANARY not in config.model_dump_json()
        assert text in config.model_dump_json()


def test_interpolations_in_command_line_values_are_not_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIKENESS_CANARY", CANARY)
    request = parse_overrides(["subject.source=${oc.env:LIKENESS_CANARY}", "subject.class_noun=dog"])
    assert compile_request(request).subject.source == "${oc.env:LIKENESS_CANARY}"
    with pytest.raises(ConfigError, match=r"subject\.class_noun"):
        compile_request(parse_overrides(["subject.source=x", "subject.class_noun=${oc.env:LIKENESS_CANARY}"]))


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("prior.class_prompt", "{class_noun:>2000000000}"),
        ("prior.class_prompt", "{class_noun!r:>99}"),
        ("prior.class_prompt", "{class_noun.__class__}"),
        ("prior.class_prompt", "a photo of {article} {class_noun} {"),
        ("evaluation.prompts", ["{subject:>2000000000}"]),
        ("evaluation.prompts", ["{subject} {0}"]),
        ("evaluation.prompts", ["{subject} {x}"]),
        ("evaluation.prompts", ["{subject} }"]),
        ("evaluation.prompts", ["a dog"]),
        ("training.validation.sample_prompts", ["{subject} {subject:>999999999}"]),
    ],
)
def test_templates_accept_only_known_placeholders_without_format_specs(name: str, template: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{name}.*(may hold|lacks)"):
        compile_request(RunRequest.model_validate({"settings": {name: template}}))


@pytest.mark.parametrize(
    "name",
    [
        "subject.source",
        "subject.captions",
        "output_dir",
        "diffusion.pretrained_model_name_or_path",
        "publishing.title",
        "llm.judge",
    ],
)
@pytest.mark.parametrize("value", ["a\0b", "a\x1b[2Jb", "x" * 500_000])
def test_control_characters_and_oversized_values_raise_a_short_error(name: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compile_request(parse_overrides(["subject.class_noun=dog", f"{name}={value}"]))
    assert name in str(caught.value)
    assert len(str(caught.value)) < 400
    assert "\0" not in str(caught.value)
    with pytest.raises(ValidationError) as raised:
        RunRequest.model_validate({"settings": {name: value}})
    assert len(str(raised.value)) < 1500


@pytest.mark.parametrize("name", ["tracking.uri", "store.endpoint_url", "llm.profiles.local.base_url"])
@pytest.mark.parametrize(
    "address",
    [
        f"http://me:{CANARY}@host/v1",
        f"http://{CANARY}@host/v1",
        f"http://host/v1?token={CANARY}",
        f"http://host/v1?x={CANARY}",
        f"postgresql://me:{CANARY}@host/db",
    ],
)
def test_a_url_with_credentials_is_rejected_without_echoing_them(name: str, address: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}: .*use the environment") as caught:
        compile_request(RunRequest.model_validate({"settings": {name: address}}))
    assert CANARY not in str(caught.value)
    assert CANARY not in redact(address)


def test_a_request_may_lower_but_not_raise_the_operators_spending_cap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "capped.yaml").write_text("# @package _global_\nllm: {budget_usd: 2.0}\n")
    monkeypatch.setenv("LIKENESS_CONF", str(tmp_path / "conf"))
    assert ask((tmp_path,), experiment="capped", settings={"llm.budget_usd": 1.0}).llm.budget_usd == 1.0
    for value in (3.0, None):
        with pytest.raises(ConfigError, match=r"llm.budget_usd: at most 2.0 USD"):
            ask((tmp_path,), experiment="capped", settings={"llm.budget_usd": value})


def test_no_group_choice_raises_the_operators_spending_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for group in ("experiment", "llm"):
        (tmp_path / "conf" / group).mkdir(parents=True)
    capped = (ROOT / "conf" / "llm" / "openai.yaml").read_text().replace("\nllm:\n", "\nllm:\n  budget_usd: 2.0\n")
    assert "budget_usd: 2.0" in capped
    (tmp_path / "conf" / "llm" / "mine.yaml").write_text(capped)
    (tmp_path / "conf" / "experiment" / "lifted.yaml").write_text("# @package _global_\nllm: {budget_usd: 9.0}\n")
    monkeypatch.setenv("LIKENESS_CONF", str(tmp_path / "conf"))
    assert ask((tmp_path,), llm="mine").llm.budget_usd == 2.0
    with pytest.raises(ConfigError, match=r"llm.budget_usd: at most 2.0 USD"):
        ask((tmp_path,), llm="mine", experiment="lifted")


def test_an_option_in_the_operators_conf_folder_is_available_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "my conf é"
    (folder / "llm" / "profile").mkdir(parents=True)
    (folder / "llm" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - /llm/profile@llm.profiles.mine: mine\n"
        "llm:\n  models: [mine]\nscoring:\n  executor: sync\n"
    )
    (folder / "llm" / "profile" / "mine.yaml").write_text("base_url: http://127.0.0.1:1/v1\nmodel: m\n")
    with pytest.raises(ConfigError, match="llm: must be one of azure, local"):
        parse_overrides(["llm=mine"])
    monkeypatch.setenv("LIKENESS_CONF", str(folder))
    assert "mine" in RunRequest.model_json_schema()["properties"]["llm"]["enum"]
    assert compile_request(parse_overrides(["llm=mine"])).llm.profiles["mine"].model == "m"


@pytest.mark.parametrize("source", ["Fotos/Söhne", "a&b", "C (2)/x", "50% off!", "日本", "a: b", "what?"])
def test_values_that_are_not_hydra_syntax_are_taken_literally(source: str) -> None:
    config = compile_request(parse_overrides([f"subject.source={source}", "subject.class_noun=dog"]))
    assert config.subject.source == source


def test_a_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    config = compile_request(parse_overrides(["subject.source=~/photos", "subject.class_noun=dog"]))
    assert config.subject.source == "/home/somebody/photos"


def test_an_unclosed_list_raises_an_error_instead_of_becoming_a_string() -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        parse_overrides(["evaluation.prompts=['{subject}'"])
