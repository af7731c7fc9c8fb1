"""`likeness run --dry-run`: the resolved configuration as YAML, differences from the defaults first."""

import yaml

from conf.compose import compile_request, compute_config_digest, flatten
from conf.request import RunRequest
from conf.schema import RunConfig
from conf.trust import allowed_roots
from flows.runs.records import StoredRequest
from tasks.redaction import MASK, clean_text, names_secret, redact

MAX_CHARACTERS = 200


def print_configuration(stored: StoredRequest) -> None:
    """Print what a request resolves to; its differences from the defaults are comments, so that all is YAML."""
    config = compile_request(stored.request, roots=None if stored.is_trusted else allowed_roots())
    changes = list_changes(config, compile_request(RunRequest()))
    count = "1 value differs" if len(changes) == 1 else f"{len(changes)} values differ"
    print(f"# configuration {compute_config_digest(config)}, {count} from the defaults")
    for name, value, default in changes:
        print(f"#   {name}: {value}{'' if default is None else f'  (default {default})'}")
    print(yaml.safe_dump(mask_settings(config), sort_keys=False, allow_unicode=True, width=120), end="")


def list_changes(config: RunConfig, default: RunConfig) -> list[tuple[str, str, str | None]]:
    """Return name, value and default of each value that differs; None where the defaults have no such name."""
    plain, defaults = mask_settings(config), mask_settings(default)
    known = dict(flatten(defaults))
    rows = [(name, value, known.get(name)) for name, value in flatten(plain) if known.get(name) != value]
    return [(name, show(value), None if old is None else show(old)) for name, value, old in rows]


def show(value: str) -> str:
    """Return a value on one line of bounded length."""
    text = clean_text(value.replace("\n", " ")) or '""'
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]}..."


def mask_settings(config: RunConfig) -> dict[str, object]:
    """Return a configuration as plain data without what could be a secret."""
    return {name: mask(child, name) for name, child in config.model_dump(mode="json").items()}


def mask(value: object, name: str = "") -> object:
    """Return plain data without what could be a secret."""
    if isinstance(value, dict):
        return {key: mask(child, str(key)) for key, child in value.items()}
    if isinstance(value, list):
        return [mask(item, name) for item in value]
    if isinstance(value, str):
        return MASK if names_secret(name) else redact(value)
    return value
