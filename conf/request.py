"""`RunRequest`: what every way in asks for, and the one path from a request to a `RunConfig`.

    request -> Hydra compose (group options only) -> typed settings -> plain dict -> RunConfig

The command line, a deployment's form, a schedule and a sweep all end in the same request.
Hydra's objects never leave this module.
"""

import difflib
import os
import re
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from conf.schema import RunConfig
from tasks.errors import ConfigError
from tasks.stage.digests import digest

FOLDER = Path(__file__).resolve().parent
# Groups of conf/ by the request's field.
GROUPS = {
    "subject": "subject", "prior": "prior", "method": "training/method",
    "devices": "training/devices", "evaluation": "evaluation",
    "scoring": "scoring", "publishing": "publishing", "diffusion": "diffusion", "llm": "llm",
    "store": "store", "tracking": "tracking", "experiment": "experiment",
}  # fmt: skip
FIELDS = {group: field for field, group in GROUPS.items()}
PATH_FIELDS = (
    "output_dir", "subject.source", "subject.captions", "store.folder", "diffusion.location",
    "evaluation.encoders.clip", "evaluation.encoders.dino", "scoring.labels", "tracking.uri",
)  # fmt: skip
COMPOSING = threading.Lock()  # GlobalHydra is one per process

# Where keys are sent and ranks meet: never taken from a request.
HOST_FIELDS = (
    r"llm\.profiles\..*\.(base_url|api_key_variable)|store\.endpoint_url|training\.rendezvous|tracking\.wandb_mode"
)

Value = bool | int | float | str | None | list[bool | int | float | str]


