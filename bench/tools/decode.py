"""Throughput of greedy decoding, MLX against PyTorch, measured interleaved in one run.

`python -m bench decode --size base --batch-size 1,16 --new-tokens 128 --out FILE.json`. Workers:

    mlx              our decoder: cached, compiled
    mlx-uncached     our model over all tokens so far for each new one, uncompiled, since every length is another graph
    torch            the PyTorch reference with a preallocated cache and the allocator settings of MLX's worker
    torch-compile    the same with its step of one token compiled
    transformers     Hugging Face's `generate` with its cache and those allocator settings, on the exported model;
                     only if named, for the phases that can be exported

A round is one decoding with its prefill; all workers must generate the same tokens.
"""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from bench import logfile
from bench.options import read_names, read_numbers
from bench.workers.interleave import Ratio, interleave, speed_ratio
from bench.workers.machine import check_torch, describe_machine, threads, torch_device
from bench.workers.process import ALLOCATOR, UNTOUCHED, Worker, environment, started
from bench.workers.training_step import check_tokens, save_weights
from mlx_transformer.backend import use_device
from mlx_transformer.data.tokenizers import HFTokenizer
from mlx_transformer.nn.config import SIZES, Config, choose_size
from mlx_transformer.nn.model import Model
from mlx_transformer.run.commands.interop import export_model
from mlx_transformer.run.flags import Device, File, Seed, Size, Text, WholeNumber, parse
from mlx_transformer.run.ladder import find_phase
from mlx_transformer.run.saved import save_model
from mlx_transformer.utils.errors import BadInput, RunFailed
from mlx_transformer.utils.terminal import Terminal

AGAINST = ("torch", "torch-compile", "mlx-uncached", "transformers")
WARM_UP = 2  # decodings
_TOKENIZER = b'{"model": {"type": "BPE", "vocab": {"</s>": 0}, "merges": []}}'  # required, not used


@dataclass
class Flags:
    """Measure the throughput of greedy decoding, interleaved with PyTorch's."""

    phase: WholeNumber = None
    """phase of the ladder (default: 1)"""
    size: Size = None
    """nano, small or base (default: small on a CPU, base on a GPU)"""
    batch_size: Text = None
    """prompts at a time; several numbers with commas (default: 1,16)"""
    prompt_tokens: WholeNumber = None
    """tokens of a prompt (default: 16)"""
    new_tokens: WholeNumber = None
    """tokens to generate (default: 128)"""
    rounds: WholeNumber = None
    """rounds of every worker (default: 8)"""
    against: Text = None
    """torch, torch-compile, mlx-uncached, transformers, with commas (default: the first three)"""
    seed: Seed = None
    """seed of weights and prompts (default: 0)"""
    device: Device = None
    """where to compute (default: auto)"""
    out: File = None
    """write everything that was measured to this JSON file"""


@dataclass(frozen=True)
class Task:
    """The decoding that every worker computes."""

    phase: int
    size: str
    config: Config
    prompt_tokens: int
    new_tokens: int
    seed: int
    device: str

    @classmethod
    def read(cls, flags: Flags) -> "Task":
        """Read the flags. Raises BadInput for an unknown phase."""
        device = flags.device or "auto"
        use_device(device)
        size = choose_size(flags.size)
        prompt, new = flags.prompt_tokens or 16, flags.new_tokens or 128
        config = find_phase(flags.phase or 1).Config(**{**SIZES[size], "seq_len": prompt + new, "dropout": 0.0})
        return cls(flags.phase or 1, size, config, prompt, new, flags.seed or 0, device)

    def prompts(self, batch: int) -> list[list[int]]:
        """Draw random tokens (batch, prompt_tokens)."""
        draw = np.random.default_rng(self.seed)
        return draw.integers(0, self.config.vocab_size, (batch, self.prompt_tokens)).tolist()


def make_workers(task: Task, batch: int, against: list[str], folder: Path) -> list[Worker]:
    """Return mlx and the others."""
    model = find_phase(task.phase).Model(task.config, task.seed)
    save_weights(folder / "weights.npz", model)
    if "transformers" in against:
        export(task.phase, model, folder)
    shared = {"phase": task.phase, "config": task.config.to_dict(), "prompts": task.prompts(batch)}

    def worker(name: str) -> Worker:
        if name.startswith("mlx"):
            own = {"seed": task.seed, "cached": name == "mlx", "device": task.device}
            return Worker(
                name=name,
                target="bench.workers.mlx_worker:DecodingRounds",
                settings=shared | own,
                environment=environment(),
            )
        own = {"device": torch_device(), "threads": threads()}
        if name == "transformers":
            target = "bench.reference.hugging_face:DecodingRounds"
            settings = own | {"folder": str(folder / "hf"), "prompts": shared["prompts"]}
        else:
            target = "bench.reference:DecodingRounds"
            settings = shared | own | {"weights": str(folder / "weights.npz"), "compiled": name == "torch-compile"}
        theirs = environment(**UNTOUCHED, **ALLOCATOR)
        return Worker(name=name, target=target, settings=settings, environment=theirs)

    return [worker(name) for name in ("mlx", *against)]


