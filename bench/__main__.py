"""The command line of the bench: `python -m bench TOOL ...`; without a tool it lists them all."""

import sys

from mlx_transformer.run.commands import dispatch
from mlx_transformer.utils.errors import exit_cleanly

TOOLS = {  # name -> module:function, and what the tool answers
    "compare": (
        "bench.compare.command:main",
        "variants against each other and PyTorch: throughput, time to a target loss",
    ),
    "report": (
        "bench.report.report:main",
        "RESULTS.md, docs/results/ and the generated parts of README and docs, from the published logs",
    ),
    "recording": ("bench.report.recording:main", "a terminal recording of a run, as a cast and a GIF"),
    "step": ("bench.tools.step:main", "throughput of a training step, against PyTorch or by the number of ranks"),
    "decode": ("bench.tools.decode:main", "throughput of greedy decoding, against PyTorch and transformers"),
    "memory": ("bench.tools.memory:main", "peak memory of a training step"),
    "footprint": ("bench.tools.footprint:main", "memory of a training step and of decoding, by variant"),
    "tasks": ("bench.tools.tasks:main", "accuracy on tasks with exact scores over training, by variant"),
    "growth": ("bench.tools.growth:main", "experts and depth grown from a smaller run, against training from scratch"),
    "distributed": ("bench.tools.distributed:main", "training over ranks: memory of each, and what a killed run loses"),
    "sweep": ("bench.tools.sweep:main", "throughput and memory over batch size, sequence length, width and variants"),
    "tune": ("bench.tools.tune:main", "the best learning rate of a phase"),
    "length": (
        "bench.tools.length:main",
        "loss on sequences longer than those trained on; `length cost`: time and memory",
    ),
    "precision": ("bench.tools.precision:main", "loss in float16 and bfloat16 against float32"),
    "averages": ("bench.tools.averages:main", "averages of the weights, compared in the same runs"),
    "fables": ("bench.tools.fables:main", "distance to the entropy of the built-in corpus, by phase"),
    "baselines": ("bench.tools.baselines:main", "loss of n-gram models on the same tokens"),
    "record_check": ("bench.record_check:main", "whether a comparison is a new record of the speed run"),
    "stopping": ("bench.tools.stopping:main", "early-stopping rules replayed on finished runs"),
    "schedules": ("bench.tools.schedules:main", "plot of the learning-rate schedules"),
    "machine": ("bench.tools.machine:main", "a report on this machine: GPU against CPU, resuming, throughput"),
    "roofline": ("bench.tools.roofline:main", "predicted throughput on Apple GPUs"),
    "scaling": ("bench.tools.scaling:main", "predicted throughput on 1 to 64 machines"),
}


def main() -> None:
    """Run a tool; without one, list them. Also the console script `mlx-bench`."""
    exit_cleanly(lambda: dispatch(TOOLS, "python -m bench", sys.argv[1:] or ["--help"]))


if __name__ == "__main__":
    main()
