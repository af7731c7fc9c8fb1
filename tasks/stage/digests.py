"""Digests of values and files, and JSON records that carry their own digest.

A record is loaded only if its content still has the digest written with it, which detects flipped bytes and truncated
files alike. The digest is no signature: it proves integrity, not origin.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from tasks.errors import ArtifactCorrupt

R = TypeVar("R", bound=BaseModel)
DIGEST_FIELD = "content_sha256"


def canonical(value: Any) -> str:
    """Return a value's canonical JSON: sorted keys, no spaces, no NaN."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=str)


def digest(value: Any) -> str:
    """Return the SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def digest_file(path: Path) -> str:
    """Return a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_folder(folder: Path) -> str:
    """Return one digest over names and contents of all files below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return digest([[str(path.relative_to(folder)), digest_file(path)] for path in files])


def sign(value: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON object with the digest of its own canonical content added."""
    return {**value, DIGEST_FIELD: digest(value)}


def verify_signed(value: Any) -> dict[str, Any]:
    """Return a signed JSON object without its digest.

    Raises:
        ArtifactCorrupt: it isn't an object, carries no digest, or was changed after it was written.

    """
    if not isinstance(value, dict):
        raise ArtifactCorrupt("the record is not a JSON object")
    plain = {key: child for key, child in value.items() if key != DIGEST_FIELD}  # the digest covers all other fields
    if DIGEST_FIELD not in value:
        raise ArtifactCorrupt(f"the record has no {DIGEST_FIELD}")
    try:
        found = digest(plain)
    except (ValueError, RecursionError) as error:  # NaN, or nesting deeper than any record
        raise ArtifactCorrupt("the record holds values that are never written to one") from error
    if value[DIGEST_FIELD] != found:
        raise ArtifactCorrupt(f"the record differs from its {DIGEST_FIELD}")
    return plain


def parse_json(data: bytes) -> Any:
    """Return parsed JSON. Raises ArtifactCorrupt for anything else, and for deep nesting and non-finite numbers."""
    try:
        # By default `json` accepts NaN and Infinity, and reads 1e999 as infinity.
        return json.loads(data, parse_float=parse_finite, parse_constant=parse_finite)
    except (ValueError, RecursionError) as error:  # ValueError includes JSONDecodeError and UnicodeDecodeError
        raise ArtifactCorrupt("the record is not JSON") from error


def parse_finite(text: str) -> float:
    """Return a number. Raises ValueError for infinity and NaN, also where a literal such as 1e999 overflows."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is not finite")
    return value


def dump_signed(record: BaseModel, *, indent: int | None = None) -> bytes:
    """Return a record as JSON with its own digest, which is of the canonical form, whatever the indentation."""
    return json.dumps(sign(record.model_dump(mode="json")), indent=indent).encode()


def load_signed(kind: type[R], data: bytes) -> R:
    """Return a verified record. Raises ArtifactCorrupt if it was damaged or has another shape."""
    plain = verify_signed(parse_json(data))
    try:
        return kind.model_validate_json(json.dumps(plain))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ArtifactCorrupt(f"the record does not fit its schema: {where}: {first['msg']}") from error


def dump_line(row: dict[str, Any]) -> str:
    """Return one line of a log of signed rows."""
    return json.dumps(sign(row)) + "\n"


def load_lines(data: bytes) -> Iterator[dict[str, Any] | None]:
    """Yield the rows of a log of signed rows, None for each that is torn or fails verification."""
    for line in data.split(b"\n"):
        if line.strip():
            try:
                yield verify_signed(parse_json(line))
            except ArtifactCorrupt:
                yield None  # a damaged line costs only itself
