"""Compute the table by which `likeness estimate` answers for presets: python -m tests.bench.memory_table."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import get_args

from conf.compose import compile_request
from conf.overrides import parse_overrides
from tasks.diffusion.hub import find_config_folder
from tasks.training.config import TrainingConfig
from tasks.training.memory.estimate import estimate_methods
from tasks.training.memory.table import TABLE, describe_table_key


def main(presets: Sequence[str]) -> None:
    """Write the table for presets."""
    methods: tuple[str, ...] = get_args(TrainingConfig.model_fields["method"].annotation)
    rows = {}
    for preset in presets:
        words = [f"diffusion={preset}", "subject.source=x", "subject.class_noun=thing"]
        config = compile_request(parse_overrides([*words, *([] if preset == "mini" else ["llm=openai"])]))
        plain = config.training.model_copy(update={"train_batch_size": 1, "prior_loss_weight": 1.0})
        found = estimate_methods(find_config_folder(config.diffusion), config.diffusion, plain, methods=methods)
        key = describe_table_key(config.diffusion, config.training)
        rows[key] = {method: asdict(estimate) for method, estimate in found.items()}
    TABLE.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:] or ("mini", "sd15", "sd21", "sdxl", "sd35-medium", "flux-dev"))
