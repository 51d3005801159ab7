"""A run that is killed at any moment and resumed ends byte for byte as one that was not."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from mlx_transformer.run import console
from mlx_transformer.run.flags import parse
from mlx_transformer.run.folder import write_settings
from mlx_transformer.run.ladder import Experiment
from mlx_transformer.run.plan import make_plan
from mlx_transformer.run.settings import settings_type
from mlx_transformer.train.checkpoint import load_newest
from mlx_transformer.train.trainer import Saved, Step
from tests.faults.runs import (
    ON_CPU,
    assert_bad,
    assert_same_run,
    count_disk_operations,
    result,
    spawn,
    train,
    train_and_die,
)

FORMS = {"compiled": [], "eager": ["--no-compile"]}


@pytest.fixture(scope="module")
def tiny(text):
    """Dropout on; evaluations and checkpoints that sometimes fall together."""
    return [*ON_CPU, "--data", text, "--quiet", "--max-steps", 24, "--eval-every", 7, "--save-every", 5]


@pytest.fixture(scope="module", params=FORMS.values(), ids=FORMS)
def whole(request, tiny, tmp_path_factory):
    """Flags and folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    flags = [*tiny, *request.param]
    assert train(*flags, "--out", folder).code == 0
    return flags, folder


def go_on(flags, folder):
    """Return the flags that resume a killed run, or start it where it was killed before it wrote its settings."""
    return ["--resume", folder, "--quiet"] if (folder / "settings.json").exists() else [*flags, "--out", folder]


def assert_nothing_damaged(folder):
    found = load_newest(folder / "checkpoints")
    assert found is None or found[2] == []


def kill_again_and_again(flags, folder, kills, operations, seed):
    """Kill at random disk operations and, every third time, at a random moment."""
    draw = random.Random(seed)
    for n in range(kills):
        if n % 3 == 2:
            process = spawn(*go_on(flags, folder))
            time.sleep(draw.uniform(0.5, 2))
            process.kill()
            process.communicate()
        else:
            train_and_die("", draw.randrange(1, operations), *go_on(flags, folder))
        assert_nothing_damaged(folder)


