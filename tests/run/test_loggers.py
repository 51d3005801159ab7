"""--log: the adapters record what the event stream says."""

import time
from pathlib import Path

import pytest

from mlx_transformer.run import loggers
from mlx_transformer.train.trainer import Eval, Saved, Step
from mlx_transformer.utils.errors import BadInput

EVENTS = [
    Step(
        step=step,
        tokens=10 * step,
        epochs=0.1 * step,
        seconds=0.5 * step,
        metrics={"loss": 5.0 - step},
        learning_rate=0.1,
        gradient_norm=2.0,
        tokens_per_second=20.0,
        data_wait_share=0.0,
    )
    for step in (1, 2, 3, 4)
] + [Eval(step=4, tokens=40, seconds=2.0, valid_loss=1.5, improved=True), Saved(step=4, path=Path("x"))]


def record(name, folder, log_every=2):
    (logger,) = loggers.open_loggers((name,), folder, {"config": {"d_ff": 8}}, log_every)
    for event in EVENTS:
        logger.write(event)
    logger.close()


def test_tensorboard_reads_back_what_was_written(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    record("tensorboard", tmp_path)
    found = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    values = {
        tag: [(one.step, one.tensor_proto.float_val[0]) for one in found.Tensors(tag)]
        for tag in ("train/loss", "valid/loss", "progress/tokens")
    }
    assert values["train/loss"] == [(2, 3.0), (4, 1.0)]
    assert values["valid/loss"] == [(4, 1.5)]
    assert values["progress/tokens"] == [(2, 20.0), (4, 40.0), (4, 40.0)]


def test_wandb_writes_offline_into_the_run_folder(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    record("wandb", tmp_path)
    (data,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 20  # its own process writes the file, a moment after finish() returns
    while b"valid/loss" not in data.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert b"valid/loss" in data.read_bytes()
    assert b"train/gradient_norm" in data.read_bytes()


def test_wandb_without_an_account_is_one_sentence(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def refuse(**settings):
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(BadInput, match=r"--log wandb: No API key .* log in; or set WANDB_MODE=offline"):
        loggers.open_loggers(("wandb",), tmp_path, {}, 1)


def test_a_logger_that_is_not_installed_is_one_sentence(monkeypatch):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match="wandb is not installed; pip install"):
        loggers.check_loggers(("wandb",))
    with pytest.raises(BadInput, match="expected one of tensorboard, wandb"):
        loggers.check_loggers(("mlflow",))
