"""The recurrence of Mamba-3: one op, several implementations, one contract.

The letters that name the axes of every tensor, here and in every file:

    b batch    t token    s packed sequence    c, k chunk    l token in a chunk    h head    g group of heads
    r rank     p head channel (headdim)        n state channel (d_state)    a rotated pair of channels    d model channel
"""

from mamba3.ops.scan import implementations, scan, step
from mamba3.ops.segments import Summary, apply, merge, summarize
from mamba3.ops.types import ScanOutput, State

__all__ = ["ScanOutput", "State", "Summary", "apply", "implementations", "merge", "scan", "step", "summarize"]
