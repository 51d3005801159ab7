"""What phases.show says of a phase is what the phase is."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from mlx_transformer.nn.attention import Attention, GroupedAttention
from mlx_transformer.nn.config import SIZES
from mlx_transformer.nn.feedforward import FeedForward
from mlx_transformer.utils.errors import exit_cleanly
from phases import phase1, show
from tests.faults.runs import assert_bad, command
from tests.ladder import PHASES, modules

CHOICES = [text for n, module in modules().items() for text in (str(n), *(f"{n}/{name}" for name in module.BRANCHES))]


class GQAConfig(phase1.Config):
    n_kv_heads: int = 1


class GQAModel(phase1.Model):
    """An idea as a test may have one."""

    Config = GQAConfig
    Mixer = GroupedAttention

    def make_final_norm(self):
        return self.make_norm()


def shown(*args):
    return command(lambda: exit_cleanly(show.main), *args)


def cells(text, row):
    """The cells behind a row's name."""
    line = next(line for line in text.splitlines() if re.match(rf"│ {re.escape(row)} +│", line))
    return [cell.strip() for cell in line.strip("│").split("│")[1:]]


def choice(kind, branch=None):
    """A class that no phase file holds, as if it were a branch of phase 1."""
    return show.Choice(1, branch, phase1, kind)


@pytest.mark.parametrize("text", CHOICES)
def test_every_phase_and_branch(text):
    sections = show.describe(show.Choice.read(text), "nano")
    model = show.Choice.read(text).kind
    net = model(model.Config(**SIZES["nano"]))
    assert sections["parameters"]["total"][2] == f"{net.count_parameters()['total']:,}"
    counted = [int(row[2].replace(",", "")) for name, row in sections["parameters"].items() if name != "total"]
    assert sum(counted) == net.count_parameters()["total"]
    assert set(sections["numbers"]) == set(net.config.to_dict())
    assert set(sections["slots"]) == {"Config", "Norm", "Position", "Head", "Mixer", "FFN", "Block"}
    assert {"build", "init_weight", "loss", "run_block"} < set(sections["hooks"])
    assert not {"Config", "label_smoothing"} & set(sections["hooks"])


@pytest.mark.parametrize("n", PHASES)
def test_the_command_line(n):
    ended = shown(n, "--size", "nano")
    assert (ended.code, ended.err) == (0, "")
    assert cells(ended.out, "n_heads") == ["4", "config.py", "yes"]
    assert cells(ended.out, "seq_len")[-1] in ("yes", "by training and decoding")
    assert cells(ended.out, "blocks.*.mixer.q_proj.weight")[:3] == ["(64, 64)", "2", "8,192"]
    assert cells(ended.out, "blocks.*.mixer.q_proj.weight")[-1] == "matrices"


def test_who_supplied_what():
    class Norms(phase1.Model):
        Mixer = Attention, FeedForward

        def make_final_norm(self):
            return self.make_norm()

    Norms.__module__ = "phases.phase1"
    one = choice(Norms, "norms")
    assert one.owner(Norms, "Mixer") == one.owner(Norms, "make_final_norm") == "branch norms"
    assert one.owner(Norms, "Norm") == "phase 1"
    assert one.owner(Norms, "make_norm") == "model.py"
    assert show._names(Norms.Mixer) == "attention.Attention, feedforward.FeedForward"


def test_layers_of_different_shapes_have_rows_of_their_own():
    mixed = type("Mixed", (GQAModel,), {"Mixer": (Attention, GroupedAttention)})
    rows = show.describe(choice(mixed), "nano")["parameters"]
    assert rows["blocks.0.mixer.k_proj.weight"][:3] == ("(64, 64)", "1", "4,096")
    assert rows["blocks.1.mixer.k_proj.weight"][:3] == ("(16, 64)", "1", "1,024")
    assert rows["blocks.*.mixer.q_proj.weight"][1] == "2"


# Dead numbers


class Copied(GQAModel):
    """Reads nothing of its own: it copies its Config, and what it reads it reads from the copy."""

    Mixer = Attention

    def make_ffn(self, i):
        return FeedForward(replace(self.config, d_ff=32))


def test_a_number_that_nothing_reads_is_dead():
    assert "n_kv_heads" in show.reads(GQAModel)
    assert "n_kv_heads" not in show.reads(type("Plain", (GQAModel,), {"Mixer": Attention}))
    sections = show.describe(choice(type("Plain", (GQAModel,), {"Mixer": Attention})), "nano")
    assert sections["numbers"]["n_kv_heads"] == ("1", "GQAConfig", "DEAD")
    assert sections["numbers"]["d_ff"][2] == "yes"


