"""Draws runs: loss, validation bits per byte, test-time training epoch by epoch, and where the bytes go.

    python data/plot.py runs/a runs/b --out docs/runs

Writes PREFIX.png and PREFIX.svg, the same bytes for the same logs. A run is its folder or its log alone; the logs of the
reference scripts are read too. A panel for which no run has figures is left out. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from text import Parser, UserError
from text import run as run_tool

if TYPE_CHECKING:
    from matplotlib.axes import Axes

try:
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter
except ImportError:
    mpl = None

SIZE_CAP = 16_000_000  # bytes; what a log of the reference scripts does not say

COLOURS = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#444444"
KINDS = "int5", "int6", "int8", "fp16", "fp32", "scale", "header", "model", "code"  # in the order of their bars
GREY, PALE, WARNING = "#6b6b6b", "#f1efe9", "#8a3200"
LONG_RUN = 20  # logged figures
WIDTH = 9.0  # inches: at 100 pixels to the inch, the width of a README
ROW, WIDE_ROW, LINE = 3.0, 3.2, 0.18  # inches; LINE for each run in a legend outside the axes
DPI = 200
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that every machine draws the same
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "train_gpt",
}


# ---------------------------------------------------------------------------------------------- reading logs


class Point(NamedTuple):
    """One `step:` line: seconds of training so far, loss in nats per token, and bits per byte if it is a validation."""

    seconds: float
    loss: float
    bpb: float | None = None


@dataclass
class Run:
    """What a log tells; whatever it does not say stays empty."""

    label: str
    colour: str
    train: dict[int, Point] = field(default_factory=dict)  # by step
    val: dict[int, Point] = field(default_factory=dict)
    no_adaptation: float | None = None  # this and all below in bits per byte
    epochs: dict[int, float] = field(default_factory=dict)  # of replay, from 1
    single_pass: float | None = None
    final: float | None = None
    kinds: dict[str, int] = field(default_factory=dict)  # bytes of the artifact and the code
    bits: dict[str, float] = field(default_factory=dict)  # per weight, by kind
    cap: int = SIZE_CAP

    @property
    def points(self) -> list[tuple[int, Point]]:
        """(step, point) of every training batch and every validation."""
        return [*self.train.items(), *self.val.items()]

    @property
    def total(self) -> int:
        """Bytes of artifact and code together."""
        return sum(self.kinds.values())

    def read(self, line: str) -> None:
        """Takes in one line of a log; most are of no interest. ValueError for a line of a known form with a wrong value."""
        if found := re.match(r"Code size: (\d+) bytes", line):  # the reference scripts
            self.kinds["code"] = int(found[1])
        elif found := re.match(r"Serialized model \S+: (\d+) bytes", line):
            self.kinds["model"] = int(found[1])
        elif re.match(r"step:\d+/\d+ (train|val)_loss:", line):
            self.read_step(pairs(line))
        elif re.match(r"(ttt_epoch:\d+/\d+|no_adaptation|final_\w+_exact) ", line):
            self.read_score(line.split()[0], pairs(line))
        elif re.match(r"export (kind|model_bytes):", line):
            self.read_export(pairs(line))

    def read_step(self, values: dict[str, str]) -> None:
        step, seconds = int(values["step"].split("/")[0]), float(values["train_time"].removesuffix("ms")) / 1000
        if "val_loss" in values:
            self.val[step] = Point(seconds, float(values["val_loss"]), float(values["val_bpb"]))
        else:
            self.train[step] = Point(seconds, float(values["train_loss"]))

    def read_score(self, name: str, values: dict[str, str]) -> None:
        if name.startswith("ttt_epoch"):
            self.epochs[int(values["ttt_epoch"].split("/")[0])] = float(values["val_bpb"])
        elif name == "no_adaptation":
            self.no_adaptation = float(values["val_bpb"])
        elif name == "final_ttt_exact" and values["protocol"] == "single_pass":
            self.single_pass = float(values["backward_looking_val_bpb"])
        elif name == "final_int8_zlib_roundtrip_exact":
            self.final = float(values["val_bpb"])

    def read_export(self, values: dict[str, str]) -> None:
        if "kind" in values:
            self.kinds[values["kind"]] = int(values["bytes"])
            self.bits[values["kind"]] = float(values["bits_per_weight"])
        else:
            self.kinds["header"] = int(values["model_bytes"]) - sum(self.kinds[kind] for kind in self.bits)
            self.kinds["code"], self.cap = int(values["code_bytes"]), int(values["max_bytes"])


def pairs(line: str) -> dict[str, str]:
    """The `name:value` pairs of a log line."""
    return dict(re.findall(r"(\w+):(\S+)", line))


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Reads folders (their train.log) and logs; UserError for one without any figures, or for too many."""
    if len(paths) > len(COLOURS):
        raise UserError(f"{len(paths)} runs are too many for one picture — draw at most {len(COLOURS)}")
    logs = [path / "train.log" if path.is_dir() else path for path in paths]
    runs = []
    for log, label, colour in zip(logs, labels(logs), COLOURS, strict=False):
        if not log.is_file():
            raise UserError(f"{log} does not exist — give a run's folder or its log")
        run = Run(label, colour)
        with open(log, encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    run.read(line)
                except (ValueError, KeyError) as error:
                    raise UserError(f"{log} line {number} is damaged ({error}) — give an untouched log") from error
        if run == Run(label, colour):
            raise UserError(f"{log} has no figures of a run — give a log of train_gpt.py or of a reference script")
        runs.append(run)
    return runs


def labels(logs: Sequence[Path]) -> list[str]:
    """A short name for each log, from its end: the folder of a train.log, else the file; as much path as tells them apart."""
    ends = [log.parent if log.name == "train.log" else log.with_suffix("") for log in (log.resolve() for log in logs)]
    parts = [end.parts for end in ends]
    depth = 1
    while len(names := ["/".join(part[-depth:]) for part in parts]) > len(set(names)) and depth < max(map(len, parts)):
        depth += 1
    return names


# ---------------------------------------------------------------------------------------------- panels


def draw_loss(ax: Axes, runs: Sequence[Run]) -> None:
    """Training loss (a line) and validation loss (dots) against the step."""
    draw_losses(ax, runs, "step", lambda step, _: step)
    ax.set_title("Loss against steps")


def draw_time(ax: Axes, runs: Sequence[Run]) -> None:
    """Training loss (a line) and validation loss (dots) against the time spent training."""
    minutes = max(point.seconds for run in runs for _, point in run.points) > 300
    unit, name = (60, "minutes") if minutes else (1, "seconds")
    draw_losses(ax, runs, f"{name} of training", lambda _, point: point.seconds / unit)
    ax.set_title("Loss against time")


def draw_losses(ax: Axes, runs: Sequence[Run], label: str, x: Callable[[int, Point], float]) -> None:
    batch, validation = {"lw": 0.9, "alpha": 0.55}, {"lw": 1.5, "marker": "o"}
    for run in runs:
        for series, style in ((run.train, batch), (run.val, validation | {"ms": dot(run)})):
            values = [point.loss for point in series.values()]
            ax.plot([x(*item) for item in series.items()], values, color=run.colour, **style)
    crop(ax, [[(step, point.loss) for step, point in run.points] for run in runs])
    ax.set_xlabel(label)
    ax.set_ylabel("nats per token")
    ax.legend([key(**batch), key(**validation, ms=4.5)], ["training batch", "validation"], loc="upper right")


def draw_bpb(ax: Axes, runs: Sequence[Run]) -> None:
    """Validation bits per byte during training, and the final score of the artifact beside its end."""
    training, final = {"lw": 1.5, "marker": "o"}, {"lw": 0, "marker": "*", "ms": 13, "mec": "white", "mew": 0.7}
    for run in runs:
        values = [point.bpb for point in run.val.values()]
        ax.plot(list(run.val), values, color=run.colour, ms=dot(run), **training)
        if run.val and run.final is not None:
            ax.plot(max(run.val), run.final, color=run.colour, zorder=4, **final)
    crop(ax, [[(step, point.bpb) for step, point in run.val.items()] for run in runs])
    ax.set_title("Validation bits per byte")
    ax.set_xlabel("step")
    ax.set_ylabel("bits per byte")
    scores = [f"{run.final:.4f}" for run in runs if run.final is not None]
    names = ["in training", "score of the artifact" + (f": {', '.join(scores)}" if len(scores) < 3 else "")]
    ax.legend([key(**training, ms=4.5), key(**final)][: 1 + bool(scores)], names[: 1 + bool(scores)], loc="upper right")


def draw_ttt(ax: Axes, runs: Sequence[Run]) -> None:
    """Bits per byte by replay epoch. Only epoch 1 is a score; a shaded field around the others says what they are."""
    last = max(max(run.epochs, default=1) for run in runs)
    ax.axvspan(1.5, last + 0.8, color=PALE, lw=0, zorder=0)
    for run in runs:
        if run.no_adaptation is not None:
            ax.axhline(run.no_adaptation, color=run.colour, lw=1.2, ls=":")
        if run.single_pass is not None:
            ax.axhline(run.single_pass, color=run.colour, lw=1.6)
        if run.epochs:
            end = max(run.epochs)
            ax.plot(list(run.epochs), list(run.epochs.values()), color=run.colour, lw=1.6, ls=(0, (4, 2)))
            ax.plot(end, run.epochs[end], color=run.colour, marker="o", ms=6, mfc=PALE, zorder=4)
        if 1 in run.epochs:
            ax.plot(1, run.epochs[1], color=run.colour, marker="o", ms=10, mec="white", mew=1, zorder=4)
    ax.set_xlim(0.2, last + 0.8)
    ax.set_xticks(sorted({1, last, *range(10, last, 10)}))
    ax.margins(y=0.1)
    ground = {"facecolor": PALE, "edgecolor": "none", "pad": 3}
    note = {"size": 10.5, "bbox": ground, "zorder": 1.5}  # above the grid, below the curves
    corner = {"transform": ax.transAxes, "ha": "right", "va": "top"}
    what = f"epochs 2 to {last}: has trained on what it scores\n\N{EM DASH} not a compression rate"
    ax.text(0.985, 0.8, what, color=WARNING, style="italic", **corner, **note)
    if firsts := [run.epochs[1] for run in runs if 1 in run.epochs]:
        what, at = "epoch 1:\nbackward-looking,\na valid score", {"xytext": (0.045, 0.1), "textcoords": "axes fraction"}
        arrow = {"arrowstyle": "-|>", "color": "black", "shrinkB": 7, "relpos": (0.1, 1)}
        ax.annotate(what, (1, min(firsts)), weight="bold", arrowprops=arrow, **at, **note)
    ax.set_title("Test-time training, replayed epoch by epoch")
    ax.set_xlabel("epoch")
    ax.set_ylabel("bits per byte")
    entries = [(key(run.colour, lw=3), line) for run in runs if (line := ttt_figures(run))]
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 4}
    ax.legend(*zip(*entries, strict=True), handlelength=1.4, **below)


