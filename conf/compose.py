"""From a request to a `RunConfig`: compose group options, resolve, overlay the request's plain values, validate.

Hydra's and OmegaConf's objects never leave this module. Values are overlaid after interpolation is resolved,
so `${...}` in a request means nothing.
"""

import copy
import difflib
import json
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from conf.groups import CONFIG_DIR, GROUPS, extra_config_dir, read_default_options
from conf.request import RunRequest, Value
from conf.schema import RunConfig
from conf.trust import check_budget, check_request, check_source, list_rules
from tasks.errors import ConfigError, first_line
from tasks.redaction import MASK, names_secret, redact, redact_url, show_value
from tasks.stage.digests import digest

Tree = dict[str, object]
"""Values of a configuration by name, nested, before they are validated."""
OUTPUT_VARIABLE = "LIKENESS_OUTPUT_DIR"
"""The default of output_dir on a worker: its working directory is the checkout's."""
STORE_VARIABLE = "LIKENESS_STORE_URL"
"""The bucket and prefix of a worker's store, s3://BUCKET/PREFIX: of requests that choose none."""
TRACKING_VARIABLE = "LIKENESS_TRACKING_URI"
"""The default of tracking.uri on a worker."""
COMPOSING = threading.Lock()  # GlobalHydra is one per process


def compile_request(request: RunRequest, *, roots: tuple[Path, ...] | None = None) -> RunConfig:
    """Return the configuration that a request resolves to.

    Args:
        request: what to run.
        roots: folders that paths must lie in; None trusts the request (a person's terminal).

    Raises:
        ConfigError: a setting is unknown, out of bounds, not allowed, or missing.

    """
    settings: dict[str, Value] = {**request.settings}
    for name in ("source", "class_noun"):
        value = getattr(request, name)
        if value is not None:
            settings[f"subject.{name}"] = value
    if request.seed is not None:
        settings["seed"] = request.seed
    # Own photos imply the `folder` option; the demo's noun would otherwise apply to them.
    is_own = request.subject == "demo" and "subject.source" in settings
    choices = {group: getattr(request, field) for field, group in GROUPS.items()}
    choices["subject"] = "folder" if is_own else choices["subject"]
    if roots is not None:
        check_request(settings, roots)
    # The request's choices are names of options, validated by RunRequest; only its settings are free values.
    plain = compose_groups(choices)
    overlay(plain, read_environment())
    overlay(plain, read_store_url(choices["store"], plain, settings))
    operators_cap = find_cap(plain, choices) if roots is not None else None
    # Before the overlay: as the operator has set them, whatever the request says.
    operators_folders = (str(lookup(plain, "output_dir")), str(lookup(plain, "store.folder")))
    # OmegaConf's mark for a mandatory value; checked after the overlay, which may supply it.
    missing = {dotted for dotted, child in walk(plain) if child == "???"}
    overlay(plain, settings)
    missing -= set(settings)
    if missing:
        raise ConfigError(f"{min(missing)} is not set; add {min(missing)}=...")
    expand_paths(plain)
    try:
        config = RunConfig.model_validate(plain)
    except ValidationError as error:
        raise ConfigError(describe_invalid(error)) from error
    if roots is not None:
        check_budget(config, operators_cap)
        if "subject.source" in settings:
            check_source(config, *operators_folders)
    return config


def read_environment() -> dict[str, Value]:
    """Return the operator's defaults that come by environment variables. Raises ConfigError."""
    found: dict[str, Value] = {}
    for variable, name in ((OUTPUT_VARIABLE, "output_dir"), (TRACKING_VARIABLE, "tracking.uri")):
        if os.environ.get(variable):
            found[name] = os.environ[variable]
    return found


