"""Names, definitions and comparability of the metrics, as report and README state them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MetricText:
    """A metric's name, its definition, and the published figures that it is comparable with."""

    name: str
    text: str
    comparable: str


METRICS = {
    "dino": MetricText(
        "DINO",
        "mean cosine of samples and photos by a self-supervised ViT, over all pairs; higher is better",
        "same definition, encoder (ViT-S/16) and input (short side 256 px, centre 224 px) as the tables of DreamBooth "
        "and DreamBench++; same scale, but other subjects and prompts",
    ),
    "clip_i": MetricText(
        "CLIP-I",
        "mean cosine of samples and photos by CLIP, over all pairs; higher is better",
        "same definition as in DreamBooth's tables, CLIP ViT-B/32 with its own preprocessing; same scale, but other "
        "subjects and prompts",
    ),
    "clip_t": MetricText(
        "CLIP-T",
        "mean cosine of each sample and its prompt by CLIP, the identifier left out; higher is better",
        "same definition as in DreamBooth's tables, CLIP ViT-B/32; depends on the prompts, so only runs with the same "
        "ones compare",
    ),
    "pres": MetricText(
        "PRES",
        "mean DINO cosine of samples of the class and photos of the subject; lower is better",
        "same definition as in DreamBooth's prior preservation table",
    ),
    "div": MetricText(
        "DIV",
        "mean LPIPS distance of samples of one prompt of the subject, over pairs and prompts; higher is better",
        "same definition as in DreamBooth's prior preservation table, LPIPS 0.1 on AlexNet; not measured without its "
        "weights",
    ),
    "dino_div": MetricText(
        "DINO-DIV",
        "one less the mean DINO cosine among samples of the class; higher is better",
        "no published table; runs with the same encoder compare with each other",
    ),
}
