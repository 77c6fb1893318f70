"""Tiny models gain nothing from threads. Graphs can be had without a GPU."""

import pytest

from mamba3.engine import engine as engine_module
from mamba3.engine import graphs as graphs_module
from tests.train.conftest import one_thread

__all__ = ["one_thread"]


@pytest.fixture
def imitation(monkeypatch):
    """Graphs without a GPU: a function runs where a graph would be replayed. An entry for each that was recorded."""
    recorded = []

    def record(run, memory):
        run()  # what warms up
        recorded.append(len(recorded))
        return run, memory

    monkeypatch.setattr(engine_module, "why_not", lambda model, config: None if config.graphs else "not wanted")
    monkeypatch.setattr(graphs_module, "record", record)
    return recorded
