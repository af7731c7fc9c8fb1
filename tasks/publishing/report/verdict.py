"""The verdict of a run: is the tuned model good, how sure is that, and what to do next."""

from dataclasses import dataclass
from typing import Literal

from tasks.manifests.evaluation import MIN_CLUSTERS, Estimate, Evaluation
from tasks.manifests.run import RunManifests
from tasks.manifests.run_summary import EvaluatedModel
from tasks.manifests.subject import SubjectSet
from tasks.publishing.config import GateConfig
from tasks.publishing.gate import Check, explain_no_interval, limit_loss, run_checks
from tasks.publishing.pick import find_knee, measure_checkpoints
from tasks.publishing.report.tables import find_ceiling

Level = Literal["good", "caution", "bad"]
MIN_PHOTOS = 3
COPY_ADVICE = "Compare them with the photos below; train fewer steps, or add photos in other surroundings"


@dataclass(frozen=True)
class Finding:
    """One fact about the run, and what to do about it."""

    level: Level
    text: str
    advice: str = ""


@dataclass(frozen=True)
class Verdict:
    """The conclusion, and the findings behind it; the worst come first."""

    level: Level
    headline: str
    findings: tuple[Finding, ...]


def reach_verdict(run: RunManifests, gate: GateConfig, evaluated: EvaluatedModel | None = None) -> Verdict:
    """Return what may be concluded about a run, or about a model from elsewhere; the limits are those of the gate."""
    checks = run_checks(run, gate)
    findings = [
        *describe_gain(run.evaluation, checks["dino"]),
        *describe_prompts(run, checks["clip_t"], limit=limit_loss(run.evaluation, gate)),
        *describe_drift(run.evaluation, checks["pres"]),
        *describe_copies(checks["copies"]),
        *describe_ceiling(run.evaluation),
        *check_judge(run),
        *check_subject(run.subject),
        *check_photos(evaluated),
    ]
    order: tuple[Level, ...] = ("bad", "caution", "good")
    findings.sort(key=lambda finding: order.index(finding.level))
    is_good = all(check.is_passed for check in checks.values())
    level = "caution" if findings[0].level == "good" and not is_good else findings[0].level
    gain = checks["dino"].estimate
    if gain is None:
        headline = "DINO was not measured: no verdict"
    elif gain.low is None or gain.high is None:
        few = "too few prompts" if gain.num < MIN_CLUSTERS else "values do not vary between prompts"
        headline = f"No verdict: {few}"
    elif gain.high < 0:
        headline = "Worse than the base model"
    elif gain.low <= 0:
        headline = "No significant improvement over the base model"
    elif not checks["dino"].is_passed and level != "bad":
        headline = "Better than the base model, by less than required"
    else:
        headline = {
            "good": "Better than the base model; all checks passed",
            "caution": "Better than the base model, with reservations",
            "bad": "Resembles the subject more; not recommended for use",
        }[level]
    if level == "good" and (gain is None or gain.low is None or gain.low <= 0):
        level = "caution"
    return Verdict(level, headline, tuple(findings))


def show_gain(estimate: Estimate) -> str:
    """Return a difference with its interval, as text."""
    kind = "95 % interval" if estimate.low is not None else "no interval"
    return f"{estimate.show_gain()}, {kind} from {estimate.num} prompts"


def describe_gain(evaluation: Evaluation, check: Check) -> list[Finding]:
    """Return whether samples resemble the subject more than the base model's."""
    gain = check.estimate
    if gain is None:
        return [Finding("caution", f"{check.blocker}.", "Run the evaluation again")]
    details = f"DINO {show_gain(gain)}"
    if gain.low is None or gain.high is None:
        text = f"Subject fidelity is not known: {details}; {explain_no_interval(gain)}."
        return [Finding("caution", text, "Sample more: evaluation=standard")]
    if gain.low > 0:
        text = f"Samples resemble the subject more: {details}{show_share(evaluation, gain)}."
        if check.is_passed:
            return [Finding("good", text)]
        return [Finding("caution", f"{text[:-1]}; the {check.blocker}.", "Train longer (training.max_train_steps)")]
    if gain.high < 0:
        return [
            Finding(
                "bad", f"Samples resemble the subject less: {details}.",
                "Look at the photos and the class noun; lower training.learning_rate",
            )
        ]  # fmt: skip
    return [
        Finding(
            "caution", f"No significant gain in subject fidelity: {details}.",
            "Sample more (evaluation=thorough), or train longer (training.max_train_steps)",
        )
    ]  # fmt: skip


def show_share(evaluation: Evaluation, gain: Estimate) -> str:
    """Return how much of the gap to real photos is closed, where there is one."""
    room = evaluation.ceiling.dino - evaluation.metrics["base"].dino
    if room <= 1e-6:
        return ""
    share = gain.mean / room
    if share > 1:
        return "; above real photos among themselves"
    return f"; {share * 100:.0f} % of the gap to real photos is closed"


