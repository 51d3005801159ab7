"""What a model is trained on, and what a run writes at its end: continuations of a text, translations, or a score."""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from mlx_transformer.data import pairs
from mlx_transformer.data.corpus import Corpus, load_corpus
from mlx_transformer.data.tasks import Example, find_task, is_task
from mlx_transformer.data.tokenizers import Tokenizer
from mlx_transformer.data.tokens import tokenize_corpus
from mlx_transformer.generate import Scorer, complete, encode_prompt, generate_unconditional, score, translate
from mlx_transformer.generate.beam import Beam
from mlx_transformer.generate.bindings import STORIES, Bindings
from mlx_transformer.generate.quality import documents, quality
from mlx_transformer.generate.translation import judge
from mlx_transformer.nn.config import Config
from mlx_transformer.nn.model import Model
from mlx_transformer.nn.patches import with_patches
from mlx_transformer.run.settings import Settings
from mlx_transformer.train.trainer import Data
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.text import plural

Say = Callable[[str], None]
Record = dict[str, Any]

PROMPTS = (
    "Once upon a time",
    "There was a little",
    "The brave princess",
    "In a magical forest",
    "A small cat",
)
_UNCONDITIONAL_SAMPLES = 100
_JUDGED_PAIRS = 500  # of each test split
_SCORED_EXAMPLES = 64  # of each level of a task with a score, at each evaluation


class TextTask:
    """A language model: trained on a text, it continues prompts. `plan` is a Plan (run/plan.py)."""

    def fit(self, kind: type[Model], settings: Settings) -> type[Model]:
        """Return the class that reads the corpus. Raises BadInput for settings that do not go with it."""
        return kind

    def scorer(self, plan: Any) -> Callable[[Model], dict[str, float]] | None:
        """Return the function whose figures go into each evaluation, if there is one."""
        return None

    def load(self, settings: Settings, say: Say) -> Corpus:
        """Prepare the corpus. Raises BadInput."""
        text = (settings.data or "auto", settings.valid, settings.stories, say, settings.text_column)
        return load_corpus(*text, stream=settings.stream)

    def tokenize(self, corpus: Corpus, tokenizer: Tokenizer, config: Config, say: Say) -> Data:
        """Tokenize the corpus. Raises BadInput."""
        return tokenize_corpus(corpus, tokenizer, say)

    def check(self, plan: Any) -> None:
        """Raise BadInput for a prompt longer than the context, and for a training text shorter than one sequence."""
        for prompt in plan.settings.prompt:
            encode_prompt(plan.tokenizer, prompt, plan.config.seq_len)
        if plan.tokens.epoch_tokens < plan.config.seq_len:
            raise BadInput(
                f"the training text has {plural(plan.tokens.epoch_tokens + 1, 'token')}: one sequence needs "
                f"{plan.config.seq_len + 1:,}; give a longer text or a smaller --seq-len"
            )

    def prompts(self, plan: Any) -> list[str]:
        """Return the prompts given, else the default ones that fit the context."""
        given = list(plan.settings.prompt)
        return given or [p for p in PROMPTS if len(plan.tokenizer.encode(p)) + 1 < plan.config.seq_len]

    def write(self, plan: Any, model: Model) -> tuple[list[Record], Record]:
        """Return {"prompt", "text", "ended"} of each prompt, and the quality figures of result.json."""
        completions = complete(model, plan.tokenizer, self.prompts(plan), sampling=plan.sampling, seed=plan.seed)
        stories = [{"prompt": s.prompt, "text": s.text, "ended": s.ended} for s in completions]
        if plan.settings.data != "fables":  # the built-in text, whose grammar can judge a story
            return stories, quality(stories, plan.tokens.train, plan.tokenizer)
        samples = generate_unconditional(model, plan.tokenizer, _UNCONDITIONAL_SAMPLES, seed=plan.seed)
        judged = [sample.text for sample in samples]
        held_out = list(islice(documents(plan.tokens.valid, plan.tokenizer), STORIES))
        figures = quality(stories, plan.tokens.train, plan.tokenizer, judged)
        return stories, figures | {"bindings": Bindings(held_out, plan.tokenizer)(model)}


