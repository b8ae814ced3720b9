"""The certificate of a score: what its figures claim, found by experiment. `python data/audit.py RUN... --documents 2`

Each finding is a line with its figure, pass or fail, and goes into the run's result.json; exit code 1 if one fails.
  causal      an earlier score moves when later tokens, or those of other documents, are replaced
  normalised  probabilities of what may come next, from earlier tokens alone, are 1 together, and the score is of them
  repeated    the documents, scored again, have the NLL that the run kept
  bytes       the counted bytes of every document are those of its decoded text
  disjoint    validation documents that stand in the training shards
  decodes     (--decode) files that expand to the documents have the size that the score says
"""

import common

# isort: split
import argparse
import contextlib
import copy
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import sequential
from sequential import train_gpt

AROUND = 8  # tokens of no document that stand before each
DRAWN = 100  # targets whose probabilities are summed
SUM_ERROR = 1e-5
NATS = {"float32": 1e-3, "bfloat16": 0.2}  # by which a target's score may differ from its recomputed one; rounding
SHARE, ROUNDED = 1e-4, 5e-3  # by which a document's NLL may differ from the run's; where either is of bfloat16
OPENING = 64  # tokens
BLOCK = 1 << 24  # training tokens looked at together
NO_NUMBER = 1e9  # which JSON has, for a difference that is none
OUTCOMES = {True: "pass", False: "fail", None: "not judged"}


class Finding(NamedTuple):
    name: str
    outcome: bool | None  # None: it could not be judged
    figure: float
    detail: str


class Sample(NamedTuple):
    """Documents, longest first, by their numbers in the run; `tokens` begin AROUND others, each at one of `starts`."""

    numbers: np.ndarray
    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray


def draw(stream, run, count: int, rng: np.random.Generator) -> Sample:
    """Documents of two chunks or more; UserError if there are none."""
    size = run.s.ttt_chunk_size
    numbers = rng.permutation(np.flatnonzero(stream.lengths > size))[:count]
    if not len(numbers):
        raise common.UserError(f"no document has two chunks of {size} targets — score longer documents")
    numbers = numbers[np.argsort(-stream.lengths[numbers], kind="stable")]
    lengths = stream.lengths[numbers]
    text = stream.tokens.cpu().numpy()
    parts = []
    for start, length in zip(stream.starts[numbers], lengths, strict=True):
        parts += rng.integers(train_gpt.BOS + 1, run.s.vocab_size, AROUND), text[start : start + length + 1]
    ends = np.cumsum(lengths + 1 + AROUND)
    return Sample(numbers, np.concatenate(parts), ends - lengths - 1, lengths)


def trace(model, run, sample: Sample, tokens: np.ndarray) -> dict[str, list[np.ndarray]]:
    """NLL of every target of the sample's documents, were these its tokens, by the names of the run's figures."""
    s = run.s
    stream = train_gpt.Stream(tokens, tokens[1:] * 0, run.device, (sample.starts, sample.lengths))
    batch = train_gpt.DocumentBatch(model, stream, len(sample.numbers), run)
    batch.load(np.arange(len(sample.numbers)))
    drawn = np.stack([train_gpt.draw_lora_a(s, int(number)) for number in sample.numbers])
    batch.score()
    plain = batch.target_nll()
    parts = [plain]
    for part in range(len(s.ttt_rates)):
        batch.adapt(1, a=drawn, part=part)
        parts.append(batch.target_nll())
    found = {"no_adaptation": plain, "epoch_1" if s.ttt_protocol == "replay" else "single_pass": parts[1]}
    if s.ttt_mixture:
        ends = np.cumsum(sample.lengths)
        flat = np.stack([np.concatenate(part) for part in parts])
        mixed = train_gpt.mixture(flat, ends - sample.lengths, sample.lengths, s.ttt_mixture_share)
        found["mixture"] = np.split(mixed, ends[:-1])
    if s.ttt_figures > 1:
        batch.adapt(s.ttt_n_epochs, a=drawn)
        found[f"last_epoch_{s.ttt_figures}"] = batch.target_nll()
    return found


