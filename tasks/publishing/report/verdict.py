"""The verdict of a run: is the tuned model good, how sure is that, and what to do next."""

from dataclasses import dataclass
from typing import Literal

from tasks.manifests.evaluation import Estimate, Evaluation
from tasks.manifests.run import RunManifests
from tasks.manifests.subject import SubjectSet
from tasks.publishing.config import GateConfig
from tasks.publishing.report.tables import find_knee, list_checkpoints

Level = Literal["good", "caution", "bad"]
MIN_PHOTOS = 3


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


def reach_verdict(run: RunManifests, gate: GateConfig) -> Verdict:
    """Return what may be concluded about a run."""
    findings = [
        *check_fidelity(run.evaluation),
        *check_prompts(run, max_loss=gate.max_clip_t_loss),
        *check_drift(run.evaluation, max_gain=gate.max_pres_gain),
        *check_copies(run.evaluation, max_share=gate.max_copies),
        *check_judge(run),
        *check_subject(run.subject),
    ]
    order: tuple[Level, ...] = ("bad", "caution", "good")
    findings.sort(key=lambda finding: order.index(finding.level))
    level = findings[0].level
    gain = run.evaluation.estimates.get("dino", {}).get("gain")
    if gain is None or gain.low is None:
        headline = "Too few prompts for a verdict"
        level = "bad" if level == "bad" else "caution"
    elif gain.low <= 0:
        headline = "Not shown to be better than the base model"
    else:
        headline = {
            "good": "Better than the base model, and nothing speaks against using it",
            "caution": "Better than the base model, with reservations",
            "bad": "Resembles the subject more, but should not be used as it is",
        }[level]
    return Verdict(level, headline, tuple(findings))


def show_gain(estimate: Estimate) -> str:
    """Return a difference with its interval, as text."""
    kind = "95 % interval" if estimate.low is not None else "no interval"
    return f"{estimate.show_gain()}, {kind} from {estimate.num} prompts"


def check_fidelity(evaluation: Evaluation) -> list[Finding]:
    """Return whether samples resemble the subject more than the base model's."""
    gain = evaluation.estimates.get("dino", {}).get("gain")
    if gain is None:
        return []
    told = f"DINO {show_gain(gain)}"
    if gain.low is None or gain.high is None:
        return [Finding("caution", f"Subject fidelity is not known: {told}.", "Sample more: evaluation=standard")]
    if gain.low > 0:
        room = evaluation.ceiling.dino - evaluation.metrics["base"].dino
        closed = f"; {gain.mean / room:.0%} of the gap to real photos is closed" if room > 1e-6 else ""
        return [Finding("good", f"Samples resemble the subject more: {told}{closed}.")]
    if gain.high < 0:
        return [
            Finding(
                "bad", f"Samples resemble the subject less: {told}.",
                "Look at the photos and the class noun; lower training.learning_rate",
            )
        ]  # fmt: skip
    return [
        Finding(
            "caution", f"A gain in subject fidelity is not shown: {told}.",
            "Sample more (evaluation=thorough), or train longer (training.max_train_steps)",
        )
    ]  # fmt: skip


def check_prompts(run: RunManifests, *, max_loss: float) -> list[Finding]:
    """Return whether prompts are still followed; if not, which checkpoint to take."""
    evaluation = run.evaluation
    gain = evaluation.estimates.get("clip_t", {}).get("gain")
    base = evaluation.metrics["base"].clip_t
    if gain is None or gain.high is None or gain.low is None:
        return []
    told = f"CLIP-T {show_gain(gain)}"
    if gain.high < 0 and gain.mean < -max_loss * abs(base):
        knee = find_knee(list_checkpoints(evaluation, run.scoring))
        is_earlier = knee is not None and knee != run.training.published_step
        advice = (
            f"Take step {knee}: likeness generate latest --candidate {knee}" if is_earlier
            else "Train fewer steps, or keep checkpoints to choose from: training.validation.save_top_k=3"
        )  # fmt: skip
        return [Finding("caution", f"Prompts are followed less, a sign of over-training: {told}.", advice)]
    if gain.low > -max_loss * abs(base):
        return [Finding("good", f"Prompts are followed as before: {told}.")]
    return [
        Finding("caution", f"A loss of prompt fidelity is not excluded: {told}.", "Sample more: evaluation=thorough")
    ]


def check_drift(evaluation: Evaluation, *, max_gain: float) -> list[Finding]:
    """Return whether samples of the class have drifted to the subject."""
    base, tuned = evaluation.drift["base"].pres, evaluation.drift["tuned"].pres
    if tuned - base <= max_gain:
        return [Finding("good", f"The class is kept: PRES {base:.3f} before, {tuned:.3f} after.")]
    return [
        Finding(
            "caution", f"Samples of the class resemble the subject: PRES {base:.3f} before, {tuned:.3f} after.",
            "Keep prior preservation on (prior=class_images), use more class images, or train fewer steps",
        )
    ]  # fmt: skip


def check_copies(evaluation: Evaluation, *, max_share: float) -> list[Finding]:
    """Return whether samples are near-duplicates of photos."""
    copies = evaluation.estimates.get("copies", {}).get("tuned")
    if copies is None or copies.mean <= max_share:
        return []
    return [
        Finding(
            "caution", f"{copies.mean:.0%} of samples are nearer to a photo than photos are to each other.",
            "Compare them with the photos below; train fewer steps, or add photos in other surroundings",
        )
    ]  # fmt: skip


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
        text = f"{len(subject.images)} photos were accepted; {MIN_PHOTOS} to 5 are usual."
        findings.append(Finding("caution", text, "Add photos from other sides and in other surroundings"))
    findings += [
        Finding("caution", f"{warning}.", "Check the photos and subject.class_noun") for warning in subject.warnings
    ]
    return findings
