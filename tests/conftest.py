"""What every test runs under: a fixed seed, uninitialised memory that is NaN, its share of the processors."""

import importlib.util
import os

import pytest
import torch
from hypothesis import settings

if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    # A kernel, and Triton's own library, is interpreted if this is set while it is defined.
    os.environ["TRITON_INTERPRET"] = "1"
    import mamba3.ops.triton.block
    import mamba3.ops.triton.decode
    import mamba3.ops.triton.few_rows
    import mamba3.ops.triton.library
    import mamba3.tasks.coefficient_kernels
    import mamba3.tasks.mixing_kernels
    import mamba3.tasks.read_kernels
    import mamba3.tasks.row_kernels
    import mamba3.tasks.turn_kernels
    import mamba3.tasks.weigh_kernels  # noqa: F401

    del os.environ["TRITON_INTERPRET"]

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # processes side by side share the processors
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))

settings.register_profile("laws", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("laws")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty answers NaN, so that an element nobody wrote cannot pass for a result."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items):
    """Tests that need a CUDA device are skipped aloud where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
