"""Register a work pool, the deployments of prefect-shared.yaml and the automations of lost runs; again changes nothing.

Usage: `python -m deployments.register TYPE`, with TYPE process, docker or kubernetes. LIKENESS_POOL and LIKENESS_IMAGE
name the pool and the image, PREFECT_API_URL and PREFECT_API_AUTH_STRING the server, LIKENESS_NOTIFY_URL where messages
about runs go.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from flows.cli.stack.registration import (
    NOTIFY_VARIABLE,
    Notify,
    open_client,
    register_automations,
    register_notification,
    register_pool,
    register_queue,
)
from tasks.errors import ConfigError

FOLDER = Path(__file__).resolve().parent
TYPES = ("process", "docker", "kubernetes")


def main(words: list[str]) -> int:
    """Register everything; a failing command ends with its own message."""
    if len(words) != 1 or words[0] not in TYPES:
        print(f"usage: python -m deployments.register {'|'.join(TYPES)}", file=sys.stderr)
        return 2
    kind = words[0]
    address = os.environ.get(NOTIFY_VARIABLE)
    try:  # before anything is registered
        notify = Notify.parse(address) if address else None
    except ConfigError:
        print(f"{NOTIFY_VARIABLE} takes an http or https address", file=sys.stderr)
        return 2
    os.environ.setdefault("LIKENESS_CONF", str(FOLDER / "options"))
    os.environ.setdefault("LIKENESS_IMAGE", "likeness:0.1.0-cpu")
    pool = os.environ.setdefault("LIKENESS_POOL", "likeness")
    file = FOLDER / "pools" / f"{kind}.json"
    template = json.loads(file.read_text()) if file.exists() else None  # the process pool uses Prefect's own
    try:
        with open_client() as client:
            register_pool(client, pool, kind, template=template)
            register_queue(client, pool)
    except ConfigError as error:
        print(f"{error}: set LIKENESS_POOL", file=sys.stderr)
        return error.exit_code
    command = ["--no-prompt", "deploy", "--all", "--prefect-file", str(FOLDER / "prefect-shared.yaml")]
    done = subprocess.run([sys.executable, "-m", "prefect", *command], cwd=FOLDER.parent, check=False)
    if done.returncode:
        return done.returncode
    register_automations()
    if notify is not None:
        register_notification(notify.kind)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
