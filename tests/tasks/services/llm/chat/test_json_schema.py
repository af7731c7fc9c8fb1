"""Strict schemas and replies."""

from typing import Literal

import pytest
from pydantic import BaseModel, Field

from tasks.errors import ReplyInvalid
from tasks.services.llm.chat.completion import ChatCompletion
from tasks.services.llm.chat.json_schema import parse_reply, strict_schema


class Inner(BaseModel):
    name: str = "x"


class Outer(BaseModel):
    score: Literal[0, 1, 2] = Field(description="how good")
    inner: Inner
    items: list[Inner] = Field(min_length=1, max_length=3)
    note: str | None = None


def parse(content: str | None, **options: str) -> Outer:
    return parse_reply(Outer, content, ChatCompletion(**{"finish_reason": "stop", **options}))


def test_objects_are_closed_and_all_keys_required_at_every_level() -> None:
    schema = strict_schema(Outer)
    assert schema["required"] == ["score", "inner", "items", "note"]
    assert schema["additionalProperties"] is False
    assert schema["properties"]["inner"]["additionalProperties"] is False
    assert schema["properties"]["items"]["items"]["required"] == ["name"]
    assert "$ref" not in str(schema) and "$defs" not in schema


def test_keywords_unsupported_in_strict_mode_are_dropped_and_descriptions_kept() -> None:
    text = str(strict_schema(Outer))
    assert not any(word in text for word in ("'default'", "minItems", "maxItems", "'title'"))
    assert strict_schema(Outer)["properties"]["score"] == {
        "description": "how good", "enum": [0, 1, 2], "type": "integer",
    }  # fmt: skip


GOOD = '{"score": 1, "inner": {"name": "a"}, "items": [{"name": "b"}], "note": null}'


def test_a_valid_reply_is_parsed() -> None:
    assert parse(GOOD).score == 1


@pytest.mark.parametrize(
    ("content", "options", "reason"),
    [
        (GOOD, {"refusal": "I won't"}, "the model refused"),
        (GOOD, {"finish_reason": "length"}, "cut off"),
        (GOOD, {"finish_reason": "content_filter"}, "filter"),
        ("", {}, "empty"),
        (None, {}, "empty"),
        (GOOD[:-20], {}, "not JSON"),
        (GOOD.replace("1", "7", 1), {}, "does not fit: score"),
        ("[]", {}, "does not fit"),
        ("[" * 100_000, {}, "not JSON"),
        ('{"score": NaN}', {}, "not JSON"),
    ],
)
def test_an_invalid_reply_raises_an_error_with_the_reason(
    content: str | None, options: dict[str, str], reason: str
) -> None:
    with pytest.raises(ReplyInvalid, match=reason):
        parse(content, **options)
