"""Measures every experiment, of the paper and beyond, that the rows do not hold yet."""

import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import beyond, chosen, command, rows
from experiments.grid import GRIDS, run
from neuron_merging import memory
from neuron_merging.commandline import Parser, choose_device
from neuron_merging.errors import NeuronMergingError


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiments of all checkpoints in pretrained/, or of one network and checkpoint."""
    parser = Parser(prog="python -m experiments.reproduce", description=main.__doc__)
    parser.add_argument("network", nargs="?", choices=GRIDS, help="[every network whose checkpoint is there]")
    parser.add_argument("--pretrained", type=Path, help="another checkpoint of that network")
    parser.add_argument(
        "--paper",
        action="store_true",
        help="prune, merge and merge-derived only, neither restoration and its rivals nor chosen widths",
    )
    parser.add_argument("--data", type=Path, help="folder of the data sets [$NEURON_MERGING_DATA, or data]")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rows", type=Path, default=rows.ROWS, help="file the rows go to [%(default)s]")
    args = parser.parse_args(argv)
    if args.pretrained and (args.network is None or not args.pretrained.exists()):
        raise NeuronMergingError(f"--pretrained {args.pretrained}: name a file that is there, and the network it is of")
    device = choose_device(args.device)
    memory.keep_freed()
    for name, grid in GRIDS.items():
        if args.network not in (None, name):
            continue
        if not (args.pretrained or grid.checkpoint).exists():
            print(f"{grid.title}: no checkpoint yet ({grid.checkpoint.name})")
            continue
        others = () if args.paper else (*beyond.experiments(grid), *chosen.experiments(grid))
        wanted = [*grid.experiments(), *others]
        measured = run(grid, device, args.rows, args.pretrained, wanted, args.data)
        print(f"{grid.title}: {len(measured)} rows in {args.rows}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
