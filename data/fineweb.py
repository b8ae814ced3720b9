"""Downloads the challenge's token shards and tokenizer from Hugging Face.

    python data/fineweb.py --variant sp1024 --train-shards 80

Run it again to go on after an interruption. The environment variables of huggingface_hub apply.
"""

from common import UserError, check_shard, dataset_place, naming, number, require_file, run_tool, write_atomic

# isort: split
import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

try:
    import fcntl
except ImportError:  # Windows: there nothing keeps two downloads into one folder apart
    fcntl = None

from text import load_tokenizer

REPO = "willdepueoai/parameter-golf"
REMOTE = "datasets"  # the folder of the repository that holds the manifest and all it names
MOST_SHARDS = 1_000_000  # of a split: six digits number them
KEPT = ".fineweb_commit"  # the name of a file beside the shards that says what they are of
AGAIN = "run it again; if it stays so, look at what HF_ENDPOINT serves"


def find_variant(content: bytes, variant: str, train_shards: int = 1) -> list[str]:
    """Returns the paths of a variant's tokenizer, validation shards and first training shards; UserError without."""
    try:
        manifest = json.loads(content)
        models = {entry["name"]: entry.get("model_path") for entry in manifest["tokenizers"]}
        datasets = {entry["name"].removeprefix("fineweb10B_"): entry for entry in manifest["datasets"]}
        if variant not in datasets:
            raise UserError(f"there is no variant {variant} — choose from {', '.join(sorted(datasets))}")
        dataset = datasets[variant]
        model = models[dataset["tokenizer_name"]]
        most = {split: dataset["stats"][f"files_{split}"] for split in ("val", "train")}
        if not model:
            raise UserError(f"variant {variant} has no SentencePiece model — choose an sp variant")
        for split, count in most.items():
            if type(count) is not int or not 1 <= count <= MOST_SHARDS:
                raise ValueError(f"files_{split} {count!r}")
        for path in model, f"datasets/{dataset['name']}":
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", path) or {".", ".."} & set(path.split("/")):
                raise ValueError(f"path {path!r}")
        if train_shards > most["train"]:
            raise UserError(f"{variant} has {most['train']} training shards — lower --train-shards to that")
        shards = [f"{split}_{i:06d}" for split, count in (most | {"train": train_shards}).items() for i in range(count)]
        return [model, *(f"datasets/{dataset['name']}/fineweb_{shard}.bin" for shard in shards)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"the manifest of {REPO} has another form than expected ({error!r}) — {AGAIN}") from error


def take(partial: Path) -> TextIO | None:
    """Returns the lock of a folder for partial files, made if need be, once this process has it; None if whoever had it
    has removed the folder."""
    partial.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError), naming(partial / "lock"):
        lock = (partial / "lock").open("w")
        if fcntl is None:
            return lock
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another download into {partial.parent}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.samestat(os.fstat(lock.fileno()), (partial / "lock").stat()):
            return lock
    return None


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """Yields a folder inside `folder`, so that files can be renamed into it, to one process at a time. It is removed if
    the block ends well; what another leaves there, the next goes on with."""
    while not (lock := take(folder / "fineweb.partial")):
        pass
    with lock:
        yield folder / "fineweb.partial"
        # Where the open lock cannot go yet, as on NFS, an empty folder stays, which the next run takes.
        shutil.rmtree(folder / "fineweb.partial", ignore_errors=True)


