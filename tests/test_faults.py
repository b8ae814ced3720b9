"""Nothing lost: kills, signals, budgets, full disks, dead ranks and diverging training."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import runs
from runs import train_gpt

UserError = train_gpt.UserError
LONG = dict(ITERATIONS=24, WARMDOWN_ITERS=16, CHECKPOINT_EVERY=3, TRAIN_LOG_EVERY=1, VAL_LOSS_EVERY=12, TTT_ENABLED=0)

ADAPTED = dict(TTT_ENABLED=1, TTT_N_EPOCHS=20)  # for as long as it takes to be killed in between


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> runs.Run:
    """The run that nobody interrupts."""
    return runs.run(tmp_path_factory.mktemp("whole"), **LONG)


def same_end(one: runs.Run, other: runs.Run) -> bool:
    return one.artifact == other.artifact and one.lines[-1] == other.lines[-1]


# ---- Resume


def unfinished(folder: Path) -> runs.Run:
    """Goes on with a run; one that has ended just before it was killed makes its result again."""
    (folder / "result.json").unlink(missing_ok=True)
    return runs.Run(folder, RESUME=1, **LONG | ADAPTED)


@pytest.fixture(scope="module")
def adapted(whole, tmp_path_factory) -> runs.Run:
    """Its artifact, scored by test-time training."""
    return runs.run(tmp_path_factory.mktemp("adapted"), EVAL_ONLY=whole.folder / "final_model.ptz", **ADAPTED)


def same_model(one: runs.Run, whole: runs.Run, adapted: runs.Run) -> bool:
    """As one that nobody interrupted, to the last byte and digit."""
    return one.artifact == whole.artifact and one.lines[-1] == adapted.lines[-1]


def test_a_run_killed_again_and_again_in_every_phase_ends_byte_identical(tmp_path, whole, adapted):
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
        life = unfinished(tmp_path)
        life.until(text)
        life.kill()
        kills += life.wait() == 128 + signal.SIGKILL  # on a busy machine it may have ended just before
    last = unfinished(tmp_path)
    assert last.wait() == 0 and same_model(last, whole, adapted)
    assert last.result["training"]["resumed"] is True and kills >= 8
    assert not list(tmp_path.glob("*preflight*")) and not list(tmp_path.glob("scores*"))
    ends = [(row["stage"], row["ended"]) for row in last.result["sessions"]]
    assert ends[-2:] == [("training", "finished"), ("evaluation", "finished")]
    assert {("training", "killed"), ("evaluation", "killed")} <= {*ends}
    print(f"figure: kills survived: {kills} of {kills}")


@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_killed_at_random_moments_ends_byte_identical(tmp_path, whole, adapted, seed):
    rng, kills = random.Random(seed), 0
    for _ in range(7):
        life = unfinished(tmp_path)
        time.sleep(rng.uniform(0.05, 0.4))
        life.kill()
        kills += life.wait() == 128 + signal.SIGKILL
    last = unfinished(tmp_path)
    assert last.wait() == 0 and same_model(last, whole, adapted) and kills
    print(f"figure: kills survived: {kills} of {kills}")


@pytest.mark.parametrize(
    "number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)]
)
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


def test_the_line_that_a_signal_leaves_has_every_setting_of_the_run(tmp_path):
    """Values with spaces and quotes, too: a shell that reads it gives the settings that were given."""
    given = runs.environment(tmp_path, **LONG, RUN_ID="it's a run", FP16_KEEP_NAME_PATTERNS="tok_emb, smear")
    stopped = runs.Run(tmp_path, **given)
    stopped.until("step:2/24 train")
    stopped.kill(signal.SIGTERM)
    assert stopped.wait() == 143
    *variables, launcher, _ = shlex.split(stopped.err.splitlines()[-1].partition("go on with: ")[2])
    told = dict(variable.split("=", 1) for variable in variables)
    assert (
        launcher == train_gpt.python() and {name: told.get(name) for name in given} == given and told["RESUME"] == "1"
    )


def ignore_sighup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does


@pytest.mark.parametrize("launcher, code", [({}, 0), (dict(TORCHELASTIC_RUN_ID="one"), 129)])
def test_nohup_keeps_a_run_from_sighup_but_not_from_that_of_torchrun(tmp_path, launcher, code):
    """torchrun passes it on to all, and kills who does not end."""
    started = runs.Run(tmp_path, before=ignore_sighup, **LONG, **launcher)
    started.until("step:2/24 train")
    started.kill(signal.SIGHUP)
    assert started.wait() == code
    assert (tmp_path / "result.json").exists() == (code == 0) and ("SIGHUP" in started.err) == (code == 129)


def test_resume_without_a_checkpoint_starts_afresh_and_says_so(tmp_path):
    done = runs.run(tmp_path, RESUME=1, TTT_ENABLED=0)
    assert "this run starts afresh" in done.out
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
    tokens = train_gpt.open_shard(runs.data() / "fineweb_train_000001.bin")[:]
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
    changes = dict(VAL_LOSS_EVERY=5, CHECKPOINT_EVERY=1, EVAL_STRIDE=8, TRAIN_LOG_EVERY=7, WARMUP_STEPS=2)
    done = runs.run(tmp_path, RESUME=1, **LONG | changes)
    assert done.artifact == whole.artifact
    (tmp_path / "result.json").unlink()
    done = runs.run(tmp_path, RESUME=1, **LONG | dict(PRUNE_FRACTION=0.1, FP16_KEEP_NAME_PATTERNS="smear"))
    assert done.result["settings"]["prune_fraction"] == 0.1 and done.result["training"]["resumed"] is True


def cut_off_the_shards() -> None:
    """Once they are open and checked, as a full disk or another program may leave them."""
    train = train_gpt.Trainer.train

    def shortened(trainer, stream):
        for shard in trainer.loader.shards:
            os.truncate(shard.path, 1024 + 2 * 300)
        return train(trainer, stream)

    train_gpt.Trainer.train = shortened


def test_a_shard_that_is_cut_off_under_a_run_ends_it_with_a_line(tmp_path):
    """A memory-mapped one would end the process by SIGBUS, without a word."""
    data = tmp_path / "data"
    shutil.copytree(runs.data(), data)
    done = runs.run(tmp_path / "run", 2, before=cut_off_the_shards, DATA_PATH=data)
    message = runs.user_error(done.err)
    assert f"{data}/fineweb_train_00000" in message and "could not be read to its end any more" in message


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_damaged_or_hostile_checkpoint_is_an_error_and_runs_no_code(tmp_path, monkeypatch, whole):
    monkeypatch.chdir(tmp_path)
    alone = runs.alone(tmp_path)
    trainer = train_gpt.Trainer(train_gpt.open_shards("train", alone), "data", alone)
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
        with pytest.raises(UserError, match="damaged.* — "):
            trainer.resume(path)
    assert not Path("executed").exists()


def test_a_checkpoint_of_two_ranks_goes_on_with_one(tmp_path):
    settings = LONG | dict(MATRIX_LR=0.005, SCALAR_LR=0.005, TIED_EMBED_LR=0.005)
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
    settings = dict(ITERATIONS=100_000, MAX_WALLCLOCK_SECONDS=2, CHECKPOINT_EVERY=5, TRAIN_LOG_EVERY=1)
    settings |= dict(VAL_LOSS_EVERY=0, TTT_ENABLED=0, QUANTIZER="nearest")
    first = runs.Run(tmp_path, RESUME=1, **settings)
    first.until("step:8/")
    first.kill()
    first.wait()

    def times(run: runs.Run) -> dict[int, int]:
        found = re.findall(r"step:(\d+)/\d+ train_loss:\S+ train_time:(\d+)ms", run.out)
        return {int(step): int(milliseconds) for step, milliseconds in found}

    before = times(first)
    second = runs.run(tmp_path, RESUME=1, **settings)
    start = int(re.search(r"resumed from .* at step (\d+)", second.out)[1])
    after = times(second)
    assert start % 5 == 0 and before[start] <= after[start + 1] <= before[start] + 2000
    kept_last = max(after) % 5 == 0  # on a slow disk, the time that took ended the training
    assert (ended_in_time(after, 2000) or kept_last) and second.result["training"]["resumed"] is True


# ---- An interrupted evaluation


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
    settings |= dict(VAL_LOSS_EVERY=0, TTT_ENABLED=0, QUANTIZER="nearest")
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
        time.sleep(0.05 * -(-rows // run.ranks.world))
        hessians = inner(model, loader, start, tokens, run)
        print(f"calibration rows:{rows} seconds:{time.perf_counter() - began:.4f}", flush=True)
        return hessians

    train_gpt.calibrate = calibrate


SLOW = dict(ITERATIONS=100_000, WARMDOWN_ITERS=20, VAL_LOSS_EVERY=0, TTT_ENABLED=0, CALIBRATION_TOKENS=8 * 32)


@pytest.mark.parametrize("world", [1, 2])
def test_training_and_calibration_together_do_not_pass_the_wall_clock_cap(tmp_path, world):
    processes = runs.ranks(tmp_path, world, before=slow_calibration, MAX_WALLCLOCK_SECONDS=1.6, **SLOW)
    assert [process.wait() for process in processes] == [0] * world, processes[0].err
    calibration = float(re.findall(r"calibration rows:\d+ seconds:(\S+)", processes[0].out)[-1])
    assert "calibration rows:8 " in processes[0].out and calibration >= 0.4 / world
    training = processes[0].result["training"]["seconds"]
    assert training > 0.3 and training + calibration <= 1.6
    print(f"figure: training {training:.2f} s and calibration {calibration:.2f} s of 1.6 s")


def test_a_cap_that_leaves_no_time_to_train_is_one_line_before_step_0(tmp_path):
    done = runs.run(tmp_path, 2, before=slow_calibration, MAX_WALLCLOCK_SECONDS=0.4, **SLOW)
    message = runs.user_error(done.err)
    assert "calibration takes" in message and "MAX_WALLCLOCK_SECONDS=0.4" in message and "\nstep:" not in done.out
    assert "Traceback" not in done.err


def checkpoints_after_calibration() -> None:
    """A line for each rehearsal's and training's end."""

    def calibrate(*arguments, inner=train_gpt.calibrate):
        print("calibrated", flush=True)
        return inner(*arguments)

    def save(trainer, run, inner=train_gpt.Trainer.save):
        print("saved", flush=True)
        os.environ.get("STOP") and trainer.finished and os.kill(os.getpid(), signal.SIGTERM)
        inner(trainer, run)

    train_gpt.calibrate, train_gpt.Trainer.save = calibrate, save


def test_the_last_checkpoint_waits_until_training_data_have_been_read_and_a_signal_for_both(tmp_path, whole):
    """A disk takes its time outside the budget."""
    done = runs.run(tmp_path / "done", before=checkpoints_after_calibration, TTT_ENABLED=0)
    order = [line for line in done.lines if line in ("calibrated", "saved") or line.startswith(("step:12/", "swa:"))]
    assert order[-3:] == ["calibrated", "saved", next(line for line in order if line.startswith("swa:"))]
    training = done.result["training"]
    spent = training["seconds"] + training["calibration"]
    assert f"training and calibration took {spent:.0f}s\n" in done.out  # there is no limit
    stopped = runs.run(tmp_path / "stopped", 143, before=checkpoints_after_calibration, STOP=1, TTT_ENABLED=0)
    assert f"after step 12; its checkpoint is in {stopped.folder}" in stopped.err
    again = runs.run(stopped.folder, RESUME=1, TTT_ENABLED=0)
    assert again.artifact == done.artifact and again.lines[-1] == done.lines[-1]


def test_an_evaluation_budget_of_a_second_still_scores_every_target_and_counts_what_each_figure_lacks(tmp_path, whole):
    settings = dict(TTT_ENABLED=1, EVAL_MAX_SECONDS=1, TTT_N_EPOCHS=200, TTT_BATCH_SIZE=2)
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
    settings = dict(TTT_ENABLED=1, EVAL_MAX_SECONDS=0.001)
    done = runs.run(tmp_path, EVAL_ONLY=whole.folder / "final_model.ptz", **settings)
    figures = done.result["evaluation"]
    assert figures["within_budget"] is False and "every document that is to have a score" not in done.out
    assert [row["lacking"] for row in figures["curve"]] == [len(runs.LENGTHS)] * 2
    assert {row["val_bpb"] for row in figures["curve"]} == {figures["no_adaptation"]["val_bpb"]}


def test_too_small_a_cap_stretches_the_steps_no_more_than_it_must(tmp_path):
    run = runs.alone(tmp_path, BIGRAM_VOCAB_SIZE=3000, BIGRAM_DIM=24)
    torch.manual_seed(0)
    state = {name: torch.randn_like(weight) for name, weight in train_gpt.GPT(run.s).state_dict().items()}
    code = len(train_gpt.SOURCE_BYTES)

    def size(stretch: float) -> int:
        return len(train_gpt.pack(train_gpt.quantize_model(state, run.s, {}, stretch), run.s)[0])

    def exported(cap: int) -> dict:
        account = train_gpt.export(state, {}, run.using(artifact_max_bytes=cap))
        assert account["fits"] is True and account["total_bytes"] == code + account["model_bytes"] <= cap
        assert account["model_bytes"] == (tmp_path / "final_model.ptz").stat().st_size == size(account["stretch"])
        return account

    sizes = [size(stretch) for stretch in (1, 1.5, 2, 4, 8)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 1.5 * sizes[-1]
    assert exported(code + sizes[0])["stretch"] == 1
    for stretch, cap in ((1.5, code + sizes[1]), (4, code + sizes[3]), (8, code + sizes[4])):
        account = exported(cap)
        assert abs(account["stretch"] - stretch) < 0.5 and 0.995 * cap <= account["total_bytes"]
    assert 1 < exported(code + sizes[0] - 1)["stretch"] < 1.1


@pytest.mark.parametrize("sigmas", ["30,30", "99,99"])
def test_a_cap_that_only_the_largest_steps_meet_is_met(tmp_path, sigmas):
    """Where steps are coarse already, the bytes hardly follow them as a finer quantiser's would."""
    run = runs.alone(tmp_path, MODEL_DIM=128, MLP_MULT=3, QUANT_SIGMAS=sigmas)
    generator = torch.Generator().manual_seed(0)
    shapes = train_gpt.GPT(run.s).state_dict()
    state = {name: torch.randn(weight.shape, generator=generator) for name, weight in shapes.items()}
    coarse = train_gpt.quantize_model(state, run.s, {}, train_gpt.LARGEST_STRETCH)
    cap = len(train_gpt.SOURCE_BYTES) + len(train_gpt.pack(coarse, run.s)[0])
    for spare in (0, 40):
        stretch, blob, _ = train_gpt.fit(state, {}, run.using(artifact_max_bytes=cap + spare))
        assert len(train_gpt.SOURCE_BYTES) + len(blob) <= cap + spare


