"""Nothing lost: kills, signals, budgets, full disks, dead ranks and diverging training."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import runs
from runs import train_gpt

UserError = train_gpt.UserError
LONG = dict(ITERATIONS=24, WARMDOWN_ITERS=16, CHECKPOINT_EVERY=3, TRAIN_LOG_EVERY=1, VAL_LOSS_EVERY=12, TTT_N_EPOCHS=4)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> runs.Run:
    """The run that nobody interrupts."""
    return runs.run(tmp_path_factory.mktemp("whole"), **LONG)


@pytest.fixture
def alone(monkeypatch, tmp_path) -> train_gpt.Run:
    """A Run of this process, into `tmp_path`, that leaves its signal handlers alone."""
    monkeypatch.setattr(train_gpt.signal, "signal", lambda *_: None)
    run = train_gpt.Run(runs.micro())
    run.output = tmp_path
    return run


def same_end(one: runs.Run, other: runs.Run) -> bool:
    return one.artifact == other.artifact and one.lines[-1] == other.lines[-1]


# ---- Resume


def test_a_run_killed_again_and_again_in_every_phase_ends_byte_identical(tmp_path, whole):
    """kill -9 as soon as each of these lines appears."""
    moments = [
        "model parameters",
        "warmup_step",
        "preflight training",
        "step:2/",
        "step:7/",
        "step:12/24 val",
        "step:20/",
    ]
    moments += ["swa:", "export model_bytes", "evaluating", "no_adaptation"]
    kills = 0
    for text in moments:
        life = runs.Run(tmp_path, RESUME=1, **LONG)
        life.until(text)
        life.kill()
        kills += life.wait() == 128 + signal.SIGKILL  # on a busy machine it may have ended just before
    last = runs.run(tmp_path, RESUME=1, **LONG)
    assert same_end(last, whole) and last.result["training"]["resumed"] is True and kills >= 8
    assert not list(tmp_path.glob("*preflight*")) and not list(tmp_path.glob("*progress*"))
    print(f"figure: kills survived: {kills} of {kills}")


@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_killed_at_random_moments_ends_byte_identical(tmp_path, whole, seed):
    rng, kills = random.Random(seed), 0
    for _ in range(7):
        life = runs.Run(tmp_path, RESUME=1, **LONG)
        time.sleep(rng.uniform(0.05, 0.4))
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
    train_gpt.SOURCE_SHA256 = hashlib.sha256(train_gpt.SOURCE_BYTES + b"\n").hexdigest()


def test_a_checkpoint_of_another_source_or_other_data_is_refused(tmp_path, whole):
    """Other data: a shard less, and shards of the same sizes of which one token differs."""
    for folder in ("fewer", "other"):
        (tmp_path / folder).mkdir()
        for path in [*runs.data().glob("fineweb_val_*"), *runs.data().glob("fineweb_train_000000.bin")]:
            (tmp_path / folder / path.name).symlink_to(path)
    tokens = train_gpt.open_shard(runs.data() / "fineweb_train_000001.bin").copy()
    tokens[7] += 1
    runs.write_shard(tmp_path / "other" / "fineweb_train_000001.bin", tokens)
    cases = dict(one=("SOURCE", dict(before=change_the_source)))
    cases |= {folder: ("DATA", dict(DATA_PATH=tmp_path / folder)) for folder in ("fewer", "other")}
    started = {}
    for case, (_, changes) in cases.items():
        (tmp_path / "runs" / case).mkdir(parents=True)
        shutil.copy(whole.folder / "checkpoint.pt", tmp_path / "runs" / case)
        started[case] = runs.Run(tmp_path / "runs" / case, RESUME=1, **LONG | changes)
    for case, process in started.items():
        assert process.wait() == 2 and f"another {cases[case][0]}" in runs.user_error(process.err)


def test_a_checkpoint_goes_on_under_settings_that_do_not_change_the_weights(tmp_path, whole):
    shutil.copy(whole.folder / "checkpoint.pt", tmp_path)
    changes = dict(VAL_LOSS_EVERY=5, CHECKPOINT_EVERY=1, TTT_N_EPOCHS=1, TRAIN_LOG_EVERY=7, WARMUP_STEPS=2)
    done = runs.run(tmp_path, RESUME=1, **LONG | changes)
    assert done.artifact == whole.artifact
    done = runs.run(tmp_path, RESUME=1, **LONG | dict(PRUNE_FRACTION=0.1, FP16_KEEP_NAME_PATTERNS="smear"))
    assert done.result["settings"]["prune_fraction"] == 0.1 and done.result["training"]["resumed"] is True


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_damaged_or_hostile_checkpoint_is_an_error_and_runs_no_code(tmp_path, monkeypatch, alone, whole):
    monkeypatch.chdir(tmp_path)
    alone = alone.using(data_path=str(runs.data()))
    trainer = train_gpt.Trainer(train_gpt.open_shards("train", alone), alone)
    torch.save(dict(identity={}, step=Payload()), path := tmp_path / "checkpoint.pt")
    hostile = path.read_bytes()
    trainer.save(alone)
    good = path.read_bytes()
    state = torch.load(path, weights_only=True)
    trainer.resume(path)
    contents = [hostile, b"", b"\x80\x02.", b"text", *(good[:n] for n in range(1, len(good), len(good) // 30))]
    strange = dict(average=torch.zeros(3), step="many", averaged=[], m=None, identity=5)
    for name, value in strange.items():
        for changed in (state | {name: value}, {key: each for key, each in state.items() if key != name}):
            torch.save(changed, path)
            contents.append(path.read_bytes())
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(UserError, match="damaged .* — "):
            trainer.resume(path)
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


def ended_in_time(times: dict[int, int], cap: int) -> bool:
    """Whether training with these milliseconds after each step ended just before a mean step would pass the cap."""
    last = max(times)
    one_more = {step: times[step] * (1 + 1 / step) for step in (last - 1, last)}
    return one_more[last - 1] <= cap + 2 and cap <= one_more[last] + 2  # times are rounded


def test_time_lost_since_the_checkpoint_is_not_counted(tmp_path):
    settings = dict(ITERATIONS=100_000, MAX_WALLCLOCK_SECONDS=0.6, CHECKPOINT_EVERY=5, TRAIN_LOG_EVERY=1)
    settings |= dict(VAL_LOSS_EVERY=0, TTT_ENABLED=0, QUANTIZER="nearest")
    first = runs.Run(tmp_path, RESUME=1, **settings)
    first.until("step:13/")
    first.kill()
    first.wait()

    def times(run: runs.Run) -> dict[int, int]:
        found = re.findall(r"step:(\d+)/\d+ train_loss:\S+ train_time:(\d+)ms", run.out)
        return {int(step): int(milliseconds) for step, milliseconds in found}

    before = times(first)
    second = runs.run(tmp_path, RESUME=1, **settings)
    start = int(re.search(r"resumed from .* at step (\d+)", second.out)[1])
    after = times(second)
    assert start % 5 == 0 and before[start] <= after[start + 1] <= before[start] + 600
    assert ended_in_time(after, 600) and second.result["training"]["resumed"] is True


# ---- An interrupted evaluation


def report_documents() -> None:
    """Print which documents are adapted, but for the preflight's."""
    adapt = train_gpt.DocumentBatch.adapt

    def reported(batch):
        if not batch.run.rehearsing:
            print("adapting", *batch.documents, flush=True)
        return adapt(batch)

    train_gpt.DocumentBatch.adapt = reported


