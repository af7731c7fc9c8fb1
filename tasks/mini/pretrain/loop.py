"""A resumable training loop with EMA weights, for the mini models.

Batches are drawn from (seed, step), so a resumed run takes the same steps as an uninterrupted one.
"""

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SAVE_EVERY_SECONDS = 120.0


class PretrainLoop:
    """Trains one module up to a step count, saving weights, EMA weights and optimizer state every two minutes."""

    def __init__(  # noqa: PLR0913 - hyper-parameters
        self,
        module: nn.Module,
        *,
        folder: Path,
        num_steps: int,
        learning_rate: float,
        ema_decay: float = 0.999,
        weight_decay: float = 0.01,
        device: torch.device,
    ) -> None:
        self.module = module.to(device)
        self.folder = folder
        self.num_steps = num_steps
        self.learning_rate = learning_rate
        self.ema_decay = ema_decay
        self.device = device
        self.parameters = dict(module.named_parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=learning_rate, weight_decay=weight_decay, fused=True
        )
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.step = 0

    @property
    def state_path(self) -> Path:
        """The file of this part's state."""
        return self.folder / "state.safetensors"

    def load(self) -> None:
        """Resume from the saved state, if there is one."""
        if not self.state_path.exists():
            return
        # On the device, `step` included: the fused kernel needs it beside the parameters.
        state = load_file(self.state_path, device=str(self.device))
        self.step = int(state["step"].item())
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state[f"model.{name}"])
                self.ema[name].copy_(state[f"ema.{name}"])
                if self.step:  # at step 0 the optimizer has no state
                    self.optimizer.state[parameter] = {
                        key: state[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")
                    }

    def save(self) -> None:
        """Write the state to a temporary file, then rename it over the previous one."""
        tensors: dict[str, Tensor] = {"step": torch.tensor(self.step)}
        for name, parameter in self.parameters.items():
            tensors[f"model.{name}"] = parameter.detach()
            tensors[f"ema.{name}"] = self.ema[name]
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{key}.{name}"] = value
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.state_path.with_suffix(".part")
        # safetensors rejects tensors that share memory or are not contiguous.
        save_file({k: v.contiguous().clone() for k, v in tensors.items()}, part)
        os.replace(part, self.state_path)  # atomic: an interruption keeps the previous state

    def run(self, compute_loss: Callable[[int], Tensor]) -> nn.Module:
        """Train to the last step and return the module with EMA weights; `compute_loss` takes the step."""
        self.load()
        self.module.train()
        log = self.folder.with_suffix(".jsonl")
        saved = started = time.monotonic()
        first, losses = self.step, []
        while self.step < self.num_steps:
            self.set_learning_rate()
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = compute_loss(self.step)
            self.optimizer.zero_grad(set_to_none=True)
            # Backward outside autocast: each op runs in the dtype that autocast chose for its forward.
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
            self.optimizer.step()
            self.step += 1
            self.update_ema()
            losses.append(loss.detach())  # read below, every 50 steps: `item` waits for the GPU
            if self.step % 50 == 0 or self.step == self.num_steps:
                seconds = (time.monotonic() - started) / (self.step - first)
                row = {
                    "step": self.step,
                    "loss": round(torch.stack(losses).mean().item(), 5),
                    "seconds_per_step": round(seconds, 3),
                }
                losses.clear()
                with log.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(self.folder.name, *(f"{k}={v}" for k, v in row.items()), flush=True)
            if time.monotonic() - saved > SAVE_EVERY_SECONDS or self.step == self.num_steps:
                self.save()
                saved = time.monotonic()
        return self.ema_module()

    def set_learning_rate(self) -> None:
        """Warm up over 100 steps, then decay along a cosine to 5 % of the peak."""
        progress = self.step / max(1, self.num_steps)
        cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))
        rate = self.learning_rate * min(1.0, (self.step + 1) / 100) * cosine
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    @torch.no_grad()
    def update_ema(self) -> None:
        """Update the EMA weights; the decay warms up, so that they soon forget the initialization."""
        decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
        averages = list(self.ema.values())
        # ema <- decay * ema + (1 - decay) * p, one call for all
        torch._foreach_lerp_(averages, list(self.parameters.values()), 1 - decay)

    @torch.no_grad()
    def ema_module(self) -> nn.Module:
        """Return the module with EMA weights, in eval mode and frozen; the saved state keeps the trained weights."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.ema[name])
        return self.module.eval().requires_grad_(False)
