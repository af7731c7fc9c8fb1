"""Summaries of finished runs."""

from tasks.manifests.evaluation import Estimate
from tasks.manifests.run_summary import RunSummary, make_head
from tasks.manifests.scoring import SideScores


def make_measured_summary(run_id: str) -> RunSummary:
    """Return a finished run whose DINO and grades have intervals, and whose CLIP-T has none."""
    dino = Estimate(mean=0.714, low=0.661, high=0.749, num=12)
    graded = Estimate(mean=3.5, low=3.0, high=3.9, num=12)
    return make_head(run_id, "finished").model_copy(
        update={
            "wall_seconds": 12.0,
            "metrics": {"base": {"dino": 0.2, "clip_t": 0.3}, "tuned": {"dino": 0.714, "clip_i": 0.6, "clip_t": 0.3}},
            "estimates": {"dino": {"tuned": dino}},
            "scores": {"tuned": SideScores(concept_preservation=3.5, prompt_following=3, image_quality=2)},
            "score_estimates": {"concept_preservation": {"tuned": graded}},
        }
    )
