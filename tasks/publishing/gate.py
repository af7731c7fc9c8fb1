"""The publishing gate: the checks that a model must pass to become the champion of its subject.

The report's verdict is drawn from the same checks.
"""

from dataclasses import dataclass
from typing import Literal

from tasks.manifests.evaluation import MIN_CLUSTERS, Estimate, Evaluation
from tasks.manifests.run import RunManifests
from tasks.publishing.config import GateConfig

CheckName = Literal["dino", "clip_t", "pres", "copies", "judge", "domain"]


@dataclass(frozen=True)
class Check:
    """One check of the gate: the value that was measured, and why it blocks; an empty reason: passed."""

    name: CheckName
    blocker: str = ""
    estimate: Estimate | None = None

    @property
    def is_passed(self) -> bool:
        """Whether nothing blocks."""
        return not self.blocker


def find_blockers(run: RunManifests, gate: GateConfig) -> list[str]:
    """Return the reasons why a model does not pass the gate; none: it passes."""
    return [check.blocker for check in run_checks(run, gate).values() if not check.is_passed]


def run_checks(run: RunManifests, gate: GateConfig) -> dict[CheckName, Check]:
    """Return all checks by name. A metric that was not measured blocks, as does one that is not a number."""
    evaluation = run.evaluation
    checks = (
        check_gain(evaluation, gate),
        check_prompts(evaluation, gate),
        check_drift(evaluation, gate),
        check_copies(evaluation, gate),
        check_judge(run, gate),
        Check("domain", f"out of domain: {run.subject.unknown_world}" if run.subject.unknown_world else ""),
    )
    return {check.name: check for check in checks}


def check_gain(evaluation: Evaluation, gate: GateConfig) -> Check:
    """Check the lower bound of the gain in DINO."""
    gain = evaluation.estimates.get("dino", {}).get("gain")
    if gain is None:
        return Check("dino", "DINO gain: not measured")
    if gain.low is None:
        return Check("dino", f"DINO gain: no interval, {explain_no_interval(gain)}", gain)
    if gain.low > gate.min_dino_gain:
        return Check("dino", estimate=gain)
    details = f"lower bound of the DINO gain is {gain.low:+.3f}, required > {gate.min_dino_gain:+.3f}"
    return Check("dino", details, gain)


def explain_no_interval(estimate: Estimate) -> str:
    """Return why an estimate has no interval."""
    return "too few prompts were sampled" if estimate.num < MIN_CLUSTERS else "values do not vary between prompts"


def limit_loss(evaluation: Evaluation, gate: GateConfig) -> float:
    """Return the lowest change in CLIP-T that passes; 0 where it was not measured."""
    base = evaluation.metrics.get("base")
    return -gate.max_clip_t_loss * abs(base.clip_t) if base is not None else 0.0


def check_prompts(evaluation: Evaluation, gate: GateConfig) -> Check:
    """Check the mean change in CLIP-T, with or without an interval."""
    gain, limit = evaluation.estimates.get("clip_t", {}).get("gain"), limit_loss(evaluation, gate)
    if gain is None:
        return Check("clip_t", "CLIP-T change: not measured")
    if gain.mean >= limit:
        return Check("clip_t", estimate=gain)
    return Check("clip_t", f"CLIP-T changed by {gain.mean:+.3f}, required >= {limit:+.3f}", gain)


def check_drift(evaluation: Evaluation, gate: GateConfig) -> Check:
    """Check the rise of PRES."""
    base, tuned = evaluation.drift.get("base"), evaluation.drift.get("tuned")
    if base is None or tuned is None:
        return Check("pres", "prior drift: not measured")
    rise = tuned.pres - base.pres
    if rise <= gate.max_pres_gain:
        return Check("pres")
    return Check("pres", f"prior drift: PRES rose by {rise:.3f}, allowed <= {gate.max_pres_gain:.3f}")


def check_copies(evaluation: Evaluation, gate: GateConfig) -> Check:
    """Check the share of near-duplicates of photos."""
    copies = evaluation.estimates.get("copies", {}).get("tuned")
    if copies is None:
        return Check("copies", "near-duplicates of photos: not measured, which takes at least two photos")
    if copies.mean <= gate.max_copies:
        return Check("copies", estimate=copies)
    details = f"{copies.mean:.0%} of samples are near-duplicates of a photo, allowed <= {gate.max_copies:.0%}"
    return Check("copies", details, copies)


def check_judge(run: RunManifests, gate: GateConfig) -> Check:
    """Check the judge's reliability, where it is required."""
    reliability = run.scoring.reliability
    if reliability.is_reliable or not gate.needs_reliable_judge:
        return Check("judge")
    failed = [control.name for control in reliability.controls if not control.is_passed]
    why = f"failed controls: {', '.join(failed)}" if failed else "no control samples, or another model served it"
    return Check("judge", f"the judge is not reliable ({why})")
