"""A folder belongs to one run: nothing of another is replaced, removed or taken for its own."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import runs
from runs import train_gpt


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> runs.Run:
    return runs.run(tmp_path_factory.mktemp("finished") / "run", ITERATIONS=4, WARMDOWN_ITERS=2)


@pytest.fixture
def again(finished, tmp_path) -> Path:
    """A copy of the finished run's folder."""
    return Path(shutil.copytree(finished.folder, tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes]:
    """Of all files that a run leaves, but for logs."""
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".pt", ".ptz", ".npz", ".json")
    }


FOUR = dict(ITERATIONS=4, WARMDOWN_ITERS=2)


def test_a_resume_never_trains_another_model_where_one_is_finished(again):
    """Neither where its checkpoint is gone, nor where only an evaluation was."""
    (again / "checkpoint.pt").unlink()
    before = contents(again)
    done = runs.run(again, 2, RESUME=1, SEED=5, **FOUR)
    assert "an artifact, but no checkpoint to go on from" in runs.user_error(done.err)
    scored = runs.run(again.with_name("scored"), EVAL_ONLY=again / "final_model.ptz")
    kept = contents(scored.folder)
    done = runs.run(scored.folder, 2, RESUME=1, SEED=9, **FOUR)
    assert "OUTPUT_DIR" in runs.user_error(done.err)
    assert contents(again) == before and contents(scored.folder) == kept


@pytest.mark.parametrize("changes", [FOUR, FOUR | dict(TTT_N_EPOCHS=3), dict(EVAL_ONLY="final_model.ptz")])
def test_a_result_is_replaced_only_once_it_is_deleted(again, changes):
    """Neither by the same run, nor by another evaluation of its weights."""
    if "EVAL_ONLY" in changes:
        again = runs.run(again.with_name("scored"), EVAL_ONLY=again / changes["EVAL_ONLY"]).folder
        changes = dict(EVAL_ONLY=again.with_name("run") / changes["EVAL_ONLY"])
    before = contents(again)
    error = runs.user_error(runs.run(again, 2, RESUME=1, **changes).err)
    assert f"OUTPUT_DIR={again} holds a run's result.json — choose another, or delete that file" in error
    assert contents(again) == before
    (again / "result.json").unlink()
    done = runs.run(again, RESUME=1, **changes)
    assert done.result["evaluation"]["curve"][-1]["epoch"] == int(changes.get("TTT_N_EPOCHS", 2))


def test_links_in_a_circle_are_one_line(tmp_path):
    (tmp_path / "circle").symlink_to("circle")
    for name in ("OUTPUT_DIR", "DATA_PATH"):
        done = runs.run(tmp_path / "consoles", 2, **{name: tmp_path / "circle"})
        assert str(tmp_path / "circle") in runs.user_error(done.err)


def test_a_damaged_checkpoint_beside_its_artifact_is_not_advised_to_be_deleted(again):
    (again / "checkpoint.pt").write_bytes(b"half")
    (again / "result.json").unlink()
    error = runs.user_error(runs.run(again, 2, RESUME=1, **FOUR).err)
    assert "is damaged" in error and f"score it by EVAL_ONLY={again / 'final_model.ptz'}" in error


def test_pipes_are_refused_before_anybody_waits_for_their_other_end(tmp_path):
    os.mkfifo(tmp_path / "pipe.ptz")
    for path in (tmp_path / "pipe.ptz", os.devnull):
        done = runs.run(tmp_path / "run", 2, EVAL_ONLY=path)
        assert f"EVAL_ONLY={path} is no file" in runs.user_error(done.err)
    os.mkfifo(tmp_path / "train.log")
    done = runs.run(tmp_path / "consoles", 2, OUTPUT_DIR=tmp_path)
    assert "train.log is no file" in runs.user_error(done.err)


def test_what_a_run_has_not_made_is_not_removed(tmp_path):
    mine = tmp_path / "preflight_notes" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("years of work")
    killed = tmp_path / "preflight_k1ll3d_0.tmp"  # by kill -9, in the middle of a write
    killed.mkdir()
    for name in ("scores_abc_0.bin", "checkpoint.pt.tmp"):
        (killed / name).write_bytes(b"")
    runs.run(tmp_path, **FOUR)
    assert mine.read_text() == "years of work" and not killed.exists()


