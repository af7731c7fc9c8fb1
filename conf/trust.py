"""What a request that comes through a deployment may set: an allow-list, derived from the types of `RunConfig`.

Numbers, booleans and choices are allowed. A string is allowed only where its field's type carries a `RequestRule`
that says so; anything else, and every unclassified field, is set on the worker's machine alone.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from conf.schema import RunConfig
from tasks.config_base import RequestRule
from tasks.errors import ConfigError
from tasks.evaluation.prompt_sets import FILE, SET
from tasks.redaction import show_value
from tasks.services.config import find_cache
from tasks.stage.cache import PREFIXES

PATH = RequestRule("path")
HUB_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
NON_PATH_VALUES = {
    "subject.source": ("demo",),
    "subject.captions": ("",),
    "scoring.labels": ("",),
    "store.folder": ("",),
    "diffusion.pretrained_model_name_or_path": ("mini",),
    "evaluation.encoders.clip": ("mini",),
    "evaluation.encoders.dino": ("mini",),
    "evaluation.encoders.lpips": ("auto", "none"),
}
"""Values of path fields that are no paths; an empty string where a field may be empty."""
OWN_FOLDERS = frozenset(
    {*PREFIXES.values(), "approvals", "base-samples", "known-world", "latents", "leases", "llm", "subject-runs"}
)
"""Folders at the top of the store that the pipeline writes."""
WORK_FOLDER = "work"  # in output_dir
PLAIN = (bool, int, float, type(None))


def list_rules() -> dict[str, RequestRule | None]:
    """Return the rule of every field of `RunConfig` by dotted name; None for unclassified ones."""
    return dict(walk_rules(RunConfig))


def walk_rules(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, RequestRule | None]]:
    """Yield every leaf's rule; a mapping of sections is one leaf."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from walk_rules(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", find_rule(field)


def find_rule(field: FieldInfo) -> RequestRule | None:
    """Return a field's rule: its annotation, or `checked` for types without free text."""
    marks = [mark for mark in (*field.metadata, *nested_marks(field.annotation)) if isinstance(mark, RequestRule)]
    if marks:
        return marks[0]
    return RequestRule("checked") if is_plain(field.annotation) else None


def nested_marks(annotation: object) -> Iterator[object]:
    """Yield the metadata of the annotated parts of a union, as in `PlainName | None`."""
    if get_origin(annotation) in (Union, UnionType):
        for part in get_args(annotation):
            if get_origin(part) is Annotated:
                yield from get_args(part)[1:]


def is_plain(annotation: object) -> bool:
    """Whether a type holds numbers, booleans and fixed choices alone."""
    if annotation in PLAIN or annotation is Ellipsis:
        return True
    origin = get_origin(annotation)
    if origin is Literal:
        return True
    return origin in (Union, UnionType, tuple) and all(is_plain(part) for part in get_args(annotation))


def check_request(settings: Mapping[str, object], roots: tuple[Path, ...]) -> None:
    """Refuse settings that a request may not make. Raises ConfigError naming the setting."""
    rules = list_rules()
    for name, value in settings.items():
        # A mapping such as `llm.profiles` is one leaf, whose rule covers every name below it.
        owner = next((known for known in rules if name == known or name.startswith(f"{known}.")), None)
        if owner is None:
            continue  # an unknown name, which composing refuses with the nearest valid ones
        rule = rules[owner]
        # Unclassified fields are refused as well: a new field is closed until someone opens it.
        if rule is None or rule.kind == "operator_only":
            raise ConfigError(f"{name} is set in conf/ on the worker's machine, not by a request")
        if rule.kind == "prompts" and isinstance(value, str):
            if not value.startswith(SET):  # whatever is no name of a set is taken for a path
                check_path(name, value.removeprefix(FILE), roots)
        elif rule.kind != "checked" and isinstance(value, str):
            check_path(name, value, roots, rule=rule)


