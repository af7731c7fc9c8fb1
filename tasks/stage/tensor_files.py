"""Safetensors files that exist whole or not at all."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.stage.files import staged_file

if TYPE_CHECKING:
    from torch import Tensor

HEADER_BYTES = 256  # per tensor, at most: its name, shape and offsets


def save_tensors(tensors: Mapping[str, "Tensor"], path: Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, in one step.

    Raises:
        StorageFull: there is no room; names the path and the needed size.

    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    size_bytes = sum(tensor.nbytes + HEADER_BYTES for tensor in tensors.values())
    with staged_file(path, size_bytes=size_bytes) as staged:
        try:
            save_file(dict(tensors), staged, metadata=dict(metadata) if metadata else None)
        except SafetensorError as error:
            # The library words the system's error, whose number it ends with, instead of raising it.
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
