"""Redaction: secrets masked, URLs without credentials, no control characters, bounded length.

One module for every sink: errors, log records, `config.json`, `summary.json`, the report and the terminal.
"""

import base64
import logging
import os
import re
import traceback
import unicodedata
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

MASK = "***"
# Any run of this many characters of a secret is masked, since servers echo keys truncated or in pieces.
WINDOW = 8
SHORTEST = 4
PUBLIC_NAMES = ("identifier_token", "initializer_token", "pixels_per_token")
"""Settings whose names match SECRET_NAME and whose values are no secrets."""
SECRET_NAME = re.compile(
    r"((KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_ID)?|(^|_)(AUTH|AUTH_STRING|PASS|DSN))$", re.IGNORECASE
)
# A short value of a variable is no secret where it is one of these: masking them would garble ordinary text.
COMMON = frozenset({"true", "false", "none", "null", "auto", "basic", "bearer", "default", "test", "user"})
# Every repetition is bounded against catastrophic backtracking: the text comes from servers and files.
CREDENTIALS = re.compile(r"\b([a-z][a-z0-9+.-]{0,30}://)[^\s/?#]{1,2000}@", re.IGNORECASE)
# A password with a slash, "?" or "#" in it should have been percent-encoded; a port is no password.
RAW_PASSWORD = re.compile(
    r"\b([a-z][a-z0-9+.-]{0,30}://)[^\s/?#:@\"'<>]{1,200}:(?!\d{1,5}[/?#])[^\s\"'<>]{1,2000}@", re.IGNORECASE
)
QUERY = re.compile(r"\b([a-z][a-z0-9+.-]{0,30}://[^\s?#\"'<>]{1,2000})\?[^\s#\"'<>]{1,4000}", re.IGNORECASE)
BEARER = re.compile(r"\b(Bearer|Basic)\s{1,4}[\w.~+/=-]{6,2000}", re.IGNORECASE)
ASSIGNED = re.compile(
    r"((?:token|secret|passw(?:or)?d|api[_-]?key|access[_-]?key|signature|credential|\bsig)[\w.-]{0,40}=)"
    r"[^\s&#,;)'\"]{1,2000}",
    re.IGNORECASE,
)
# Names in JSON, YAML, Python and headers, directly before `:` or `=`. Not matched: `max_tokens: 600`, and
# `identifier_token`, which stands for the subject.
NAMED = (
    r"((?:(?<!identifier[_ ])(?<!training\.)token|secret|passw(?:or)?d|(?:api|access|secret|private)[_-]?key|"
    r"authorization)(?:\\?[\"'])?\s{0,3}"
)
QUOTED = re.compile(
    NAMED + r"[:=]\s{0,3}(\\?[\"']))(?!(?:bearer|basic)\s)(?:(?!\2)(?:\\[^\n]|[^\n])){1,2000}", re.IGNORECASE
)
PLAIN = re.compile(
    NAMED + r":[ \t]{0,3})(?!(?:bearer|basic|true|false|none|null|\d{1,6})\b)[^\s,;(){}\[\]'\"\\]{1,2000}",
    re.IGNORECASE,
)
registered: set[str] = set()


def register_secret(value: str) -> str:
    """Register a value for redaction in this process and return it; shorter than SHORTEST is too common to mask."""
    if len(value) >= SHORTEST:
        registered.add(value)
    return value


def list_secrets() -> frozenset[str]:
    """Return the values to mask: registered ones, and those of environment variables named like secrets."""
    # Read at every call, since variables may be set after the import.
    named: set[str] = set()
    for name, value in os.environ.items():
        if SECRET_NAME.search(name):
            named.update(secret for secret in list_parts(name, value) if is_maskable(secret))
    return frozenset(named | registered)


def list_parts(name: str, value: str) -> list[str]:
    """Return the secret parts of a variable's value: of a DSN only user and password, of others all of it."""
    user = re.match(r"[a-z][a-z0-9+.-]{0,30}://([^\s/?#]{1,2000})@", value, re.IGNORECASE)
    if user is None or not name.upper().endswith("DSN"):
        return [value]
    return [user[1], user[1].partition(":")[2]]


def is_maskable(value: str) -> bool:
    """Whether masking a variable's value would hide a secret rather than ordinary text."""
    if len(value) < SHORTEST or (len(value) < WINDOW and (value.isdecimal() or value.lower() in COMMON)):
        return False
    # The path of a credentials file is no secret, and masking it would mask parts of every path near it.
    return not (value.startswith(("/", "~", ".")) and os.path.exists(os.path.expanduser(value)))