class RunRequest(BaseModel):
    """What to run. Every field has a default; with none set, it is the demo."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    subject: Literal["demo", "folder"] = Field(
        "demo",
        description="the shipped demo photos, or your own folder",
        json_schema_extra={"position": 0},
    )
    source: str | None = Field(
        None,
        description="folder of photos, or store:PREFIX in the object store",
        json_schema_extra={"position": 1},
    )
    class_noun: str | None = Field(
        None,
        max_length=60,
        description="what the subject is, for example dog",
        json_schema_extra={"position": 2},
    )
    diffusion: Literal["mini", "sd15", "sd21", "sdxl", "sd35-medium", "flux-dev"] = Field(
        "mini", description="base model", json_schema_extra={"position": 3}
    )
    experiment: Literal["none", "smoke"] = Field(
        "none", description="a named set of changes to the defaults", json_schema_extra={"position": 4}
    )
    prior: Literal["class_images", "none"] = Field("class_images", description="prior preservation")
    method: Literal["auto", "full", "lora", "token", "token+lora", "token+full"] = Field(
        "auto",
        description="what is learned: all weights, adapters, a new token, or a token and one of these; "
        "auto: as the base model's preset says",
    )
    devices: Literal["one", "all", "sharded", "nodes"] = Field(
        "one", description="one GPU or the CPU, all GPUs of the machine, weights sharded over them, or several machines"
    )
    evaluation: Literal["standard", "thorough"] = Field("standard", description="how much is sampled")
    scoring: Literal["auto", "batch", "sync"] = Field("auto", description="how the judge is called; auto: as llm says")
    publishing: Literal["auto", "registry", "local"] = Field("auto", description="where the model goes")
    llm: Literal["local", "openai", "xai", "openrouter", "azure", "vllm"] = Field("local", description="LLM provider")
    store: Literal["local", "s3"] = Field("local", description="where objects live")
    tracking: Literal["mlflow", "none"] = Field("mlflow", description="where metrics are tracked")
    seed: int | None = Field(None, ge=0, le=2**31 - 1, description="seed of training draws; empty: the default")
    settings: dict[str, Value] = Field(
        default_factory=dict,
        description="single values by dotted name, for example training.learning_rate: 2e-6",
    )

    @field_validator("settings")
    @classmethod
    def check_settings(cls, settings: dict[str, Value]) -> dict[str, Value]:
        """Refuse anything that is more than a name and a plain value."""
        for key, value in settings.items():
            if not re.fullmatch(r"[a-z][a-z0-9_]*(\.[A-Za-z0-9][A-Za-z0-9_-]*)*", key):
                raise ValueError(f"{key!r} is not a dotted name of a setting")
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, str) and "${" in item:
                    raise ValueError(f"{key}: interpolations are not taken from requests")
        return settings


def parse_overrides(overrides: Iterable[str]) -> RunRequest:
    """Turn `key=value` words of the command line into a request.

    Raises:
        ConfigError: a word is not of that form, or names nothing.

    """
    fields: dict[str, Any] = {}
    settings: dict[str, Value] = {}
    words = list(overrides)
    for word in words:
        if "=" not in word:
            raise ConfigError(f"{word!r} is not of the form key=value")
    try:
        parsed = OverridesParser.create().parse_overrides(words)
    except HydraException as error:
        raise ConfigError(f"cannot read {' '.join(words)!r}: {first_line(error)}") from error
    for override in parsed:
        key, plain = override.key_or_group, read_value(override)
        if key == "tracking" and isinstance(plain, list):
            fields["tracking"], settings["tracking.also"] = split_trackers(plain)
        elif key in FIELDS:
            fields[FIELDS[key]] = plain
        else:
            settings[key] = plain
    if "subject.source" in settings and "subject" not in fields:
        fields["subject"] = "folder"
    try:
        return RunRequest(**fields, settings=settings)
    except ValidationError as error:
        raise ConfigError(describe_invalid(error)) from error


def read_value(override: Override) -> Any:
    """Return the one plain value of an override. Raises ConfigError for anything else."""
    if override.type is not OverrideType.CHANGE or override.is_sweep_override():
        raise ConfigError(f"{override.input_line!r}: use key=value with one value")
    value = override.value()
    if isinstance(value, dict):
        name = override.key_or_group
        raise ConfigError(f"{name}: give single values, for example {name}.name=value")
    return unquote(value)


def split_trackers(names: list[Any]) -> tuple[str, list[Any]]:
    """Return the tracker that keeps runs and models, and the loggers beside it."""
    kinds = [name for name in names if name in ("mlflow", "none")]
    return (kinds[0] if kinds else "none"), [name for name in names if name not in kinds]


def split_sweep(words: Iterable[str]) -> tuple[list[str], dict[str, list[Value]]]:
    """Sort `key=value` words from those with several values. Raises ConfigError for group options."""
    fixed: list[str] = []
    space: dict[str, list[Value]] = {}
    for word in words:
        if "=" not in word:
            raise ConfigError(f"{word!r} is not of the form key=value")
        try:
            override = OverridesParser.create().parse_override(word)
        except HydraException as error:
            raise ConfigError(f"cannot read {word!r}: {first_line(error)}") from error
        if not override.is_choice_sweep():
            fixed.append(word)
            continue
        if override.key_or_group in FIELDS:
            raise ConfigError(f"{word!r}: sweep single settings, not groups of them")
        choices: Any = override.value()
        space[override.key_or_group] = [unquote(value) for value in choices.list]
    return fixed, space


def unquote(value: Any) -> Any:
    """Return the plain value behind Hydra's quoted strings."""
    if isinstance(value, list):
        return [unquote(item) for item in value]
    return value.text if type(value).__name__ == "QuotedString" else value


def compile_request(request: RunRequest, *, roots: tuple[Path, ...] | None = None) -> RunConfig:
    """Return the configuration that a request stands for.

    Args:
        request: what to run.
        roots: folders that paths must lie in; None trusts the request (a person's terminal).

    Raises:
        ConfigError: a setting is unknown, out of bounds, or missing.

    """
    settings = {**request.settings}
    for name in ("source", "class_noun"):
        value = getattr(request, name)
        if value is not None:
            settings[f"subject.{name}"] = value
    if request.seed is not None:
        settings["seed"] = request.seed
    is_own = request.subject == "demo" and "subject.source" in settings
    choices = {group: getattr(request, field) for field, group in GROUPS.items()}
    choices["subject"] = "folder" if is_own else choices["subject"]
    if roots is not None:
        check_paths(settings, roots)
    with COMPOSING:
        plain = compose_plain({k: v for k, v in choices.items() if v is not None}, settings)
    try:
        return RunConfig.model_validate(plain)
    except ValidationError as error:
        raise ConfigError(describe_invalid(error)) from error


