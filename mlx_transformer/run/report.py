"""report.md and stories.md of a run, from result.json, curve.jsonl and the generated texts alone."""

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_transformer.run.plots import draw_lengths, draw_loss, finite, series, short, title
from mlx_transformer.train.trainer import Limits
from mlx_transformer.utils.files import atomic_write
from mlx_transformer.utils.text import plural

__all__ = ["draw_lengths", "draw_loss", "escaped", "memory", "write_report", "write_stories"]

Record = Mapping[str, Any]

STOPPED = {
    "plateau": "It stopped because the validation loss no longer improved or the schedule had ended",
    "max_steps": "It stopped at its limit of steps",
    "max_tokens": "It stopped at its limit of tokens",
    "max_epochs": "It stopped at its limit of epochs",
    "max_seconds": "It stopped at its time limit",
    "target": "It stopped at its target loss",
    "interrupted": "It was interrupted",
    "diverged": "It diverged: the loss or the gradient became infinite or not a number",
}

LONG_COPY = 15  # words; held-out TinyStories share up to 12 in a row with 1.1M words of training text
_BESIDES = {"compilation": "compile", "evaluation": "eval"}  # waited for but not part of the training time
MUCH_REPETITION = 0.2  # of the 4-grams; TinyStories have 0.01, and 99 % of them under 0.08

FIGURES = {  # key of result.json's quality: label, definition
    "distinct_1": ("distinct words", "distinct words / words"),
    "distinct_2": ("distinct pairs", "distinct word pairs / pairs"),
    "distinct_3": ("distinct triples", "distinct word triples / triples"),
    "repetition": ("repetition", "word 4-grams that occur earlier in the same text"),
    "known_words": ("known words", "words that occur in the training text"),
    "grammatical": ("grammatical", "unconditional samples that the grammar of the fables can generate"),
    "consistent": ("consistent", "those that also keep names, possessions, places and counts consistent"),
    "cut_off": ("cut off", "samples cut at the length limit without a mistake, counted in neither"),
    "grammatical_sentences": ("grammatical sentences", "sentences before the first mistake in grammar"),
    "consistent_sentences": ("consistent sentences", "sentences before the first mistake of any kind"),
}

# Of quality.bindings; each word is judged by its first token.
BINDING = "that a held-out story determines: those likelier than every other of their kind"


def write_report(
    folder: Path, result: Record, curve: Sequence[Record], stories: Sequence[Record], command: str, limits: Limits
) -> None:
    """Write report.md: what was trained, how good it is, how to resume it with `command --resume`. Raises OSError.

    limits: those of the run.
    """
    sections = [
        f"# {title(result)}",
        _what_was_done(result),
        _how_good(result),
        *_task_section(result),
        "![loss, learning rate and gradient norm over tokens](loss.png)",
        *(["![exact match by the length of the source](lengths.png)"] if result["quality"].get("translations") else []),
        "## Figures",
        _table(("figure", "value"), [*_figures(result), *_load(curve)]),
        "## Notes",
        "\n".join(f"- {remark}" for remark in _remarks(result, curve)),
        "## Generated text",
        f"{_quoted(stories[0])}\n\nMore in [stories.md](stories.md)." if stories else "None was generated.",
        "## Next",
        _next_commands(folder, result, command, limits),
    ]
    atomic_write(folder / "report.md", "\n\n".join(sections) + "\n")


def write_stories(folder: Path, stories: Sequence[Record], quality: Record) -> None:
    """Write stories.md: the quality figures, then each {"prompt", "text"} with its prompt in bold. Raises OSError."""
    rows = [(label, value, meaning) for label, value, meaning in translation_rows(quality)]
    rows += [(label, _share(quality[key]), meaning) for key, (label, meaning) in FIGURES.items() if key in quality]
    rows += binding_rows(quality)
    if "longest_copied_span" in quality:
        rows.append(("longest copied span", plural(quality["longest_copied_span"], "word"), _copied(quality)))
    sections = ["# Generated texts", "The prompt is in **bold**."]
    if rows:
        sections.append(_table(("figure", "value", "definition"), rows))
    if "judged_stories" in quality:
        count = quality["judged_stories"]
        sections.append(f"Grammar and consistency: over {count} unconditional samples at temperature 1.")
    sections += [f"## {number}\n\n{_quoted(story)}" for number, story in enumerate(stories, 1)]
    atomic_write(folder / "stories.md", "\n\n".join(sections) + "\n")


# Sections


