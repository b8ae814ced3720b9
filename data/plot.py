"""Draws runs: loss, validation bits per byte, where the bytes go, and test-time training by epoch and by position.

    python data/plot.py runs/a runs/b --out pictures/runs
    python data/plot.py runs/a --what ttt position --out pictures/evaluation

Writes PREFIX.png and PREFIX.svg, the same bytes for the same runs. A run is its folder, its log alone (the logs of the
reference scripts are read too), or the result_<tag>.json of another evaluation in its folder. A panel for which no run
has figures is left out.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from common import Parser, UserError, read_documents, read_run
from common import run as run_tool

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

SIZE_CAP = 16_000_000  # bytes; what a log of the reference scripts does not say

COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#444444"]
KINDS = ["int5", "int6", "int8", "fp16", "fp32", "scale", "header", "model", "code"]  # in the order of their bars
GREY, PALE, WARNING = "#6b6b6b", "#f1efe9", "#8a3200"
LONG_RUN = 20  # logged figures
WIDTH, ROW, LINE = 9.0, 3.2, 0.18  # inches: at 100 pixels to the inch, the width of a README; a row; a legend's line
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
# How a figure is drawn, by what it is: without adaptation, a valid score, trained on what it scores.
PLAIN, VALID, SEEN = {"lw": 1.4, "ls": ":"}, {"lw": 1.8, "ls": "-"}, {"lw": 1.5, "ls": (0, (4, 2))}
BELOW = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 5}  # a legend under its panel


# ---------------------------------------------------------------------------------------------- reading


class Point(NamedTuple):
    """One `step:` line: seconds of training so far, loss in nats per token, and bits per byte if it is a validation."""

    seconds: float
    loss: float
    bpb: float | None = None


@dataclass
class Run:
    """What a log or a result tells; whatever it does not say stays empty."""

    label: str
    colour: str
    train: dict[int, Point] = field(default_factory=dict)  # by step
    val: dict[int, Point] = field(default_factory=dict)
    no_adaptation: float | None = None  # this and what follows in bits per byte
    epochs: dict[int, float] = field(default_factory=dict)  # of replay, from 1
    single_pass: float | None = None
    final: float | None = None
    positions: dict[str, list[float]] = field(default_factory=dict)  # by figure, for each span of `spans`
    spans: list[str] = field(default_factory=list)  # tokens from the document's start, such as "256–512"
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

    def read_line(self, line: str) -> None:
        """Takes in one line of a log; most tell nothing. ValueError or KeyError for a known form with a wrong value."""
        values = dict(re.findall(r"(\w+):(\S+)", line))
        name = line.split(" ")[0].split(":")[0]
        if found := re.match(r"(Code size|Serialized model \S+): (\d+) bytes", line):  # the reference scripts
            self.kinds["code" if found[1] == "Code size" else "model"] = int(found[2])
        elif found := re.match(r"step:(\d+)/\d+ (train|val)_loss:", line):
            seconds = float(values["train_time"].removesuffix("ms")) / 1000
            bpb = float(values["val_bpb"]) if found[2] == "val" else None
            series = self.val if found[2] == "val" else self.train
            series[int(found[1])] = Point(seconds, float(values[f"{found[2]}_loss"]), bpb)
        elif found := re.match(r"ttt_epoch:(\d+)/\d+ ", line):
            self.epochs[int(found[1])] = float(values["val_bpb"])
        elif name == "no_adaptation" and values:
            self.no_adaptation = float(values["val_bpb"])
        elif name == "final_ttt_exact" and values["protocol"] == "single_pass":
            self.single_pass = float(values["backward_looking_val_bpb"])
        elif name == "final_int8_zlib_roundtrip_exact" and values:
            self.final = float(values["val_bpb"])
        elif line.startswith("export kind:"):
            self.kinds[values["kind"]] = int(values["bytes"])
            self.bits[values["kind"]] = float(values["bits_per_weight"])
        elif line.startswith("export model_bytes:"):
            self.kinds["header"] = int(values["model_bytes"]) - sum(self.kinds[kind] for kind in self.bits)
            self.kinds["code"] = int(values["code_bytes"])
            self.cap = int(values["max_bytes"])

    def read_log(self, log: Path) -> None:
        """Takes in a log; UserError if it is not there or damaged."""
        if not log.is_file():
            raise UserError(f"{log} does not exist — give a run's folder or its log")
        for number, line in enumerate(log.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            try:
                self.read_line(line)
            except (ValueError, KeyError) as error:
                raise UserError(f"{log} line {number} is damaged ({error}) — give an untouched log") from error

    def read_result(self, path: Path) -> None:
        """Takes in an evaluation with test-time training; UserError if it or its documents are damaged."""
        found = read_run(path)
        evaluation = found.result["evaluation"]
        self.final = found.score["val_bpb"]
        if "sliding" in evaluation:
            return
        self.no_adaptation = evaluation["no_adaptation"]["val_bpb"]
        if found.result["settings"].get("ttt_protocol") == "single_pass":
            self.single_pass = found.score["val_bpb"]
        else:
            curve = evaluation.get("curve") or []
            self.epochs = {figure["epoch"]: figure["val_bpb"] for figure in curve if figure.get("epoch")}
        arrays = read_documents(found) if found.documents.is_file() else {}
        if "nll_by_chunk" in arrays:
            self.read_positions(arrays, found.result["settings"].get("ttt_chunk_size"), found.documents)

    def read_positions(self, arrays: dict[str, np.ndarray], chunk: int, path: Path) -> None:
        """Bits per byte of each figure in spans of the document that double; see common.read_documents."""
        try:
            nats = arrays["nll_by_chunk"]
            bytes_ = arrays["bytes_by_chunk"]
            edges = [0, *(2**k for k in range(20) if 2**k < len(bytes_)), len(bytes_)]
            for low, high in pairwise(edges):
                size = bytes_[low:high].sum()
                if size == 0:  # a document's last target, the next one's BOS, has none
                    continue
                self.spans.append(f"{low * chunk:,}–{high * chunk:,}")
                values = nats[:, low:high].sum(1) / math.log(2) / size
                for name, bpb in zip(arrays["chunk_figures"].tolist(), values.tolist(), strict=True):
                    self.positions.setdefault(name, []).append(bpb)
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise UserError(f"{path} has damaged figures by chunk ({error}) — give an untouched run") from error


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Reads folders, logs and results; UserError for one without any figures, or for too many."""
    if len(paths) > len(COLOURS):
        raise UserError(f"{len(paths)} runs are too many for one picture — draw at most {len(COLOURS)}")
    runs = []
    for path, label, colour in zip(paths, labels(paths), COLOURS, strict=False):
        run = Run(label, colour)
        if path.suffix != ".json":
            run.read_log(path / "train.log" if path.is_dir() else path)
        if path.suffix == ".json" or (path / "result.json").is_file():
            run.read_result(path)
        if run == Run(label, colour):
            raise UserError(f"{path} has no figures of a run — give a log of train_gpt.py or of a reference script")
        runs.append(run)
    return runs