def ttt_figures(run: Run) -> str:
    """The legend's line for a run: the figures of its evaluation, in digits; empty if it has none."""
    last = max(run.epochs, default=1)
    figures = {
        "no adaptation {:.4f} (dotted)": run.no_adaptation,
        "single pass {:.4f}": run.single_pass,
        "epoch 1 {:.4f}": run.epochs.get(1),
        f"epoch {last} {{:.4f}} (not a score)": run.epochs[last] if last > 1 else None,
    }
    known = [form.format(bpb) for form, bpb in figures.items() if bpb is not None]
    return f"{run.label}:  " + "  ·  ".join(known) if known else ""


def draw_bytes(ax: Axes, runs: Sequence[Run]) -> None:
    """Bytes of the artifact by kind, of the code and in total, against the cap."""
    runs = [run for run in runs if run.kinds]
    kinds = [kind for kind in KINDS if any(kind in run.kinds for run in runs)]
    cap, most, thickness = min(run.cap for run in runs), max(run.total for run in runs), 0.84 / len(runs)
    unit, name = (1e6, "MB") if most >= 1e6 else (1e3, "kB")
    near, legible = cap < 2 * most, len(runs) * (len(kinds) + 1) <= 16
    right = 1.05 * max(cap, most) if near else 1.3 * most
    for index, run in enumerate(runs):
        for row, kind in enumerate([*kinds, "total"]):
            size = run.total if kind == "total" else run.kinds.get(kind, 0)
            y, inside = row + (index - (len(runs) - 1) / 2) * thickness, size > 0.6 * right
            ax.barh(y, size / unit, thickness * 0.9, color=run.colour if kind == "total" else pale(run.colour))
            if size and legible:
                text = f"{size:,} bytes" if kind == "total" else readable(size)
                text += f", {run.bits[kind]:.2f} bits/weight" if kind in run.bits else ""
                colour = "white" if kind == "total" and inside else "black" if inside else GREY
                at = {"xytext": (-4 if inside else 4, 0), "ha": "right" if inside else "left", "va": "center_baseline"}
                ax.annotate(text, (size / unit, y), textcoords="offset points", size=8, color=colour, **at)
    if near:
        ax.axvline(cap / unit, color="black", lw=1.4)
    ax.set_title(f"Bytes: {'' if len(runs) == 1 else 'at most '}{most / cap:.1%} of the cap")
    ax.set_xlim(0, right / unit)
    ax.set_yticks(range(len(kinds) + 1), [*kinds, "total"])
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.set_xlabel(f"{name} (cap: {cap / 1e6:g} MB{', the black line' if near else ', beyond the frame'})")


