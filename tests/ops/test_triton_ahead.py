"""Every kernel compiles ahead of time, without a device, for every architecture, within its shared memory.

Each target compiles in a process of its own, where kernels are not defined for the interpreter.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
KB = 1024
# What one block may have: data-centre cards, consumer cards, and AMD's local data share.
TARGETS = {
    "cuda:80": 163 * KB, "cuda:86": 99 * KB, "cuda:89": 99 * KB, "cuda:90": 227 * KB, "cuda:100": 227 * KB,
    "cuda:120": 99 * KB, "hip:gfx942": 64 * KB, "hip:gfx1100": 64 * KB,
}  # fmt: skip
FLOATS = {
    "dt", "A_rate", "lam", "tick_bth", "theta", "decay", "decay_low", "source", "source_low", "gamma", "tick", "B_bias",
    "C_bias", "mimo_x", "mimo_z", "mimo_o", "D", "S", "S_in", "S_out", "S_state", "total", "phi", "phi_in", "phi_out",
    "dt_bias", "weight", "bias", "S_start", "turning", "h", "dD", "d_row", "d_column", "d_state", "d_gamma", "d_kept", "d_turn",
    "dB_parts", "dC_parts",
    "d_mimo_x", "d_mimo_z", "d_mimo_o", "d_theta", "d_tick", "dB_bias", "dC_bias", "d_halo", "d_dt", "d_A", "d_lam",
    "S_final",
}  # fmt: skip
INTEGERS = {"live", "chunks", "segments", "sequences", "sequence_segments", "phase", "turned"}
TURN = {"fp32": "i32", "bf16": "i16"}
SCALARS = {"eps": "fp32", "has_state": "i32", "has_start": "i32"}
NUMBERS = {"T", "O", "x_row", "z_row", "bc_row", "rest_row", "row_size", "k_first", "c_first", "t_first", "Tw", "heads"}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles(target):
    done = subprocess.run(
        [sys.executable, __file__, target], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr[-2000:]
    used = json.loads(done.stdout.splitlines()[-1])
    assert len(used) == 35
    too_much = {name: shared for name, shared in used.items() if shared > TARGETS[target]}
    assert not too_much


def compile_all(name: str) -> dict[str, int]:
    """Shared memory of each kernel in its launch configurations, at N 128 and P 64, for one target."""
    import torch
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mamba3.ops.triton import (
        block,
        coefficients,
        decode,
        decode_ranks,
        few_rows,
        gradient_bc,
        gradient_dt,
        gradient_rows,
        last_token,
        output,
        segments,
        states,
        turns,
    )
    from mamba3.ops.triton.backward import WARPS
    from mamba3.ops.triton.launch import Device, choose, choose_backward

    backend, arch = name.split(":")
    target = (
        GPUTarget("cuda", int(arch), 32) if backend == "cuda" else GPUTarget("hip", arch, 64 if "9" in arch else 32)
    )
    capability = (int(arch) // 10, int(arch) % 10) if backend == "cuda" else (0, 0)
    limits = Device(multiprocessors=100, shared_bytes=TARGETS[name], capability=capability)

    def shared(kernel, constants, warps, dtype="bf16", descriptors=None, narrow=()):
        signature, values, attributes = {}, {}, {}
        for i, argument in enumerate(kernel.arg_names):
            if kernel.params[i].is_constexpr:
                signature[argument], values[argument] = "constexpr", constants[argument]
            elif argument in (descriptors or {}):
                signature[argument] = f"tensordesc<{descriptors[argument]}>"
            elif argument in SCALARS:
                signature[argument] = SCALARS[argument]
            elif argument in NUMBERS:
                signature[argument], attributes[(i,)] = "i32", [["tt.divisibility", 16]]
            else:
                wide = argument in FLOATS and argument not in narrow
                kind = "fp32" if wide else "i32" if argument in INTEGERS else dtype
                kind = TURN[dtype] if argument == "turn" else kind
                signature[argument], attributes[(i,)] = "*" + kind, [["tt.divisibility", 16]]
        source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
        return triton.compile(source, target=target, options={"num_warps": warps}).metadata.shared

    used = {}
    sizes = dict(H=64, G=1, P=64, PP=64, N=128, A=32)
    padded = dict(AP=32, UP=64)
    for rank, torch_type, dtype, kind, copies in (
        (1, torch.bfloat16, tl.bfloat16, "bf16", True), (1, torch.bfloat16, tl.bfloat16, "bf16", False),
        (4, torch.bfloat16, tl.bfloat16, "bf16", False),
        (1, torch.float32, tl.float32, "fp32", False), (4, torch.float32, tl.float32, "fp32", False),
    ):  # fmt: skip
        exact, mimo, label = kind == "fp32", rank > 1, f"{kind} rank {rank}{' bulk' * copies}"
        launch = choose(limits, torch_type, rank, bulk=copies)
        L = launch.tokens
        matrix = sizes | dict(
            R=rank, RP=rank, W=32, NQ=128, L=L, BULK=launch.bulk, STAGES=launch.stages, DTYPE=dtype, EXACT=exact,
            HARDWARE=limits.nvidia and not exact, HAS_BIAS_B=True, HAS_MIMO_X=mimo,
        )  # fmt: skip
        gate = dict(HAS_BIAS_C=True, HAS_MIMO_Z=mimo, HAS_MIMO_O=mimo, HAS_D=True, HAS_Z=True)
        boxes = {"B": f"{L * rank},32", "C": f"{L * rank},32", "x": f"{L},64", "z": f"{L},64"} if launch.bulk else {}
        boxes = {v: f"{kind}[{box}]" for v, box in boxes.items()}
        if launch.bulk:
            boxes["turn"] = f"i16[{L},32]"
        used[f"output {label}"] = shared(output.output_kernel, matrix | gate, launch.num_warps, kind, boxes)
        used[f"summary {label}"] = shared(segments.summary_kernel, matrix, launch.num_warps, kind, boxes)
        chosen = choose_backward(limits, torch_type, rank)
        back = sizes | dict(
            HAS_BIAS_B=True, HAS_MIMO_X=mimo, EXACT=exact, HARDWARE=limits.nvidia and not exact, BULK=False, W=32, NQ=128,
            R=rank, RP=rank, L=chosen.tokens, DTYPE=dtype, HAS_MIMO_Z=mimo, HAS_MIMO_O=mimo, HAS_Z=True, HAS_BIAS_C=True,
            HAS_D=True, HAS_BIAS=True, HAS_END=True, SUMMARY=False,
        )  # fmt: skip
        if not exact and not copies:  # in float32 they take minutes to compile, and impl="auto" does not take them
            used[f"gradient_rows {label}"] = shared(
                gradient_rows.gradient_rows_kernel, back, WARPS, kind, narrow=("S",)
            )
            for reverse in (False, True):
                flags = back | dict(REVERSE=reverse, STAGES=chosen.stages)
                used[f"states {reverse} {label}"] = shared(states.states_kernel, flags, WARPS, kind)
            flags = back | dict(UB=chosen.channels, LEAVING=True, STAGES=chosen.stages_bc)
            used[f"gradient_bc {label}"] = shared(gradient_bc.gradient_bc_kernel, flags, WARPS, kind)
        step = sizes | padded | dict(
            A_FLOOR=1e-4, HEAVY_TAIL=True, LAM=-1.0, HAS_BIAS_B=True, HAS_BIAS_C=True, HAS_D=True,
            HAS_LIVE=True, AHEAD=capability >= (9, 0),
        )  # fmt: skip
        if rank == 1:
            used[f"decode {label}"] = shared(decode.decode_kernel, step | dict(NP=128), 2, kind)
        else:
            ranks = dict(R=rank, RP=rank, HALF=64, W=32, HAS_MIMO=True)
            used[f"decode {label}"] = shared(decode_ranks.decode_ranks_kernel, step | ranks, 4, kind)
    used["turns"] = shared(turns.turns_kernel, dict(H=64, A=32, AP=32, L=64, LB=8, HB=8, EXACT=False), 1)
    small = dict(H=64, L=64, HB=16)
    used["coefficients"] = shared(coefficients.coefficients_kernel, small | dict(EXACT=True, BACKWARD=True), 4)
    used["phases"] = shared(turns.phases_kernel, dict(HA=2048, CB=64, BLOCK=32, HAS_PHI=True), 4)
    flags = dict(H=64, L=64, HB=32, HAS_STATE=True, TURNS=True, HAS_TICK=True, EXACT=False, HARDWARE=limits.nvidia)
    used["gradient_dt"] = shared(gradient_dt.gradient_dt_kernel, flags, 4)
    used["reverse merge"] = shared(states.reverse_merge_kernel, dict(H=64, PN=64 * 128, BLOCK=1024, HAS_FINAL=True), 4)
    merge = dict(H=64, R=4, P=64, PB=16, N=128, NP=128, HAS_STATE=True, HAS_MIMO_X=True)
    used["merge"] = shared(segments.merge_kernel, merge, 4)
    used["last token"] = shared(last_token.last_token_kernel, sizes | padded | dict(R=4, HAS_BIAS_B=True), 1)
    used["add norm"] = shared(block.add_norm_kernel, dict(N=2048, BLOCK=2048, HAS_Y=True), 4, narrow=("weight",))
    used["swiglu"] = shared(block.swiglu_kernel, dict(N=4096, BLOCK=2048), 4)
    row = dict(H=64, HP=64, A=32, AP=32, N=128, NP=128, M=4, MP=4, A_FLOOR=1e-4, HEAVY_TAIL=True, LAM=-1.0)
    used["activations"] = shared(block.activations_kernel, row, 2)
    rows = dict(K=4096, KP=4096, M=1, BO=8, NORM=False, HAS_ADD=False, GATED=False, AHEAD=capability >= (9, 0))
    used["product"] = shared(few_rows.few_rows_kernel, rows, 4, narrow=("weight",))
    rows |= dict(K=2048, KP=2048, M=2, BO=4, NORM=True, HAS_ADD=True, GATED=True)
    used["normed product"] = shared(few_rows.few_rows_kernel, rows, 4, narrow=("weight",))
    return used


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    print(json.dumps(compile_all(sys.argv[1])))  # noqa: T201
