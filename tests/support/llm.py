"""An LLM service on a scripted server: one profile, or a cheap and a strong one."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from tasks.images import encode_png
from tasks.services.llm.budget.ledger import Ledger
from tasks.services.llm.chat.request import RequestSpec
from tasks.services.llm.config import CapabilityConfig, PriceConfig, ProfileConfig
from tasks.services.llm.service import LlmService
from tasks.services.store.local import LocalStore
from tests.support.config import make_llm_config
from tests.support.llm_server import ScriptedServer, completion
from tests.support.tiny import draw_photo

CHAT = "POST /v1/chat/completions"
GOOD = '{"grade": 2}'
WHOLE = json.dumps(completion(GOOD)).encode()
REFUSAL = (200, {}, json.dumps(completion(None, refusal="I would rather not")).encode())
PRICES = PriceConfig(input=1.0, output=10.0, batch_discount=0.5, date="2026-11-22")


class Reply(BaseModel):
    """What is asked for."""

    grade: Literal[0, 1, 2]


SPEC = RequestSpec("be brief", ("grade this", encode_png(draw_photo(size=64))), Reply)


def make_llm(server: ScriptedServer, folder: Path, **changes: Any) -> LlmService:
    settings = {"base_url": server.url, "model": "asked-model", "max_attempts": 3, "timeout_seconds": 20, **changes}
    response_format = {"capabilities": CapabilityConfig(response_format="json_schema", batch="openai")}
    config = make_llm_config(models=("p",), profiles={"p": ProfileConfig(**{**response_format, **settings})})
    return LlmService(config, store=LocalStore(folder / "store"), ledger=Ledger(folder / "ledger.jsonl"))


def two_profiles(cheap: ScriptedServer, strong: ScriptedServer, folder: Path, **changes: Any) -> LlmService:
    fixed = CapabilityConfig(response_format="json_schema", batch="openai")
    shared = {"model": "asked-model", "max_attempts": 1, "capabilities": fixed, "prices": PRICES, **changes}
    profiles = {
        "cheap": ProfileConfig(base_url=cheap.url, **shared),
        "strong": ProfileConfig(base_url=strong.url, **shared),
    }
    config = make_llm_config(models=("cheap", "strong"), profiles=profiles)
    return LlmService(config, store=LocalStore(folder / "store"), ledger=Ledger(folder / "ledger.jsonl"))


def ask(llm: LlmService) -> Reply:
    return llm.ask(SPEC, role="judge").reply