def labels(paths: Sequence[Path]) -> list[str]:
    """A short name for each run, from its path's end: as much of it as tells them apart."""
    whole = ("train.log", "result.json")
    ends = [path.parent if path.name in whole else path.with_name(path.stem.removeprefix("result_")) for path in paths]
    parts = [end.resolve().parts for end in ends]
    depth = 1
    while len(names := ["/".join(part[-depth:]) for part in parts]) > len(set(names)) and depth < max(map(len, parts)):
        depth += 1
    return names


# ---------------------------------------------------------------------------------------------- panels


def draw_losses(ax: Axes, runs: Sequence[Run], against: str) -> None:
    """Training loss (a line) and validation loss (dots) against the step or the time."""
    minutes = max(point.seconds for run in runs for _, point in run.points) > 300
    unit = 60 if minutes else 1
    batch, validation = {"lw": 0.9, "alpha": 0.55}, {"lw": 1.5, "marker": "o"}
    for run in runs:
        for series, style in ((run.train, batch), (run.val, validation | {"ms": dot(run)})):
            x = list(series) if against == "steps" else [point.seconds / unit for point in series.values()]
            ax.plot(x, [point.loss for point in series.values()], color=run.colour, **style)
    crop(ax, [[(step, point.loss) for step, point in run.points] for run in runs])
    time = "minutes of training" if minutes else "seconds of training"
    ax.set(title=f"Loss against {against}", xlabel="step" if against == "steps" else time, ylabel="nats per token")
    ax.legend([key(**batch), key(**validation, ms=4.5)], ["training batch", "validation"], loc="upper right")


