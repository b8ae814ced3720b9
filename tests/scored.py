"""Small evaluations in this process, by train_gpt.py or a copy of it with a planted fault, for the tests of the tools
that open a run again. The model is random: every parameter matters, and no training is needed."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

import runs
import train_gpt
from conftest import random_model

TOOLS = "sequential", "audit", "compress", "generate"
LENGTHS = [21, 1, 12, 5]  # tokens of the validation documents, BOS included
SETTINGS = dict(TTT_N_EPOCHS=2, TTT_LORA_LR=0.05, TTT_CHUNK_SIZE=8, TTT_EVAL_SEQ_LEN=24, EVAL_MAX_SECONDS=0)
MIXTURE = dict(TTT_PROTOCOL="single_pass", TTT_MIXTURE=1, TTT_LORA_TARGETS=",".join(train_gpt.LORA_TARGETS))
THREE = MIXTURE | dict(TTT_LORA_LR=0.02, TTT_MIXTURE_LR=0.1)  # parts


def write_data(folder: Path) -> Path:
    """A folder with a training and a validation shard, and the tokenizer of the micro runs."""
    folder.mkdir(parents=True)
    runs.write_shard(folder / "fineweb_train_000000.bin", runs.documents([100, 37, 80], 1))
    runs.write_shard(folder / "fineweb_val_000000.bin", runs.documents(LENGTHS, 7))
    (folder / "tokenizer.model").write_bytes((runs.data() / "tokenizer.model").read_bytes())
    return folder


def write_weights(path: Path, seed: int = 0) -> Path:
    """The state dict of a random model of the micro size."""
    s = train_gpt.Settings.from_env(runs.environment(path.parent))
    torch.save(random_model(s, seed).state_dict(), path)
    return path


def evaluate(folder: Path, weights: Path, data: Path, module: ModuleType = train_gpt, **settings) -> Path:
    """A run's folder with the evaluation of the weights by `module`."""
    folder.mkdir(parents=True)
    files = dict(EVAL_ONLY=weights, DATA_PATH=data, TOKENIZER_PATH=data / "tokenizer.model")
    run = module.Run(module.Settings.from_env(runs.environment(folder, **(SETTINGS | files | settings))))
    stream = module.load_validation(run)
    data = dict(train=None, validation=stream.fingerprint, tokenizer=stream.tokenizer)
    known = dict(data=data, training=None, artifact=None)
    module.score_file(module.scoring_model(run), stream, run, **known)
    return folder


@functools.cache
def tool(name: str) -> ModuleType:
    return importlib.import_module(name)


@contextlib.contextmanager
def planted(folder: Path, *edits: tuple[str, str]) -> Iterator[tuple[ModuleType, ModuleType]]:
    """A copy of train_gpt.py, in which the first of each pair is the second, and an audit.py on it."""
    source = train_gpt.SOURCE_BYTES.decode()
    for old, new in edits:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    path = folder / "train_gpt.py"
    path.write_text(source)
    kept = {name: sys.modules.pop(name, None) for name in ("train_gpt", *TOOLS)}
    try:
        spec = importlib.util.spec_from_file_location("train_gpt", path)
        sys.modules["train_gpt"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module, importlib.import_module("audit")
    finally:
        for name, module in kept.items():
            sys.modules.pop(name, None)
            if module:
                sys.modules[name] = module


def target_nll(run, model, stream, document: int, figure: str) -> np.ndarray:
    """NLL of a document's targets by the evaluation itself, many tokens at a time."""
    batch = train_gpt.DocumentBatch(model, stream, 1, run)
    batch.load(np.array([document]))
    batch.score()
    (plain,) = batch.target_nll()
    parts = [plain]
    for part in range(len(run.s.ttt_rates)):
        batch.adapt(1, part=part)
        parts += batch.target_nll()
    if figure == "mixture":
        place = np.array([0]), np.array([len(plain)])
        return train_gpt.mixture(np.stack(parts), *place, run.s.ttt_mixture_share)
    return plain if figure == "no_adaptation" else parts[1]
