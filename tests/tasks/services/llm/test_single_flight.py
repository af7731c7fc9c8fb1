"""Processes that share a store ask the same question once; one that is gone, or takes too long, holds up nobody."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import pytest

from tasks.errors import ServiceUnavailable
from tasks.services.llm.agents.tools import ask_with_tools
from tasks.services.llm.agents.web_search import ask_with_search
from tasks.services.llm.chat.request import RequestSpec
from tasks.services.llm.config import CapabilityConfig
from tasks.services.llm.service import LlmService
from tasks.services.llm.single_flight import run_once
from tasks.services.store.lease import Lease, find_start, make_lease
from tasks.stage.digests import dump_signed
from tests.support.llm import CHAT, SPEC, Reply, ask, make_llm
from tests.support.llm_server import ScriptedServer


def make_two(server: ScriptedServer, folder: Path, **changes: object) -> tuple[LlmService, LlmService]:
    """Return the services of two runs: one store, a ledger each."""
    first, second = make_llm(server, folder, **changes), make_llm(server, folder / "other", **changes)
    second.store = first.store
    return first, second


def claim(llm: LlmService, lease: Lease) -> None:
    """Claim the question as another process does."""
    name = PurePosixPath(llm.cache_key(SPEC, "p")).name
    llm.store.put_bytes(f"leases/replies/{name}", dump_signed(lease))


def list_claims(llm: LlmService) -> list[str]:
    return llm.store.list_keys("leases/replies/")


def ask_at_once(
    server: ScriptedServer, runs: tuple[LlmService, LlmService], work: Callable[[LlmService], object]
) -> None:
    """Let both ask before either is answered."""
    threads = [threading.Thread(target=work, args=(llm,)) for llm in runs]
    server.asking.acquire()
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    server.asking.release()
    for thread in threads:
        thread.join()


def test_two_runs_that_ask_the_same_at_once_pay_once(server: ScriptedServer, tmp_path: Path) -> None:
    runs = make_two(server, tmp_path)
    ask_at_once(server, runs, ask)
    assert server.counts[CHAT] == 1
    assert sorted(row.outcome for llm in runs for row in llm.ledger.rows) == ["cached", "ok"]
    assert list_claims(runs[0]) == []


@pytest.mark.parametrize("kind", ["tools", "search"])
def test_two_agents_that_ask_the_same_at_once_pay_once(server: ScriptedServer, tmp_path: Path, kind: str) -> None:
    able = CapabilityConfig(response_format="json_schema", web_search="openrouter")
    runs = make_two(server, tmp_path, capabilities=able)
    spec = RequestSpec("be brief", ("grade this",), Reply)

    def work(llm: LlmService) -> None:
        if kind == "tools":
            ask_with_tools(llm, spec, [], role="adjudicator", max_rounds=2)
        else:
            ask_with_search(llm, spec, role="profiler")

    ask_at_once(server, runs, work)
    assert server.counts[CHAT] == 1
    assert sorted(row.outcome for llm in runs for row in llm.ledger.rows) == ["cached", "ok"]
    assert list_claims(runs[0]) == []


def test_the_question_of_a_process_that_died_is_asked_at_once(server: ScriptedServer, tmp_path: Path) -> None:
    llm = make_llm(server, tmp_path, timeout_seconds=600)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    claim(llm, make_lease("other").model_copy(update={"pid": child.pid, "process_started": find_start(child.pid)}))
    child.communicate(b"\n")
    assert ask(llm).grade == 2
    assert (server.counts[CHAT], list_claims(llm)) == (1, [])


def test_of_many_that_wait_for_a_process_that_died_one_asks(server: ScriptedServer, tmp_path: Path) -> None:
    runs = [make_llm(server, tmp_path / str(number), timeout_seconds=600) for number in range(6)]
    for llm in runs[1:]:
        llm.store = runs[0].store
    claim(runs[0], make_lease("other").model_copy(update={"boot": "another"}))
    threads = [threading.Thread(target=ask, args=(llm,)) for llm in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.counts[CHAT] == 1
    assert list_claims(runs[0]) == []


def test_a_claim_that_another_has_taken_over_is_left_to_it(server: ScriptedServer, tmp_path: Path) -> None:
    llm = make_llm(server, tmp_path)

    def work() -> int:
        claim(llm, make_lease("other"))
        return 2

    key = llm.cache_key(SPEC, "p")
    assert run_once(llm.store, key, work, find=lambda: None, max_wait_seconds=1) == 2
    assert len(list_claims(llm)) == 1


def test_a_claim_of_another_host_holds_a_question_up_for_a_call_and_no_longer(
    server: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.services.llm.service.WINDOW_SECONDS", 0.0)
    llm = make_llm(server, tmp_path, timeout_seconds=1)
    claim(llm, make_lease("other").model_copy(update={"host": "elsewhere", "pid": 1}))
    started = time.monotonic()
    assert ask(llm).grade == 2
    assert time.monotonic() - started >= 2
    assert list_claims(llm) == []


def test_a_damaged_claim_holds_nothing_up(server: ScriptedServer, tmp_path: Path) -> None:
    llm = make_llm(server, tmp_path, timeout_seconds=600)
    name = PurePosixPath(llm.cache_key(SPEC, "p")).name
    llm.store.put_bytes(f"leases/replies/{name}", b"{")
    assert ask(llm).grade == 2


def test_a_question_that_failed_may_be_asked_again(server: ScriptedServer, tmp_path: Path) -> None:
    first, second = make_two(server, tmp_path, max_attempts=1)
    server.script((500, {}, b"{}"))
    with pytest.raises(ServiceUnavailable):
        ask(first)
    assert list_claims(first) == []
    server.script('{"grade": 1}')
    assert ask(second).grade == 1
