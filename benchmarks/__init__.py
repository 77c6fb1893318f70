"""Measurements that the documentation may quote: `python -m benchmarks --help`, or `mamba3 bench`.

A contestant is timed only behind green checks (`checks`), in rounds interleaved with its rivals (`timer`). What came out is
written, with device, versions and commit (`environment`), to results/<date>-<device>-<subject>.json and .png.

    cpu         loop, gradient, peer, constancy: ratios of one run on the machine's own cores
    numerics    million, dtypes: errors against float64
    kernels     the Triton kernels on a GPU, forward, backward and decode, beside the `rivals` that can be imported
    model       a whole model on a GPU: prefill, and as many decoded tokens
    serving-gpu the engine on a GPU: tokens/s, latencies, memory and roofline by streams; the verification of guesses
"""
