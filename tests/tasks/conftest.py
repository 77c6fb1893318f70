"""The tests of fit train tiny models: on one thread, as the tests of training do."""

from tests.train.conftest import one_thread

__all__ = ["one_thread"]