def _what_was_done(result: Record) -> str:
    device, speed = result["device"], result["tokens_per_second"]
    return (
        f"{_model_name(result)} with {short(result['parameters']['total'])} parameters was"
        f" trained on {escaped(result['corpus']['name'])} for {_duration(result['train_seconds'])} on {device['name']}"
        f" ({device['backend']}): {plural(result['steps'], 'step')}, {short(result['tokens'])} tokens,"
        f" {_passes(result['epochs'])}"
        + (f", {speed:,.0f} tokens/s" if speed else "")
        + f". {STOPPED[result['stopped']]}."
    )


def _model_name(result: Record) -> str:
    """Name the model at the start of a sentence: "A phase 3 transformer (rope)", "The model of my_idea.py"."""
    branch = f" ({result['branch']})" if result["branch"] else ""
    code = result["code"]
    return f"The model of {code['file']}{branch}" if code else f"A phase {result['phase']} transformer{branch}"


def _how_good(result: Record) -> str:
    loss, bpb, floor = result["best_valid_loss"], result["best_valid_bpb"], result["corpus"]["floor_bpb"]
    vocab = result["tokenizer"]["vocab_size"]
    if loss is None:
        return "It has no finite validation loss."
    text = f"Its validation loss is **{loss:.3f} nats per token**"
    text += f", **{bpb:.3f} bits per byte**" if bpb is not None else ""
    text += f": perplexity {_perplexity(loss)}"
    text += f", against {vocab:,} of a uniform guess (ln {vocab:,} = {math.log(vocab):.3f} nats)."
    if bpb is not None and floor:  # not 0, as of the built-in pairs
        text += f" The entropy of the text, a lower bound for any model, is {floor:.3f} bits per byte"
        text += f": this is {_above(bpb / floor)}."
    return text


def _task_section(result: Record) -> list[str]:
    """Tabulate the score of a task by level; nothing for a text."""
    task = result["quality"].get("task")
    if task is None:
        return []
    names = list(dict.fromkeys(name for level in task["levels"] for name in level["references"]))
    rows = [
        (
            escaped(level["level"]),
            "yes" if level["trained"] else "no",
            str(level["tokens"]),
            _share(level["accuracy"]),
            *(_share(level["references"].get(name)) for name in names),
            _fine_share(level["floor"]),
            _share(level["ceiling"]),
        )
        for level in task["levels"]
    ]
    references = (name.replace("_", " ") for name in names)
    head = ("level", "trained", "tokens", "accuracy", *references, "floor (a guess)", "ceiling")
    what = (
        f"Its answers are right in **{_share(task['accuracy'])}** of held-out examples, the mean over trained levels."
    )
    return ["## Score", what, _table(head, rows)]


def _fine_share(value: float) -> str:
    """Format a share that may be tiny."""
    return _share(value) if value >= 0.001 or not value else f"{100 * value:.1g} %"


def _passes(epochs: float) -> str:
    return f"{epochs:.1f} epochs" if epochs >= 1 else f"{_share(epochs)} of an epoch"


def _above(ratio: float) -> str:
    return f"{100 * (ratio - 1):.1f} % above it" if ratio < 2 else f"{ratio:.1f} times that"


def _perplexity(loss: float) -> str:
    perplexity = math.exp(min(loss, 20))
    return "over a million" if perplexity > 1e6 else f"{perplexity:,.0f}" if perplexity >= 100 else f"{perplexity:.1f}"


def _figures(result: Record) -> list[tuple[str, str]]:
    corpus, parameters, tokenizer = result["corpus"], result["parameters"], result["tokenizer"]
    rest = (f"{what} {_duration(result[f'{key}_seconds'])}" for what, key in _BESIDES.items())
    about = "streamed, about " if corpus.get("streamed") else ""
    rows = [
        ("best validation loss", _nats(result["best_valid_loss"])),
        ("best bits per byte", _number(result["best_valid_bpb"])),
        ("last validation loss", _nats(result["final_valid_loss"])),
        ("entropy floor, bits per byte", _number(corpus["floor_bpb"], "not known")),
        ("uniform guess", _nats(math.log(tokenizer["vocab_size"]))),
        *((label, value) for label, value, _ in translation_rows(result["quality"])),
        *_target_rows(result),
        ("parameters", f"{parameters['total']:,} ({parameters['embedding']:,} in embeddings)"),
        (
            "training",
            f"{plural(result['tokens'], 'token')}, {plural(result['steps'], 'step')}, {result['epochs']:.2f} epochs",
        ),
        ("training time", f"{_duration(result['train_seconds'])}; in addition {', '.join(rest)}"),
        (
            "throughput",
            f"{result['tokens_per_second']:,.0f} tokens/s" if result["tokens_per_second"] else "under 10 steps",
        ),
        ("peak memory", memory(result["peak_memory_bytes"])),
        ("training text", f"{about}{corpus['train_tokens']:,} tokens, {corpus['train_bytes']:,} bytes"),
        ("validation text", f"{corpus['valid_tokens']:,} tokens, {corpus['valid_bytes']:,} bytes"),
        ("tokenizer", f"{tokenizer['kind']}, {tokenizer['vocab_size']:,} tokens"),
        ("model", f"{result['size']}: {_settings(result['config'])}"),
        ("recipe", f"{result['recipe_name'] or 'default'}: {_settings(result['recipe'])}"),
        ("optimizer groups", "; ".join(map(_group, result["recipe"]["groups"]))),
        ("seed", str(result["seed"])),
        ("machine", f"{result['device']['name']}, {memory(result['device']['memory_bytes'])}"),
        ("versions", _settings(result["versions"])),
    ]
    return rows


