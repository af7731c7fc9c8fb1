"""`key=value` arguments of the command line, as a request. Values that aren't Hydra syntax are taken literally."""

import itertools
import re
from collections.abc import Iterable
from typing import cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, OverrideType, QuotedString, RangeSweep
from hydra.errors import HydraException
from pydantic import ValidationError

from conf.compose import describe_invalid, suggest
from conf.groups import FIELDS
from conf.request import RunRequest, Scalar, Value
from tasks.errors import ConfigError, first_line
from tasks.redaction import show_value

MAX_VALUES = 10_000  # of a range; more than a sweep accepts, so that its error names the limit
KEY = re.compile(r"[a-z][a-z0-9_]*(?:[./][A-Za-z0-9][A-Za-z0-9_-]*)*")


def parse_overrides(overrides: Iterable[str]) -> RunRequest:
    """Parse `key=value` arguments of the command line into a request.

    Raises:
        ConfigError: an argument is not of that form, or its value is invalid.

    """
    fields: dict[str, object] = {}
    settings: dict[str, Value] = {}
    for override in overrides:
        key, plain = parse_override(override)
        # `tracking=[mlflow,wandb]` names a tracker and the loggers beside it.
        if key == "tracking" and isinstance(plain, list):
            fields["tracking"], settings["tracking.loggers"] = split_trackers(plain)
        elif key in FIELDS:
            fields[FIELDS[key]] = plain
        elif "/" in key:
            raise ConfigError(f"unknown config group {show_value(key)}{suggest(key, FIELDS)}")
        else:
            settings[key] = plain
    if "subject.source" in settings and "subject" not in fields:
        fields["subject"] = "folder"
    try:
        return RunRequest(**fields, settings=settings)
    except ValidationError as error:
        raise ConfigError(describe_invalid(error)) from error


def override_request(base: RunRequest, overrides: Iterable[str]) -> RunRequest:
    """Return a request with `key=value` arguments applied on top of it. Raises ConfigError."""
    changes = parse_overrides(overrides)
    # Only fields that the arguments set: defaults must not replace those of the base.
    fields = {**dict(base), **{name: getattr(changes, name) for name in changes.model_fields_set - {"settings"}}}
    settings = {**base.settings, **changes.settings}
    if "subject.source" not in changes.settings and "subject" in changes.model_fields_set:
        # Another subject: its option names photos and noun, which the base's own would override.
        fields |= {"source": None, "class_noun": None}
        settings = {
            name: value
            for name, value in settings.items()
            if name not in ("subject.source", "subject.class_noun") or name in changes.settings
        }
    for name, setting in (("source", "subject.source"), ("class_noun", "subject.class_noun"), ("seed", "seed")):
        if setting in changes.settings:  # fields take precedence over settings
            fields[name] = None
    return RunRequest(**{**fields, "settings": settings})


def parse_override(override: str) -> tuple[str, Value]:
    """Return key and plain value of one argument. Raises ConfigError."""
    parsed = read_override(override)
    if parsed is None:
        key, _, text = override.partition("=")
        return key, text
    return parsed.key_or_group, read_value(parsed)


def read_override(override: str) -> Override | None:
    """Return an argument as parsed by Hydra; None where its value is plain text that isn't Hydra syntax.

    Raises:
        ConfigError: it has no key, or opens a list, mapping or quote and doesn't close it.

    """
    key, sign, text = override.partition("=")
    if not sign:
        raise ConfigError(f"{show_value(override)} is not of the form key=value")
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException as error:
        # Text such as `a&b` is taken literally; an unclosed bracket or quote is a typing error.
        if not KEY.fullmatch(key) or text.lstrip()[:1] in ("[", "{", '"', "'"):
            raise ConfigError(f"cannot read {show_value(override)}: {first_line(error)}") from error
        return None


def read_value(override: Override) -> Value:
    """Return the one plain value of an override. Raises ConfigError for anything else."""
    line = override.input_line or ""
    # Hydra's `+key` and `~key` are refused: the schema fixes which names there are.
    if override.type is not OverrideType.CHANGE or override.is_sweep_override():
        raise ConfigError(
            f"{show_value(line)}: use key=value with one value (`likeness sweep`, or -m, takes several); quote a text "
            "that holds a comma"
        )
    value = override.value()
    if isinstance(value, dict):
        name = override.key_or_group
        raise ConfigError(f"{name}: give single values, for example {name}.name=value")
    return unquote(value)


def split_trackers(names: list[Scalar]) -> tuple[str, list[Scalar]]:
    """Return the tracker of runs and models, and the additional loggers."""
    kinds = [name for name in names if name in ("mlflow", "none")]
    return (kinds[0] if kinds else "none"), [name for name in names if name not in kinds]


def split_sweep(overrides: Iterable[str]) -> tuple[list[str], dict[str, list[Value]]]:
    """Separate arguments with one value from those with several: `key=v1,v2`, Hydra's `choice(...)` and `range(...)`.

    Raises ConfigError for group options, and for Hydra's other sweeps.
    """
    fixed: list[str] = []
    space: dict[str, list[Value]] = {}
    for override in overrides:
        parsed = read_override(override)
        if parsed is None or not parsed.is_sweep_override():
            fixed.append(override)
            continue
        if parsed.key_or_group in FIELDS:
            raise ConfigError(f"{show_value(override)}: sweep single settings, not groups of them")
        if parsed.key_or_group in space:
            raise ConfigError(f"{parsed.key_or_group} is given twice")
        space[parsed.key_or_group] = list_values(parsed)
    return fixed, space


def list_values(override: Override) -> list[Value]:
    """Return the values of a sweep override. Raises ConfigError for intervals and globs."""
    sweep = override.value()
    if isinstance(sweep, ChoiceSweep):
        return [unquote(value) for value in sweep.list]
    if isinstance(sweep, RangeSweep):
        return list(itertools.islice(sweep.range(), MAX_VALUES))
    raise ConfigError(
        f"{show_value(override.input_line)}: give values, {override.key_or_group}=V1,V2, or a range, "
        f"{override.key_or_group}=LOW..HIGH[:log]"
    )


def unquote(value: object) -> Value:
    """Return the plain value behind Hydra's quoted strings."""
    if isinstance(value, list):
        # RunRequest refuses lists in lists.
        return [cast("Scalar", unquote(item)) for item in value]
    return value.text if isinstance(value, QuotedString) else cast("Value", value)
