"""Tests of data/audit.py: a sound run's certificate, and planted faults, each of which must be found."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

import runs
import scored
from tools import call, is_one_line_error

audit = scored.tool("audit")
FINDINGS = {"causal", "normalised", "repeated", "bytes", "disjoint"}
UNCOMPARED = ("    compare_bytes(sp, compared,", "    0 and compare_bytes(sp, compared,")  # else the run itself refuses


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scored.write_data(tmp_path_factory.mktemp("audit") / "data")


@pytest.fixture(scope="module")
def weights(data: Path) -> Path:
    return scored.write_weights(data.parent / "weights.pt")


@pytest.fixture(scope="module")
def mixed(data: Path, weights: Path) -> Path:
    return scored.evaluate(data.parent / "mixed", weights, data, **scored.THREE)


@pytest.fixture(scope="module")
def replayed(data: Path, weights: Path) -> Path:
    return scored.evaluate(data.parent / "replayed", weights, data, TTT_CONTEXT="recompute")


def result_of(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def failures(folder: Path) -> set[str]:
    findings = result_of(folder)["evaluation"]["certificate"]["findings"]
    return {name for name, finding in findings.items() if finding["outcome"] == "fail"}


def test_a_folder_that_cannot_be_written_is_found_first(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: object, dir: Path, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(dir / "tmp123"))

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    found = call(audit, mixed)
    assert is_one_line_error(found, f"error: {mixed / 'result.json'}: Read-only file system", "another place")
    assert not found.out


def test_sound_runs_pass_and_only_the_last_epoch_moves(mixed: Path, replayed: Path) -> None:
    before = [result_of(folder) for folder in (mixed, replayed)]
    found = call(audit, mixed, replayed, "--documents", 2, "--decode")
    assert found.code == 0, found.err
    for folder, old in zip((mixed, replayed), before, strict=True):
        result = result_of(folder)
        certificate, rows = (result["evaluation"].pop(name) for name in ("certificate", "audit"))
        assert result == old
        assert certificate["source_sha256"] == result["source_sha256"]
        outcomes = {name: finding["outcome"] for name, finding in certificate["findings"].items()}
        assert outcomes == dict.fromkeys(FINDINGS | {"decodes"}, "pass")
        last = "mixture" if folder is mixed else "last_epoch_2"
        first = "single_pass" if folder is mixed else "epoch_1"
        assert [row["figure"] for row in rows] == ["no_adaptation", first, last] * 2
        for row in rows:
            assert 1 <= row["t"] < row["targets"] and row["repeat"] == 0
            assert row["backward_looking"] == (row["figure"] != "last_epoch_2")
            assert row["change"] == 0 if row["backward_looking"] else row["change"] > 0
    lines = found.out.splitlines()
    assert len(lines) == 2 * (1 + len(FINDINGS) + 1)
    assert str(mixed) in lines[0] and "2 documents" in lines[0]


FAULTS = {
    "a space of three bytes": (
        {"bytes"},
        [('sp.id_to_piece(i).replace("▁", " ") for i in ids]', "sp.id_to_piece(i) for i in ids]"), UNCOMPARED],
    ),
    "byte pieces of three bytes": ({"bytes"}, [('["?" if sp.is_byte(i)', '["???" if sp.is_byte(i)'), UNCOMPARED]),
    "logits that see the target": (
        {"normalised"},
        [
            (
                "F.cross_entropy(self.logits(x).flatten(0, 1),",
                "F.cross_entropy((self.logits(x) + 0.1 * F.one_hot(targets, 300)).flatten(0, 1),",
            )
        ],
    ),
    "a gate that reads the next token": (
        {"normalised", "repeated"},
        [("F.pad(x[:, :-1], (0, 0, 1, 0))", "F.pad(x[:, 1:], (0, 0, 0, 1))")],
    ),
    "adaptation before scoring": (
        {"causal", "normalised"},
        [
            (
                "            self._run_step(chunk, n, cached, score=True)\n            for wave",
                "            self._set_lr(waves[0])\n            self._run_step(chunk, n, cached, train=True)\n"
                "            self._run_step(chunk, n, cached, score=True)\n            for wave",
            )
        ],
    ),
    "a gate that reads across a document's start": (
        {"causal", "normalised", "repeated"},
        [("torch.where((at >= 0)[:, None], x, 0.0)", "x")],
    ),
    "scores that are no logarithms of probabilities": (
        {"normalised"},
        [("F.cross_entropy(self.logits(x)", "F.nll_loss(self.logits(x)")],
    ),
    "a mixture's weight that sees its own target": (
        {"normalised"},
        [("    p = weights.sum(0)\n", "    p = (weights / weights.sum(0) * parts).sum(0)\n")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault: str, data: Path, weights: Path, tmp_path: Path) -> None:
    expected, edits = FAULTS[fault]
    with scored.planted(tmp_path, *edits) as (module, tool):
        folder = scored.evaluate(tmp_path / "run", weights, data, module, **scored.MIXTURE)
        found = call(tool, folder)
    assert found.code == 1 and not found.err, found.err
    assert failures(folder) == expected, found.out


def test_a_training_shard_with_validation_documents_is_found(data: Path, weights: Path, tmp_path: Path) -> None:
    other = tmp_path / "data"
    shutil.copytree(data, other)
    validation = runs.documents(scored.LENGTHS, 7)
    runs.write_shard(
        other / "fineweb_train_000001.bin", validation[:30]
    )  # the first document runs on into the next shard
    runs.write_shard(other / "fineweb_train_000002.bin", validation[15:34])
    folder = scored.evaluate(tmp_path / "run", weights, other, **scored.MIXTURE)
    found = call(audit, folder)
    assert found.code == 1 and failures(folder) == {"disjoint"}, found.out
    finding = result_of(folder)["evaluation"]["certificate"]["findings"]["disjoint"]
    assert finding["figure"] == pytest.approx(2 / 3)  # of three with text, the last is not there


def test_a_run_of_a_faulty_copy_is_found_by_the_sound_one(data: Path, weights: Path, tmp_path: Path) -> None:
    with scored.planted(tmp_path, *FAULTS["adaptation before scoring"][1]) as (module, _):
        folder = scored.evaluate(tmp_path / "run", weights, data, module, **scored.MIXTURE)
    assert call(audit, folder, "--decode", "--documents", 1).code == 1
    assert failures(folder) >= {"repeated"}


def test_every_token_after_the_point_is_replaced_by_another(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a token of the vocabulary that is no BOS; up to the point none is."""
    left = audit.common.read_run(mixed)
    model, run = audit.sequential.open_run(left)
    stream = audit.sequential.open_stream(left, run)
    sample = audit.draw(stream, run, 2, np.random.default_rng(0))
    before = audit.trace(model, run, sample, sample.tokens)
    seen = []

    def trace(model, run, sample, tokens):
        seen.append(tokens)
        return before

    monkeypatch.setattr(audit, "trace", trace)
    for seed in range(40):
        _, rows = audit.causal(model, run, sample, before, np.random.default_rng(seed))
        ends = {row["document"]: row["t"] for row in rows}
        kept = np.zeros(len(sample.tokens), bool)
        for start, number in zip(sample.starts, sample.numbers.tolist(), strict=True):
            kept[start : start + ends[number] + 1] = True
        repeat, changed = seen
        seen.clear()
        assert (repeat == sample.tokens).all() and ((changed == sample.tokens) == kept).all()
        assert (changed[~kept] > audit.train_gpt.BOS).all() and (changed < run.s.vocab_size).all()


