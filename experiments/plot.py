"""Draw the training indicators of runs over their steps, as one picture (appendix L, figure 29).

    python -m experiments.plot runs/tiny-001                 # runs/tiny-001/indicators.png
    python -m experiments.plot runs/a runs/b --out both.png  # both in the same axes

Reads log.jsonl of each run, whose losses are means over the steps since the line before, and the figures that
experiments.evaluate left in evaluation.jsonl. Needs matplotlib.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np

from coco_gan import Parser, run_command, save_picture
from data import UserError, make_folder

# Title and name in the logs, of one line per run; of a second, dashed line the same two.
PANELS = (
    (("Wasserstein estimate $L_W$", "L_W"),),
    (("gradient penalty $L_{GP}$", "L_GP"),),
    (("mean gradient norm $‖∇D(ŝ′)‖_2$", "gradient_norm"),),
    (("spatial loss $L_S$", "L_S_real"), ("generated", "L_S_generated")),
    (("content loss $L_Q$", "L_Q"),),
    (("SWD × 1,000", "swd"), ("real against real", "swd_floor")),
    (("seam ratio, 1 is seamless", "seam_ratio"),),
    (("azimuth variety, 1 is that of real images", "azimuth_variety"),),
    (("seams of the margin", "margin_seam"), ("inside", "inner_seam")),
)
INDICATORS = [name for panel in PANELS for _, name in panel]


def read_log(run: str) -> list[dict]:
    """Indicators of a run, one dictionary per step, in the order of the steps.

    Steps that come again after a kill replace the first ones. Raises: UserError for a line that is broken,
    except a last one that was cut short.
    """
    entries = {}
    for name in ("log.jsonl", "evaluation.jsonl"):
        path = Path(run) / name
        *lines, _ = path.read_text().split("\n") if path.exists() else [""]
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                figures = {key: float(entry[key]) for key in INDICATORS if key in entry}
                if not all(map(math.isfinite, figures.values())):
                    raise ValueError
                entries.setdefault(int(entry["step"]), {}).update(figures)
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"{path}, line {number} is broken; mend it, or delete that line") from error
    if not any(entries.values()):
        raise UserError(f"{run} has no log of a run with indicators; give a run folder, like runs/tiny-001")
    return [{"step": step, **entries[step]} for step in sorted(entries)]


def draw(logs: dict[str, list[dict]]):
    """A matplotlib Figure with a panel per indicator that any log has, and a colour per log.

    Args: logs: what `read_log` gives, by the name of the run. A panel is logarithmic where its values are
    positive and span a factor of ten.
    """
    from matplotlib.figure import Figure

    def points(name):
        found = [[(entry["step"], entry[name]) for entry in log if name in entry] for log in logs.values()]
        return [np.array(line, float).reshape(-1, 2) for line in found]

    panels = [[(title, points(name)) for title, name in panel] for panel in PANELS]
    panels = [[line for line in panel if any(map(len, line[1]))] for panel in panels]
    panels = [panel for panel in panels if panel]
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.8 * rows + 0.4), dpi=150, layout="constrained")
    for number, panel in enumerate(panels, 1):
        ax = figure.add_subplot(rows, columns, number)
        for (_, lines), style in zip(panel, ("-", "--")):
            for k, (name, line) in enumerate(zip(logs, lines)):
                label = name if number == 1 and style == "-" else None
                ax.plot(
                    *line.T, style, color=f"C{k}", linewidth=1, marker="." * (len(line) < 30), label=label
                )
        values = np.concatenate([line[:, 1] for _, lines in panel for line in lines])
        if 0 < 10 * values.min() <= values.max():
            ax.set_yscale("log")
        ax.set_title(panel[0][0] + "".join(f" (dashed: {title})" for title, _ in panel[1:]), fontsize=10)
        ax.set_xlabel("step", fontsize=9)
        ax.tick_params(labelsize=8)
        ax.grid(color="0.9", linewidth=0.6)
    if len(logs) > 1:
        figure.legend(loc="outside upper left", ncols=4, frameon=False, fontsize=9)
    return figure


def plot(args: argparse.Namespace) -> None:
    logs = {run: read_log(run) for run in args.runs}
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise UserError("plots need matplotlib; get it by: pip install matplotlib") from error
    canvas = FigureCanvasAgg(draw(logs))
    canvas.draw()
    out = Path(args.out or Path(args.runs[0]) / "indicators.png")
    make_folder(out.parent)
    save_picture(np.array(canvas.buffer_rgba())[..., :3], out)
    print(out)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status, see `run_command`."""
    parser = Parser(prog="python -m experiments.plot", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, with its log.jsonl")
    parser.add_argument("--out", metavar="FILE", help="default: indicators.png in the first run's folder")
    return run_command(parser, plot, argv)


if __name__ == "__main__":
    sys.exit(main())