def read_store_url(option: str, plain: Tree, settings: dict[str, Value]) -> dict[str, Value]:
    """Return the operator's bucket, where the request leaves the store open. Raises ConfigError."""
    url = os.environ.get(STORE_VARIABLE)
    # `s3` without a bucket says which kind, not where; other options (local, an operator's own) say both.
    is_open = option == "auto" or (option == "s3" and not lookup(plain, "store.bucket"))
    if not url or not is_open:
        return {}
    found = split_store_url(url, name=STORE_VARIABLE)
    # A prefix belongs to its bucket.
    return found if "store.bucket" not in settings else {"store.kind": found["store.kind"]}


def split_store_url(url: str, *, name: str) -> dict[str, Value]:
    """Return the settings of a store at s3://BUCKET/PREFIX. Raises ConfigError naming what held the address."""
    found = re.fullmatch(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/([\w./=-]*))?", url)
    if found is None:
        raise ConfigError(
            f"{name} takes s3://BUCKET or s3://BUCKET/PREFIX; AWS_ENDPOINT_URL names another server than AWS"
        )
    prefix = (found[2] or "").strip("/") or "likeness"
    return {"store.kind": "s3", "store.bucket": found[1], "store.prefix": prefix}


def normalize_store_url(url: str, *, name: str) -> str:
    """Return the address of a store with its prefix. Raises ConfigError naming what held the address."""
    found = split_store_url(url, name=name)
    return f"s3://{found['store.bucket']}/{found['store.prefix']}"


def find_cap(plain: Tree, choices: dict[str, str]) -> float | None:
    """Return the operator's spending cap: the smallest, so that no option of a request raises it."""
    defaults = read_default_options()
    # An experiment or preset may raise the cap for its operator, but not for whoever requests it.
    composed = [plain, compose_groups({**choices, "experiment": "none"}), compose_groups(defaults)]
    caps = [lookup(found, "llm.budget_usd") for found in composed]
    return min((float(cap) for cap in caps if isinstance(cap, int | float)), default=None)


def compose_groups(choices: dict[str, str]) -> Tree:
    """Return the composition of group options, resolved, as a plain dict. Raises ConfigError."""
    overrides = [f"{group}={option}" for group, option in sorted(choices.items())]
    extra = extra_config_dir()
    if extra is not None:
        # Escaped for Hydra's override grammar: the path may hold quotes or backslashes.
        escaped = str(extra).replace("\\", "\\\\").replace('"', '\\"')
        overrides.append(f'hydra.searchpath=["file://{escaped}"]')
    # Composing takes half a second on a small machine, and a list of subjects or a sweep composes the same options
    # again and again.
    return copy.deepcopy(compose_options(tuple(overrides), stamp_options()))


def stamp_options() -> tuple[object, ...]:
    """Return what a composition depends on besides its overrides: the files of options, and the environment."""
    folders = [CONFIG_DIR, *filter(None, [extra_config_dir()])]
    # Editors leave links to nowhere beside an open file.
    files = [path for folder in folders for path in sorted(folder.rglob("*.yaml")) if path.is_file()]
    stamps = [(str(path), found.st_mtime_ns, found.st_size) for path in files if (found := path.stat())]
    return (*stamps, *sorted(os.environ.items()))


