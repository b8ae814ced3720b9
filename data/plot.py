"""Draws runs: loss, validation bits per byte, where the bytes go, and test-time training by epoch and by position.

    python data/plot.py runs/a runs/b --out pictures/runs
    python data/plot.py runs/a --what ttt position --out pictures/evaluation

Writes PREFIX.png and PREFIX.svg, the same bytes for the same runs. A run is its folder, its log alone (the logs of the
reference scripts are read too), or the result_<tag>.json of another evaluation in its folder. A panel for which no run
has figures is left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from common import UNTOUCHED, Parser, UserError, read_arrays, read_documents, read_run, run_tool

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

SIZE_CAP = 16_000_000  # bytes; what a log of the reference scripts does not say

COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#444444"]
KINDS = ["int5", "int6", "int8", "fp16", "fp32", "scale", "header", "model", "code"]  # in the order of their bars
GREY, PALE, WARNING = "#6b6b6b", "#f1efe9", "#8a3200"
WIDTH, ROW, LINE = 9.0, 3.2, 0.18  # inches: at 100 pixels to the inch, the width of a README; a row; a legend's line
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that every machine draws the same
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "savefig.facecolor": "white",
    "savefig.dpi": 200,
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
        """Takes in a log; UserError if it is damaged."""
        for number, line in enumerate(log.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            try:
                self.read_line(line)
            except (ValueError, KeyError) as error:
                raise UserError(f"{log} line {number} is damaged ({error}) — give an untouched log") from error

    def read_result(self, path: Path) -> None:
        """Takes in an evaluation; UserError if it or what is beside it is damaged."""
        found = read_run(path)
        evaluation = found.result["evaluation"]
        self.final = found.score["val_bpb"]
        if "sliding" in evaluation:
            return
        self.no_adaptation = evaluation["no_adaptation"]["val_bpb"]
        if found.result["settings"].get("ttt_protocol") == "single_pass":
            self.single_pass = found.score["val_bpb"]
        else:
            self.epochs = {figure["epoch"]: figure["val_bpb"] for figure in evaluation.get("curve") or []}
        read_documents(found)
        if (beside := found.beside("ttt_positions")).is_file():
            self.read_positions(beside, found.result)

    def read_positions(self, path: Path, result: dict) -> None:
        """Bits per byte of each figure in spans of the document that double, from what audit.py --positions wrote."""
        arrays = read_arrays(path, {"nll": 2, "targets": 1, "bytes": 1})
        names, weights = arrays.get("figures"), arrays.get("weights")
        if str(weights) != result["weights_sha256"] or names is None or names.shape != arrays["nll"].shape[:1]:
            raise UserError(f"{path} is damaged or of another run — {UNTOUCHED}")
        chunk, bytes_ = result["settings"].get("ttt_chunk_size"), arrays["bytes"]
        edges = [0, *(2**k for k in range(20) if 2**k < len(bytes_)), len(bytes_)]
        for low, high in pairwise(edges):
            size = bytes_[low:high].sum()
            if size:  # a document's last target, the next one's BOS, has none
                self.spans.append(f"{low * chunk:,}–{high * chunk:,}")
                for name, nats in zip(names.tolist(), arrays["nll"][:, low:high].sum(1), strict=True):
                    self.positions.setdefault(name, []).append(float(nats / math.log(2) / size))


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


def draw_losses(ax: Axes, runs: Sequence[Run], against: str = "steps") -> None:
    """Training loss (a line) and validation loss (dots) against the step or the time."""
    batch, validation = {"lw": 0.9, "alpha": 0.55}, {"lw": 1.5, "marker": "o", "ms": 3.5}
    for run in runs:
        for series, style in ((run.train, batch), (run.val, validation)):
            x = list(series) if against == "steps" else [point.seconds for point in series.values()]
            ax.plot(x, [point.loss for point in series.values()], color=run.colour, **style)
    crop(ax, [[(step, point.loss) for step, point in (*run.train.items(), *run.val.items())] for run in runs])
    x = "step" if against == "steps" else "seconds of training"
    ax.set(title=f"Loss against {against}", xlabel=x, ylabel="nats per token")
    ax.legend([key(**batch), key(**validation)], ["training batch", "validation"], loc="upper right")


def draw_time(ax: Axes, runs: Sequence[Run]) -> None:
    draw_losses(ax, runs, "time")


def draw_bpb(ax: Axes, runs: Sequence[Run]) -> None:
    """Validation bits per byte during training, and the final score of the artifact beside its end."""
    training, final = {"lw": 1.5, "marker": "o", "ms": 3.5}, {"lw": 0, "marker": "*", "ms": 13, "mec": "white"}
    for run in runs:
        ax.plot(list(run.val), [point.bpb for point in run.val.values()], color=run.colour, **training)
        if run.val and run.final is not None:
            ax.plot(max(run.val), run.final, color=run.colour, zorder=4, **final)
    crop(ax, [[(step, point.bpb) for step, point in run.val.items()] for run in runs])
    ax.set(title="Validation bits per byte", xlabel="step", ylabel="bits per byte")
    ax.legend([key(**training), key(**final)], ["in training", "score of the artifact"], loc="upper right")


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
            full = colour | {"marker": "o", "ms": 9, "mec": "white"}
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
    for run in runs:
        who = f"{run.label}: " if len(runs) > 1 else ""
        for name, values in run.positions.items():
            style, label = SEEN | {"mfc": "white"}, " (not a score)"
            if name == "no_adaptation":
                style, label = PLAIN | {"zorder": 3}, ""
            elif name in ("epoch_1", "single_pass"):
                style, label = VALID, ", a valid score"
            colour = "black" if name == "no_adaptation" and len(runs) == 1 else run.colour
            ax.plot(values, color=colour, marker="o", ms=4.5, label=who + name.replace("_", " ") + label, **style)
    ax.set(title="Bits per byte by position in the document", xlabel="tokens from the document's start")
    ax.set_ylabel("bits per byte (lower is better)")
    ax.set_xticks(range(len(spans)), [span.replace("–", "–\n") for span in spans], size=8)
    ax.legend(**BELOW)


def draw_bytes(ax: Axes, runs: Sequence[Run]) -> None:
    """Bytes of the artifact by kind, of the code and in total, against the cap."""
    from matplotlib.colors import to_rgb

    runs = [run for run in runs if run.kinds]
    kinds = [kind for kind in KINDS if any(kind in run.kinds for run in runs)] + ["total"]
    cap, most = min(run.cap for run in runs), max(run.total for run in runs)
    unit, name = (1e6, "MB") if most >= 1e6 else (1e3, "kB")
    near = cap < 2 * most
    thickness = 0.84 / len(runs)
    for index, run in enumerate(runs):
        light = [0.55 + 0.45 * part for part in to_rgb(run.colour)]  # unlike a transparent colour, it hides the grid
        sizes = [run.kinds.get(kind, 0) for kind in kinds[:-1]] + [run.total]
        rows = [row + (index - (len(runs) - 1) / 2) * thickness for row in range(len(kinds))]
        colours = [light] * (len(kinds) - 1) + [run.colour]
        bars = ax.barh(rows, [size / unit for size in sizes], thickness * 0.9, color=colours)
        if len(runs) * len(kinds) <= 16:  # legible
            texts = [f"{size / unit:,.4g} {name}" if size else "" for size in sizes[:-1]] + [f"{run.total:,} bytes"]
            for row, kind in enumerate(kinds):
                texts[row] += f", {run.bits[kind]:.2f} bits/weight" if kind in run.bits else ""
            ax.bar_label(bars, texts, padding=4, size=8, color=GREY)
    if near:
        ax.axvline(cap / unit, color="black", lw=1.4)
    ax.set_title(f"Bytes: {'' if len(runs) == 1 else 'at most '}{most / cap:.1%} of the cap")
    ax.set_xlim(0, max(1.35 * most, 1.05 * cap * near) / unit)
    ax.set_yticks(range(len(kinds)), kinds)
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.set_xlabel(f"{name} (cap: {cap / 1e6:g} MB{', the black line' if near else ', beyond the frame'})")


def key(color: str = GREY, **style: object) -> Line2D:
    """A legend's sample."""
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color, **style)


