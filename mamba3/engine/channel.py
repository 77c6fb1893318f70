"""A few integers between host and device, on the device's stream: the host waits for them when it wants them, not before."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Channel:
    """For at most `count` numbers at a time, int64, one way: those of one call stay until the next.

    On a GPU they pass through pinned memory, which is not written again before the device has read it.
    """

    def __init__(self, count: int, device: torch.device):
        on_gpu = device.type == "cuda"
        self._host = torch.zeros(count, dtype=torch.int64, pin_memory=on_gpu)
        self._array, self._device = self._host.numpy(), device
        self._passed = torch.cuda.Event() if on_gpu else None

    def send(self, numbers: Sequence[int], target: Tensor) -> None:
        """Copy numbers to the beginning of `target`, behind what was launched before."""
        self._wait()
        count = len(numbers)
        self._array[:count] = numbers
        target[:count].copy_(self._host[:count], non_blocking=True)
        self._note()

    def fetch(self, source: Tensor) -> Callable[[], list[int]]:
        """Copy `source` [n] to the host, behind what was launched before: what waits for it, once, before the next call."""
        count = len(source)
        self._host[:count].copy_(source, non_blocking=True)
        self._note()

        def arrived() -> list[int]:
            self._wait()
            return self._array[:count].tolist()

        return arrived

    def _note(self) -> None:
        if self._passed is not None:
            self._passed.record(torch.cuda.current_stream(self._device))

    def _wait(self) -> None:
        if self._passed is not None:
            self._passed.synchronize()
