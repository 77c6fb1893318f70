"""The command line of runs/compare.py."""

import argparse
import math
import time
from pathlib import Path

from contestants import ABLATIONS, KINDS, MAIN, STATES

GROUPS = {"main": MAIN, "states": STATES, "ablations": ABLATIONS, "all": (*MAIN, *STATES, *ABLATIONS)}


def options_of(description: str | None, arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, default=Path("tokens"), help="folder of runs/books.py")
    parser.add_argument("--out", type=Path, default=Path("compare"))
    parser.add_argument("--known", type=Path, nargs="*", default=[], help="compare.json of earlier calls elsewhere")
    parser.add_argument("--group", choices=GROUPS, default="main", help="which kinds: the six, state sizes, ablations")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="these kinds instead of a group")
    parser.add_argument(
        "--rates",
        nargs="+",
        type=float,
        default=[2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3],
        help="of the sweep, for all kinds alike",
    )
    parser.add_argument("--warmup", type=float, default=0.25, help="share of a cell's steps in which its rate rises")
    parser.add_argument(
        "--shards", type=int, default=0, help="train on the first so many shards of the tokens; 0: on all"
    )
    parser.add_argument("--sweep-tokens", type=float, default=8e6, help="of each cell of the sweep")
    parser.add_argument("--train-tokens", type=float, default=40e6, help="of each final cell")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 2048, 4096, 8192, 16_384, 32_768])
    parser.add_argument("--eval-tokens", type=int, default=524_288, help="held-out tokens of each measurement")
    parser.add_argument("--batch-tokens", type=int, default=65_536, help="of a step")
    parser.add_argument("--micro-tokens", type=int, default=0, help="tokens of one forward pass, where memory is short")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--no-graph", action="store_true", help="on a GPU, without a CUDA graph of each pass")
    parser.add_argument("--gpus", type=int, help="workers, one a GPU (default: all that there are; on a CPU one)")
    parser.add_argument("--each", type=int, default=1, help="workers a GPU; more than one writes down no tokens/s")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--shared", action="store_true", help="others use the GPU too: no tokens/s are written down")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after so long, with what was begun saved")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--plan", action="store_true", help="print which cells are done, and end")
    parser.add_argument(
        "--quick", action="store_true", help="tiny models on made-up tokens, to see that all of it runs"
    )
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.kinds = options.kinds or list(GROUPS[options.group])
    options.shared |= options.each > 1
    options.until = options.until or time.time() + options.seconds
    if options.quick:
        options.contexts, options.eval_tokens, options.seeds = [32, 64, 128], 1024, min(options.seeds, 2)
        options.sweep_tokens, options.train_tokens, options.rates = 512, 1024, [2e-3, 8e-3]
    options.sweep_tokens, options.train_tokens = int(options.sweep_tokens), int(options.train_tokens)
    return options
