"""Tests of data/audit.py: what it finds in real runs, that it finds a planted leak, and the sums by position."""

from __future__ import annotations

import importlib
import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import runs
import train_gpt
from tools import call, is_one_line_error, plot

audit = importlib.import_module("audit")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with three evaluations: replay, its windows recomputed, and single_pass."""
    folder = tmp_path_factory.mktemp("audit") / "run"
    runs.run(folder)
    for settings in ({"TTT_CONTEXT": "recompute"}, {"TTT_PROTOCOL": "single_pass"}):
        runs.run(folder, EVAL_ONLY=folder / "final_model.ptz", **settings)
    return folder


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Takes away the handlers of the run that the audit makes in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def results(folder: Path) -> dict[tuple[str, str], Path]:
    """The results of a folder by protocol and context."""
    found = {}
    for path in folder.glob("result*.json"):
        settings = json.loads(path.read_text())["settings"]
        found[settings["ttt_protocol"], settings["ttt_context"]] = path
    return found


EVALUATIONS = [("replay", "cached"), ("replay", "recompute"), ("single_pass", "cached")]


@pytest.mark.parametrize("evaluation", EVALUATIONS)
def test_only_the_last_epoch_moves(folder: Path, evaluation: tuple[str, str]) -> None:
    path = results(folder)[evaluation]
    before = json.loads(path.read_text())
    found = call(audit, path, "--documents", 4)
    assert found.code == 0, found.err
    after = json.loads(path.read_text())
    rows = after["evaluation"].pop("audit")
    before["evaluation"].pop("audit", None)
    assert after == before
    names = ["no_adaptation", "epoch_1", "last_epoch_3"]
    assert [row["figure"] for row in rows] == (
        names if evaluation[0] == "replay" else ["no_adaptation", "single_pass"]
    ) * 4
    assert len(found.out.splitlines()) == len(rows)
    for row in rows:
        assert 1 <= row["t"] < row["targets"] and row["repeat"] == 0
        assert row["backward_looking"] == (row["figure"] != "last_epoch_3")
        assert row["change"] == 0 if row["backward_looking"] else row["change"] > 0


def test_a_planted_leak_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapt = train_gpt.DocumentBatch.adapt

    def adapt_twice(batch: train_gpt.DocumentBatch, a: np.ndarray) -> None:
        adapt(batch, a)
        batch.adapters.begin = lambda a: None
        adapt(batch, a)

    path = results(folder)["single_pass", "cached"]
    content = path.read_bytes()
    monkeypatch.setattr(train_gpt.DocumentBatch, "adapt", adapt_twice)
    assert call(audit, path).code == 1
    rows = json.loads(path.read_text())["evaluation"]["audit"]
    assert [row["change"] > 0 for row in rows] == [False, True] * 2
    path.write_bytes(content)


@pytest.mark.parametrize("evaluation", EVALUATIONS)
def test_sums_by_position_are_those_of_the_result(folder: Path, evaluation: tuple[str, str]) -> None:
    path = results(folder)[evaluation]
    result = json.loads(path.read_text())
    assert call(audit, path, "--positions").code == 0
    written = path.with_name(path.name.replace("result", "ttt_positions")).with_suffix(".npz")
    with np.load(written) as arrays:
        sums = {name: arrays[name].sum(-1) for name in ("nll", "targets", "bytes")}
        spans, ends = arrays["targets"], arrays["ends"]
    counts = result["evaluation"]["no_adaptation"]
    assert (sums["targets"], sums["bytes"]) == (counts["targets"], counts["bytes"])
    targets = np.array(runs.LENGTHS)
    targets[-1] -= 1  # the others end with the next one's BOS
    assert spans.tolist() == [np.clip(targets, 0, 64).sum(), np.clip(targets - 64, 0, 64).sum()]
    assert ends.tolist() == [64, targets.max()]
    names = ["no_adaptation", "backward_looking", "last_epoch"][: len(sums["nll"])]
    losses = [result["evaluation"][name]["val_loss"] for name in names]
    assert sums["nll"] / sums["targets"] == pytest.approx(losses, rel=1e-6)
    rates = drawn_positions(path)
    assert len(rates) == len(names) and all(len(line) == 2 for line in rates)
    assert call(audit, path, "--positions", "--documents", 1).code == 0
    with np.load(written) as arrays:
        assert arrays["targets"].sum() == runs.LENGTHS[0]
        alone = arrays["nll"][0, 0] / math.log(2) / arrays["bytes"][0]
    assert drawn_positions(path)[0][0] == pytest.approx(alone) != rates[0][0]


def drawn_positions(path: Path) -> list[np.ndarray]:
    """Bits per byte by position, as plot.py draws them: a line for each figure."""
    (axes,) = plot.draw(plot.read_runs([path]), ["position"]).axes
    return [line.get_ydata() for line in axes.lines]


def test_mistakes_are_one_line(folder: Path, tmp_path: Path) -> None:
    assert is_one_line_error(call(audit, tmp_path), "result.json")
    (tmp_path / "result.json").write_text("{}")
    assert is_one_line_error(call(audit, tmp_path), "result.json")
    for name in ("result.json", "final_model.ptz"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    result = json.loads((tmp_path / "result.json").read_text())
    (tmp_path / "result.json").write_text(json.dumps(result | {"weights_sha256": "ab" * 32}))
    assert is_one_line_error(call(audit, tmp_path), "another artifact")
    os.truncate(tmp_path / "final_model.ptz", 99)
    assert is_one_line_error(call(audit, tmp_path), "final_model.ptz")
