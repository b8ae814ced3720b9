"""Draws runs: loss, validation bits per byte, where the bytes go, and test-time training by epoch, position, document.

python data/plot.py runs/a runs/b --out pictures/runs
python data/plot.py runs/a runs/a_single_pass --what ttt position documents --out pictures/evaluation
"""

from common import UserError, naming, place, run_tool, write_atomic

# isort: split
import argparse
import io
import math
import re
import textwrap
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import common

TENSORS = ["int5", "int6", "int8", "fp16", "fp32", "scale"]  # and what else has bytes, in the order of their bars
KINDS = [*TENSORS, "header", "model", "code", "total"]
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#444444"]
GREY, PALE, WARNING = "#6b6b6b", "#f1efe9", "#8a3200"
WIDTH, ROW, LEGEND = 9.0, 3.2, 1.2  # inches: at 100 pixels to the inch, the width of a README
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that every machine draws the same
    "axes.titlesize": "medium",
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "text.parse_math": False,  # a run's name may have two dollars
    "savefig.dpi": 200,
    "svg.hashsalt": "train_gpt",
}
# How a figure is drawn, by what it is: without adaptation, two valid scores, trained on what it scores.
PLAIN, VALID, SEEN = {"lw": 1.4, "ls": ":"}, {"lw": 1.8, "ls": "-"}, {"lw": 1.5, "ls": "--", "mfc": "white"}
MIXED = {"lw": 1.8, "ls": (0, (7, 1.5, 1.5, 1.5))}
LOGGED = {"train": ["loss"], "val": ["loss", "bpb"]}
UNITS = {"loss": "nats per token", "bpb": "bits per byte"}
BATCH, VALIDATION = {"lw": 0.9, "alpha": 0.55}, {"lw": 1.5, "marker": "o", "ms": 3.5}
STAR = {"lw": 0, "marker": "*", "ms": 13, "mec": "white", "zorder": 4}
LOOKS = {"no_adaptation": PLAIN | {"zorder": 3}, "epoch_1": VALID, "single_pass": VALID, "mixture": MIXED}
SCORED = ", a valid score"
LINE = 1 << 14  # characters of a log's line that are looked at: its own have far fewer
LABEL = 48  # characters of a run's name
MARKED = 200  # validations of which each has its mark
OWN_LEGEND = {"ttt", "position", "documents"}  # panels of test-time training, whose legends are below
BELOW = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 5}  # a legend under its panel