def sigterm_in_the_second_batch() -> None:
    report_documents()
    adapt, calls = train_gpt.DocumentBatch.adapt, []

    def counted(batch):
        calls.extend([batch] * (not batch.run.rehearsing))
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return adapt(batch)

    train_gpt.DocumentBatch.adapt = counted


def adapted(run: runs.Run) -> list[list[int]]:
    return [[int(x) for x in line.split()[1:]] for line in run.lines if line.startswith("adapting")]


def test_an_interrupted_evaluation_goes_on_with_the_finished_documents_and_does_not_redo_them(tmp_path, whole):
    settings = dict(EVAL_ONLY=whole.folder / "final_model.ptz", TTT_N_EPOCHS=4)
    stopped = runs.run(tmp_path, 143, before=sigterm_in_the_second_batch, **settings)
    assert "RESUME=1" in stopped.err.splitlines()[-1] and not (tmp_path / "result.json").exists()
    first = adapted(stopped)
    again = runs.run(tmp_path, RESUME=1, before=report_documents, **settings)
    second = adapted(again)
    assert len(first) == 2 and len(second) == 2  # of three batches, the one in work was begun again
    assert sorted(sum(first[:1] + second, [])) == list(range(len(runs.LENGTHS)))
    assert again.lines[-1] == whole.lines[-1] and again.figures("ttt_epoch") == whole.figures("ttt_epoch")
    report, first_session = again.result["evaluation"], float(re.findall(r"after (\S+) s", again.out)[0])
    assert report["seconds"] > first_session > report["no_adaptation"]["seconds"] > 0
    assert report["backward_looking"]["seconds"] > first_session - report["no_adaptation"]["seconds"]
    assert not list(tmp_path.glob("ttt_progress*"))