def draw_bpb(ax: Axes, runs: Sequence[Run]) -> None:
    """Validation bits per byte during training, and the final score of the artifact beside its end."""
    training, final = {"lw": 1.5, "marker": "o"}, {"lw": 0, "marker": "*", "ms": 13, "mec": "white", "mew": 0.7}
    for run in runs:
        ax.plot(list(run.val), [point.bpb for point in run.val.values()], color=run.colour, ms=dot(run), **training)
        if run.val and run.final is not None:
            ax.plot(max(run.val), run.final, color=run.colour, zorder=4, **final)
    crop(ax, [[(step, point.bpb) for step, point in run.val.items()] for run in runs])
    ax.set(title="Validation bits per byte", xlabel="step", ylabel="bits per byte")
    scores = [f"{run.final:.4f}" for run in runs if run.final is not None]
    entries = [(key(**training, ms=4.5), "in training")]
    if scores:
        digits = f": {', '.join(scores)}" if len(scores) < 3 else ""
        entries.append((key(**final), "score of the artifact" + digits))
    ax.legend(*zip(*entries, strict=True), loc="upper right")


def draw_ttt(ax: Axes, runs: Sequence[Run]) -> None:
    """Bits per byte by replay epoch. Only epoch 1 is a score; a shaded field around the others says what they are."""
    last = max(max(run.epochs, default=1) for run in runs)
    right = 1.03 * last + 0.3
    ax.axvspan(1.5, right, color=PALE, lw=0, zorder=0)
    entries = []
    for run in runs:
        who = f"{run.label}: " if len(runs) > 1 else ""
        colour = {"color": run.colour}
        if run.no_adaptation is not None:
            plain = PLAIN | ({"color": "black"} if len(runs) == 1 else colour)
            ax.axhline(run.no_adaptation, **plain)
            entries.append((key(**plain), f"{who}no adaptation {run.no_adaptation:.4f}"))
        if run.single_pass is not None:
            ax.axhline(run.single_pass, **VALID | colour)
            entries.append((key(**VALID | colour), f"{who}single pass {run.single_pass:.4f}, a valid score"))
        if 1 in run.epochs:
            full = colour | {"marker": "o", "ms": 9, "mec": "white", "mew": 1}
            ax.plot(1, run.epochs[1], zorder=4, **full)
            entries.append((key(lw=0, **full), f"{who}epoch 1 {run.epochs[1]:.4f}, a valid score"))
        if len(run.epochs) > 1:
            end = max(run.epochs)
            hollow = SEEN | colour | {"marker": "o", "ms": 6, "mfc": PALE}
            ax.plot(list(run.epochs), list(run.epochs.values()), markevery=[-1], zorder=3, **hollow)
            entries.append((key(**hollow), f"{who}epoch {end} {run.epochs[end]:.4f} (not a score)"))
    ax.set(title="Test-time training, epoch by epoch", xlabel="epoch", ylabel="bits per byte (lower is better)")
    ax.set_xlim(0.2, right)
    ax.set_xticks(sorted({1, last, *range(10, last - 4, 10)}))
    ax.margins(y=0.12)
    note = {"bbox": {"facecolor": PALE, "edgecolor": "none", "pad": 3}, "zorder": 1.5}  # below the curves
    seen = f"epochs 2 to {last}: has trained\non what it scores \N{EM DASH}\nnot a compression rate"
    ax.text(0.97, 0.66, seen, color=WARNING, style="italic", transform=ax.transAxes, ha="right", va="top", **note)
    if firsts := [run.epochs[1] for run in runs if 1 in run.epochs]:
        arrow = {"arrowstyle": "-|>", "color": "black", "shrinkB": 7, "relpos": (0.1, 1)}
        at = {"xytext": (0.07, 0.08), "textcoords": "axes fraction"}
        first = "epoch 1:\nbackward-looking,\na valid score"
        ax.annotate(first, (1, min(firsts)), weight="bold", arrowprops=arrow, **at, **note)
    ax.legend(*zip(*entries, strict=True), **BELOW)


