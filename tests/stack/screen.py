"""What `likeness up` shows, and where its processes listen."""

import re

import httpx
import psutil

from tests.stack.commands import ROOT, likeness


def find_listeners(pid: int) -> set[tuple[str, int]]:
    """Return address and port of each listening TCP socket of a process and of all below it."""
    root = psutil.Process(pid)
    found = set()
    for process in [root, *root.children(recursive=True)]:
        try:
            connections = process.net_connections(kind="tcp")
        except psutil.NoSuchProcess:
            continue
        found |= {(each.laddr.ip, each.laddr.port) for each in connections if each.status == psutil.CONN_LISTEN}
    return found


def check_addresses(screen: str) -> dict[str, int]:
    """Ask every address of the screen, find its next steps among the commands, and return ports by server."""
    named = dict(re.findall(r"^(\S.*?) +(http://\S+) +running +pid \d+$", screen, re.MULTILINE))
    assert sorted(named) == ["MLflow server", "Prefect server", "report server"], screen
    assert sorted(re.findall(r"http://\S+", screen)) == sorted(named.values())
    # One of the servers, and not just anything that listens there.
    marks = {"MLflow server": "MLflow", "Prefect server": "Prefect", "report server": "likeness"}
    for name, url in named.items():
        answer = httpx.get(url, trust_env=False, follow_redirects=True, timeout=60)
        assert answer.status_code == 200, (url, answer.status_code)
        assert marks[name] in answer.text, (url, answer.text[:500])
    steps = re.findall(r"\blikeness ([a-z-]+)", screen)
    assert {"submit", "run", "run-many", "status", "down"} <= set(steps), screen
    commands = likeness(ROOT, "--help").stdout
    assert [step for step in steps if not re.search(rf"^\W*{step}\b", commands, re.MULTILINE)] == []
    return {name: int(url.rsplit(":", 1)[-1]) for name, url in named.items()}