def _load(curve: Sequence[Record]) -> list[tuple[str, str]]:
    """Return the experts' load at the first and at the last logged step, where the model has a router."""
    most, least = (finite(series(curve, "log", f"router_{name}_load")[1]) for name in ("most", "least"))
    if not (len(most) and len(least)):
        return []
    first, last = (f"{most[i]:.2f} and {least[i]:.2f}" for i in (0, -1))
    return [("load of the busiest and the idlest expert", f"{last} of an equal share; at first {first}")]


def translation_rows(quality: Record) -> list[tuple[str, str, str]]:
    """Return label, value and definition of each figure of a translator; none for other models."""
    rows = []
    for name, scores in quality.get("translations", {}).items():
        how = f"of {plural(scores['pairs'], 'sentence')}, by beam search ({quality['beam']})"
        rows.append((f"exact match, {name}", _share(scores["exact_match"]), how))
        rows.append((f"exact match, {name}, greedy", _share(scores["greedy"]["exact_match"]), "without beam search"))
        for key, label in (("chrf", "chrF"), ("bleu", "BLEU")):
            score = "needs sacrebleu" if scores[key] is None else f"{scores[key]:.2f}"
            rows.append((f"{label}, {name}", score, "by sacrebleu, of 100"))
    return rows


def binding_rows(quality: Record) -> list[tuple[str, str, str]]:
    """Return label, value and definition of each kind of word that the fables determine; none for other texts."""
    rows = []
    for group, found in quality.get("bindings", {}).items():
        how = f"of {plural(found['words'], 'word')} {BINDING}, {_share(found['chance'])} by chance"
        rows.append((f"right {group}", _share(found["right"]), how))
    return rows


def _target_rows(result: Record) -> list[tuple[str, str]]:
    if result["target_loss"] is None:
        return []
    reached = "not reached"
    if result["seconds_to_target"] is not None:
        reached = f"reached after {_duration(result['seconds_to_target'])}, {result['tokens_to_target']:,} tokens"
    return [(f"target loss {result['target_loss']:.4g}", reached)]


def _remarks(result: Record, curve: Sequence[Record]) -> list[str]:
    """List what a reader could overlook or misread."""
    remarks = [*_remarks_on_loss(result, curve), *_remarks_on_texts(result["quality"])]
    waited = finite(series(curve, "log", "data_wait_share")[1])
    if len(waited) and waited.mean() > 0.05:
        share = _share(float(waited.mean()))
        remarks.append(f"{share} of the training time was spent waiting for data: the throughput is not the model's.")
    if result["tokenizer"]["unknown_rate"]:
        rate = _share(result["tokenizer"]["unknown_rate"])
        remarks.append(
            f"{rate} of the words are unknown to the tokenizer: its losses compare with no other tokenizer's."
        )
    if result["device"]["backend"] != "cpu":
        remarks.append(
            "Repeated or resumed on a GPU, it is equal up to the order of float sums; with --deterministic bit for bit."
        )
    return [
        *remarks,
        "One run with one seed: runs that differ only in the seed differ too, so it ranks nothing.",
    ]


def _remarks_on_loss(result: Record, curve: Sequence[Record]) -> list[str]:
    best, uniform = result["best_valid_loss"], math.log(result["tokenizer"]["vocab_size"])
    losses, train = finite(series(curve, "eval", "valid_loss")[1]), _last_training_losses(curve)
    remarks = []
    if best is not None and best >= uniform:
        remarks.append(f"**It learned nothing: {best:.3f} nats are no better than a uniform guess, {uniform:.3f}.**")
    if result["stopped"].startswith("max_") or result["stopped"] == "interrupted":
        falling = len(losses) > 1 and losses[-1] == losses.min()
        remarks.append(
            "It stopped before its end" + (" with its loss still falling: train longer." if falling else ".")
        )
    if finite(series(curve, "log", "learning_rate")[1])[-1:].tolist() == [0.0]:
        remarks.append("Its schedule had ended at a learning rate of 0: more steps would change nothing.")
    if result["stopped"] == "diverged":
        weights = "the initial ones" if best is None else "those of the best evaluation"
        remarks.append(f"It diverged: the saved weights are {weights}. Try a lower learning rate.")
    if len(train) and len(losses) and train.mean() < 0.9 * losses[-1]:
        remarks.append(
            f"It overfits: {train.mean():.3f} nats in training at the end, {losses[-1]:.3f} in validation."
            " More text would help more than more time."
        )
    if best is not None and result["final_valid_loss"] not in (None, best):
        remarks.append("The last evaluation was not the best: the saved model and the texts are of the best one.")
    return remarks


