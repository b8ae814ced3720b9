"""Draws runs: loss, validation bits per byte, test-time training epoch by epoch, and where the bytes go.

    python data/plot.py runs/a runs/b --out docs/runs

Writes PREFIX.png and PREFIX.svg, the same bytes for the same logs. A run is its folder or its log alone; the logs of the
reference scripts are read too. A panel for which no run has figures is left out. Needs matplotlib.
"""

from __future__ import annotations

import argparse
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
except ImportError:
    mpl = None

SIZE_CAP = 16_000_000  # bytes; what a log of the reference scripts does not say

COLOURS = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#444444"
KINDS = "int5", "int6", "int8", "fp16", "fp32", "scale", "header", "model", "code"  # in the order of their bars
GREY, PALE = "#6b6b6b", "#f1efe9"
WIDTH = 9.0  # inches: at 100 pixels to the inch, the width of a README
ROW = 3.0
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
    def points(self) -> dict[int, Point]:
        """All that is known of the loss, by step; a validation hides a training batch of the same step."""
        return self.train | self.val

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
    parts = [
        log.resolve().parent.parts if log.name == "train.log" else log.resolve().with_suffix("").parts for log in logs
    ]
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
    minutes = max(point.seconds for run in runs for point in run.points.values()) > 300
    unit, name = (60, "minutes") if minutes else (1, "seconds")
    draw_losses(ax, runs, f"{name} of training", lambda _, point: point.seconds / unit)
    ax.set_title("Loss against time")


def draw_losses(ax: Axes, runs: Sequence[Run], label: str, x: Callable[[int, Point], float]) -> None:
    for run in runs:
        for series, style in ((run.train, {"lw": 1.1}), (run.val, {"lw": 0, "marker": "o", "ms": 4.5})):
            ax.plot(
                [x(*item) for item in series.items()],
                [point.loss for point in series.values()],
                color=run.colour,
                **style,
            )
    crop(ax, [{step: point.loss for step, point in run.points.items()} for run in runs])
    ax.set_xlabel(label)
    ax.set_ylabel("nats per token")
    ax.legend([key(lw=1.1), key(lw=0, marker="o", ms=4.5)], ["training batch", "validation"], loc="upper right")


def draw_bpb(ax: Axes, runs: Sequence[Run]) -> None:
    """Validation bits per byte during training, and the final score of the artifact beside its end."""
    for run in runs:
        ax.plot(list(run.val), [point.bpb for point in run.val.values()], color=run.colour, marker="o", ms=4.5, lw=1.4)
        if run.val and run.final is not None:
            ax.plot(max(run.val), run.final, color=run.colour, marker="*", ms=13, mec="white", mew=0.7, lw=0, zorder=4)
    crop(ax, [{step: point.bpb for step, point in run.val.items()} for run in runs])
    ax.set_title("Validation bits per byte")
    ax.set_xlabel("step")
    ax.set_ylabel("bits per byte")
    finals = [f"{run.final:.4f}" for run in runs if run.final is not None]
    name = f"the artifact's score: {finals[0]}" if len(finals) == 1 else "the artifact's score"
    handles = [key(lw=1.4, marker="o", ms=4.5), key(lw=0, marker="*", ms=11)]
    ax.legend(handles[: 1 + bool(finals)], ["in training", name][: 1 + bool(finals)], loc="upper right")


def draw_ttt(ax: Axes, runs: Sequence[Run]) -> None:
    """Bits per byte by replay epoch. Only epoch 1 is a score; a shaded field around the others says what they are."""
    last = max(max(run.epochs, default=1) for run in runs)
    for run in runs:
        if run.no_adaptation is not None:
            ax.axhline(run.no_adaptation, color=run.colour, lw=1.2, ls=":")
        if run.single_pass is not None:
            ax.axhline(run.single_pass, color=run.colour, lw=1.6)
        if run.epochs:
            ax.plot(list(run.epochs), list(run.epochs.values()), color=run.colour, lw=1.6, ls=(0, (4, 2)))
        if 1 in run.epochs:
            ax.plot(1, run.epochs[1], color=run.colour, marker="o", ms=10, mec="white", mew=1, zorder=4)
    ax.set_xlim(0, last + 0.5)
    ax.margins(y=0.14)
    ax.axvspan(1.5, last + 0.5, color=PALE, zorder=0)
    what = f"epochs 2 to {last}: has trained on what it scores \N{EM DASH} not a compression rate"
    ax.text(
        last + 0.2,
        0.95,
        what,
        transform=ax.get_xaxis_transform(),
        ha="right",
        va="top",
        color="#8a3200",
        style="italic",
    )
    if firsts := [run.epochs[1] for run in runs if 1 in run.epochs]:
        arrow = {"arrowstyle": "-|>", "color": "black", "shrinkB": 7}
        what = "epoch 1: backward-looking,\na valid score"
        ax.annotate(what, (1, min(firsts)), (0.06, 0.12), textcoords="axes fraction", weight="bold", arrowprops=arrow)
    ax.set_title("Test-time training, replayed epoch by epoch")
    ax.set_xlabel("epoch")
    ax.set_ylabel("bits per byte")
    entries = [(key(run.colour, lw=3), ttt_figures(run)) for run in runs]
    ax.legend(*zip(*entries, strict=True), loc="upper center", bbox_to_anchor=(0.5, -0.15), handlelength=1.4)


