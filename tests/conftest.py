"""Shared by all tests in this process: small settings, a run, random models and token streams.

The golden and FineWeb cases need the folder with golden/, fineweb/ and corpus/; GOLF_SHARED names it, and they are
skipped without it."""

import gc
import math
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt
from runs import MICRO

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # As a shell starts what it puts in the background. What tests start would inherit it, and ignore theirs.
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # the small models below gain nothing from more

SMALL = {name.lower(): value for name, value in MICRO.items()} | dict(  # every branch of the model matters
    num_layers=2, model_dim=32, num_heads=4, num_kv_heads=2, mlp_mult=3, bigram_vocab_size=61, bigram_dim=16,
    train_batch_tokens=64, iterations=20_000, warmdown_iters=3_500, eval_stride=8, eval_batch_seqs=5, val_batch_size=96,
    ttt_chunk_size=16, ttt_n_epochs=2, ttt_lora_rank=4, ttt_batch_size=0, eval_max_seconds=0, calibration_tokens=96,
    output_dir=os.devnull,
)  # fmt: skip


def small(**changes) -> train_gpt.Settings:
    """Settings of a model of some 30 thousand weights, as the environment would give them; whatever writes a file
    without a folder of its own fails."""
    values = SMALL | changes
    return train_gpt.Settings.from_env(
        {name.upper(): str(int(v) if isinstance(v, bool) else v) for name, v in values.items()}
    )


def run_of(run: train_gpt.Run, s: train_gpt.Settings, folder: Path | None = None) -> train_gpt.Run:
    """A copy of the run with these settings, silent, that knows of no session."""
    other = run.using(**asdict(s))
    other.folder = folder or run.folder
    other.sessions = []
    return other


def random_model(
    s: train_gpt.Settings, seed: int = 0, dtype: torch.dtype = torch.float32, attention: str = "flash"
) -> train_gpt.GPT:
    """A frozen model in which every parameter matters: at its initial values many branches are silent."""
    model, g = train_gpt.GPT(s, dtype, attention), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            if name.endswith(("emb.weight", "embed.weight")):
                p.copy_(0.3 * noise)
            elif name.endswith(".weight"):
                p.copy_(noise / p.shape[1] ** 0.5)
            elif name == "smear.gate":
                p.copy_(0.5 * noise)
            elif name == "bigram.scale":
                p.fill_(0.5)
            else:
                p.add_(0.1 * noise)
    return model.requires_grad_(False)


def random_tokens(s: train_gpt.Settings, count: int, seed: int = 0) -> np.ndarray:
    """Tokens without BOS, some of them repeated so that there is something to learn."""
    return np.random.default_rng(seed).zipf(1.3, count).clip(1, s.vocab_size - 2) + 1


def stream_of(s: train_gpt.Settings, lengths: list[int], seed: int = 0) -> train_gpt.Stream:
    """Documents with these numbers of targets, each beginning with BOS; the last ends with the stream."""
    tokens = random_tokens(s, sum(lengths) + 1, seed)
    tokens[np.cumsum([0, *lengths[:-1]])] = train_gpt.BOS
    bytes_ = np.random.default_rng(seed + 1).integers(0, 9, len(tokens) - 1)
    return train_gpt.Stream(tokens, bytes_, torch.device("cpu"))


class Traced(train_gpt.DocumentBatch):
    """A batch that keeps every reading: `rows`, for each figure the NLL of each document's targets."""

    def _document_sums(self):
        self.rows.append(self.target_nll())
        return super()._document_sums()

    def read(self, deadline: float = math.inf, a: np.ndarray | None = None) -> "Traced":
        """Itself, after both its passes."""
        self.score()
        self.rows = [self.target_nll()]
        self.adapt(self.run.s.ttt_n_epochs, deadline, a)
        if self.run.s.ttt_protocol == "single_pass":
            self.rows.append(self.target_nll())
        else:
            np.testing.assert_allclose(self.epoch_nll(), self.totals()[1:], rtol=1e-12)
        assert len(self.rows) == 1 + self.run.s.ttt_figures
        assert all(len(nll) == n for row in self.rows for nll, n in zip(row, self.lengths, strict=True))
        return self

    def totals(self) -> np.ndarray:
        """NLL of every figure and document, (1 + figures, B) float64, UNSCORED where a target is."""
        return np.array([[nll.sum(dtype=np.float64) for nll in row] for row in self.rows])

    @property
    def figures(self) -> torch.Tensor:
        """NLL of every figure, document and target, (1 + figures, B, longest) float64, NaN beyond a document's end."""
        found = np.full((len(self.rows), len(self.lengths), int(self.lengths.max())), math.nan)
        for table, row in zip(found, self.rows, strict=True):
            for line, nll in zip(table, row, strict=True):
                line[: len(nll)] = nll
        return torch.from_numpy(found)


def loaded(model, stream, documents, run) -> Traced:
    batch = Traced(model, stream, len(documents), run)
    batch.load(np.array(documents))
    return batch


def batch_of(model, stream, documents, run, **options) -> Traced:
    """The batch after both its passes."""
    return loaded(model, stream, documents, run).read(**options)


LONGEST = "device_paths faults ranks command_line resume ttt golden preflight container data results scores audit"


def pytest_collection_modifyitems(items: list[pytest.Item]):
    """The longest files come first, so that no process is left alone with one at the end."""
    order = {f"test_{name}.py": place for place, name in enumerate(LONGEST.split())}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_collection_finish():
    """What is imported stays: no collection of garbage walks through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    folder = os.environ.get("GOLF_SHARED")
    if not folder:
        pytest.skip("GOLF_SHARED does not name the folder with golden/, fineweb/ and corpus/")
    return Path(folder)


@pytest.fixture(scope="session")
def run() -> train_gpt.Run:
    """A single process on the CPU, whatever the machine has."""
    return train_gpt.Run(small())


def pytest_terminal_summary(terminalreporter):
    """Print the figures that passing tests measured: lines of their output that begin with `figure:`."""
    for report in terminalreporter.stats.get("passed", []):
        for line in report.capstdout.splitlines():
            if line.startswith("figure: "):
                terminalreporter.write_line(f"{report.nodeid.split('::')[-1]}: {line.removeprefix('figure: ')}")
