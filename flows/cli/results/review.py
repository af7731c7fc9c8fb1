"""`likeness review`: a chat in the terminal about a run's photos and captions."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from flows.cli.console import make_cell
from flows.runs.context import open_budget
from flows.runs.records import read_run
from tasks.errors import ArtifactCorrupt, ConfigError, LikenessError
from tasks.manifests.subject import SubjectSet
from tasks.redaction import clean_text
from tasks.stage.digests import dump_signed, load_signed
from tasks.stage.files import quarantine, write_atomic

if TYPE_CHECKING:
    from tasks.services.llm.agents.conversation import Conversation, History
    from tasks.subject.captions.caption_review import CaptionVersions

HELP = "/captions lists captions, /quit or Ctrl-D exits, Ctrl-C stops a reply"


def review(folder: Path, *, read: Callable[[str], str] = input) -> Path | None:
    """Review a run's captions in a chat; return the file of changed captions, if any changed.

    Args:
        read: prompts for a line.

    Raises:
        ConfigError: the run has no captions, or its reviewer can't call tools.

    """
    from tasks.mini.vision_server.launch import LocalServer
    from tasks.services.llm.agents.conversation import Conversation
    from tasks.services.llm.budget.ledger import Ledger
    from tasks.services.llm.service import LlmService, LocalServices
    from tasks.services.store.open import open_store
    from tasks.stage.cache import find_manifest
    from tasks.subject.captions.caption_review import build_system_prompt, list_tools, open_caption_versions

    run = read_run(folder)
    store = open_store(run.config.store)
    key = run.find_stage_key("subject")
    subject = find_manifest(store, SubjectSet, stage="subject", key=key)
    if subject is None:
        raise ConfigError(f"the captions of run {folder.name} are missing from the store; run it again")
    if not run.config.llm.profile("reviewer").capabilities.tools:
        raise ConfigError("the reviewer's profile does not support tools; choose another, llm.reviewer=...")
    server = LocalServer(folder / "vision-server.log")
    llm = LlmService(
        run.config.llm,
        store=store,
        ledger=Ledger(folder / "ledger.jsonl"),
        budget=open_budget(run.config, folder.parent),
        local=LocalServices(start_server=server.start),
    )
    versions = open_caption_versions(folder, run.config.subject, subject)
    before, kept = versions.version, folder / "review.json"

    def confirm(question: str) -> bool:
        # The question quotes a model, whose control characters could rewrite what the terminal shows.
        return read(clean_text(f"{question} [y/N] ")).strip().lower() in ("y", "yes")

    tools = list_tools(subject, versions, run.config.subject, store=store, confirm=confirm)
    history = read_history(kept)
    conversation = Conversation(llm, "reviewer", build_system_prompt(subject, versions), tools, history)
    show_captions(subject, versions)
    print(f"resumes after {len(history.turns)} turns; " * bool(history.turns) + HELP)
    try:
        while (text := ask_line(read)) != "/quit":
            if text == "/captions":
                show_captions(subject, versions)
            elif text:
                # The briefing lists all captions, which the previous turn may have changed.
                conversation.system = build_system_prompt(subject, versions)
                say(conversation, text)
                write_atomic(kept, dump_signed(conversation.history, indent=1))
    finally:
        llm.close()
        server.stop()
    return versions.path if versions.version > before else None


def read_history(path: Path) -> "History":
    """Return the chat history; a damaged file is quarantined with a warning."""
    from tasks.services.llm.agents.conversation import History

    if not path.exists():
        return History()
    try:
        return load_signed(History, path.read_bytes())
    except ArtifactCorrupt as error:
        print(f"warning: {path}: {error}; moved to {quarantine(path).name}, a new history begins")
        return History()


def ask_line(read: Callable[[str], str]) -> str:
    """Return a line of the user; the end of input or Ctrl-C quits."""
    try:
        return read("you> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return "/quit"


def say(conversation: "Conversation", text: str) -> None:
    """Stream the reply; neither Ctrl-C nor an error ends the chat."""
    try:
        conversation.say(text, on_text=lambda piece: print(piece, end="", flush=True))
        print()
    except KeyboardInterrupt:
        print("\n(stopped; the reply is discarded)")
    except LikenessError as error:
        print(f"\n{error.kind}: {error}")


def show_captions(subject: SubjectSet, versions: "CaptionVersions") -> None:
    """Print a table of photos."""
    from rich.console import Console
    from rich.table import Table

    from tasks.subject.captions.caption_review import describe_subject

    table = Table(box=None, header_style="bold")
    for title in ("photo", "caption", "findings"):
        table.add_column(title)
    for name, caption, found in describe_subject(subject, versions):
        table.add_row(*map(make_cell, (name, caption or "-", found)))
    Console(width=160).print(table)