def die_with_the_result_still_to_write() -> None:
    def finish(result, tag, run, inner=train_gpt.finish):
        if not run.rehearsing:
            os._exit(9)
        inner(result, tag, run)

    train_gpt.finish = finish


def test_progress_stays_until_the_result_is_on_the_disk(tmp_path, whole):
    settings = dict(EVAL_ONLY=whole.folder / "final_model.ptz", TTT_N_EPOCHS=4)
    runs.run(tmp_path, 9, before=die_with_the_result_still_to_write, **settings)
    assert len(list(tmp_path.glob("ttt_progress*"))) == 1
    again = runs.run(tmp_path, RESUME=1, before=report_documents, **settings)
    assert not adapted(again) and again.lines[-1] == whole.lines[-1]


def test_progress_is_there_at_once_for_any_rank_and_a_damaged_file_only_costs_the_progress(alone):
    run = alone.using(resume=True, ttt_n_epochs=1)
    stream = train_gpt.synthetic_stream([3, 2, 1], run)

    def opened():
        return train_gpt.Results(stream, run, "tag", time.perf_counter())

    results = opened()
    assert np.isnan(results.nll).all() and results.nll.shape == (2, 3)
    results.add(slice(0, None), np.array([2, 0]), np.arange(4.0).reshape(2, 2))
    other = opened()  # another rank, or after a kill -9
    other.add(
        slice(0, None), np.array([0, 1]), np.array([[7.0, 8], [np.nan, np.nan]])
    )  # what is known is never replaced
    other.add(slice(1, None), np.array([1]), np.array([[9.0]]))
    for seen in (results, other, opened()):
        assert seen.nll.tolist() == [[1, 8, 0], [3, 9, 2]]
    (path,) = run.output.glob("ttt_progress*")
    good = path.read_bytes()
    for damaged in (
        b"",
        good[:50],
        good[:-8],
        b"x" + good[1:],
        good.replace(b"(2, 4)", b"(4, 2)"),
        good.replace(b"<f8", b">f8"),
        b"PK\3\4" + good[4:],
        good[:100] + b"(" + good[101:],
        good[:-8] + np.float64(-5).tobytes(),
        good[:-40] + np.float64(-5).tobytes() + good[-32:],
    ):
        path.unlink()  # the old one is still mapped
        path.write_bytes(damaged)
        assert np.isnan(opened().nll).all()
    path.unlink()
    path.write_bytes(good)
    assert opened().nll.tolist() == results.nll.tolist()
    assert np.isnan(train_gpt.Results(stream, run.using(resume=False), "tag", 0.0).nll).all()


