"""What happens before MLX is imported: most of it needs a process of its own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_transformer.backend import blas, cache_dir, device, info, jit, native, runtime
from mlx_transformer.utils.errors import BadInput

linux = pytest.mark.skipif(sys.platform != "linux" or native.compiler() is None, reason="needs Linux and g++")

STEP = """
import mlx.core as mx, mlx.nn as nn, mlx.optimizers as optim
model, optimizer = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)), optim.SGD(1e-1)
state = [model.state, optimizer.state]
def loss(model, x): return model(x).square().mean()
def step(x):
    value, gradients = nn.value_and_grad(model, loss)(model, x)
    optimizer.update(model, gradients)
    return value
step = mx.compile(step, inputs=state, outputs=state)
x = mx.random.normal((32, 8))
values = [step(x).item() for _ in range(5)]
assert values[-1] < values[0], values
"""
PREPARED = """
import json, os
from mlx_transformer.backend import runtime
prepared = runtime.prepare()
found = {"blas": prepared.blas and prepared.blas.name, "threads": prepared.threads, "allocator": prepared.allocator,
         "kernels": prepared.kernels and prepared.kernels.count, "warned": prepared.warned,
         "reached": bool(prepared.blas) and prepared.blas.is_used(),
         "environment": {name: os.environ.get(name) for name in ("PATH", "TMPDIR", "MLX_BFS_MAX_WIDTH")}}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Iterator[Path]:
    """A cache that the tests of this file fill and share; a precompiled header is too big to be left behind."""
    folder = tmp_path_factory.mktemp("cache")
    yield folder
    shutil.rmtree(folder)


def start(code: str, cache: Path, **settings: str) -> subprocess.Popen:
    unset = ("MLX_TRANSFORMER_PLAIN", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MLX_BFS_MAX_WIDTH")
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    inherited["PATH"] = os.pathsep.join(native.search_path())
    environment = inherited | {"MLX_TRANSFORMER_CACHE": str(cache)} | settings
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=pipe, stderr=pipe, text=True)


def run(code: str, cache: Path, **settings: str) -> tuple[dict, str]:
    """The JSON line that `code` prints, and its stderr."""
    process = start(code, cache, **settings)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1]) if out else {}, err


def kernel_files(cache: Path) -> list[Path]:
    return sorted(cache.glob("jit/*/mlx/*/cpu/lib*.so"))


@linux
def test_matmul_goes_through_a_real_blas_and_kernels_into_our_cache(cache):
    first, err = run("import mlx_transformer" + STEP + PREPARED, cache, TMPDIR="/dev/shm")
    assert first["reached"]
    assert first["allocator"]
    assert first["warned"] == []
    assert "Warning" not in err
    assert first["environment"]["TMPDIR"] == "/dev/shm"
    assert first["threads"] == native.physical_cores()
    assert first["kernels"] == len(kernel_files(cache)) > 0
    assert not Path("/dev/shm/mlx").exists()

    times = {path: path.stat().st_mtime_ns for path in kernel_files(cache)}
    second, _ = run("import mlx_transformer" + STEP + PREPARED, cache, OMP_NUM_THREADS="1")
    assert second["threads"] == 1
    assert {path: path.stat().st_mtime_ns for path in kernel_files(cache)} == times  # nothing was compiled again


@linux
def test_more_threads_than_cpus_are_one_warning(cache):
    found, err = run("import mlx_transformer" + PREPARED, cache, OMP_NUM_THREADS="1000")
    present = len(os.sched_getaffinity(0))
    assert found["threads"] == present
    assert found["warned"] == [f"OMP_NUM_THREADS=1000 is more than the CPUs here: {present} threads are used."]
    assert err.count("OMP_NUM_THREADS") == 1


