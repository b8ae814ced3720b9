"""Builds the sample dataset from the English documentation inside this Python: no network, a few seconds.

    python data/sample.py

One topic of `help()` or the docstrings of one standard library module make one document. The same Python gives the
same bytes.
"""

from __future__ import annotations

import ast
import inspect
import random
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import text
from common import Parser, UserError, new_directory, run

OUT = Path(__file__).resolve().parent / "sample"
FILES = "fineweb_train_000000.bin", "fineweb_val_000000.bin", "sample_1024_bpe.model"
VOCAB_SIZE = 1024
SEED = 1337
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "pydoc_data", "site-packages", "dist-packages", "turtledemo"}
MIN_CHARS = 300

HELD_BACK = 0.3  # the share of documents that the tokenizer does not see; validation is chosen among them

# Every validation document is evaluated many times on a CPU, so there are few of them, of very different lengths:
# (shortest, longest, how many) in tokens, then as many of MIDDLE as it takes to reach the total.
VALIDATION_LENGTHS = ((1, 300, 4), (300, 1000, 3), (2500, 4000, 1))
MIDDLE = range(1000, 2500)
VALIDATION_TOKENS = 11_000


def documents() -> list[str]:
    """Returns the documents in a fixed random order; no paragraph stands in two of them.

    Topics contain one another, and modules repeat docstrings: without that rule validation text would be trained on.
    """
    seen: set[str] = set()
    kept = []
    for document in [*topics(), *modules()]:
        paragraphs = [paragraph for paragraph in document.split("\n\n") if paragraph.strip() not in seen]
        seen.update(paragraph.strip() for paragraph in paragraphs)
        kept.append("\n\n".join(paragraphs).strip())
    kept = [document for document in kept if len(document) >= MIN_CHARS]
    random.Random(SEED).shuffle(kept)
    return kept


def topics() -> list[str]:
    """Returns the topics of `help()`, the longest first: a topic that contains others keeps its paragraphs."""
    from pydoc_data.topics import topics as found

    return sorted(found.values(), key=lambda topic: (-len(topic), topic))


def modules() -> Iterator[str]:
    """Yields, for each standard library module in sorted order, its docstrings one after the other."""
    root = Path(sysconfig.get_path("stdlib"))
    for entry in sorted(root.iterdir()):
        paths = sorted(entry.rglob("*.py")) if entry.is_dir() and entry.name not in SKIPPED else [entry]
        for path in paths:
            if path.suffix == ".py" and SKIPPED.isdisjoint(path.relative_to(root).parts):
                yield "\n\n".join(docstrings(path))


def docstrings(path: Path) -> Iterator[str]:
    """Yields the docstrings of a module, its classes and functions, from its source: nothing is imported."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, documented) and (docstring := ast.get_docstring(node)):
            yield inspect.cleandoc(docstring)


def choose_validation(candidates: list[np.ndarray]) -> set[int]:
    """Returns the indices of the validation documents among encoded candidates; UserError if they do not suffice."""
    chosen = [
        index
        for shortest, longest, count in VALIDATION_LENGTHS
        for index in [i for i, tokens in enumerate(candidates) if shortest <= len(tokens) < longest][:count]
    ]
    total = sum(len(candidates[i]) for i in chosen)
    for index, tokens in enumerate(candidates):
        if total < VALIDATION_TOKENS and len(tokens) in MIDDLE:
            chosen.append(index)
            total += len(tokens)
    if total < VALIDATION_TOKENS:
        raise UserError("this Python ships too little documentation for the sample — use one with its standard library")
    return set(chosen)


def is_complete(out: Path) -> bool:
    """Whether `out` holds a finished sample: it has its name only when everything is in it."""
    return all((out / name).is_file() for name in FILES)


def build(out: Path, replace: bool = False) -> None:
    """Builds the sample dataset in the folder `out` and prints a summary; see common.new_directory for `replace`."""
    began = time.monotonic()
    texts = documents()
    held_back = round(HELD_BACK * len(texts))
    starts = (
        (document, start) for document in texts[held_back:] for start in range(0, len(document), text.PIECE_CHARS)
    )
    model = text.train_tokenizer([document[i : i + text.PIECE_CHARS] for document, i in starts], VOCAB_SIZE)
    tokenizer = text.load_tokenizer(model, "the sample's tokenizer")
    encoded = text.encode(tokenizer, texts)
    validation = choose_validation(encoded[:held_back])

    with new_directory(out, replace) as directory:
        (directory / FILES[2]).write_bytes(model)
        writers = train, val = text.ShardWriter(directory, "train"), text.ShardWriter(directory, "val")
        for index, tokens in enumerate(encoded):
            (val if index in validation else train).write(tokens)
        for writer in writers:
            writer.close()
    size = sum(len(document.encode()) for document in texts)
    for writer in writers:
        print(f"{writer.split:>5}: {writer.documents:,} documents, {writer.tokens:,} tokens")
    print(f"{size:,} bytes of documentation, {VOCAB_SIZE:,} pieces, {time.monotonic() - began:.1f} s")


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=OUT, help="the dataset's folder (default: sample beside this file)")
    parser.add_argument("--force", action="store_true", help="build it even if it is there")
    options = parser.parse_args()
    if is_complete(options.out) and not options.force:
        print(f"{options.out} is complete already (--force builds it again)")
        return
    try:
        build(options.out, options.force)
    except (UserError, OSError):
        if options.force or not is_complete(options.out):  # else another run has just finished the same sample
            raise
    print(f"wrote {options.out}")


if __name__ == "__main__":
    run(main)
