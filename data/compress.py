"""A lossless compressor on a run's artifact and evaluation: what a score in bits per byte claims, as a file.

    python data/compress.py compress RUN INPUT OUTPUT
    python data/compress.py expand RUN INPUT OUTPUT
    python data/compress.py check RUN --documents 2

INPUT may hold any bytes; what the tokenizer cannot give back is kept beside its tokens. Predictions are those of the
run's score, or of another of its figures. A machine that computes other numbers than the one that compressed says so.
"""

from common import UserError, place

# isort: split
import argparse
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import platform
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import constriction
import numpy as np
import sentencepiece
import torch
import zstandard

import common
import sequential
from sequential import ADAPTED, LAST_EPOCH, MIXTURE, NO_ADAPTATION, train_gpt

MAGIC = b"GPTpress"
FORMAT = 1
COUNTS = 1 << 24  # of a distribution: what constriction's coders work with
CHECKED_TOKENS = 128  # that a bit of a chunk's check stands for: 0.2% of their size, if they take 5 bits each
DOCUMENT_CHECK = 16  # bits, behind a document
ALLOWED, ALLOWED_BYTES = 0.005, 16  # difference of a document's size from what its score says
LENGTH_BYTES = 4  # counted in check for a document's length, which stands in the head
ESCAPED = 0.25  # a document of which more than this is not its tokens' is kept as it is
FREE, RATIO = 1 << 24, 64  # bytes that any frame may expand to, and further ones for each byte of it
MOST_DELIMITERS = 1 << 30  # bytes, of all delimiters of a file
HEAD = {str: "artifact tokenizer figure delimiter machine source sha256", dict: "settings versions"}
DAMAGED = "is damaged or no file of compress.py — get it again"
CUT_OFF = "no document has a finite score (a deadline cut it off, or it diverged)"
UNKNOWN = "\ud800", "\udfff"  # Python's characters for bytes that are not UTF-8 lie between these


@dataclasses.dataclass(frozen=True)
class Document:
    """`tokens` follow `lead`, None while they are not known; `number` decides its initial adapters."""

    number: int
    length: int
    tokens: np.ndarray | None = None
    lead: int = train_gpt.BOS


class OutOfStep(Exception):
    """What was read can be no symbol of the distribution at hand."""


