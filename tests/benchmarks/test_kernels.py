"""What the kernels' benchmark does without a GPU: floors, the plot, and rivals that cannot run."""

import pytest
import torch

from benchmarks.kernels import forward_bytes, forward_flops
from benchmarks.plots import draw_kernels

pytest.importorskip("triton")
from benchmarks.rivals import rivals


def test_the_floors_are_those_of_the_layer():
    """mathematics: 25.5 KB and 3.7 MFLOP a token and rank at 64 heads of 64, state 128, chunks of 64 rows."""
    state = 64 * 64 * 128 * 4
    assert (forward_bytes(1, 2048, 1) - state) / 2048 == pytest.approx(25.5 * 1024, rel=0.02)
    assert forward_flops(1, 2048, 1) / 2048 == pytest.approx(3.7e6, rel=0.02)
    assert forward_flops(2, 512, 4) == 2 * forward_flops(1, 512, 1) * 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU")
@pytest.mark.parametrize("rank", [1, 4])
def test_rivals_that_cannot_run_are_left_out_and_say_why(rank):
    runs, left_out = rivals(rank, 1, 64)
    assert not runs
    assert left_out
    assert all(left_out.values())


def test_the_plot_has_a_panel_a_shape(tmp_path):
    times = {"triton": dict(ms=0.5, low=0.4, high=0.6), "chunked": dict(ms=13.0, low=12.0, high=14.0)}
    row = dict(rank=1, batch=8, tokens=2048, times=times, floor_bytes_ms=0.15, floor_products_ms=0.08)
    draw_kernels([row, row | dict(rank=4)], tmp_path / "kernels.png")
    assert (tmp_path / "kernels.png").stat().st_size > 1000
