"""What a run would take, before anything is loaded or sent: memory by method, LLM calls and money."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from typing import Any, get_args

from PIL import Image

from conf.compose import compile_request
from conf.overrides import parse_overrides
from conf.schema import RunConfig
from tasks.manifests.evaluation import SampleKind, Side
from tasks.services.llm.chat.request import RequestSpec
from tasks.training.config import TrainingConfig
from tasks.training.memory.table import CARDS, MemoryEstimate, look_up

GIB = 2**30


def print_estimates(words: Iterable[str]) -> None:
    """Predict peak memory for the configured method and, beside it, the others."""
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
    for name in ("method", "trained", "of", "weights", "gradients", "optimizer_state", "activations", "peak", "fits"):
        table.add_column(name, justify="left" if name == "method" else "right")
    found = estimate_all(config)
    for method, estimate in found.items():
        table.add_row(method, *describe(estimate), style="bold" if method == training.method else "")
    console.print(table)
    for card in CARDS:
        fitting = [method for method, estimate in found.items() if estimate.total <= card * GIB]
        console.print(f"{card} GB: {', '.join(fitting) or 'none'}")
    console.print("bold: as configured; fused attention assumed\n")
    print_calls(console, config)


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


def estimate_all(config: RunConfig) -> dict[str, MemoryEstimate]:
    """Return every method's peak memory: looked up for a preset as it is, else computed from its architecture."""
    known = look_up(config.diffusion, config.training, methods())
    if known is not None:
        return known
    from tasks.diffusion.hub import find_description
    from tasks.training.memory.estimate import estimate_methods

    return estimate_methods(find_description(config.diffusion), config.diffusion, config.training, methods=methods())


def describe(found: MemoryEstimate) -> list[str]:
    """Return the cells of a method's row."""
    sizes = (found.weights, found.gradients, found.optimizer_state, found.activations, found.total)
    card = found.find_card()
    return [
        f"{found.trainable_parameters / 1e6:,.2f} M",
        f"{found.total_parameters / 1e6:,.1f} M",
        *(f"{size / GIB:.2f} GiB" for size in sizes),
        f"{card} GB" if card else f"over {CARDS[-1]} GB",
    ]


def print_calls(console: Any, config: RunConfig) -> None:
    """Print calls, tokens and money by role, as expected and at most, and the largest batch file."""
    from rich.table import Table

    from tasks.services.llm.budget.cost_estimate import estimate_calls

    rows = [
        estimate_calls(config.llm, role, requests, is_batch=is_batch(config, role))
        for role, requests in plan_requests(config)
    ]
    extra = [
        replace(
            estimate_calls(config.llm, role, requests, is_batch=False, first_fallback=fallback_index),
            calls=0,
            expected_usd=0.0,
        )
        for role, requests, fallback_index in plan_follow_ups(config)
    ]
    table = Table(box=None)
    names = ("role", "profile", "calls", "at most", "tokens in", "USD expected", "at most")
    for number, name in enumerate(names):
        table.add_column(name, justify="left" if number < 2 else "right")
    for row in [*rows, *extra]:
        way = " (batch)" if row.is_batch else ""
        tokens = f"{row.input_tokens:,}" if row.calls else "-"
        counts = (str(row.calls), f"{row.worst_calls:,}", tokens)
        table.add_row(row.role, row.profile + way, *counts, show_usd(row.expected_usd), show_usd(row.worst_usd))
    console.print(table)
    expected = add_up([row.expected_usd for row in rows])
    worst = add_up([row.worst_usd for row in [*rows, *extra]])
    cap = "" if config.llm.budget_usd is None else f", and never more than llm.budget_usd={config.llm.budget_usd:g}"
    console.print(f"expected {show_usd(expected)} USD: one short reply from the first profile for each question")
    console.print(
        f"at most  {show_usd(worst)} USD: every retry, repair, next profile and follow-up billed at full length{cap}"
    )
    largest = max((row.largest_file_bytes for row in rows if row.is_batch), default=0)
    if largest:
        console.print(f"largest batch file {largest / 1e6:.2f} MB")


def plan_follow_ups(config: RunConfig) -> list[tuple[str, list[RequestSpec[Any]], int]]:
    """Return what is asked only where replies call for it, by role, with the place in the chain where it begins."""
    from tasks.images import encode_png
    from tasks.services.llm.agents.tools import MOST_PICTURES
    from tasks.subject.adjudication import EXAMINE, MAX_ROUNDS, Adjudication
    from tasks.subject.photos.ingest import SHOWN_SIDE

    found: list[tuple[str, list[RequestSpec[Any]], int]] = []
    subject, scoring = config.subject, config.scoring
    if subject.captioning == "llm" and config.llm.profile("adjudicator").capabilities.tools:
        picture = encode_png(Image.new("RGB", (SHOWN_SIDE, SHOWN_SIDE)))
        rounds = [
            RequestSpec(
                EXAMINE, ("x" * 1000, *[picture] * (1 + MOST_PICTURES * number)), Adjudication, is_reasoning=True
            )
            for number in range(MAX_ROUNDS + 1)
        ]
        found.append(("adjudicator", rounds * count_asked_photos(config), 0))
    if scoring.disagreement_threshold:
        judged = dict(plan_requests(config))["judge"]
        num = 3 * 2 * len(config.evaluation.prompts) * config.evaluation.num_images_per_prompt
        found.append(("judge", [replace(spec, is_reasoning=True) for spec in judged[:num]], 1))
    return found