def test_an_impossible_cap_ends_with_code_3_everything_written_and_the_overshoot_in_bytes(tmp_path):
    done = runs.run(tmp_path, 3, ARTIFACT_MAX_BYTES=1000)
    account = done.result["artifact"]
    assert account["fits"] is False and account["stretch"] == train_gpt.LARGEST_STRETCH
    assert f"{1000 - account['total_bytes']} bytes free of ARTIFACT_MAX_BYTES=1000" in done.out
    assert f"have {account['total_bytes']} bytes, more than ARTIFACT_MAX_BYTES=1000" in runs.user_error(done.err)
    assert done.lines[-1].startswith("final_int8_zlib_roundtrip_exact")
    assert all((tmp_path / name).exists() for name in ("final_model.pt", "final_model.ptz", "ttt_documents.npz"))


# ---- Dead ranks, full disks, diverging training


def raise_on_rank_1() -> None:
    def step(self, number, multiplier, inner=train_gpt.Optimizer.step):
        if self.run.ranks.rank == 1 and number == 6:
            raise RuntimeError("the planted fault")
        return inner(self, number, multiplier)

    train_gpt.Optimizer.step = step


def test_a_rank_that_raises_ends_the_others_within_seconds_with_the_cause(tmp_path):
    processes = runs.ranks(tmp_path, before=raise_on_rank_1)
    processes[0].until("step:5/")
    began = time.monotonic()
    assert runs.codes(processes) == [1, 1] and time.monotonic() - began < 40
    assert processes[1].err.splitlines()[-1] == "RuntimeError: the planted fault"


