"""Batch jobs of four requests, and a process that ends between two saves."""

from pathlib import Path
from typing import Any

from tasks.services.llm.batch.jobs import BatchOptions, ask_batch
from tasks.services.llm.chat.request import RequestSpec
from tasks.services.llm.config import CapabilityConfig
from tasks.services.llm.executor import AskOptions
from tasks.services.llm.service import LlmService, LocalServices
from tests.support.llm import Reply, make_llm

SPECS = {f"s{n}": RequestSpec("grade", (f"sample {n}",), Reply) for n in range(4)}
FILES, BATCHES = "POST /v1/files", "POST /v1/batches"


class Cut(Exception):
    """The process ends here."""


def cut_after(llm: LlmService, number: int) -> None:
    """Let the process end right after the n-th object was stored: states and replies alike."""
    plain, saves = llm.store.put_bytes, 0

    def put(key: str, data: bytes) -> None:
        nonlocal saves
        plain(key, data)
        saves += 1
        if saves == number:
            raise Cut

    llm.store.put_bytes = put  # type: ignore[method-assign]


def ask_in_batch(llm: LlmService, *, specs: dict[str, RequestSpec[Any]] = SPECS, **changes: Any) -> Any:
    options = {
        "state_prefix": "05-scoring/k/batches", "poll_seconds": 0.02, "max_wait_seconds": 20,
        "deadline_seconds": None, **changes,
    }  # fmt: skip
    return ask_batch(llm, specs, BatchOptions(**options), options=AskOptions("judge"))


def make_batching(server: Any, folder: Path, kind: str, **changes: Any) -> LlmService:
    """Return a service whose provider has this batch protocol."""
    capabilities = CapabilityConfig(response_format="json_schema", batch=kind)  # type: ignore[arg-type]
    llm = make_llm(server, folder, capabilities=capabilities, **changes)
    llm.local = LocalServices(batch_folder=folder / "batches")
    return llm