def add_up(costs: list[float | None]) -> float | None:
    """Return a sum; None where a part is unknown."""
    return None if None in costs else sum(cost for cost in costs if cost is not None)


def show_usd(cost: float | None) -> str:
    """Return money as text; what is unknown is said to be."""
    return "unknown" if cost is None else f"{cost:.4f}"


def is_batch(config: RunConfig, role: str) -> bool:
    """Whether a role's requests go out as a batch job."""
    can = config.llm.profile(role).capabilities.batch != "none"
    if role == "captioner":
        return can and count_asked_photos(config) >= config.subject.batch_threshold
    return role in ("judge", "second_judge") and config.scoring.executor == "batch" and can


def count_asked_photos(config: RunConfig) -> int:
    """Return how many photos a run would ask about; 5 where it can't be told without reading."""
    from tasks.subject.photos.ingest import count_photos

    return min(config.subject.max_images, count_photos(config.subject.source) or 5)


def plan_requests(config: RunConfig) -> list[tuple[str, list[RequestSpec[Any]]]]:
    """Return every request that a run would send, with blank pictures of the right size, by role."""
    from tasks.images import encode_png, shrink_png
    from tasks.manifests.base import ObjectRef
    from tasks.manifests.evaluation import Sample
    from tasks.manifests.subject import ImageMeasures
    from tasks.scoring.judge_requests import JudgeContext, list_judge_requests, list_second_judge_requests
    from tasks.subject.captions import captioning
    from tasks.subject.name_lookup import look_up_spec
    from tasks.subject.photos.ingest import Photo
    from tasks.subject.subject_profile import profile_spec

    subject, evaluation = config.subject, config.evaluation
    num_photos = count_asked_photos(config)
    side = subject.working_side or config.diffusion.resolution
    photo_png = encode_png(Image.new("RGB", (side, side)))
    sample_png = encode_png(Image.new("RGB", (config.diffusion.resolution, config.diffusion.resolution)))
    measures = ImageMeasures(width=1, height=1, sharpness=0, brightness=0, contrast=0, perceptual_hash="")
    photo = Photo(name="", sha256="", png=photo_png, measures=measures)
    plan: list[tuple[str, list[RequestSpec[Any]]]] = []
    if subject.captioning == "llm":
        plan.append(("inspector", [captioning.inspect_spec(photo, subject)] * num_photos))
        plan.append(("captioner", [captioning.caption_spec(photo, subject)] * num_photos))
        if subject.is_profiled:
            plan.append(("profiler", [profile_spec([photo] * num_photos, subject)]))
    if subject.web_lookup.enabled:
        plan.append(("profiler", [look_up_spec(subject)]))

    def sample(side: Side, kind: SampleKind, prompt: str, seed: int, step: int | None = None) -> Sample:
        ref = ObjectRef(key=f"{side}/{kind}/{prompt}/{seed}/{step}", sha256="", size_bytes=0)
        return Sample(image=ref, side=side, kind=kind, prompt=prompt, class_prompt=prompt, seed=seed, step=step)

    sides: tuple[Side, ...] = ("base", "tuned")
    seeds = range(evaluation.num_images_per_prompt)
    material = JudgeContext(
        class_noun=subject.class_noun,
        references=[shrink_png(photo_png, max_side=config.scoring.max_side)]
        * min(num_photos, config.scoring.num_reference_images),
        samples=[
            sample(side, "subject", prompt, seed) for side in sides for prompt in evaluation.prompts for seed in seeds
        ],
        others=[sample("base", "class", "", seed) for seed in range(evaluation.num_class_images)],
        candidates=[
            sample("tuned", "candidate", prompt, seed, step)
            for step in range(config.count_candidates())
            for seed, prompt in list(product(seeds, evaluation.prompts))[: evaluation.num_candidate_images]
        ],
        published_step=-1,
        read=lambda sample: shrink_png(sample_png, max_side=config.scoring.max_side),
    )
    plan.append(("judge", [question.spec for question in list_judge_requests(config.scoring, material)]))
    if config.llm.fallback_chain("second_judge"):
        plan.append(
            ("second_judge", [question.spec for question in list_second_judge_requests(config.scoring, material)])
        )
    return plan