def test_a_rank_killed_in_training_ends_the_others_within_seconds(tmp_path):
    processes = runs.ranks(tmp_path, **LONG | dict(ITERATIONS=100_000))
    processes[0].until("step:5/100000 train")
    processes[1].kill()
    began = time.monotonic()
    assert processes[0].wait() == 1 and time.monotonic() - began < 40
    assert "dead or out of reach" in runs.user_error(processes[0].err) and "RESUME=1" in processes[0].err


def test_writing_to_a_full_disk_leaves_the_old_file_and_a_clear_line(tmp_path):
    run, path = runs.alone(tmp_path), tmp_path / "file"
    run.write("file", b"old")
    with tiny_disk(tmp_path / "disk") as disk:
        run.folder = disk
        run.write("file", b"old")
        (disk / "other").write_bytes(bytes(60_000))
        with pytest.raises(UserError) as caught:
            run.write("file", b"new" * 30_000)
        what = f"cannot use {disk / 'file'} (90000 bytes): No space left on device — free space there"
        assert str(caught.value) == what and sorted(each.name for each in disk.iterdir()) == ["file", "other"]
        assert (disk / "file").read_bytes() == b"old"
    assert path.read_bytes() == b"old" and not (tmp_path / "file.tmp").exists()


@contextlib.contextmanager
def tiny_disk(folder: Path, kilobytes: int = 100):
    """A file system of a few kilobytes, where one can be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill_the_disk() -> None:
    """When training begins the disk of OUTPUT_DIR has LEFT bytes left; when it is exported, MORE."""
    filler = Path(os.environ["OUTPUT_DIR"]) / "filler"

    def leave(space: int) -> None:
        filler.unlink(missing_ok=True)
        disk = os.statvfs(filler.parent)
        filler.write_bytes(bytes(max(0, disk.f_bavail * disk.f_frsize - space)))

    def train(trainer, stream, inner=train_gpt.Trainer.train):
        leave(int(os.environ["LEFT"]))
        result = inner(trainer, stream)
        leave(int(os.environ["MORE"]))
        return result

    train_gpt.Trainer.train = train


def test_a_full_disk_in_training_ends_nothing_while_it_is_only_a_checkpoint_that_is_lost(tmp_path, whole):
    """It ends once all else is safe: with what could not be written, code 2 and no half file."""
    room = (len(whole.artifact) + (whole.folder / "checkpoint.pt").stat().st_size) // 2
    with tiny_disk(tmp_path / "disk", 1000) as disk:
        full = dict(OUTPUT_DIR=disk, LEFT=room, MORE=400_000)
        done = runs.run(tmp_path / "run", 2, before=fill_the_disk, **LONG | full)
        message = runs.user_error(done.err)
        assert "checkpoint.pt" in message and "No space left on device — free space there; everything else" in message
        assert done.lines[-1] == whole.lines[-1] and (disk / "result.json").exists()
        assert "note: no checkpoint of step 3: cannot use" in done.out and "step:24/24 train_loss" in done.out
        assert (disk / "final_model.ptz").read_bytes() == whole.artifact and not list(disk.glob("*.tmp"))
        assert not (disk / "checkpoint.pt").exists() and "Traceback" not in done.err
        scored = runs.run(tmp_path / "scored", EVAL_ONLY=disk / "final_model.ptz", TTT_ENABLED=0)
        assert scored.lines[-1] == whole.lines[-1]


def test_an_artifact_without_its_checkpoint_is_what_a_full_disk_leaves_to_score(tmp_path, whole):
    """The checkpoint did not fit, nor do the float weights: the command that is printed names what is there, and
    chooses another folder."""
    with tiny_disk(tmp_path / "disk", 1000) as disk:
        room = len(whole.artifact) + 8192
        full = dict(OUTPUT_DIR=f"{disk}/./run", LEFT=room, MORE=room, RUN_ID="a run")
        done = runs.run(tmp_path / "run", 2, before=fill_the_disk, **LONG | full)
        assert "final_model.pt " in (message := runs.user_error(done.err))
        assert f", and go on with: EVAL_ONLY={disk / 'run' / 'final_model.ptz'} " in message
        assert not re.search("RUN_ID|OUTPUT_DIR|RESUME", message)


def test_a_disk_with_room_for_one_checkpoint_is_enough_where_none_is_asked_for_in_between(tmp_path, whole):
    """The one before the last validation, which takes the place of the last."""
    room = int(1.5 * (whole.folder / "checkpoint.pt").stat().st_size)
    with tiny_disk(tmp_path / "disk", 1000) as disk:
        full = dict(OUTPUT_DIR=disk, LEFT=room, MORE=400_000)
        done = runs.run(tmp_path / "run", before=fill_the_disk, **LONG | dict(CHECKPOINT_EVERY=0) | full)
        assert done.lines[-1] == whole.lines[-1] and "note: no checkpoint" not in done.out
        assert (disk / "checkpoint.pt").exists() and not list(disk.glob("*.tmp"))


def test_a_disk_that_is_full_at_the_export_keeps_the_artifact_and_the_checkpoint(tmp_path, whole):
    room = len(whole.artifact) + 8192
    with tiny_disk(tmp_path / "disk", 1000) as disk:
        full = dict(OUTPUT_DIR=disk, LEFT=400_000, MORE=room)
        done = runs.run(tmp_path / "run", 2, before=fill_the_disk, **LONG | full)
        assert "final_model.pt " in (message := runs.user_error(done.err)) and "No space left" in message
        assert (disk / "final_model.ptz").read_bytes() == whole.artifact and not list(disk.glob("*.tmp"))
        (disk / "filler").unlink()
        again = runs.run(tmp_path / "again", RESUME=1, OUTPUT_DIR=disk, **LONG)
        assert (disk / "final_model.ptz").read_bytes() == whole.artifact and again.lines[-1] == whole.lines[-1]
        assert "step:24/24 train_loss" not in again.out


def no_space() -> None:
    """No file of FULL's name can be written once the preflight is over."""

    def write(run, name, content, inner=train_gpt.Run.write):
        if name == os.environ["FULL"] and not run.folder.name.startswith("preflight_"):
            (run.folder / f"{name}.tmp").symlink_to("/dev/full")
        inner(run, name, content)

    train_gpt.Run.write = write


needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
WHOLE = [name for name in train_gpt.FILES if name not in ("train.log", "sessions.json")]


@needs_full
@pytest.mark.parametrize("name", WHOLE)
def test_a_disk_that_fills_up_under_any_file_of_a_run_is_one_line_and_code_2(tmp_path, name):
    settings = dict(CHECKPOINT_EVERY=2, TTT_N_EPOCHS=1, TTT_ENABLED=int(name.startswith("ttt_")))
    done = runs.run(tmp_path, 2, before=no_space, FULL=name, **settings)
    message = runs.user_error(done.err)
    assert f"{tmp_path / name} (" in message and "No space left" in message and "Traceback" not in done.err
    assert not list(tmp_path.glob("*.tmp"))
    assert (tmp_path / "final_model.ptz").exists() == (name != "final_model.ptz")
    assert (tmp_path / "result.json").exists() == (name == "checkpoint.pt")  # which only a resume would need
    again = runs.Run(tmp_path, RESUME=1, **settings)
    if name == "checkpoint.pt":
        assert "everything else is written" in message and again.wait() == 2
        assert f"EVAL_ONLY={tmp_path / 'final_model.ptz'}" in runs.user_error(again.err)
    else:
        assert "free space there, and go on with: RESUME=1 " in message and again.wait() == 0


