"""Predictions for Apple silicon: arithmetic, limits, words, and the one public point."""

import json
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from bench.tools import roofline
from bench.tools.kernels import Kernel
from bench.tools.roofline import Chip, Flags, Work, chips, find_chip, memory, read_work
from mlx_transformer.utils.errors import BadInput

CHIP = Chip("test", 10, 1.0, 2.0, 0.5, 100.0, (8, 16), False)  # 2.56 TFLOP/s


def _work(flops=0, nbytes=0, launches=1, dtype=mx.float32, peak=0):
    return Work(1000, [Kernel("Matmul", (), (), launches, flops, nbytes, dtype)], peak)


@pytest.fixture(scope="module")
def nano():
    return read_work(Flags(size="nano", batch_size=4))


def test_a_kernel_takes_the_longer_of_its_two_times():
    second = 2.56e12  # FLOPs
    traffic = 100e9  # bytes
    spent = _work(flops=second, nbytes=traffic / 2).seconds(CHIP)
    assert spent["arithmetic"] == pytest.approx(1)
    assert spent["memory traffic"] == 0
    spent = _work(flops=second, nbytes=2 * traffic, launches=7).seconds(CHIP)
    assert spent == pytest.approx({"arithmetic": 0, "memory traffic": 2, "launches": 7 * roofline.LAUNCH})
    assert _work(flops=second, dtype=mx.float16).seconds(CHIP)["arithmetic"] == pytest.approx(0.5)
    assert _work(flops=second, dtype=mx.bfloat16).seconds(CHIP)["arithmetic"] == pytest.approx(2)


def test_the_range_is_that_of_the_efficiencies():
    work = _work(flops=2.56e12, launches=100)
    (slow, fast), (least, most) = roofline.EFFICIENCIES, work.predict(CHIP)
    assert least == pytest.approx(1000 / (1 / slow + 100 * roofline.LAUNCH))
    assert most == pytest.approx(1000 / (1 / fast + 100 * roofline.LAUNCH))
    assert "predicted: 1000.0 ms / 50-82 % + 100 launches x 5.2 us = 1,220-2,000 ms" in roofline.one("x", work, CHIP)


def test_bfloat16_is_slower_than_float16_where_it_is_emulated():
    for name, chip in chips().items():
        assert (chip.flops(mx.bfloat16) < chip.flops(mx.float16)) == name.startswith(("m1", "m2"))


def test_memory_is_compared_with_the_chip_s():
    assert memory(_work(peak=5e9), CHIP).endswith("fits")
    assert memory(_work(peak=9e9), CHIP).endswith("fits the larger ones")
    assert memory(_work(peak=13e9), CHIP).endswith("does not fit")


def test_every_chip_is_cited_and_estimates_are_marked():
    data = json.loads(Path(roofline.__file__).with_name("chips.json").read_text(encoding="utf-8"))
    assert all(entry["source"] for entry in (*data["chips"].values(), *data["families"].values()))
    for family in data["families"].values():
        assert family["estimate"] == ("ESTIMATE" in family["source"])
    assert {name.split("-")[0] for name in data["chips"]} == {"m1", "m2", "m3", "m4", "m5"} == set(data["families"])
    assert chips()["m1-max"].flops(mx.float32) == pytest.approx(10.4e12, rel=1e-3)
    assert "~" in chips()["m4-max"].describe()


def test_a_chip_with_fewer_gpu_cores_is_another_chip():
    m1, m3 = find_chip("m1-max-24"), find_chip("m3-max-30")
    assert (m1.name, m1.gpu_cores, m1.bandwidth_gb_s, m1.memory_gb) == ("m1-max-24", 24, 400, (32, 64))
    assert m1.flops(mx.float32) == pytest.approx(7.8e12, rel=1e-2)
    assert (m3.gpu_cores, m3.bandwidth_gb_s, m3.memory_gb) == (30, 300, (36, 96))
    assert find_chip("m1-max") == chips()["m1-max"]
    assert [find_chip(name) for name in ("", "all", "m9", "m1-max-32", "m1-max-0", "m9-24", "m1-max-x")] == [None] * 7


def test_more_of_everything_is_faster(nano):
    _, work = nano
    known = chips()
    for family in ("m1", "m2", "m3", "m4", "m5"):
        rates = [work.predict(known[name]) for name in known if name.split("-")[0] == family]
        assert rates == sorted(rates)


def test_half_precision_moves_less(nano):
    what, half = read_work(
        Flags(size="nano", batch_size=4, dtype="bfloat16")
    )  # float16 keeps a copy of all state, to undo an overflow
    assert "bfloat16" in what
    assert sum(k.nbytes for k in half.kernels) < 0.8 * sum(k.nbytes for k in nano[1].kernels)


def test_bad_input():
    with pytest.raises(BadInput, match="branch 'no'"):
        read_work(Flags(branch="no"))
    with pytest.raises(BadInput, match="phase 9"):
        read_work(Flags(phase=9))
    with pytest.raises(BadInput, match="batch of 100000000 x 64 tokens"):
        read_work(Flags(size="nano", batch_size=100_000_000))


def test_the_work_of_a_step_is_known():
    """FLOPs by the closed formula; bytes and launches must not grow unseen."""
    _, work = read_work(Flags(size="base", batch_size=256))
    assert work.total("flops") / work.tokens == pytest.approx(33e6, rel=0.01)
    assert work.total("nbytes") < 33.6e9
    assert work.total("launches") <= 565  # 3 for the scalars of each of AdamW's 4 groups


def test_the_command(capsys, monkeypatch):
    small = read_work(Flags(size="nano", batch_size=2))
    monkeypatch.setattr(roofline, "read_work", lambda flags: small)
    monkeypatch.setattr(sys, "argv", ["roofline", "--chip", "all"])
    roofline.main()
    output = capsys.readouterr().out
    assert "predicted" in output.splitlines()[0]
    assert all(name in output for name in chips())
    assert "Assumed" in output
    monkeypatch.setattr(sys, "argv", ["roofline", "--chip", "m9"])
    with pytest.raises(BadInput, match="chip 'm9' is unknown: expected all or one of m1, m1-pro"):
        roofline.main()