@lru_cache(maxsize=32)
def compose_options(overrides: tuple[str, ...], stamp: tuple[object, ...]) -> Tree:
    """Return the composition of overrides; `stamp` tells when a cached one is out of date."""
    with COMPOSING:
        # Hydra refuses to initialize twice in a process.
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(config_dir=str(CONFIG_DIR), version_base="1.3"):
                composed = compose("run", overrides=list(overrides))
            # Interpolations are resolved here, before any value of a request is present.
            plain = OmegaConf.to_container(composed, resolve=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(first_line(error)) from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def overlay(plain: Tree, settings: dict[str, Value]) -> None:
    """Set plain values in a nested dict by dotted name. Raises ConfigError for unknown names."""
    known = {dotted for dotted, _ in walk(plain)}
    for key, value in settings.items():
        # Profiles are a mapping with free names: below it, validation finds unknown fields.
        if key not in known and not key.startswith("llm.profiles."):
            raise ConfigError(f"unknown setting {key!r}{suggest(key, known)}")
        if isinstance(lookup(plain, key), dict) and not isinstance(value, dict):
            raise ConfigError(f"{key}: give single values, for example {key}.name=value")
        assign(plain, key, value)


def expand_paths(plain: Tree) -> None:
    """Expand `~` in paths, and derive `store.folder` where it is empty."""
    values = dict(walk(plain))
    for name, rule in list_rules().items():
        value = values.get(name)
        if rule is None or rule.kind not in ("path", "photos", "model") or not isinstance(value, str):
            continue
        if value.startswith("~"):
            try:
                expanded = str(Path(value).expanduser())
            except RuntimeError as error:
                raise ConfigError(f"{name}: {show_value(value)} names no user's home") from error
            assign(plain, name, expanded)
    if not lookup(plain, "store.folder"):
        assign(plain, "store.folder", f"{plain['output_dir']}/store")


def lookup(tree: Tree, dotted: str) -> object:
    """Return the value of a dotted name; None where there is none."""
    value: object = tree
    for name in dotted.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def assign(tree: Tree, dotted: str, value: object) -> None:
    """Set the value of a dotted name, creating missing sections."""
    *parents, last = dotted.split(".")
    for name in parents:
        child = tree.get(name)
        if not isinstance(child, dict):
            child = tree[name] = {}
        tree = child
    tree[last] = value


def walk(values: Mapping[str, object], prefix: str = "") -> Iterable[tuple[str, object]]:
    """Yield every leaf and branch of a nested dict by dotted name."""
    for key, child in values.items():
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
    # The last part alone too: `learning_rate` finds `training.learning_rate`.
    near += [ends[end] for end in difflib.get_close_matches(last, list(ends), n=2, cutoff=0.75)]
    unique = list(dict.fromkeys(near))[:3]
    return f"; did you mean {' or '.join(unique)}?" if unique else "; see conf/run.yaml for all names"


def compute_config_digest(config: RunConfig) -> str:
    """Return the digest that names a configuration."""
    return digest(config)[:16]


def describe_invalid(error: ValidationError) -> str:
    """Return the first validation error as one line, with the nearest valid names."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    where = "" if where == "settings" else where  # the message names the setting itself
    where = GROUPS.get(where, where) if error.title == RunRequest.__name__ else where
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden" and error.title not in (RunConfig.__name__, RunRequest.__name__):
        return f"unknown field {show_value(where)}"  # of another file than a configuration
    if first["type"] == "extra_forbidden":
        names = {dotted for dotted, _ in walk(schema_names(RunConfig))}
        return f"unknown setting {show_value(where)}{suggest(where[:200], names)}"
    value = first.get("input")
    if isinstance(value, str):
        value = redact_url(value)
    shown = f" (got {show_value(value)})" if where and not isinstance(value, dict | BaseModel) else ""
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where + ': ' if where else ''}{message}{shown}{more}"


def schema_names(model: type[BaseModel]) -> dict[str, object]:
    """Return a model's field names as a nested dict."""
    names: dict[str, object] = {}
    for name, field in model.model_fields.items():
        kind = field.annotation
        is_section = isinstance(kind, type) and issubclass(kind, BaseModel)
        names[name] = schema_names(kind) if is_section and isinstance(kind, type) else None
    return names


def show_config(config: RunConfig) -> list[tuple[str, str]]:
    """Return a configuration as dotted names and values, without what could be a secret."""
    rows = flatten(config.model_dump(mode="json"))
    return [(name, MASK if names_secret(name) else redact(value)) for name, value in rows]


def flatten(value: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield dotted names and values of a nested dict."""
    for key, child in value.items():
        if isinstance(child, dict):
            yield from flatten(child, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", child if isinstance(child, str) else json.dumps(child)