def crop(ax: Axes, runs: Sequence[Sequence[tuple[int, float]]]) -> None:
    """Fits the y axis to what comes after the first tenth of each run: the steep start would flatten the rest.

    `runs`: (step, value) of each. Short runs are shown whole.
    """
    late = []
    for points in runs:
        end = max((step for step, _ in points), default=0)
        late += [value for step, value in points if step >= end / 10 and math.isfinite(value)]
    if len(late) >= 20 * len(runs) and min(late) < max(late):
        margin = 0.08 * (max(late) - min(late))
        ax.set_ylim(min(late) - margin, max(late) + margin)
    ax.locator_params(axis="x", nbins=6)
    ax.xaxis.set_major_formatter("{x:,g}")


PANELS = {  # how each is drawn, and whether a run has anything for it
    "loss": (draw_losses, lambda run: run.train or run.val),
    "time": (draw_time, lambda run: run.train or run.val),
    "bpb": (draw_bpb, lambda run: len(run.val) > 1),
    "bytes": (draw_bytes, lambda run: run.kinds),
    "ttt": (draw_ttt, lambda run: len(run.epochs) > 1),
    "position": (draw_position, lambda run: run.positions),
}


def draw(runs: Sequence[Run], wanted: Sequence[str]) -> Figure:
    """Returns the picture of the wanted panels for which there are figures; UserError if there are none."""
    from matplotlib.figure import Figure

    names = [name for name, (_, shows) in PANELS.items() if name in wanted and any(map(shows, runs))]
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
        PANELS[name][0](axes[name], runs)
    if shared_legend:
        samples = [key(run.colour, lw=3) for run in runs]
        figure.legend(samples, [run.label for run in runs], loc="outside upper left", ncols=4)
    return figure


def main() -> None:
    parser = Parser(__doc__)
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
            figure.savefig(path, metadata=metadata)
            print(f"wrote {path}")


if __name__ == "__main__":
    run_tool(main)
