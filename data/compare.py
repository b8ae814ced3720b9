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

SHOWN = {
    "ttt_protocol": "protocol",
    "ttt_context": "context",
    "ttt_eval_seq_len": "window",
    "ttt_n_epochs": "epochs",
    "ttt_lora_lr": "lr",
    "ttt_chunk_size": "chunk",
    "ttt_lora_rank": "rank",
}
BLOCK = 256  # bootstrap samples drawn at once


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
            models = f"{found['weights_sha256']:.12} and {expected['weights_sha256']:.12}"
            raise UserError(f"{pair} scored different models ({models}) — compare like with like")
        same_text = found["data"]["validation"] == expected["data"]["validation"]
        if not same_text or not np.array_equal(other.bytes, first.bytes):
            raise UserError(f"{pair} did not score the same documents — compare like with like")


def bootstrap(nats: np.ndarray, bytes_: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Bits per byte of `samples` sets of documents drawn with replacement: nats (runs, D) -> (runs, samples)."""
    rng = np.random.default_rng(seed)
    sets = []
    for size in [BLOCK] * (samples // BLOCK) + [samples % BLOCK]:
        drawn = rng.integers(0, len(bytes_), (size, len(bytes_)))
        sets.append(bits(np.stack([row[drawn].sum(1) for row in nats]), bytes_[drawn].sum(1)))
    return np.concatenate(sets, axis=1)


def interval(values: np.ndarray) -> str:
    """The middle 95% of bootstrap values, for people."""
    low, high = np.quantile(values, (0.025, 0.975))
    return f"{low:+.4f} to {high:+.4f}"


def table(runs: Sequence[Scores], samples: int, seed: int) -> str:
    """A Markdown table, the best run first."""
    runs = sorted(runs, key=lambda scores: scores.bpb)
    gains = bootstrap(np.stack([scores.without - scores.adapted for scores in runs]), runs[0].bytes, samples, seed)
    header = [
        *SHOWN.values(),
        "no adaptation",
        "backward-looking",
        "gain",
        "95% interval",
        "behind the best, 95% interval",
    ]
    rows = [header, ["---"] * len(header)]
    for scores, gain in zip(runs, gains, strict=True):
        plain = bits(scores.without.sum(), scores.bytes.sum())
        figures = [f"{plain:.4f}", f"{scores.bpb:.4f}", f"{plain - scores.bpb:+.4f}"]
        behind = "–" if scores is runs[0] else interval(gains[0] - gain)
        settings = scores.run.result["settings"]
        shown = {name: str(settings.get(name, "?")) for name in SHOWN}
        if shown["ttt_protocol"] == "replay":
            shown["ttt_n_epochs"] = f"1 of {shown['ttt_n_epochs']}"
        rows.append([*shown.values(), *figures, interval(gain), behind])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or a result_<tag>.json in it"
    )
    parser.add_argument(
        "--samples", type=number(int, 1), default=10_000, help="bootstrap samples (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: %(default)s)")
    options = parser.parse_args()
    runs = [read_scores(path) for path in options.runs]
    require_alike(runs)
    print(table(runs, options.samples, options.seed))
    bytes_ = int(runs[0].bytes.sum())
    print(f"\n{len(runs[0].bytes):,} documents, {bytes_:,} bytes, {options.samples:,} bootstrap samples")


if __name__ == "__main__":
    run_tool(main)