@dataclasses.dataclass(frozen=True)
class Codec:
    """A run, opened, and the figure whose predictions are used."""

    left: common.Run
    figure: str
    model: train_gpt.GPT
    run: train_gpt.Run
    tokenizer: sentencepiece.SentencePieceProcessor
    identity: dict[str, Any]  # what must be the same where a file is expanded

    @classmethod
    def open(cls, left: common.Run, figure: str | None) -> "Codec":
        """Raises UserError for a figure that the run has not, or that no file can have."""
        figure = chosen_figure(left, figure)
        torch.set_num_threads(1)  # several may add up in several orders
        model, run = sequential.open_run(left, "cpu")
        tokenizer = sequential.open_tokenizer(left, run)
        settings = {name: value for name, value in dataclasses.asdict(run.s).items() if matters(name)}
        versions = {x.__name__: x.__version__ for x in (torch, np, sentencepiece)}
        versions["constriction"] = importlib.metadata.version("constriction")
        identity = dict(artifact=left.result["weights_sha256"], tokenizer=left.result["data"]["tokenizer"])
        identity |= dict(settings=settings, versions=versions)
        return cls(left, figure, model, run, tokenizer, identity)

    def encode(self, documents: list[Document], progress: Callable = int) -> np.ndarray:
        """uint32 words of the range coder."""
        coder = constriction.stream.queue.RangeEncoder()

        def code(distribution, symbol: int) -> int:
            coder.encode(symbol, distribution)
            return symbol

        for _ in self.through(documents, code, progress):
            pass
        return coder.get_compressed()

    def decode(self, documents: Iterable[Document], words: np.ndarray, progress=int) -> Iterator[np.ndarray]:
        """Yields the tokens of each document; UserError where this machine's numbers differ from the encoder's."""
        coder = constriction.stream.queue.RangeDecoder(words)

        def code(distribution, _: None) -> int:
            try:
                return coder.decode(distribution)
            except AssertionError as error:  # constriction's for bits that no symbol has
                raise OutOfStep from error

        return self.through(documents, code, progress)

    def through(self, documents: Iterable[Document], code: Callable, progress: Callable) -> Iterator[np.ndarray]:
        """Yields the tokens of each document, after `code(distribution, symbol)` of each: that is where encoder and
        decoder differ, and all. The check is a sum over all counts and tokens so far, and a symbol like any other."""
        size = self.run.s.ttt_chunk_size
        seen = unchecked = 0

        def differ(document: Document, position: int) -> UserError:
            where = f"found behind token {position + 1} of document {document.number}"
            what = f"this machine computes other probabilities than the one that compressed ({where})"
            return UserError(f"{what} — expand it where it was made")

        def check(bits: int, document: Document, position: int) -> None:
            expected = seen & ((1 << bits) - 1)
            if code(constriction.stream.model.Uniform(1 << bits), expected) != expected:
                raise differ(document, position)

        def choose(document: Document, position: int, nll: np.ndarray) -> int:
            nonlocal seen, unchecked
            counts = quantised(nll)
            distribution = constriction.stream.model.Categorical(counts, perfect=False, lazy=True)
            known = None if document.tokens is None else int(document.tokens[position])
            try:
                token = int(code(distribution, known))
            except OutOfStep as error:
                raise differ(document, position - 1) from error
            seen = zlib.crc32(counts.astype("<i4").tobytes() + struct.pack("<I", token), seen)
            unchecked += 1
            if (position + 1) % size == 0 and unchecked >= CHECKED_TOKENS:
                check(min(unchecked // CHECKED_TOKENS, DOCUMENT_CHECK), document, position)
                unchecked = 0
            progress()
            return token

        for document in documents:
            tokens = np.zeros(1, np.int32)
            if document.length:
                reader = self.model, self.run, document.length, functools.partial(choose, document), self.figure
                tokens = sequential.Sequential(*reader, document.lead).read(document.number)
                check(DOCUMENT_CHECK, document, document.length - 1)
            yield tokens[1:]


def matters(name: str) -> bool:
    """Whether a setting takes part in the predictions; the model's own are the artifact's."""
    return name in ("seed", "beta1", "beta2") or (
        name.startswith("ttt_") and name not in ("ttt_enabled", "ttt_batch_size")
    )


def chosen_figure(left: common.Run, figure: str | None) -> str:
    """A figure that can be a file's, by default that of the score; UserError for any other."""
    if left.score_name == "sliding":
        if figure in (None, NO_ADAPTATION):
            return NO_ADAPTATION
        raise UserError(f"{left.path} is of a sliding window — use --figure {NO_ADAPTATION}")
    if figure == LAST_EPOCH and left.figures[LAST_EPOCH]["backward_looking"]:
        figure = ADAPTED
    if figure == LAST_EPOCH:
        why = "in replay's last epoch the adapters have trained on the text that it predicts, and who expands a file"
        raise UserError(f"{why} has no text yet: no file of that size exists — use --figure {ADAPTED}")
    figure = figure or left.score_name
    if figure not in left.figures:
        raise UserError(f"{left.path} has no {figure} — use --figure {' or '.join(set(left.figures) - {LAST_EPOCH})}")
    return figure


def quantised(nll: np.ndarray) -> np.ndarray:
    """Whole float64 numbers (vocabulary,), one for each token: its count less the one that constriction adds, so that
    counts are COUNTS together and no token is impossible. UserError for what is no distribution."""
    probabilities = sequential.probabilities(nll)
    total = COUNTS - len(nll)
    counts = np.floor(probabilities * (total / probabilities.sum()))
    counts[counts.argmax()] += total - counts.sum()
    return counts


# ---- Text and tokens


def tokenize(part: bytes, tokenizer) -> tuple[list[int], list[int], bytes]:
    """Tokens of a document, and what makes its bytes of their text: patches (gap, dropped, inserted, …), each behind
    `gap` further characters, of which it drops some and inserts so many of the bytes that come third."""
    text = part.decode("utf-8", "surrogateescape")
    unknown = tokenizer.unk_id()
    foreign = {c for c in set(text) if UNKNOWN[0] <= c <= UNKNOWN[1] or unknown in tokenizer.encode(c)}
    kept = [i for i, c in enumerate(text) if c not in foreign]
    plain = "".join(text[i] for i in kept)
    tokens = tokenizer.encode(plain)
    # SentencePiece's normalisation says from where in the text each of its characters came; the decoder shows those,
    # but for a space that it puts in front itself.
    normalised, origins = tokenizer.normalize(plain, with_offsets=True)
    shown = list(normalised.replace("▁", " "))
    if len(tokenizer.decode(tokens)) == len(shown) - 1:
        shown[0] = ""
    places = [*kept, len(text)]
    borders = [0, *(places[origin] for origin in origins[1:-1]), len(text)]
    patches, inserted = differences(shown or [""], [text[i:j] for i, j in zip(borders, borders[1:], strict=False)])
    small = len(inserted) + len(patches) <= ESCAPED * len(part) or len(part) <= ALLOWED_BYTES
    if small and restored(tokens, patches, inserted, tokenizer) == part:
        return tokens, patches, inserted
    return [], [0, 0, len(part)], part


def differences(shown: list[str], text: list[str]) -> tuple[list[int], bytes]:
    """Patches, as tokenize() has them, where what is shown is not what stands in the text; neighbours are one."""
    patches, inserted = [], []
    gap, after_patch = 0, False
    for character, original in zip(shown, text, strict=True):
        if original == character:
            gap += len(character)
            after_patch = after_patch and not character
            continue
        new = original.encode("utf-8", "surrogateescape")
        if after_patch:
            patches[-2:] = patches[-2] + len(character), patches[-1] + len(new)
        else:
            patches += gap, len(character), len(new)
        inserted.append(new)
        gap, after_patch = 0, True
    return patches, b"".join(inserted)


def restored(tokens: list[int], patches: list[int], inserted: bytes, tokenizer) -> bytes:
    """The bytes of a document."""
    text = tokenizer.decode(tokens)
    parts = []
    at = taken = 0
    for gap, dropped, size in zip(patches[::3], patches[1::3], patches[2::3], strict=True):
        parts += text[at : at + gap].encode(), inserted[taken : taken + size]
        at, taken = at + gap + dropped, taken + size
    return b"".join([*parts, text[at:].encode()])


# ---- Files


def pack(head: dict[str, Any], inserted: bytes, words: np.ndarray) -> tuple[bytes, int]:
    """A file: magic, format, and what follows under a SHA-256: head and inserted bytes as zstd frames, words. Beside it
    how many of its bytes are the text's: the inserted ones' frame and the words."""
    frames = squeeze(json.dumps(head, separators=(",", ":")).encode()), squeeze(inserted)
    body = struct.pack("<II", *map(len, frames)) + b"".join(frames) + words.astype("<u4").tobytes()
    blob = MAGIC + struct.pack("<I", FORMAT) + hashlib.sha256(body).digest()[:16] + body
    return blob, len(frames[1]) + words.nbytes


def unpack(path: Path) -> tuple[dict[str, Any], bytes, np.ndarray]:
    """Head, inserted bytes and words of a file; UserError if it is anything else than compress.py wrote."""
    blob = path.read_bytes()
    begin = len(MAGIC) + 4
    body = blob[begin + 16 :]
    right = blob[: len(MAGIC)] == MAGIC and hashlib.sha256(body).digest()[:16] == blob[begin : begin + 16]
    if not right or len(body) < 8:
        raise UserError(f"{path} {DAMAGED}")
    if (found := struct.unpack("<I", blob[len(MAGIC) : begin])[0]) != FORMAT:
        raise UserError(f"{path} has format {found}, not {FORMAT} — expand it with the version that compressed it")
    try:
        return unpack_body(body)
    except (ValueError, RecursionError, zstandard.ZstdError) as error:
        raise UserError(f"{path} {DAMAGED}") from error


def squeeze(content: bytes) -> bytes:
    """A zstd frame, and zeros behind it where it would expand to more than stretch() allows."""
    return zstandard.ZstdCompressor(19).compress(content).ljust((len(content) - FREE) // RATIO + 1, b"\0")


def stretch(frame: bytes) -> bytes:
    """What a frame expands to; ValueError for more than squeeze() makes, of which no more is expanded."""
    most = FREE + RATIO * len(frame)
    content = zstandard.ZstdDecompressor().stream_reader(frame).read(most + 1)
    if len(content) > most:
        raise ValueError("a frame that expands to too much")
    return content


def unpack_body(body: bytes) -> tuple[dict[str, Any], bytes, np.ndarray]:
    """Head, inserted bytes and words; a hash that is right proves nothing about them: ValueError, RecursionError or
    ZstdError for all that pack() does not write."""
    first, second = struct.unpack("<II", body[:8])
    if len(body) < 8 + first + second:
        raise ValueError("frames longer than the file")
    head = json.loads(stretch(body[8 : 8 + first]))
    inserted = stretch(body[8 + first : 8 + first + second])
    words = np.frombuffer(body[8 + first + second :], "<u4")

    def counts(values: object) -> bool:
        return type(values) is list and all(type(value) is int and value >= 0 for value in values)

    right = type(head) is dict and all(type(head.get(x)) is kind for kind, names in HEAD.items() for x in names.split())
    right = right and head["figure"] in (NO_ADAPTATION, ADAPTED, MIXTURE)
    lengths, patches = (head.get(name) for name in ("lengths", "patches")) if right else (None, None)
    right = right and counts(lengths) and type(patches) is list and len(patches) == len(lengths) > 0
    right = right and all(counts(x) and len(x) % 3 == 0 for x in patches)
    right = right and sum(sum(x[2::3]) for x in patches) == len(inserted)
    if not right or len(head["delimiter"].encode()) * (len(lengths) - 1) > MOST_DELIMITERS:
        raise ValueError("another head than pack() is given")
    return head, inserted, words


def require_plausible(head: dict[str, Any], words: np.ndarray, codec: Codec, path: Path) -> None:
    """UserError unless the words can hold so many tokens, each of which takes some of a bit, and of that figure."""
    least = -math.log2(1 - (codec.run.s.vocab_size - 1) / COUNTS)  # bits of a token whose like all others are
    possible = sum(head["lengths"]) * least <= 32 * (len(words) + 1)
    if not possible or (head["figure"] == MIXTURE and not codec.run.s.ttt_mixture):
        raise UserError(f"{path} {DAMAGED}")


def require_same(head: dict[str, Any], codec: Codec, path: Path) -> None:
    """UserError naming the first thing that the file was compressed with and that is another here."""
    for kind in ("artifact", "tokenizer", "settings", "versions"):
        theirs, ours = head[kind], codec.identity[kind]
        if theirs == ours:
            continue
        if isinstance(theirs, dict):
            kind = next(x for x in [*theirs, *ours] if x not in theirs or x not in ours or theirs[x] != ours[x])
            theirs, ours = theirs.get(kind), ours.get(kind)
        raise UserError(f"{path} was compressed with {kind} {theirs}, here it is {ours} — expand it with the same")


def report(options: argparse.Namespace, text: str) -> None:
    """Prints what was done; on stderr where OUTPUT is a pipe or a device, which may be stdout itself."""
    print(text, file=sys.stderr if common.is_stream(options.output) else sys.stdout)


def compress(left: common.Run, options: argparse.Namespace) -> None:
    began = time.monotonic()
    data = options.input.read_bytes()
    codec = Codec.open(left, options.figure)
    delimiter = options.delimiter or ""
    try:
        parts = data.split(delimiter.encode()) if delimiter else [data]
    except UnicodeEncodeError as error:
        raise UserError(f"--delimiter {ascii(delimiter)} is not UTF-8 — choose another") from error
    if delimiter and len(parts) == 1:
        report(options, f"--delimiter {ascii(delimiter)} is not in {options.input}: it is one document")
    done = [tokenize(part, codec.tokenizer) for part in parts]
    documents = [Document(i, len(tokens), np.array(tokens)) for i, (tokens, _, _) in enumerate(done)]
    count = sum(document.length for document in documents)
    with common.progress_bar("compressing", count) as bar:
        words = codec.encode(documents, bar.update)
    inserted = b"".join(bytes_ for _, _, bytes_ in done)
    machine = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    head = codec.identity | dict(figure=codec.figure, delimiter=delimiter, machine=machine)
    head |= dict(source=train_gpt.SOURCE_SHA256[:12], sha256=hashlib.sha256(data).hexdigest()[:16])
    head |= dict(lengths=[x.length for x in documents], patches=[patches for _, patches, _ in done])
    blob, of_the_text = pack(head, inserted, words)
    common.write_atomic(options.output, blob, new=True)
    rate = count / (time.monotonic() - began)
    rates = [8 * size / max(len(data), 1) for size in (len(blob), of_the_text)]
    share = "{:.4f} bits per byte, {:.4f} without the head".format(*rates)
    sizes = f"{len(data):,} bytes, {count:,} tokens, {len(inserted):,} bytes beside them: {len(blob):,} bytes ({share})"
    report(options, f"{sizes}\n{rate:.0f} tokens/s; wrote {options.output}")


def expand(left: common.Run, options: argparse.Namespace) -> None:
    began = time.monotonic()
    head, inserted, words = unpack(options.input)
    codec = Codec.open(left, None)
    require_same(head, codec, options.input)
    require_plausible(head, words, codec, options.input)
    codec = dataclasses.replace(codec, figure=head["figure"])
    documents = (Document(i, length) for i, length in enumerate(head["lengths"]))
    parts, taken = [], 0
    with common.progress_bar("expanding", sum(head["lengths"])) as bar:
        try:
            for tokens, patches in zip(codec.decode(documents, words, bar.update), head["patches"], strict=True):
                size = sum(patches[2::3])
                parts.append(restored(tokens.tolist(), patches, inserted[taken : taken + size], codec.tokenizer))
                taken += size
        except UserError as error:
            there = f"{head['machine']}, train_gpt.py {head['source']}"
            raise UserError(f"{options.input}: {error}: {there}") from error
    data = head["delimiter"].encode().join(parts)
    if hashlib.sha256(data).hexdigest()[:16] != head["sha256"]:
        raise UserError(f"{options.input}: what came out is not what went in — expand it where it was made")
    common.write_atomic(options.output, data, new=True)
    rate = sum(head["lengths"]) / (time.monotonic() - began)
    report(options, f"{len(data):,} bytes, {rate:.0f} tokens/s; wrote {options.output}")


# ---- The score's documents


def check_documents(left: common.Run, figure: str | None, count: int) -> list[dict[str, Any]]:
    """Compresses and expands documents that the run scored, drawn by its seed. A row each: its number, targets and
    bytes of text, `score` and `size` in bytes, whether the size is as the score says, and the text what it was. No row
    where no document has a finite score."""
    codec = Codec.open(left, figure)
    stream = sequential.open_stream(left, codec.run)
    nll = common.read_scores(left)[codec.figure]
    rng = np.random.default_rng([codec.run.s.seed, 0xC0DE])
    drawn = rng.permutation(np.flatnonzero(np.isfinite(nll)))[:count]
    text = stream.tokens.numpy()
    rows = []
    with common.progress_bar("checking", 2 * int(stream.lengths[drawn].sum())) as bar:
        for number in drawn.tolist():
            start, length = int(stream.starts[number]), int(stream.lengths[number])
            document = Document(number, length, text[start + 1 : start + length + 1], int(text[start]))
            words = codec.encode([document], bar.update)
            (tokens,) = codec.decode([dataclasses.replace(document, tokens=None)], words, bar.update)
            before, after = (codec.tokenizer.decode(x.tolist()).encode() for x in (document.tokens, tokens))
            same = before == after and bool((tokens == document.tokens).all())
            score, size = float(nll[number]) / math.log(2) / 8, words.nbytes + LENGTH_BYTES
            near = abs(size - score) <= ALLOWED * score + ALLOWED_BYTES
            row = dict(document=number, targets=length, bytes=int(stream.document_bytes[number]))
            rows.append(row | dict(score=score, size=size, as_scored=near, same=same))
    return rows


def check(left: common.Run, options: argparse.Namespace) -> None:
    began = time.monotonic()
    rows = check_documents(left, options.figure, options.documents)
    if not rows:
        raise UserError(f"{left.path}: {CUT_OFF} — score again with more EVAL_MAX_SECONDS, or other weights")
    lines = []
    for row in rows:
        outcome = "pass" if row["as_scored"] and row["same"] else "fail"
        values = (f"{name}:{value:.1f}" if name == "score" else f"{name}:{value}" for name, value in row.items())
        lines.append(f"check {' '.join(values)} {outcome}")
    score, size, targets = (sum(row[name] for row in rows) for name in ("score", "size", "targets"))
    share = f"{size / score - 1:+.3%}"
    lines.append(f"{len(rows)} documents: the score says {score:.1f} bytes, their files have {size} ({share})")
    lines.append(f"{2 * targets / (time.monotonic() - began):.0f} tokens/s, compressed and expanded")
    common.deliver("\n".join(lines))
    if not all(row["as_scored"] and row["same"] for row in rows):
        sys.exit(1)


def require_new(output: Path) -> None:
    """UserError or OSError unless a new file can be made there, or something open takes what is written."""
    if not output.parent.is_dir():
        raise UserError(f"{output}: there is no folder {output.parent} — make it, or choose another")
    if output.is_dir():
        raise UserError(f"{output} is a folder — give the name of a new file")
    if output.is_file() and not common.is_stream(output):
        raise UserError(f"{output} is there already — delete it, or choose another name")
    common.require_writable(output)


def main(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, metavar="compress | expand | check")
    for command, what in ((compress, "a file smaller"), (expand, "it again"), (check, "the score's documents")):
        sub = commands.add_parser(command.__name__, help=what, description=what)
        sub.set_defaults(command=command)
        sub.add_argument("run", type=place, metavar="RUN", help="a run's folder: its artifact, settings and tokenizer")
        if command is check:
            sub.add_argument("--documents", type=common.number(int, 1), default=2, metavar="K", help="default: 2")
        else:
            sub.add_argument("input", type=place, metavar="INPUT")
            sub.add_argument("output", type=place, metavar="OUTPUT", help="a new file")
        if command is compress:
            understood = "\\n, \\r, \\t understood (default: none)"
            separates = f"separates documents; {understood}"
            sub.add_argument("--delimiter", type=common.delimiter, help=separates)
        if command is not expand:
            figures = NO_ADAPTATION, ADAPTED, MIXTURE, LAST_EPOCH
            sub.add_argument("--figure", choices=figures, help="whose predictions are used (default: the score's)")
    options = parser.parse_args()
    if getattr(options, "output", None):
        require_new(options.output)
    options.command(common.read_run(options.run), options)


if __name__ == "__main__":
    common.run_tool(main)
