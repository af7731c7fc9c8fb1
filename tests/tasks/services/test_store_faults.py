"""S3 that fails: at given rates, for one prefix, and a client that dies in the middle of an upload."""

import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flows.cli.maintenance import gc
from tasks.errors import ConfigError, ServiceUnavailable
from tasks.services.config import StoreConfig
from tasks.services.store.lease import hold_lease
from tasks.services.store.open import open_store_within
from tasks.services.store.s3 import S3Store
from tasks.stage.digests import digest_file
from tests.support.cli_sandbox import ROOT
from tests.support.fault_proxy import FaultProxy, Mode

NUM_OBJECTS = 8
LARGE = 9_000_000  # two parts of an upload


@pytest.fixture
def proxy(s3_config: StoreConfig) -> Iterator[FaultProxy]:
    proxy = FaultProxy(str(s3_config.endpoint_url))
    yield proxy
    proxy.close()


def through(proxy: FaultProxy, config: StoreConfig, *, max_attempts: int) -> S3Store:
    return S3Store(config.model_copy(update={"endpoint_url": proxy.url, "max_attempts": max_attempts}))


def fail_at(rate: float) -> Callable[[str, str], Mode]:
    """Return what happens to each request: half of the failures come before the server, half after it."""
    drawn, lock = random.Random(23), threading.Lock()

    def decide(method: str, path: str) -> Mode:
        with lock:
            if drawn.random() >= rate:
                return "pass"
            return drawn.choice(("503", "cut"))

    return decide


def attempt(operation: Callable[[], object]) -> object:
    """Return an operation's result, or the store's own error of a service that fails; no other error passes."""
    try:
        return operation()
    except ServiceUnavailable as error:
        return error


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_an_operation_succeeds_whole_or_fails_without_a_trace(
    s3_config: StoreConfig, proxy: FaultProxy, tmp_path: Path, rate: float
) -> None:
    flaky, plain = through(proxy, s3_config, max_attempts=3), S3Store(s3_config)
    proxy.decide = fail_at(rate)
    contents = [f"new {number} ".encode() * 1000 for number in range(NUM_OBJECTS)]
    files = [tmp_path / f"file-{number}" for number in range(2)]
    for number, file in enumerate(files):
        file.write_bytes(bytes([number]) * LARGE)
    for number in range(NUM_OBJECTS):
        plain.put_bytes(f"replaced/{number}", b"old")
    with ThreadPoolExecutor(2 * NUM_OBJECTS + 2) as pool:
        replaced = [
            pool.submit(attempt, lambda n=n: flaky.put_bytes(f"replaced/{n}", contents[n])) for n in range(NUM_OBJECTS)
        ]
        races = [pool.submit(attempt, lambda n=n: flaky.put_if_absent("once", contents[n])) for n in range(NUM_OBJECTS)]
        uploads = [pool.submit(attempt, lambda f=f: flaky.put_file(f"files/{f.name}", f)) for f in files]
    for number, done in enumerate(replaced):
        found = plain.find_bytes(f"replaced/{number}")
        # A write whose answer was lost may have been carried out: whole.
        assert found in ([contents[number]] if done.result() is None else [b"old", contents[number]])
    winners = [number for number, done in enumerate(races) if done.result() is True]
    once = plain.find_bytes("once")
    assert len(winners) <= 1
    assert once == contents[winners[0]] if winners else once in (None, *contents)
    for file, done in zip(files, uploads, strict=True):
        size = len(plain.find_bytes(f"files/{file.name}") or b"")
        assert size == LARGE if done.result() is None else size in (0, LARGE)
        if size:
            assert plain.compute_sha256(f"files/{file.name}") == digest_file(file)
    check_reads(flaky, plain, tmp_path)
    if rate == 0:
        assert winners and [done.result() for done in (*replaced, *uploads)] == [None] * (NUM_OBJECTS + 2)
    else:
        assert sum(proxy.faults.values()) > 0


def check_reads(flaky: S3Store, plain: S3Store, folder: Path) -> None:
    """Read through the faults: what comes is right, and a file that doesn't come leaves nothing."""
    plain.put_bytes("read/small", b"small")
    (folder / "large").write_bytes(b"l" * LARGE)
    plain.put_file("read/large", folder / "large")
    with ThreadPoolExecutor(12) as pool:
        small = [pool.submit(attempt, lambda: flaky.find_bytes("read/small")) for _ in range(4)]
        digests = [pool.submit(attempt, lambda: flaky.compute_sha256("read/large")) for _ in range(2)]
        keys = [pool.submit(attempt, lambda: flaky.list_keys("read/")) for _ in range(4)]
        files = [pool.submit(attempt, lambda n=n: flaky.get_file("read/large", folder / f"got-{n}")) for n in range(2)]
    checks: list[tuple[list[object], object]] = [
        ([done.result() for done in small], b"small"),
        ([done.result() for done in digests], digest_file(folder / "large")),
        ([done.result() for done in keys], ["read/large", "read/small"]),
        ([done.result() for done in files], None),
    ]
    for results, expected in checks:
        assert [result for result in results if result != expected and not isinstance(result, ServiceUnavailable)] == []
    for number, done in enumerate(files):
        target = folder / f"got-{number}"
        assert target.is_file() is (done.result() is None)
        assert not target.is_file() or digest_file(target) == digest_file(folder / "large")
    assert [path.name for path in folder.iterdir() if path.name.count(".")] == []  # parts of downloads