def export(phase: int, model: Model, folder: Path) -> None:
    """Write folder/hf for from_pretrained. Raises BadInput for a phase that cannot be exported."""
    save_model(folder / "run", model, HFTokenizer(_TOKENIZER), phase, branch=None)
    export_model(folder / "run", folder / "hf")


def check_transformers() -> None:
    """Raise BadInput if transformers or PyTorch is missing."""
    check_torch()
    if find_spec("transformers") is None:
        raise BadInput("transformers is not installed: pip install transformers")


def check_tokens_agree(answers: dict[str, list[dict[str, Any]]]) -> None:
    """Raise RunFailed if a decoding generated other tokens than mlx's first."""
    expected = answers["mlx"][0]["tokens"]
    for name, own in answers.items():
        if any(answer["tokens"] != expected for answer in own):
            raise RunFailed(
                f"{name} and mlx generated different tokens: no comparison; if two were equally likely up to rounding, "
                "another --seed avoids it"
            )


def compare(task: Task, batch: int, against: list[str], count: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure one batch size; its part of the log."""
    with (
        tempfile.TemporaryDirectory() as folder,
        started(make_workers(task, batch, against, Path(folder))) as workers,
    ):
        request = {"count": task.new_tokens}
        warm = {name: [worker.ask(**request) for _ in range(WARM_UP)] for name, worker in workers.items()}
        check_tokens_agree(warm)
        say(f"batch {batch}: all generate the same {batch * task.new_tokens} tokens")
        answers = interleave(workers, count, dict.fromkeys(workers, request), say)
        check_tokens_agree({name: warm[name] + answers[name] for name in answers})
        facts = {name: worker.describe() for name, worker in workers.items()}
    seconds = {name: [answer["seconds"] for answer in own] for name, own in answers.items()}
    found = {
        name: {
            "tokens_per_second": batch * task.new_tokens / float(np.median(seconds[name])),
            "seconds": seconds[name],
            "warm_up_seconds": [answer["seconds"] for answer in warm[name]],
            "facts": facts[name],
        }
        for name in answers
    }
    ratios = [asdict(speed_ratio("mlx", name, seconds)) for name in against]
    return {"batch": batch, "workers": found, "ratios": ratios}


def show(log: dict[str, Any]) -> Table:
    """Return a table for people."""
    title = f"phase {log['phase']}, {log['size']}: {log['new_tokens']} tokens after {log['prompt_tokens']}"
    heads = ("batch", "worker", "tokens/s", "speedup of mlx (95 %)")
    table = Table(*heads, title=title, caption=log["machine"]["device"])
    for part in log["batches"]:
        ratios = {one["b"]: str(Ratio(**one)) for one in part["ratios"]}
        for name, one in part["workers"].items():
            table.add_row(str(part["batch"]), name, f"{one['tokens_per_second']:,.0f}", ratios.get(name, ""))
    return table


def main(prog: str = "python -m bench decode", args: list[str] | None = None) -> None:
    """Run the command line."""
    flags = parse(Flags, prog, args=args)
    batches = read_numbers("--batch-size", "1,16" if flags.batch_size is None else flags.batch_size)
    against = read_names("--against", flags.against, AGAINST, AGAINST[:3])
    task = Task.read(flags)
    check_tokens(max(batches), task.config.seq_len)
    if any(name.startswith("torch") for name in against):
        check_torch(task.phase)
    if "transformers" in against:
        check_transformers()
    logfile.check_out(flags.out)
    terminal = Terminal(width=120)
    count = flags.rounds or 8
    log: dict[str, Any] = {"schema_version": 2, "measures": "decode", "machine": describe_machine(), "warm_up": WARM_UP}
    log |= {name: getattr(task, name) for name in ("phase", "size", "prompt_tokens", "new_tokens", "seed")}
    log |= {"config": task.config.to_dict(), "rounds": count}
    log["batches"] = [compare(task, batch, against, count, terminal.print) for batch in batches]
    logfile.write_log(flags.out, log)
    terminal.print(show(log))
