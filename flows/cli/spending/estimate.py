"""Estimates before anything is loaded or sent: memory by method, LLM calls and cost."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, get_args

from PIL import Image

from conf.compose import compile_request
from conf.overrides import parse_overrides
from conf.schema import RunConfig
from flows.cli.console import show_usd
from tasks.training.config import TrainingConfig
from tasks.training.memory.table import GPU_MEMORY_GB, MemoryEstimate, look_up

if TYPE_CHECKING:
    from rich.console import Console

    from tasks.scoring.judge_requests import JudgeContext
    from tasks.services.llm.budget.cost_estimate import PlannedRequests

GIB = 2**30


def print_estimates(words: Iterable[str]) -> None:
    """Print peak memory of the configured method and the others, and LLM calls with their cost."""
    from rich.console import Console
    from rich.table import Table

    # A model that only the real world's LLM profiles fit can be estimated without one.
    config = compile_request(parse_overrides(with_defaults(words)))
    training, diffusion = config.training, config.diffusion
    halves = "instance and class" if training.prior_loss_weight > 0 else "instance"
    console = Console(width=110)
    console.print(
        f"{diffusion.pretrained_model_name_or_path} at {diffusion.resolution} px, "
        f"{training.train_batch_size} {halves} image(s) "
        f"per forward and device, {training.mixed_precision}"
        + (", gradient checkpointing" if training.gradient_checkpointing else "")
    )
    table = Table(box=None)
    for name in ("method", "trained", "of", "weights", "gradients", "optimizer state", "activations", "peak", "fits"):
        table.add_column(name, justify="left" if name == "method" else "right")
    found = estimate_all(config)
    for method, estimate in found.items():
        table.add_row(method, *describe(estimate), style="bold" if method == training.method else "")
    console.print(table)
    for card in GPU_MEMORY_GB:
        fitting = [method for method, estimate in found.items() if estimate.total <= card * GIB]
        console.print(f"{card} GB: {', '.join(fitting) or 'none'}")
    console.print("bold: as configured; fused attention assumed\n")
    print_calls(console, config)


def with_defaults(words: Iterable[str]) -> list[str]:
    """Return the arguments, with placeholders where they name no subject or LLM: neither affects memory."""
    given = list(words)
    names = {word.split("=")[0] for word in given}
    defaults = {"subject.source": "photos", "subject.class_noun": "thing"} if "subject" not in names else {}
    # RunConfig refuses the default LLM, the mini vision server, with any base model but mini.
    if not {"llm"} & names and any(w.startswith("diffusion=") and w != "diffusion=mini" for w in given):
        defaults["llm"] = "openai"
    return [*given, *(f"{name}={value}" for name, value in defaults.items() if name not in names)]


def methods() -> tuple[str, ...]:
    """Return every method's name."""
    names: tuple[str, ...] = get_args(TrainingConfig.model_fields["method"].annotation)
    return names


def estimate_all(config: RunConfig) -> dict[str, MemoryEstimate]:
    """Return every method's peak memory: looked up for a preset as it is, else computed from its architecture."""
    known = look_up(config.diffusion, config.training, methods())
    if known is not None:
        return known
    from tasks.diffusion.hub import find_config_folder
    from tasks.training.memory.estimate import estimate_methods

    return estimate_methods(find_config_folder(config.diffusion), config.diffusion, config.training, methods=methods())


def describe(found: MemoryEstimate) -> list[str]:
    """Return the cells of a method's row."""
    sizes = (found.weights, found.gradients, found.optimizer_state, found.activations, found.total)
    card = found.find_smallest_gpu()
    return [
        f"{found.trainable_parameters / 1e6:,.2f} M",
        f"{found.total_parameters / 1e6:,.1f} M",
        *(f"{size / GIB:.2f} GiB" for size in sizes),
        f"{card} GB" if card else f"over {GPU_MEMORY_GB[-1]} GB",
    ]


