"""The publishing gate: what speaks against making a model the champion of its subject."""

from tasks.manifests.run import RunManifests
from tasks.publishing.config import GateConfig


def find_blockers(run: RunManifests, gate: GateConfig) -> list[str]:
    """Return the reasons why a model does not pass the gate; none: it passes."""
    evaluation, scoring = run.evaluation, run.scoring
    base = evaluation.metrics["base"]
    blockers = []
    dino = evaluation.estimates.get("dino", {}).get("gain")
    if dino is None or dino.low is None:
        blockers.append("the gain in DINO has no interval: too few prompts were sampled")
    elif dino.low <= gate.min_dino_gain:
        blockers.append(f"the gain in DINO may be as low as {dino.low:+.3f}, must be above {gate.min_dino_gain:+.3f}")
    clip_t = evaluation.estimates.get("clip_t", {}).get("gain")
    limit = -gate.max_clip_t_loss * abs(base.clip_t)
    if clip_t is not None and clip_t.mean < limit:
        blockers.append(f"CLIP-T changed by {clip_t.mean:+.3f}, must be at least {limit:+.3f}")
    drift = evaluation.drift["tuned"].pres - evaluation.drift["base"].pres
    if drift > gate.max_pres_gain:
        blockers.append(f"PRES rose by {drift:.3f}, at most {gate.max_pres_gain:.3f} is allowed: the class has drifted")
    copies = evaluation.estimates.get("copies", {}).get("tuned")
    if copies is not None and copies.mean > gate.max_copies:
        blockers.append(f"{copies.mean:.0%} of samples copy a photo, at most {gate.max_copies:.0%} are allowed")
    if gate.needs_reliable_judge and not scoring.reliability.is_reliable:
        failed = [control.name for control in scoring.reliability.controls if not control.is_passed]
        why = f"controls failed: {', '.join(failed)}" if failed else "it was not controlled, or another model served it"
        blockers.append(f"the judge is not reliable ({why})")
    if run.subject.unknown_world:
        blockers.append(f"out of domain: {run.subject.unknown_world}")
    return blockers