def test_a_resume_without_a_checkpoint_says_that_it_starts_afresh(again):
    for name in ("checkpoint.pt", "result.json", "final_model.ptz", "final_model.pt"):
        (again / name).unlink()
    done = runs.run(again, RESUME=1, **FOUR)
    assert f"note: {again} has no checkpoint to go on from: this run starts afresh" in done.out


def started_again(run: train_gpt.Run) -> train_gpt.Run:
    """By torchrun --max-restarts, in the place of a run that has ended."""
    run.lock_file.close()
    again = runs.alone(run.folder)
    again.ranks.restarts, again.ranks.job = 1, run.ranks.job
    return again


def test_a_restart_by_torchrun_goes_on_in_its_own_folder_alone(again, tmp_path):
    """Where the first start was refused the second is, too; what has a result is not made again."""
    first, before = runs.alone(again), contents(again)
    for attempt in (0, 1):
        first.ranks.restarts = attempt
        with pytest.raises(train_gpt.UserError, match="holds a run's"):
            train_gpt.claim_folder(first)
    assert contents(again) == before
    own = runs.alone(tmp_path / "own")
    assert train_gpt.claim_folder(own) is False
    for name in ("checkpoint.pt", "final_model.ptz"):
        (own.folder / name).write_bytes(b"of the first attempt")
    second = started_again(own)
    assert train_gpt.claim_folder(second) is True
    (own.folder / "result.json").write_text("{}")
    with pytest.raises(train_gpt.UserError, match="this job's own; see above"):
        train_gpt.claim_folder(started_again(second))


def test_a_folder_for_new_runs_that_cannot_be_made_ends_the_search_for_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").symlink_to(tmp_path / "not mounted")
    with pytest.raises(FileExistsError):
        train_gpt.choose_folder(runs.alone(None))


def test_a_mixture_that_is_turned_off_takes_the_second_rate_with_it(again, monkeypatch):
    """Of a run whose settings EVAL_ONLY takes."""
    result = json.loads((again / "result.json").read_bytes())
    result["settings"] |= dict(ttt_mixture=True, ttt_mixture_lr=0.03)
    (again / "result.json").write_text(json.dumps(result))
    rates = []
    for value in ("1", "0"):
        monkeypatch.setenv("TTT_MIXTURE", value)
        kept = train_gpt.settings_beside(str(again / "final_model.ptz"))["settings"]
        rates.append(train_gpt.Settings.from_env(kept | {"TTT_MIXTURE": value}).ttt_rates[1:])
    assert rates == [(0.03,), ()]


def test_patterns_in_an_artifacts_header_are_its_own(again, tmp_path):
    artifact = dict(EVAL_ONLY=again / "final_model.ptz", TTT_N_EPOCHS=1)
    refused = runs.run(tmp_path / "other", 2, FP16_KEEP_NAME_PATTERNS="smear", **artifact)
    assert "unset FP16_KEEP_NAME_PATTERNS" in runs.user_error(refused.err)


@pytest.mark.parametrize("missing", [None, *train_gpt.SAMPLE_FILES])
def test_a_bundled_sample_that_lacks_a_file_is_its_builders_matter(tmp_path, monkeypatch, missing):
    for name in train_gpt.SAMPLE_FILES:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / (missing or "another")).unlink(missing_ok=True)
    monkeypatch.setattr(train_gpt, "SAMPLE", tmp_path)
    monkeypatch.setattr(train_gpt.subprocess, "call", lambda *_, **__: 2)
    try:
        train_gpt.prepare_sample(runs.alone(DATA_PATH=tmp_path))
    except train_gpt.UserError as e:
        assert missing and "see its message above" in str(e)
    else:
        assert not missing


@pytest.mark.parametrize("text", ["{}", "null", "[1]", "[{}]", "5", '"x"', "[[]]", "[" * 100_000])
def test_an_account_of_another_form_is_one_line(again, text):
    (again / "result.json").unlink()
    (again / "sessions.json").write_text(text)
    done = runs.run(again, 2, RESUME=1, **FOUR)
    assert "sessions.json is damaged" in runs.user_error(done.err)


@pytest.mark.parametrize("text", ["[]", "null", '{"settings": {}, "data": null}', '{"settings": ', "[" * 100_000])
def test_settings_beside_an_artifact_are_taken_whole_or_not_at_all(again, tmp_path, text):
    (again / "result.json").write_text(text)
    done = runs.run(tmp_path / "scored", 2, EVAL_ONLY=again / "final_model.ptz")
    assert "result.json, whose settings EVAL_ONLY takes, is damaged" in runs.user_error(done.err)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**9), st.integers(0, 7))