@pytest.mark.parametrize("ttt", [0, 1])
def test_a_signal_ends_either_evaluation_before_its_end(tmp_path, whole, ttt):
    slow = dict(EVAL_STRIDE=1, EVAL_BATCH_SEQS=1, TTT_N_EPOCHS=2000, TTT_BATCH_SIZE=1)
    stopped = runs.Run(tmp_path, EVAL_ONLY=whole.folder / "final_model.ptz", TTT_ENABLED=ttt, **slow)
    stopped.until("evaluating")
    stopped.kill(signal.SIGTERM)
    assert stopped.wait(20) == 143 and "RESUME=1" in stopped.err


# ---- Budgets


def save_weights_by_rank() -> None:
    train = train_gpt.Trainer.train

    def then_save(trainer, stream):
        hessians = train(trainer, stream)
        torch.save(trainer.optimizer.weights, f"{os.environ['OUTPUT_DIR']}/weights.{os.environ['RANK']}")
        return hessians

    train_gpt.Trainer.train = then_save


def test_under_a_wall_clock_cap_ranks_stop_in_time_and_with_equal_weights(tmp_path):
    settings = dict(ITERATIONS=100_000, MAX_WALLCLOCK_SECONDS=0.7, WARMDOWN_ITERS=20, TRAIN_LOG_EVERY=1)
    settings |= dict(VAL_LOSS_EVERY=0, TTT_N_EPOCHS=1, QUANTIZER="nearest")
    processes = runs.ranks(tmp_path, before=save_weights_by_rank, **settings)
    assert [process.wait() for process in processes] == [0, 0], processes[0].err
    times = [int(t) for t in re.findall(r"train_loss:\S+ train_time:(\d+)ms", processes[0].out)]
    assert ended_in_time(dict(enumerate(times, 1)), 700)
    one, two = (torch.load(tmp_path / f"weights.{rank}") for rank in (0, 1))
    assert torch.equal(one, two) and one.norm() > 0
    print(f"figure: training left {700 - times[-1]} ms of its budget, a step took {times[-1] / len(times):.0f} ms")


