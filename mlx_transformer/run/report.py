"""The card of a run, from result.json, curve.jsonl and the stories alone: report.md, stories.md and `draw_loss`."""

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_transformer.run.plots import draw_loss, finite, series, short, title
from mlx_transformer.utils.files import atomic_write

__all__ = ["draw_loss", "escaped", "memory", "write_report", "write_stories"]

Record = Mapping[str, Any]

STOPPED = {
    "plateau": "It stopped because the validation loss no longer improved, or its schedule was at its end",
    "max_steps": "It was cut at its limit of steps",
    "max_tokens": "It was cut at its limit of tokens",
    "max_epochs": "It was cut at its limit of epochs",
    "max_seconds": "It was cut at its time limit",
    "target": "It stopped as soon as it reached its target loss",
    "interrupted": "It was interrupted",
    "diverged": "It diverged: loss or gradient was no longer a finite number",
}

LONG_COPY = 15  # words: held-out TinyStories share up to 12 in a row with 1.1M words of training stories
MUCH_REPETITION = 0.2  # of the runs of four words: TinyStories have 0.01, and 99 % of them under 0.08

FIGURES = {  # of quality.py: label, what it says
    "distinct_1": ("distinct words", "different words / words"),
    "distinct_2": ("distinct pairs", "different pairs of words / pairs"),
    "distinct_3": ("distinct triples", "different triples of words / triples"),
    "repetition": ("repetition", "runs of four words that stood earlier in the same story"),
    "known_words": ("known words", "words that the training text has"),
    "grammatical": ("grammatical", "whole stories, written from nothing, that the fables' grammar can have written"),
    "consistent": ("consistent", "those that keep names, possessions, places and counts straight as well"),
    "cut_off": ("cut off", "stories at the length limit with no mistake so far, counted in neither"),
    "grammatical_sentences": ("grammatical sentences", "sentences before a story's first mistake in grammar"),
    "consistent_sentences": ("consistent sentences", "sentences before a story's first mistake of any kind"),
}


def write_report(
    folder: Path, result: Record, curve: Sequence[Record], stories: Sequence[Record], command: str
) -> None:
    """Write report.md: what was trained, how good it is, how to resume it with `command --resume`. Raises OSError."""
    sections = [
        f"# {title(result)}",
        _what_was_done(result),
        _how_good(result),
        "![training and validation loss over tokens](loss.png)",
        "## Figures",
        _table(("figure", "value"), _figures(result)),
        "## To bear in mind",
        "\n".join(f"- {remark}" for remark in _remarks(result, curve)),
        "## A story",
        f"{_quoted(stories[0])}\n\nMore in [stories.md](stories.md)." if stories else "None was written.",
        "## Going on",
        _going_on(folder, result, command),
    ]
    atomic_write(folder / "report.md", "\n\n".join(sections) + "\n")


def write_stories(folder: Path, stories: Sequence[Record], quality: Record) -> None:
    """stories.md: each {"prompt", "text"} as it came out, its prompt in bold, after the quality figures."""
    rows = [(label, _share(quality[key]), meaning) for key, (label, meaning) in FIGURES.items() if key in quality]
    if "longest_copied_span" in quality:
        rows.append(("longest copied run", f"{quality['longest_copied_span']} words", _copied(quality)))
    sections = ["# Stories", "As they came out; the prompt is in **bold**."]
    if rows:
        sections.append(_table(("figure", "value", "what it says"), rows))
    if "judged_stories" in quality:
        count = quality["judged_stories"]
        sections.append(f"Grammar and consistency are of {count} other stories, written from nothing at temperature 1.")
    sections += [f"## {number}\n\n{_quoted(story)}" for number, story in enumerate(stories, 1)]
    atomic_write(folder / "stories.md", "\n\n".join(sections) + "\n")


# The words of the report


def _what_was_done(result: Record) -> str:
    device, speed = result["device"], result["tokens_per_second"]
    branch = f" ({result['branch']})" if result["branch"] else ""
    return (
        f"A phase {result['phase']} transformer{branch} of {short(result['parameters']['total'])} parameters was"
        f" trained on {result['corpus']['name']} for {_duration(result['train_seconds'])} on {device['name']}"
        f" ({device['backend']}): {_plural(result['steps'], 'step')}, {short(result['tokens'])} tokens,"
        f" {_passes(result['epochs'])}"
        + (f", {speed:,.0f} tokens a second once compiled" if speed else "")
        + f". {STOPPED[result['stopped']]}."
    )


