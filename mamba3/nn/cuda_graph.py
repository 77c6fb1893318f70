"""Work on a GPU that is recorded once and from then on launched as one: what asks the host for nothing need not wait for it."""

from __future__ import annotations

from collections.abc import Callable

import torch

WARM_UPS = 3


def record(
    run: Callable[[], object], warm_up: Callable[[], object], device: torch.device, *, beside_others: bool = False
) -> Callable[[], None]:
    """`run` as a CUDA graph: each call does again, to the same memory, what `run` does once; recording it does nothing.

    warm_up: called WARM_UPS times before, on a stream of its own; compiles, tunes and allocates what `run` needs.
    beside_others: other threads may use the device while it records, and replay their graphs beside this one. Raises
    RuntimeError where something that `run` does cannot be recorded.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            warm_up()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    if not beside_others:
        with torch.cuda.graph(graph):
            run()
        return graph.replay
    # cuBLAS keeps a workspace for each thread and stream, and all backward passes are one thread's: two graphs that are
    # replayed at once must not share one, so each takes its own from its own memory.
    torch._C._cuda_clearCublasWorkspaces()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"):
        run()
    torch._C._cuda_clearCublasWorkspaces()
    return graph.replay
