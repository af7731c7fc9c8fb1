"""Whatever is read back was verified: one flipped byte and one cut tail for each kind of record."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import StillPending
from tasks.services.llm.batch.job import BatchState, find_state
from tasks.services.llm.budget.ledger import read_rows
from tasks.services.llm.config import CapabilityConfig
from tasks.services.llm.service import LlmService
from tasks.services.store.local import LocalStore
from tasks.stage.digests import dump_signed
from tests.support.llm import CHAT, GOOD, REFUSAL, SPEC, ask, make_llm, two_profiles
from tests.support.llm_batch import BATCHES, ask_in_batch
from tests.support.llm_server import ScriptedServer, completion, scripted_server

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "one flipped byte": lambda data: flip(data),  # noqa: PLW0108 - defined below
    "a cut tail": lambda data: data[: len(data) * 2 // 3],
    "no bytes": lambda data: b"",
    "a list": lambda data: b"[]",
    "deep nesting": lambda data: b"[" * 100_000,
}
damages = pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())


def flip(data: bytes) -> bytes:
    """Change one digit or letter, so that the record stays JSON of the same shape."""
    for old, new in ((b'\\"grade\\": 2', b'\\"grade\\": 1'), (b"refused", b"refuses"), (b"json_mode", b"json_mod3")):
        if old in data:
            return data.replace(old, new, 1)
    return data.replace(b'"attempt": 0', b'"attempt": 3', 1)


def damage_only(llm: LlmService, prefix: str, damage: Callable[[bytes], bytes]) -> str:
    [key] = [key for key in llm.store.list_keys(prefix) if key.endswith(".json")]
    data = llm.store.find_bytes(key) or b""
    assert damage(data) != data
    llm.store.put_bytes(key, damage(data))
    return key


@damages
def test_a_damaged_cached_reply_is_requested_again(server: ScriptedServer, tmp_path: Path, damage: Any) -> None:
    llm = make_llm(server, tmp_path)
    ask(llm)
    key = damage_only(llm, "llm/replies/", damage)
    assert ask(make_llm(server, tmp_path)).grade == 2
    assert server.counts[CHAT] == 2
    assert llm.store.list_keys(f"{key}.quarantined")


def test_a_cached_reply_under_the_key_of_another_request_is_ignored(server: ScriptedServer, tmp_path: Path) -> None:
    llm = make_llm(server, tmp_path)
    ask(llm)
    [key] = llm.store.list_keys("llm/replies/")
    other = replace(SPEC, repeat=1)
    llm.store.put_bytes(llm.cache_key(other, "p"), llm.store.find_bytes(key) or b"")
    server.script('{"grade": 1}')
    assert llm.ask(other, role="judge").reply.grade == 1
    assert server.counts[CHAT] == 2


@damages
def test_a_damaged_cached_refusal_is_requested_again(server: ScriptedServer, tmp_path: Path, damage: Any) -> None:
    server.script(REFUSAL)
    with scripted_server() as strong:
        strong.script(GOOD)
        llm = two_profiles(server, strong, tmp_path)
        llm.ask(SPEC, role="judge")
        damage_only(llm, "llm/refusals/", damage)
        llm.store.delete(llm.store.list_keys("llm/replies/")[0])
        two_profiles(server, strong, tmp_path).ask(SPEC, role="judge")
    assert server.counts[CHAT] == 4  # asked, and once more, both times


@damages
def test_a_damaged_capability_probe_is_repeated(tmp_path: Path, damage: Any) -> None:
    class JsonMode(ScriptedServer):
        def next_answer(self) -> Any:
            body = self.bodies[-1]
            is_good = (body.get("response_format") or {}) == {"type": "json_object"}
            content = '{"color": "vermilion"}' if "vermilion" in json.dumps(body) else GOOD
            return 200, {}, json.dumps(completion(content if is_good else "red")).encode()

    with scripted_server(JsonMode()) as server:
        able = CapabilityConfig(response_format="auto")
        llm = make_llm(server, tmp_path, capabilities=able)
        assert llm.response_format("p") == "json_mode"
        damage_only(llm, "llm/response_formats/", damage)
        assert make_llm(server, tmp_path, capabilities=able).response_format("p") == "json_mode"
        assert server.counts[CHAT] == 8


@damages
def test_a_job_with_a_damaged_batch_state_is_adopted_again(server: ScriptedServer, tmp_path: Path, damage: Any) -> None:
    server.batch_api.turn.acquire()
    llm = make_llm(server, tmp_path)
    with pytest.raises(StillPending):
        ask_in_batch(llm, max_wait_seconds=0.1)
    damage_only(llm, "05-scoring/", damage)
    server.batch_api.turn.release()
    answers, failures = ask_in_batch(make_llm(server, tmp_path))
    assert (len(answers), failures) == (4, {})
    assert (server.counts[BATCHES], server.counts["row"]) == (1, 4)


@pytest.mark.parametrize("damage", [lambda data: data[:-20], lambda data: data.replace(b'"ok"', b'"ko"', 1)])
def test_a_damaged_ledger_line_affects_only_that_line(server: ScriptedServer, tmp_path: Path, damage: Any) -> None:
    ask(make_llm(server, tmp_path))
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(damage(path.read_bytes()))
    ask(make_llm(server, tmp_path))
    assert [row and row.outcome for row in read_rows(path)] == [None, "cached"]


def test_a_batch_state_of_another_job_is_quarantined(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    state = BatchState(input_sha256="a" * 64, attempt=0, custom_ids=("1",), profile="p", role="judge", batch_id="A")
    own, others = (f"05-scoring/k/batches/{name}" for name in (state.file_name, "b" * 24 + "-0.json"))
    for key in (own, others):
        store.put_bytes(key, dump_signed(state))
    assert find_state(store, own) == state
    assert find_state(store, others) is None
    assert store.find_bytes(others) is None
