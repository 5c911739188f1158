"""Take out of a checkpoint what sampling needs, the averaged weights of G: a small file to pass on.

python -m experiments.export --out faces.pt                             # of the newest run
python coco_gan.py sample --checkpoint faces.pt
"""

import argparse
import os
import sys
from pathlib import Path

import torch

from coco_gan import Parser, find_checkpoint, load, read_checkpoint, writing
from data import UserError

KEPT = ("format", "config", "step", "images", "G_average")


def export(args: argparse.Namespace) -> None:
    path, out = find_checkpoint(args.checkpoint, panorama=args.panorama), Path(args.out)
    if out.suffix != ".pt":
        raise UserError(f"--out {out} is no checkpoint's name; end it in .pt")
    if out.exists() and not args.force:
        raise UserError(f"--out {out} exists already; name another, or add --force to replace it")
    load(path)  # refuses a file whose weights do not fit
    contents, _ = read_checkpoint(path)
    temporary = out.with_name(f".{out.name}")
    with writing("--out", out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save({name: contents[name] for name in KEPT}, file)
        os.replace(temporary, out)
    print(f"{out}: averaged weights of step {contents['step']:,}, {out.stat().st_size:,} bytes")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 2 for a mistake of the user's."""
    parser = Parser(prog="python -m experiments.export", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", metavar="FILE|RUN", help="what to take them from (default: the newest under runs/)")
    add("--panorama", action="store_true", help="take the newest checkpoint of a cylinder")
    add("--out", required=True, metavar="FILE", help="where to, ending in .pt")
    add("--force", action="store_true", help="replace a file that exists")
    try:
        export(parser.parse_args(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