def compose_plain(choices: dict[str, str], settings: dict[str, Value]) -> dict[str, Any]:
    """Compose group options with Hydra, merge typed settings, and return a plain dict."""
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(FOLDER), version_base="1.3"):
            composed = compose("run", overrides=[f"{k}={v}" for k, v in sorted(choices.items())])
        known = {dotted for dotted, _ in walk(OmegaConf.to_container(composed, resolve=False))}
        OmegaConf.set_struct(composed, False)
        for key, value in settings.items():
            if key not in known and not key.startswith("llm.profiles."):
                raise ConfigError(f"unknown setting {key!r}{suggest(key, known)}")
            OmegaConf.update(composed, key, value)
        missing = sorted(str(key) for key in OmegaConf.missing_keys(composed))
        if missing:
            raise ConfigError(f"{missing[0]} is not set; add {missing[0]}=...")
        plain = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(first_line(error)) from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def walk(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yield every leaf and branch of a nested dict by dotted name."""
    for key, child in value.items():
        dotted = f"{prefix}{key}"
        yield dotted, child
        if isinstance(child, dict):
            yield from walk(child, f"{dotted}.")


def suggest(key: str, known: Iterable[str]) -> str:
    """Return the nearest valid names, as the end of a sentence."""
    names = list(known)
    near = difflib.get_close_matches(key, names, n=3, cutoff=0.6)
    last = key.rsplit(".", 1)[-1]
    ends = {name.rsplit(".", 1)[-1]: name for name in names}
    near += [ends[end] for end in difflib.get_close_matches(last, list(ends), n=2, cutoff=0.75)]
    unique = list(dict.fromkeys(near))[:3]
    return f"; did you mean {' or '.join(unique)}?" if unique else "; see conf/run.yaml for all names"


def check_paths(settings: dict[str, Value], roots: tuple[Path, ...]) -> None:
    """Refuse paths outside the allowed roots, and where secrets could be sent. Raises ConfigError."""
    for name in settings:
        if re.fullmatch(HOST_FIELDS, name):
            raise ConfigError(f"{name} is set in conf/ on the worker's machine, not by a request")
    for name in PATH_FIELDS:
        value = settings.get(name)
        if not isinstance(value, str) or value in ("demo", "mini", ""):
            continue
        if name == "subject.source" and value.startswith("store:"):
            continue
        is_hub = name.startswith(("diffusion", "evaluation")) and re.fullmatch(r"[\w.-]+/[\w.-]+", value)
        if is_hub and ".." not in value and not Path(value).exists():
            continue
        path = Path(value.removeprefix("sqlite:///")).absolute().resolve()
        if "://" in value.removeprefix("sqlite:///") or not any(path.is_relative_to(r) for r in roots):
            listed = ", ".join(map(str, roots))
            raise ConfigError(f"{name}: {value} lies outside the allowed folders ({listed}); see LIKENESS_ROOTS")


def allowed_roots() -> tuple[Path, ...]:
    """Return the folders that deployments may name: LIKENESS_ROOTS, or the working directory."""
    listed = os.environ.get("LIKENESS_ROOTS", "")
    folders = [Path(item) for item in listed.split(os.pathsep) if item] or [Path.cwd()]
    return tuple(folder.absolute().resolve() for folder in folders)


def compute_config_digest(config: RunConfig) -> str:
    """Return the digest that names a configuration."""
    return digest(config)[:16]


def describe_invalid(error: ValidationError) -> str:
    """Say the first thing that is wrong in one line, with the nearest valid names."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        names = {dotted for dotted, _ in walk(schema_names(RunConfig))}
        return f"unknown setting {where!r}{suggest(where, names)}"
    value = first.get("input")
    shown = f" (got {value!r})" if where and not isinstance(value, dict | BaseModel) else ""
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where + ': ' if where else ''}{message}{shown}{more}"


def schema_names(model: type[BaseModel]) -> dict[str, Any]:
    """Return a model's field names as a nested dict."""
    names: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        kind = field.annotation
        is_section = isinstance(kind, type) and issubclass(kind, BaseModel)
        names[name] = schema_names(kind) if is_section and isinstance(kind, type) else None
    return names


def first_line(error: Exception) -> str:
    """Return the first line of an error's text."""
    return str(error).strip().splitlines()[0]
