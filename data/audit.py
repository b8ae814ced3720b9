"""Does a later token reach an earlier score? `python data/audit.py RUN --documents 2` finds out by experiment.

For K documents of at least two chunks it replaces every token after a point t, inside a chunk, by another one and
scores again. It prints, for each figure, the largest change of any target's NLL up to t, beside that of an unchanged
repeat, and adds the rows to the run's result.json. Backward-looking figures must not move; the last epoch of replay
shows its leak. Exit code 1 if a backward-looking figure moved."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np

import common

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt


class Traced(train_gpt.DocumentBatch):
    """A batch that keeps the NLL of every target: `trace` (1 + figures, B, targets) float32, NaN where not scored."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.trace = np.full((len(self.sums), len(self.lengths), int(self.lengths[0])), math.nan, np.float32)

    def record(self, figure, chunk, nll, sums):
        super().record(figure, chunk, nll, sums)
        s = self.run.s
        first = chunk * s.ttt_chunk_size
        for row, scored in enumerate(nll.cpu().numpy()):
            end = min(int(self.lengths[row]), first + s.ttt_chunk_size)
            windowed = figure > 0 and s.ttt_context == "recompute"
            begin = max(0, end - s.ttt_eval_seq_len) if windowed else first
            self.trace[figure, row, first:end] = scored[first - begin : end - begin]


def figure_names(s: train_gpt.Settings) -> dict[str, int]:
    """The figures that are compared, and their rows in a trace."""
    if s.ttt_protocol == "single_pass":
        return {"no_adaptation": 0, "single_pass": 1}
    last = {f"last_epoch_{s.ttt_n_epochs}": s.ttt_n_epochs} if s.ttt_n_epochs > 1 else {}
    return {"no_adaptation": 0, "epoch_1": 1} | last


def trace(model: train_gpt.GPT, run: train_gpt.Run, tokens: list[np.ndarray], documents: np.ndarray) -> np.ndarray:
    """NLL of every target of documents given longest first, as Traced has it, under the adapters of those documents."""
    lengths = np.array([len(x) - 1 for x in tokens])
    starts = np.cumsum(lengths + 1) - lengths - 1
    flat = np.concatenate(tokens)
    stream = train_gpt.Stream(flat, np.zeros(len(flat) - 1, np.int16), run.device, (starts, lengths))
    batch = Traced(model, stream, np.arange(len(tokens)), run)
    a = np.stack([train_gpt.draw_lora_a(run.s, int(document)) for document in documents])
    batch.adapters = train_gpt.Adapters(a, run)
    batch.plain()
    batch.adapt()
    return batch.trace


def audit(model: train_gpt.GPT, stream: train_gpt.Stream, run: train_gpt.Run, documents: int) -> list[dict]:
    """One row for each document and figure: t, the largest change of an NLL up to t in nats, and the repeat's."""
    s = run.s
    rng = np.random.default_rng([s.seed, 0xA0D17])
    chosen = rng.permutation(np.flatnonzero(stream.lengths > s.ttt_chunk_size))[:documents]
    chosen = chosen[np.argsort(-stream.lengths[chosen], kind="stable")]
    if not len(chosen):
        raise common.UserError(f"no document has two chunks of {s.ttt_chunk_size} targets — score longer documents")
    before, after, points = [], [], []
    for document in chosen:
        start, length = int(stream.starts[document]), int(stream.lengths[document])
        tokens = stream.tokens[start : start + length + 1].cpu().numpy()
        t = int(rng.integers(1, length))
        other = rng.integers(train_gpt.BOS + 1, s.vocab_size - 1, len(tokens))
        other += other >= tokens  # never the token itself
        before.append(tokens)
        after.append(np.where(np.arange(len(tokens)) > t, other, tokens))
        points.append(t)
    first = trace(model, run, before, chosen)
    repeat = trace(model, run, before, chosen)
    changed = trace(model, run, after, chosen)
    rows = []
    for i, document in enumerate(chosen.tolist()):
        for name, figure in figure_names(s).items():
            seen = first[figure, i, : points[i]]  # token j is target j - 1: t targets have an index <= t
            change, noise = (float(np.abs(x[figure, i, : points[i]] - seen).max()) for x in (changed, repeat))
            row = {"document": document, "targets": int(stream.lengths[document]), "t": points[i], "figure": name}
            rows.append(row | {"backward_looking": not name.startswith("last"), "change": change, "repeat": noise})
    return rows


def settings_of(folder: Path) -> tuple[dict, train_gpt.Settings]:
    """A run's result and the settings that score its artifact again."""
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    kept = {
        name: value for name, value in result["settings"].items() if name in train_gpt.Settings.__dataclass_fields__
    }
    kept |= {"eval_only": kept["eval_only"] or str(folder / "final_model.ptz"), "output_dir": str(folder)}
    kept |= {"resume": False, "compile": 0, "device": "auto"}
    return result, train_gpt.Settings(**kept).checked()


def main() -> None:
    parser = common.Parser(description=__doc__, formatter_class=common.argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder, with result.json")
    parser.add_argument("--documents", type=common.number(int, 1), default=2, help="documents to audit (default 2)")
    arguments = parser.parse_args()
    try:
        result, s = settings_of(arguments.run)
    except (ValueError, KeyError, TypeError) as error:
        raise common.UserError(
            f"{arguments.run}/result.json is no run's result ({error}) — name a run's folder"
        ) from error
    try:
        run = train_gpt.Run(s)
        settings, state, digest = train_gpt.read_model(Path(s.eval_only), run)
        run = run.using(**settings.of(train_gpt.ModelSettings))
        model = train_gpt.scoring_model(run)
        train_gpt.load_weights(model, state, s.eval_only)
        stream = train_gpt.load_validation(run)
    except train_gpt.UserError as error:
        raise common.UserError(str(error)) from error
    if (digest, stream.fingerprint) != (result["weights_sha256"], result["data"]["validation"]):
        raise common.UserError(f"{arguments.run} has another artifact or text than its result — restore them")
    rows = audit(model, stream, run, arguments.documents)
    for row in rows:
        print("audit " + " ".join(f"{k}:{v:.3e}" if isinstance(v, float) else f"{k}:{v}" for k, v in row.items()))
    result["evaluation"]["audit"] = rows
    common.write_atomic(arguments.run / "result.json", json.dumps(result, indent=1).encode())
    if any(row["backward_looking"] and row["change"] > row["repeat"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    common.run(main)