def slow_calibration() -> None:
    """50 ms for every row of calibration; what the last call took is printed."""

    def calibrate(model, loader, start, tokens, run, inner=train_gpt.calibrate):
        rows = -(-tokens // run.s.train_seq_len)
        began = time.perf_counter()
        time.sleep(0.05 * -(-rows // run.world))
        hessians = inner(model, loader, start, tokens, run)
        print(f"calibration rows:{rows} seconds:{time.perf_counter() - began:.4f}", flush=True)
        return hessians

    train_gpt.calibrate = calibrate


SLOW = dict(ITERATIONS=100_000, WARMDOWN_ITERS=20, VAL_LOSS_EVERY=0, TTT_N_EPOCHS=1, CALIBRATION_TOKENS=8 * 32)


@pytest.mark.parametrize("world", [1, 2])
def test_training_and_calibration_together_do_not_pass_the_wall_clock_cap(tmp_path, world):
    processes = runs.ranks(tmp_path, world, before=slow_calibration, MAX_WALLCLOCK_SECONDS=1.6, **SLOW)
    assert [process.wait() for process in processes] == [0] * world, processes[0].err
    (calibration,) = processes[0].figures("calibration")[-1]
    assert "calibration rows:8 " in processes[0].out and calibration >= 0.4 / world
    training = processes[0].result["training"]["seconds"]
    assert training > 0.3 and training + calibration <= 1.6
    print(f"figure: training {training:.2f} s and calibration {calibration:.2f} s of 1.6 s")


def test_a_cap_that_leaves_no_time_to_train_is_one_line_before_step_0(tmp_path):
    done = runs.run(tmp_path, 2, before=slow_calibration, MAX_WALLCLOCK_SECONDS=0.4, **SLOW)
    message = runs.user_error(done.err)
    assert "calibration takes" in message and "MAX_WALLCLOCK_SECONDS=0.4" in message and "\nstep:" not in done.out
    assert "Traceback" not in done.err


def test_an_evaluation_budget_of_a_second_still_scores_every_target_and_counts_what_each_figure_lacks(tmp_path, whole):
    settings = dict(EVAL_MAX_SECONDS=1, TTT_N_EPOCHS=200, TTT_BATCH_SIZE=2)
    done = runs.run(tmp_path, EVAL_ONLY=whole.folder / "final_model.ptz", **settings)
    figures = done.result["evaluation"]
    lacking = [row["lacking"] for row in figures["curve"]]
    assert len(lacking) == 200 and lacking == sorted(lacking) and lacking[-1] > 0
    assert f"first_lacks:{lacking[0]} last_lacks:{lacking[-1]}" in done.out
    assert {row["targets"] for row in figures["curve"]} == {sum(runs.LENGTHS) - 1}
    kept = np.load(tmp_path / "ttt_documents.npz")
    for epoch, (nll, lacks) in enumerate(zip(kept["nll_per_epoch"], lacking, strict=True), 1):
        left = kept["figures_finished"] < epoch
        assert left.sum() == lacks and (nll[left] == kept["nll_no_adaptation"][left]).all()
    assert figures["within_budget"] is (figures["seconds"] <= 1)
    print(f"figure: evaluation took {figures['seconds']:.3f} s of 1 s")


def test_when_the_plain_pass_alone_exceeds_the_budget_it_completes(tmp_path, whole):
    done = runs.run(tmp_path, EVAL_ONLY=whole.folder / "final_model.ptz", EVAL_MAX_SECONDS=0.001)
    figures = done.result["evaluation"]
    assert figures["within_budget"] is False
    assert [row["lacking"] for row in figures["curve"]] == [len(runs.LENGTHS)] * 3
    assert {row["val_bpb"] for row in figures["curve"]} == {figures["no_adaptation"]["val_bpb"]}


def test_too_small_a_cap_stretches_the_steps_no_more_than_it_must(alone):
    run = alone.using(bigram_vocab_size=3000, bigram_dim=24)
    torch.manual_seed(0)
    state = {name: torch.randn_like(weight) for name, weight in train_gpt.GPT(run.s).state_dict().items()}
    code = len(train_gpt.SOURCE_BYTES)

    def size(stretch: float) -> int:
        return len(train_gpt.pack(train_gpt.quantize_model(state, run.s, {}, stretch), run.s)[0])

    def exported(cap: int) -> dict:
        account = train_gpt.export(state, {}, run.using(artifact_max_bytes=cap))
        assert account["fits"] is True and account["total_bytes"] == code + account["model_bytes"] <= cap
        assert account["model_bytes"] == (run.output / "final_model.ptz").stat().st_size == size(account["stretch"])
        return account

    sizes = [size(stretch) for stretch in (1, 1.5, 2, 4, 8)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 1.5 * sizes[-1]
    assert exported(code + sizes[0])["stretch"] == 1
    for stretch, cap in ((1.5, code + sizes[1]), (4, code + sizes[3]), (8, code + sizes[4])):
        account = exported(cap)
        assert abs(account["stretch"] - stretch) < 0.5 and 0.995 * cap <= account["total_bytes"]
    assert 1 < exported(code + sizes[0] - 1)["stretch"] < 1.1


def test_an_impossible_cap_ends_with_code_3_everything_written_and_the_overshoot_in_bytes(tmp_path):
    done = runs.run(tmp_path, 3, ARTIFACT_MAX_BYTES=1000)
    account = done.result["artifact"]
    assert account["fits"] is False and account["stretch"] == train_gpt.LARGEST_STRETCH
    assert f"{1000 - account['total_bytes']} bytes free of ARTIFACT_MAX_BYTES=1000" in done.out
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


def test_a_rank_killed_in_training_ends_the_others_within_seconds(tmp_path):
    processes = runs.ranks(tmp_path, **LONG | dict(ITERATIONS=100_000))
    processes[0].until("step:5/100000 train")
    processes[1].kill()
    began = time.monotonic()
    assert processes[0].wait(20) not in (0, 2) and time.monotonic() - began < 15
    assert re.search("gloo|closed|reset", processes[0].err.lower())


def test_a_rank_killed_in_the_evaluation_ends_the_job_within_seconds_and_what_is_done_is_kept(tmp_path, whole):
    """Under torchrun, whose part it is to notice: ranks say nothing to each other, and minutes of work are left."""
    settings = dict(EVAL_ONLY=whole.folder / "final_model.ptz", TTT_N_EPOCHS=1000, TTT_BATCH_SIZE=1)
    env = dict(PATH="/usr/bin:/bin", OMP_NUM_THREADS="1") | runs.environment(tmp_path, **settings)
    typed = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with open(tmp_path / "console", "w") as console:
        job = subprocess.Popen([*typed, str(runs.ROOT / "train_gpt.py")], env=env, stdout=console, stderr=console)
    deadline = time.monotonic() + 60
    while not (kept := list(tmp_path.glob("ttt_progress*"))) or np.isnan(np.load(kept[0])[0, :-1]).any():
        assert time.monotonic() < deadline and job.poll() is None, (tmp_path / "console").read_text()[-2000:]
        time.sleep(0.1)
    children = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    began = time.monotonic()
    assert job.wait(40) == 1 and time.monotonic() - began < 25
    assert "stopped by SIGTERM" in (tmp_path / "console").read_text()
    again = runs.run(tmp_path / "again", **settings | dict(TTT_N_EPOCHS=1))
    assert (
        np.load(kept[0])[0, :-1].tolist() == np.load(again.folder / "ttt_documents.npz")["nll_no_adaptation"].tolist()
    )


def test_writing_to_a_full_disk_leaves_the_old_file_and_a_clear_line(tmp_path, alone):
    alone.write("file", lambda f: f.write(b"old"))
    path = tmp_path / "file"

    def half(f):
        f.write(b"new" * 99999)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError) as caught:
        alone.write("file", half)
    line = train_gpt.user_line(caught.value)
    assert line == f"cannot use {path}: No space left on device — check the path, its permissions and the free space"
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(UserError, match="No space left on device — "):
        alone.together(lambda: alone.write("file", half))


def fill_the_disk_after_the_preflight() -> None:
    def full(*arguments, inner=train_gpt.preflight):
        seconds = inner(*arguments)
        Path(os.environ["OUTPUT_DIR"], os.environ["FULL"]).symlink_to("/dev/full")
        return seconds

    train_gpt.preflight = full


needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")


@needs_full
@pytest.mark.parametrize("name", [name for name in train_gpt.FILES if name != "train.log"])
def test_a_disk_that_fills_up_under_any_file_of_a_run_is_one_line_and_code_2(tmp_path, name):
    before = fill_the_disk_after_the_preflight
    done = runs.run(tmp_path, 2, before=before, FULL=f"{name}.tmp", CHECKPOINT_EVERY=2, TTT_N_EPOCHS=1)
    message = runs.user_error(done.err)
    assert f"{tmp_path / name}: No space left" in message and "Traceback" not in done.err


@needs_full
def test_a_log_that_cannot_be_written_is_one_line_and_code_2(tmp_path):
    (tmp_path / "train.log").symlink_to("/dev/full")
    done = runs.run(tmp_path, 2)
    message = runs.user_error(done.err)
    assert f"{tmp_path / 'train.log'}: No space left" in message and "Traceback" not in done.err


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
