"""Shared fixtures: the repository on sys.path, caches apart from the user's, a fixed seed, MLX's default device."""

import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault(
    "MLX_TRANSFORMER_CACHE", str(Path(tempfile.gettempdir()) / f"mlx_transformer_tests_{os.getuid()}")
)

os.environ["MLX_ENABLE_TF32"] = "0"  # else M5 and CUDA round the inputs of float32 matmuls to 10 bits of mantissa
os.environ["MATPLOTLIBRC"] = str(ROOT / "tests" / "matplotlibrc")  # settings that no picture may take over

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores

import hypothesis  # noqa: E402
import pytest  # noqa: E402

import mlx_transformer  # noqa: E402, F401 - the runtime is prepared before anything imports mlx.core

# isort: split
import mlx.core as mx  # noqa: E402

from mlx_transformer.backend import prepare  # noqa: E402
from mlx_transformer.run import training  # noqa: E402
from tests.faults.runs import TINY, write_text  # noqa: E402

DEVICE = mx.default_device()  # a GPU where there is one
SHARED = ROOT.parent / "shared" / "data"
hypothesis.settings.register_profile("here", deadline=None)  # no test fails because a machine is busy
hypothesis.settings.load_profile("here")


@pytest.fixture(autouse=True)
def _seeded():
    mx.random.seed(0)


@pytest.fixture(autouse=True)
def _default_device():
    """Give every test the default device that MLX chose, which commands and other tests change."""
    mx.set_default_device(DEVICE)  # a fixture of a module may have changed it
    yield
    mx.set_default_device(DEVICE)


@pytest.fixture
def on_cpu():
    """Compute on the CPU: for what only the CPU does, and for runs that must be equal bit for bit."""
    mx.set_default_device(mx.cpu)


@pytest.fixture
def two_threads():
    """Divide matrix products and our own operations over two threads."""
    blas = prepare().blas
    blas.set_threads(2)
    yield
    blas.set_threads(prepare().threads)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A small text of random words."""
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def tiny(text):
    """Flags of a tiny run of 3 steps."""
    return [*TINY, "--data", text, "--max-steps", 3]


@pytest.fixture(scope="module")
def no_pictures():
    """Draw no picture of a run: each takes half a second, and tests/run draws them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("draw_loss", "draw_lengths"):
            patch.setattr(training, name, lambda path, *_: path.touch())
        yield


@pytest.fixture
def shared_data():
    """Folder with real texts beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("the folder ../shared/data is not beside this checkout")
    return SHARED
