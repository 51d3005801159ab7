"""Adapters that send a run's events to TensorBoard or to Weights & Biases (`--log tensorboard`, `--log wandb`)."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mlx_transformer.train.trainer import Eval, Event, Step
from mlx_transformer.utils.errors import BadInput


def scalars(event: Event) -> dict[str, float]:
    """Named numbers of an event: train/*, valid/*, with tokens and seconds of training; empty for other events."""
    if isinstance(event, Step):
        figures = {f"train/{name}": value for name, value in event.metrics.items()}
        figures |= {"train/learning_rate": event.learning_rate, "train/gradient_norm": event.gradient_norm}
        if event.tokens_per_second is not None:
            figures["train/tokens_per_second"] = event.tokens_per_second
    elif isinstance(event, Eval):
        figures = {"valid/loss": event.valid_loss}
    else:
        return {}
    return {**figures, "progress/tokens": float(event.tokens), "progress/seconds": event.seconds}


class EventLogger:
    """Base of the adapters: read the run's events and send the figures of every log_every-th step and evaluation."""

    def __init__(self, folder: Path, settings: dict[str, Any], log_every: int) -> None:
        self.log_every = log_every
        self.open(folder, settings)

    def write(self, event: Event) -> None:
        """Send the figures of an event, if it is one to log."""
        if isinstance(event, Eval) or (isinstance(event, Step) and event.step % self.log_every == 0):
            self.send(event.step, scalars(event))

    def open(self, folder: Path, settings: dict[str, Any]) -> None:
        """Begin, or resume, the record of a run folder."""
        raise NotImplementedError

    def send(self, step: int, figures: dict[str, float]) -> None:
        """Record named figures of one step."""
        raise NotImplementedError

    def close(self) -> None:
        """Send what is still held back, and end."""
        raise NotImplementedError


class TensorBoardLogger(EventLogger):
    """Scalars over steps in FOLDER/tensorboard, for `tensorboard --logdir FOLDER`."""

    def open(self, folder: Path, settings: dict[str, Any]) -> None:
        from tensorboard.summary import Writer

        self.writer = Writer(str(folder / "tensorboard"))

    def send(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandbLogger(EventLogger):
    """A Weights & Biases run named as the folder, in project mlx_transformer; WANDB_MODE=offline keeps it in FOLDER."""

    def open(self, folder: Path, settings: dict[str, Any]) -> None:
        import wandb

        quiet = wandb.Settings(console="off", silent=True)
        try:
            self.run = wandb.init(
                project="mlx_transformer", name=folder.name, dir=str(folder), config=settings, settings=quiet
            )
        except wandb.Error as error:  # no account, no connection
            reason = str(error).rstrip(".")
            raise BadInput(f"--log wandb: {reason}; or set WANDB_MODE=offline, which needs no account") from error
        self.run.define_metric("*", step_metric="step")

    def send(self, step: int, figures: dict[str, float]) -> None:
        self.run.log({"step": step, **figures})

    def close(self) -> None:
        self.run.finish()


LOGGERS: dict[str, type[EventLogger]] = {"tensorboard": TensorBoardLogger, "wandb": WandbLogger}


def check_loggers(names: tuple[str, ...]) -> None:
    """Check --log before a run begins. Raises BadInput for an unknown name or a package that is not installed."""
    for name in names:
        if name not in LOGGERS:
            raise BadInput(f"--log {name!r}: expected one of {', '.join(LOGGERS)}")
        if find_spec(name) is None:  # the package, and the extra that brings it, have the flag's name
            raise BadInput(f"--log {name}: {name} is not installed; pip install 'mlx-transformer[{name}]'")


def open_loggers(names: tuple[str, ...], folder: Path, settings: dict[str, Any], log_every: int) -> list[EventLogger]:
    """Open the adapters of --log; log_every: steps between two lines, as in curve.jsonl."""
    return [LOGGERS[name](folder, settings, log_every) for name in dict.fromkeys(names)]