def test_a_flipped_bit_of_a_checkpoint_or_a_state_dict_is_found(where, bit):
    """torch.load takes it: what is loaded is what was saved, or an error."""
    state = {"weights": torch.arange(4000.0), "step": 7}
    file = io.BytesIO()
    torch.save(state, file)
    content = bytearray(file.getvalue())
    content[where % len(content)] ^= 1 << bit
    try:
        loaded = train_gpt.load_pt(bytes(content))
    except Exception:  # of many kinds, all of which are told as damage
        return
    assert loaded["step"] == 7 and loaded["weights"].equal(state["weights"])


class Full(io.StringIO):
    def write(self, text):
        raise OSError(28, "No space left on device")


def test_the_lock_outlives_the_log(tmp_path):
    first, second = runs.alone(tmp_path / "run"), runs.alone(tmp_path / "run", RESUME=1)
    train_gpt.claim_folder(first)
    first.log_file = Full()
    first.log("a line on a full disk")
    with pytest.raises(train_gpt.UserError, match="is in use by a live run"):
        train_gpt.claim_folder(second)
    first.lock_file.close()
    train_gpt.claim_folder(second)


def test_a_folder_that_has_become_another_runs_is_left_alone(tmp_path):
    """Removed while its run lives, and made again by the next one. A log that an editor has replaced is no other's."""
    first, second = runs.alone(tmp_path / "run"), runs.alone(tmp_path / "run")
    train_gpt.claim_folder(first)
    (tmp_path / "run" / "train.log").unlink()
    first.write("sessions.json", b"[]")
    (tmp_path / "run" / "train.log").write_text("as an editor saves it")
    first.write("sessions.json", b"[]")
    shutil.rmtree(tmp_path / "run")
    train_gpt.claim_folder(second)
    half = second.folder / "final_model.ptz.tmp"
    half.write_bytes(b"as the second writes it")
    with pytest.raises(train_gpt.Interrupted, match="has become another run's"):
        first.write("final_model.ptz", b"of the first")
    with pytest.raises(train_gpt.Interrupted, match="has become another run's"), first.session("training"):
        pytest.fail("it goes on")
    assert {path.name for path in second.folder.iterdir()} == {"train.log", half.name}
    second.write("final_model.ptz", b"of the second")


def test_a_file_that_cannot_be_removed_either_is_told_as_the_first_error(tmp_path, monkeypatch):
    def stale(*_, **__):
        raise OSError(116, "Stale file handle")

    run = runs.alone(tmp_path)
    monkeypatch.setattr(train_gpt.os, "replace", stale)
    monkeypatch.setattr(Path, "unlink", stale)
    with pytest.raises(train_gpt.UserError, match="sessions.json.*Stale file handle"):
        run.write("sessions.json", b"[]")


