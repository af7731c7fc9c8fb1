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
