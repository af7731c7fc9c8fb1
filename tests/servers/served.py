"""Start servers that others wrote, each on a free loopback port, and ask them as the program does."""

import io
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
from PIL import Image
from pydantic import BaseModel

from tasks.services.llm.budget.ledger import Ledger
from tasks.services.llm.chat.request import RequestSpec
from tasks.services.llm.config import CapabilityConfig, ProfileConfig
from tasks.services.llm.service import LlmService
from tasks.services.store.local import LocalStore
from tests.support.config import make_llm_config

# What is installed by hand lies here: litellm/ (a venv), aimock/ (node_modules), llama-server (a binary).
SERVERS = Path(os.environ.get("LIKENESS_SERVERS", "build/servers")).resolve()
COLORS = {"red": (225, 20, 20), "green": (20, 190, 40), "blue": (20, 40, 225)}


class Seen(BaseModel):
    """What is asked of a picture."""

    color: Literal["red", "green", "blue"]


def need(path: Path, how: str) -> Path:
    """Return a path that is there, or skip with how to get it."""
    if not path.exists():
        pytest.skip(f"{path.name} is not there; get it by: {how}")
    return path


def find_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def is_ready(url: str) -> bool:
    """Whether an address answers with 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@contextmanager
def serving(
    command: Sequence[str | Path], *, ready: str, log: Path, seconds: float = 120, **environment: str
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a server until it is no longer needed; what it says goes to `log`."""
    words = [str(word) for word in command]
    with log.open("wb") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file, env={**os.environ, **environment})
    try:
        deadline = time.monotonic() + seconds
        while not is_ready(ready):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"{words[0]} did not start: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.2)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def make_llm(url: str, model: str, folder: Path, *, response_format: str = "auto", **changes: Any) -> LlmService:
    """Return a service of one profile."""
    capabilities = CapabilityConfig(response_format=response_format, batch="openai")  # type: ignore[arg-type]
    settings = {"max_attempts": 1, "timeout_seconds": 60, "capabilities": capabilities, **changes}
    config = make_llm_config(models=("p",), profiles={"p": ProfileConfig(base_url=url, model=model, **settings)})
    return LlmService(config, store=LocalStore(folder / "store"), ledger=Ledger(folder / "ledger.jsonl"))


def fill_picture(color: str) -> bytes:
    """Return a PNG of one color."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), COLORS[color]).save(buffer, format="PNG")
    return buffer.getvalue()


def ask_color(llm: LlmService, color: str, *, text: str = "Which color fills it?") -> str:
    """Return the color that the model sees."""
    spec = RequestSpec("You look at pictures.", (text, fill_picture(color)), Seen)
    return llm.ask(spec, role="inspector").reply.color
