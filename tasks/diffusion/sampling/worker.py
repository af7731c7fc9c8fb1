"""One process of sampling on several devices: python -m tasks.diffusion.sampling.worker SHARD.json."""

import os
import sys
from pathlib import Path

from tasks.diffusion.sampling.devices import JOB_FILE, Shard
from tasks.diffusion.sampling.job import SamplingJob, sample_in_batches


def main(argv: list[str]) -> None:
    """Sample a shard's images; each is written to a temporary name and renamed."""
    shard = Shard.model_validate_json(Path(argv[0]).read_text(encoding="utf-8"))
    out = Path(shard.folder)
    job = SamplingJob.model_validate_json((out / JOB_FILE).read_text(encoding="utf-8"))
    # Strided, so that devices get equal shares.
    positions = range(shard.rank, len(job.requests), shard.num_processes)
    for position, picture in sample_in_batches(job.load(), job, positions):
        # The parent polls for the final name, so a file of that name must be complete.
        staged = out / f".{position}.png"
        picture.save(staged, format="PNG")
        os.replace(staged, out / f"{position}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