class PairsTask(TextTask):
    """A translator: trained on pairs, it translates sentences."""

    def load(self, settings: Settings, say: Say) -> Corpus:
        if settings.text_column is not None:
            raise BadInput(f"--text-column {settings.text_column} goes with .jsonl and .csv; pairs have no columns")
        if settings.stream:
            raise BadInput("--stream goes with a text; a translator reads its pairs at once")
        return pairs.load_pairs(settings.data or "auto", settings.valid, settings.stories, say)

    def tokenize(self, corpus: Corpus, tokenizer: Tokenizer, config: Config, say: Say) -> Data:
        return pairs.tokenize_pairs(corpus, tokenizer, config.seq_len, say)

    def check(self, plan: Any) -> None:
        """Raise BadInput for an empty prompt, and for settings of sampling."""
        check_no_sampling(plan.settings)
        for prompt in plan.settings.prompt:
            if not prompt.strip():
                raise BadInput(f"prompt {prompt!r} is empty: expected a sentence to translate")

    def prompts(self, plan: Any) -> list[str]:
        """Return the sentences given, else some held-out ones."""
        held_out = plan.tokens.tests["held out"]
        return list(plan.settings.prompt) or [source for source, _ in held_out[: len(PROMPTS)]]

    def write(self, plan: Any, model: Model) -> tuple[list[Record], Record]:
        beam, tests = Beam(), plan.tokens.tests
        made = translate(model, plan.tokenizer, self.prompts(plan), beam=beam.size, length_penalty=beam.alpha)
        stories = [{"prompt": one.source, "text": f"{one.source}\n{one.text}", "ended": one.ended} for one in made]
        kind_of = pairs.kind_of if pairs.is_built_in(plan.settings.data) else None
        judged = {
            name: judge(model, plan.tokenizer, test[:_JUDGED_PAIRS], beam, kind_of) for name, test in tests.items()
        }
        return stories, {"beam": beam.size, "length_penalty": beam.alpha, "translations": judged}


class ScoredTask(TextTask):
    """A language model trained on generated texts with answers (data/tasks), which are scored."""

    def fit(self, kind: type[Model], settings: Settings) -> type[Model]:
        task = find_task(str(settings.data))
        for name in ("tokenizer", "vocab_size"):
            if (value := getattr(settings, name)) is not None:
                flag = f"--{name.replace('_', '-')} {value}"
                raise BadInput(f"{flag} goes with a text; {settings.data} has its own symbols")
        if kind.parallel:
            raise BadInput(f"--data {settings.data}: a translator trains on pairs; give another --branch")
        return with_patches(kind) if task.patches else kind

    def tokenize(self, corpus: Corpus, tokenizer: Tokenizer, config: Config, say: Say) -> Data:
        return tokenize_corpus(corpus, tokenizer, say).packed(config.seq_len)

    def scorer(self, plan: Any) -> Callable[[Model], dict[str, float]]:
        scorer = Scorer(find_task(plan.corpus.task), plan.tokenizer, examples=_SCORED_EXAMPLES, trained_only=True)

        def figures(model: Model) -> dict[str, float]:
            found = scorer(model)
            return {"accuracy": found.accuracy, **{f"accuracy, {one.level}": one.accuracy for one in found.levels}}

        return figures

    def prompts(self, plan: Any) -> list[str]:
        """Return the prompts given, else the beginning of a held-out example of each level that was trained."""
        task = find_task(plan.corpus.task)
        texts = (task.held_out(level, 1)[0] for level in task.trained_levels)
        return list(plan.settings.prompt) or [" ".join(Example.read(text).prompt) for text in texts]

    def write(self, plan: Any, model: Model) -> tuple[list[Record], Record]:
        """Return {"prompt", "text", "ended"} of each prompt, and the score of result.json."""
        completions = complete(model, plan.tokenizer, self.prompts(plan), sampling=plan.sampling, seed=plan.seed)
        stories = [{"prompt": s.prompt, "text": s.text, "ended": s.ended} for s in completions]
        return stories, {"task": score(model, plan.tokenizer, plan.corpus.task).to_dict()}


def task_of(kind: type[Model], settings: Settings) -> TextTask:
    """Return the task of a model's class and the settings."""
    if is_task(settings.data or "auto"):
        return ScoredTask()
    return PairsTask() if kind.parallel else TextTask()


def check_no_sampling(flags: Any, names: Sequence[str] = ("temperature", "top_k", "top_p", "min_p")) -> None:
    """Raise BadInput if a flag of sampling is given: a translator searches."""
    for name in names:
        if (value := getattr(flags, name)) is not None:
            raise BadInput(
                f"--{name.replace('_', '-')} {value}: a translator searches and does not sample; leave it out"
            )
