"""`key=value` words of the command line, as a request. Values that aren't Hydra syntax are taken literally."""

import re
from collections.abc import Iterable
from typing import Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, QuotedString
from hydra.errors import HydraException
from pydantic import ValidationError

from conf.compose import describe_invalid, first_line
from conf.groups import FIELDS
from conf.request import RunRequest, Scalar, Value
from tasks.errors import ConfigError
from tasks.redaction import show_value

KEY = re.compile(r"[a-z][a-z0-9_]*(?:[./][A-Za-z0-9][A-Za-z0-9_-]*)*")


def parse_overrides(overrides: Iterable[str]) -> RunRequest:
    """Turn `key=value` words of the command line into a request.

    Raises:
        ConfigError: a word is not of that form, or names nothing.

    """
    fields: dict[str, object] = {}
    settings: dict[str, Value] = {}
    for word in overrides:
        key, plain = parse_word(word)
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


def override_request(base: RunRequest, words: Iterable[str]) -> RunRequest:
    """Return a request with `key=value` words applied as if they were typed after it. Raises ConfigError."""
    changes = parse_overrides(words)
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
    for name, setting in (("source", "subject.source"), ("class_noun", "subject.class_noun")):
        if setting in changes.settings:  # fields take precedence over settings
            fields[name] = None
    return RunRequest(**{**fields, "settings": settings})


def parse_word(word: str) -> tuple[str, Value]:
    """Return key and plain value of one word. Raises ConfigError."""
    override = read_override(word)
    if override is None:
        key, _, text = word.partition("=")
        return key, text
    return override.key_or_group, read_value(override)


def read_override(word: str) -> Override | None:
    """Return a word as Hydra reads it; None where its value is plain text that isn't Hydra syntax.

    Raises:
        ConfigError: it has no key, or opens a list, mapping or quote and doesn't close it.

    """
    key, sign, text = word.partition("=")
    if not sign:
        raise ConfigError(f"{show_value(word)} is not of the form key=value")
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException as error:
        # Text such as `a&b` is taken literally; an unclosed bracket or quote is a typing error.
        if not KEY.fullmatch(key) or text.lstrip()[:1] in ("[", "{", '"', "'"):
            raise ConfigError(f"cannot read {show_value(word)}: {first_line(error)}") from error
        return None


def read_value(override: Override) -> Value:
    """Return the one plain value of an override. Raises ConfigError for anything else."""
    line = override.input_line or ""
    if override.type is not OverrideType.CHANGE or override.is_sweep_override():
        raise ConfigError(f"{show_value(line)}: use key=value with one value; quote a text that holds a comma")
    value = override.value()
    if isinstance(value, dict):
        name = override.key_or_group
        raise ConfigError(f"{name}: give single values, for example {name}.name=value")
    return unquote(value)


def split_trackers(names: list[Scalar]) -> tuple[str, list[Scalar]]:
    """Return the tracker that keeps runs and models, and the loggers beside it."""
    kinds = [name for name in names if name in ("mlflow", "none")]
    return (kinds[0] if kinds else "none"), [name for name in names if name not in kinds]


def split_sweep(words: Iterable[str]) -> tuple[list[str], dict[str, list[Value]]]:
    """Sort `key=value` words from those with several values. Raises ConfigError for group options."""
    fixed: list[str] = []
    space: dict[str, list[Value]] = {}
    for word in words:
        override = read_override(word)
        if override is None or not override.is_choice_sweep():
            fixed.append(word)
            continue
        if override.key_or_group in FIELDS:
            raise ConfigError(f"{show_value(word)}: sweep single settings, not groups of them")
        choices: Any = override.value()
        space[override.key_or_group] = [unquote(value) for value in choices.list]
    return fixed, space


def unquote(value: object) -> Value:
    """Return the plain value behind Hydra's quoted strings."""
    if isinstance(value, list):
        # RunRequest refuses lists in lists.
        return [cast("Scalar", unquote(item)) for item in value]
    return value.text if isinstance(value, QuotedString) else cast("Value", value)