def test_copying_a_config_is_not_reading_it():
    assert "n_kv_heads" not in show.reads(Copied)
    assert "d_ff" in show.reads(Copied)


@pytest.mark.skipif(3 not in PHASES, reason="there is no phase 3 yet")
def test_making_a_config_is_not_reading_it():
    branches = modules()[3].BRANCHES
    assert "max_len" in show.reads(modules()[3].Model)
    assert "max_len" not in show.reads(branches["rope"])
    assert "rope_theta" in show.reads(branches["rope"])


def test_a_number_read_through_a_property_or_while_it_runs_is_read():
    assert {"n_heads", "dropout", "norm_eps"} <= show.reads(phase1.Model)

    class Late(GQAModel):
        Mixer = Attention

        def unembed(self, h):
            return super().unembed(h) * self.config.n_kv_heads

    assert "n_kv_heads" in show.reads(Late)


# Differences


def test_a_phase_does_not_differ_from_itself():
    ended = shown("--diff", 1, 1)
    assert (ended.code, ended.out) == (0, "phase 1 and phase 1 are the same\n")


def test_a_difference_is_every_change_and_nothing_else():
    changed = SimpleNamespace(RECIPE=replace(phase1.RECIPE, learning_rate=1e-3), BRANCHES={})
    other = show.Choice(1, "gqa", changed, GQAModel)
    before, after = show.describe(choice(phase1.Model), "nano"), show.describe(other, "nano")
    found = {(title, row): (a, b) for title, row, a, b in show.difference(before, after)}
    assert found["numbers", "n_kv_heads"] == ("", "1")
    assert found["slots", "Mixer"] == ("attention.Attention", "attention.GroupedAttention")
    assert found["parameters", "blocks.*.mixer.k_proj.weight"][0].startswith("(64, 64), 2, 8,192, sd ")
    assert found["parameters", "blocks.*.mixer.k_proj.weight"][1].startswith("(16, 64), 2, 2,048, sd ")
    assert set(found) == {
        *(("slots", row) for row in ("Config", "Mixer")),
        ("hooks", "make_final_norm"),
        ("numbers", "n_kv_heads"),
        *(("parameters", f"blocks.*.mixer.{name}_proj.{leaf}") for name in "kv" for leaf in ("weight", "bias")),
        *(("parameters", f"final_norm.{leaf}") for leaf in ("weight", "bias")),
        ("parameters", "total"),
    }
    back = {(title, row): (b, a) for title, row, a, b in show.difference(after, before)}
    assert back == found


@pytest.mark.skipif(3 not in PHASES, reason="there is no phase 3 yet")
def test_what_phase_3_changed():
    ended = shown("--diff", 2, 3)
    assert (ended.code, ended.err) == (0, "")
    assert "block.PreNormBlock" in ended.out
    assert cells(shown(3).out, "make_final_norm") == ["phase 3"]
    assert "head.TiedHead" in shown("--diff", 3, "3/tied").out


def test_since_which_phase_a_number_of_the_recipe_stands():
    for n in PHASES:
        recipe = show.describe(show.Choice.read(str(n)), "base")["recipe"]
        assert recipe["clip"][0] == type(modules()[n].RECIPE.clip).__name__
        for value, since in recipe.values():
            assert int(since.removeprefix("phase ")) <= n, value
    assert {since for _, since in show.describe(show.Choice.read("1"), "nano")["recipe"].values()} == {"phase 1"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ([], "expected: python -m phases.show PHASE"),
        (["1", "--diff", "1", "2"], "expected: python -m phases.show PHASE"),
        (["--diff", "1", "2", "--branch", "x"], "expected: python -m phases.show PHASE"),
        (["--diff", "1"], "--diff"),
        (["7"], "phase 7 is unknown: present are 1"),
        (["one"], "phase 'one' is unknown"),
        (["1/no-such"], "branch 'no-such' is unknown in phase 1"),
        (["1", "--branch", "no-such"], "branch 'no-such' is unknown in phase 1"),
        (["--diff", "1", "2.5"], "phase '2.5' is unknown"),
        (["1", "--size", "huge"], "--size: 'huge'"),
    ],
)
def test_what_cannot_be_shown(line, said):
    assert_bad(shown(*line), said)


def test_the_config_of_an_idea_names_its_class():
    assert choice(GQAModel).owner(GQAConfig, "n_kv_heads") == "GQAConfig"