def test_killed_at_random_and_resumed(whole, tmp_path):
    flags, reference = whole
    kill_again_and_again(flags, tmp_path / "run", 3, 150, seed=len(flags))
    assert train(*go_on(flags, tmp_path / "run")).code == 0
    assert_same_run(tmp_path / "run", reference)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_nano_killed_twenty_times_and_resumed(form, text, tmp_path):
    flags = [
        "--size",
        "nano",
        "--data",
        text,
        "--quiet",
        "--max-steps",
        60,
        "--eval-every",
        13,
        "--save-every",
        2,
        *form,
    ]
    operations = count_disk_operations(*flags, "--out", tmp_path / "whole")
    kill_again_and_again(flags, tmp_path / "run", 20, operations // 3, seed=0)
    assert train(*go_on(flags, tmp_path / "run")).code == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


MOMENTS = {
    "before the first checkpoint": ("open .*curve.jsonl", 2),
    "between save and rename": (r"os.rename .*step_00000010.tmp ", 1),
    "behind the last checkpoint": (r"open .*stories.md", 1),
}
MORE_MOMENTS = {
    "while it saves": (r"open .*step_00000010.tmp/.sums", 1),
    "while it drops the oldest": ("os.remove sums.json", 1),
    "while it writes the weights": (r"os.rename .*model.safetensors", 1),
    "before result.json": (r"os.rename .*result.json", 1),
}


@pytest.mark.parametrize(
    ("pattern", "nth"),
    [pytest.param(*moment, id=name) for name, moment in MOMENTS.items()]
    + [pytest.param(*moment, id=name, marks=pytest.mark.slow) for name, moment in MORE_MOMENTS.items()],
)
def test_killed_at_a_chosen_disk_operation(pattern, nth, tiny, whole_compiled, tmp_path):
    folder = tmp_path / "run"
    assert train_and_die(pattern, nth, *tiny, "--out", folder) == -signal.SIGKILL
    assert not (folder / "result.json").exists()
    assert_nothing_damaged(folder)
    assert (load_newest(folder / "checkpoints") is None) == (pattern == MOMENTS["before the first checkpoint"][0])
    assert train("--resume", folder, "--quiet").code == 0
    assert_same_run(folder, whole_compiled)
    assert not list(folder.rglob("*.tmp")), "a killed process's temporary files stay for ever"


@pytest.fixture(scope="module")
def whole_compiled(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled") / "run"
    assert train(*tiny, "--out", folder).code == 0
    return folder


@pytest.fixture(scope="module")
def plateau(text, tmp_path_factory):
    """Flags and folder of a run that stops on a plateau at its sixth evaluation."""
    folder = tmp_path_factory.mktemp("plateau") / "run"
    flags = [*ON_CPU, "--data", text, "--quiet", "--learning-rate", "1e-9", "--max-steps", 99, "--eval-every", 2]
    assert train(*flags, "--out", folder).code == 0
    assert (result(folder)["stopped"], result(folder)["steps"]) == ("plateau", 12)
    return flags, folder


@pytest.mark.parametrize(
    "pattern", ["os.rename .*step_00000012.tmp ", pytest.param("open .*stories.md", marks=pytest.mark.slow)]
)
def test_killed_while_it_stops_on_a_plateau(pattern, plateau, tmp_path):
    flags, reference = plateau
    assert train_and_die(pattern, 1, *flags, "--out", tmp_path / "run") == -signal.SIGKILL
    assert train("--resume", tmp_path / "run", "--quiet").code == 0
    assert_same_run(tmp_path / "run", reference)


@pytest.mark.parametrize("step", [14, 16], ids=["at an evaluation", "between two"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminate"])
def test_a_signal_saves_and_prints_the_command_that_resumes(number, step, tiny, whole_compiled, tmp_path, monkeypatch):
    folder, show = tmp_path / "a run", console.Console.show

    def signalled(self, event, *args):
        show(self, event, *args)
        if isinstance(event, Step) and event.step == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(console.Console, "show", signalled)
    ended = train(*tiny, "--out", folder)
    assert ended.code == 130
    assert ended.err == f"saved; resume with: python -m phases.phase1 --resume '{folder}'\n"
    assert (result(folder)["stopped"], result(folder)["steps"]) == ("interrupted", step)
    monkeypatch.undo()
    assert train("--resume", folder, "--quiet").code == 0
    assert_same_run(folder, whole_compiled)


@pytest.mark.parametrize("begun", [False, True], ids=["still importing", "begun"])
def test_a_signal_before_there_is_a_run_leaves_no_traceback(begun):
    lines = ["import os, signal, sys", "sys.argv[0] = '-m'"]
    lines += ["signal.signal(signal.SIGINT, signal.default_int_handler)"]  # a shell may have had it ignored
    lines += ["import mlx_transformer"]
    lines += [
        "from mlx_transformer.utils.errors import exit_cleanly",
        "def stop(): os.kill(os.getpid(), signal.SIGINT)",
    ]
    lines += ["exit_cleanly(stop)" if begun else "stop()"]
    ended = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == ((130, "interrupted\n") if begun else (-signal.SIGINT, ""))


@pytest.mark.parametrize(("end", "is_command"), [("mt.main(__name__)", True), ("mt.load", False)])
def test_a_signal_during_the_first_import_of_a_file_of_one_s_own(end, is_command, tmp_path):
    """A file with a command line leaves no traceback; another program keeps its KeyboardInterrupt."""
    lines = ["import os, signal, sys", "signal.signal(signal.SIGINT, signal.default_int_handler)"]
    lines += ["class Stop:", "    def find_spec(self, name, *_):"]
    lines += ["        if name == 'mlx_transformer.backend': os.kill(os.getpid(), signal.SIGINT)"]
    lines += ["sys.meta_path.insert(0, Stop())", "import mlx_transformer as mt", end]
    (tmp_path / "idea.py").write_text("\n".join(lines))
    ended = subprocess.run([sys.executable, tmp_path / "idea.py"], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGINT
    assert ended.stderr.count("Traceback") == (not is_command)


def test_a_second_signal_does_not_wait(tiny, whole_compiled, tmp_path, monkeypatch):
    folder, show = tmp_path / "run", console.Console.show

    def signalled(self, event, *args):
        show(self, event, *args)
        if isinstance(event, Step) and event.step == 16:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(console.Console, "show", signalled)
    ended = train(*tiny, "--out", folder)
    assert ended.code == 130
    assert ended.err.endswith(f"resume with: python -m phases.phase1 --resume {folder}\n")
    assert ended.err.count("\n") == 1
    monkeypatch.undo()
    assert train("--resume", folder, "--quiet").code == 0
    assert_same_run(folder, whole_compiled)


def test_a_signal_while_the_results_are_written(tiny, whole_compiled, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setattr("mlx_transformer.run.training.write_report", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    ended = train(*tiny, "--out", folder)
    assert ended.code == 130
    assert f"--resume {folder}\n" in ended.err
    monkeypatch.undo()
    assert train("--resume", folder, "--quiet").code == 0
    assert_same_run(folder, whole_compiled)


def test_a_signal_to_a_real_process(tiny, tmp_path):
    folder = tmp_path / "run"
    process = spawn(*tiny[:-6], "--max-seconds", 60, "--eval-every", 5, "--out", folder)
    deadline = time.monotonic() + 60
    while not (folder / "curve.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == f"saved; resume with: python -m phases.phase1 --resume {folder}\n"
    assert_nothing_damaged(folder)


@pytest.mark.parametrize("limits", [(14,), (3, 8, 9)], ids=["at an evaluation", "between evaluations"])
def test_resumed_with_a_larger_limit(limits, tiny, whole_compiled, tmp_path):
    """A run that stopped at limits resumes as if it had not stopped."""
    folder = tmp_path / "run"
    for limit in limits:
        start = ["--resume", folder, "--quiet"] if folder.exists() else [*tiny, "--out", folder]
        assert train(*start, "--max-steps", limit).code == 0
        assert result(folder)["final_valid_loss"] is not None
    assert train("--resume", folder, "--max-steps", 24, "--quiet").code == 0
    assert_same_run(folder, whole_compiled)


def test_a_resumed_run_keeps_the_limits_that_are_not_replaced(tiny, tmp_path):
    """A new limit replaces the old one but not the target, and a new target not the limit."""
    folder = tmp_path / "run"
    assert train(*tiny, "--max-steps", 2, "--target-loss", 0.01, "--out", folder).code == 0
    assert train("--resume", folder, "--max-tokens", 300, "--quiet").code == 0
    assert (result(folder)["target_loss"], result(folder)["stopped"]) == (0.01, "max_tokens")
    (folder / "result.json").unlink()
    assert train("--resume", folder, "--target-loss", 0.02, "--quiet").code == 0
    assert (result(folder)["target_loss"], result(folder)["stopped"]) == (0.02, "max_tokens")


def everything(folder):
    """Each file below a folder: its content and when it was written."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize(
    ("further", "flag"),
    [
        ((), "--max-steps"),
        (("--max-steps", 10), "--max-steps"),
        (("--max-tokens", 72), "--max-tokens"),
        (("--target-loss", 0.1), "--max-steps"),
    ],
    ids=["the same limit", "a smaller limit", "another limit", "a target not reached"],
)
def test_a_resume_with_nothing_to_do_changes_nothing(further, flag, whole_compiled):
    before = everything(whole_compiled)
    ended = train("--resume", whole_compiled, *further)
    assert (ended.code, ended.err) == (0, "")
    assert f"nothing to do: the limit was reached at step 24; give a larger {flag}" in ended.out
    assert everything(whole_compiled) == before


def test_resuming_what_ended_by_itself_changes_nothing(plateau):
    _, folder = plateau
    before = everything(folder)
    ended = train("--resume", folder, "--max-steps", 1000)
    assert (ended.code, ended.err) == (0, "")
    assert "nothing to do: the run ended on a plateau or with its schedule at step 12" in ended.out
    assert everything(folder) == before


def test_a_target_that_was_reached_ends_a_run_until_a_lower_one_is_given(tiny, tmp_path):
    folder = tmp_path / "run"
    assert train(*tiny, "--target-loss", 100, "--out", folder).code == 0
    assert (result(folder)["stopped"], result(folder)["steps"]) == ("target", 7)
    before = everything(folder)
    ended = train("--resume", folder)
    assert "nothing to do: the target loss was reached at step 7; give a lower --target-loss" in ended.out
    assert everything(folder) == before
    assert train("--resume", folder, "--target-loss", 0.1, "--max-steps", 9).code == 0
    assert (result(folder)["stopped"], result(folder)["steps"]) == ("max_steps", 9)


def test_an_unfinished_run_that_lost_its_checkpoints(tiny, tmp_path, monkeypatch):
    """Killed before its first checkpoint it starts again and says so; saved and then without them it is refused."""
    folder = tmp_path / "run"
    assert train_and_die(*MOMENTS["before the first checkpoint"], *tiny, "--out", folder) == -signal.SIGKILL
    ended = train("--resume", folder, "--max-steps", 2)
    assert f"'{folder}' has no checkpoint yet: starting again from step 0" in ended.out
    interrupted = json.loads((folder / "result.json").read_text()) | {"stopped": "interrupted"}
    (folder / "result.json").write_text(json.dumps(interrupted))
    shutil.rmtree(folder / "checkpoints")
    before = everything(folder)
    assert_bad(train("--resume", folder), "without its checkpoints", f"--init-from {folder}")
    assert everything(folder) == before


def test_saving_more_often_changes_nothing(tiny, whole_compiled, tmp_path, monkeypatch):
    saved, show = [], console.Console.show

    def counted(self, event, *args):
        show(self, event, *args)
        saved.extend([event.step] if isinstance(event, Saved) else [])

    monkeypatch.setattr(console.Console, "show", counted)
    assert train(*tiny, "--save-every", 1, "--out", tmp_path / "run").code == 0
    assert saved == list(range(1, 25))
    assert_same_run(tmp_path / "run", whole_compiled)


def test_a_folder_with_settings_alone_is_trained_from_its_first_step(tiny, whole_compiled, tmp_path):
    experiment = Experiment.of_phase(1)
    settings = parse(settings_type(experiment), "p", args=[str(flag) for flag in tiny])
    write_settings(tmp_path / "run", make_plan(experiment, settings, lambda text: None))
    assert train("--resume", tmp_path / "run", "--quiet").code == 0
    assert_same_run(tmp_path / "run", whole_compiled)