def causal(model, run, sample: Sample, before: dict, rng: np.random.Generator) -> tuple[Finding, list[dict]]:
    """Whether a score knows what it must not, and a row for each document and figure: t, the largest change of an NLL
    of a target up to t in nats, and that of an unchanged repeat."""
    other = rng.integers(train_gpt.BOS + 1, run.s.vocab_size - 1, len(sample.tokens))
    changed = other + (other >= sample.tokens)  # never the token itself
    points = rng.integers(1, sample.lengths)
    for start, t in zip(sample.starts, points, strict=True):
        changed[start : start + t + 1] = sample.tokens[start : start + t + 1]
    repeat, after = trace(model, run, sample, sample.tokens), trace(model, run, sample, changed)
    rows = []
    for i, (document, t) in enumerate(zip(sample.numbers.tolist(), points.tolist(), strict=True)):
        for name in before:
            seen, *others = (x[name][i][:t] for x in (before, repeat, after))  # token j is target j - 1
            noise, change = (largest(seen, x) for x in others)
            row = {"document": document, "targets": int(sample.lengths[i]), "t": t, "figure": name}
            rows.append(row | {"backward_looking": not name.startswith("last"), "change": change, "repeat": noise})
    return judge_causal(rows, len(sample.numbers)), rows


def judge_causal(rows: list[dict], documents: int) -> Finding:
    """What the rows show together. Where not even a repeat gives a number, a change cannot be told from none."""
    scores = [row for row in rows if row["backward_looking"]]
    judged = [row for row in scores if row["repeat"] < NO_NUMBER]
    outcome = all(row["change"] <= row["repeat"] for row in judged)
    detail = f"nats by which a score of {documents} documents moved"
    leak = [row["change"] for row in rows if not row["backward_looking"]]
    detail += f"; replay's last epoch, no score, by {max(leak):.3g}" if leak else ""
    if len(judged) < len(scores):
        detail += f"; {len(scores) - len(judged)} of {len(scores)} scores are no numbers even when nothing is replaced"
        outcome = None if outcome else False
    return Finding("causal", outcome, max((row["change"] for row in judged), default=0.0), detail)


def largest(ones: np.ndarray, others: np.ndarray) -> float:
    """The largest difference; 0 of equal values, infinite ones included, and NO_NUMBER where it is no number."""
    with np.errstate(invalid="ignore"):
        differences = np.where(ones == others, 0.0, np.abs(np.subtract(others, ones)))
    return float(np.nan_to_num(differences, nan=NO_NUMBER, posinf=NO_NUMBER).max())


def normalised(model, run, sample: Sample, scored: list[np.ndarray], figure: str, rng: np.random.Generator) -> Finding:
    """Whether the probabilities of all tokens at drawn targets, recomputed from the tokens before, are 1 together, and
    that of the target is the scored one."""
    count = min(DRAWN, int(sample.lengths.sum()))
    drawn = np.zeros(int(sample.lengths.sum()), bool)
    drawn[rng.choice(len(drawn), count, replace=False)] = True
    sums, found, expected = [], [], []
    parts = np.split(drawn, np.cumsum(sample.lengths)[:-1])
    ends = [int(np.flatnonzero(here)[-1]) if here.any() else -1 for here in parts]
    bar = common.progress_bar("recomputing token after token", sum(ends) + len(ends))
    for i, (here, last) in enumerate(zip(parts, ends, strict=True)):
        if last < 0:
            continue
        document = sample.tokens[sample.starts[i] :]

        def choose(position: int, nll: np.ndarray, i=i, here=here, document=document, last=last) -> int:
            if position > last:
                raise sequential.Enough
            token = int(document[position + 1])
            bar.update()
            if here[position]:
                sums.append(np.exp(-nll.astype(np.float64)).sum())
                found.append(nll[token])
                expected.append(scored[i][position])
            return token

        reader = sequential.Sequential(model, run, int(sample.lengths[i]), choose, figure, int(document[0]))
        reader.read(int(sample.numbers[i]))
    bar.close()
    error, difference = largest(np.ones(count), np.array(sums)), largest(np.array(expected), np.array(found))
    allowed = NATS[str(run.dtype).split(".")[1]]
    detail = f"nats by which a score differs from its recomputed probability, at {count} targets; their sums are 1"
    detail += f" within {error:.1g}"
    return Finding("normalised", error <= SUM_ERROR and difference <= allowed, difference, detail)


