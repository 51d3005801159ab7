"""The notebooks run from end to end on a small run and a comparison, and each .py has its .ipynb."""

import asyncio
import contextlib
import json
import os
import re

import pytest

from tests.bench.compare.compare_logs import a_log
from tests.faults.runs import ROOT, TINY, train, write_text

NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("*.py"))
PICTURES = {"attention": 4, "curves": 4, "ladder": 4, "train": 3, "translation": 3}
WHY = "{} is not installed: make test installs it"


@pytest.fixture(scope="module")
def looked_at(tmp_path_factory):
    """A run of a few steps, and a comparison of two such runs."""
    folder = tmp_path_factory.mktemp("notebooks")
    text = write_text(folder / "text.txt")
    for seed in (0, 1):
        out = folder / f"seed{seed}"
        outcome = train(*TINY, "--data", text, "--seed", seed, "--max-steps", 20, "--eval-every", 4, "--out", out)
        assert outcome.code == 0, outcome.err
    pairs = folder / "pairs.tsv"
    pairs.write_text("".join(f"one {i}\t{i} un\n" for i in range(100)))
    flags = ["--branch", "translator", "--vocab-size", 270, "--max-steps", 5]
    outcome = train(*TINY, *flags, "--data", pairs, "--out", folder / "translator")
    assert outcome.code == 0, outcome.err
    runs = [compared(folder / f"seed{seed}", seed) for seed in (0, 1)]
    log = a_log({"phase 1": (2, 1e4, None), "phase 2": (2, 1e4, (2.0, 1.5, 2.5))}, seeds=2)
    log["runs"] = [{**run, "name": name} for name in ("phase 1", "phase 2") for run in runs]
    (folder / "compare.json").write_text(json.dumps(log))
    return folder


def compared(folder, seed):
    """A run as compare.json holds it."""
    lines = map(json.loads, (folder / "curve.jsonl").read_text().splitlines())
    evals = [{key: line[key] for key in ("tokens", "seconds", "valid_loss")} for line in lines if "valid_loss" in line]
    ran = {"phase": 1, "branch": None, "recipe": "default", "backend": "mlx", "seed": seed}
    ran |= {"status": "done", "error": None}
    return {**ran, "evals": evals, "result": json.loads((folder / "result.json").read_text())}


@pytest.fixture(scope="module")
def executed(looked_at, tmp_path_factory):
    """The outputs of each notebook and, as "nothing", of one that has nothing to look at; all at once, in kernels."""
    nbclient = pytest.importorskip("nbclient", reason=WHY.format("nbclient"))
    nbformat = pytest.importorskip("nbformat", reason=WHY.format("nbformat"))
    pytest.importorskip("ipykernel", reason=WHY.format("ipykernel"))
    kernels = tmp_path_factory.mktemp("kernels")

    async def execute(name, run):
        notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
        chosen = {"MLX_TRANSFORMER_RUN": str(run), "MLX_TRANSFORMER_COMPARISON": str(looked_at / "compare.json")}
        chosen |= {"MLX_TRANSFORMER_TRANSLATOR": str(looked_at / "translator"), "MLX_TRANSFORMER_SECONDS": "0.5"}
        chosen["MLX_TRANSFORMER_DATA"] = str(looked_at / "text.txt")
        environment = {**os.environ, **chosen, "IPYTHONDIR": str(kernels), "PYTHONPATH": str(ROOT)}
        client = nbclient.NotebookClient(notebook, kernel_name="python3", timeout=120)
        with contextlib.suppress(nbclient.exceptions.CellExecutionError):  # it is among the outputs
            await client.async_execute(env=environment)
        return [output for cell in notebook.cells for output in cell.get("outputs", ())]

    async def all_of_them():
        names = [*((name, looked_at / "seed0") for name in NAMES), ("attention", kernels)]
        return await asyncio.gather(*(execute(*name) for name in names))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_RUNTIME_DIR", str(kernels))
        return dict(zip([*NAMES, "nothing"], asyncio.run(all_of_them()), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_and_draws(name, executed):
    assert [one for one in executed[name] if one.output_type == "error"] == []
    assert "mlx.core was imported before" not in str(executed[name])
    assert sum("image/png" in output.get("data", {}) for output in executed[name]) == PICTURES[name]
    assert "seed0" in str(executed[name]) or name in ("ladder", "train", "translation")


def test_where_there_is_nothing_to_look_at_one_sentence_says_so(executed):
    (error,) = [output for output in executed["nothing"] if output.output_type == "error"]
    (sentence,) = error["traceback"]
    assert re.fullmatch(r"error: '.*' has no model/config\.json: expected the folder of a finished run", sentence)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_and_its_script_are_in_step(name):
    jupytext = pytest.importorskip("jupytext", reason=WHY.format("jupytext"))
    pair = [jupytext.read(ROOT / "notebooks" / f"{name}.{ext}") for ext in ("py", "ipynb")]
    script, notebook = ([(cell.cell_type, cell.source) for cell in one.cells] for one in pair)
    assert script == notebook, f"run: jupytext --to ipynb notebooks/{name}.py"
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in pair[1].cells), "outputs were saved"


def test_every_notebook_has_a_script():
    assert sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")) == NAMES
