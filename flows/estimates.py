"""The memory that training would take, by method, as a table."""

from collections.abc import Iterable
from typing import get_args

from conf.request import compile_request, parse_overrides
from tasks.training.config import TrainingConfig

GIB = 2**30


def print_estimates(words: Iterable[str]) -> None:
    """Predict peak memory for the configured method and, beside it, the others."""
    from rich.console import Console
    from rich.table import Table

    # A model that only the real world's LLM profiles fit can be estimated without one.
    config = compile_request(parse_overrides(with_defaults(words)))
    training, diffusion = config.training, config.diffusion
    halves = "instance and class" if training.prior_loss_weight > 0 else "instance"
    console = Console()
    console.print(
        f"{diffusion.location} at {diffusion.resolution} px, {training.train_batch_size} {halves} image(s) "
        f"per forward and device, {training.precision}"
        + (", gradient checkpointing" if training.is_gradient_checkpointed else "")
    )
    table = Table(box=None)
    for name in ("method", "trained", "of", "weights", "gradients", "moments", "activations", "peak"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for method in methods():
        table.add_row(
            *describe(method, config.training, config.diffusion), style="bold" if method == training.method else ""
        )
    console.print(table)
    console.print("bold: as configured; fused attention assumed")


def with_defaults(words: Iterable[str]) -> list[str]:
    """Return the words, with a subject and an LLM where they say none: neither changes the memory."""
    given = list(words)
    names = {word.split("=")[0] for word in given}
    defaults = {"subject.source": "photos", "subject.class_noun": "thing"} if "subject" not in names else {}
    if not {"llm"} & names and any(w.startswith("diffusion=") and w != "diffusion=mini" for w in given):
        defaults["llm"] = "openai"
    return [*given, *(f"{name}={value}" for name, value in defaults.items() if name not in names)]


def methods() -> tuple[str, ...]:
    """Return every method's name."""
    names: tuple[str, ...] = get_args(TrainingConfig.model_fields["method"].annotation)
    return names


def describe(method: str, training: TrainingConfig, diffusion: object) -> list[str]:
    """Return a method's row."""
    from tasks.diffusion.base import DESCRIPTIONS, find_folder
    from tasks.diffusion.config import DiffusionConfig
    from tasks.training.estimate import estimate_memory

    assert isinstance(diffusion, DiffusionConfig)
    folder = find_folder(diffusion, wanted=DESCRIPTIONS)
    found = estimate_memory(folder, diffusion, training.model_copy(update={"method": method}))
    sizes = (found.weights, found.gradients, found.moments, found.activations, found.total)
    return [
        method,
        f"{found.trainable_parameters / 1e6:,.2f} M",
        f"{found.total_parameters / 1e6:,.1f} M",
        *(f"{size / GIB:.2f} GiB" for size in sizes),
    ]
