"""Messages name settings that exist."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from conf.schema import RunConfig

ROOT = Path(__file__).resolve().parent.parent.parent


def list_settings(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from list_settings(field.annotation, f"{prefix}{name}.")


def test_every_setting_named_in_a_message_exists() -> None:
    known = set(list_settings(RunConfig))
    groups = "|".join(name for name in known if any(other.startswith(f"{name}.") for other in known))
    pattern = re.compile(rf"(?<![\w./-])(?:{groups})\.[a-z_]+(?:\.[a-z_]+)*")
    known |= {"subject.yaml"}  # a file of people, no setting
    unknown = []
    for path in sorted(path for folder in ("tasks", "flows", "conf") for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found = [match[0] for match in pattern.finditer(node.value) if match[0] not in known]
                unknown += [f"{path.relative_to(ROOT)}:{node.lineno} {name}" for name in found]
    assert not unknown
