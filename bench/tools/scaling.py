"""Predicted throughput of data-parallel training on 1 to 64 machines; nothing is measured.

`python -m bench scaling --phase 5 --size base --bandwidth thunderbolt,ethernet` predicts a step from three numbers:

    compute    the seconds of a step on one machine with b sequences, fixed + b * per sequence: of a measured log
               (`bench step --ranks`), or predicted for a chip (`bench roofline`)
    bytes      of the gradients, in the messages that training sends them in
    network    bandwidth and latency of the ring: a message of n bytes takes each of N machines
               2 (N - 1) / N * n / bandwidth + 2 (N - 1) * latency

A message leaves when the backward pass, the last two thirds of the compute, has its gradients, and when the message
before it has arrived. What ends after the backward pass delays the step. The slower prediction has no overlap at all.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from bench.compare.plots import COLORS, MUTED, RULE, STYLE, Plot
from bench.logfile import check_json, check_out, write_log
from bench.tools import roofline
from bench.workers.machine import shown_bytes
from mlx_transformer.run.flags import Extent, File, Size, Text, WholeNumber, parse
from mlx_transformer.run.ladder import find_branch, find_phase
from mlx_transformer.run.plots import drawing
from mlx_transformer.train.parallel import buckets
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.terminal import Terminal
from mlx_transformer.utils.trees import by_path

TCP = 300e-6  # s, between two Macs: several reports around Apple's TN3205; exo issue 2295 has 0.4-0.9 ms there and back
MACHINES = (1, 2, 4, 8, 16, 32, 64)
BACKWARD = 2 / 3  # of a step's compute: a backward pass has twice the FLOPs of a forward pass


@dataclass(frozen=True)
class Link:
    """The network between neighbours in a ring. bandwidth: bytes per second of an all-reduce, as defined above."""

    name: str
    bandwidth: float
    latency: float  # s, of one of the 2 (N - 1) steps of a message
    source: str


LINKS = {
    link.name: link
    for link in (
        Link("jaccl", 3.6e9, 50e-6, "RDMA, Thunderbolt 5: 3.5-3.8 GB/s in mlx issue 3207; latency: Apple's TN3205"),
        Link("thunderbolt", 5e9, TCP, "one cable of 40 Gb/s (mlx pull request 1784: 11 GB/s with more); TCP latency"),
        Link("ethernet", 2.3e9, TCP, "10 Gb/s in both directions: mlx pull request 1784; TCP latency"),
        Link("gigabit", 0.23e9, TCP, "a tenth of ethernet's; TCP latency"),
    )
}


@dataclass(frozen=True)
class Compute:
    """Seconds of a step on one machine: fixed + per_sequence * sequences."""

    fixed: float
    per_sequence: float
    source: str

    @classmethod
    def through(cls, few: tuple[float, float], many: tuple[float, float], source: str) -> "Compute":
        """Return the line through two points (sequences, seconds)."""
        slope = (many[1] - few[1]) / (many[0] - few[0])
        return cls(max(0.0, many[1] - slope * many[0]), slope, source)

    def seconds(self, sequences: float) -> float:
        return self.fixed + self.per_sequence * sequences


@dataclass(frozen=True)
class Job:
    """What is trained. messages: bytes of each all-reduce, in the order in which they leave."""

    name: str
    batch_size: int
    seq_len: int
    messages: tuple[int, ...]
    compute: Compute


@dataclass(frozen=True)
class Step:
    """A predicted step. exchange: seconds of all messages by themselves; exposed: by how much they delay the step."""

    machines: int
    sequences: float  # of each machine
    compute: float
    exchange: float
    exposed: float

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed

    @property
    def slowest(self) -> float:
        """The seconds without overlap."""
        return self.compute + self.exchange


def all_reduce(nbytes: float, link: Link, machines: int) -> float:
    """Return the seconds of a message in a ring."""
    steps = 2 * (machines - 1)
    return steps / machines * nbytes / link.bandwidth + steps * link.latency


def predict(job: Job, link: Link, machines: int, sequences: float) -> Step:
    """Predict a step of so many sequences on each machine."""
    compute, total = job.compute.seconds(sequences), sum(job.messages)
    ready, end, exchange = (1 - BACKWARD) * compute, 0.0, 0.0
    for nbytes in job.messages:
        ready += BACKWARD * compute * nbytes / total
        spent = all_reduce(nbytes, link, machines)
        end, exchange = max(end, ready) + spent, exchange + spent
    return Step(machines, sequences, compute, exchange, max(0.0, end - compute))


def curve(job: Job, link: Link, *, same_batch: bool) -> list[Step]:
    """Predict the numbers of machines that divide the batch; same_batch: it is divided, else each machine has one."""
    counts = [n for n in MACHINES if not same_batch or job.batch_size % n == 0]
    return [predict(job, link, n, job.batch_size / n if same_batch else job.batch_size) for n in counts]


def speedup(job: Job, step: Step, *, overlap: bool = True) -> float:
    """Return tokens per second relative to one machine."""
    seconds = step.seconds if overlap else step.slowest
    return step.machines * step.sequences / seconds / (job.batch_size / job.compute.seconds(job.batch_size))


# Inputs


@dataclass
class Flags:
    """Predict the scaling of data-parallel training to 64 machines; nothing is measured."""

    log: File = None
    """log of `bench step --ranks`, with the measured step of this machine"""
    chip: Text = None
    """without --log: a chip of `bench roofline`, whose step is predicted too (default: m4-max)"""
    phase: WholeNumber = None
    """without --log: phase of the ladder (default: 5)"""
    branch: Text = None
    """branch of the phase"""
    size: Size = None
    """nano, small or base (default: base)"""
    batch_size: Extent = None
    """sequences of a step (default: the recipe's)"""
    seq_len: Extent = None
    """tokens of a sequence (default: by size)"""
    bandwidth: Text = None
    """jaccl, thunderbolt, ethernet, gigabit, or GB/s as a number, with commas (default: thunderbolt,ethernet)"""
    out: File = None
    """write the prediction to this JSON file, and its plot beside it"""


def read_links(text: str | None) -> list[Link]:
    """Read names or GB/s with commas. Raises BadInput."""
    links = []
    for word in (text or "thunderbolt,ethernet").split(","):
        name = word.strip()
        try:
            links.append(
                LINKS.get(name) or Link(f"{float(name):g} GB/s", float(name) * 1e9, TCP, "as given; TCP latency")
            )
            if not 0 < links[-1].bandwidth < 1e15:
                raise ValueError
        except ValueError:
            known = ", ".join(LINKS)
            raise BadInput(f"--bandwidth {name!r}: expected some of {known}, or GB/s above 0, with commas") from None
    return links


def messages_of(model: Any) -> tuple[int, ...]:
    """Return the bytes of the messages in which the gradients of a model travel."""
    sizes = {path: value.nbytes for path, value in by_path(model.trainable_parameters()).items()}
    return tuple(sum(sizes[path] for path in group) for group in buckets(sizes))


def measured(path: Path) -> Job:
    """Return the job of a log of `bench step --ranks`. Raises BadInput for another file."""
    try:
        log = json.loads(path.read_text(encoding="utf-8"))
        alone = [one for one in log["workers"].values() if one["ranks"] == 1]
        few, many = sorted((one["batch_size"], float(np.median(one["seconds_per_step"]))) for one in alone)
        kind = find_branch(find_phase(log["phase"]), log["branch"])
        config = kind.Config(**log["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"--log {path} is no log of bench step --ranks 1,N ({error!r})") from None
    name = f"phase {log['phase']}{'/' + log['branch'] if log['branch'] else ''}, {log['size']}"
    compute = Compute.through(few, many, f"measured on {log['machine']['device']}")
    return Job(name, log["batch_size"], config.seq_len, messages_of(kind(config)), compute)


def predicted(flags: Flags) -> Job:
    """Return a job whose compute is predicted for a chip, in the middle of its range. Raises BadInput."""
    chip = roofline.find_chip(flags.chip or "m4-max")
    if chip is None:
        raise BadInput(f"chip '{flags.chip}' is unknown: expected one of {', '.join(roofline.chips())}")
    phase, points = flags.phase or 5, []
    kind = find_branch(find_phase(phase), flags.branch)
    size = "base" if flags.size in (None, "auto") else flags.size
    config = kind.Config(**{**roofline.SIZES[size], **({"seq_len": flags.seq_len} if flags.seq_len else {})})
    whole = flags.batch_size or max(1, find_phase(phase).RECIPE.at(size).batch_tokens // config.seq_len)
    for batch in (max(1, whole // 8), max(2, whole)):
        own = roofline.Flags(phase=phase, branch=flags.branch, size=flags.size, seq_len=flags.seq_len, batch_size=batch)
        _, work = roofline.read_work(own)
        seconds = [sum(work.seconds(chip, efficiency).values()) for efficiency in roofline.EFFICIENCIES]
        points.append((batch, sum(seconds) / 2))
    name = f"phase {phase}{'/' + flags.branch if flags.branch else ''}, {size}"
    compute = Compute.through(points[0], points[1], f"predicted for {chip.describe()}")
    return Job(name, whole, config.seq_len, messages_of(kind(config)), compute)


# Outputs


def rows(job: Job, link: Link) -> list[list[str]]:
    """Return the table's cells: machines, then for the same batch and for a batch on each machine."""
    weak = {step.machines: step for step in curve(job, link, same_batch=False)}
    found = []
    for step in curve(job, link, same_batch=True):
        each = weak[step.machines]
        found.append(
            [
                str(step.machines),
                *(f"{1e3 * value:.1f}" for value in (step.compute, step.exchange, step.exposed)),
                f"{speedup(job, step, overlap=False):.1f}-{speedup(job, step):.1f}x",
                f"{speedup(job, each, overlap=False):.1f}-{speedup(job, each):.1f}x",
            ]
        )
    return found


HEADS = ("machines", "compute, ms", "exchange, ms", "of it exposed, ms", "speedup, same batch", "speedup, a batch each")


def arithmetic(job: Job, link: Link) -> str:
    """Return the arithmetic of the prediction, in lines."""
    step = predict(job, link, 2, job.batch_size / 2)
    batch, compute, size = job.batch_size, job.compute, shown_bytes(sum(job.messages))
    fixed, each = 1e3 * compute.fixed, 1e3 * compute.per_sequence
    return "\n".join(
        [
            f"predicted: {job.name}, batch {batch} x {job.seq_len}, over {link.name}",
            f"  compute: {fixed:.1f} ms + {each:.2f} ms per sequence, {compute.source}",
            f"  gradients: {size} in {len(job.messages)} messages",
            f"  network: {link.bandwidth / 1e9:g} GB/s, {1e6 * link.latency:.0f} us a step ({link.source})",
            f"  two machines: compute {fixed:.1f} + {batch // 2} x {each:.2f} = "
            f"{1e3 * step.compute:.1f} ms; exchange 2/2 x {size} / {link.bandwidth / 1e9:g} GB/s "
            f"+ {len(job.messages)} x 2 x {1e6 * link.latency:.0f} us = {1e3 * step.exchange:.1f} ms, "
            f"of which {1e3 * step.exposed:.1f} ms after the backward pass ({BACKWARD:.0%} of the compute)",
        ]
    )


def table(job: Job, link: Link) -> Table:
    """Return a table for people; the speedups are without and with overlap."""
    shown = Table(*HEADS, title=f"predicted over {link.name}: {job.name}, {job.compute.source}")
    for row in rows(job, link):
        shown.add_row(*row)
    return shown


def markdown(job: Job, link: Link) -> str:
    """Return the table as docs/distributed.md has it."""
    lines = [HEADS, ["---:"] * len(HEADS), *rows(job, link)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@drawing(STYLE)
def draw(job: Job, links: Sequence[Link], name: str) -> Plot:
    """Draw the speedup over the number of machines: with overlap a line, without it the lower end of a band."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(MACHINES, MACHINES, color=RULE, linestyle=":", label="ideal")
    for color, link in zip(COLORS[1:], links, strict=False):
        for same_batch, style in ((True, "-"), (False, "--")):
            steps = curve(job, link, same_batch=same_batch)
            xs = [step.machines for step in steps]
            best, worst = ([speedup(job, step, overlap=o) for step in steps] for o in (True, False))
            label = link.name if same_batch else None
            axes.plot(xs, best, color=color, linestyle=style, marker="o", markersize=3, label=label)
            axes.fill_between(xs, worst, best, color=color, alpha=0.15, linewidth=0)
    for label, style in (("same batch", "-"), ("a batch each", "--")):
        axes.plot([], [], color=MUTED, linestyle=style, label=label)
    axes.set(xscale="log", yscale="log", xlabel="machines", ylabel="speedup over one machine")
    axes.set_xticks(MACHINES, map(str, MACHINES))
    ticks = (0.25, 0.5, *MACHINES)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(color=RULE, linewidth=0.4)
    axes.legend(frameon=False, fontsize=7.5, loc="upper left", handlelength=3.5)
    compute = job.compute.source.partition(",")[0]
    axes.set_title(f"Predicted, not measured: {job.name},\nits compute {compute}", fontsize=8, color=MUTED)
    description = f"Predicted speedup of {job.name} over one machine, for 1 to 64 machines."
    return Plot(name=name, description=description, figure=figure)


def as_log(job: Job, links: Sequence[Link]) -> dict[str, Any]:
    """Return the prediction as JSON."""

    def described(steps: list[Step]) -> list[dict[str, Any]]:
        return [
            {**vars(step), "speedup": speedup(job, step), "speedup_without_overlap": speedup(job, step, overlap=False)}
            for step in steps
        ]

    return {
        "schema_version": 1,
        "predicts": "scaling",
        "job": {**vars(job), "compute": vars(job.compute)},
        "networks": [
            {
                **vars(link),
                "same_batch": described(curve(job, link, same_batch=True)),
                "batch_each": described(curve(job, link, same_batch=False)),
            }
            for link in links
        ],
    }


def job_of(log: dict[str, Any]) -> Job:
    """Return the job of a prediction's JSON."""
    job = log["job"]
    return Job(**{**job, "messages": tuple(job["messages"]), "compute": Compute(**job["compute"])})


def main(prog: str = "python -m bench scaling", args: list[str] | None = None) -> None:
    """Run the command line."""
    flags = parse(Flags, prog, args=args)
    if flags.log is not None:
        for name in ("chip", "phase", "branch", "size", "batch_size", "seq_len"):
            if getattr(flags, name) is not None:
                raise BadInput(
                    f"--{name.replace('_', '-')} and --log exclude each other: the log says what was measured"
                )
    links = read_links(flags.bandwidth)
    if flags.out is not None:
        check_json(flags.out)
    check_out(flags.out)
    job = predicted(flags) if flags.log is None else measured(flags.log)
    terminal = Terminal(width=120)
    for link in links:
        terminal.print(arithmetic(job, link))
        terminal.print(table(job, link))
    if flags.out is not None:
        write_log(flags.out, as_log(job, links))
        draw(job, links, flags.out.stem).write(flags.out.parent)
