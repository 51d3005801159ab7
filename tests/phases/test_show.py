"""phases.show describes what a phase, a branch or somebody's own file is."""

import re
from dataclasses import replace

import pytest

from mlx_transformer.nn.attention import Attention, GroupedAttention
from mlx_transformer.nn.config import SIZES
from mlx_transformer.nn.feedforward import FeedForward
from mlx_transformer.run.ladder import Experiment
from mlx_transformer.utils.errors import exit_cleanly
from phases import phase1, show
from tests.faults.runs import assert_bad, command
from tests.ladder import PHASES, modules

VARIANTS = [text for n, module in modules().items() for text in (str(n), *(f"{n}/{name}" for name in module.BRANCHES))]


class GQAConfig(phase1.Config):
    n_kv_heads: int = 1


class GQAModel(phase1.Model):
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


def variant(kind, **fields):
    """A class that no phase file holds, as a branch of phase 1."""
    return show.Variant(replace(Experiment.of_phase(1), branches={"idea": kind}, **fields), "idea")


@pytest.mark.parametrize("text", VARIANTS)
def test_every_phase_and_branch(text):
    sections = show.describe(show.Variant.read(text), "nano")
    model = show.Variant.read(text).kind
    net = model(model.Config(**SIZES["nano"]))
    assert sections["parameters"]["total"][2] == f"{net.count_parameters()['total']:,}"
    counted = [int(row[2].replace(",", "")) for name, row in sections["parameters"].items() if name != "total"]
    assert sum(counted) == net.count_parameters()["total"]
    assert set(sections["configuration"]) == set(net.config.to_dict())
    further = {"Encoder", "EncoderBlock", "Cross"} if model.parallel else set()
    assert set(sections["slots"]) == {"Config", "Norm", "Position", "Head", "Mixer", "FFN", "Block"} | further
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


def test_who_supplies_what():
    norms = type("Norms", (GQAModel,), {"Mixer": (Attention, FeedForward)})
    one = variant(norms)
    assert one.owner(norms, "Mixer") == one.owner(norms, "make_final_norm") == "branch idea"
    assert one.owner(norms, "Norm") == "phase 1"
    assert one.owner(norms, "make_norm") == "model.py"
    assert one.owner(GQAConfig, "n_kv_heads") == "branch idea"
    assert one.owner(GQAConfig, "n_heads") == "config.py"
    assert show._names(norms.Mixer) == "attention.Attention, feedforward.FeedForward"
    rope = show.describe(show.Variant.read("3/rope"), "nano")
    assert rope["configuration"]["rope_theta"][1] == rope["slots"]["Position"][1] == "branch rope"
    assert rope["configuration"]["max_len"][1:] == ("phase 3", "UNUSED")


def test_layers_of_different_shapes_have_rows_of_their_own():
    rows = show.describe(variant(type("Mixed", (GQAModel,), {"Mixer": (Attention, GroupedAttention)})), "nano")
    rows = rows["parameters"]
    assert rows["blocks.0.mixer.k_proj.weight"][:3] == ("(64, 64)", "1", "4,096")
    assert rows["blocks.1.mixer.k_proj.weight"][:3] == ("(16, 64)", "1", "1,024")
    assert rows["blocks.*.mixer.q_proj.weight"][1] == "2"


# Unused fields


class Copied(GQAModel):
    """Reads one field from a copy of its Config."""

    Mixer = Attention

    def make_ffn(self, i):
        return FeedForward(replace(self.config, d_ff=32))


def test_a_field_that_nothing_reads_is_unused():
    assert "n_kv_heads" in show.fields_used(GQAModel)
    assert "n_kv_heads" not in show.fields_used(type("Plain", (GQAModel,), {"Mixer": Attention}))
    fields = show.describe(variant(type("Plain", (GQAModel,), {"Mixer": Attention})), "nano")["configuration"]
    assert fields["n_kv_heads"] == ("1", "branch idea", "UNUSED")
    assert fields["d_ff"][2] == "yes"


def test_copying_a_config_is_not_reading_it():
    assert "n_kv_heads" not in show.fields_used(Copied)
    assert "d_ff" in show.fields_used(Copied)


def test_making_a_config_is_not_reading_it():
    branches = modules()[3].BRANCHES
    assert "max_len" in show.fields_used(modules()[3].Model)
    assert "max_len" not in show.fields_used(branches["rope"])
    assert "rope_theta" in show.fields_used(branches["rope"])


def test_a_field_read_through_a_property_or_in_the_forward_pass_is_used():
    assert {"n_heads", "dropout", "norm_eps"} <= show.fields_used(phase1.Model)

    class Late(GQAModel):
        Mixer = Attention

        def unembed(self, h):
            return super().unembed(h) * self.config.n_kv_heads

    assert "n_kv_heads" in show.fields_used(Late)


# Differences


def test_a_phase_does_not_differ_from_itself():
    ended = shown("--diff", 1, 1)
    assert (ended.code, ended.out) == (0, "phase 1 and phase 1 are the same\n")


