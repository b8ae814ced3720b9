"""Compares test-time training settings over the same documents: bits per byte, and what each gains over no adaptation.

    python data/compare.py runs/a runs/b runs/c

Only backward-looking figures count: single_pass's, epoch 1 of replay, or where it is the run's score their mixture with
the prediction before adaptation. Intervals are by bootstrap over documents
(Efron 1979), with the same draws for every run. How far a run is behind the best is the difference of their scores,
document by document: the best has the lowest score, not the largest gain, and what there is without adaptation is not
the same under other sizes of chunks and windows.
"""

from common import Run, UserError, deliver, number, place, read_documents, read_run, read_scores, run_tool

# isort: split
import argparse
import math
from pathlib import Path
from warnings import catch_warnings, simplefilter

import numpy as np

SETTINGS = ["protocol", "context", "eval_seq_len", "n_epochs", "lora_lr", "chunk_size", "lora_rank", "weight_decay"]
SETTINGS += ["lora_targets", "lora_alpha", "mixture_share", "mixture_lr"]
TERMS = (
    f"{SETTINGS[0]} to {SETTINGS[-1]} are settings, with TTT_ before the name, in capitals. Figures are bits per byte, "
)
TERMS += "fewer are better; gain is how far the score (the mixture, or else adapted) is below no adaptation."
FEW = 30  # documents; see warnings()
FIGURES = ["no adaptation", "adapted", "mixture", "gain", "95% interval", "behind the best, 95% interval"]


def read_alike(paths: list[Path]) -> tuple[list[Run], np.ndarray, list[dict[str, np.ndarray]]]:
    """Runs, the bytes of their documents (D,), and for each run the bits (D,) of every figure that is no later epoch's,
    and of its score."""
    runs = [read_run(path) for path in paths]
    counted = [read_documents(run)["bytes"] for run in runs]
    first, bytes_ = runs[0].result, counted[0]
    for run, own in zip(runs, counted, strict=True):
        pair = f"{run.path} and {runs[0].path}"
        if run.score["lacking"]:
            raise UserError(f"{run.path}: {run.cut} — score again with more EVAL_MAX_SECONDS")
        if run.result["weights_sha256"] != first["weights_sha256"]:
            cure = f"give evaluations of one artifact, by EVAL_ONLY={runs[0].path.with_name('final_model.ptz')}"
            raise UserError(f"{pair} scored different models — {cure}; record.py takes runs of several seeds")
        same_text = run.result["data"]["validation"] == first["data"]["validation"]
        if not same_text or not np.array_equal(own, bytes_):
            raise UserError(
                f"{pair} did not score the same documents — give evaluations with one DATA_PATH and VAL_DOCS"
            )
    if np.count_nonzero(bytes_) < 2:
        raise UserError(f"{runs[0].path} has fewer than two documents with bytes — compare evaluations of several")
    figures = [{name: nll / math.log(2) for name, nll in read_scores(run).items()} for run in runs]
    return runs, bytes_, [bits | {"score": bits[run.score_name]} for run, bits in zip(runs, figures, strict=True)]


def interval(bits: np.ndarray, bytes_: np.ndarray, samples: int, seed: int) -> str:
    """The middle 95% of bits per byte of `samples` sets of documents, drawn with replacement; none if a set has no
    bytes."""
    from scipy import stats

    with np.errstate(divide="ignore", invalid="ignore"), catch_warnings():
        simplefilter("ignore", stats.DegenerateDataWarning)  # of sets without bytes: that there is no interval says it
        found = stats.bootstrap(
            (bits, bytes_),
            lambda bits, bytes_, axis: bits.sum(axis) / bytes_.sum(axis),
            **dict(paired=True, vectorized=True, method="percentile", n_resamples=samples, batch=256, rng=seed),
        )
    if not np.isfinite(found.bootstrap_distribution).all():
        return "none"
    return "{:+.4f} to {:+.4f}".format(*found.confidence_interval)


def rate(bits: np.ndarray, bytes_: np.ndarray, sign: str = "") -> str:
    """Bits per byte over all documents."""
    found = bits.sum() / bytes_.sum()
    return f"{found:{sign}.4f}" if math.isfinite(found) else "not finite"


def warnings(bytes_: np.ndarray) -> list[str]:
    """What is to be known of the intervals; the coverage is measured on normal and on log-normal gains."""
    with_bytes, lines = np.count_nonzero(bytes_), []
    if with_bytes < len(bytes_):
        lines.append(
            f"only {with_bytes:,} of {len(bytes_):,} documents have bytes: no interval where a sample has none"
        )
    if with_bytes < FEW:
        covered = "at 2 documents 42 to 51% of them hold the truth, at 5 71 to 85%, at 10 81 to 91%, at 30 87 to 93%"
        lines.append(f"{with_bytes:,} documents are few, and the intervals too narrow: {covered}")
    return [f"warning: {line}" for line in lines]


def main(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", nargs="+", type=place, metavar="RUN", help="a run's folder")
    add("--samples", type=number(int, 2, 10**7), default=10_000, help="of the bootstrap (default: %(default)s)")
    add("--seed", type=number(int, 0), default=0, help="of the bootstrap (default: %(default)s)")
    options = parser.parse_args()
    runs, bytes_, figures = read_alike(options.runs)
    draws = bytes_, options.samples, options.seed  # the same for every run
    scores = np.stack([bits["score"] for bits in figures])
    gains = np.stack([bits["no_adaptation"] for bits in figures]) - scores
    best, *_ = order = np.argsort(scores.sum(1), kind="stable")
    heads = ["run", *SETTINGS, *FIGURES]
    rows = [heads, ["---"] * len(heads)]
    for i in order:
        shown = {name: str(runs[i].result["settings"].get(f"ttt_{name}", "?")) for name in SETTINGS}
        if shown["protocol"] == "replay":
            shown["n_epochs"] = f"1 of {shown['n_epochs']}"
        if runs[i].score_name != "mixture":
            shown["mixture_share"] = shown["mixture_lr"] = "–"
        totals = [figures[i].get(name) for name in ("no_adaptation", "backward_looking", "mixture")]
        rates = ["–" if bits is None else rate(bits, bytes_) for bits in totals]
        behind = "–" if i == best else interval(scores[i] - scores[best], *draws)
        name = ascii(str(runs[i].path.parent))[1:-1].replace("|", "\\x7c")  # which would part two cells
        rows.append([name, *shown.values(), *rates, rate(gains[i], bytes_, "+"), interval(gains[i], *draws), behind])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    count = f"{len(bytes_):,} documents, {int(bytes_.sum()):,} bytes, {options.samples:,} bootstrap samples"
    deliver("\n".join([*lines, "", TERMS, count, *warnings(bytes_)]))


if __name__ == "__main__":
    run_tool(main)
