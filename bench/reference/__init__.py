"""The phases in PyTorch, each in one file phase<N>.py, written from the papers and independent of mlx_transformer.

Such a file exports `Model` (made from a configuration; `load`, `by_our_path`), `rules`, `Training`, `Decoder` and, if
it has some, `BRANCHES` (name -> another Model). This module has the workers that bench/workers/worker.py drives;
train.py makes a whole run.
"""

import importlib
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn


def find(phase: int, branch: str | None = None) -> tuple[ModuleType, type[nn.Module]]:
    """Return the module of a phase, and its Model or that of a branch. Raises ValueError if there is none."""
    name = f"{__name__}.phase{phase}"
    if find_spec(name) is None:
        raise ValueError(f"there is no bench/reference/phase{phase}.py")
    module = importlib.import_module(name)
    models = {None: module.Model, **getattr(module, "BRANCHES", {})}
    if branch not in models:
        raise ValueError(f"bench/reference/phase{phase}.py has no branch '{branch}'")
    return module, models[branch]


def make_model(
    phase: int, config: dict[str, Any], weights: str | Path, device: str, branch: str | None = None
) -> nn.Module:
    """Return the reference of a phase with the weights of an .npz file, named by MLX's parameter paths."""
    model = find(phase, branch)[1](**config)
    model.load(np.load(weights))  # type: ignore[operator]
    return model.to(device)


def make_training(
    phase: int,
    config: dict[str, Any],
    recipe: dict[str, Any],
    weights: str | Path,
    device: str,
    compiled: bool,
    branch: str | None = None,
) -> Any:
    """Return the phase's Training of such a model."""
    module, model = find(phase, branch)[0], make_model(phase, config, weights, device, branch)
    return module.Training(model.train(), **module.rules(recipe), compiled=compiled)


def facts(device: str, threads: int) -> dict[str, Any]:
    """Set the threads, and describe what the speed depends on."""
    torch.set_num_threads(threads)
    lines = [line.strip() for line in torch.__config__.parallel_info().splitlines() if line.strip()]
    return {
        "torch": torch.__version__,
        "device": device,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "parallel_info": lines,
    }


def synchronize(device: str) -> None:
    """Wait until the device has computed everything."""
    if device != "cpu":
        getattr(torch, device).synchronize()


def device_memory(device: str) -> int | None:
    """Return bytes allocated on a GPU: the peak with CUDA, the present with Metal. None on a CPU."""
    held = {"cuda": torch.cuda.max_memory_allocated, "mps": torch.mps.driver_allocated_memory}
    return held[device]() if device in held else None


class TrainingRounds:
    """A training run of the reference over stored batches, some steps at a time."""

    def __init__(
        self,
        *,
        phase: int,
        config: dict[str, Any],
        recipe: dict[str, Any],
        weights: str,
        batches: str,
        device: str,
        threads: int,
        compiled: bool,
        branch: str | None = None,
    ) -> None:
        self.device, self.threads = device, threads
        self.training = make_training(phase, config, recipe, weights, device, compiled, branch)
        self.batches, self.done = np.load(batches), 0
        self.training.prepare(self.batches)

    def facts(self) -> dict[str, Any]:
        """Describe the runtime."""
        return facts(self.device, self.threads)

    def round(self, steps: int) -> dict[str, Any]:
        """Train so many steps; returns their losses."""
        losses = []
        for _ in range(steps):
            losses.append(self.training.step(self.batches[self.done % len(self.batches)]))
            self.done += 1
        synchronize(self.device)
        memory = device_memory(self.device)
        return {"losses": losses} | ({} if memory is None else {"memory_bytes": memory})


class DecodingRounds:
    """Greedy decoding of the same prompts by the reference."""

    def __init__(
        self,
        *,
        phase: int,
        config: dict[str, Any],
        weights: str,
        prompts: list[list[int]],
        device: str,
        threads: int,
        compiled: bool,
    ) -> None:
        self.device, self.threads = device, threads
        self.decode = find(phase)[0].Decoder(make_model(phase, config, weights, device), compiled=compiled)
        self.prompts = torch.tensor(prompts, device=device)

    def facts(self) -> dict[str, Any]:
        """Describe the runtime."""
        return facts(self.device, self.threads)

    def round(self, count: int) -> dict[str, Any]:
        """Decode the next tokens (B, count) of every prompt."""
        return {"tokens": self.decode(self.prompts, count).tolist()}