def ttt_figures(run: Run) -> str:
    """The legend's line for a run: the figures of its evaluation, in digits."""
    figures = {
        "no adaptation (dotted)": run.no_adaptation,
        "single pass": run.single_pass,
        "epoch 1": run.epochs.get(1),
    }
    if len(run.epochs) > 1:
        figures[f"epoch {max(run.epochs)}"] = run.epochs[max(run.epochs)]
    return f"{run.label}: " + ", ".join(f"{name} {value:.4f}" for name, value in figures.items() if value is not None)


def draw_bytes(ax: Axes, runs: Sequence[Run]) -> None:
    """Bytes of the artifact by kind, of the code and in total, against the cap."""
    runs = [run for run in runs if run.kinds]
    kinds = [kind for kind in KINDS if any(kind in run.kinds for run in runs)]
    cap, most, thickness = min(run.cap for run in runs), max(run.total for run in runs), 0.84 / len(runs)
    unit, name = (1e6, "MB") if most >= 1e6 else (1e3, "kB")
    for index, run in enumerate(runs):
        for row, (kind, size) in enumerate([*((kind, run.kinds.get(kind)) for kind in kinds), ("total", run.total)]):
            if size is None:
                continue
            y = row + (index - (len(runs) - 1) / 2) * thickness
            ax.barh(y, size / unit, thickness * 0.92, color=run.colour, alpha=1 if kind == "total" else 0.55)
            text = f"{size / unit:.3g}" + (
                f"  ({run.bits[kind]:.2f} bits/weight)" if kind in run.bits and len(runs) < 3 else ""
            )
            if len(runs) < 4 and kind != "total":
                ax.annotate(text, (size / unit, y), (4, 0), textcoords="offset points", va="center", size=8, color=GREY)
    near = cap < 2 * most
    right = 1.04 * cap / unit if near else 1.3 * most / unit
    if near:
        ax.axvline(cap / unit, color="black", lw=1.4)
    room = f"total {most:,} bytes, {most / cap:.1%} of the cap"
    ax.set_title(f"Bytes: {room}" if len(runs) == 1 else f"Bytes, at most {most / cap:.1%} of the cap")
    ax.set_xlim(0, right)
    ax.set_yticks(range(len(kinds) + 1), [*kinds, "total"])
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.set_xlabel(f"{name} (cap: {cap / 1e6:g} MB{', the black line' if near else ', far to the right'})")


def key(colour: str = GREY, **style: object) -> Line2D:
    """A legend's sample."""
    return Line2D([], [], color=colour, **style)


def crop(ax: Axes, series: Sequence[dict[int, float]]) -> None:
    """Fits the y axis to what comes after the first tenth of the steps: the steep start would flatten the rest."""
    end = max(max(values, default=0) for values in series)
    kept = [value for values in series for step, value in values.items() if step >= end / 10 and value == value]
    if kept and min(kept) < max(kept):
        margin = 0.08 * (max(kept) - min(kept))
        ax.set_ylim(min(kept) - margin, max(kept) + margin)


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
    figure = Figure((WIDTH, ROW * len(rows) + 0.3 * (len(runs) > 1)), layout="constrained")
    axes = figure.subplot_mosaic([row * (2 // len(row)) for row in rows])
    for name in names:
        PANELS[name].draw(axes[name], runs)
    if len(runs) > 1:
        figure.legend(
            [key(run.colour, lw=3) for run in runs], [run.label for run in runs], loc="outside upper left", ncols=4
        )
    return figure


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or a log")
    parser.add_argument("--out", type=Path, required=True, metavar="PREFIX", help="writes PREFIX.png and PREFIX.svg")
    parser.add_argument(
        "--what", nargs="+", choices=PANELS, default=list(PANELS), help="panels; default: all there are"
    )
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    if mpl is None:
        raise UserError("drawing needs matplotlib — pip install matplotlib")
    runs = read_runs(options.runs)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        figure = draw(runs, options.what)
        for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None, "Creator": None})):
            path = options.out.with_name(options.out.name + suffix)
            figure.savefig(path, dpi=DPI, metadata=metadata)
            print(f"wrote {path}")


if __name__ == "__main__":
    run_tool(main)
