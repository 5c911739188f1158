"""Test experiments/plot.py on made-up logs: python -m pytest experiments/test_plot.py"""

import json
import sys

import numpy as np
import pytest
from PIL import Image

import coco_gan
from experiments import plot

LOSSES = dict(L_W=2.0, L_GP=0.5, L_S_real=1.0, L_S_generated=1.5)
BLUE, ORANGE = (31, 119, 180), (255, 127, 14)  # matplotlib's first two colours


def make(run, *entries, end="\n"):
    """A run whose log has these entries, or a text as it is, as lines."""
    run.mkdir(parents=True)
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    (run / "log.jsonl").write_bytes(("\n".join(lines) + end).encode())
    return run


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a plain run of four lines, and one with all that may be logged."""
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "plain", *({"step": s, **LOSSES, "images": s * 16} for s in (100, 200, 300, 400)))
    more = dict(gradient_norm=1.2, L_Q=0.4, azimuth_variety=0.9, ring_seam=3.0, inner_seam=1.0)
    lines = [{"step": s, "L_W": 1000 / s, "L_S_real": 1, "L_S_generated": -s, **more} for s in (1, 2, 500)]
    lines[1] |= dict(swd=30.0, seam_ratio=1.5)
    lines[2] |= dict(swd=20, seam_ratio=1.25)
    make(tmp_path / "full", *lines)
    return tmp_path


@pytest.fixture
def run(here, capsys):
    """Run the command; returns the exit status, and the lines of its output and of its errors."""

    def run(*arguments):
        status = plot.main([*map(str, arguments)])
        out, err = capsys.readouterr()
        return status, out.splitlines(), err.splitlines()

    return run


@pytest.fixture
def matplotlib():
    return pytest.importorskip("matplotlib", reason="needs matplotlib, to draw")


def refused(result):
    """The message of a command that ended in one line."""
    status, out, (error,) = result
    assert status == 2 and out == [] and error.startswith("error: ")
    return error.removeprefix("error: ")


# ----------------------------------------------------------------------------------------------------------
# The log
# ----------------------------------------------------------------------------------------------------------


def test_losses_are_called_as_training_logs_them():
    others = {"swd", "swd_floor", "seam_ratio", "azimuth_variety", "ring_seam", "inner_seam"}
    assert {*plot.INDICATORS} - others == {*coco_gan.LOSSES} - {"L_G"}


@pytest.mark.parametrize("rest", ["", '{"step": 300, "L_W', '{"step": 300}', "\0\0\0", "\xff"])
def test_an_unfinished_last_line_is_none(rest, tmp_path):
    run = make(tmp_path / "run", {"step": 100, "L_W": 1.5}, {"step": 200, "L_W": -1}, rest, end="")
    assert plot.read_log(run) == [{"step": 100, "L_W": 1.5}, {"step": 200, "L_W": -1}]


GOOD = '{"step": 7, "L_W": 1}'
BROKEN = "log.jsonl, line 2 is broken; mend it, or delete that line"


@pytest.mark.parametrize(
    "lines, message",
    [
        ([""], "log.jsonl is empty; wait for the run's first line"),
        (['{"step": 7, "L_W": 1'], BROKEN.replace("2", "1")),  # the last, but it is finished
        ([GOOD, '{"step": 8, "L_'], BROKEN),
        ([GOOD, '{"step": 8, "L_W{"step": 9, "L_W": 1}', GOOD], BROKEN),  # two that ran into each other
        ([GOOD, "", GOOD], BROKEN),
        ([GOOD, "[" * 10**5, GOOD], BROKEN),
        ([GOOD, '{"L_W": 1}', GOOD], BROKEN),
        ([GOOD, '"step"', GOOD], BROKEN),
        ([GOOD, "[1]", GOOD], BROKEN),
        ([GOOD, "8", GOOD], BROKEN),
        ([GOOD, '{"step": 8, "L_W": NaN}'], "line 2: L_W is nan, which cannot be drawn; mend it"),
        ([GOOD, '{"step": 8, "L_W": -Infinity}'], "line 2: L_W is -inf, which"),
        ([GOOD, '{"step": 8, "swd": 1e999}'], "line 2: swd is inf, which"),
        ([GOOD, '{"step": 8, "L_S_generated": null}'], "line 2: L_S_generated is None, which"),
        ([GOOD, '{"step": 8, "L_Q": "0.5"}'], "line 2: L_Q is '0.5', which"),
        ([GOOD, '{"step": 8, "L_GP": true}'], "line 2: L_GP is True, which"),
        ([GOOD, '{"step": 8, "L_GP": 1%s}' % ("0" * 999)], "line 2: L_GP is 1" + 39 * "0" + ", which"),
        ([GOOD, '{"step": 8.5, "L_W": 1}'], "line 2: step is 8.5, after 7; mend it"),
        ([GOOD, '{"step": NaN, "L_W": 1}'], "line 2: step is nan, after 7"),
        ([GOOD, '{"step": "8", "L_W": 1}'], "line 2: step is '8', after 7"),
        ([GOOD, GOOD], "line 2: step is 7, after 7"),
        (['{"step": -1, "L_W": 1}'], "line 1: step is -1, after -1"),
        (
            ['{"step": 1, "loss": 1}'],
            "log.jsonl has no indicator to draw; looked for L_W, L_GP, gradient_norm",
        ),
    ],
)
def test_a_log_that_is_no_good_is_told_with_its_line(lines, message, run, here):
    make(here / "bad", *lines, end="\n" if lines != [""] else "")
    text = refused(run("plain", "bad", "--out", "a.png"))
    assert text.startswith("bad/") and message in text and len(text) < 300
    assert not (here / "a.png").exists()


def test_an_empty_log_may_have_an_unfinished_line(run, here):
    make(here / "bad", '{"step": 100, "L_', end="")
    assert "bad/log.jsonl is empty" in refused(run("bad"))


def test_runs_that_cannot_be_read_are_named(run, here):
    (here / "bare").mkdir()
    (here / "odd" / "log.jsonl").mkdir(parents=True)
    for name in ("bare", "nowhere", "plain/log.jsonl"):
        message = f"RUN {name} has no log.jsonl; give a run's folder, like runs/tiny-001"
        assert refused(run("plain", name)) == message
    assert refused(run("odd")).startswith("RUN odd: log.jsonl cannot be read: ")
    assert "cannot be read" in refused(run("n" * 999))
    assert (
        refused(run("plain", "full", "plain/"))
        == "RUN plain full plain/ names a run twice; leave one of them out"
    )
    assert "RUN" in refused(run())


def test_where_to_is_checked_before_drawing(run, here):
    (here / "a.png").write_text("mine")
    message = "--out a.png exists already; name another, or add --force to replace it"
    assert refused(run("plain", "--out", "a.png")) == message
    for name in ("a.pdf", "a", "folder/", ".png"):
        assert refused(run("plain", "--out", name)).endswith("is no PNG; give a name that ends in .png")
    assert (here / "a.png").read_text() == "mine"


def test_without_matplotlib_one_line_says_how_to_get_it(run, here, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = "plots need matplotlib, which is missing; try: pip install matplotlib"
    assert refused(run("plain")) == message
    assert sorted(path.name for path in (here / "plain").iterdir()) == ["log.jsonl"]


# ----------------------------------------------------------------------------------------------------------
# The picture
# ----------------------------------------------------------------------------------------------------------


def lines_of(ax):
    """Of each line of a panel: steps, values, colour, style; colours 0 to 255."""
    for line in ax.lines:
        colour = tuple(round(255 * float(part)) for part in line.get_color()[:3])
        yield *map(list, line.get_data()), colour, line.get_linestyle()


def test_each_indicator_has_a_panel_and_each_run_a_colour(here, matplotlib):
    figure = plot.draw({"plain": plot.read_log("plain"), "full": plot.read_log("full")})
    panels = {ax.get_title(): [*lines_of(ax)] for ax in figure.axes}
    plain, full = [100, 200, 300, 400], [1, 2, 500]
    assert [text.get_text().strip() for text in figure.legends[0].get_texts()] == ["plain", "full"]
    assert [line.get_color() for line in figure.legends[0].get_lines()] == [
        line.get_color() for line in figure.axes[0].lines
    ]
    assert panels == {
        "Wasserstein estimate $L_W$": [
            (plain, [2] * 4, BLUE, "-"),
            (full, [1000, 500, 2], ORANGE, "-"),
        ],
        "gradient penalty $L_{GP}$": [(plain, [0.5] * 4, BLUE, "-"), ([], [], ORANGE, "-")],
        "mean gradient norm $‖∇D(ŝ′)‖_2$": [([], [], BLUE, "-"), (full, [1.2] * 3, ORANGE, "-")],
        "spatial loss $L_S$ (dashed: generated)": [
            (plain, [1] * 4, BLUE, "-"),
            (full, [1] * 3, ORANGE, "-"),
            (plain, [1.5] * 4, BLUE, "--"),
            (full, [-1, -2, -500], ORANGE, "--"),
        ],
        "content loss $L_Q$": [([], [], BLUE, "-"), (full, [0.4] * 3, ORANGE, "-")],
        "SWD × 1,000": [([], [], BLUE, "-"), ([2, 500], [30, 20], ORANGE, "-")],
        "seam ratio, 1 is seamless": [([], [], BLUE, "-"), ([2, 500], [1.5, 1.25], ORANGE, "-")],
        "azimuth variety, 1 is that of real images": [([], [], BLUE, "-"), (full, [0.9] * 3, ORANGE, "-")],
        "seams to the ring (dashed: inside)": [
            ([], [], BLUE, "-"),
            (full, [3] * 3, ORANGE, "-"),
            ([], [], BLUE, "--"),
            (full, [1] * 3, ORANGE, "--"),
        ],
    }
    assert {ax.get_xlim() for ax in figure.axes} == {(0, 510)}
    logarithmic = [ax.get_title() for ax in figure.axes if ax.get_yscale() == "log"]
    assert logarithmic == ["Wasserstein estimate $L_W$"]  # of the others one is negative, and the rest narrow


def test_the_distance_of_real_images_is_dashed_where_it_is_logged(matplotlib):
    figure = plot.draw({"a": [{"step": 5, "swd": 30, "swd_floor": 3}]})
    (ax,) = figure.axes
    assert ax.get_title() == "SWD × 1,000 (dashed: real against real)" and ax.get_yscale() == "log"
    assert [*lines_of(ax)] == [([5], [30], BLUE, "-"), ([5], [3], BLUE, "--")]
    assert {line.get_marker() for line in ax.lines} == {"."}  # a line of one point would not be seen


@pytest.mark.parametrize(
    "low, high", [(0.1, 1), (6, 67), (0.3, 40), (1e-9, 1e9), (1e-300, 1e29), (5e-324, 1)]
)
def test_logarithmic_panels_have_few_readable_numbers(low, high, matplotlib):
    figure = plot.draw({"a": [{"step": 1, "L_W": low}, {"step": 2, "L_W": high}]})
    figure.draw_without_rendering()
    bottom, top = figure.axes[0].get_ylim()
    ticks = [tick for tick in figure.axes[0].get_yticks() if bottom <= tick <= top]
    labels = [text.get_text().replace("−", "-") for text in figure.axes[0].get_yticklabels()]
    assert 3 <= len(ticks) <= 12 and {f"{tick:g}" for tick in ticks} <= {*labels}
    assert [tick for tick in figure.axes[0].get_yticklabels(minor=True) if tick.get_text()] == []


def count(picture, colour):
    return (np.abs(picture.astype(int) - colour).max(-1) < 20).sum()


def test_a_picture_is_made_beside_the_log_and_replaces_none(run, here, matplotlib, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "TkAgg")
    monkeypatch.delenv("DISPLAY", raising=False)
    assert run("plain", "full") == (0, ["plain/indicators.png"], [])
    first = (here / "plain/indicators.png").read_bytes()
    with Image.open(here / "plain/indicators.png") as image:
        assert image.format == "PNG" and image.mode == "RGB" and 1200 < image.width < 2400
        both = np.asarray(image)
    assert (both == 255).all(-1).mean() > 0.85  # a white sheet with thin lines
    assert count(both, BLUE) > 300 and count(both, ORANGE) > 300

    assert run("plain") == (0, ["plain/indicators-2.png"], [])
    assert run("full", "--out", "new/folder/full.PNG") == (0, ["new/folder/full.PNG"], [])
    assert (here / "plain/indicators.png").read_bytes() == first
    alone = np.asarray(Image.open(here / "plain/indicators-2.png"))
    assert count(alone, BLUE) > 300 and count(alone, ORANGE) == 0
    assert run("plain", "--out", "plain/indicators.png", "--force") == (0, ["plain/indicators.png"], [])
    again = (here / "plain/indicators.png").read_bytes()
    assert again == (here / "plain/indicators-2.png").read_bytes() != first
    assert not [*here.rglob(".*")]


def test_a_place_that_cannot_be_written_is_told(run, here, matplotlib):
    (here / "file").write_text("")
    assert refused(run("plain", "--out", "file/a.png")).startswith("--out file/a.png cannot be written: ")
    (here / "b.png").mkdir()
    assert refused(run("plain", "--out", "b.png", "--force")).startswith("--out b.png cannot be written: ")
    assert not [*here.rglob(".*")]


def test_settings_of_the_user_change_nothing(run, here, matplotlib):
    run("plain", "--out", "a.png")
    with matplotlib.rc_context({"text.usetex": True, "axes.facecolor": "red", "font.size": 40}):
        assert run("plain", "--out", "b.png")[0] == 0
    assert (here / "a.png").read_bytes() == (here / "b.png").read_bytes()


def test_runs_are_told_apart_by_name_or_else_by_path(run, here, matplotlib, monkeypatch):
    drawn = []
    monkeypatch.setattr(plot, "draw", lambda logs, draw=plot.draw: drawn.append(draw(logs)) or drawn[-1])
    for name in ("a/same", "b/same", r"_$\hidden$", "n" * 99):
        make(here / name, {"step": 1, "L_W": 1})
    assert run("a/same", here / "plain", "--out", "1.png")[0] == 0
    assert run("a/same", "b/same", r"_$\hidden$", "n" * 99, "--out", "2.png") == (0, ["2.png"], [])
    names = [[text.get_text() for text in figure.legends[0].get_texts()] for figure in drawn]
    assert names == [[" same", " plain"], [" a/same", " b/same", r" _\$\hidden\$", " …" + "n" * 39]]


def test_many_runs_have_colours_of_their_own(matplotlib):
    figure = plot.draw({f"run-{k}": [{"step": 1, "L_W": k}] for k in range(30)})
    assert len({colour for _, _, colour, _ in lines_of(figure.axes[0])}) == 30
    assert len(figure.legends[0].get_lines()) == 30
