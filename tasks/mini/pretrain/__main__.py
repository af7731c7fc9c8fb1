"""Rebuild the mini models: python -m tasks.mini.pretrain --help."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import torch

from tasks.mini.pretrain import train
from tasks.mini.pretrain.export import export_models


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m tasks.mini.pretrain", description=train.__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/mini"))
    parser.add_argument("--out", type=Path, default=Path("tasks/mini/weights"))
    parser.add_argument("--parts", nargs="+", choices=train.PARTS, default=list(train.PARTS))
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    trainer = train.Pretrainer(options.work, device)
    actions: dict[str, Callable[[], object]] = {
        "classifier": trainer.classifier,
        "clip": trainer.clip,
        "dino": trainer.dino,
        "vae": trainer.vae,
        "unet": trainer.unet,
        "clip_vision": trainer.clip_vision,
        "vae_decoder": trainer.vae_decoder,
        "export": lambda: export_models(trainer, options.out),
    }
    for part in options.parts:
        actions[part]()


if __name__ == "__main__":
    main()
