"""Builds the sample dataset from the English documentation inside this Python: no network, a few seconds.

python data/sample.py
"""

from common import UserError, check_shard, dataset_place, new_directory, run_tool, walk, write_atomic

# isort: split
import argparse
import ast
import inspect
import random
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import text

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
    """Returns the documents in a fixed random order. No paragraph is in two: none is both trained on and scored."""
    from pydoc_data.topics import topics

    longest_first = sorted(topics.values(), key=lambda topic: (-len(topic), topic))  # keeps the paragraphs of its parts
    seen: set[str] = set()
    kept = []
    for document in [*longest_first, *modules()]:
        paragraphs = [paragraph for paragraph in document.split("\n\n") if paragraph.strip() not in seen]
        seen.update(paragraph.strip() for paragraph in paragraphs)
        kept.append("\n\n".join(paragraphs).strip())
    kept = [document for document in kept if len(document) >= MIN_CHARS]
    random.Random(SEED).shuffle(kept)
    return kept


def modules() -> Iterator[str]:
    """Yields, for each standard library module in sorted order, the docstrings in its source: nothing is imported."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    root = Path(sysconfig.get_path("stdlib"))
    for entry in sorted(root.iterdir()):
        paths = walk(entry) if entry.is_dir() and entry.name not in SKIPPED else [entry]
        for path in paths:
            if path.suffix == ".py" and SKIPPED.isdisjoint(path.relative_to(root).parts):
                nodes = (node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, documented))
                found = filter(None, map(ast.get_docstring, nodes))
                yield "\n\n".join(map(inspect.cleandoc, found))  # a second time: the sample keeps its bytes


def choose_validation(candidates: list[np.ndarray]) -> set[int]:
    """Returns the indices of the validation documents among encoded candidates; UserError if they do not suffice."""
    lengths = [len(tokens) for tokens in candidates]
    chosen = []
    for shortest, longest, count in VALIDATION_LENGTHS:
        chosen += [i for i, length in enumerate(lengths) if shortest <= length < longest][:count]
    for index, length in enumerate(lengths):
        if length in MIDDLE and sum(lengths[i] for i in chosen) < VALIDATION_TOKENS:
            chosen.append(index)
    if sum(lengths[i] for i in chosen) < VALIDATION_TOKENS:
        raise UserError("this Python ships too little documentation for the sample — use one with its standard library")
    return set(chosen)


def build(out: Path) -> None:
    """Builds the sample dataset in the folder `out` and prints a summary."""
    began = time.monotonic()
    with new_directory(out) as directory:
        texts = documents()
        held_back = round(HELD_BACK * len(texts))
        model = text.train_tokenizer(texts[held_back:], VOCAB_SIZE)
        encoded = text.load_tokenizer(model, "the sample's tokenizer").encode(texts, return_type="numpy")
        validation = choose_validation(encoded[:held_back])
        write_atomic(directory / FILES[2], model)
        lines = text.write_splits(directory, ((i in validation, tokens) for i, tokens in enumerate(encoded)))
    size = sum(len(document.encode()) for document in texts)
    print(*lines, f"{size:,} bytes of documentation, {VOCAB_SIZE:,} pieces, {time.monotonic() - began:.1f} s", sep="\n")


def is_whole(out: Path) -> bool:
    """Whether `out` is the sample. UserError if it is something else, or only a part of it."""
    if not out.is_dir() or not any(out.iterdir()):
        return False
    if not any((out / name).exists() for name in FILES):
        left = all(path.name.startswith((".partial-", "lost+found")) for path in out.iterdir())
        cure = "delete it, if no other process builds it, then run it again" if left else "choose another --out"
        raise UserError(f"{out} is not empty, and has no file of the sample — {cure}")
    for name in FILES:
        try:
            content = (out / name).read_bytes() if name == FILES[2] else check_shard(out / name)
            if name == FILES[2]:
                text.load_tokenizer(content, name)
        except (FileNotFoundError, UserError) as error:
            found = "lacks" if isinstance(error, FileNotFoundError) else "has a damaged"
            raise UserError(
                f"{out} {found} {name}: it is not the whole sample — delete it, then run it again"
            ) from error
    return True


def main(parser: argparse.ArgumentParser) -> None:
    here = Path(__file__).resolve().parent
    parser.add_argument("--out", type=dataset_place, default=here / "sample", help="default: %(default)s")
    out = parser.parse_args().out
    if is_whole(out):
        print(f"{out} is complete already (delete it to build it again)")
        return
    try:
        build(out)
    except (UserError, OSError):
        if not is_whole(out):  # else another run has just finished the same sample
            raise
    print(f"wrote {out}")


if __name__ == "__main__":
    run_tool(main)