def test_a_difference_is_every_change_and_nothing_else():
    before, after = show.describe(show.Variant.read("1"), "nano"), show.describe(variant(GQAModel), "nano")
    found = {(title, row): (a, b) for title, row, a, b in show.difference(before, after)}
    assert found["configuration", "n_kv_heads"] == ("", "1")
    assert found["slots", "Mixer"] == ("attention.Attention", "attention.GroupedAttention")
    assert found["parameters", "blocks.*.mixer.k_proj.weight"][0].startswith("(64, 64), 2, 8,192, sd ")
    assert found["parameters", "blocks.*.mixer.k_proj.weight"][1].startswith("(16, 64), 2, 2,048, sd ")
    assert set(found) == {
        *(("slots", row) for row in ("Config", "Mixer")),
        ("hooks", "make_final_norm"),
        ("configuration", "n_kv_heads"),
        *(("parameters", f"blocks.*.mixer.{name}_proj.{leaf}") for name in "kv" for leaf in ("weight", "bias")),
        *(("parameters", f"final_norm.{leaf}") for leaf in ("weight", "bias")),
        ("parameters", "total"),
    }
    back = {(title, row): (b, a) for title, row, a, b in show.difference(after, before)}
    assert back == found


def test_what_phase_3_changed():
    ended = shown("--diff", 2, 3)
    assert (ended.code, ended.err) == (0, "")
    assert "block.PreNormBlock" in ended.out
    assert cells(shown(3).out, "make_final_norm") == ["phase 3"]
    assert "head.TiedHead" in shown("--diff", 3, "3/tied").out


def test_since_which_phase_a_field_of_the_recipe_has_its_value():
    for n in PHASES:
        recipe = show.describe(show.Variant.read(str(n)), "base")["recipe"]
        assert recipe["clip"][0] == type(modules()[n].RECIPE.clip).__name__
        for value, since in recipe.values():
            assert int(since.removeprefix("phase ")) <= n, value
    assert {since for _, since in show.describe(show.Variant.read("1"), "nano")["recipe"].values()} == {"phase 1"}


def test_a_recipe_by_name_is_shown_in_place_of_the_phase_s_own():
    original = show.describe(show.Variant.read("2:original"), "nano")["recipe"]
    assert original["label_smoothing"] == ("0.1", "recipe original")
    assert original["clip"] == ("GlobalNorm", "phase 1")
    rows = list(show.difference(*(show.describe(show.Variant.read(text), "nano") for text in ("2", "2:original"))))
    assert {title for title, *_ in rows} == {"recipe"}
    assert ("recipe", "accumulate", "1", "2") in rows
    muon = shown("6/phase_5:phase_5_with_muon", "--size", "nano").out
    assert cells(muon, "groups.matrices.optimizer") == ["Muon", "phase 6"]


def test_somebody_s_own_file(tmp_path):
    file = tmp_path / "my_idea.py"
    file.write_text("""
from dataclasses import replace
from mlx_transformer import nn
from phases import phase5

class Config(phase5.Config):
    slope: float = 0.5  # of the line below 0

class LeakyFeedForward(nn.FeedForward):
    def __init__(self, config):
        super().__init__(config)
        self.slope = config.slope

    def activation(self, x):
        return nn.init.mx.maximum(x, self.slope * x)

class Model(phase5.Model):
    FFN = LeakyFeedForward

RECIPE = replace(phase5.RECIPE, dropout=0.25)
BRANCHES = {"pre": nn.leaf(Model, Norm=nn.ScaleNorm)}
""")
    ended = shown(file, "--size", "nano")
    assert (ended.code, ended.err) == (0, "")
    assert cells(ended.out, "slope") == ["0.5", "my_idea.py", "yes"]
    assert cells(ended.out, "FFN")[-1] == "my_idea.py"
    assert cells(ended.out, "Norm") == ["norm.RMSNorm", "phase 5"]
    assert cells(ended.out, "dropout") == ["0.1", "config.py", "yes"]
    recipe = show.describe(show.Variant.read(str(file)), "nano")["recipe"]
    assert (recipe["dropout"], recipe["clip"]) == (("0.25", "my_idea.py"), ("GlobalNorm", "phase 1"))
    assert cells(shown(file, "--branch", "pre").out, "Norm") == ["norm.ScaleNorm", "branch pre"]
    changed = shown("--diff", 5, file, "--size", "nano").out
    assert "LeakyFeedForward" in changed
    assert "slope" in changed
    assert "RMSNorm" not in changed


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ([], "expected: python -m phases.show PHASE"),
        (["1", "--diff", "1", "2"], "expected: python -m phases.show PHASE"),
        (["--diff", "1", "2", "--branch", "x"], "expected: python -m phases.show PHASE"),
        (["--diff", "1"], "--diff"),
        (["7"], "phase 7 is unknown: present are 1"),
        (["one"], "'one' is no phase and no file"),
        (["1/no-such"], "branch 'no-such' is unknown in phase 1"),
        (["1", "--branch", "no-such"], "branch 'no-such' is unknown in phase 1"),
        (["--diff", "1", "2.5"], "'2.5' is no phase and no file"),
        (["2:no-such"], "recipe 'no-such' is unknown in phase 2"),
        (["no_such_file.py"], "does not exist"),
        (["1", "--size", "huge"], "--size: 'huge'"),
    ],
)
def test_what_cannot_be_shown(line, said):
    ended = shown(*line)
    assert_bad(ended, said)
    assert ended.out == ""  # no table that the error cuts off
