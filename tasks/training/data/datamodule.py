"""The Lightning data module: sample indices become batches on the device."""

from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from tasks.diffusion.adapter import DiffusionModel
from tasks.training.data.batches import BatchFactory, StepBatch
from tasks.training.process.worker_spec import TrainingSpec


class DreamBoothDataModule(pl.LightningDataModule):
    """Yields the micro-batches from a given optimizer step on."""

    batches: BatchFactory

    def __init__(self, model: DiffusionModel, spec: TrainingSpec, *, start_step: int = 0) -> None:
        super().__init__()
        self.model = model
        self.spec = spec
        self.start_step = start_step

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Encode images and prompts, and return a loader of this rank's sample indices.

        Not in `setup`, which Lightning calls before the module's hooks: it calls this one after them.
        """
        trainer = self.trainer
        assert trainer is not None
        self.batches = self.make_batches()
        indices = SampleIndices(
            self.spec, start_step=self.start_step, rank=trainer.global_rank, world_size=trainer.world_size
        )
        # The dataset yields whole batches of indices; without workers, batches are built in this process.
        return DataLoader(indices, batch_size=None)

    def make_batches(self) -> BatchFactory:
        """Return the batch factory, and move the VAE to the CPU once all images are encoded."""
        batches = BatchFactory(self.model, self.spec)
        self.model.vae.cpu()
        return batches

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> StepBatch:
        """Turn sample indices into batches on the device."""
        # Batches are built in this hook since it knows the device; the loader yields indices only.
        indices = batch.tolist()
        return StepBatch(indices, self.batches.make(indices, device))


class SampleIndices(IterableDataset[Tensor]):
    """Yields the global sample indices of one rank's batches, from a given optimizer step on."""

    def __init__(self, spec: TrainingSpec, *, start_step: int, rank: int, world_size: int) -> None:
        super().__init__()
        self.batch_size = spec.training.train_batch_size
        # Micro-batch m of step s on rank r starts at sample ((s * accumulation + m) * world_size + r) * batch_size:
        # the samples of a step don't change when the batch is halved and the accumulation doubled.
        self.stride = world_size * self.batch_size
        self.start = start_step * spec.training.gradient_accumulation_steps * self.stride
        self.offset = rank * self.batch_size

    def __iter__(self) -> Iterator[Tensor]:
        first = self.start + self.offset
        while True:
            yield torch.arange(first, first + self.batch_size)
            first += self.stride