@dataclass
class Run:
    """What a log and a result tell; whatever they do not say stays empty."""

    label: str
    colour: str
    train: dict[int, dict[str, float]] = field(default_factory=dict)  # by step: seconds of training, loss, bpb
    val: dict[int, dict[str, float]] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)  # bytes of the artifact and the code
    cap: int = 16_000_000  # of both together; a log of the reference scripts does not say
    lacks: tuple[int, int] = 0, 0  # documents that the deadline kept from the first and from the last epoch
    other: bool = False  # the log has come to an evaluation alone, maybe of other weights and of fewer documents
    of_artifact: bool = False  # what `final` scores, on the text of the validations
    final: float | None = None  # this and what follows in bits per byte
    no_adaptation: float | None = None
    epochs: dict[int, float] = field(default_factory=dict)  # of replay, from 1; NaN for what is not finite
    single_pass: float | None = None
    mixture: float | None = None  # of the one or the other with the prediction without adaptation
    scored: tuple[str, ...] = ()  # weights, text, and score of both without adaptation, as a legend shows it
    positions: dict[str, np.ndarray] = field(default_factory=dict)  # by figure, in spans of the document
    ends: tuple[int, ...] = ()  # of the spans, in tokens
    gains: dict[str, np.ndarray] = field(default_factory=dict)  # by figure, of documents with bytes, in their order

    def read_line(self, line: str) -> None:
        """Takes in one line of a log; most tell nothing. ValueError or KeyError for a known form with a wrong value."""
        values = dict(re.findall(r"\b(\w+):(\S+)", line))
        if found := re.match(r"(Code size|Serialized model \S+): (\S+) bytes", line):  # the reference scripts
            self.kinds["code" if found[1] == "Code size" else "model"] = count(found[2])
        elif found := re.match(r"step:([^\s/]+)/\S+ (train|val)_loss:", line):
            if not values["train_time"].endswith("ms"):
                raise ValueError("train_time without its unit")
            step, seconds = count(found[1]), count(values["train_time"].removesuffix("ms"), float) / 1000
            figures = {name: measured(values[f"{found[2]}_{name}"]) for name in LOGGED[found[2]]}
            getattr(self, found[2])[step] = {"step": step, "seconds": seconds, **figures}
        elif found := re.match(r"[* ] EVAL_ONLY=(.*)", line):
            self.other = bool(found[1])
        elif self.other and self.final is not None:
            pass
        elif line.startswith("ttt ") and "first_lacks" in values:
            self.lacks = count(values["first_lacks"]), count(values["last_lacks"])
        elif line.startswith("final_int8_zlib_roundtrip_exact val_loss:"):
            self.final, self.of_artifact = measured(values["val_bpb"]), not self.other
        elif line.startswith("export kind:"):
            self.kinds[values["kind"]] = count(values["bytes"])
        elif line.startswith("export model_bytes:"):
            parts = sum(self.kinds.get(kind, 0) for kind in TENSORS)
            self.kinds["header"] = count(values["model_bytes"], low=parts) - parts
            self.kinds["code"] = count(values["code_bytes"])
            self.cap = count(values["max_bytes"], low=1)

    def read_result(self, path: Path) -> None:
        """Takes in an evaluation; UserError if it or what is beside it is damaged."""
        found = common.read_run(path)
        self.final, self.of_artifact = found.score["val_bpb"], found.result["quantised"]
        self.lacks = tuple(figure["lacking"] for figure in (found.score, found.figures.get("last_epoch", found.score)))
        if "sliding" in found.figures:
            return
        bpb = {name: finite(figure["val_bpb"]) for name, figure in found.figures.items()}
        self.scored = found.result["weights_sha256"], found.result["data"]["validation"], shown(bpb["no_adaptation"])
        self.no_adaptation, self.mixture = bpb["no_adaptation"], bpb.get("mixture")
        if found.result["settings"].get("ttt_protocol") == "single_pass":
            self.single_pass = bpb["backward_looking"]
        else:
            curve = found.result["evaluation"].get("curve") or []
            self.epochs = {row["epoch"]: finite(row["val_bpb"]) for row in curve}
            if [*self.epochs] != sorted({*self.epochs} - {*range(min(self.epochs, default=1), 1)}):
                raise UserError(f"{found.path} has a curve whose epochs do not go up from 1 — {common.UNTOUCHED}")
        self.read_gains(found)
        if found.path.with_name("ttt_positions.npz").is_file():
            arrays = common.read_positions(found)
            self.ends = tuple(arrays["ends"].tolist())
            if not (np.diff(self.ends, prepend=0) > 0).all():
                where = found.path.with_name("ttt_positions.npz")
                raise UserError(f"{where} has spans whose ends do not go up from 0 — {common.UNTOUCHED}")
            enough = arrays["bytes"] > 0.01 * arrays["bytes"].sum()  # the rest of one document says nothing
            bytes_ = np.where(enough, arrays["bytes"], np.nan)
            rates = arrays["nll"] / math.log(2) / bytes_
            self.positions = dict(zip(arrays["figures"].tolist(), rates, strict=True))

    def read_gains(self, found: common.Run) -> None:
        """Takes in what each document gains over no adaptation, in bits per byte; those cut off are left out."""
        nll, bytes_ = common.read_scores(found), common.read_documents(found)["bytes"]
        plain = nll.pop("no_adaptation")
        for name, adapted in nll.items():
            whole = np.isfinite(adapted) & (bytes_ > 0)
            label = "mixture" if name == "mixture" else "epoch_1" if self.single_pass is None else "single_pass"
            if whole.any():
                self.gains[label] = np.sort((plain - adapted)[whole] / math.log(2) / bytes_[whole])

    def title(self, name: str) -> str:
        """What a figure is called; a mixture by what it is mixed with."""
        adapted = "epoch_1" if self.single_pass is None else "single_pass"
        return {"mixture": f"mixture with {adapted}"}.get(name, name).replace("_", " ")

    @property
    def replayed(self) -> bool:
        """Whether there is a score, and epochs after it."""
        return len(self.epochs) > 1 and math.isfinite(self.epochs.get(1, math.nan))


