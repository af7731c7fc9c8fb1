"""One process of sharded class-image generation: python -m tasks.prior.worker SHARD.json."""

import os
import sys
from pathlib import Path

from tasks.diffusion.registry import load_model
from tasks.prior.generation import generate_images
from tasks.prior.sharding import Shard


def main(argv: list[str]) -> None:
    """Generate a shard's images; each is written to a temporary name and renamed."""
    shard = Shard.model_validate_json(Path(argv[0]).read_text())
    out = Path(shard.folder)
    model = load_model(shard.diffusion)
    seeds = list(shard.seeds)
    for seed, picture in generate_images(model, shard.prior, class_prompt=shard.class_prompt, seeds=seeds):
        # The parent polls for the final name, so a file of that name must be complete.
        staged = out / f".{seed}.png"
        picture.save(staged, format="PNG")
        os.replace(staged, out / f"{seed}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