# Keyed by the secrets themselves, so a variable that is set later takes effect at once.
@lru_cache(maxsize=8)
def make_windows(secrets: frozenset[str]) -> tuple[frozenset[str], tuple[str, ...]]:
    """Return every run of WINDOW characters of the secrets in plain and encoded form, and the short secrets."""
    windows: set[str] = set()
    for secret in secrets:
        for form in encode_forms(secret) if len(secret) >= WINDOW else ():
            windows.update(form[i : i + WINDOW] for i in range(len(form) - WINDOW + 1))
    return frozenset(windows), tuple(sorted((s for s in secrets if len(s) < WINDOW), key=len, reverse=True))


def encode_forms(secret: str) -> list[str]:
    """Return a secret as it is, percent-encoded, in hexadecimal, and in Base64 at each of its three alignments."""
    data = secret.encode()
    forms = [secret, urllib.parse.quote(secret, safe=""), data.hex(), data.hex().upper()]
    for shift in range(3):
        encoded = base64.b64encode(b"\0" * shift + data).decode()
        # The first and last groups of four characters also encode bits of neighbouring bytes.
        inner = encoded[4 if shift else 0 : len(encoded) // 4 * 4 - 4]
        forms += [inner, inner.replace("+", "-").replace("/", "_")]
    return forms


def names_secret(name: str) -> bool:
    """Whether a setting's or variable's name says that its value is a secret."""
    return bool(SECRET_NAME.search(name)) and name.rsplit(".", 1)[-1] not in PUBLIC_NAMES


def redact(text: str) -> str:
    """Return a text with secrets masked, also truncated or encoded ones, and credentials in URLs and headers."""
    windows, short = make_windows(list_secrets())
    # Overlapping windows mark every character of a secret that is at least WINDOW long; "\0" marks hidden ones.
    masked = bytearray(len(text))
    for i in range(len(text) - WINDOW + 1):
        if text[i : i + WINDOW] in windows:
            masked[i : i + WINDOW] = b"\1" * WINDOW
    if any(masked):
        text = re.sub("\0+", MASK, "".join("\0" if hidden else char for char, hidden in zip(text, masked, strict=True)))
    # As whole words only: as substrings, short secrets would mask parts of ordinary words.
    for secret in short:
        text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", MASK, text)
    text = redact_url(text)
    text = BEARER.sub(rf"\1 {MASK}", text)
    for assigned in (ASSIGNED, QUOTED, PLAIN):
        text = assigned.sub(rf"\g<1>{MASK}", text)
    return text


def redact_url(text: str) -> str:
    """Return a text whose URLs have no credentials and no query: the query of a presigned URL is a credential."""
    text = CREDENTIALS.sub(rf"\1{MASK}@", text)
    return QUERY.sub(rf"\1?{MASK}", RAW_PASSWORD.sub(rf"\1{MASK}@", text))


def clean_text(text: str, *, keep: str = "\n\t") -> str:
    """Return a text without control, format and bidirectional characters, which could manipulate a terminal."""
    if text.isprintable():
        return text
    return "".join(char for char in text if char in keep or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co"))


def shorten(text: str, *, limit: int = 200) -> str:
    """Return a text of at most `limit` characters; a shortened one states its full length."""
    if len(text) <= limit:
        return text
    return f"{text[: limit - 40]}... ({len(text):,} characters)"


def show_value(value: object, *, limit: int = 120) -> str:
    """Return a value's redacted, shortened repr for an error message."""
    return shorten(redact(repr(value if not isinstance(value, str) else shorten(value, limit=limit))), limit=limit)


class RedactingRecord(logging.LogRecord):
    """A log record whose message and traceback hold no secrets and no control characters."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        # Merged now and without args: a handler would format `msg % args` again, from the unredacted args.
        self.msg, self.args = clean_text(redact(self.getMessage())), ()
        if self.exc_info and self.exc_info[1] is not None:
            lines = traceback.format_exception(self.exc_info[1])
            # Formatters and remote handlers use this cached text instead of formatting exc_info themselves.
            self.exc_text = clean_text(redact("".join(lines))).rstrip("\n")


def install_log_redaction() -> None:
    """Redact every log record of this process, those of libraries included. Idempotent."""
    # A record factory rather than a filter, since a logger's filters don't see records of its child loggers.
    logging.setLogRecordFactory(RedactingRecord)


@contextmanager
def logger_level(name: str, level: int) -> Iterator[None]:
    """Let a library's logger report nothing below a level; for what we raise or count instead."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
