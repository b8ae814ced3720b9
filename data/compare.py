"""Compares test-time training settings over the same documents: bits per byte, and what each gains over no adaptation.

    python data/compare.py runs/a runs/b runs/c

Only backward-looking figures count: single_pass's, or epoch 1 of replay. Each gain has a confidence interval by bootstrap
over documents (Efron 1979): the documents of the validation set are drawn again with replacement, the same draws for every
run, so that the gain over the best run is compared document by document. Prints a Markdown table, the best run first.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from text import Parser, UserError, positive
from text import run as run_tool

SHOWN = {"ttt_protocol": "protocol", "ttt_n_epochs": "epochs", "ttt_lora_lr": "lr", "ttt_chunk_size": "chunk", "ttt_lora_rank": "rank"}
BLOCK = 256  # bootstrap samples drawn at once
SAME_MODEL = 2e-3  # relative; the context that a chunk size leaves moves a model's plain score by a tenth of that


@dataclass
class Run:
    """One run's documents, in stream order: nats without adaptation and backward-looking, and bytes of text, all (documents,)."""

    path: Path
    settings: dict[str, Any]
    without: np.ndarray
    adapted: np.ndarray
    bytes: np.ndarray

    @property
    def bpb(self) -> float:
        return bits(self.adapted.sum(), self.bytes.sum())

    @property
    def gain(self) -> float:
        """Bits per byte that adaptation saves."""
        return bits(self.without.sum() - self.adapted.sum(), self.bytes.sum())


def bits(nats: Any, bytes_: Any) -> Any:
    """Bits per byte."""
    return nats / math.log(2) / bytes_


def read_run(path: Path) -> Run:
    """Reads a run's folder; UserError if it holds no test-time training evaluation."""
    try:
        settings = json.loads((path / "result.json").read_text(encoding="utf-8"))["settings"]
        with np.load(path / "ttt_documents.npz") as arrays:
            without, epochs, bytes_ = arrays["nll_no_adaptation"], arrays["nll_per_epoch"], arrays["bytes"]
            if not arrays["finished"].all():
                raise UserError(f"{path}: the budget ended before all documents were adapted to — raise EVAL_MAX_SECONDS")
        return Run(path, {name: settings[name] for name in SHOWN}, without, epochs[0], bytes_)
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror} — give folders of finished runs with test-time training") from error
    except (ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
        raise UserError(f"{path} has no whole result.json and ttt_documents.npz ({type(error).__name__}) — run it again") from error


def require_alike(runs: Sequence[Run]) -> None:
    """UserError unless all runs scored the same documents with the same weights."""
    first = runs[0]
    for run in runs[1:]:
        if not np.array_equal(run.bytes, first.bytes) or not np.allclose(run.without.sum(), first.without.sum(), rtol=SAME_MODEL):
            raise UserError(f"{run.path} and {first.path} did not score the same documents with the same model — compare like with like")


def bootstrap(nats: np.ndarray, bytes_: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Bits per byte of `samples` sets of documents drawn with replacement: nats (runs, documents) -> (runs, samples)."""
    rng, sets = np.random.default_rng(seed), []
    for size in [BLOCK] * (samples // BLOCK) + [samples % BLOCK]:
        drawn = rng.integers(0, len(bytes_), (size, len(bytes_)))
        sets.append(bits(np.stack([row[drawn].sum(1) for row in nats]), bytes_[drawn].sum(1)))
    return np.concatenate(sets, axis=1)


def interval(values: np.ndarray) -> str:
    """The middle 95% of bootstrap values, for people."""
    low, high = np.quantile(values, (0.025, 0.975))
    return f"{low:+.4f} to {high:+.4f}"


def table(runs: Sequence[Run], samples: int, seed: int) -> str:
    """A Markdown table, the best run first."""
    runs = sorted(runs, key=lambda run: run.bpb)
    gains = bootstrap(np.stack([run.without - run.adapted for run in runs]), runs[0].bytes, samples, seed)
    header = [*SHOWN.values(), "no adaptation", "backward-looking", "gain", "95% interval", "behind the best, 95% interval"]
    rows = [header, ["---"] * len(header)]
    for run, gain in zip(runs, gains):
        shown = ["1 of " + str(run.settings[n]) if (n, run.settings["ttt_protocol"]) == ("ttt_n_epochs", "replay") else str(run.settings[n]) for n in SHOWN]
        figures = [f"{bits(run.without.sum(), run.bytes.sum()):.4f}", f"{run.bpb:.4f}", f"{run.gain:+.4f}"]
        rows.append([*shown, *figures, interval(gain), "–" if run is runs[0] else interval(gains[0] - gain)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs over the same documents")
    parser.add_argument("--samples", type=positive, default=10_000, help="bootstrap samples (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    runs = [read_run(path) for path in options.runs]
    require_alike(runs)
    print(table(runs, options.samples, options.seed))
    print(f"\n{len(runs[0].bytes):,} documents, {int(runs[0].bytes.sum()):,} bytes, {options.samples:,} bootstrap samples")


if __name__ == "__main__":
    run_tool(main)
