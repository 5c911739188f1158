"""Take the averaged weights of G out of a checkpoint: to pass on, to run without this project, or to read.

    python -m experiments.export --out faces.pt        # of the newest run; sample --checkpoint faces.pt
    python -m experiments.export --out faces.pt2       # a program of torch.export, for PyTorch alone
    python -m experiments.export --out faces.npz       # the weights by their names, for NumPy
    python -m experiments.export --out faces.onnx      # where the packages onnx and onnxscript are installed

A .pt2 and an .onnx map z (B, z_dim) and c_micro (B, c_dim) to micro patches (B, 3, S, S) in [-1, 1], for any
B. Each holds the configuration as JSON as well: a .pt2 as its extra file config.json, the others by the
name config. `coco_gan.micro_coordinates` says what c_micro is, `full_image` what becomes of the patches.
"""

import argparse
import dataclasses
import importlib.util
import json
import logging
import sys
import warnings
from pathlib import Path

import numpy as np
import torch

from coco_gan import (
    Generator,
    Parser,
    find_checkpoint,
    load,
    memory,
    read_checkpoint,
    run_command,
    whole,
    writing,
)
from data import UserError

KEPT = ("format", "config", "step", "images", "G_average")
ENDINGS = (".pt", ".pt2", ".npz", ".onnx")


def program_of(G: Generator) -> torch.export.ExportedProgram:
    """G as a graph that needs no Python of ours, for any number of patches from 1 on."""
    B, config = torch.export.Dim("B", min=1, max=2**20), G.config
    example = (torch.zeros(2, config.z_dim), torch.zeros(2, config.c_dim))
    return torch.export.export(G, example, dynamic_shapes=({0: B}, {0: B}))


def write(kind: str, contents: dict, G: Generator, path: Path) -> None:
    """Write one of the four ENDINGS."""
    text = json.dumps(dataclasses.asdict(G.config), indent=1)
    if kind == ".pt":
        with open(path, "wb") as file:
            torch.save({name: contents[name] for name in KEPT}, file)
    elif kind == ".npz":
        weights = {name: tensor.numpy() for name, tensor in G.state_dict().items()}
        with open(path, "wb") as file:
            np.savez(file, config=np.array(text), **weights)
    elif kind == ".pt2":
        with open(path, "wb") as file:
            torch.export.save(program_of(G), file, extra_files={"config.json": text})
    else:
        import onnx

        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it tells of torchvision, not needed here
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            torch.onnx.export(program_of(G), dynamo=True, verbose=False).save(str(path))
        model = onnx.load(str(path))
        onnx.helper.set_model_props(model, {"config": text})
        onnx.save(model, str(path))


def export(args: argparse.Namespace) -> None:
    path, out = find_checkpoint(args.checkpoint, panorama=args.panorama), Path(args.out)
    if out.suffix not in ENDINGS:
        raise UserError(f"--out {out} has no known ending; give {', '.join(ENDINGS)}")
    if out.suffix == ".onnx" and not all(map(importlib.util.find_spec, ("onnx", "onnxscript"))):
        raise UserError(f"--out {out} takes two more packages; get them by: pip install onnx onnxscript")
    if out.exists() and not args.force:
        raise UserError(f"--out {out} exists already; name another, or add --force to replace it")
    G = load(path).to(memory_format=torch.contiguous_format)  # refuses a file whose weights do not fit
    for module in G.modules():
        if hasattr(module, "v"):
            del module.v  # of training alone
    contents, _ = read_checkpoint(path)
    with writing("--out", out), memory("memory is full; export on a larger machine"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with whole(out) as part:
            write(out.suffix, contents, G, part)
    print(f"{out}: averaged weights of step {contents['step']:,}, {out.stat().st_size:,} bytes")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status, see `run_command`."""
    parser = Parser(prog="python -m experiments.export", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", metavar="FILE|RUN", help="what to take them from (default: the newest under runs/)")
    add("--panorama", action="store_true", help="take the newest checkpoint of a cylinder")
    add("--out", required=True, metavar="FILE", help=f"where to, ending in {', '.join(ENDINGS)}")
    add("--force", action="store_true", help="replace a file that exists")
    return run_command(parser, export, argv)


if __name__ == "__main__":
    sys.exit(main())
