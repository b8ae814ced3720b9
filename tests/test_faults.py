"""Nothing lost: kills, signals, budgets, full disks, dead ranks and diverging training."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from runs import train_gpt

UserError = train_gpt.UserError
LONG = dict(ITERATIONS=24, WARMDOWN_ITERS=16, CHECKPOINT_EVERY=3, TRAIN_LOG_EVERY=1, VAL_LOSS_EVERY=12, TTT_N_EPOCHS=4)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> runs.Run:
    """The run that nobody interrupts."""
    return runs.run(tmp_path_factory.mktemp("whole"), **LONG)


@pytest.fixture
def runtime(monkeypatch) -> train_gpt.Runtime:
    """A Runtime of this process that leaves its signal handlers alone."""
    monkeypatch.setattr(train_gpt.signal, "signal", lambda *_: None)
    return train_gpt.Runtime(runs.micro())


def quiet(line: str, console: bool = True) -> None:
    """A log that nobody reads."""


def same_end(one: runs.Run, other: runs.Run) -> bool:
    return one.artifact == other.artifact and one.lines[-1] == other.lines[-1]


# ---- Resume


def test_a_run_killed_again_and_again_in_every_phase_ends_byte_identical(tmp_path, whole):
    """kill -9 as soon as each of these lines appears."""
    moments = ["warmup_step", "step:2/", "step:7/", "step:12/24 val", "step:20/", "swa:", "export model_bytes", "evaluating", "no_adaptation"]
    kills = 0
    for text in moments:
        life = runs.Run(tmp_path, RESUME=1, **LONG)
        life.until(text)
        life.kill()
        kills += life.wait() == 128 + signal.SIGKILL  # on a busy machine it may have ended just before
    last = runs.run(tmp_path, RESUME=1, **LONG)
    assert same_end(last, whole) and last.result["training"]["resumed"] is True and kills >= 6
    print(f"figure: kills survived: {kills} of {kills}")


@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_killed_at_random_moments_ends_byte_identical(tmp_path, whole, seed):
    rng, kills = random.Random(seed), 0
    for _ in range(7):
        life = runs.Run(tmp_path, RESUME=1, **LONG)
        time.sleep(rng.uniform(0.05, 0.8))
        life.kill()
        kills += life.wait() == 128 + signal.SIGKILL
    assert same_end(runs.run(tmp_path, RESUME=1, **LONG), whole) and kills
    print(f"figure: kills survived: {kills} of {kills}")


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_writes_a_checkpoint_and_says_how_to_go_on(tmp_path, whole, number, code):
    settings = LONG | dict(CHECKPOINT_EVERY=0)
    stopped = runs.Run(tmp_path, **settings)
    stopped.until("step:5/24 train")
    stopped.kill(number)
    assert stopped.wait() == code
    (line,) = stopped.err.splitlines()[-1:]
    assert signal.Signals(number).name in line and "RESUME=1" in line and "Traceback" not in stopped.err
    assert (tmp_path / "checkpoint.pt").exists() and not (tmp_path / "final_model.ptz").exists()
    again = runs.run(tmp_path, RESUME=1, **settings)
    assert same_end(again, whole) and "step:4/24 train" not in again.out


def test_resume_without_a_checkpoint_starts_afresh(tmp_path):
    done = runs.run(tmp_path, RESUME=1)
    assert done.result["training"]["steps"] == 12 and done.result["training"]["resumed"] is False


def test_a_checkpoint_of_another_setting_is_refused_naming_it(tmp_path, whole):
    shutil.copy(whole.folder / "checkpoint.pt", tmp_path)
    done = runs.run(tmp_path, 2, RESUME=1, **LONG | dict(MATRIX_LR=0.0123))
    assert "MATRIX_LR" in (message := runs.user_error(done.err)) and "0.0123" in message and "0.02" in message


def change_the_source() -> None:
    changed = Path(os.environ["OUTPUT_DIR"], "changed.py")
    changed.write_bytes(train_gpt.SOURCE.read_bytes() + b"\n")
    train_gpt.SOURCE = changed


def test_a_checkpoint_of_another_source_or_other_data_is_refused(tmp_path, whole):
    (tmp_path / "data").mkdir()
    for path in [*runs.data().glob("fineweb_val_*"), *runs.data().glob("fineweb_train_000000.bin")]:
        (tmp_path / "data" / path.name).symlink_to(path)
    cases = dict(SOURCE=dict(before=change_the_source), DATA=dict(DATA_PATH=tmp_path / "data"))
    started = {}
    for name, changes in cases.items():
        (tmp_path / name).mkdir()
        shutil.copy(whole.folder / "checkpoint.pt", tmp_path / name)
        started[name] = runs.Run(tmp_path / name, RESUME=1, **LONG | changes)
    for name, process in started.items():
        assert process.wait() == 2 and f"another {name}" in runs.user_error(process.err)


def test_a_checkpoint_goes_on_under_settings_that_do_not_change_the_weights(tmp_path, whole):
    shutil.copy(whole.folder / "checkpoint.pt", tmp_path)
    done = runs.run(tmp_path, RESUME=1, **LONG | dict(VAL_LOSS_EVERY=5, CHECKPOINT_EVERY=1, TTT_N_EPOCHS=1, TRAIN_LOG_EVERY=7))
    assert done.artifact == whole.artifact


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_damaged_or_hostile_checkpoint_is_an_error_and_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(identity={}, step=Payload()), path := tmp_path / "checkpoint.pt")
    hostile = path.read_bytes()
    torch.save(dict(identity={}, step=1), path)
    good = path.read_bytes()
    for content in (hostile, b"", b"\x80\x02.", b"text", *(good[:n] for n in range(1, len(good), len(good) // 30))):
        path.write_bytes(content)
        with pytest.raises(UserError, match="damaged .* — "):
            train_gpt.load_checkpoint(path, {})
    assert not Path("executed").exists()


def test_a_checkpoint_of_two_ranks_goes_on_with_one(tmp_path):
    settings = LONG | dict(MATRIX_LR=0.005, SCALAR_LR=0.005, TIED_EMBED_LR=0.005, TTT_ENABLED=0)
    two = runs.ranks(tmp_path / "stopped", **settings)
    two[0].until("step:4/")
    two[1].kill(signal.SIGTERM)  # only one of the ranks is told
    one = runs.run(tmp_path / "whole", **settings)
    assert [process.wait() for process in two] == [143, 143]
    again = runs.run(tmp_path / "stopped", RESUME=1, **settings)
    a, b = ([float(x) for x in re.findall(r"train_loss:(\S+)", run.out)] for run in (one, again))
    assert 0 < len(b) < 20 and np.allclose(a[-len(b) :], b, rtol=0, atol=1e-4)


def test_time_lost_since_the_checkpoint_is_not_counted(tmp_path):
    settings = dict(ITERATIONS=100_000, MAX_WALLCLOCK_SECONDS=0.6, CHECKPOINT_EVERY=5, TRAIN_LOG_EVERY=1, VAL_LOSS_EVERY=0, TTT_ENABLED=0)
    first = runs.Run(tmp_path, RESUME=1, **settings)
    first.until("step:13/")
    first.kill()
    first.wait()
    times = lambda run: {int(s): int(t) for s, t in re.findall(r"step:(\d+)/\d+ train_loss:\S+ train_time:(\d+)ms", run.out)}
    before = times(first)
    second = runs.run(tmp_path, RESUME=1, **settings)
    start = int(re.search(r"resumed from .* at step (\d+)", second.out)[1])
    after = times(second)
    assert start % 5 == 0 and before[start] <= after[start + 1] <= before[start] + 600
    assert after[max(after) - 1] < 600 <= after[max(after)] + 1 and second.result["training"]["resumed"] is True


# ---- An interrupted evaluation


def sigterm_in_the_second_batch() -> None:
    report_documents()
    adapt, calls = train_gpt.DocumentBatch.adapt, []

    def counted(batch, *arguments):
        calls.append(batch)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return adapt(batch, *arguments)

    train_gpt.DocumentBatch.adapt = counted


def report_documents() -> None:
    adapt = train_gpt.DocumentBatch.adapt
    train_gpt.DocumentBatch.adapt = lambda batch, *rest: print("adapting", *batch.documents, flush=True) or adapt(batch, *rest)


def test_an_interrupted_evaluation_goes_on_with_the_finished_documents_and_does_not_redo_them(tmp_path, whole):
    settings = dict(EVAL_ONLY=whole.folder / "final_model.ptz", TTT_N_EPOCHS=4)
    stopped = runs.run(tmp_path, 143, before=sigterm_in_the_second_batch, **settings)
    assert "RESUME=1" in stopped.err.splitlines()[-1]
    adapted = lambda run: [line.split()[1:] for line in run.lines if line.startswith("adapting")]
    first = adapted(stopped)
    again = runs.run(tmp_path, RESUME=1, before=report_documents, **settings)
    second = adapted(again)
    assert len(first) == 2 and len(second) == 2  # of three batches, the one in work was begun again
    assert sorted(map(int, sum(first[:1] + second, []))) == list(range(len(runs.LENGTHS)))
    assert again.lines[-1] == whole.lines[-1] and again.figures("ttt_epoch") == whole.figures("ttt_epoch")


def test_a_damaged_progress_file_only_costs_the_progress(tmp_path):
    results = train_gpt.Results(1, 3, tmp_path / "progress.npz", "same")
    results.done[:] = True
    results.save(1.0)
    good = results.path.read_bytes()
    flipped = [good[:i] + bytes([good[i] ^ 0xFF]) + good[i + 1 :] for i in range(len(good))]
    for damaged in [*flipped, *(good[:i] for i in range(0, len(good), 50))]:
        results.path.write_bytes(damaged)
        again = train_gpt.Results(1, 3, results.path, "same")
        again.load()
        assert again.nll.shape == (2, 3) and again.done.dtype == bool


@pytest.mark.parametrize("ttt", [0, 1])
def test_a_signal_ends_either_evaluation_before_its_end(tmp_path, whole, ttt):
    slow = dict(EVAL_STRIDE=1, EVAL_BATCH_SEQS=1, TTT_N_EPOCHS=2000, TTT_BATCH_SIZE=1)
    stopped = runs.Run(tmp_path, EVAL_ONLY=whole.folder / "final_model.ptz", TTT_ENABLED=ttt, **slow)
    stopped.until("evaluating")
    stopped.kill(signal.SIGTERM)
    assert stopped.wait(20) == 143 and "RESUME=1" in stopped.err


# ---- Budgets


def save_weights_by_rank() -> None:
    train = train_gpt.train

    def then_save(model, optimizer, *arguments):
        account = train(model, optimizer, *arguments)
        torch.save(optimizer.weights, f"{os.environ['OUTPUT_DIR']}/weights.{os.environ['RANK']}")
        return account

    train_gpt.train = then_save


def test_under_a_wall_clock_cap_ranks_stop_in_time_and_with_equal_weights(tmp_path):
    settings = dict(ITERATIONS=100_000, MAX_WALLCLOCK_SECONDS=0.7, WARMDOWN_ITERS=20, TRAIN_LOG_EVERY=1, VAL_LOSS_EVERY=0, TTT_N_EPOCHS=1)
    processes = runs.ranks(tmp_path, before=save_weights_by_rank, **settings)
    assert [process.wait() for process in processes] == [0, 0], processes[0].err
    times = [int(t) for t in re.findall(r"train_loss:\S+ train_time:(\d+)ms", processes[0].out)]
    assert times[-2] < 700 <= times[-1] + 1  # the step during which the time ran out was the last
    one, two = (torch.load(tmp_path / f"weights.{rank}") for rank in (0, 1))
    assert torch.equal(one, two) and one.norm() > 0
    print(f"figure: training overran its budget by {times[-1] - 700} ms, a step took {times[-1] / len(times):.0f} ms")


def test_an_evaluation_budget_of_a_second_still_scores_every_target_and_names_what_is_unfinished(tmp_path, whole):
    done = runs.run(tmp_path, EVAL_ONLY=whole.folder / "final_model.ptz", EVAL_MAX_SECONDS=1, TTT_N_EPOCHS=200, TTT_BATCH_SIZE=2)
    figures = done.result["evaluation"]
    left = figures["unfinished_documents"]
    assert left and all(str(document) in re.search(r"scored_without_adaptation:\d+ \[(.*?)\]", done.out)[1] for document in left)
    assert len(figures["curve"]) == 200 and {row["targets"] for row in figures["curve"]} == {sum(runs.LENGTHS) - 1}
    kept = np.load(tmp_path / "ttt_documents.npz")
    assert (kept["nll_per_epoch"][:, left] == kept["nll_no_adaptation"][left]).all()
    assert figures["within_budget"] is (figures["seconds"] <= 1)
    print(f"figure: evaluation took {figures['seconds']:.3f} s of 1 s")


def test_when_the_plain_pass_alone_exceeds_the_budget_it_completes(tmp_path, whole):
    done = runs.run(tmp_path, EVAL_ONLY=whole.folder / "final_model.ptz", EVAL_MAX_SECONDS=0.001)
    figures = done.result["evaluation"]
    assert figures["within_budget"] is False and figures["unfinished_documents"] == list(range(len(runs.LENGTHS)))
    assert figures["backward_looking"]["val_bpb"] == figures["last_epoch"]["val_bpb"] == figures["no_adaptation"]["val_bpb"]


def test_too_small_a_cap_prunes_the_smallest_fraction_that_fits():
    s, code = runs.micro(BIGRAM_VOCAB_SIZE=3000, BIGRAM_DIM=24), train_gpt.SOURCE.stat().st_size
    torch.manual_seed(0)
    state = {name: torch.randn_like(weight) for name, weight in train_gpt.GPT(s).state_dict().items()}
    size = lambda fraction: len(train_gpt.pack(state, train_gpt.model_config(s), fraction)[0])
    sizes = {k / 200: size(k / 200) for k in (6, 13, 14, 15)}
    assert sizes[0.03] > sizes[0.065] > sizes[0.07] > sizes[0.075]
    _, account = train_gpt.export(state, replace(s, artifact_max_bytes=code + sizes[0.07]), quiet)
    assert account["prune_fraction"] == 0.07 and account["fits"] and account["model_bytes"] == sizes[0.07]
    _, account = train_gpt.export(state, replace(s, artifact_max_bytes=code + sizes[0.03]), quiet)
    assert account["prune_fraction"] == 0.03 and account["fits"]


def test_an_impossible_cap_ends_with_code_3_everything_written_and_the_overshoot_in_bytes(tmp_path):
    done = runs.run(tmp_path, 3, ARTIFACT_MAX_BYTES=1000)
    account = done.result["artifact"]
    assert account["fits"] is False and account["prune_fraction"] == 0.15
    assert f"{account['total_bytes'] - 1000} bytes over" in done.out
    assert done.lines[-1].startswith("final_int8_zlib_roundtrip_exact")
    assert all((tmp_path / name).exists() for name in ("final_model.pt", "final_model.ptz", "ttt_documents.npz"))


# ---- Dead ranks, full disks, diverging training


def raise_on_rank_1() -> None:
    def step(self, number, multiplier, inner=train_gpt.Optimizer.step):
        if self.run.rank == 1 and number == 6:
            raise RuntimeError("the planted fault")
        return inner(self, number, multiplier)

    train_gpt.Optimizer.step = step


def test_a_rank_that_raises_ends_the_others_within_seconds_with_the_cause(tmp_path):
    processes = runs.ranks(tmp_path, before=raise_on_rank_1)
    began = time.monotonic()
    assert 0 not in [process.wait(20) for process in processes]
    assert time.monotonic() - began < 15
    assert processes[1].err.splitlines()[-1] == "RuntimeError: the planted fault"


@pytest.mark.parametrize("phase", ["step:5/24 train", "evaluating"])
def test_a_rank_killed_ends_the_others_within_seconds(tmp_path, phase):
    processes = runs.ranks(tmp_path, **LONG | dict(TTT_N_EPOCHS=60))
    processes[0].until(phase)
    processes[1].kill()
    began = time.monotonic()
    assert processes[0].wait(20) not in (0, 2) and time.monotonic() - began < 15
    assert re.search("gloo|closed|reset", processes[0].err.lower())


def test_writing_to_a_full_disk_leaves_the_old_file_and_a_clear_line(tmp_path):
    path = tmp_path / "file"
    train_gpt.write_whole(path, lambda f: f.write(b"old"))

    def half(f):
        f.write(b"new" * 99999)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match="cannot write .*file: No space left on device — "):
        train_gpt.write_whole(path, half)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


FILES = "checkpoint.pt.tmp final_model.pt.tmp final_model.ptz.tmp ttt_documents.npz.tmp result.json.tmp train.log".split()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("name", FILES)
def test_a_full_disk_under_any_file_of_a_run_is_one_line_and_code_2(tmp_path, name):
    (tmp_path / name).symlink_to("/dev/full")
    done = runs.run(tmp_path, 2, CHECKPOINT_EVERY=2, TTT_N_EPOCHS=1)
    message = runs.user_error(done.err)
    assert name.removesuffix(".tmp") in message and "No space left" in message and "Traceback" not in done.err


def nan_at_step_7() -> None:
    def step(self, number, multiplier, inner=train_gpt.Optimizer.step):
        if number == 7 and self.run.rank == self.run.world - 1:
            self.grads[3] = float("nan")
        return inner(self, number, multiplier)

    train_gpt.Optimizer.step = step


def test_a_gradient_that_is_not_finite_stops_training_with_step_lr_and_batch(tmp_path, whole):
    done = runs.run(tmp_path, 2, before=nan_at_step_7, **LONG | dict(WARMDOWN_ITERS=20))
    message = runs.user_error(done.err)
    assert "step 7 " in message and "nan" in message and f"token {7 * 256}" in message
    assert re.search(r"\blr multiplier 0.85", message)  # (24 - 7) / 20
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 6


def test_training_that_diverged_goes_on_from_the_last_good_checkpoint(tmp_path, whole):
    runs.run(tmp_path, 2, before=nan_at_step_7, **LONG)
    again = runs.run(tmp_path, RESUME=1, **LONG)
    assert "at step 6" in again.out and same_end(again, whole)


def test_a_gradient_that_is_not_finite_on_one_rank_stops_all_with_the_same_error(tmp_path):
    processes = runs.ranks(tmp_path, before=nan_at_step_7, **LONG)
    assert [process.wait() for process in processes] == [2, 2]
    assert runs.user_error(processes[0].err) == runs.user_error(processes[1].err)


def test_a_learning_rate_far_too_large_is_an_error_not_an_artifact_of_nan(tmp_path):
    done = runs.run(tmp_path, 2, MATRIX_LR=1e30, SCALAR_LR=1e30)
    assert "lower the learning rates" in runs.user_error(done.err) and not (tmp_path / "final_model.ptz").exists()
