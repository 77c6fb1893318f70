"""Tiny models gain nothing from threads, and lose much where other work runs beside the tests."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the processes that a test starts
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