def repeated(left: common.Run, run, sample: Sample, scored: list[np.ndarray], figure: str) -> Finding:
    """Whether the documents' NLL are what the run kept; what has none that is finite is not compared."""
    kept = common.read_scores(left)[figure][sample.numbers]
    again = np.array([nll.sum(dtype=np.float64) for nll in scored])
    finished = np.isfinite(kept)
    if not finished.any():
        why = "no drawn document has a finite score: a deadline cut it off, or it diverged"
        return Finding("repeated", None, 0.0, why)
    worst = largest(np.ones(finished.sum()), (again / kept)[finished])
    exact = {left.result["environment"]["dtype"], str(run.dtype).split(".")[1]} == {"float32"}
    detail = f"share by which {finished.sum()} documents' NLL differ from the run's"
    return Finding("repeated", worst <= (SHARE if exact else ROUNDED), worst, detail)


def counted_bytes(stream, tokenizer) -> Finding:
    """Whether every document's counted bytes are those of its decoded text."""
    tokens = stream.tokens.cpu().numpy()
    documents = [tokens[start : start + n + 1] for start, n in zip(stream.starts, stream.lengths, strict=True)]
    decoded = np.array(train_gpt.decoded_bytes(tokenizer, documents))
    differences = np.abs(stream.document_bytes - decoded)
    wrong = int(differences.argmax())
    detail = f"bytes counted and not in the text, or not counted, at most, of {len(documents):,} documents"
    if differences[wrong]:
        detail += f"; document {wrong} counts {stream.document_bytes[wrong]} and has {decoded[wrong]}"
    return Finding("bytes", not differences[wrong], float(differences[wrong]), detail)


def documents_of(shards: list) -> Iterator[np.ndarray]:
    """The documents of a stream of shards or arrays, without BOS."""
    held = np.array([train_gpt.BOS], "<u2")  # what comes before the first is a document, too
    with common.progress_bar("reading training shards", sum(map(len, shards))) as bar:
        for shard in shards:
            for first in range(0, len(shard), BLOCK):
                block = shard[first : first + BLOCK]
                held = np.concatenate((held, block))
                begins = np.flatnonzero(held == train_gpt.BOS)
                for begin, end in zip(begins, begins[1:], strict=False):
                    yield held[begin + 1 : end]
                held = held[begins[-1] :]
                bar.update(len(block))
    yield held[1:]


def disjoint(left: common.Run, stream, run) -> Finding:
    """compare_with_training()'s, which cannot be judged where a shard is not there or not readable."""
    try:
        with sequential.user_errors():
            return compare_with_training(left, stream, run)
    except (common.UserError, OSError) as error:
        return Finding("disjoint", None, 0.0, common.explain(error).split(" — ")[0])


def compare_with_training(left: common.Run, stream, run) -> Finding:
    """Share of validation documents that are training documents as well, and how many of the longer begin like one."""
    for path in Path(run.s.data_path).glob("fineweb_train_*.bin"):
        common.require_file(path)
    shards = train_gpt.open_shards("train", run)
    trained = left.result["data"].get("train")
    if trained and train_gpt.fingerprint(shards) != trained:
        return Finding(
            "disjoint", None, 0.0, f"the shards in {run.s.data_path} have another fingerprint than those of training"
        )

    def digests(tokens: np.ndarray) -> tuple[bytes, bytes]:
        opening = tokens[:OPENING] if len(tokens) >= OPENING else tokens[:0]
        return tuple(hashlib.blake2b(part.tobytes(), digest_size=16).digest() for part in (tokens, opening))

    text = stream.tokens.cpu().numpy().astype("<u2")
    own = [document for document in documents_of([text]) if len(document)]
    wholes, openings = zip(*map(digests, own), strict=True)
    openings = [digest for digest, document in zip(openings, own, strict=True) if len(document) >= OPENING]
    wanted = set(wholes), set(openings)
    seen = set(), set()
    for document in documents_of(shards):
        for found, known, digest in zip(seen, wanted, digests(document), strict=True):
            if digest in known:
                found.add(digest)
    stand, begin = (sum(x in found for x in of) for of, found in zip((wholes, openings), seen, strict=True))
    share = stand / len(own)
    which = "the training shards" if trained else f"the shards in {run.s.data_path}"
    detail = f"share of {len(own):,} documents that stand in {which}; "
    detail += f"of {begin:,} of the {len(openings):,} with {OPENING} tokens the first {OPENING} do"
    return Finding("disjoint", stand == 0, share, detail)


