"""What goes along with a request by a profile's wish: fallbacks, a cap on prices, pictures by address, a pace."""

import time
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from conf.compose import compile_request
from conf.overrides import parse_overrides
from tasks.errors import ConfigError
from tasks.services.config import StoreConfig
from tasks.services.llm.batch.jobs import BatchOptions, ask_batch
from tasks.services.llm.config import ProfileConfig
from tasks.services.llm.executor import AskOptions
from tasks.services.store.s3 import S3Store
from tests.support.llm import CHAT, GOOD, SPEC, ask, make_llm
from tests.support.llm_server import scripted_server


def test_openrouter_requests_contain_fallback_models_and_max_price(tmp_path: Path) -> None:
    with scripted_server() as server:
        server.script(GOOD)
        routing = {"fallback_models": ("other",), "max_price": (0.2, 1.0), "extra_body": {"provider": {"zdr": True}}}
        ask(make_llm(server, tmp_path, **routing))
    body = server.bodies[0]
    assert body["models"] == ["asked-model", "other"]
    assert body["provider"] == {"zdr": True, "max_price": {"prompt": 0.2, "completion": 1.0}}


def test_max_price_that_conflicts_with_extra_body_is_rejected() -> None:
    with pytest.raises(ValueError, match="max_price goes into extra_body.provider"):
        ProfileConfig(model="m", max_price=(1.0, 2.0), extra_body={"provider": "any"})


def test_fallback_models_change_the_cache_key(tmp_path: Path) -> None:
    with scripted_server() as server:
        plain = make_llm(server, tmp_path).profile("judge")
    other = plain.model_copy(update={"fallback_models": ("other",)})
    assert SPEC.compute_key(plain) != SPEC.compute_key(other)
    assert plain.fingerprint() != other.fingerprint()


def test_requests_respect_the_rate_limit_of_the_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.services.llm.budget.rate_limit.WINDOW_SECONDS", 1.0)
    with scripted_server() as server:
        server.script(GOOD)
        llm = make_llm(server, tmp_path, requests_per_minute=1)
        started = time.monotonic()
        llm.ask(SPEC, role="judge")
        llm.ask(SPEC.__class__(**{**vars(SPEC), "repeat": 1}), role="judge")
        assert time.monotonic() - started >= 1.0
        assert server.counts[CHAT] == 2


@pytest.mark.parametrize("way", ["call", "batch"])
def test_images_are_sent_as_presigned_urls(tmp_path: Path, s3_config: StoreConfig, way: str) -> None:
    with scripted_server() as server:
        server.script(GOOD)
        inline, llm = make_llm(server, tmp_path), make_llm(server, tmp_path, image_urls="presigned")
        llm.store = S3Store(s3_config)
        if way == "call":
            ask(llm)
            body = server.bodies[0]
        else:
            body = batch_body(llm, server)
    url = body["messages"][1]["content"][1]["image_url"]["url"]
    assert url.startswith("http://127.0.0.1")
    assert "Signature=" in url
    with urlopen(url) as reply:
        assert reply.read().startswith(b"\x89PNG")
    assert SPEC.compute_key(inline.profile("judge")) == SPEC.compute_key(llm.profile("judge"))  # the same question


def batch_body(llm: Any, server: Any) -> Any:
    seen: list[Any] = []
    plain = server.answer_row

    def remember(body: Any) -> Any:
        seen.append(body)
        return plain(body)

    server.batch_api.answer = remember
    ask_batch(llm, {"s": SPEC}, BatchOptions("b", 0.02, 20), options=AskOptions("judge"))
    return seen[0]


def test_presigned_image_urls_require_a_bucket(tmp_path: Path) -> None:
    with scripted_server() as server:
        server.script(GOOD)
        with pytest.raises(ConfigError, match="needs a bucket"):
            ask(make_llm(server, tmp_path, image_urls="presigned"))
    with pytest.raises(ConfigError, match="image_urls=presigned needs a bucket"):
        compile_request(parse_overrides(["llm=openai", "llm.profiles.openai-luna.image_urls=presigned"]))


@pytest.mark.parametrize(
    "body",
    [{"api_key": "sk-1"}, {"provider": [{"x-api-key": "sk-1"}]}, {"headers": {"Authorization": "Bearer x"}},
     {"access_token": "x"}],
)  # fmt: skip
def test_an_api_key_in_extra_body_is_rejected(body: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="is a key; name its environment variable in api_key_variable"):
        ProfileConfig(model="m", extra_body=body)
    ProfileConfig(model="m", extra_body={"prompt_cache_key": "likeness", "stop_token": "x"})
