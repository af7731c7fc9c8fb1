"""Measure sampling against diffusers' own pipeline and print it as Markdown: python -m tests.bench.sampling.

Both sides have the same weights, prompts, scheduler, steps and guidance, in one process and in turn, after a warm-up of
each; ours decodes in float32, in chunks, and starts each image from its own seed. Medians of three.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tasks.diffusion.adapter import DTYPES, DiffusionModel
from tasks.diffusion.config import DiffusionConfig
from tasks.diffusion.registry import load_model
from tasks.diffusion.types import SamplingRequest
from tests.bench.training import make_model, open_folder, synchronize
from tests.support.config import make_config

STEPS, GUIDANCE, REPEATS = 25, 7.5, 3
PROMPT = "a photo of a fish"


def measure(sample: Callable[[int], Any]) -> tuple[float, int]:
    """Return the median seconds of a call, which takes a number of steps, and a GPU's peak memory; 0 on a CPU."""
    sample(2)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(REPEATS):
        synchronize()
        begun = time.monotonic()
        sample(STEPS)
        synchronize()
        seconds.append(time.monotonic() - begun)
    return statistics.median(seconds), torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def compare(model: DiffusionModel, *, batch_size: int) -> tuple[tuple[float, int], tuple[float, int]]:
    """Return seconds and peak bytes of one batch, ours and the pipeline's."""
    requests = [SamplingRequest(prompt=PROMPT, seed=seed) for seed in range(batch_size)]
    ours = measure(lambda steps: model.sample(requests, num_inference_steps=steps, guidance_scale=GUIDANCE))
    pipeline = model.make_pipeline()
    dtype = DTYPES[model.config.precision]
    pipeline.vae.to(dtype)

    def sample(steps: int) -> Any:
        generators = [torch.Generator().manual_seed(seed) for seed in range(batch_size)]
        return pipeline(
            [PROMPT] * batch_size, generator=generators, num_inference_steps=steps, guidance_scale=GUIDANCE,
            height=model.config.resolution, width=model.config.resolution,
        ).images  # fmt: skip

    theirs = measure(sample)
    pipeline.vae.float()
    return ours, theirs


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.sampling", description=__doc__)
    parser.add_argument("--model", choices=("mini", "sd15"), default="sd15" if torch.cuda.is_available() else "mini")
    parser.add_argument("--batch-sizes", default="1,8")
    parser.add_argument("--precisions", default="fp32,bf16,fp16" if torch.cuda.is_available() else "fp32")
    parser.add_argument("--folder", type=Path, help="where the model is made, and found by the next bench")
    options = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "diffusers"))
    print(f"{options.model}, {STEPS} steps, guidance {GUIDANCE}; {device}; {versions}; {time.strftime('%Y-%m-%d')}\n")
    print("| precision | batch | s/image | pipeline's | speed ratio | peak | pipeline's | load, s |")
    print("|---|---|---|---|---|---|---|---|")
    with open_folder(options.folder) as place:
        folder = make_model(options.model, place)
        side = 64 if options.model == "mini" else 512
        for precision in options.precisions.split(","):
            config = make_config(
                DiffusionConfig, pretrained_model_name_or_path=str(folder), resolution=side,
                precision=precision, sampler="dpm++",
            )  # fmt: skip
            begun = time.monotonic()
            model = load_model(config)
            synchronize()
            load = time.monotonic() - begun
            for batch_size in map(int, options.batch_sizes.split(",")):
                ours, theirs = compare(model, batch_size=batch_size)
                peaks = [f"{side[1] / 2**30:.2f} GiB" if side[1] else "-" for side in (ours, theirs)]
                print(f"| {precision} | {batch_size} | {ours[0] / batch_size:.3f} | {theirs[0] / batch_size:.3f} | "
                      f"{theirs[0] / ours[0]:.2f} | {' | '.join(peaks)} | {load:.1f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