def check_path(name: str, value: str, roots: tuple[Path, ...], *, rule: RequestRule = PATH) -> None:
    """Refuse a path outside the allowed roots. Raises ConfigError."""
    if value in NON_PATH_VALUES.get(name, ()):
        return
    if rule.kind == "photos" and value.startswith("store:"):
        check_store_prefix(name, value.removeprefix("store:"))
        return
    try:
        # Links are followed first: a link inside an allowed folder must not lead out of it.
        path = Path(value).expanduser().absolute().resolve()
        is_local = path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # a NUL byte, a name that is too long, an unknown user
        raise ConfigError(f"{name}: {show_value(value)} is not a path") from error
    # `owner/name` is a Hub id only where no such folder exists; an existing one is held to the roots.
    if rule.kind == "model" and HUB_REPOSITORY.fullmatch(value) and ".." not in value and not is_local:
        return
    # By form: `s3://bucket` resolves to a folder below the working directory.
    if "://" in value or not any(path.is_relative_to(root) for root in roots):
        listed = ", ".join(map(str, roots))
        raise ConfigError(
            f"{name}: {show_value(value)} lies outside the allowed folders ({listed}); see LIKENESS_ROOTS"
        )


def check_store_prefix(name: str, prefix: str) -> None:
    """Reject prefixes that stages write to: they hold other users' photos. Raises ConfigError."""
    folder, sign, _ = prefix.partition("/")
    # Without a slash, a prefix also matches folders whose names merely begin with it.
    if not sign or folder in OWN_FOLDERS:
        raise ConfigError(
            f"{name}: store:{show_value(prefix)[1:-1]} is no folder of uploads; name one, as store:uploads/rex/"
        )


def check_source(config: RunConfig, output_dir: str, folder: str) -> None:
    """Reject folders that runs write to, in or beside a local store: they hold other users' photos. Raises ConfigError.

    Args:
        config: the request's resolved configuration.
        output_dir: that of the operator's own options.
        folder: the store's, likewise.

    """
    source, outputs = config.subject.source, (config.output_dir, output_dir)
    if source in NON_PATH_VALUES["subject.source"]:
        return
    stores = [config.store.folder, folder, *(f"{output}/store" for output in outputs)]
    owned = [resolve(store) / name for store in stores if store for name in OWN_FOLDERS]
    owned += [resolve(output) / WORK_FOLDER for output in outputs]
    owned += [resolve(str(find_cache(store))) for store in stores if store]
    is_prefix = source.startswith("store:")
    # A prefix may end within a name, so only its folders can be resolved.
    prefix = source.removeprefix("store:").rpartition("/")[0]
    place = resolve(f"{config.store.folder}/{prefix}") if is_prefix else resolve(source)
    # All that lies below a prefix is read, of a folder only what lies in it.
    if any(place.is_relative_to(own) or (is_prefix and own.is_relative_to(place)) for own in owned):
        raise ConfigError(f"subject.source: {show_value(source)} holds what runs keep; name a folder of uploads")


def resolve(path: str) -> Path:
    """Return a path without links and `~`. Raises ConfigError."""
    try:
        return Path(path).expanduser().absolute().resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{show_value(path)} is not a path") from error


def check_budget(config: RunConfig, operators: float | None) -> None:
    """Reject a request that exceeds the operator's spending cap. Raises ConfigError."""
    wanted = config.llm.budget_usd
    if operators is not None and (wanted is None or wanted > operators):
        raise ConfigError(f"llm.budget_usd: at most {operators} USD are allowed on this machine")


def allowed_roots() -> tuple[Path, ...]:
    """Return the folders that deployments may name: LIKENESS_ROOTS, or the working directory."""
    listed = os.environ.get("LIKENESS_ROOTS", "")
    folders = [Path(item) for item in listed.split(os.pathsep) if item] or [Path.cwd()]
    return tuple(folder.absolute().resolve() for folder in folders)
