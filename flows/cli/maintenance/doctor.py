"""`likeness doctor`: checks every LLM profile against its YAML."""

from collections.abc import Iterable
from pathlib import Path

from conf.compose import compile_request
from conf.overrides import parse_overrides
from flows.cli.console import make_cell, show_usd
from flows.cli.spending.estimate import with_defaults


def print_examination(words: Iterable[str]) -> int:
    """Check every profile that serves a role, print the results, and return the exit code."""
    from rich.console import Console
    from rich.table import Table

    from tasks.mini.vision_server.launch import LocalServer
    from tasks.services.llm.budget.ledger import Ledger
    from tasks.services.llm.config import ROLES
    from tasks.services.llm.doctor import examine
    from tasks.services.llm.service import LlmService, LocalServices
    from tasks.services.store.open import open_store

    # No check concerns the subject, so placeholders fill its mandatory settings.
    config = compile_request(parse_overrides(with_defaults(words)))
    output = Path(config.output_dir).absolute()
    ledger = Ledger(output / "doctor-ledger.jsonl")
    server = LocalServer(output / "doctor-vision-server.log")
    output.mkdir(parents=True, exist_ok=True)
    # Without a budget: these few small calls belong to no run and its cap.
    llm = LlmService(
        config.llm, store=open_store(config.store), ledger=ledger, local=LocalServices(start_server=server.start)
    )
    num_bad = 0
    table = Table(box=None, header_style="bold")
    for title in ("profile", "model", "", "check", "result"):
        table.add_column(title)
    try:
        for name in config.llm.used_profiles():
            roles = [role for role in ROLES if name in config.llm.fallback_chain(role)]
            label, model = f"{name} ({', '.join(roles)})", config.llm.profiles[name].model
            for finding in examine(llm, name):
                num_bad += not finding.is_good
                sign = "[green]ok[/]" if finding.is_good else "[red]no[/]"
                table.add_row(*map(make_cell, (label, model)), sign, finding.name, make_cell(finding.detail))
                label = model = ""
    finally:
        llm.close()
        server.stop()
    Console(width=160).print(table)
    cost = ledger.sum_cost()
    print(f"{ledger.count_calls()} calls, {'unknown cost' if cost is None else f'{show_usd(cost)} USD'}")
    print("all checks passed" if num_bad == 0 else f"{num_bad} checks failed; change llm.profiles.<name>")
    return 0 if num_bad == 0 else 2