@linux
def test_kernels_are_made_for_this_cpu_with_a_precompiled_header(cache):
    """Our g++ adds both where it compiles into the cache, and is g++ unchanged elsewhere."""
    run("import mlx_transformer" + STEP, cache)
    wrapper = next(cache.glob(f"jit/*/{native.WRAPPER_FOLDER}/g++"))
    kernels = wrapper.parents[1] / "mlx"
    source = next(kernels.glob("*/cpu/*.cpp"))
    include = Path(mx.__file__).parent / "include"

    def compile_into(folder: Path) -> str:
        command = [wrapper, *jit.MLX_FLAGS.split(), "-v", "-H", "-I", include, source, "-o", folder / "x"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr

    assert "\n! " in (inside := compile_into(kernels))  # -H marks a precompiled header in use so
    assert "-march=native" in inside
    assert "-march=native" not in compile_into(wrapper.parents[2])


@linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_kernel_is_compiled_to_its_end_whatever_signal_ends_the_program(number, tmp_path):
    output, compiler, wrapper = tmp_path / "mlx" / "kernel.so", tmp_path / "compiler", tmp_path / "g++"
    compiler.write_text('#!/bin/sh\nfor output; do :; done\ntouch "$output.begun"\nsleep 0.3\ntouch "$output"\n')
    wrapper.write_text(jit.WRAPPER.format(folder=tmp_path, gxx=compiler, flags=""))
    output.parent.mkdir()
    for script in (compiler, wrapper):
        script.chmod(0o700)
    with subprocess.Popen([wrapper, "-o", output], start_new_session=True) as process:
        while not output.with_suffix(".so.begun").exists():
            time.sleep(0.01)
        os.killpg(process.pid, number)
    assert process.returncode == 0
    assert output.exists()


@linux
def test_plain_changes_nothing(cache):
    found, _ = run(PREPARED, cache, MLX_TRANSFORMER_PLAIN="1")
    assert (found["blas"], found["kernels"], found["allocator"], found["warned"]) == (None, None, False, [])
    assert native.WRAPPER_FOLDER not in found["environment"]["PATH"]
    assert found["environment"]["MLX_BFS_MAX_WIDTH"] is None


@linux
def test_after_mlx_core_it_works_and_says_what_was_lost(cache):
    found, err = run(
        "import mlx.core as mx\n" + PREPARED + "assert (mx.ones((4, 4)) @ mx.ones((4, 4))).sum() == 64", cache
    )
    assert len(found["warned"]) == err.count("RuntimeWarning") == 1
    assert "before mlx_transformer" in err
    assert runtime.SLOW in err
    assert found["blas"] is found["kernels"] is None


@linux
def test_a_library_cut_off_is_compiled_again(cache):
    run("import mlx_transformer" + STEP, cache)
    cut = kernel_files(cache)
    for number, path in enumerate(cut):
        os.truncate(path, path.stat().st_size * number // len(cut))
    assert not any(native.is_whole(path) for path in cut)
    run("import mlx_transformer" + STEP, cache)
    assert all(native.is_whole(path) for path in cut)


def test_old_leftovers_and_unused_keys_are_removed(tmp_path):
    kernels = tmp_path / "key" / "mlx"
    kernels.mkdir(parents=True)
    for name, hours in (("tmp_1.so", 2), ("tmp_2.so", 0), ("tmp_3.cpp", 2), ("kernel.cpp", 2)):
        (kernels / name).touch()
        os.utime(kernels / name, (time.time() - 3600 * hours,) * 2)
    jit._remove_damaged(kernels)
    assert sorted(path.name for path in kernels.iterdir()) == ["kernel.cpp", "tmp_2.so"]  # the young one may be in use
    (tmp_path / "old").mkdir()
    os.utime(tmp_path / "old", (time.time() - 31 * 24 * 3600,) * 2)
    jit._remove_unused(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


@linux
def test_two_processes_at_once_in_a_new_cache(tmp_path):
    both = [start("import mlx_transformer" + STEP + PREPARED, tmp_path) for _ in range(2)]
    for process in both:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert json.loads(out)["warned"] == []
    assert all(native.is_whole(path) for path in kernel_files(tmp_path))
    run("import mlx_transformer" + STEP, tmp_path)
    shutil.rmtree(tmp_path)


@linux
def test_killed_while_compiling_leaves_a_usable_cache(cache):
    run("import mlx_transformer", cache)
    many = """
import mlx_transformer, mlx.core as mx
for i in range(4):
    print(mx.compile(lambda x: x * x + mx.exp(x) * {seed} + i)(mx.arange(3.0))[0].item() == {seed} + i, flush=True)
"""
    for seed, delay in ((0.5, 0.0), (1.5, 0.1)):
        before = set(cache.glob("jit/*/mlx/*/cpu/*"))
        process = start(many.format(seed=seed), cache)
        while process.poll() is None and not set(cache.glob("jit/*/mlx/*/cpu/*")) - before:
            time.sleep(0.005)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        process = start(many.format(seed=seed), cache)
        out, err = process.communicate(timeout=120)
        assert out.split() == ["True"] * 4, err


@linux
def test_without_a_compiler_one_sentence_and_everything_runs(cache, tmp_path):
    nothing = tmp_path / "bin"
    nothing.mkdir()
    found, err = run(PREPARED + STEP, tmp_path / "new", PATH=str(nothing))
    assert found["blas"] is None
    assert len(found["warned"]) == err.count("RuntimeWarning") == 1
    assert "g++" in err
    assert runtime.SLOW in err
    run("import mlx_transformer", cache)
    found, err = run(PREPARED + STEP, cache, PATH=str(nothing))  # the shim was compiled when there was one
    assert found["reached"]
    assert err.count("RuntimeWarning") == 1
    assert runtime.SLOW not in err


@linux
def test_a_compiler_that_fails_turns_compile_off(tmp_path):
    broken = tmp_path / "bin" / "g++"
    broken.parent.mkdir()
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo "no header iostream" >&2; exit 1; }\n')
    broken.chmod(0o755)
    _, err = run("import mlx_transformer" + STEP, tmp_path, PATH=f"{broken.parent}:/usr/bin:/bin")
    assert "no header iostream" in err
    assert runtime.SLOW in err


FAULTS = {
    "is wrong": "c[0] *= 1.001f;",
    "is wrong by inf": "c[m * n - 1] = 0.0f / 0.0f;",
    "crashed with signal": "__builtin_trap();",
}


def faulty_blas(path: Path, fault: str) -> blas.Library:
    """A matmul that is right but for `fault`."""
    source = """
    extern "C" void cblas_sgemm(int, int ta, int tb, int m, int n, int k, float, const float* a, int lda,
                                const float* b, int ldb, float, float* c, int ldc) {
        for (int i = 0; i < m; ++i)
            for (int j = 0; j < n; ++j) {
                double sum = 0;
                for (int l = 0; l < k; ++l)
                    sum += (double)a[ta == 112 ? l * lda + i : i * lda + l] * b[tb == 112 ? j * ldb + l : l * ldb + j];
                c[i * ldc + j] = sum;
            }
        %s
    }"""
    native.compile_library(source % fault, path)
    return blas.Library("faulty", str(path))


@linux
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_blas_is_not_used(fault, tmp_path, monkeypatch):
    library = faulty_blas(tmp_path / "faulty.so", FAULTS[fault])
    monkeypatch.setattr(blas, "installed", lambda: [library])
    for _ in range(2):  # the second time from the file
        prepared = runtime.Prepared()
        with pytest.warns(RuntimeWarning) as warned:
            runtime._prepare_blas(prepared, tmp_path / "blas")
        assert prepared.blas is None
        assert fault in str(warned[0].message)
        assert runtime.SLOW in str(warned[1].message)
    assert len(list((tmp_path / "blas").glob("checks-*.json"))) == 1


@linux
def test_a_right_blas_passes_and_is_checked_again_when_it_changes(tmp_path):
    library = faulty_blas(tmp_path / "right.so", "")
    (result,) = blas.check_all([library], tmp_path, 1)
    assert result.fault == ""
    assert result.gflops > 0
    faulty_blas(tmp_path / "right.so", "c[0] += 1;")
    (result,) = blas.check_all([library], tmp_path, 1)
    assert "is wrong" in result.fault


def test_the_fastest_right_blas_wins_by_a_margin():
    first = blas.CheckResult(blas.Library("first", ""), "", 100.0)
    wrong, noise, better = (
        replace(first, fault="is wrong", gflops=900.0),
        replace(first, gflops=110.0),
        replace(first, gflops=150.0),
    )
    assert blas.fastest([first, wrong, noise]) is first
    assert blas.fastest([first, wrong, noise, better]) is better
    assert blas.fastest([wrong]) is None


def test_cache_dir_prefers_what_was_named_and_falls_back(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_TRANSFORMER_CACHE", str(tmp_path / "named"))
    assert cache_dir() == tmp_path / "named"
    assert (tmp_path / "named").is_dir()
    monkeypatch.delenv("MLX_TRANSFORMER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "mlx_transformer"
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # a folder cannot be made here, not even by root
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    assert cache_dir().parent == tmp_path
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "file"))
    with pytest.raises(BadInput, match="MLX_TRANSFORMER_CACHE"):
        cache_dir()


def test_nothing_happens_on_macos(monkeypatch):
    monkeypatch.setattr(runtime.sys, "platform", "darwin")
    monkeypatch.setattr(runtime, "_prepared", None)
    monkeypatch.setattr(runtime, "_prepare_linux", lambda prepared: pytest.fail("Linux only"))
    assert runtime.prepare() == runtime.Prepared()


@pytest.mark.parametrize(("backend", "expected"), [("mlx-cpu", runtime.SCHEDULER_WIDTH), ("mlx-cuda-12", None)])
def test_the_scheduler_looks_further_ahead_on_a_cpu_only(monkeypatch, backend, expected):
    """With CUDA it would only widen the memory of a step."""
    monkeypatch.setattr(runtime, "_installed_backends", lambda: [backend])
    monkeypatch.setattr(runtime, "_tune_allocator", lambda: False)
    monkeypatch.delenv("MLX_BFS_MAX_WIDTH", raising=False)
    with pytest.warns(RuntimeWarning, match="imported before"):
        runtime._prepare_linux(runtime.Prepared())
    assert os.environ.get("MLX_BFS_MAX_WIDTH") == expected


def test_prepare_is_done_once():
    assert runtime.prepare() is runtime.prepare()


def test_a_test_that_changes_the_default_device():
    mx.set_default_device(mx.Device(mx.cpu, 1))


def test_leaves_it_unchanged_for_the_next_test():
    assert mx.default_device() == mx.Device(mx.gpu if mx.is_available(mx.gpu) else mx.cpu)


def test_device():
    here = device.use_device("cpu")
    assert here == device.device_info()
    assert here.backend == "cpu"
    assert here.memory_bytes > 2**28
    assert here.name in here.describe()
    assert "GiB" in here.describe()
    with pytest.raises(BadInput, match="'tpu'"):
        device.use_device("tpu")
    if not mx.is_available(mx.gpu):
        with pytest.raises(BadInput, match="gpu"):
            device.use_device("gpu")
        assert mx.default_device() == mx.Device(mx.cpu)
        assert device.use_device("auto") == here


def test_memory_limits_of_apple_silicon_stay_within_the_recommendation():
    limits = {}

    class Metal:
        set_wired_limit = staticmethod(lambda size: limits.update(wired=size))
        set_cache_limit = staticmethod(lambda size: limits.update(cache=size))

    info = {"device_name": "Apple M1 Max", "memory_size": 34359738368, "max_recommended_working_set_size": 22906503168}
    assert device.configure_memory(Metal, info) == (limits["wired"], limits["cache"])
    assert 0 < limits["cache"] < limits["wired"] <= info["max_recommended_working_set_size"]


@pytest.mark.parametrize(
    ("backend", "architecture", "expected"),
    [
        ("metal", "applegpu_g13s", False),
        ("metal", "applegpu_g16s", False),
        ("metal", "applegpu_g17g", True),
        ("metal", "applegpu_g17p", False),
        ("metal", "applegpu_g18p", True),
        ("metal", "", False),
        ("cuda", "sm_90a", True),
    ],
)
def test_tf32_is_what_mlx_computes_in_unless_it_is_turned_off(backend, architecture, expected, monkeypatch):
    monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
    assert device.computes_in_tf32(backend, {"architecture": architecture}) == expected
    assert ("TF32" in device.Device("x", backend, 1, tf32=expected).describe()) == expected
    monkeypatch.setenv("MLX_ENABLE_TF32", "0")
    assert not device.computes_in_tf32(backend, {"architecture": architecture})


def test_versions():
    assert set(device.versions()) == {"mlx", "python", "project"}


def test_the_report_describes_the_device():
    assert device.device_info().describe() in "\n".join(info.report())


def test_what_needs_mlx_is_imported_on_first_use():
    code = "import sys; import mlx_transformer.backend as b; assert 'mlx.core' not in sys.modules; b.split([1, 2])"
    subprocess.run([sys.executable, "-c", code], check=True)