def fetch(paths: list[str], staging: Path, commit: str | None = None) -> str:
    """Downloads files below REMOTE to `staging`, under their paths, all of one commit: the newest, which it returns."""
    import huggingface_hub
    from huggingface_hub import constants, errors, utils

    utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        utils.disable_progress_bars()
    wanted = [f"{REMOTE}/{path}" for path in paths]
    try:
        commit = commit or huggingface_hub.HfApi().dataset_info(REPO).sha
        options = dict(repo_type="dataset", revision=commit, local_dir=staging, allow_patterns=wanted)
        with naming(staging):
            huggingface_hub.snapshot_download(REPO, **options)
    except Exception as error:  # the hub's, its HTTP library's (not the same in every release) or the system's
        if getattr(error, "errno", None) or isinstance(error, MemoryError):
            raise
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):
            raise UserError(f"the hub does not show {REPO} — set HF_TOKEN to a token that may read it") from error
        found = f"cannot download from {constants.ENDPOINT} ({type(error).__name__}: {str(error)[:300]})"
        raise UserError(f"{found} — check the connection and HF_HUB_OFFLINE, run it again; it goes on") from error
    for name in wanted:
        if not (staging / name).is_file():
            raise UserError(f"{name} did not come from {REPO} — {AGAIN}")
    return commit


def check(path: Path, name: str) -> None:
    """UserError unless a file is a whole shard, or a tokenizer that suits the shards."""
    check_shard(path) if path.suffix == ".bin" else load_tokenizer(require_file(path).read_bytes(), name)


def check_there(paths: list[str], out: Path) -> None:
    """UserError for one of some files that is below `out`, and damaged."""
    for path in map(out.joinpath, paths):
        if path.exists():
            try:
                check(path, str(path))
            except UserError as error:
                raise UserError(f"{str(error).partition(' — ')[0]} — delete it, then run this again") from error


def kept_commit(variant: str, out: Path) -> str | None:
    """The commit that a variant's shards below `out` are of, None if there are none; UserError if that is damaged."""
    path = out / "datasets" / f"fineweb10B_{variant}" / KEPT
    if not path.exists():
        return None
    commit = require_file(path).read_text(errors="replace").strip()
    if not re.fullmatch("[0-9a-f]{40}", commit):
        raise UserError(f"{path} holds no commit — delete it, then run this again")
    print(f"commit {commit[:12]} of {REPO}, as the shards that are there (delete {path} for the newest)")
    return commit


def bring(paths: list[str], out: Path, commit: str) -> None:
    """Downloads those of some files of one folder that are not below `out` yet; each takes its place when found whole.
    They come to a folder beside their places: `out` may be on another file system, and smaller."""
    with staging((out / paths[0]).parent) as partial:
        missing = [path for path in paths if not (out / path).exists()]
        if missing:
            fetch(missing, partial, commit)
        for path in missing:
            staged = partial / REMOTE / path
            try:
                check(staged, path)
            except UserError as error:
                staged.unlink()
                what = str(error).partition(" — ")[0].replace(str(staged), path)
                raise UserError(f"{what}, as it came from {REPO} — {AGAIN}") from error
            staged.replace(out / path)


def main(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--variant", default="sp1024", help="the tokenization (default sp1024)")
    add("--train-shards", type=number(int, 1), default=80, help="of 100 million tokens each (default 80)")
    add(
        "--out",
        type=dataset_place,
        default=Path(__file__).parent,
        help="gets datasets/, tokenizers/ (default: this folder)",
    )
    options = parser.parse_args()
    out = options.out
    kept = kept_commit(options.variant, out)
    with staging(out) as partial:
        commit = fetch(["manifest.json"], partial, kept)
        manifest = (partial / REMOTE / "manifest.json").read_bytes()
    paths = find_variant(manifest, options.variant, options.train_shards)
    check_there(paths, out)
    folder = (out / paths[1]).parent
    if not kept and not any((out / path).exists() for path in paths[1:]):  # else nobody knows what they are of
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / KEPT, f"{commit}\n".encode())
    for some in paths[:1], paths[1:]:  # the tokenizer, the shards
        if not all((out / path).exists() for path in some):
            bring(some, out, commit)
    counts = [check_shard(out / path) for path in paths[1:]]
    print(f"{folder}: {sum(counts):,} tokens in {len(counts)} shards; tokenizer {out / paths[0]}")


if __name__ == "__main__":
    run_tool(main)
