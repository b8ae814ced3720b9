"""Does a later token reach an earlier score? `python data/audit.py RUN --documents 2` finds out by experiment.

It prints the largest change of any target's NLL up to a point, behind which all tokens were replaced, beside that of an
unchanged repeat, and ends with code 1 if a backward-looking figure moved. --positions writes sums for plot.py instead.
"""

import argparse
import io
import json
import math
import sys
from pathlib import Path

import numpy as np

import common

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt

FIRST_SPAN = 64  # tokens; each next span of a document is as long as all before it


class Traced(train_gpt.DocumentBatch):
    """A batch that keeps the NLL of every target: `trace` (1 + figures, B, targets) float32, NaN where not scored."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.trace = np.full((len(self.sums), len(self.lengths), int(self.lengths[0])), math.nan, np.float32)

    def step(self, visit):
        nll = super().step(visit)
        s, first = self.run.s, int(self.position)
        for row, scored in enumerate(nll.cpu().numpy() if visit.score else ()):
            end = min(int(self.lengths[row]), first + s.ttt_chunk_size)
            begin = max(0, end - s.ttt_eval_seq_len) if visit.context is None else first
            self.trace[int(self.figure), row, first:end] = scored[first - begin : end - begin]
        return nll


def trace(model, stream, run, documents: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """NLL of every target of documents given longest first, as Traced has it, under the adapters of `seeds`."""
    batch = Traced(model, stream, documents, run)
    batch.plain()
    batch.adapt(np.stack([train_gpt.draw_lora_a(run.s, int(seed)) for seed in seeds]))
    if run.signal:  # train_gpt's handler lets a signal wait
        raise KeyboardInterrupt
    return batch.trace


def figure_names(s) -> dict[str, int]:
    """The figures that are compared, and their rows in a trace."""
    if s.ttt_protocol == "single_pass":
        return {"no_adaptation": 0, "single_pass": 1}
    last = {f"last_epoch_{s.ttt_n_epochs}": s.ttt_n_epochs} if s.ttt_n_epochs > 1 else {}
    return {"no_adaptation": 0, "epoch_1": 1} | last


def audit(model, stream, run, documents: int) -> list[dict]:
    """One row for each document and figure: t, the largest change of an NLL up to t in nats, and the repeat's."""
    s = run.s
    rng = np.random.default_rng([s.seed, 0xA0D17])
    chosen = rng.permutation(np.flatnonzero(stream.lengths > s.ttt_chunk_size))[:documents]
    chosen = chosen[np.argsort(-stream.lengths[chosen], kind="stable")]
    if not len(chosen):
        raise common.UserError(f"no document has two chunks of {s.ttt_chunk_size} targets — score longer documents")
    lengths = stream.lengths[chosen]
    points = rng.integers(1, lengths)
    tokens = stream.tokens.cpu().numpy()
    places = [start + np.arange(n + 1) for start, n in zip(stream.starts[chosen], lengths, strict=True)]
    before = tokens[np.concatenate(places)]
    later = np.concatenate([np.arange(n + 1) > t for n, t in zip(lengths, points, strict=True)])
    other = rng.integers(train_gpt.BOS + 1, s.vocab_size - 1, len(before))
    other += other >= before  # never the token itself
    starts = np.cumsum(lengths + 1) - lengths - 1
    traces = []
    for flat in (before, before, np.where(later, other, before)):
        own = train_gpt.Stream(flat, np.zeros(len(flat) - 1, np.int16), run.device, (starts, lengths))
        traces.append(trace(model, own, run, np.arange(len(chosen)), chosen))
    rows = []
    for i, (document, t) in enumerate(zip(chosen.tolist(), points.tolist(), strict=True)):
        for name, figure in figure_names(s).items():
            seen, *others = (x[figure, i, :t] for x in traces)  # token j is target j - 1: t targets have an index <= t
            repeat, change = (float(np.abs(x - seen).max()) for x in others)
            row = {"document": document, "targets": int(lengths[i]), "t": t, "figure": name}
            rows.append(row | {"backward_looking": not name.startswith("last"), "change": change, "repeat": repeat})
    return rows


def positions(model, stream, run, documents: int | None) -> dict[str, np.ndarray]:
    """Sums by span of the first documents: figures (F,), nll (F, S), targets, bytes and ends (S,)."""
    names = figure_names(run.s)
    lengths = stream.lengths[:documents]
    starts = np.array([0, *(FIRST_SPAN << i for i in range(20) if FIRST_SPAN << i < lengths.max())])
    sums = np.zeros((len(names) + 2, len(starts)))
    bytes_ = stream.bytes.cpu().numpy()
    for batch in train_gpt.batch_documents(lengths, run):
        found = trace(model, stream, run, batch, batch)[list(names.values())]
        for i, document in enumerate(batch):
            n, start = lengths[document], stream.starts[document]
            rows = np.vstack([found[:, i, :n], np.ones(n), bytes_[start : start + n]])
            begun = starts[starts < n]
            sums[:, : len(begun)] += np.add.reduceat(rows, begun, axis=1)
    ends = np.append(starts[1:], lengths.max())
    return {"figures": np.array(list(names)), "nll": sums[:-2], "targets": sums[-2], "bytes": sums[-1], "ends": ends}


def open_run(left: common.Run) -> tuple:
    """The model that a run scored, the text, and the settings; UserError if either is not what it was."""
    kept = {k: v for k, v in left.result["settings"].items() if k in train_gpt.Settings.__dataclass_fields__}
    kept["eval_only"] = kept.get("eval_only") or str(left.path.with_name("final_model.ptz"))
    kept |= {"output_dir": str(left.path.parent), "resume": False, "compile": 0, "device": "auto"}
    try:
        run = train_gpt.Run(train_gpt.Settings(**kept).checked())
        settings, state, digest = train_gpt.read_model(Path(run.s.eval_only), run)
        run = run.using(**settings.of(train_gpt.ModelSettings))
        model = train_gpt.scoring_model(run)
        train_gpt.load_weights(model, state, run.s.eval_only)
        stream = train_gpt.load_validation(run)
    except train_gpt.UserError as error:
        raise common.UserError(str(error)) from error
    if (digest, stream.fingerprint) != (left.result["weights_sha256"], left.result["data"]["validation"]):
        raise common.UserError(f"{left.path} is of another artifact or text — {common.UNTOUCHED}")
    return model, stream, run


def main(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="a run's folder, or a result_<tag>.json in it")
    parser.add_argument("--documents", type=common.number(int, 1), help="default: 2, with --positions all")
    parser.add_argument("--positions", action="store_true", help="write ttt_positions.npz instead")
    arguments = parser.parse_args()
    left = common.read_run(arguments.run)
    opened = open_run(left)
    if arguments.positions:
        content = io.BytesIO()
        np.savez(content, weights=left.result["weights_sha256"], **positions(*opened, arguments.documents))
        common.write_atomic(left.beside("ttt_positions"), content.getvalue())
        print(f"wrote {left.beside('ttt_positions')}")
        return
    rows = audit(*opened, arguments.documents or 2)
    for row in rows:
        print("audit " + " ".join(f"{k}:{v:.3e}" if isinstance(v, float) else f"{k}:{v}" for k, v in row.items()))
    left.result["evaluation"]["audit"] = rows
    common.write_atomic(left.path, json.dumps(left.result, indent=1).encode())
    if any(row["backward_looking"] and not row["change"] <= row["repeat"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    common.run_tool(main)
