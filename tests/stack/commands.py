"""Commands typed next to a local stack."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIKENESS = [sys.executable, "-m", "flows.cli.main"]
SECONDS = 900


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return {**kept, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def likeness(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*LIKENESS, *words], cwd=folder, env=environment(), capture_output=True, text=True, timeout=SECONDS, check=False
    )


def add_remote_judge(folder: Path, url: str) -> Path:
    """Write an operator's option `llm=remote`: the embedded server, and a judge with batch jobs at an address."""
    (folder / "llm" / "profile").mkdir(parents=True)
    (folder / "llm" / "profile" / "remote.yaml").write_text(
        f"base_url: {url}\nmodel: asked-model\ncapabilities: {{response_format: json_schema, batch: openai}}\n"
        'prices: {input: 1, output: 10, date: "2026-11-22"}\n'
    )
    (folder / "llm" / "remote.yaml").write_text(
        "# @package _global_\ndefaults:\n  - /llm/profile@llm.profiles.local: local\n"
        "  - /llm/profile@llm.profiles.remote: remote\nllm: {models: [local], judge: [remote]}\nscoring: {}\n"
    )
    return folder