def key(colour: str = GREY, **style: object) -> Line2D:
    """A legend's sample."""
    return Line2D([], [], color=colour, **style)


def dot(run: Run) -> float:
    """The size of a validation's dot: smaller where there are many."""
    return 4.5 if len(run.val) <= 20 else 2.2


def pale(colour: str) -> tuple[float, ...]:
    """A colour mixed with white: unlike a transparent one, it hides the grid."""
    return tuple(0.55 + 0.45 * part for part in mpl.colors.to_rgb(colour))


def readable(size: int) -> str:
    """A number of bytes in three digits."""
    return f"{size / 1e6:.3g} MB" if size >= 1e6 else f"{size / 1e3:.3g} kB"


def crop(ax: Axes, runs: Sequence[Sequence[tuple[int, float]]]) -> None:
    """Fits the y axis to what comes after the first tenth of each run: the steep start would flatten the rest.

    `runs`: (step, value) of each. Short runs are shown whole.
    """
    late = []
    for points in runs:
        end = max((step for step, _ in points), default=0)
        late += [value for step, value in points if step >= end / 10 and math.isfinite(value)]
    if len(late) >= LONG_RUN * len(runs) and min(late) < max(late):
        margin = 0.08 * (max(late) - min(late))
        ax.set_ylim(min(late) - margin, max(late) + margin)
    ax.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 4, 5, 10]))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))


