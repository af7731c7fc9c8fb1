"""The `likeness` command: parses arguments, runs a command, reports errors as one line and an exit code."""

import logging
import os
import sys
from pathlib import Path

import typer

from flows.cli.app import app, register_commands
from flows.cli.arguments import open_value
from tasks.errors import ConfigError, LikenessError
from tasks.redaction import clean_text, redact
from tasks.stage.worker_process import share_cores

INTERRUPTED = 130  # 128 + SIGINT, as shells report it
PIPE_WIDTH = 160


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    quiet_libraries()
    open_value()
    register_commands()
    # Piped help text isn't wrapped to a terminal's width.
    width = {} if sys.stdout.isatty() else {"terminal_width": PIPE_WIDTH}
    try:
        # Not standalone: Typer would print errors itself and call sys.exit.
        code = app(args=argv, prog_name="likeness", standalone_mode=False, **width) or 0
    except LikenessError as error:
        print(f"{error.kind}: {error}", file=sys.stderr)
        return error.exit_code
    except typer.TyperException as error:
        print(explain_usage(error), file=sys.stderr)
        return 2
    except OSError as error:
        print(explain_os_error(error), file=sys.stderr)
        return 1
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:  # what Typer makes of Ctrl-C
        print("stopped; run the same command again to resume", file=sys.stderr)
    return int(code)


def quiet_libraries() -> None:
    """Silence progress bars and warnings of libraries; environment variables that are set take precedence."""
    # tokenizers warns when a process forks after using its thread pool.
    for name, value in (
        ("TOKENIZERS_PARALLELISM", "false"), ("HF_HUB_DISABLE_PROGRESS_BARS", "1"), ("TQDM_DISABLE", "1"),
    ):  # fmt: skip
        os.environ.setdefault(name, value)
    share_cores()
    # Where they are installed: kernels and image processors that nothing here uses.
    for name in ("bitsandbytes", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def explain_usage(error: typer.TyperException) -> str:
    """Return one line for a usage error, without control characters."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "likeness"
    reason = ConfigError(error.format_message().rstrip(".").replace("Value error, ", ""))  # cleans the text
    return f"UsageError: {reason}; see `{command} --help`"


def explain_os_error(error: OSError) -> str:
    """Return one line for an OSError; for a full disk, with what to do."""
    from tasks.stage.files import explain_full_disk

    try:
        with explain_full_disk(Path(str(error.filename or "the output folder"))):
            raise error
    except LikenessError as explained:
        return f"{type(explained).__name__}: {explained}"
    except OSError:
        return f"{type(error).__name__}: {clean_text(redact(str(error)))}"


if __name__ == "__main__":
    sys.exit(main())