def count(digits: str, kind: type = int, low: int = 0) -> Any:
    """A number of a log that is no less than `low`; ValueError for any other."""
    value = common.bounded(digits)
    if type(value) is not kind and kind is int or not value >= low:
        raise ValueError(f"{digits:.20} where a number from {low} on should be")
    return value


def measured(digits: str) -> float:
    """A figure of a log, NaN where it is not finite: a run may diverge."""
    value = float(digits)
    return common.bounded(digits) if math.isfinite(value) else math.nan


def finite(bpb: float | None) -> float:
    """A figure of a result, which is null where it is not finite."""
    return math.nan if bpb is None else bpb


def shown(bpb: float) -> str:
    return f"{bpb:.4f}" if math.isfinite(bpb) else "not finite"


def label_of(path: Path) -> str:
    """A run's name in a picture, the end of its path. What cannot be printed is escaped; a label that begins with `_`
    would be left out of a legend, behind a space it is not."""
    from matplotlib import font_manager

    known = font_manager.get_font(font_manager.findfont(STYLE["font.family"])).get_charmap()
    parts = (path.parts or path.resolve().parts)[-2:]  # `.` has none
    name = "".join(c if c.isprintable() and ord(c) in known else ascii(c)[1:-1] for c in "/".join(parts))
    if len(name) > LABEL:  # a legend would leave no room for the panels
        name = f"{name[: LABEL // 3]}…{name[1 - LABEL + LABEL // 3 :]}"
    return f" {name}" if name.startswith("_") else name


def read_runs(paths: list[Path]) -> list[Run]:
    """Reads folders, logs and results; UserError for one without any figures, or for too many."""
    if len(paths) > len(COLOURS):
        raise UserError(f"{len(paths)} runs are too many for one picture — draw at most {len(COLOURS)}")
    runs: list[Run] = []
    for path, colour in zip(paths, COLOURS, strict=False):
        run = Run(label_of(path), colour)
        log = path / "train.log" if path.is_dir() else path
        if any(run.label == other.label for other in runs):
            run.label += f" ({len(runs) + 1})"
        if path.suffix != ".json":
            read_lines(log, run)
        if path.suffix == ".json" or (path / "result.json").is_file():
            run.read_result(path)  # a folder's, or named by itself
        if not (run.train or run.val or run.kinds or run.final):
            raise UserError(f"{path} has no figures of a run — give a log of train_gpt.py or of a reference script")
        if run.scored and run.scored in [other.scored for other in runs]:  # whose line is drawn already
            run.no_adaptation = None
            run.positions.pop("no_adaptation", None)
        runs.append(run)
    return runs


def read_lines(log: Path, run: Run) -> None:
    """Takes in a log; UserError for one that is damaged."""
    with naming(log), common.require_file(log).open(encoding="utf-8", errors="replace") as lines:
        number = 0
        while line := lines.readline(LINE):
            number += 1
            try:
                run.read_line(line.rstrip("\n"))
            except (ValueError, KeyError) as error:
                if not line.endswith("\n") and not lines.readline(LINE):
                    break  # the run, or a copy of its log, was cut off there
                what = f"no {error.args[0]}" if isinstance(error, KeyError) else error
                raise UserError(f"{log} line {number} is damaged ({what}) — give an untouched log") from error
            while line and not line.endswith("\n"):
                line = lines.readline(LINE)


