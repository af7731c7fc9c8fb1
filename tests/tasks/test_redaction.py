"""Secrets, control characters and overlong values never reach an error, a log or a file."""

import base64
import logging
import urllib.parse
from pathlib import Path

import pytest

from tasks.errors import ConfigError
from tasks.redaction import clean_text, install_log_redaction, redact, shorten

CANARY = "sk-canary/7f3a+9c1e0b5d2468"


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", CANARY)


@pytest.mark.parametrize(
    "shown",
    [
        CANARY,
        CANARY[:12] + " ...",
        "..." + CANARY[-9:],
        urllib.parse.quote(CANARY, safe=""),
        CANARY.encode().hex(),
        base64.b64encode(CANARY.encode()).decode(),
        base64.b64encode(b"user:" + CANARY.encode()).decode(),
        base64.urlsafe_b64encode(b"ab" + CANARY.encode()).decode(),
        f"https://me:{CANARY}@host/v1",
        f"Authorization: Bearer {CANARY}",
    ],
)
def test_a_secret_is_masked_complete_truncated_or_encoded(shown: str) -> None:
    hidden = redact(f"the server said: {shown} is wrong")
    assert hidden.startswith("the server said: ")
    assert "***" in hidden
    forms = [CANARY, urllib.parse.quote(CANARY, safe=""), CANARY.encode().hex()]
    pieces = {form[i : i + 8] for form in forms for i in range(len(form) - 7)}
    assert not [piece for piece in pieces if piece in hidden]
    assert shown[-12:-4] not in hidden.removesuffix(" is wrong")


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("postgresql://me:unknown@host/db", "postgresql://***@host/db"),
        ("http://host/v1?token=unknown1&x=1", "http://host/v1?***"),
        ("Authorization: Bearer abcdefgh", "Authorization: Bearer ***"),
        ("max_output_tokens: 600", "max_output_tokens: 600"),
        ("https://u:p@ss@host/x", "https://***@host/x"),
        ("https://u:p/a?b#c@host/x", "https://***@host/x"),
        ("http://localhost:8000/a@b", "http://localhost:8000/a@b"),
        ("https://host/x and me@host", "https://host/x and me@host"),
        ('{"api_key": "a1b2 c3", "n": 1}', '{"api_key": "***", "n": 1}'),
        (r'{"secret": "a\"b", "n": 1}', '{"secret": "***", "n": 1}'),
        ("{'api_key': 'a1b2', 'n': 1}", "{'api_key': '***', 'n': 1}"),
        (r"{\"token\": \"a1b2\", \"n\": 1}", r"{\"token\": \"***\", \"n\": 1}"),
        ("connect(token='a1b2', n=1)", "connect(token='***', n=1)"),
        ("password: a1b2, n: 1", "password: ***, n: 1"),
        ("Authorization: a1b2", "Authorization: ***"),
        ('{"Authorization": "Bearer abcdefgh"}', '{"Authorization": "Bearer ***"}'),
        ('{"identifier_token": "sks"}', '{"identifier_token": "sks"}'),
        ("training.textual_inversion: Input should be valid", "training.textual_inversion: Input should be valid"),
        ("tokens: 512 and token: 512", "tokens: 512 and token: 512"),
        ('{"token": null, "api_key_env": "SOME_NAME"}', '{"token": null, "api_key_env": "SOME_NAME"}'),
    ],
)
def test_unknown_credentials_are_masked_by_their_context(text: str, hidden: str) -> None:
    assert redact(text) == hidden


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_SECRET_ACCESS_KEY", "/wJalrXUtnFEMI/K7MDENG"),
        ("OPENAI_API_KEY", ".sk-0123456789"),
        ("SOME_TOKEN", "~0123456789"),
        ("MLFLOW_TRACKING_PASSWORD", "hunter2"),
        ("PREFECT_API_AUTH_STRING", "admin:correct-horse"),
        ("AUTH", "correct-horse"),
        ("PASS", "horse"),
        ("SMTP_PASS", "correct-horse"),
        ("DSN", "correct-horse"),
        ("SENTRY_DSN", "correct-horse"),
    ],
)
def test_the_value_of_a_variable_named_like_a_secret_is_masked(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert redact(f"login {value} refused") == "login *** refused"


@pytest.mark.parametrize("value", ["true", "None", "null", "auto", "123456", "abc"])
def test_a_common_short_value_is_not_masked(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTHER_KEY", value)
    assert redact(f"it is {value} here") == f"it is {value} here"


def test_a_short_secret_is_masked_only_as_a_whole_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTHER_KEY", "horse")
    assert redact("horse, horses") == "***, horses"


def test_only_the_credentials_of_a_database_url_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_DSN", "postgresql://somebody:a1b2c3@localhost/db")
    assert redact("postgresql on localhost refuses a1b2c3 of somebody:a1b2c3") == (
        "postgresql on localhost refuses *** of ***"
    )


def test_the_path_of_a_credentials_file_is_not_masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "credentials.json"
    path.touch()
    monkeypatch.setenv("GOOGLE_CREDENTIALS", str(path))
    assert redact(f"{path} is no key") == f"{path} is no key"


def test_every_error_message_is_redacted_sanitized_and_bounded() -> None:
    error = ConfigError(f"server says \x1b[2J{CANARY}\x07 \u202e" + "x" * 500_000)
    assert CANARY not in str(error)
    assert "\x1b" not in str(error)
    assert "\u202e" not in str(error)
    assert len(str(error)) <= 2_000


def test_control_characters_are_removed_and_unicode_letters_kept() -> None:
    assert clean_text("a\x1b]0;title\x07b\r\n\tSöhne 犬\x9b31m") == "a]0;titleb\n\tSöhne 犬31m"


def test_shortened_text_states_its_original_length() -> None:
    assert shorten("y" * 1000, limit=100).endswith("... (1,000 characters)")


def test_log_records_and_their_tracebacks_are_redacted(caplog: pytest.LogCaptureFixture) -> None:
    before = logging.getLogRecordFactory()
    install_log_redaction()
    try:
        try:
            raise ValueError(f"cause {CANARY}")
        except ValueError:
            logging.getLogger("some.library").exception("failed with %s\x1b[31m", CANARY)
    finally:
        logging.setLogRecordFactory(before)
    assert CANARY not in caplog.text
    assert "\x1b" not in caplog.text
    assert "failed with ***" in caplog.text
    assert "Traceback" in caplog.text


def test_an_error_message_is_one_line() -> None:
    message = str(ConfigError("a\nb\u2028c\x85d\r\n\te\u2029"))
    assert message == "a b cd e"
    assert len(message.splitlines()) == 1
