"""A folder in which tests type commands as a person would."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIKENESS = [sys.executable, "-m", "flows.cli"]
QUICK = ["experiment=smoke", "training.num_threads=2"]


@dataclass(frozen=True)
class Workplace:
    """A folder to run in, with a Prefect home of its own."""

    folder: Path

    @property
    def output(self) -> Path:
        return self.folder / "runs"

    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
        return {
            **kept,
            "PREFECT_HOME": str(self.folder / "prefect"),
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "LIKENESS_ROOTS": str(self.folder),
        }

    def likeness(self, *words: str, timeout: float = 280) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*LIKENESS, *words], cwd=self.folder, env=self.environment(),
            capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip

    def start(self, *words: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [*LIKENESS, "run", *QUICK, *words], cwd=self.folder, env=self.environment(),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, *words: str) -> "subprocess.CompletedProcess[str]":
        return self.likeness("run", *QUICK, *words)

    def newest(self) -> dict[str, Any]:
        paths = sorted(self.output.glob("*/summary.json"))
        summary: dict[str, Any] = json.loads(paths[-1].read_text())
        return summary
