"""Compares test-time training settings over the same documents: bits per byte, and what each gains over no adaptation.

    python data/compare.py runs/a runs/b runs/c

Only backward-looking figures count: single_pass's, or epoch 1 of replay. All runs must have scored the same documents
with the same weights file. Each gain has a confidence interval by bootstrap over documents (Efron 1979): documents are
drawn again with replacement, the same draws for every run, so that the gain over the best run is compared document by
document. Prints a Markdown table, the best run first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common import Parser, Run, UserError, number, read_documents, read_run
from common import run as run_tool

SETTINGS = ["protocol", "context", "eval_seq_len", "n_epochs", "lora_lr", "chunk_size", "lora_rank"]
FIGURES = ["no adaptation", "backward-looking", "gain", "95% interval", "behind the best, 95% interval"]


@dataclass
class Scores:
    """One run's documents in stream order, all (documents,): nats `without` adaptation and `adapted`, bytes of text."""

    run: Run
    without: np.ndarray
    adapted: np.ndarray
    bytes: np.ndarray

    @property
    def bpb(self) -> float:
        return bits(self.adapted.sum(), self.bytes.sum())


def read_scores(path: Path) -> Scores:
    """Reads a run; UserError if it has no whole test-time training evaluation."""
    run = read_run(path)
    arrays = read_documents(run)
    if lacking := run.score["lacking"]:
        raise UserError(f"{path}: the deadline came before {lacking:,} documents were adapted — raise EVAL_MAX_SECONDS")
    return Scores(run, arrays["nll_no_adaptation"], arrays["nll_per_epoch"][0], arrays["bytes"])


def bits(nats: Any, bytes_: Any) -> Any:
    """Bits per byte."""
    return nats / math.log(2) / bytes_


def require_alike(runs: Sequence[Scores]) -> None:
    """UserError unless all runs scored the same documents with the same weights."""
    first = runs[0]
    for other in runs[1:]:
        pair = f"{other.run.path} and {first.run.path}"
        found, expected = other.run.result, first.run.result
        if found["weights_sha256"] != expected["weights_sha256"]:
            raise UserError(f"{pair} scored different models — compare like with like")
        same_text = found["data"]["validation"] == expected["data"]["validation"]
        if not same_text or not np.array_equal(other.bytes, first.bytes):
            raise UserError(f"{pair} did not score the same documents — compare like with like")


def bootstrap(nats: np.ndarray, bytes_: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Bits per byte of `samples` sets of documents drawn with replacement: nats (runs, D) -> (runs, samples)."""
    rng = np.random.default_rng(seed)
    drawn = (np.bincount(rng.integers(0, len(bytes_), len(bytes_)), minlength=len(bytes_)) for _ in range(samples))
    sums = np.array([np.vstack([nats, bytes_]) @ counts for counts in drawn])  # (samples, runs + 1)
    return bits(sums[:, :-1].T, sums[:, -1])


def interval(values: np.ndarray) -> str:
    """The middle 95% of bootstrap values, for people."""
    low, high = np.quantile(values, (0.025, 0.975))
    return f"{low:+.4f} to {high:+.4f}"


def table(runs: Sequence[Scores], samples: int, seed: int) -> str:
    """A Markdown table, the best run first."""
    runs = sorted(runs, key=lambda scores: scores.bpb)
    gains = bootstrap(np.stack([scores.without - scores.adapted for scores in runs]), runs[0].bytes, samples, seed)
    header = [*SETTINGS, *FIGURES]
    rows = [header, ["---"] * len(header)]
    for scores, gain in zip(runs, gains, strict=True):
        shown = {name: str(scores.run.result["settings"].get(f"ttt_{name}", "?")) for name in SETTINGS}
        if shown["protocol"] == "replay":
            shown["n_epochs"] = f"1 of {shown['n_epochs']}"
        plain = bits(scores.without.sum(), scores.bytes.sum())
        figures = [f"{plain:.4f}", f"{scores.bpb:.4f}", f"{plain - scores.bpb:+.4f}", interval(gain)]
        rows.append([*shown.values(), *figures, "–" if scores is runs[0] else interval(gains[0] - gain)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or a result_<tag>.json in it")
    add("--samples", type=number(int, 1), default=10_000, help="bootstrap samples (default: %(default)s)")
    add("--seed", type=number(int, 0), default=0, help="of the bootstrap (default: %(default)s)")
    options = parser.parse_args()
    runs = [read_scores(path) for path in options.runs]
    require_alike(runs)
    print(table(runs, options.samples, options.seed))
    bytes_ = int(runs[0].bytes.sum())
    print(f"\n{len(runs[0].bytes):,} documents, {bytes_:,} bytes, {options.samples:,} bootstrap samples")


if __name__ == "__main__":
    run_tool(main)
