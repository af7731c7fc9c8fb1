"""Rewrite the three lock files from pyproject.toml (needs `uv`, a network and nothing else).

Locked versions stay where pyproject.toml allows them; with `--upgrade` all are resolved anew.

`deployments/requirements.lock` is what runs, `requirements-dev.lock` what the tests and checks add, and
`requirements-cuda.lock` the CUDA libraries that only the public Linux build of torch asks for.
They are installed without dependency resolution, so together they have to be complete.
"""

import hashlib
import re
import subprocess
import sys
import tempfile
import urllib.parse
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "deployments"
CUDA = re.compile(r"^(nvidia-|cuda-|triton==)")
# One lock for all platforms and Python versions: markers select entries at installation.
COMPILE = ["uv", "pip", "compile", "--universal", "--python-version", "3.11", "--generate-hashes"]
NAMES = ("requirements.lock", "requirements-dev.lock", "requirements-cuda.lock")
HEADER = "# Written by deployments/refresh_lock.py; do not edit.\n"


def main() -> None:
    """Resolve the development set once, then cut it into the three files."""
    everything = compile_lock("--extra", "dev")
    # For the names alone: all entries come from one resolution, so the three files agree on versions.
    names = {requirement_name(entry) for entry in compile_lock()}
    cuda = [entry for entry in everything if CUDA.match(entry)]
    runtime = [e for e in everything if requirement_name(e) in names and e not in cuda]
    dev = [e for e in everything if requirement_name(e) not in names and e not in cuda]
    runtime = [add_offline_hashes(e) if e.startswith("torch==") else e for e in runtime]
    for name, entries in zip(NAMES, (runtime, dev, cuda), strict=True):
        (LOCKS / name).write_text(HEADER + "".join(entries))


def compile_lock(*options: str) -> list[str]:
    """Return the resolved entries, each with its hash lines."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "all.lock")
        if "--upgrade" not in sys.argv[1:]:
            # uv keeps the versions that its output file has already.
            output.write_text("".join((LOCKS / name).read_text() for name in NAMES))
        command = [*COMPILE, "--no-annotate", "--no-header", "--output-file", str(output), *options, "pyproject.toml"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        text = output.read_text()
    return re.findall(r"^[A-Za-z0-9].*\n(?:    .*\n)*", text, flags=re.MULTILINE)


def requirement_name(entry: str) -> str:
    """Return the distribution name at the head of one entry."""
    return entry.split("==", 1)[0]


def add_offline_hashes(entry: str) -> str:
    """Append the hashes of CPU wheels that pip's find-links folders hold for the same version."""
    version = re.match(r"torch==([0-9.]+)", entry)
    assert version is not None
    for folder in find_links():
        for wheel in sorted(folder.glob(f"torch-{version[1]}+cpu-*.whl")):
            digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
            if digest not in entry:
                entry = entry.rstrip("\n") + f" \\\n    --hash=sha256:{digest}\n"
    return entry


def find_links() -> list[Path]:
    """Return the local folders that pip is configured to look for wheels in."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    values = re.findall(r"find-links='([^']*)'", text)
    paths = [urllib.parse.unquote(v.removeprefix("file://")) for value in values for v in value.split()]
    return [Path(p) for p in dict.fromkeys(paths) if Path(p).is_dir()]


if __name__ == "__main__":
    main()