class Panel(NamedTuple):
    """One part of the picture: how it is drawn, and whether a run has anything for it."""

    draw: Callable[[Axes, Sequence[Run]], None]
    shows: Callable[[Run], bool]
    wide: bool = False


PANELS = {
    "loss": Panel(draw_loss, lambda run: bool(run.points)),
    "time": Panel(draw_time, lambda run: bool(run.points)),
    "bpb": Panel(draw_bpb, lambda run: len(run.val) > 1),
    "bytes": Panel(draw_bytes, lambda run: bool(run.kinds)),
    "ttt": Panel(draw_ttt, lambda run: len(run.epochs) > 1, wide=True),
}


# ---------------------------------------------------------------------------------------------- picture


def draw(runs: Sequence[Run], wanted: Sequence[str]) -> Figure:
    """Returns the picture of the wanted panels for which there are figures; UserError if there are none."""
    names = [name for name, panel in PANELS.items() if name in wanted and any(map(panel.shows, runs))]
    if not names:
        raise UserError(f"no run has figures for {', '.join(wanted)} — give other logs or another --what")
    narrow = [name for name in names if not PANELS[name].wide]
    rows = [narrow[i : i + 2] for i in range(0, len(narrow), 2)] + [[name] for name in names if PANELS[name].wide]
    heights = [WIDE_ROW + LINE * len(runs) if PANELS[row[0]].wide else ROW for row in rows]
    figure = Figure((WIDTH, sum(heights) + 2 * LINE * (len(runs) > 1)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # inches
    axes = figure.subplot_mosaic([row * (2 // len(row)) for row in rows], height_ratios=heights)
    for name in names:
        PANELS[name].draw(axes[name], runs)
    if len(runs) > 1:
        handles, names = [key(run.colour, lw=3) for run in runs], [run.label for run in runs]
        figure.legend(handles, names, loc="outside upper left", ncols=4)
    return figure


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or a log")
    parser.add_argument("--out", type=Path, required=True, metavar="PREFIX", help="writes PREFIX.png and PREFIX.svg")
    parser.add_argument("--what", nargs="+", choices=PANELS, default=list(PANELS), help="panels; default: all")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    if mpl is None:
        raise UserError("drawing needs matplotlib — pip install matplotlib")
    runs = read_runs(options.runs)
    prefix = options.out.with_suffix("") if options.out.suffix in (".png", ".svg") else options.out
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        figure = draw(runs, options.what)
        for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None, "Creator": None})):
            path = prefix.with_name(prefix.name + suffix)
            figure.savefig(path, dpi=DPI, metadata=metadata)
            print(f"wrote {path}")


if __name__ == "__main__":
    run_tool(main)
