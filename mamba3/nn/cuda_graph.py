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
    beside_others: other threads may use the device while it records. Raises
    RuntimeError where something that `run` does cannot be recorded.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            warm_up()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local" if beside_others else "global"):
        run()
    return graph.replay
