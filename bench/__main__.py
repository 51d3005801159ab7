"""The command line of the bench: `python -m bench TOOL ...`; without a tool it lists them all."""

import importlib
import sys

from mlx_transformer.utils.errors import BadInput, exit_cleanly

TOOLS = {  # name -> module with a main(), and what the tool answers
    "compare": ("bench.compare.command", "variants against each other and PyTorch: throughput, time to a target loss"),
    "report": ("bench.report.report", "RESULTS.md from the published logs"),
    "step": ("bench.tools.step", "throughput of a training step, against PyTorch"),
    "decode": ("bench.tools.decode", "throughput of greedy decoding, against PyTorch and transformers"),
    "memory": ("bench.tools.memory", "peak memory of a training step"),
    "sweep": ("bench.tools.sweep", "throughput and memory over batch size, sequence length, width and variants"),
    "tune": ("bench.tools.tune", "the best learning rate of a phase"),
    "length": ("bench.tools.length", "loss on sequences longer than those trained on"),
    "precision": ("bench.tools.precision", "loss in float16 and bfloat16 against float32"),
    "fables": ("bench.tools.fables", "distance to the entropy of the built-in corpus, by phase"),
    "baselines": ("bench.tools.baselines", "loss of n-gram models on the same tokens"),
    "stopping": ("bench.tools.stopping", "early-stopping rules replayed on finished runs"),
    "schedules": ("bench.tools.schedules", "plot of the learning-rate schedules"),
    "machine": ("bench.tools.machine", "a report on this machine: GPU against CPU, resuming, throughput"),
    "roofline": ("bench.tools.roofline", "predicted throughput on Apple GPUs"),
}


def run_tool() -> None:
    """Run the tool that the command line names. Raises BadInput for an unknown one."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print("usage: python -m bench TOOL [-h] ...\n")
        for tool, (_, purpose) in TOOLS.items():
            print(f"  {tool:<12} {purpose}")
        return
    if name not in TOOLS:
        raise BadInput(f"{name!r} is no tool: expected one of {', '.join(TOOLS)}")
    sys.argv[1:] = arguments
    importlib.import_module(TOOLS[name][0]).main()


def main() -> None:
    """Run the console script `mlx-bench`."""
    exit_cleanly(run_tool)


if __name__ == "__main__":
    main()
