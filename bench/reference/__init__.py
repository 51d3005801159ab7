"""The phases in PyTorch, each in one file phase<N>.py, written from the papers and independent of mlx_transformer.

Such a file exports `Model` (numbers of a config by name; `load`, `by_our_path`), `rules`, `Training` and `Decoder`.
What stands here drives any of them for the bench, as `bench.child` asks for it.
"""

import importlib
from typing import Any

import numpy as np
import torch
from torch import nn


def make_model(phase: int, config: dict[str, Any], weights: str, device: str) -> nn.Module:
    """The reference of a phase with the weights of an .npz file, which are named by our paths."""
    model: nn.Module = importlib.import_module(f"bench.reference.phase{phase}").Model(**config)
    model.load(np.load(weights))  # type: ignore[operator]
    return model.to(device)


def facts(device: str, threads: int) -> dict[str, Any]:
    """Set the threads; what a speed depends on."""
    torch.set_num_threads(threads)
    lines = [line.strip() for line in torch.__config__.parallel_info().splitlines() if line.strip()]
    return {
        "torch": torch.__version__,
        "device": device,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "parallel_info": lines,
    }


def synchronise(device: str) -> None:
    """Wait until the device has computed everything."""
    if device != "cpu":
        getattr(torch, device).synchronize()


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
    ) -> None:
        self.device, self.threads = device, threads
        module = importlib.import_module(f"bench.reference.phase{phase}")
        model = make_model(phase, config, weights, device).train()
        self.training = module.Training(model, **module.rules(recipe), compiled=compiled)
        self.batches, self.done = np.load(batches), 0

    def facts(self) -> dict[str, Any]:
        return facts(self.device, self.threads)

    def round(self, steps: int) -> dict[str, Any]:
        """Train so many steps; their losses."""
        losses = []
        for _ in range(steps):
            losses.append(self.training.step(self.batches[self.done % len(self.batches)]))
            self.done += 1
        synchronise(self.device)
        return {"losses": losses}


class DecodingRounds:
    """Greedy decoding by the reference, the same prompts each time."""

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
        module = importlib.import_module(f"bench.reference.phase{phase}")
        self.decode = module.Decoder(make_model(phase, config, weights, device), compiled=compiled)
        self.prompts = torch.tensor(prompts, device=device)

    def facts(self) -> dict[str, Any]:
        return facts(self.device, self.threads)

    def round(self, count: int) -> dict[str, Any]:
        """The next pieces of every prompt."""
        return {"pieces": self.decode(self.prompts, count).tolist()}