def _how_good(result: Record) -> str:
    loss, bpb, floor = result["best_valid_loss"], result["best_valid_bpb"], result["corpus"]["floor_bpb"]
    pieces = result["tokenizer"]["vocab_size"]
    if loss is None:
        return "It was never evaluated to a finite loss, so nothing can be said of how good it is."
    said = f"On text that it never saw its loss is **{loss:.3f} nats per piece**"
    said += f", **{bpb:.3f} bits per byte**" if bpb is not None else ""
    said += (
        f": at each piece it is as unsure as one who guesses among {_choices(loss)} equally likely ones. To know"
        f" nothing is to guess among all {pieces:,} (ln {pieces:,} = {math.log(pieces):.3f} nats)."
    )
    if bpb is not None and floor:
        said += (
            f" The entropy of the text itself, below which no model can stay, is {floor:.3f} bits per byte:"
            f" this is {_above(bpb / floor)}."
        )
    return said


def _passes(epochs: float) -> str:
    return f"{epochs:.1f} times through the text" if epochs >= 1 else f"{_share(epochs)} of the text"


def _above(ratio: float) -> str:
    return f"{100 * (ratio - 1):.1f} % above it" if ratio < 2 else f"{ratio:.1f} times that"


def _choices(loss: float) -> str:
    """exp(loss), the perplexity; past the size of any vocabulary only that it is."""
    perplexity = math.exp(min(loss, 20))
    return "millions of" if perplexity > 1e6 else f"{perplexity:,.0f}" if perplexity >= 100 else f"{perplexity:.1f}"


def _figures(result: Record) -> list[tuple[str, str]]:
    corpus, parameters, tokenizer = result["corpus"], result["parameters"], result["tokenizer"]
    seconds = f"{_duration(result['train_seconds'])}, of which {result['compile_seconds']:.1f} s compiling"
    rows = [
        ("best validation loss", _nats(result["best_valid_loss"])),
        ("best bits per byte", _number(result["best_valid_bpb"])),
        ("last validation loss", _nats(result["final_valid_loss"])),
        ("entropy floor, bits per byte", _number(corpus["floor_bpb"], "not known")),
        ("uniform guess", _nats(math.log(tokenizer["vocab_size"]))),
        *_target_rows(result),
        ("parameters", f"{parameters['total']:,} ({parameters['embedding']:,} in embeddings)"),
        ("training", f"{result['tokens']:,} tokens, {result['steps']:,} steps, {result['epochs']:.2f} epochs"),
        ("clock", f"{seconds}; evaluation {_duration(result['eval_seconds'])} besides"),
        ("speed", f"{result['tokens_per_second']:,.0f} tokens/s" if result["tokens_per_second"] else "under 10 steps"),
        ("peak memory", memory(result["peak_memory_bytes"])),
        ("training text", f"{corpus['train_tokens']:,} pieces, {corpus['train_bytes']:,} bytes"),
        ("validation text", f"{corpus['valid_tokens']:,} pieces, {corpus['valid_bytes']:,} bytes"),
        ("tokenizer", f"{tokenizer['kind']}, {tokenizer['vocab_size']:,} pieces"),
        ("model", f"{result['size']}: {_settings(result['config'])}"),
        ("recipe", f"{result['recipe_name'] or 'the phase’s own'}: {_settings(result['recipe'])}"),
        ("seed", str(result["seed"])),
        ("machine", f"{result['device']['name']}, {memory(result['device']['memory_bytes'])}"),
        ("versions", _settings(result["versions"])),
    ]
    return rows


def _target_rows(result: Record) -> list[tuple[str, str]]:
    if result["target_loss"] is None:
        return []
    reached = "not reached"
    if result["seconds_to_target"] is not None:
        reached = f"reached after {_duration(result['seconds_to_target'])}, {result['tokens_to_target']:,} tokens"
    return [(f"target loss {result['target_loss']:.4g}", reached)]


def _remarks(result: Record, curve: Sequence[Record]) -> list[str]:
    """What a reader could be misled about, said plainly."""
    remarks = [*_remarks_on_loss(result, curve), *_remarks_on_stories(result["quality"])]
    waited = finite(series(curve, "log", "data_wait_share")[1])
    if len(waited) and waited.mean() > 0.05:
        share = _share(float(waited.mean()))
        remarks.append(f"{share} of the time went into waiting for data: the speed is not the model's.")
    if result["tokenizer"]["unknown_rate"]:
        rate = _share(result["tokenizer"]["unknown_rate"])
        remarks.append(f"{rate} of the words are unknown to the tokenizer: losses compare within this tokenizer only.")
    return [
        *remarks,
        "One run, one seed: runs that differ only in the seed differ too, so one run ranks nothing.",
    ]