def test_scores_that_cannot_be_read_for_a_moment_are_not_thrown_away(tmp_path, monkeypatch):
    run = runs.alone(tmp_path, RESUME=1)
    stream = train_gpt.synthetic_stream([20, 9], run)
    scores = train_gpt.Scores("tag", stream, run)
    scores.add(train_gpt.PLAIN, np.array([1]), [np.ones(9, np.float32)])
    whole = scores.path.read_bytes()

    def failing(path, inner=Path.read_bytes):
        raise OSError(5, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", failing)
        with pytest.raises(OSError, match="Input/output error"):
            train_gpt.Scores("tag", stream, run)
    assert scores.path.read_bytes() == whole
    assert train_gpt.Scores("tag", stream, run).targets[train_gpt.PLAIN, 20:].tolist() == [1.0] * 9


def result_on_a_full_disk() -> None:
    def write(run, name, content, inner=train_gpt.Run.write):
        if name == "result.json" and not run.folder.name.startswith("preflight_"):
            raise train_gpt.UserError("cannot use result.json: No space left on device — free space there")
        inner(run, name, content)

    train_gpt.Run.write = write


def test_seconds_of_an_evaluation_whose_result_could_not_be_written_count(again, tmp_path):
    scoring = dict(EVAL_ONLY=again / "final_model.ptz", TTT_N_EPOCHS=40)
    runs.run(tmp_path / "scored", 2, before=result_on_a_full_disk, **scoring)
    (first,) = json.loads((tmp_path / "scored" / "sessions.json").read_text())
    assert "No space left" in first["ended"]
    result = runs.run(tmp_path / "scored", RESUME=1, **scoring).result
    assert result["evaluation"]["seconds"] >= first["seconds"] > 0.1
    assert [row["ended"] == "finished" for row in result["sessions"]] == [False, True]


def test_a_shard_that_is_missing_in_between_is_named(tmp_path):
    folder = Path(shutil.copytree(runs.data(), tmp_path / "data"))
    os.rename(folder / "fineweb_train_000001.bin", folder / "fineweb_train_000002.bin")
    done = runs.run(tmp_path / "run", 2, DATA_PATH=folder, TOKENIZER_PATH=folder / "tokenizer.model")
    assert "fineweb_train_*.bin" in (error := runs.user_error(done.err)) and "[0, 2]" in error
    run = runs.alone(DATA_PATH=tmp_path)
    for split in ("train", "val"):
        runs.write_shard(tmp_path / f"fineweb_{split}_000001.bin", [1, 2])
    assert len(train_gpt.open_shards("train", run)) == 1  # any part will do, but for what gives a score
    with pytest.raises(train_gpt.UserError, match=r"fineweb_val_.* is missing: there are \[1\]"):
        train_gpt.open_shards("val", run)


def test_shards_that_cannot_be_listed_or_told_apart_are_named(tmp_path, monkeypatch):
    run = runs.alone(DATA_PATH=tmp_path)
    runs.write_shard(tmp_path / "fineweb_train_000000.bin", [1, 2])
    for name in ("fineweb_train_000000 (1).bin", "fineweb_train_copy_000001.bin"):
        runs.write_shard(tmp_path / name, [1, 2])
        with pytest.raises(train_gpt.UserError, match=f"{re.escape(name)} has no number"):
            train_gpt.open_shards("train", run)
        (tmp_path / name).unlink()

    def locked(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(train_gpt.os, "scandir", locked)
    with pytest.raises(PermissionError, match=str(tmp_path)):  # not: there are none
        train_gpt.open_shards("train", run)


def folder_removed_in_training() -> None:
    def train(trainer, stream, inner=train_gpt.Trainer.train):
        shutil.rmtree(trainer.run.folder)
        return inner(trainer, stream)

    train_gpt.Trainer.train = train


def test_a_folder_that_is_removed_in_training_costs_only_what_was_in_it(tmp_path):
    (tmp_path / "consoles").mkdir()
    done = runs.run(tmp_path / "consoles", before=folder_removed_in_training, OUTPUT_DIR=tmp_path / "run", **FOUR)
    assert done.lines[-1].startswith("final_int8_zlib_roundtrip_exact")
    assert done.out.count("was removed or moved: it is made again") == 1
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"checkpoint.pt", "final_model.ptz", "final_model.pt", "result.json", "ttt_documents.npz"} <= names


def without_consoles() -> None:
    os.close(1)
    os.close(2)


def test_with_closed_consoles_no_file_of_the_run_takes_their_numbers(tmp_path):
    done = runs.run(tmp_path, before=without_consoles, **FOUR)
    assert done.log.count("final_int8_zlib_roundtrip_exact val_loss") == 1 and not done.out


def no_further_thread() -> None:
    def main(_):
        raise RuntimeError("can't start new thread")

    train_gpt.main = main


def test_a_limit_of_processes_is_one_line(tmp_path):
    assert "ulimit -u" in runs.user_error(runs.run(tmp_path, 2, before=no_further_thread).err)


def test_shards_come_in_the_order_of_their_numbers_however_these_are_written(tmp_path):
    run = runs.alone(DATA_PATH=tmp_path)
    for number in range(11):
        runs.write_shard(tmp_path / f"fineweb_train_{number}.bin", [1, number])
    assert [int(shard[1:][0]) for shard in train_gpt.open_shards("train", run)] == [*range(11)]
    runs.write_shard(tmp_path / "fineweb_val_part1.bin", [1, 2])
    assert len(train_gpt.open_shards("val", run)) == 1


def test_arrays_of_an_evaluation_go_with_its_result(again):
    (again / "result.json").unlink()
    done = runs.run(again, RESUME=1, TTT_ENABLED=0, **FOUR)
    assert "sliding" in done.result["evaluation"] and not list(again.glob("*.npz"))


def test_a_model_too_large_for_this_machine_is_one_line_that_names_what_to_lower(tmp_path):
    done = runs.run(tmp_path, 2, BIGRAM_VOCAB_SIZE=1 << 24, BIGRAM_DIM=16384)
    error = runs.user_error(done.err)
    assert "out of memory in the start" in error and "BIGRAM_VOCAB_SIZE lower" in error
