"""Downloads the challenge's token shards and tokenizer from Hugging Face.

    python data/fineweb.py --variant sp1024 --train-shards 80

The environment variables of huggingface_hub apply, among them HF_ENDPOINT (a mirror) and HF_TOKEN. A file takes its
place only when it is whole and its header is right; run the command again to go on after an interruption.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from text import DISK_FULL, Parser, UserError, check_shard, load_tokenizer, positive, run

try:
    from huggingface_hub import HfApi, constants, errors, hf_hub_download
    from huggingface_hub.utils import disable_progress_bars, logging
except ImportError:
    HfApi = None

REPO = "willdepueoai/parameter-golf"
REMOTE = "datasets"  # the folder of the repository that holds the manifest and all it names
OUT = Path(__file__).resolve().parent
STAGING = "fineweb.partial"
AGAIN = "run it again; if it stays so, HF_ENDPOINT serves something else"


@dataclass
class Variant:
    """What the manifest says of one tokenization: its folder's name, numbers of shards, and its tokenizer's path."""

    name: str
    train_shards: int
    val_shards: int
    tokenizer: str

    def shards(self, train_shards: int) -> list[str]:
        """Returns the paths, below REMOTE, of the validation shards and the first `train_shards` training shards."""
        val = [f"datasets/{self.name}/fineweb_val_{i:06d}.bin" for i in range(self.val_shards)]
        return val + [f"datasets/{self.name}/fineweb_train_{i:06d}.bin" for i in range(train_shards)]


def find_variant(manifest: dict, variant: str) -> Variant:
    """Looks a variant such as "sp1024" up in the manifest; UserError naming the variants there are."""
    prefix = "fineweb10B_"
    try:
        datasets = {entry["name"].removeprefix(prefix): entry for entry in manifest["datasets"]}
        tokenizers = {entry["name"]: entry.get("model_path") for entry in manifest["tokenizers"]}
        if variant not in datasets:
            raise UserError(f"there is no variant {variant} — choose from {', '.join(sorted(datasets))}")
        entry = datasets[variant]
        stats, tokenizer = entry["stats"], tokenizers[entry["tokenizer_name"]]
        found = Variant(entry["name"], int(stats["files_train"]), int(stats["files_val"]), tokenizer)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"the manifest of {REPO} has another form than expected ({error!r}) — {AGAIN}") from error
    if not tokenizer:
        raise UserError(f"variant {variant} has no SentencePiece model — choose an sp variant")
    return found


class Hub:
    """The dataset repository as it stands at one commit."""

    def __init__(self, staging: Path) -> None:
        """Asks for the newest commit, so that every file comes from the same one; UserError if it cannot be had."""
        if HfApi is None:
            raise UserError("downloading needs huggingface_hub — pip install huggingface_hub")
        logging.set_verbosity_error()
        if not sys.stderr.isatty():
            disable_progress_bars()
        self.staging = staging
        try:
            self.commit = HfApi().dataset_info(REPO).sha
        except Exception as error:
            raise explain(error, REPO) from error

    def get(self, path: str) -> Path:
        """Downloads the file `path` below REMOTE and returns where it lies in the staging folder."""
        try:
            name = f"{REMOTE}/{path}"
            staged = hf_hub_download(REPO, name, repo_type="dataset", revision=self.commit, local_dir=self.staging)
        except Exception as error:  # the hub's, its HTTP library's (not the same in every release) or the system's
            if getattr(error, "filename", None):
                raise
            raise explain(error, path) from error
        return Path(staged)


def explain(error: Exception, what: str) -> UserError:
    """Puts what huggingface_hub raised in one line."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if getattr(error, "errno", None) in DISK_FULL:
        return UserError(f"the disk is full, {what} does not fit — free some space and run it again")
    if isinstance(error, errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return UserError(f"{what} is not here and HF_HUB_OFFLINE forbids to get it — unset HF_HUB_OFFLINE")
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):
        return UserError(f"no access to {what} of {REPO} — set HF_TOKEN to a token that may read it")
    if status == 404:
        return UserError(f"{what} is not in {REPO} at {constants.ENDPOINT} — {AGAIN}")
    detail = f"{type(error).__name__}: {error}"[:200]
    return UserError(
        f"cannot get {what} from {constants.ENDPOINT} ({detail}) — check the connection and run it again;"
        " finished files are kept"
    )


def fetch(source: Hub, path: str, destination: Path) -> int:
    """Brings one shard unless it is there, and returns its number of tokens; UserError if its header is wrong."""
    if destination.exists():
        return check_shard(destination)
    staged = source.get(path)
    try:
        count = check_shard(staged, AGAIN)
    except UserError:
        staged.unlink()
        raise
    destination.parent.mkdir(parents=True, exist_ok=True)
    staged.replace(destination)
    return count


def fetch_tokenizer(source: Hub, path: str, destination: Path) -> None:
    """Brings the tokenizer; UserError if it is no SentencePiece model that suits the shards."""
    staged = source.get(path)
    load_tokenizer(staged.read_bytes(), path)
    destination.parent.mkdir(parents=True, exist_ok=True)
    staged.replace(destination)


def download(variant_name: str, train_shards: int, out: Path) -> None:
    """Brings a variant's tokenizer, validation shards and first training shards to out/tokenizers and out/datasets."""
    source = Hub(out / STAGING)
    try:
        manifest = json.loads(source.get("manifest.json").read_bytes())
    except ValueError as error:
        raise UserError(f"the manifest of {REPO} is not JSON — {AGAIN}") from error
    variant = find_variant(manifest, variant_name)
    if train_shards > variant.train_shards:
        raise UserError(f"{variant_name} has {variant.train_shards} training shards — lower --train-shards to that")
    tokenizer = out / "tokenizers" / Path(variant.tokenizer).name
    fetch_tokenizer(source, variant.tokenizer, tokenizer)
    paths, total = variant.shards(train_shards), 0
    for number, path in enumerate(paths, start=1):
        count = fetch(source, path, out / path)
        total += count
        print(f"{number}/{len(paths)} {Path(path).name}: {count:,} tokens", flush=True)
    shutil.rmtree(source.staging)
    print(f"{out / 'datasets' / variant.name}: {total:,} tokens in {len(paths)} shards; tokenizer {tokenizer}")


def main() -> None:
    parser = Parser(description="Downloads the challenge's FineWeb shards and their tokenizer.")
    parser.add_argument("--variant", default="sp1024", help="the tokenization (default sp1024)")
    parser.add_argument("--train-shards", type=positive, default=80, help="of 100 million tokens each (default 80)")
    parser.add_argument("--out", type=Path, default=OUT, help="gets datasets/ and tokenizers/ (default: this folder)")
    options: argparse.Namespace = parser.parse_args()
    download(options.variant, options.train_shards, options.out)


if __name__ == "__main__":
    run(main)
