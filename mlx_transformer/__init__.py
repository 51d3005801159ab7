"""A ladder through eight years of transformer research, written directly in Apple's MLX.

    import mlx_transformer as mt

    model, tokenizer = mt.load("results/mine")                          # a run folder, or what save wrote
    mt.evaluate(model, tokenizer, "held_out.txt")                       # nats per token, perplexity, bits per byte
    mt.score(model, tokenizer, "task:recall")                            # of a model trained on a task: its accuracy
    mt.generate(model, tokenizer, ["Once upon a time"], max_tokens=200)
    mt.translate(model, tokenizer, ["three plus four is seven"])        # an encoder-decoder
    for event in mt.fit(model, recipe, data): ...                       # Step, Eval, Saved, Stopped
    mt.save("folder", model, tokenizer)
    mt.main(__name__)                                                   # the command line of a file with a Model

Config, Model and Recipe are the bases to subclass or to fill in; nn, train, data and optim the packages with the parts.
Everything but `main` is imported on first use, so that importing the package does not import mlx.core.
"""

import os
import signal
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_transformer import data as data
    from mlx_transformer import nn as nn
    from mlx_transformer import train as train
    from mlx_transformer.generate import generate as generate
    from mlx_transformer.generate import score as score
    from mlx_transformer.generate import translate as translate
    from mlx_transformer.nn.config import Config as Config
    from mlx_transformer.nn.model import Model as Model
    from mlx_transformer.run.saved import load as load
    from mlx_transformer.run.saved import save as save
    from mlx_transformer.train import optim as optim
    from mlx_transformer.train.evaluate import evaluate as evaluate
    from mlx_transformer.train.recipe import Recipe as Recipe
    from mlx_transformer.train.trainer import fit as fit

    __version__: str

_LAZY = {  # name -> module, or module:attribute
    "Config": "nn.config:Config",
    "Model": "nn.model:Model",
    "Recipe": "train.recipe:Recipe",
    "data": "data",
    "evaluate": "train.evaluate:evaluate",
    "fit": "train.trainer:fit",
    "generate": "generate:generate",
    "load": "run.saved:load",
    "nn": "nn",
    "optim": "train.optim",
    "save": "run.saved:save",
    "score": "generate:score",
    "train": "train",
    "translate": "generate:translate",
}
__all__ = ["__version__", "main", *_LAZY]


def _is_command() -> bool:
    """Whether the program is `python -m`, a console script of ours, or a file that ends in `mt.main(__name__)`."""
    if sys.argv[0] == "-m" or sys.argv[0].endswith(("mlx-transformer", "mlx-bench")):
        return True
    try:
        with open(sys.modules["__main__"].__file__ or "", encoding="utf-8") as file:
            return file.read().rstrip().endswith(".main(__name__)")
    except (AttributeError, KeyError, OSError, ValueError):  # an interactive Python
        return False


if signal.getsignal(signal.SIGINT) is signal.default_int_handler and _is_command():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C leaves no traceback; before the imports, which take a second

_prepare = import_module(f"{__name__}.backend").prepare
_prepare()  # before anything imports mlx.core


def main(name: str) -> None:
    """Run the command line of the file that ends in `mt.main(__name__)`, if that file is the program.

    It trains what the file defines: Model, Config, RECIPE, BRANCHES, each optional where the file builds on a phase.
    Returns at once where the file is imported. A file that imports mlx.core before this package starts again.
    """
    if name == "__main__":
        if _prepare().late:
            _start_again(sys.modules[name])
        import_module("mlx_transformer.run.training").main(sys.modules[name])


def _start_again(module: ModuleType) -> None:
    """Replace this process by one that runs the file once this package has been imported."""
    file = getattr(module, "__file__", None)
    if file is None:
        return
    code = f"import mlx_transformer, runpy, sys; sys.argv[0] = {file!r}; sys.path[0] = {os.path.dirname(file)!r}; "
    code += f"runpy.run_path({file!r}, run_name='__main__')"
    options = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv)]  # Python's own
    os.execv(sys.executable, [sys.executable, *options, "-c", code, *sys.argv[1:]])


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from mlx_transformer.backend import versions

        return versions()["project"]
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _LAZY[name].partition(":")
    found = import_module(f"{__name__}.{module}")
    return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """This package, whose `generate` and `evaluate` stay functions when the modules of these names are imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in ("generate", "evaluate") and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
