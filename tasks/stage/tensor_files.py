"""Atomic writes of safetensors files."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.stage.files import explain_full_disk, staged_file

if TYPE_CHECKING:
    from torch import Tensor

HEADER_BYTES = 256  # per tensor, at most: its name, shape and offsets


def save_tensors(tensors: Mapping[str, "Tensor"], path: Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, in one step; equal tensors and metadata make equal files.

    Raises:
        StorageFull: there is no room; names the path and the needed size.

    """
    from safetensors.torch import save_file

    size_bytes = count_bytes(tensors)
    with staged_file(path, size_bytes=size_bytes) as staged, explain_full_tensors(path, size_bytes=size_bytes):
        save_file(dict(tensors), staged, metadata=dict(metadata) if metadata else None)
        if metadata:
            sort_metadata(staged)


def sort_metadata(path: Path) -> None:
    """Sort the metadata in a file's header: the library writes it in a random order, that of a Rust hash map."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > size:  # the offsets of the tensors count from the header's end
            raise ValueError(f"{path}: the sorted header is longer than the library's")
        file.seek(8)
        file.write(text.ljust(size))


def count_bytes(tensors: Mapping[str, "Tensor"]) -> int:
    """Return an upper estimate of a safetensors file's size in bytes."""
    return sum(tensor.nbytes + HEADER_BYTES for tensor in tensors.values())


@contextmanager
def explain_full_tensors(path: Path, *, size_bytes: int) -> Iterator[None]:
    """Map a full disk to StorageFull, also where safetensors reports it.

    The library raises SafetensorError, with the errno only in its message, instead of OSError.
    """
    from safetensors import SafetensorError

    with explain_full_disk(path, size_bytes=size_bytes):
        try:
            yield
        except SafetensorError as error:
            # Rust formats I/O errors as `No space left on device (os error 28)`.
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