def describe_prompts(run: RunManifests, check: Check, *, limit: float) -> list[Finding]:
    """Return whether prompts are still followed; if not, which checkpoint to take."""
    gain = check.estimate
    if gain is None:
        return [Finding("caution", f"{check.blocker}.", "Run the evaluation again")]
    details = f"CLIP-T {show_gain(gain)}"
    # Equal values have no interval; with enough prompts their mean is what it is.
    low, high = (gain.mean, gain.mean) if gain.low is None and gain.num >= MIN_CLUSTERS else (gain.low, gain.high)
    if check.is_passed and low is not None and low >= limit:
        return [Finding("good", f"Prompts are followed as before: {details}.")]
    if check.is_passed or high is None or high >= 0:
        text = f"Prompt fidelity: inconclusive: {details}{'' if check.is_passed else f', required >= {limit:+.3f}'}."
        return [Finding("caution", text, "Sample more: evaluation=thorough")]
    knee = find_knee(measure_checkpoints(run.evaluation))
    prompt = f'"a photo of {run.subject.identifier_token} {run.subject.class_noun}"'
    advice = (
        f"Take step {knee}: publishing.pick=knee, or likeness generate latest {prompt} --candidate {knee}"
        if knee is not None and knee != run.training.published_step
        else "Train fewer steps, or keep checkpoints to choose from: training.validation.save_top_k=3"
    )
    return [Finding("caution", f"Prompts are followed less, a sign of over-training: {details}.", advice)]


def describe_drift(evaluation: Evaluation, check: Check) -> list[Finding]:
    """Return whether samples of the class have drifted to the subject."""
    base, tuned = evaluation.drift.get("base"), evaluation.drift.get("tuned")
    if base is None or tuned is None:
        return [Finding("caution", "Prior drift: not measured.", "Run the evaluation again")]
    found = evaluation.estimates.get("pres", {})
    before = found.get("base", Estimate(mean=base.pres, num=0))
    after = found.get("tuned", Estimate(mean=tuned.pres, num=0))
    details = f"PRES {before.show()} before, {after.show()} after"
    if check.is_passed:
        return [Finding("good", f"No prior drift: {details}.")]
    return [
        Finding(
            "caution", f"Prior drift: {details}.",
            "Keep prior preservation on (prior=class_images), use more class images, or train fewer steps",
        )
    ]  # fmt: skip


def describe_copies(check: Check) -> list[Finding]:
    """Return whether samples are near-duplicates of photos."""
    if check.is_passed:
        return []
    if check.estimate is None:
        return [Finding("caution", f"Near-duplicates of photos: {check.blocker.partition(': ')[2]}.")]
    text = (
        f"{check.estimate.mean:.0%} of samples are near-duplicates of a photo: their DINO distance to it is at most a "
        "quarter of that of the two nearest photos."
    )
    return [Finding("caution", text, COPY_ADVICE)]


def describe_ceiling(evaluation: Evaluation) -> list[Finding]:
    """Return whether samples are closer to the photos than these are to each other, which copies of them would be."""
    tuned, ceiling = evaluation.estimates.get("dino", {}).get("tuned"), find_ceiling(evaluation, "dino")
    if tuned is None or tuned.low is None or ceiling is None or tuned.low <= ceiling.mean:
        return []
    text = (
        f"Samples are closer to the photos (DINO {tuned.show()}) than the photos are to each other "
        f"({ceiling.show()}), a sign of copying."
    )
    return [Finding("caution", text, COPY_ADVICE)]


def check_judge(run: RunManifests) -> list[Finding]:
    """Return whether the judge's grades may be used."""
    reliability = run.scoring.reliability
    if not run.scoring.scores:
        return [Finding("caution", "No sample was graded by the judge.")]
    failed = [control.name for control in reliability.controls if not control.is_passed]
    if failed:
        text = f"The judge's grades are not reliable: it failed {len(failed)} of {len(reliability.controls)} controls"
        advice = "Rely on DINO and CLIP-T; choose another model for llm.judge"
        return [Finding("caution", f"{text} ({', '.join(failed)}).", advice)]
    if not reliability.is_reliable:
        return [
            Finding("caution", "Whether the judge's grades are reliable is unknown.", "See Judge reliability below")
        ]
    return []


def check_subject(subject: SubjectSet) -> list[Finding]:
    """Return what the photos leave to be desired."""
    findings = []
    if subject.unknown_world:
        findings.append(Finding("bad", f"Out of domain: {subject.unknown_world}."))
    if len(subject.images) < MIN_PHOTOS:
        num = len(subject.images)
        text = f"{num} {'photo was' if num == 1 else 'photos were'} accepted; {MIN_PHOTOS} to 5 are usual."
        findings.append(Finding("caution", text, "Add photos from other sides and in other surroundings"))
    findings += [
        Finding("caution", f"{warning[:1].upper()}{warning[1:]}.", "Check the photos and subject.class_noun")
        for warning in subject.warnings
    ]
    return findings


def check_photos(evaluated: EvaluatedModel | None) -> list[Finding]:
    """Return whether a model from elsewhere was tuned on other photos."""
    if evaluated is None or not evaluated.num_unmatched_photos:
        return []
    text = (
        f"None of the photos is among the {evaluated.num_unmatched_photos} that the model was tuned on, by its "
        "lineage.json: if they show another subject, the figures say nothing of its quality."
    )
    return [Finding("caution", text, "Evaluate with photos of the subject that the model was tuned on")]