def _last_training_losses(curve: Sequence[Record]) -> np.ndarray:
    """Return the losses logged since the second-last evaluation."""
    evaluated = series(curve, "eval", "valid_loss")[0]
    tokens, losses = series(curve, "log", "loss")
    return finite(losses[tokens > evaluated[-2]] if len(evaluated) > 1 else losses)


def _remarks_on_texts(quality: Record) -> list[str]:
    remarks = []
    copied, repeated = quality.get("longest_copied_span") or 0, quality.get("repetition") or 0.0
    if copied >= LONG_COPY:
        remarks.append(f"{copied} words in a row are copied from the training text: “{_copied(quality)}”.")
    if repeated > MUCH_REPETITION:
        remarks.append(f"The texts repeat themselves: {_share(repeated)} of their word 4-grams are repeats.")
    return remarks


def resume_command(command: str, folder: Path) -> str:
    """The command line that resumes a run, quoted for a shell; command: the one that started it, without flags."""
    return f"{command} --resume {shlex.quote(str(folder))}"


def _next_commands(folder: Path, result: Record, command: str, limits: Limits) -> str:
    place = shlex.quote(str(folder))
    resume = resume_command(command, folder)
    code = " --code kept" if result["code"] else ""
    what, prompt = (
        ("Translate", "three plus four is seven")
        if "translations" in result["quality"]
        else ("Generate text", "Once upon a time")
    )
    commands = [f"{what}:\n\n    python -m mlx_transformer.generate {place}{code} --prompt '{prompt}'"]
    if result["stopped"] == "interrupted":
        commands.append(f"Resume training:\n\n    {resume}")
    elif result["stopped"].startswith("max_") and result["final_valid_loss"] == result["best_valid_loss"]:
        flag, twice = f"--{result['stopped'].replace('_', '-')}", 2 * getattr(limits, result["stopped"])
        commands.append(f"Train twice as long:\n\n    {resume} {flag} {twice:.15g}")
    return "\n\n".join(commands)


# Numbers and text


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def memory(size: int) -> str:
    """Format bytes as GiB or MiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _number(value: float | None, otherwise: str = "not measured") -> str:
    return otherwise if value is None else f"{value:.4f}"


def _nats(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f} nats per token"


def _share(value: float | None) -> str:
    return "—" if value is None else f"{100 * value:.1f} %"


def _settings(values: Record) -> str:
    """List the numbers and strings of a mapping by name; a nested mapping by its kind."""
    named = {name: value.get("kind") if isinstance(value, dict) else value for name, value in values.items()}
    shown = {name: value for name, value in named.items() if name != "kind" and isinstance(value, int | float | str)}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def _group(group: Record) -> str:
    """Describe an optimizer group: its name, optimizer and factor of the learning rate."""
    multiplier, optimizer = group["lr_multiplier"], group["optimizer"]
    factor = "" if multiplier == 1 else f", learning rate × {multiplier:g}"
    return f"{group['name']}: {optimizer['kind']} ({_settings(optimizer)}){factor}"


def _copied(quality: Record) -> str:
    return escaped(str(quality.get("longest_copied_text", "")))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escaped(text: str) -> str:
    """Escape Markdown: no character is markup, and no line begins a list or a rule."""
    return re.sub(r"(?m)^([ \t]*\d*)([-+=.)])", r"\1\\\2", re.sub(r"([\\`*_\[\]<>#|~&])", r"\\\1", text))


def _quoted(story: Record) -> str:
    """Format a text as a block quote that keeps its lines, the prompt in bold."""
    prompt, text = story["prompt"], story["text"]
    start = prompt.strip() if text.startswith(prompt) else ""
    bold = f"**{escaped(start)}**" if start else ""
    rest = text[len(prompt.rstrip()) :] if start else text
    return "  \n".join(f"> {line}".rstrip() for line in (bold + escaped(rest)).splitlines()) or "> (nothing)"