@needs_full
def test_an_account_of_sessions_that_cannot_be_written_ends_no_run(tmp_path):
    done = runs.run(tmp_path, before=no_space, FULL="sessions.json", TTT_ENABLED=0)
    assert done.result["training"]["steps"] == 12
    assert (done.out + done.err).count("sessions.json") == 1  # one note


def test_an_account_of_sessions_is_never_older_than_5_seconds_nor_written_more_often(monkeypatch):
    now, kept = [1000.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(train_gpt.Run, "write", lambda run, name, content: kept.append(json.loads(content)))
    run = runs.alone()
    with run.session("training"):
        for step in range(1, 101):
            now[0] += 0.5
            run.tick()
            assert step / 2 - kept[-1][0]["seconds"] < 5
    assert len(kept) == 1 + 10 + 1 and kept[-1][0]["seconds"] == 50 and kept[-1][0]["ended"] == "finished"


def test_an_account_of_sessions_on_a_slow_disk_is_written_once_a_minute(monkeypatch):
    now, written = [1000.0], []

    def write(run, name, content):
        now[0] += 2.0
        written.append(name)

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(train_gpt.Run, "write", write)
    run = runs.alone()
    with run.session("training"):
        for _ in range(1200):
            now[0] += 0.5
            run.tick()
    assert 2 + 600 / 70 <= len(written) <= 2 + 600 / 60


@needs_full
def test_a_log_that_cannot_be_written_is_one_note_and_the_run_goes_on(tmp_path):
    (tmp_path / "train.log").symlink_to("/dev/full")
    done = runs.run(tmp_path, TTT_ENABLED=0)
    (line,) = done.err.splitlines()
    assert f"{tmp_path / 'train.log'}: No space left" in line and done.lines[-1].startswith("final_int8")
    assert done.result["training"]["steps"] == 12


def nan_from(first: int, last: int) -> None:
    """One gradient of one rank is not finite in these steps."""

    def step(self, number, multiplier, inner=train_gpt.Optimizer.step):
        if first <= number <= last and self.run.ranks.rank == self.run.ranks.world - 1:
            self.grads[3] = float("nan")
        return inner(self, number, multiplier)

    train_gpt.Optimizer.step = step


def test_a_step_without_a_finite_gradient_is_left_out_reported_and_counted(tmp_path):
    """NaN on one of two ranks is left out by both."""
    processes = runs.ranks(tmp_path, before=functools.partial(nan_from, 7, 8), **LONG)
    assert runs.codes(processes) == [0, 0]
    assert "2 steps by 10" in processes[0].out or "2 steps by 9" in processes[0].out
    assert processes[0].result["training"]["skipped"] == 2 and processes[0].result["training"]["steps"] == 24


def test_ten_steps_without_a_finite_gradient_end_all_ranks_with_one_line_and_a_resume_goes_on(tmp_path):
    processes = runs.ranks(tmp_path, before=functools.partial(nan_from, 7, 99), **LONG)
    assert runs.codes(processes) == [2, 2]
    message = runs.one_error(processes)
    assert "steps in a row" in message and "lower the learning rates" in message
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert kept["step"] == 15 and kept["weights"].isfinite().all()
    again = runs.run(tmp_path, RESUME=1, **LONG)
    assert "at step 15" in again.out and again.result["training"]["skipped"] >= 8


def test_a_learning_rate_far_too_large_is_an_error_not_an_artifact_of_nan(tmp_path):
    done = runs.run(tmp_path, 2, MATRIX_LR=1e30, SCALAR_LR=1e30)
    assert "lower the learning rates" in runs.user_error(done.err) and not (tmp_path / "final_model.ptz").exists()
