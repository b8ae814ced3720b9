"""Downloads the challenge's token shards and tokenizer from Hugging Face.

    python data/fineweb.py --variant sp1024 --train-shards 80

The environment variables of huggingface_hub apply, among them HF_ENDPOINT (a mirror) and HF_TOKEN. A file takes its
place only when it is whole and its header is right; run the command again to go on after an interruption.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from common import Parser, UserError, check_shard, number, run
from text import load_tokenizer

REPO = "willdepueoai/parameter-golf"
REMOTE = "datasets"  # the folder of the repository that holds the manifest and all it names
OUT = Path(__file__).resolve().parent
STAGING = "fineweb.partial"
AGAIN = "run it again; if it stays so, HF_ENDPOINT serves something else"


class Variant(NamedTuple):
    """What the manifest says of one tokenization: its folder's name, numbers of shards, and its tokenizer's path."""

    name: str
    train_shards: int
    val_shards: int
    tokenizer: str


def find_variant(manifest: dict, variant: str) -> Variant:
    """Looks a variant such as "sp1024" up in the manifest; UserError naming the variants there are."""
    try:
        datasets = {entry["name"].removeprefix("fineweb10B_"): entry for entry in manifest["datasets"]}
        tokenizers = {entry["name"]: entry.get("model_path") for entry in manifest["tokenizers"]}
        if variant not in datasets:
            raise UserError(f"there is no variant {variant} — choose from {', '.join(sorted(datasets))}")
        entry = datasets[variant]
        stats = entry["stats"]
        tokenizer = tokenizers[entry["tokenizer_name"]]
        found = Variant(entry["name"], int(stats["files_train"]), int(stats["files_val"]), tokenizer)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"the manifest of {REPO} has another form than expected ({error!r}) — {AGAIN}") from error
    if not tokenizer:
        raise UserError(f"variant {variant} has no SentencePiece model — choose an sp variant")
    return found


class Hub:
    """The dataset repository as it stands at one commit. Files come to `staging`, under their paths in it."""

    def __init__(self, staging: Path) -> None:
        """Asks for the newest commit, so that every file comes from the same one; UserError if it cannot be had."""
        import huggingface_hub
        from huggingface_hub.utils import disable_progress_bars, logging

        logging.set_verbosity_error()
        if not sys.stderr.isatty():
            disable_progress_bars()
        self.staging = staging
        try:
            self.commit = huggingface_hub.HfApi().dataset_info(REPO).sha
        except Exception as error:
            raise explain(error) from error

    def get(self, paths: Sequence[str]) -> None:
        """Downloads the files at `paths` below REMOTE; UserError if one does not arrive."""
        from huggingface_hub import snapshot_download

        wanted = [f"{REMOTE}/{path}" for path in paths]
        try:
            snapshot_download(
                REPO, repo_type="dataset", revision=self.commit, local_dir=self.staging, allow_patterns=wanted
            )
        except Exception as error:  # the hub's, its HTTP library's (not the same in every release) or the system's
            raise explain(error) from error
        if absent := [path for path in paths if not self.staged(path).is_file()]:
            raise UserError(f"{absent[0]} is not in {REPO} — {AGAIN}")

    def staged(self, path: str) -> Path:
        """Where a downloaded file lies."""
        return self.staging / REMOTE / path


def explain(error: Exception) -> Exception:
    """Puts in one line what huggingface_hub raised; an error of this system is returned as it is."""
    from huggingface_hub import constants, errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if getattr(error, "errno", None):
        return error
    if isinstance(error, errors.OfflineModeIsEnabled):
        return UserError("HF_HUB_OFFLINE forbids to download — unset HF_HUB_OFFLINE")
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):
        return UserError(f"no access to {REPO} — set HF_TOKEN to a token that may read it")
    found = f"cannot download from {constants.ENDPOINT} ({type(error).__name__}: {str(error)[:300]})"
    return UserError(f"{found} — check the connection and run it again; finished files are kept")


def fetch_shards(hub: Hub, paths: Sequence[str], out: Path) -> None:
    """Brings the shards that are not there; UserError if one does not arrive, or if its header is wrong.

    A shard that arrived takes its place even if another one did not.
    """
    missing = [path for path in paths if not (out / path).exists()]
    try:
        if missing:
            hub.get(missing)
    finally:
        for path in missing:
            staged = hub.staged(path)
            if not staged.is_file():
                continue
            try:
                check_shard(staged, AGAIN)
            except UserError:
                staged.unlink()
                raise
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            staged.replace(out / path)


def download(variant_name: str, train_shards: int, out: Path) -> None:
    """Brings a variant's tokenizer, validation shards and first training shards to out/tokenizers and out/datasets."""
    hub = Hub(out / STAGING)
    hub.get(["manifest.json"])
    try:
        manifest = json.loads(hub.staged("manifest.json").read_bytes())
    except ValueError as error:
        raise UserError(f"the manifest of {REPO} is not JSON — {AGAIN}") from error
    variant = find_variant(manifest, variant_name)
    if train_shards > variant.train_shards:
        raise UserError(f"{variant_name} has {variant.train_shards} training shards — lower --train-shards to that")
    hub.get([variant.tokenizer])
    staged = hub.staged(variant.tokenizer)
    load_tokenizer(staged.read_bytes(), variant.tokenizer)
    tokenizer = out / "tokenizers" / staged.name
    tokenizer.parent.mkdir(parents=True, exist_ok=True)
    staged.replace(tokenizer)

    folder = f"datasets/{variant.name}"
    paths = [f"{folder}/fineweb_val_{i:06d}.bin" for i in range(variant.val_shards)]
    paths += [f"{folder}/fineweb_train_{i:06d}.bin" for i in range(train_shards)]
    fetch_shards(hub, paths, out)
    counts = [check_shard(out / path) for path in paths]
    for path, count in zip(paths, counts, strict=True):
        print(f"{Path(path).name}: {count:,} tokens")
    shutil.rmtree(hub.staging)
    print(f"{out / folder}: {sum(counts):,} tokens in {len(paths)} shards; tokenizer {tokenizer}")


def main() -> None:
    parser = Parser(description="Downloads the challenge's FineWeb shards and their tokenizer.")
    parser.add_argument("--variant", default="sp1024", help="the tokenization (default sp1024)")
    parser.add_argument(
        "--train-shards", type=number(int, 1), default=80, help="of 100 million tokens each (default 80)"
    )
    parser.add_argument("--out", type=Path, default=OUT, help="gets datasets/ and tokenizers/ (default: this folder)")
    options = parser.parse_args()
    download(options.variant, options.train_shards, options.out)


if __name__ == "__main__":
    run(main)
