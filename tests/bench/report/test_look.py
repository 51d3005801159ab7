"""What the notebooks look at: the run that is found, and attention weights that are the model's own."""

import os

import numpy as np
import pytest

from bench.report import look
from tests.ideas import IDEAS
from tests.ladder import TINY, modules, tiny, tokens

KINDS = {**{str(n): module.Model for n, module in modules().items()}, **IDEAS}
L = TINY["seq_len"]


@pytest.mark.parametrize("name", KINDS)
def test_a_map_is_a_causal_share_for_each_softmax_attention(name):
    model, ids = tiny(KINDS[name]), tokens(batch=1)
    maps = look.attention_maps(model, ids[0].tolist())
    expected = {"recurrence": 0, "hybrid": TINY["n_layers"] // 2}
    assert len(maps) == expected.get(name, TINY["n_layers"])
    for weights in maps:
        assert weights.shape == (TINY["n_heads"], L, L)
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
        assert (weights >= 0).all()
        assert not np.triu(weights, 1).any()


def test_a_map_is_the_paper_s_equation():
    model, ids = tiny(KINDS["1"]), tokens(batch=1)
    ctx = model.context(ids)
    q, k, _ = model.blocks[0].mixer.project(model.embed(ctx), ctx)
    scores = np.array(q[0] @ k[0].swapaxes(-1, -2)) / np.sqrt(q.shape[-1])
    shares = np.tril(np.exp(scores))
    shares /= shares.sum(-1, keepdims=True)
    np.testing.assert_allclose(look.attention_maps(model, ids[0].tolist())[0], shares, atol=1e-5)


def test_sinusoids_are_the_paper_s():
    found = look.sinusoids(KINDS["1"].Config(**TINY))
    assert found.shape == (L, TINY["d_model"])
    i, p = 3, 11
    np.testing.assert_allclose(found[p, 2 * i], np.sin(p / 10_000 ** (2 * i / TINY["d_model"])), atol=1e-5)
    np.testing.assert_allclose(found[p, 2 * i + 1], np.cos(p / 10_000 ** (2 * i / TINY["d_model"])), atol=1e-5)


def put(path, age):
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    os.utime(path, (1e9 - age, 1e9 - age))
    return path


def test_the_newest_run_is_found_then_a_published_one(tmp_path):
    with pytest.raises(look.NotThere, match="make run"):
        look.find_run(None, root=tmp_path)
    published = put(tmp_path / "results/published/phase1/result.json", age=0)
    assert look.find_run(None, root=tmp_path) == published.parent
    put(tmp_path / "results/phases/older/result.json", age=20)
    mine = put(tmp_path / "results/mine/result.json", age=10)
    assert look.find_run(None, root=tmp_path) == mine.parent
    put(tmp_path / "results/phases/older/model/config.json", age=30)
    assert look.find_run(None, "model/config.json", root=tmp_path) == tmp_path / "results/phases/older"
    assert look.find_run(str(published.parent), root=tmp_path) == published.parent
    with pytest.raises(look.NotThere, match=r"mine' has no model/config\.json"):
        look.find_run(str(mine.parent), "model/config.json", root=tmp_path)


def test_the_newest_comparison_is_found_then_a_published_one(tmp_path):
    with pytest.raises(look.NotThere, match=r"bench\.compare --phases 1 --quick"):
        look.find_comparison(None, root=tmp_path)
    published = put(tmp_path / "results/published/compare/phase1/compare.json", age=0)
    assert look.find_comparison(None, root=tmp_path) == published
    put(tmp_path / "results/bench/first/compare.json", age=20)
    newest = put(tmp_path / "results/bench/second/compare.json", age=10)
    assert look.find_comparison(None, root=tmp_path) == newest
    with pytest.raises(look.NotThere, match=r"expected a compare\.json"):
        look.find_comparison(str(tmp_path / "none.json"))
