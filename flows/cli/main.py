"""The `likeness` command: parses words, calls a command, turns errors into one line and an exit code."""

import logging
import os
import sys
from pathlib import Path

import typer

from flows.cli.app import app, register_commands
from flows.cli.arguments import open_value
from tasks.errors import ConfigError, LikenessError
from tasks.redaction import clean_text, redact

INTERRUPTED = 130
PIPE_WIDTH = 160


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    quiet_libraries()
    open_value()
    register_commands()
    # Where nobody looks at it, help text isn't wrapped to a terminal's width.
    width = {} if sys.stdout.isatty() else {"terminal_width": PIPE_WIDTH}
    try:
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
    """Keep bars and notes of libraries off the terminal; what is set still wins."""
    for name, value in (
        ("TOKENIZERS_PARALLELISM", "false"), ("HF_HUB_DISABLE_PROGRESS_BARS", "1"), ("TQDM_DISABLE", "1"),
    ):  # fmt: skip
        os.environ.setdefault(name, value)
    # Where they are installed: kernels and image processors that nothing here uses.
    for name in ("bitsandbytes", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def explain_usage(error: typer.TyperException) -> str:
    """Return one line for words that the command line doesn't take, without control characters."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "likeness"
    reason = ConfigError(error.format_message().rstrip(".").replace("Value error, ", ""))  # cleans the text
    return f"UsageError: {reason}; see `{command} --help`"


def explain_os_error(error: OSError) -> str:
    """Return one line for an error of the operating system; a full disk says what to do."""
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