def decodes(left: common.Run, documents: int) -> Finding:
    """compress.py's check."""
    import compress

    rows = compress.check_documents(left, None, documents)
    if not rows:
        return Finding("decodes", None, 0.0, compress.CUT_OFF)
    score, size = (sum(row[name] for row in rows) for name in ("score", "size"))
    right = all(row["as_scored"] and row["same"] for row in rows)
    lost = sum(not row["same"] for row in rows)
    detail = f"bytes of {len(rows)} documents' files, {score:.1f} by the score; {lost} did not come back"
    return Finding("decodes", right, float(size), detail)


def certify(left: common.Run, documents: int, decode: bool) -> bool:
    """Whether no finding of a run fails. Each is printed and kept when it is found: what follows may take long."""
    model, run = sequential.open_run(left)
    stream = sequential.open_stream(left, run)
    tokenizer = sequential.open_tokenizer(left, run)
    rng = np.random.default_rng([run.s.seed, 0xA0D17])
    sample = draw(stream, run, documents, rng)
    what = f"{len(sample.numbers)} documents of {sample.lengths.sum():,} targets"
    print(f"{left.path}: scores {what} three times, then token after token; it may take minutes", flush=True)
    before = trace(model, run, sample, sample.tokens)
    figure = left.score_name
    scored = before["mixture"] if figure == "mixture" else list(before.values())[1]
    found, rows = causal(model, run, sample, before, rng)
    certificate = dict(source_sha256=train_gpt.SOURCE_SHA256, documents=len(sample.numbers), findings={})

    def note(finding: Finding) -> None:
        outcome = OUTCOMES[finding.outcome]
        print(f"{outcome:<10} {finding.name:<10} {finding.figure:.3g} {finding.detail}", flush=True)
        certificate["findings"][finding.name] = dict(outcome=outcome, figure=finding.figure, detail=finding.detail)
        keep(left, certificate, rows)

    note(found)
    note(normalised(model, run, sample, scored, figure, rng))
    note(repeated(left, run, sample, scored, figure))
    note(counted_bytes(stream, tokenizer))
    note(disjoint(left, stream, run))
    if decode:
        note(decodes(left, documents))
    return all(finding["outcome"] != "fail" for finding in certificate["findings"].values())


def scored_run(path: Path) -> common.Run:
    """A run with test-time training as it is now; UserError if there is none, or if it is being scored."""
    left = common.read_run(path)
    if left.score_name == "sliding":
        raise common.UserError(f"{left.path} is of a sliding window — give runs with test-time training")
    with contextlib.suppress(FileNotFoundError), common.require_file(left.path.with_name("train.log")).open() as log:
        try:
            train_gpt.lock(log)
        except BlockingIOError as error:
            raise common.UserError(f"{left.path.parent} is in use by a live run — wait for its end") from error
    return left


def keep(left: common.Run, certificate: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Adds a certificate to the run's result.json; UserError if that has changed since it was read, minutes ago."""
    if common.read_run(left.path).result != left.result:
        raise common.UserError(f"{left.path} has changed while it was examined — run it again")
    left.result["evaluation"] |= copy.deepcopy(dict(certificate=certificate, audit=rows))
    common.write_atomic(left.path, json.dumps(left.result, indent=1).encode())


def main(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=common.place, metavar="RUN", help="a run's folder")
    parser.add_argument("--documents", type=common.number(int, 1), default=2, metavar="K", help="default: 2")
    parser.add_argument("--decode", action="store_true", help="compress and expand K documents, too: it takes long")
    options = parser.parse_args()
    if options.decode:
        import compress  # noqa: F401 - it needs a package more, which is to be missed before the work
    for path in options.runs:
        common.require_writable(scored_run(path).path)
    passed = [certify(scored_run(path), options.documents, options.decode) for path in options.runs]
    if not all(passed):
        sys.exit(1)


if __name__ == "__main__":
    common.run_tool(main)