def _remarks_on_loss(result: Record, curve: Sequence[Record]) -> list[str]:
    best, uniform = result["best_valid_loss"], math.log(result["tokenizer"]["vocab_size"])
    losses, train = finite(series(curve, "eval", "valid_loss")[1]), _last_training_losses(curve)
    remarks = []
    if best is not None and best >= uniform:
        remarks.append(f"**It learnt nothing: {best:.3f} nats is no better than guessing uniformly, {uniform:.3f}.**")
    if result["stopped"].startswith("max_") or result["stopped"] == "interrupted":
        falling = len(losses) > 1 and losses[-1] == losses.min()
        remarks.append("It was cut short" + (", its loss still falling: longer is better." if falling else "."))
    if finite(series(curve, "log", "learning_rate")[1])[-1:].tolist() == [0.0]:
        remarks.append("Its schedule was at its end, a learning rate of 0: longer would have changed nothing.")
    if result["stopped"] == "diverged":
        remarks.append(
            "It diverged: the weights are those of the best evaluation before. A lower learning rate may hold."
        )
    if len(train) and len(losses) and train.mean() < 0.9 * losses[-1]:
        remarks.append(
            f"It knows its training text better than new text: {train.mean():.3f} nats in training at the end,"
            f" {losses[-1]:.3f} in validation. More text would help more than more time."
        )
    if best is not None and result["final_valid_loss"] not in (None, best):
        remarks.append("The last evaluation was not the best: the model saved, and its stories, are of the best one.")
    return remarks


def _last_training_losses(curve: Sequence[Record]) -> np.ndarray:
    """Those logged since the last evaluation but one."""
    evaluated = series(curve, "eval", "valid_loss")[0]
    tokens, losses = series(curve, "log", "loss")
    return finite(losses[tokens > evaluated[-2]] if len(evaluated) > 1 else losses)


def _remarks_on_stories(quality: Record) -> list[str]:
    remarks = []
    copied, repeated = quality.get("longest_copied_span") or 0, quality.get("repetition") or 0.0
    if copied >= LONG_COPY:
        remarks.append(f"A run of {copied} words stands in the training text: “{_copied(quality)}”.")
    if repeated > MUCH_REPETITION:
        remarks.append(f"The stories go in circles: {_share(repeated)} of their runs of four words are repeats.")
    return remarks


def resume_command(command: str, folder: Path) -> str:
    """The command line that resumes a run, quoted for a shell; command: the one that started it, without flags."""
    return f"{command} --resume {shlex.quote(str(folder))}"


def _going_on(folder: Path, result: Record, command: str) -> str:
    place = shlex.quote(str(folder))
    resume = resume_command(command, folder)
    twice = {
        "max_steps": 2 * result["steps"],
        "max_tokens": 2 * result["tokens"],
        "max_epochs": max(1, round(2 * result["epochs"])),
        "max_seconds": max(1, round(2 * result["train_seconds"])),
    }
    code = " --code kept" if result["code"] else ""
    said = [f"Generate text:\n\n    python -m mlx_transformer.generate {place}{code} --prompt 'Once upon a time'"]
    if result["stopped"] == "interrupted":
        said.append(f"Train on from where it stopped:\n\n    {resume}")
    elif result["stopped"] in twice and result["final_valid_loss"] == result["best_valid_loss"]:
        limit = f"--{result['stopped'].replace('_', '-')} {twice[result['stopped']]}"
        said.append(f"Train on, to twice the length:\n\n    {resume} {limit}")
    return "\n\n".join(said)


# Numbers and text for people


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def memory(size: int) -> str:
    """Bytes in GiB or MiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _number(value: float | None, otherwise: str = "not measured") -> str:
    return otherwise if value is None else f"{value:.4f}"


def _nats(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f} nats per piece"


def _share(value: float | None) -> str:
    return "—" if value is None else f"{100 * value:.1f} %"


def _settings(values: Record) -> str:
    """The numbers and words of a mapping by name; of a part that is a mapping itself, its kind."""
    named = {name: value.get("kind") if isinstance(value, dict) else value for name, value in values.items()}
    shown = {name: value for name, value in named.items() if name != "kind" and isinstance(value, int | float | str)}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def _copied(quality: Record) -> str:
    return escaped(str(quality.get("longest_copied_text", "")))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escaped(text: str) -> str:
    """A model may write anything: nothing in it is markup, and no line begins a list or a rule."""
    return re.sub(r"(?m)^([ \t]*\d*)([-+=.)])", r"\1\\\2", re.sub(r"([\\`*_\[\]<>#|~&])", r"\\\1", text))


def _quoted(story: Record) -> str:
    """A story as a block quote, its prompt in bold; its lines stay lines."""
    prompt, text = story["prompt"], story["text"]
    opening = prompt.strip() if text.startswith(prompt) else ""
    bold = f"**{escaped(opening)}**" if opening else ""
    rest = text[len(prompt.rstrip()) :] if opening else text
    return "  \n".join(f"> {line}".rstrip() for line in (bold + escaped(rest)).splitlines()) or "> (nothing)"