def draw_training(ax: Any, runs: list[Run], x: str, y: str) -> None:
    """Loss or bits per byte against step or seconds: training batches, validations, and the artifact's score."""
    for run in runs:
        for series, style in ((run.train, BATCH), (run.val, VALIDATION)):
            points = [series[step] for step in sorted(series) if y in series[step]]
            style = style | ({} if len(points) <= MARKED else {"marker": None})
            ax.plot([point[x] for point in points], [point[y] for point in points], color=run.colour, **style)
        if y == "bpb" and run.val and run.of_artifact:
            ax.plot(max(run.val), run.final, color=run.colour, **STAR)
    shown = {"training batch": BATCH} if y == "loss" else {"score of the artifact": STAR}
    for label, style in ({"validation": VALIDATION} | shown).items():
        ax.plot([], [], color=GREY, label=label, **style)
    ax.locator_params(axis="x", nbins=6)
    ax.xaxis.set_major_formatter("{x:,g}")
    ax.set(xlabel=x.replace("seconds", "seconds of training"), ylabel=UNITS[y])
    ax.legend(loc="upper right")


def named(runs: list[Run], run: Run) -> str:
    """What comes before a figure in a legend: the run, unless each is another way to adapt one model, which scores the
    same without."""
    ways = {(run.single_pass is None, not run.epochs) for run in runs}
    return "" if len({run.scored for run in runs}) == 1 and len(ways) == len(runs) else f"{run.label}: "


def late(documents: int) -> str:
    """What a figure says of documents that the deadline kept from it: each counts as before adaptation, or its last."""
    return f"\n(time ran out for {documents:,} documents)" if documents else ""


