"""The registry of metrics: what each one is, its range and direction, and the published figures it compares with.

The function of metric `NAME` is `measure_NAME` in `tasks/evaluation/metrics.py`. Metrics of other packages join by the
entry point group `likeness.metrics`, see `tasks/evaluation/own_metrics.py`.
"""

import math
from dataclasses import dataclass
from typing import Literal

Level = Literal["sample", "prompt", "class"]
COSINE, SHARE, DISTANCE = (-1.0, 1.0), (0.0, 1.0), (0.0, math.inf)


@dataclass(frozen=True)
class Metric:
    """A metric's name, its definition, and the published figures that it is comparable with."""

    name: str
    text: str
    comparable: str
    range: tuple[float, float] = COSINE
    level: Level = "sample"
    """What it is measured on: each sample of the subject, the samples of one prompt, or the class samples."""
    direction: Literal["higher", "lower", "none"] = "higher"
    """Which values are better; `none` where neither is."""
    source: str = ""


PAPER = "arXiv 2208.12242, section 4"
METRICS = {
    "dino": Metric(
        "DINO",
        "mean cosine of samples and photos by a self-supervised ViT, over all pairs; higher is better",
        "same definition, encoder (ViT-S/16) and input (short side 256 px, centre 224 px) as the tables of DreamBooth "
        "and DreamBench++; same scale, but other subjects and prompts",
        source=PAPER,
    ),
    "clip_i": Metric(
        "CLIP-I",
        "mean cosine of samples and photos by CLIP, over all pairs; higher is better",
        "same definition as in DreamBooth's tables, CLIP ViT-B/32 with its own preprocessing; same scale, but other "
        "subjects and prompts",
        source=PAPER,
    ),
    "clip_t": Metric(
        "CLIP-T",
        "mean cosine of each sample and its prompt by CLIP, the identifier left out; higher is better",
        "same definition as in DreamBooth's tables, CLIP ViT-B/32; depends on the prompts, so only runs with the same "
        "ones compare",
        source=PAPER,
    ),
    "pres": Metric(
        "PRES",
        "mean DINO cosine of samples of the class and photos of the subject; lower is better",
        "same definition as in DreamBooth's prior preservation table",
        level="class",
        direction="lower",
        source=PAPER,
    ),
    "div": Metric(
        "DIV",
        "mean LPIPS distance of samples of one prompt of the subject, over pairs and prompts; higher is better",
        "same definition as in DreamBooth's prior preservation table, LPIPS 0.1 on AlexNet; not measured without its "
        "weights",
        range=DISTANCE,
        level="prompt",
        source=f"{PAPER}; arXiv 1801.03924",
    ),
    "dino_div": Metric(
        "DINO-DIV",
        "one less the mean DINO cosine among samples of the class; higher is better",
        "no published table; runs with the same encoder compare with each other",
        range=(0.0, 2.0),
        level="class",
    ),
    "dino_spread": Metric(
        "DINO-SPREAD",
        "one less the mean DINO cosine among samples of one prompt of the subject, over pairs and prompts; higher is "
        "more diverse",
        "no published table; DIV by DINO, where LPIPS has no weights",
        range=(0.0, 2.0),
        level="prompt",
        direction="none",
    ),
    "nearest": Metric(
        "NEAREST",
        "mean DINO cosine of each sample and the photo that is nearest to it; among photos, the largest cosine of two",
        "no published table; runs on the same photos compare with each other",
        direction="none",
    ),
    "copies": Metric(
        "COPIES",
        "share of samples whose DINO distance to a photo is at most a quarter of that of the two nearest photos; lower "
        "is better",
        "no published table; such samples repeat a photo, so look at them",
        range=SHARE,
        direction="lower",
    ),
    "sharpness": Metric(
        "SHARPNESS",
        "mean variance of the Laplacian of luma (0 to 255) at 256 px on the short side; far below the photos' own is "
        "blur, far above is noise",
        "no published table; the measure of QC, so photos and samples compare",
        range=DISTANCE,
        direction="none",
    ),
}