def draw_position(ax: Axes, runs: Sequence[Run]) -> None:
    """Bits per byte by position in the document: what context brings, what adaptation adds, what is only memorised."""
    spans = max((run.spans for run in runs), key=len)
    entries = []
    for run in runs:
        who = f"{run.label}: " if len(runs) > 1 else ""
        for name, values in run.positions.items():
            style = {"color": run.colour, "marker": "o", "ms": 4.5}
            if name == "no_adaptation":
                style = PLAIN | {"color": "black" if len(runs) == 1 else run.colour, "zorder": 3}
                label = ""
            elif name in ("epoch_1", "single_pass"):
                style |= VALID
                label = ", a valid score"
            else:
                style |= SEEN | {"mfc": "white"}
                label = " (not a score)"
            ax.plot(values, **style)
            entries.append((key(**style), who + name.replace("_", " ") + label))
    ax.set(title="Bits per byte by position in the document", xlabel="tokens from the document's start")
    ax.set_ylabel("bits per byte (lower is better)")
    ax.set_xticks(range(len(spans)), [span.replace("–", "–\n") for span in spans], size=8)
    ax.legend(*zip(*entries, strict=True), **BELOW)


def draw_bytes(ax: Axes, runs: Sequence[Run]) -> None:
    """Bytes of the artifact by kind, of the code and in total, against the cap."""
    from matplotlib.colors import to_rgb

    runs = [run for run in runs if run.kinds]
    kinds = [kind for kind in KINDS if any(kind in run.kinds for run in runs)] + ["total"]
    cap, most = min(run.cap for run in runs), max(run.total for run in runs)
    unit, name = (1e6, "MB") if most >= 1e6 else (1e3, "kB")
    near = cap < 2 * most
    legible = len(runs) * len(kinds) <= 16
    right = 1.05 * max(cap, most) if near else 1.3 * most
    thickness = 0.84 / len(runs)
    for index, run in enumerate(runs):
        light = [0.55 + 0.45 * part for part in to_rgb(run.colour)]  # unlike a transparent colour, it hides the grid
        for row, kind in enumerate(kinds):
            size = run.total if kind == "total" else run.kinds.get(kind, 0)
            y = row + (index - (len(runs) - 1) / 2) * thickness
            ax.barh(y, size / unit, thickness * 0.9, color=run.colour if kind == "total" else light)
            if size and legible:
                text = (
                    f"{size:,} bytes"
                    if kind == "total"
                    else f"{size / 1e6:.3g} MB"
                    if size >= 1e6
                    else f"{size / 1e3:.3g} kB"
                )
                text += f", {run.bits[kind]:.2f} bits/weight" if kind in run.bits else ""
                style = {"xytext": (4, 0), "ha": "left", "color": GREY}
                if size > 0.6 * right:  # inside the bar, where there is no room beside it
                    style = {"xytext": (-4, 0), "ha": "right", "color": "white" if kind == "total" else "black"}
                ax.annotate(text, (size / unit, y), textcoords="offset points", size=8, va="center_baseline", **style)
    if near:
        ax.axvline(cap / unit, color="black", lw=1.4)
    ax.set_title(f"Bytes: {'' if len(runs) == 1 else 'at most '}{most / cap:.1%} of the cap")
    ax.set_xlim(0, right / unit)
    ax.set_yticks(range(len(kinds)), kinds)
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.set_xlabel(f"{name} (cap: {cap / 1e6:g} MB{', the black line' if near else ', beyond the frame'})")


