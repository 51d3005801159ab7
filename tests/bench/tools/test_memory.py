"""Peak memory of a step."""

import json
import sys

import pytest

from bench.tools import memory
from bench.tools.memory import Flags, main, measure
from mlx_transformer.utils.errors import BadInput


def test_the_plain_loss_takes_more_and_computes_the_same():
    log = measure(Flags(size="nano", batch_size=192))  # at 64 the order of the kernels decides
    ours, plain = (log["workers"][name] for name in ("default", "plain"))
    assert plain["peak_bytes"] > ours["peak_bytes"] > 0
    assert plain["loss"] == pytest.approx(ours["loss"], rel=1e-4)
    assert memory.show(log).row_count == 2


def test_bad_input_and_a_log(monkeypatch, tmp_path):
    with pytest.raises(BadInput, match="'no'"):
        measure(Flags(recipes="default,no"))
    with pytest.raises(BadInput, match="is too large"):
        measure(Flags(size="auto", batch_size=2_000_000_000))
    out = tmp_path / "x.json"
    monkeypatch.setattr(
        sys, "argv", ["x", "--size", "nano", "--batch-size", "2", "--recipes", "default", f"--out={out}"]
    )
    main()
    assert json.loads(out.read_text())["measures"] == "memory"