def test_a_wrong_address_is_given_up_sooner_than_an_outage(s3_config: StoreConfig, proxy: FaultProxy) -> None:
    proxy.mode, proxy.num_requests = "503", 0
    with pytest.raises(ServiceUnavailable):
        through(proxy, s3_config, max_attempts=20)
    assert proxy.num_requests == 3


@pytest.mark.parametrize("max_attempts", [1, 3])
def test_a_request_is_tried_as_often_as_configured(
    s3_config: StoreConfig, proxy: FaultProxy, max_attempts: int
) -> None:
    store = through(proxy, s3_config, max_attempts=max_attempts)
    proxy.mode, proxy.num_requests = "503", 0
    started = time.monotonic()
    with pytest.raises(ServiceUnavailable, match="SlowDown"):
        store.put_bytes("a", b"1")
    assert proxy.num_requests == max_attempts
    assert time.monotonic() - started < 10  # pauses of at most 1 s and 2 s


def test_a_lease_whose_answer_was_lost_is_held_by_its_process(s3_config: StoreConfig, proxy: FaultProxy) -> None:
    store = through(proxy, s3_config, max_attempts=3)
    assert store.put_if_absent("probed", b"1")
    puts: list[str] = []

    def lose_first_answer(method: str, path: str) -> Mode:
        if method == "PUT" and "/stages/" in path:
            puts.append(path)
            return "cut" if len(puts) == 1 else "pass"
        return "pass"

    proxy.decide = lose_first_answer
    waits: list[str] = []
    with hold_lease(store, "stages/x", max_wait_seconds=3, poll_seconds=0.2, on_wait=waits.append) as lease:
        lease.check()
    assert waits == []
    assert len(puts) >= 2


@pytest.mark.parametrize("operation", ["put_bytes", "put_file", "find_bytes", "list_keys"])
def test_access_denied_below_one_prefix_is_one_error_that_is_not_retried(
    s3_config: StoreConfig, proxy: FaultProxy, tmp_path: Path, operation: str
) -> None:
    store = through(proxy, s3_config, max_attempts=5)
    (tmp_path / "file").write_bytes(b"x")
    calls: dict[str, tuple[Callable[[str], object], str]] = {
        "put_bytes": (lambda folder: store.put_bytes(f"{folder}/k", b"1"), "needs? s3:PutObject"),
        "put_file": (lambda folder: store.put_file(f"{folder}/k", tmp_path / "file"), "needs? s3:PutObject"),
        "find_bytes": (lambda folder: store.find_bytes(f"{folder}/k"), "needs? s3:GetObject and s3:ListBucket"),
        "list_keys": (lambda folder: store.list_keys(f"{folder}/"), "needs? s3:ListBucket"),
    }
    call, permission = calls[operation]
    proxy.decide = lambda method, path: "deny" if "03-training" in path else "pass"
    call("02-prior")
    proxy.num_requests = 0
    with pytest.raises(ConfigError, match=permission.replace("needs?", "need")) as raised:
        call("03-training")
    assert proxy.num_requests == 1
    assert not raised.value.is_retryable
    assert f"s3://{store.bucket}/likeness/03-training" in str(raised.value)
    assert "deployments/policies" in str(raised.value)


UPLOAD = """
import sys
from pathlib import Path
from tasks.services.config import StoreConfig
from tasks.services.store.s3 import S3Store

S3Store(StoreConfig.model_validate_json(sys.argv[1])).put_file("03-training/k/model", Path(sys.argv[2]))
"""


def test_a_process_killed_in_the_middle_of_an_upload_leaves_no_object_and_gc_finds_its_parts(
    s3_config: StoreConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "large").write_bytes(b"x" * 3 * LARGE)
    slow = s3_config.model_copy(update={"max_upload_rate": 2.0})
    process = subprocess.Popen(
        [sys.executable, "-c", UPLOAD, slow.model_dump_json(), str(tmp_path / "large")], cwd=ROOT
    )
    store = S3Store(s3_config)
    deadline = time.monotonic() + 120
    while not (begun := store.list_uploads()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -9
    assert [upload.key for upload in begun] == ["03-training/k/model"]
    assert store.find_bytes("03-training/k/model") is None
    assert store.list_keys("") == []
    stale = list(gc.list_stale_uploads(store))  # moto dates every upload to 2010
    assert [(item.kind, item.name) for item in stale] == [("abandoned upload", "03-training/k/model")]
    gc.remove(stale[0], store)
    assert store.list_uploads() == []


def test_a_store_that_answers_late_is_waited_for_and_a_missing_bucket_is_not(
    s3_config: StoreConfig, proxy: FaultProxy
) -> None:
    config = s3_config.model_copy(update={"endpoint_url": proxy.url, "max_attempts": 1})
    proxy.mode = "503"
    with pytest.raises(ServiceUnavailable, match="S3 refused bucket"):
        open_store_within(config, seconds=0)
    refused = proxy.num_requests
    timer = threading.Timer(1, lambda: setattr(proxy, "mode", "pass"))
    timer.start()
    open_store_within(config, seconds=600).put_bytes("a", b"1")
    timer.join()
    assert proxy.num_requests > refused + 1
    started = time.monotonic()
    with pytest.raises(ConfigError, match="does not exist"):
        open_store_within(config.model_copy(update={"bucket": "nowhere"}), seconds=600)
    assert time.monotonic() - started < 300
