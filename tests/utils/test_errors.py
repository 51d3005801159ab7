"""Missing memory, as every library reports it: one sentence and exit code 1, wherever it runs out."""

import errno

import pytest

from bench.workers.process import WorkerFailed
from mlx_transformer.nn.model import Model
from mlx_transformer.run.commands import evaluate as evaluate_command
from mlx_transformer.run.commands import generate as generate_command
from mlx_transformer.train import checkpoint, trainer
from mlx_transformer.utils.errors import RunFailed, exit_cleanly, is_out_of_memory
from tests.faults.runs import TINY, command, train

METAL = (
    "[METAL] Command buffer execution failed: Insufficient Memory "
    "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)."
)
MESSAGES = [
    METAL,
    "[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum allowed buffer size of 8 bytes.",
    "[metal::malloc] Resource limit (499000) exceeded.",
    "[malloc] Unable to allocate 8 bytes.",
    "cudaMallocAsync(&data, size, stream) failed: out of memory",
    "cudaGraphInstantiate(&handle_, graph, nullptr, nullptr, 0) failed: cudaErrorMemoryAllocation",
    "CUDA out of memory. Tried to allocate 2.00 GiB.",
    "MPS backend out of memory (MPS allocated: 9 GB)",
    "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory",
    "OpenBLAS error: Memory allocation still failed after 10 retries, giving up.",
    "std::bad_alloc",
]
OTHERS = [
    "[matmul] Last dimension of first input",
    "cudaGraphLaunch failed: an illegal memory access was encountered",
    "[METAL] Command buffer execution failed: Caused GPU Timeout Error",
    "[load_safetensors] Failed to open file",
]


@pytest.mark.parametrize("message", MESSAGES)
def test_missing_memory_is_recognized(message):
    assert is_out_of_memory(RuntimeError(message))
    assert is_out_of_memory(f"RuntimeError: {message}")


def test_so_are_python_s_own_errors_and_no_other_message():
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory("MemoryError")
    assert is_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert not is_out_of_memory(OSError(errno.ENOSPC, "No space left on device"))
    assert not is_out_of_memory(ValueError(METAL))
    assert not any(is_out_of_memory(RuntimeError(message)) for message in OTHERS)


def full(*args, **kwargs):
    raise RuntimeError(METAL)


def assert_explained(outcome, *words):
    assert outcome.code == 1
    (line,) = outcome.err.splitlines()
    assert line.startswith("error: out of memory ([METAL] Command buffer execution failed: Insufficient Memory")
    assert all(word in line for word in ("try ", *words))


@pytest.mark.parametrize("part", ["TrainingStep.__call__", "Evaluator.__call__"])
def test_a_run(text, tmp_path, monkeypatch, part):
    monkeypatch.setattr(f"{trainer.__name__}.{part}", full)
    flags = [*TINY, "--data", text, "--max-steps", 3, "--quiet", "--out", tmp_path / "run"]
    assert_explained(train(*flags), "--batch-size", "--seq-len")


def test_a_checkpoint_that_does_not_fit_is_not_called_damaged(tmp_path, monkeypatch):
    checkpoint.save_checkpoint(tmp_path, 1, {}, {})
    monkeypatch.setattr(checkpoint.mx, "load", full)
    with pytest.raises(RuntimeError, match="Insufficient Memory"):
        checkpoint.load_newest(tmp_path)


def test_nor_is_a_disk_that_is_not_full(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "save_arrays", full)
    with pytest.raises(RuntimeError, match="Insufficient Memory"):
        checkpoint.save_checkpoint(tmp_path, 1, {}, {})


@pytest.mark.parametrize(
    ("module", "function", "line", "word"),
    [
        (generate_command, "complete", ["run", "--prompt", "a"], "--max-tokens"),
        (evaluate_command, "evaluate", ["run", "--data", "text.txt"], "--device cpu"),
    ],
)
def test_generate_and_evaluate(monkeypatch, module, function, line, word):
    monkeypatch.setattr(module, "load_model", lambda *_: (Model, None))
    monkeypatch.setattr(module, function, full)
    assert_explained(command(lambda: exit_cleanly(module.main), *line), word)


def test_any_other_command():
    assert_explained(command(lambda: exit_cleanly(full)), "--batch-size")


def test_a_worker_of_the_bench():
    assert "try a smaller --batch-size" in str(WorkerFailed("mlx", 1, f"RuntimeError: {METAL}"))
    assert "try" not in str(WorkerFailed("mlx", 1, "ValueError: no"))
    assert issubclass(WorkerFailed, RunFailed), "exit code 1"
