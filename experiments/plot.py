"""Draw the training indicators of runs over their steps, as one picture (appendix L, figure 29).

    python -m experiments.plot runs/tiny-001                 # runs/tiny-001/indicators.png
    python -m experiments.plot runs/a runs/b --out both.png  # both in the same axes

Each line of RUN/log.jsonl is a point: losses are means over the steps since the line before, and nothing else
is smoothed. Needs matplotlib, which nothing else here does.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

import numpy as np

from coco_gan import Parser, free_name, run_command, save_picture, writing
from data import UserError

# Title and what the log calls it, of one line a run; of a second one, dashed, the same two.
PANELS = (
    (("Wasserstein estimate $L_W$", "L_W"),),
    (("gradient penalty $L_{GP}$", "L_GP"),),
    (("mean gradient norm $‖∇D(ŝ′)‖_2$", "gradient_norm"),),
    (("spatial loss $L_S$", "L_S_real"), ("generated", "L_S_generated")),
    (("content loss $L_Q$", "L_Q"),),
    (("SWD × 1,000", "swd"), ("real against real", "swd_floor")),
    (("seam ratio, 1 is seamless", "seam_ratio"),),
    (("azimuth variety, 1 is that of real images", "azimuth_variety"),),
    (("seams to the ring", "ring_seam"), ("inside", "inner_seam")),
)
INDICATORS = [name for panel in PANELS for _, name in panel]


def read_log(run: str) -> list[dict]:
    """The lines of RUN/log.jsonl, but for a last one that a crash cut short.

    Raises: UserError for a line with an indicator that is no finite number, or that is broken in another way.
    """
    path, entries = Path(run) / "log.jsonl", []
    if os.path.exists(path) and not os.path.isfile(path):  # reading it might never end
        raise UserError(f"RUN {run}: log.jsonl cannot be read: it is no file; give another run")
    try:
        *lines, rest = path.read_bytes().split(b"\n")  # rest: what stands after the last end of a line
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"RUN {run} has no log.jsonl; give a run's folder, like runs/tiny-001") from None
    except OSError as error:
        raise UserError(f"RUN {run}: log.jsonl cannot be read: {error.strerror}; give another run") from error
    for number, line in enumerate(lines, 1):
        where, last = f"{path}, line {number}", entries[-1]["step"] if entries else -1
        try:
            entry = json.loads(line)
            step = entry["step"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise UserError(f"{where} is broken; mend it, or delete that line") from None
        if type(step) is not int or not last < step < 2**53:
            raise UserError(f"{where}: step is {step!r:.40}, after {last}; mend it, or delete that line")
        for name in INDICATORS:
            if type(entry.get(name, 0)) not in (int, float) or not abs(entry.get(name, 0)) < 1e30:
                found = f"{name} is {entry[name]!r:.40}"
                raise UserError(f"{where}: {found}, which cannot be drawn; mend it, or delete that line")
        entries.append(entry)
    if not entries:
        raise UserError(f"{path} is empty; wait for the run's first line, or give another run")
    if not any(name in entry for entry in entries for name in INDICATORS):
        raise UserError(f"{path} has no indicator to draw; looked for {', '.join(INDICATORS)}")
    return entries


def draw(logs: dict[str, list[dict]]):
    """A matplotlib Figure: a panel for each indicator that any of the logs has, a colour for each log.

    Args: logs: what `read_log` gives, by the name of the run. A panel is logarithmic where its values are all
    positive and span a factor of ten.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    points = {
        name: [[(entry["step"], entry[name]) for entry in log if name in entry] for log in logs.values()]
        for name in INDICATORS
    }
    panels = [[(title, name) for title, name in panel if any(points[name])] for panel in PANELS]
    panels = [panel for panel in panels if panel]
    columns = 2 if len(panels) in (2, 4) else min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    turbo = colormaps["turbo"](np.linspace(0, 1, len(logs)))
    colours = colormaps["tab10"].colors if len(logs) <= 10 else turbo
    end = max(log[-1]["step"] for log in logs.values())
    names = [name if len(name) <= 40 else f"…{name[-39:]}" for name in logs]
    beside = max(1, 48 * columns // (max(map(len, names)) + 8))  # so many names fit in a line of the legend
    height = 2.8 * rows + 0.2 * math.ceil(len(names) / beside) + 0.2

    figure = Figure(figsize=(4.2 * columns, height), dpi=150, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    for number, panel in enumerate(panels, 1):
        ax, values = figure.add_subplot(rows, columns, number), []
        for (_, name), style in zip(panel, ("-", "--")):
            for line, colour in zip(points[name], colours):
                look = dict(color=colour, linewidth=1, marker="." if len(line) <= 30 else "")
                ax.plot(*np.array(line, float).reshape(-1, 2).T, style, **look)
                values += [value for _, value in line]
        if 0 < 10 * min(values) <= max(values):
            subs = (1, 2, 5) if max(values) < 1000 * min(values) else (1,)
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=subs))
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_formatter(NullFormatter())
        ax.set_xlim(0, 1.02 * max(end, 1))
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.xaxis.set_major_formatter("{x:,.0f}")
        if number > len(panels) - columns:  # there is none below
            ax.set_xlabel("step", fontsize=9)
        ax.set_title(" (dashed: ".join(title for title, _ in panel) + ")" * (len(panel) - 1), fontsize=10)
        ax.tick_params(labelsize=8)
        ax.grid(color="0.9", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    figure.legend(
        [Line2D([], [], color=colour) for colour, _ in zip(colours, names)],
        [f" {name}".replace("$", r"\$") for name in names],  # no formula; older versions hide a "_a"
        loc="outside upper left",
        ncols=beside,
        frameon=False,
        fontsize=9,
    )
    return figure


def plot(args: argparse.Namespace) -> None:
    """From the logs of runs to a picture in a file."""
    if len({os.path.realpath(run) for run in args.runs}) < len(args.runs):
        raise UserError(f"RUN {' '.join(args.runs)} names a run twice; leave one of them out")
    names = [Path(os.path.abspath(run)).name for run in args.runs]
    names = names if len({*names}) == len(names) else args.runs
    logs = {name: read_log(run) for name, run in zip(names, args.runs)}
    out = Path(args.out or free_name(Path(args.runs[0]) / "indicators"))
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out} is no PNG; give a name that ends in .png")
    if os.path.exists(out) and not args.force:
        raise UserError(f"--out {out} exists already; name another, or add --force to replace it")
    try:
        from matplotlib import style
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise UserError("plots need matplotlib, which is missing; try: pip install matplotlib") from error
    with style.context("default"):  # and not one of the user's, which might need LaTeX
        canvas = FigureCanvasAgg(draw(logs))
        canvas.draw()
    with writing("--out", out):
        out.parent.mkdir(parents=True, exist_ok=True)
        save_picture(np.array(canvas.buffer_rgba())[..., :3], out)
    print(out)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status, see `run_command`."""
    parser = Parser(prog="python -m experiments.plot", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folder of a run, with its log.jsonl")
    add("--out", metavar="FILE", help="a PNG (default: indicators.png … in the first run's folder)")
    add("--force", action="store_true", help="replace a picture that exists")
    return run_command(parser, plot, argv)


if __name__ == "__main__":
    sys.exit(main())