def print_calls(console: "Console", config: RunConfig) -> None:
    """Print calls, tokens and cost by role, expected and at most, and the largest batch file."""
    from rich.table import Table

    from tasks.services.llm.budget.cost_estimate import estimate_calls

    rows = [estimate_calls(config.llm, planned) for planned in plan_requests(config)]
    table = Table(box=None)
    names = ("role", "profile", "calls", "at most", "tokens in", "USD expected", "at most")
    for number, name in enumerate(names):
        table.add_column(name, justify="left" if number < 2 else "right")
    for row in rows:
        way = " (batch)" if row.is_batch else ""
        tokens = f"{row.input_tokens:,}" if row.calls else "-"
        counts = (str(row.calls), f"{row.worst_calls:,}", tokens)
        table.add_row(row.role, row.profile + way, *counts, show_usd(row.expected_usd), show_usd(row.worst_usd))
    console.print(table)
    expected, worst = add_up([row.expected_usd for row in rows]), add_up([row.worst_usd for row in rows])
    cap = "" if config.llm.budget_usd is None else f", capped at llm.budget_usd={config.llm.budget_usd:g}"
    console.print(f"expected {show_usd(expected)} USD: one short reply of the first profile per request")
    console.print(
        f"at most  {show_usd(worst)} USD: every retry, repair, fallback and follow-up billed at full length{cap}"
    )
    largest = max((row.largest_file_bytes for row in rows if row.is_batch), default=0)
    if largest:
        console.print(f"largest batch file {largest / 1e6:.2f} MB")


def plan_requests(config: RunConfig) -> list["PlannedRequests"]:
    """Return every request that a run would send, with blank pictures of the right size."""
    from tasks.scoring import request_plan as scoring_plan
    from tasks.subject import request_plan as subject_plan

    side = config.subject.working_side or config.diffusion.resolution
    of_photos = subject_plan.plan_requests(config.subject, config.llm, side=side)
    return [*of_photos, *scoring_plan.plan_requests(config.scoring, config.llm, make_judge_context(config))]


def make_judge_context(config: RunConfig) -> "JudgeContext":
    """Return what the judge would see: the samples that the evaluation plans, and the photos, all blank."""
    from tasks.evaluation.sampling import plan_samples
    from tasks.images import encode_png, shrink_png
    from tasks.manifests.base import ObjectRef
    from tasks.manifests.evaluation import Sample
    from tasks.scoring.judge_requests import JudgeContext
    from tasks.subject.request_plan import count_asked_photos

    def blank(side: int) -> bytes:
        return shrink_png(encode_png(Image.new("RGB", (side, side))), max_side=config.scoring.max_side)

    planned = plan_samples(
        config.evaluation,
        class_noun=config.subject.class_noun,
        identifier_token=config.subject.identifier_token,
        class_prompt=config.subject.class_noun,
        candidates=range(config.count_candidates()),
    )
    samples = [
        Sample(
            image=ObjectRef(key=plan.name, sha256="", size_bytes=0),
            side=plan.side, kind=plan.kind, prompt=plan.prompt, class_prompt=plan.class_prompt, seed=plan.seed,
            template=plan.template, prompt_kind=plan.prompt_kind, step=plan.step,
        )
        for plan in planned
    ]  # fmt: skip
    num_references = min(count_asked_photos(config.subject), config.scoring.num_reference_images)
    photo, sample = (
        blank(config.subject.working_side or config.diffusion.resolution),
        blank(config.diffusion.resolution),
    )
    return JudgeContext(
        class_noun=config.subject.class_noun,
        references=[photo] * num_references,
        samples=[row for row in samples if row.kind == "subject"],
        others=[row for row in samples if row.kind == "class" and row.side == "base"],
        candidates=[row for row in samples if row.kind == "candidate"],
        # Distinct from the candidates' steps, which are counted from 0 here.
        published_step=-1,
        evidence=config.scoring.evidence,
        read=lambda _: sample,
    )


def add_up(costs: list[float | None]) -> float | None:
    """Return a sum; None where a part is unknown."""
    return None if None in costs else sum(cost for cost in costs if cost is not None)
