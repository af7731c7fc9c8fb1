"""JSON schemas within the subset that every provider's strict mode supports."""

import json
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from tasks.errors import ReplyInvalid
from tasks.redaction import shorten, show_value
from tasks.services.llm.chat.completion import ChatCompletion

T = TypeVar("T", bound=BaseModel)
# Strict modes differ in bounds, formats and defaults; all enforce types, enums and keys. pydantic checks the rest.
# Descriptions stay: a reply model's docstring and field descriptions are part of the prompt and of the cache key.
UNSUPPORTED = (
    "default", "title", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
    "minLength", "maxLength", "pattern", "format", "minItems", "maxItems", "multipleOf",
)  # fmt: skip


def strict_schema(model: type[BaseModel]) -> dict[str, object]:
    """Return a closed schema in which every property is required."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})
    result = close(schema, definitions)
    assert isinstance(result, dict)
    return result


def close(node: object, definitions: dict[str, object]) -> object:
    """Inline references, forbid additional properties and drop unsupported keywords."""
    if isinstance(node, list):
        return [close(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:  # siblings of a reference are dropped; recursive models are not supported
        return close(definitions[node["$ref"].rsplit("/", 1)[-1]], definitions)
    # `enum` is in every strict mode, `const` is not.
    if "const" in node:
        node = {**node, "enum": [node["const"]]}
        del node["const"]
    # Properties apart: their names may equal keywords, such as a field named `title` or `format`.
    properties = node.get("properties")
    kept = {
        key: close(value, definitions) for key, value in node.items() if key not in UNSUPPORTED and key != "properties"
    }
    if isinstance(properties, dict):
        kept["properties"] = {name: close(child, definitions) for name, child in properties.items()}
        kept["required"] = list(properties)
        kept["additionalProperties"] = False
    return kept


def parse_reply(model: type[T], content: str | None, completion: ChatCompletion | None = None) -> T:
    """Return the validated reply.

    Args:
        content: JSON text.
        completion: its completion, which is checked for refusal and truncation; None for a cached reply.

    Raises:
        ReplyInvalid: it is a refusal, empty, cut off, or does not fit the schema. Truncated JSON is never
            completed: a shorter valid object would be a wrong one.

    """
    if completion is not None:
        check_finished(completion)
    if not content:
        raise ReplyInvalid("the reply is empty")
    try:
        return model.model_validate(json.loads(content, parse_constant=refuse_constant))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ReplyInvalid(f"the reply does not fit: {shorten(where)}: {shorten(first['msg'])}") from error
    except (ValueError, RecursionError) as error:
        raise ReplyInvalid(f"the reply is not JSON: {show_value(content[:80])}") from error


def refuse_constant(name: str) -> None:
    """Raise ValueError for NaN and Infinity, which `json` accepts though JSON has no such constants."""
    raise ValueError(name)


def check_finished(completion: ChatCompletion) -> None:
    """Raise ReplyInvalid for a reply that can't be read, is a refusal, or was cut off."""
    if completion.problem:
        raise ReplyInvalid(f"the reply has an unexpected shape: {completion.problem}")
    if completion.refusal:
        raise ReplyInvalid(f"the model refused: {shorten(completion.refusal)}")
    if completion.finish_reason == "length":
        raise ReplyInvalid("the reply was cut off; raise llm.profiles.<name>.max_output_tokens")
    if completion.finish_reason == "content_filter":
        raise ReplyInvalid("the provider's filter stopped the reply")