def draw_ttt(ax: Any, runs: list[Run]) -> None:
    """Bits per byte by replay epoch, and of other scores. Of epochs only 1 is one; a shaded field says so of others."""
    last = max(max(run.epochs, default=1) for run in runs)
    right = 1.03 * last + 0.3
    if last > 1:
        ax.axvspan(1.5, right, color=PALE, lw=0, zorder=0)
    for run in runs:
        who = named(runs, run)
        if run.no_adaptation is not None:
            label = f"{who}no adaptation {shown(run.no_adaptation)}"
            ax.axhline(run.no_adaptation, color=run.colour if who else "black", label=label, **PLAIN)
        if run.single_pass is not None:
            label = f"{who}single pass {shown(run.single_pass)}{SCORED}{late(run.lacks[0])}"
            ax.axhline(run.single_pass, color=run.colour, label=label, **VALID)
        if run.mixture is not None:
            label = f"{who}{run.title('mixture')} {shown(run.mixture)}{SCORED}{late(run.lacks[0])}"
            ax.axhline(run.mixture, color=run.colour, label=label, **MIXED)
        if 1 in run.epochs:
            label = f"{who}epoch 1 {shown(run.epochs[1])}{SCORED}{late(run.lacks[0])}"
            ax.plot(1, run.epochs[1], "o", ms=9, mec="white", zorder=4, label=label, color=run.colour)
        if len(run.epochs) > 1:
            number, bpb = max(run.epochs.items())
            label = f"{who}epoch {number} {shown(bpb)} (not a score){late(run.lacks[1])}"
            hollow = SEEN | {"marker": "o", "ms": 6, "markevery": [-1], "zorder": 3}
            ax.plot(list(run.epochs), list(run.epochs.values()), color=run.colour, label=label, **hollow)
    ax.set(xlabel="epoch", ylabel="bits per byte (lower is better)", xlim=(0.2, right))
    apart = 10 * -(-last // 200)
    ax.set_xticks(sorted({1, last, *range(apart, last - apart // 2 + 1, apart)}))
    ax.margins(y=0.12)
    if last > 1:
        annotate_epochs(ax, last, min((run.epochs[1] for run in runs if run.replayed), default=None))
    ax.legend(**BELOW)


def annotate_epochs(ax: Any, last: int, first: float | None) -> None:
    """Says of replay's epochs which one is a score; `first` is the lowest of those, None where none is finite."""
    note = {"bbox": {"facecolor": PALE, "edgecolor": "none", "pad": 3}, "zorder": 1.5}  # below the curves
    seen = f"epochs 2 to {last}: has trained\non what it scores \N{EM DASH}\nnot a compression rate"
    ax.text(0.97, 0.66, seen, color=WARNING, style="italic", transform=ax.transAxes, ha="right", va="top", **note)
    if first is None:
        return
    note |= {"arrowprops": {"arrowstyle": "-|>", "color": "black", "shrinkB": 7, "relpos": (0.1, 1)}, "weight": "bold"}
    score = "epoch 1:\nbackward-looking,\na valid score"
    ax.annotate(score, (1, first), xytext=(0.07, 0.08), textcoords="axes fraction", **note)


def draw_position(ax: Any, runs: list[Run]) -> None:
    """Bits per byte by position in the document: what context brings, what adaptation adds, what is only memorised."""
    for run in runs:
        who = named(runs, run)
        for name, bpb in run.positions.items():
            plain = name == "no_adaptation"
            label = who + run.title(name) + ("" if plain else SCORED + late(run.lacks[0]))
            colour = "black" if plain and not who else run.colour
            ax.plot(run.ends, bpb, color=colour, marker="o", ms=4.5, label=label, **LOOKS[name])
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:,g}")
    ax.tick_params(axis="x", labelrotation=30)
    ax.set(xlabel="end of the span, in tokens from the document's start", ylabel="bits per byte (lower is better)")
    ax.legend(**BELOW)


def draw_documents(ax: Any, runs: list[Run]) -> None:
    """What every document gains over no adaptation, from the one that loses most to the one that gains most."""
    ax.axhline(0, color="black", **PLAIN)
    for run in runs:
        who = named(runs, run)
        for name, gains in run.gains.items():
            share = (np.arange(len(gains)) + 0.5) / len(gains)
            worse = f"{np.count_nonzero(gains < 0):,} of {len(gains):,} lose, at most {max(0.0, -gains[0]):.4f}"
            label = f"{who}{run.title(name)}: {worse}{late(run.lacks[0])}"
            style = LOOKS[name] | ({"marker": "o", "ms": 3} if len(gains) <= 40 else {})
            ax.plot(share, gains, color=run.colour, label=label, **style)
    ax.xaxis.set_major_formatter("{x:.0%}")
    ax.set(xlabel="documents, by what they gain", ylabel="gain over no adaptation,\nbits per byte (higher is better)")
    ax.legend(**BELOW)


def draw_bytes(ax: Any, runs: list[Run]) -> None:
    """Bytes of the artifact by kind, of the code and in total, against the cap."""
    from matplotlib.ticker import EngFormatter

    runs = [run for run in runs if run.kinds]
    tables = [run.kinds | {"total": sum(run.kinds.values())} for run in runs]
    kinds = [kind for kind in KINDS if any(kind in sizes for sizes in tables)]
    cap, most = min(run.cap for run in runs), max(sizes["total"] for sizes in tables)
    thickness = 0.84 / len(runs)
    for index, (run, sizes) in enumerate(zip(runs, tables, strict=True)):
        rows = [row + (index - (len(runs) - 1) / 2) * thickness for row in range(len(kinds))]
        bars = ax.barh(rows, [sizes.get(kind, 0) for kind in kinds], thickness * 0.9, color=run.colour)
        if len(runs) * len(kinds) <= 16:  # legible
            ax.bar_label(bars, fmt=EngFormatter("B", places=1), padding=4, size=8, color=GREY)
    near = cap < 2 * most
    if near:
        ax.axvline(cap, color="black", lw=1.4)
    ax.set_title(f"Bytes: {'' if len(runs) == 1 else 'at most '}{most:,}, {most / cap:.1%} of the cap")
    ax.set_xlim(0, max(1.2 * most, 1.05 * cap * near, 1))
    ax.xaxis.set_major_formatter(EngFormatter("B"))
    ax.set_yticks(range(len(kinds)), kinds)
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.set_xlabel(f"cap: {cap / 1e6:g} MB{', the black line' if near else ', beyond the frame'}")


PANELS = {  # the title, how it is drawn, whether a run has anything for it
    "loss": ("Loss against steps", partial(draw_training, x="step", y="loss"), lambda run: run.train or run.val),
    "time": ("Loss against time", partial(draw_training, x="seconds", y="loss"), lambda run: run.train or run.val),
    "bpb": ("Validation bits per byte", partial(draw_training, x="step", y="bpb"), lambda run: len(run.val) > 1),
    "bytes": ("Bytes", draw_bytes, lambda run: run.kinds),
    "ttt": ("Test-time training, epoch by epoch", draw_ttt, lambda run: run.scored),
    "position": ("Bits per byte by position in the document", draw_position, lambda run: run.positions),
    "documents": ("Gain of test-time training, document by document", draw_documents, lambda run: run.gains),
}


# What a panel needs, where a run may have left it out.
NEEDED = dict.fromkeys(("loss", "time"), "a log with losses") | {
    "bpb": "a log with two validations",
    "bytes": "a log with the export of an artifact",
    "ttt": "result.json of test-time training",
    "position": "result.json and ttt_positions.npz of test-time training",
    "documents": "result.json and ttt_documents.npz of test-time training",
}


def notes(runs: list[Run], wanted: list[str]) -> list[str]:
    """Lines on what is not in the picture, and on figures that a deadline cut short."""
    lines = []
    for name in wanted:
        without = [run.label.strip() for run in runs if not PANELS[name][2](run)]
        if without:
            what = (
                f"no panel {name}: " if len(without) == len(runs) else f"panel {name} is without {', '.join(without)}: "
            )
            lines.append(f"{what}it takes {NEEDED[name]}")
    for run in runs:
        points = [*run.train.values(), *run.val.values()]
        if lost := sum(not all(map(math.isfinite, point.values())) for point in points):
            lines.append(f"{run.label.strip()}: {lost:,} of {len(points):,} losses are not finite, and are not drawn")
        if cut := common.deadline_cut(*run.lacks):
            lines.append(f"{run.label.strip()}: {cut}")
    return lines


def draw(runs: list[Run], wanted: list[str]) -> Any:
    """Returns the picture of the wanted panels for which there are figures; UserError if there are none."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    names = [name for name, (_, _, shows) in PANELS.items() if name in wanted and any(map(shows, runs))]
    if not names:
        raise UserError(f"no run has figures for {', '.join(wanted)} — give other logs or another --what")
    rows = [names[i : i + 2] for i in range(0, len(names), 2)]
    heights = [ROW + LEGEND * bool(OWN_LEGEND & {*row}) for row in rows]
    figure = Figure((WIDTH, sum(heights)), layout="constrained", facecolor="white")
    axes = figure.subplot_mosaic([row * (2 // len(row)) for row in rows], height_ratios=heights)
    for name, ax in axes.items():
        ax.set_title(PANELS[name][0])
        PANELS[name][1](ax, runs)
    late = [line for line in notes(runs, []) if OWN_LEGEND & {*names} or "bpb" in names]
    if late:
        figure.supxlabel("\n".join(textwrap.fill(line, 110) for line in late), color=WARNING, size="small")
    if len(runs) > 1 and names[0] not in OWN_LEGEND:  # their own legends name the runs
        samples = [Line2D([], [], color=run.colour, lw=3) for run in runs]
        figure.legend(samples, [run.label for run in runs], loc="outside upper left", ncols=3)
    return figure


def main(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=place, metavar="RUN", help="a run's folder, or a log")
    parser.add_argument("--out", type=place, required=True, metavar="PREFIX", help="writes PREFIX.png and PREFIX.svg")
    parser.add_argument("--what", nargs="+", choices=PANELS, default=list(PANELS), help="panels; default: all")
    options = parser.parse_args()
    import matplotlib

    runs = read_runs(options.runs)
    prefix = options.out.with_suffix("") if options.out.suffix in (".png", ".svg") else options.out
    if prefix.name in ("", ".."):
        raise UserError(f"{options.out} names no file — give what the names of the pictures shall begin with")
    with matplotlib.rc_context(STYLE):
        figure = draw(runs, options.what)
        prefix.parent.mkdir(parents=True, exist_ok=True)
        common.require_writable(prefix)
        for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None, "Creator": None})):
            path, content = prefix.with_name(prefix.name + suffix), io.BytesIO()
            figure.savefig(content, format=suffix[1:], metadata=metadata)
            write_atomic(path, content.getvalue())
            print(f"wrote {path}")
    for line in notes(runs, options.what):
        print(line)


if __name__ == "__main__":
    run_tool(main)