def test_what_cannot_be_judged_is_said(mixed: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(mixed, folder)
    shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns("*train*"))
    result = result_of(folder)
    result["settings"]["data_path"] = str(tmp_path / "data")
    (folder / "result.json").write_text(json.dumps(result))
    found = call(audit, folder, "--documents", 1)
    assert found.code == 0 and "not judged disjoint" in found.out, found.out


def test_a_deadline_that_cut_off_everything_leaves_no_file_to_judge(data: Path, weights: Path, tmp_path: Path) -> None:
    folder = scored.evaluate(tmp_path / "run", weights, data, EVAL_MAX_SECONDS=1e-6)
    found = call(audit, folder, "--documents", 1, "--decode")
    assert found.code == 0, found.err
    findings = result_of(folder)["evaluation"]["certificate"]["findings"]
    assert {findings[name]["outcome"] for name in ("repeated", "decodes")} == {"not judged"}
    assert "deadline" in findings["decodes"]["detail"]
    assert is_one_line_error(call(scored.tool("compress"), "check", folder), "deadline", "more EVAL_MAX_SECONDS")


def test_a_result_that_changes_meanwhile_is_kept(mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    shutil.copytree(mixed, folder)
    newer = json.dumps(result_of(folder) | {"seconds_of_a_session_more": 1.0})

    def causal(*_: object) -> tuple:
        (folder / "result.json").write_text(newer)
        return audit.Finding("causal", True, 0.0, "said"), []

    def certify(left: audit.common.Run, *_: object) -> bool:
        audit.keep(left, dict(source_sha256="a", documents=1, findings={}), [])
        return True

    monkeypatch.setattr(audit, "causal", causal)
    assert is_one_line_error(call(audit, folder, "--documents", 1), "has changed", "again")
    assert (folder / "result.json").read_text() == newer
    monkeypatch.setattr(audit, "certify", certify)
    assert call(audit, folder, folder).code == 0  # the second time it reads what the first has added


def test_what_is_found_is_kept_before_what_follows(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(mixed, folder)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(audit, "normalised", interrupted)
    assert call(audit, folder, "--documents", 1).code == 130
    evaluation = result_of(folder)["evaluation"]
    assert list(evaluation["certificate"]["findings"]) == ["causal"] and len(evaluation["audit"]) == 3


def test_a_package_that_decoding_needs_is_missed_before_the_work(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "constriction", None)
    monkeypatch.delitem(sys.modules, "compress", raising=False)
    found = call(audit, mixed, "--decode")
    assert is_one_line_error(found, "pip install constriction") and not found.out


def test_a_run_that_is_being_scored_is_left_alone(mixed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(mixed, folder)
    with (folder / "train.log").open("a") as log:
        audit.train_gpt.lock(log)
        found = call(audit, folder)
    assert is_one_line_error(found, str(folder), "in use by a live run") and not found.out


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error", "a.bin"), "cut off"])
def test_training_shards_that_cannot_be_read_are_not_judged(
    mixed: Path, monkeypatch: pytest.MonkeyPatch, error: OSError | str
) -> None:
    left = audit.common.read_run(mixed)
    _, run = audit.sequential.open_run(left)
    stream = audit.sequential.open_stream(left, run)

    def fail(*_: object) -> None:
        raise error if isinstance(error, OSError) else audit.train_gpt.UserError(f"a.bin {error} — make it again")

    monkeypatch.setattr(audit, "documents_of", fail)
    finding = audit.disjoint(left, stream, run)
    assert finding.outcome is None and "a.bin" in finding.detail and " — " not in finding.detail


@pytest.mark.parametrize(
    ("values", "outcome", "words"),  # of a target's score at first, repeated, and with other tokens later
    [
        ((np.inf, np.inf, np.inf), True, []),
        ((np.inf, np.inf, 3.0), False, []),
        ((2.0, 2.0, np.inf), False, []),
        ((np.nan, np.nan, np.nan), None, ["1 of 3 scores are no numbers"]),
        ((np.nan, np.nan, 3.0), None, ["1 of 3 scores are no numbers"]),
    ],
)
def test_a_score_that_is_no_number_passes_only_where_it_stays_the_same(
    mixed: Path, monkeypatch: pytest.MonkeyPatch, values: tuple[float, ...], outcome: bool | None, words: list[str]
) -> None:
    left = audit.common.read_run(mixed)
    model, run = audit.sequential.open_run(left)
    stream = audit.sequential.open_stream(left, run)
    sample = audit.draw(stream, run, 1, np.random.default_rng(0))
    names = "no_adaptation", "single_pass", "mixture"
    traces = [{name: [np.ones(sample.lengths[0])] for name in names} for _ in values]
    for found, value in zip(traces, values, strict=True):
        found["mixture"][0][0] = value
    before, *others = traces
    monkeypatch.setattr(audit, "trace", lambda *_: others.pop(0))
    finding, _ = audit.causal(model, run, sample, before, np.random.default_rng(0))
    assert finding.outcome is outcome and all(word in finding.detail for word in words)


def test_documents_that_begin_alike_are_counted_among_those_that_are_long_enough(
    mixed: Path, data: Path, weights: Path, tmp_path: Path
) -> None:
    other = tmp_path / "data"
    shutil.copytree(data, other)
    begun = runs.documents([100], 5)
    validation = np.concatenate([runs.documents([20, 30], 7), begun, runs.documents([90], 8)])
    runs.write_shard(other / "fineweb_val_000000.bin", validation)
    runs.write_shard(other / "fineweb_train_000001.bin", np.append(begun[:80], runs.documents([9], 9)))
    left = audit.common.read_run(scored.evaluate(tmp_path / "run", weights, other))
    _, run = audit.sequential.open_run(left)
    finding = audit.disjoint(left, audit.sequential.open_stream(left, run), run)
    assert finding.outcome and "share of 4 documents" in finding.detail
    assert "of 1 of the 2 with 64 tokens" in finding.detail


def test_mistakes_are_one_line(mixed: Path, weights: Path, tmp_path: Path) -> None:
    assert is_one_line_error(call(audit, tmp_path), "result.json")
    (tmp_path / "result.json").write_text("{}")
    assert is_one_line_error(call(audit, mixed, tmp_path), "result.json")
    result = result_of(mixed)
    copy = tmp_path / "weights.pt"
    shutil.copy(weights, copy)
    for change, word in (
        ({"weights_sha256": "ab" * 32}, "another artifact"),
        ({"data": result["data"] | {"validation": "ab" * 32}}, "another text"),
        ({"data": result["data"] | {"tokenizer": "ab" * 32}}, "another tokenizer"),
        ({"settings": result["settings"] | {"ttt_lora_rank": -1}}, "TTT_LORA_RANK"),
    ):
        (tmp_path / "result.json").write_text(json.dumps(result | change))
        assert is_one_line_error(call(audit, tmp_path), word)
    settings = result["settings"] | {"eval_only": str(copy)}
    (tmp_path / "result.json").write_text(json.dumps(result | {"settings": settings}))
    os.truncate(copy, 99)
    assert is_one_line_error(call(audit, tmp_path), "weights.pt")
