"""Take G's moving average out of a checkpoint: to pass on, to run without this project, or to read.

    python -m experiments.export --out faces.pt        # of the newest run; sample --checkpoint faces.pt
    python -m experiments.export --out faces.pt2       # a program of torch.export, for PyTorch alone
    python -m experiments.export --out faces.npz       # the weights by their names, for NumPy
    python -m experiments.export --out faces.onnx      # where the packages onnx and onnxscript are installed

A .pt2 and an .onnx map z (B, z_dim) and c_micro (B, c_dim) to micro patches (B, 3, S, S) in [-1, 1], for any
B. Each holds the configuration as JSON as well: a .pt2 in its extra file config.json, the others under the
name config. `coco_gan.micro_coordinates` says what c_micro is, `full_image` how patches become images.
"""

import argparse
import dataclasses
import importlib.util
import io
import json
import logging
import sys
import warnings
from pathlib import Path

import numpy as np
import torch

from coco_gan import Generator, Parser, find_checkpoint, load, read_checkpoint, run_command
from data import UserError, make_folder, write_file

ENDINGS = (".pt", ".pt2", ".npz", ".onnx")


def program_of(G: Generator) -> torch.export.ExportedProgram:
    """G as a graph that needs none of this code, for any number of patches from 1 on."""
    B, config = torch.export.Dim("B", min=1, max=2**20), G.config
    example = (torch.zeros(2, config.z_dim), torch.zeros(2, config.c_dim))
    return torch.export.export(G, example, dynamic_shapes=({0: B}, {0: B}))


def encode(kind: str, contents: dict, G: Generator) -> bytes:
    """The bytes of a file of one of the four ENDINGS."""
    text, file = json.dumps(dataclasses.asdict(G.config), indent=1), io.BytesIO()
    if kind == ".pt":
        kept = {name: t for name, t in contents["tensors"].items() if name.startswith("G_ema.")}
        torch.save({**contents, "tensors": kept}, file)
    elif kind == ".npz":
        np.savez(file, config=np.array(text), **{name: t.numpy() for name, t in G.state_dict().items()})
    elif kind == ".pt2":
        torch.export.save(program_of(G), file, extra_files={"config.json": text})
    else:
        import onnx

        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of torchvision, not needed here
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model = torch.onnx.export(program_of(G), dynamo=True, verbose=False).model_proto
        onnx.helper.set_model_props(model, {"config": text})
        file.write(model.SerializeToString())
    return file.getvalue()


def export(args: argparse.Namespace) -> None:
    path, out = find_checkpoint(args.checkpoint, args.panorama), Path(args.out)
    if out.suffix not in ENDINGS:
        raise UserError(f"--out {out} has no known ending; give {', '.join(ENDINGS)}")
    if out.suffix == ".onnx" and not all(map(importlib.util.find_spec, ("onnx", "onnxscript"))):
        raise UserError(f"--out {out} takes two more packages; get them by: pip install onnx onnxscript")
    _, contents = read_checkpoint(path)
    G = load(path).to(memory_format=torch.contiguous_format)
    for module in G.modules():
        if hasattr(module, "v"):
            del module.v  # needed in training alone
    make_folder(out.parent)
    write_file(out, encode(out.suffix, contents, G))
    print(f"{out}: step {contents['step']:,} of {path}, {out.stat().st_size:,} bytes")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status, see `run_command`."""
    parser = Parser(prog="python -m experiments.export", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", metavar="FILE|RUN", help="default: the newest under runs/")
    add("--panorama", action="store_true", help="take the newest checkpoint of a cylinder")
    add("--out", required=True, metavar="FILE", help=f"where to, ending in {', '.join(ENDINGS)}")
    return run_command(parser, export, argv)


if __name__ == "__main__":
    sys.exit(main())