def key(colour: str = GREY, **style: object) -> Line2D:
    """A legend's sample."""
    from matplotlib.lines import Line2D

    return Line2D([], [], **{"color": colour} | style)


def dot(run: Run) -> float:
    """The size of a validation's dot: smaller where there are many."""
    return 4.5 if len(run.val) <= 20 else 2.2


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
    ax.locator_params(axis="x", nbins=6, steps=[1, 2, 4, 5, 10])
    ax.xaxis.set_major_formatter("{x:,g}")


class Panel(NamedTuple):
    """One part of the picture: how it is drawn, and whether a run has anything for it."""

    draw: Callable[[Axes, Sequence[Run]], None]
    shows: Callable[[Run], bool]


PANELS = {
    "loss": Panel(lambda ax, runs: draw_losses(ax, runs, "steps"), lambda run: bool(run.points)),
    "time": Panel(lambda ax, runs: draw_losses(ax, runs, "time"), lambda run: bool(run.points)),
    "bpb": Panel(draw_bpb, lambda run: len(run.val) > 1),
    "bytes": Panel(draw_bytes, lambda run: bool(run.kinds)),
    "ttt": Panel(draw_ttt, lambda run: len(run.epochs) > 1),
    "position": Panel(draw_position, lambda run: bool(run.positions)),
}


def draw(runs: Sequence[Run], wanted: Sequence[str]) -> Figure:
    """Returns the picture of the wanted panels for which there are figures; UserError if there are none."""
    from matplotlib.figure import Figure

    names = [name for name, panel in PANELS.items() if name in wanted and any(map(panel.shows, runs))]
    if not names:
        raise UserError(f"no run has figures for {', '.join(wanted)} — give other logs or another --what")
    last = [name for name in names if name in ("ttt", "position")]  # with legends of their own that name the runs
    first = names[: len(names) - len(last)]
    rows = [first[i : i + 2] for i in range(0, len(first), 2)] + [last] * bool(last)
    heights = [ROW + LINE * (2 + 3 * len(runs)) * (row == last) for row in rows]
    shared_legend = len(runs) > 1 and bool(first)
    figure = Figure((WIDTH, sum(heights) + 2 * LINE * shared_legend), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # inches
    axes = figure.subplot_mosaic([row * (2 // len(row)) for row in rows], height_ratios=heights)
    for name in names:
        PANELS[name].draw(axes[name], runs)
    if shared_legend:
        samples = [key(run.colour, lw=3) for run in runs]
        figure.legend(samples, [run.label for run in runs], loc="outside upper left", ncols=4)
    return figure


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, a log, or a result_<tag>.json")
    add("--out", type=Path, required=True, metavar="PREFIX", help="writes PREFIX.png and PREFIX.svg")
    add("--what", nargs="+", choices=PANELS, default=list(PANELS), help="panels; default: all")
    options = parser.parse_args()
    import matplotlib

    runs = read_runs(options.runs)
    prefix = options.out.with_suffix("") if options.out.suffix in (".png", ".svg") else options.out
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure = draw(runs, options.what)
        for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None, "Creator": None})):
            path = prefix.with_name(prefix.name + suffix)
            figure.savefig(path, dpi=DPI, metadata=metadata)
            print(f"wrote {path}")


if __name__ == "__main__":
    run_tool(main)
