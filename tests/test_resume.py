"""An interruption costs time and nothing else: whatever was interrupted, wherever, goes on to the figures of a run that
nobody interrupted, under any number of ranks; and nothing in between is told wrongly.

Everything here goes through whole processes. The faults are planted in a process before it starts."""

from __future__ import annotations

import builtins
import contextlib
import hashlib
import itertools
import json
import os
import shutil
import signal
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import runs
from conftest import small, stream_of
from runs import train_gpt

TARGETS = sum(runs.LENGTHS) - 1
DOCUMENTS = list(range(len(runs.LENGTHS)))
FINAL = "final_int8_zlib_roundtrip_exact"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> runs.Run:
    """The run that nobody interrupts."""
    return runs.run(tmp_path_factory.mktemp("whole"), TTT_N_EPOCHS=4)


@pytest.fixture(scope="module")
def scoring(whole) -> dict:
    """Settings that evaluate its artifact once more."""
    return dict(EVAL_ONLY=whole.folder / "final_model.ptz", TTT_N_EPOCHS=4)


def figures(run: runs.Run) -> list[str]:
    """Every figure of an evaluation, to the last digit."""
    return [line for line in run.lines if line.startswith(("no_adaptation v", "ttt_epoch:", "final_"))]


# ---- Faults, planted in a process before it starts


def hook(name: str, before=lambda batch: None) -> None:
    """Let DocumentBatch announce the real documents of each call of `name`, and do something `before`."""
    work = getattr(train_gpt.DocumentBatch, name)

    def hooked(batch, *arguments):
        if batch.stream.target_count == TARGETS:  # not a rehearsal
            print(name, *batch.documents, flush=True)
            before(batch)
        return work(batch, *arguments)

    setattr(train_gpt.DocumentBatch, name, hooked)


def announce() -> None:
    hook("plain")
    hook("adapt")


def announced(run: runs.Run, name: str) -> list[int]:
    """The documents of all calls of `name`."""
    return sorted(int(i) for line in run.lines if line.startswith(name + " ") for i in line.split()[1:])


def stop_in_adapt(call: int) -> None:
    """SIGTERM to this process in its n-th batch of test-time training."""
    calls = itertools.count(1)
    hook("plain")
    hook("adapt", lambda batch: next(calls) == call and os.kill(os.getpid(), signal.SIGTERM))


def late_rank(rank: int) -> None:
    """One rank comes late to its first batch without adaptation: the others have adapted to something by then."""
    folder = Path(os.environ["OUTPUT_DIR"])
    late = os.environ["RANK"] == str(rank)
    calls = itertools.count()

    def wait(batch):
        deadline = time.monotonic() + 20 * (late and next(calls) == 0)
        while time.monotonic() < deadline:
            kept = [np.load(path) for path in folder.glob("ttt_progress*.npy")]
            if kept and (~np.isnan(kept[0][1:, :-1])).any():
                return
            time.sleep(0.01)

    hook("plain", wait)
    hook("adapt")


def other_plan() -> None:
    """Documents shared out differently, as on another device or in another version; stopped in the second batch."""
    plan = train_gpt.batch_documents
    train_gpt.batch_documents = lambda *arguments: plan(*arguments)[::-1]
    stop_in_adapt(2)


def slow_rank(rank: int, seconds: float) -> None:
    """One rank waits in its first batch without adaptation."""
    calls = itertools.count()
    late = os.environ["RANK"] == str(rank)
    hook("plain", lambda batch: late and next(calls) == 0 and time.sleep(seconds))
    hook("adapt")


def impatient_backend() -> None:
    """Collectives that give up after three seconds instead of thirty minutes, and a rank that takes longer."""
    join = train_gpt.dist.init_process_group
    train_gpt.dist.init_process_group = lambda *a, **k: join(*a, timeout=timedelta(seconds=3), **k)
    slow_rank(1, 5)


def die_before_the_result() -> None:
    """kill -9 when everything is scored and result.json is next."""
    announce()
    replace = os.replace

    def dying(source, target):
        if Path(target).name == "result.json":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = dying


def edited_source() -> None:
    """A line more in the source while the run trains."""
    copy = Path(os.environ["OUTPUT_DIR"], "edited.py")
    copy.write_bytes(train_gpt.SOURCE.read_bytes())
    train_gpt.SOURCE, size = copy, copy.stat().st_size
    shown = builtins.print

    def editing(*values, **options):
        if str(values[0]).startswith("step:6/") and copy.stat().st_size == size:
            copy.write_bytes(copy.read_bytes() + b"# edited\n")
        shown(*values, **options)

    builtins.print = editing


def no_patience() -> None:
    """Ranks but the first leave the last word to others for seconds; here there are none."""
    time.sleep = lambda seconds: None


def closed_console() -> None:
    """As `| head -1`: the other end of the console goes after a line."""
    reading, writing = os.pipe()
    os.dup2(writing, 1)
    os.close(writing)
    shown = builtins.print

    def closing(*values, **options):
        if "step:0/12 val" in str(values[0]):
            with contextlib.suppress(OSError):  # the second time
                os.close(reading)
        shown(*values, **options)

    builtins.print = closing


# ---- Ranks that wait for each other


@pytest.fixture(scope="module")
def waiting(tmp_path_factory, scoring):
    """Three pairs of ranks, side by side since they mostly wait. Each pair's exit codes are in `codes`, by name."""
    folder = tmp_path_factory.mktemp
    pairs = dict(
        stopped=runs.ranks(folder("stopped"), before=partial(slow_rank, 1, 7), **scoring),
        impatient=runs.ranks(folder("impatient"), before=impatient_backend, **scoring, EVAL_MAX_SECONDS=0),
        still=runs.ranks(folder("still"), before=partial(slow_rank, 1, 3), **scoring),
    )
    pairs["stopped"][1].until("plain ")
    pairs["still"][1].until("plain ")
    time.sleep(1)  # until rank 0 has nothing left to do
    for process in pairs["still"]:
        process.kill(signal.SIGSTOP)
    pairs["stopped"][0].kill(signal.SIGTERM)
    time.sleep(2.2)  # until rank 1 has heard of it
    pairs["stopped"][1].kill(signal.SIGTERM)
    time.sleep(1)
    for process in pairs["still"]:
        process.kill(signal.SIGCONT)
        time.sleep(0.3)
    still_there = pairs["stopped"][0].process.is_alive()
    codes = {}
    for name in ("stopped", "impatient", "still"):
        codes[name] = [process.wait() for process in pairs[name]]
    return dict(pairs=pairs, codes=codes, still_there=still_there)


def test_ranks_that_are_stopped_while_one_waits_for_another_leave_together_and_keep_everything(waiting):
    assert waiting["codes"]["stopped"] == [143, 143] and waiting["still_there"]
    for process in waiting["pairs"]["stopped"]:
        assert "Traceback" not in process.err and "SIGTERM" in process.err and "RESUME=1" in process.err


@pytest.fixture(scope="module")
def gone_on(waiting, scoring) -> tuple[list[runs.Run], list[list[int]]]:
    """The stopped pair once more, and the documents that each had adapted to in the first session."""
    before = [announced(process, "adapt") for process in waiting["pairs"]["stopped"]]
    pair = runs.ranks(waiting["pairs"]["stopped"][0].folder, before=announce, RESUME=1, **scoring)
    assert [process.wait() for process in pair] == [0, 0], pair[0].err
    return pair, before


def test_what_a_waiting_rank_had_finished_is_not_done_again(gone_on, whole):
    pair, (first, second) = gone_on
    assert first and not second
    assert sorted(announced(pair[0], "adapt") + announced(pair[1], "adapt")) == sorted(set(DOCUMENTS) - set(first))
    assert figures(pair[0]) == figures(whole)


def test_the_seconds_are_those_of_the_slowest_rank_over_all_sessions(gone_on):
    evaluation = gone_on[0][0].result["evaluation"]
    assert evaluation["seconds"] > 7 and evaluation["no_adaptation"]["seconds"] > 7


def test_a_backend_that_gives_up_early_does_not_end_ranks_that_wait_for_a_slow_one(waiting, whole):
    assert waiting["codes"]["impatient"] == [0, 0], waiting["pairs"]["impatient"][0].err
    assert figures(waiting["pairs"]["impatient"][0]) == figures(whole)


def test_a_job_that_stands_still_as_a_whole_goes_on(waiting, whole):
    """SIGSTOP to all ranks for longer than a rank may be silent, as by ctrl-Z; they do not wake at the same time."""
    assert waiting["codes"]["still"] == [0, 0], waiting["pairs"]["still"][0].err
    assert figures(waiting["pairs"]["still"][0]) == figures(whole)


def only_share_out() -> None:
    """Instead of a run: three queues, of which one rank is slow to take its part; each prints what it got."""

    def entry() -> int:
        run = train_gpt.Run(train_gpt.Settings.from_env(os.environ))
        for name, count in (("first", 40), ("second", 1), ("third", 0)):
            for item in run.shared([f"{name}{i}" for i in range(count)], name):
                print("item", item, flush=True)
                time.sleep(0.001 + 0.02 * (run.rank == 1))
        for item in run.using(rehearsing=True).shared(["rehearsed"] * 3, "first"):
            print("item", item, flush=True)
        run.part()
        return 0

    train_gpt.entry = entry


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_item_of_a_shared_list_goes_to_exactly_one_rank_in_order(tmp_path, world):
    ended = runs.ranks(tmp_path, world, before=only_share_out)
    assert [process.wait() for process in ended] == [0] * world, ended[0].err
    taken = [[line.split()[1] for line in process.lines if line.startswith("item ")] for process in ended]
    expected = [f"first{i}" for i in range(40)] + ["second0"] + ["rehearsed"] * 3
    assert sorted(sum(taken, [])) == sorted(expected)
    for mine in taken:
        assert mine == sorted(mine, key=expected.index)
    if world > 1:  # who is slow gets less
        first = [sum(item.startswith("first") for item in mine) for mine in taken]
        assert 0 < first[1] < 20 and first[1] < min(first[:1] + first[2:])


def test_a_rank_that_comes_late_changes_no_figure_and_nothing_is_scored_twice_or_never(tmp_path, scoring, whole):
    settings = scoring | dict(TTT_BATCH_SIZE=1, EVAL_MAX_SECONDS=0)
    pair = runs.ranks(tmp_path, before=partial(late_rank, 1), **settings)
    assert [process.wait() for process in pair] == [0, 0], pair[0].err
    for name in ("plain", "adapt"):
        assert sorted(announced(pair[0], name) + announced(pair[1], name)) == DOCUMENTS
    assert np.allclose(pair[0].figures("ttt_epoch"), whole.figures("ttt_epoch"), rtol=1e-6)


# ---- The evaluation's progress


def test_documents_that_another_plan_gave_to_other_ranks_count_once(tmp_path, scoring, whole):
    pair = runs.ranks(tmp_path, before=other_plan, **scoring)
    assert [process.wait() for process in pair] == [143, 143], pair[0].err
    pair = runs.ranks(tmp_path, RESUME=1, **scoring)
    assert [process.wait() for process in pair] == [0, 0], pair[0].err
    assert figures(pair[0]) == figures(whole)


@pytest.mark.parametrize("world", [1, 3])
def test_another_number_of_ranks_goes_on_where_two_were_stopped(tmp_path, scoring, whole, world):
    pair = runs.ranks(tmp_path, before=partial(stop_in_adapt, 2), **scoring)
    assert [process.wait() for process in pair] == [143, 143], pair[0].err
    started = [line.split()[1:] for process in pair for line in process.lines if line.startswith("adapt ")]
    again = runs.ranks(tmp_path, world, before=announce, RESUME=1, **scoring)
    assert [process.wait() for process in again] == [0] * world, again[0].err
    done = sum(len(announced(process, "adapt")) for process in again)
    assert not any(announced(process, "plain") for process in again) and done < len(DOCUMENTS)
    assert started and figures(again[0]) == figures(whole)
    assert not list(tmp_path.glob("ttt_progress*"))


def test_a_kill_between_the_last_figure_and_the_result_costs_nothing_that_was_scored(tmp_path, scoring, whole):
    dead = runs.run(tmp_path, 137, before=die_before_the_result, **scoring)
    assert announced(dead, "adapt") == DOCUMENTS and not (tmp_path / "result.json").exists()
    again = runs.run(tmp_path, before=announce, RESUME=1, **scoring)
    assert announced(again, "plain") == announced(again, "adapt") == []
    assert figures(again) == figures(whole) and again.result["val_bpb"] == whole.result["val_bpb"]


@pytest.mark.parametrize("name, value", [("LOGIT_SOFTCAP", 2), ("ROPE_BASE", 100)])
def test_nothing_is_taken_over_from_an_evaluation_under_another_setting(tmp_path, whole, name, value):
    """Of a state dict as it is, whose configuration comes from the environment alone."""
    settings = dict(EVAL_ONLY=whole.folder / "final_model.pt", TTT_N_EPOCHS=4)
    runs.run(tmp_path / "stopped", 143, before=partial(stop_in_adapt, 2), **settings)
    again = runs.run(tmp_path / "stopped", before=announce, RESUME=1, **settings | {name: value})
    assert announced(again, "plain") == announced(again, "adapt") == DOCUMENTS
    if name == "LOGIT_SOFTCAP":
        assert figures(again) == figures(runs.run(tmp_path / "whole", **settings | {name: value}))


def test_an_evaluation_is_known_by_all_that_its_figures_depend_on_and_by_nothing_else(run):
    """Progress is taken over under the same tag alone: no setting of the scoring may be missing, no rank be in it."""
    stream = stream_of(small(), [20, 30])
    tag = train_gpt.evaluation_tag
    changes = dict(
        ttt_protocol="single_pass", ttt_context="recompute", ttt_lora_rank=3, ttt_lora_lr=0.02, ttt_weight_decay=0.5,
        ttt_n_epochs=3, ttt_chunk_size=8, ttt_eval_seq_len=32, ttt_batch_size=3, ttt_enabled=False, seed=1,
        beta1=0.8, beta2=0.9, eval_stride=4, num_layers=4, mlp_mult=2.0, rope_base=100.0, logit_softcap=2.0,
    )  # fmt: skip
    tags = [tag("weights", stream, run.using(**{name: value})) for name, value in changes.items()]
    tags += [tag("others", stream, run), tag("weights", stream_of(small(), [20, 30], seed=1), run)]
    tags += [tag("weights", stream_of(small(), [30, 20]), run), tag("weights", stream, run)]
    assert len(set(tags)) == len(tags)
    other = run.using(eval_max_seconds=1, output_dir="x", run_id="y", resume=True, iterations=3, data_path="z")
    other.rank, other.world, other.output = 2, 3, Path("x")
    assert tag("weights", stream, other) == tags[-1]


def test_nothing_is_taken_over_from_an_evaluation_of_other_text_of_the_same_shape(tmp_path, scoring):
    data = tmp_path / "data"
    shutil.copytree(runs.data(), data)
    runs.run(tmp_path / "run", 143, before=partial(stop_in_adapt, 2), **scoring, DATA_PATH=data)
    tokens = runs.documents(runs.LENGTHS, 7)
    tokens[tokens == 5] = 6
    runs.write_shard(data / "fineweb_val_000000.bin", tokens)
    again = runs.run(tmp_path / "run", before=announce, RESUME=1, **scoring, DATA_PATH=data)
    assert announced(again, "plain") == announced(again, "adapt") == DOCUMENTS


# ---- What a run says of itself, and where


def test_a_checkpoint_of_other_shards_of_the_same_sizes_is_refused(tmp_path, whole):
    data = tmp_path / "data"
    shutil.copytree(runs.data(), data)
    for i in range(2):
        runs.write_shard(data / f"fineweb_train_{i:06}.bin", runs.documents([100, 37, 211, 52] * 5, i + 5))
    (tmp_path / "run").mkdir()
    shutil.copy(whole.folder / "checkpoint.pt", tmp_path / "run")
    refused = runs.run(tmp_path / "run", 2, RESUME=1, DATA_PATH=data)
    assert "another DATA" in runs.user_error(refused.err)


def test_a_source_edited_while_it_runs_is_not_the_one_that_ran(tmp_path):
    source = train_gpt.SOURCE.read_bytes()
    done = runs.run(tmp_path, before=edited_source, TTT_N_EPOCHS=1)
    assert len((tmp_path / "edited.py").read_bytes()) == len(source) + len(b"# edited\n")
    assert done.result["source_sha256"] == hashlib.sha256(source).hexdigest()
    assert done.result["artifact"]["code_bytes"] == len(source) and "# edited" not in done.log


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith("console.")}


@pytest.mark.parametrize(
    "settings", [{}, dict(DATA_PATH="nowhere"), dict(ITERATIONS=3), dict(TTT_ENABLED=0), "another"]
)
def test_a_folder_of_another_run_is_refused_before_anything_in_it_is_touched(tmp_path, whole, scoring, settings):
    folder = shutil.copytree(whole.folder, tmp_path / "run")
    before = contents(folder)
    refused = runs.run(folder, 2, **(scoring if settings == "another" else settings))
    assert contents(folder) == before
    assert "DATA_PATH" in settings or "OUTPUT_DIR" in runs.user_error(refused.err)


@pytest.mark.parametrize("left", ["train.log", "checkpoint.pt", "final_model.pt", "ttt_documents.npz"])
def test_a_folder_that_a_killed_run_has_left_is_refused(tmp_path, left):
    (tmp_path / left).write_text("its own")
    refused = runs.run(tmp_path, 2)
    assert left in runs.user_error(refused.err) and contents(tmp_path) == {left: b"its own"}


def test_an_evaluation_in_its_artifacts_folder_adds_to_the_log_and_leaves_the_result_alone(tmp_path, whole):
    folder = shutil.copytree(whole.folder, tmp_path / "run")
    before = contents(folder)
    done = runs.run(folder, EVAL_ONLY=folder / "final_model.ptz", TTT_N_EPOCHS=2)
    after = contents(folder)
    assert after.pop("train.log").startswith(log := before.pop("train.log")) and len(done.log.encode()) > len(log)
    assert {name: after.pop(name) for name in before} == before
    (result,) = (json.loads(content) for name, content in after.items() if name.startswith("result_"))
    assert result["settings"]["ttt_n_epochs"] == 2 and len(after) == 2


# ---- A user's errors: one line and code 2


CHECKPOINTS = {
    "without an average": lambda state: state.pop("average"),
    "of a longer average": lambda state: state.update(average=torch.zeros(len(state["average"]) + 1)),
    "of a single weight": lambda state: state.update(weights=torch.zeros(1)),
    "of a moment that is a number": lambda state: state.update(m=0.0),
    "of a step that is text": lambda state: state.update(step="seven"),
    "without an identity": lambda state: state.pop("identity"),
    "of an identity that is a number": lambda state: state.update(identity=7),
}


@pytest.mark.parametrize("flaw", CHECKPOINTS)
def test_a_checkpoint_that_lacks_something_is_one_line(tmp_path, whole, flaw):
    state = torch.load(whole.folder / "checkpoint.pt", weights_only=True)
    CHECKPOINTS[flaw](state)
    torch.save(state, tmp_path / "checkpoint.pt")
    refused = runs.run(tmp_path, 2, RESUME=1)
    assert "is damaged" in runs.user_error(refused.err) and "Traceback" not in refused.err


def test_a_checkpoint_of_another_model_is_not_called_damaged(tmp_path, whole):
    shutil.copy(whole.folder / "checkpoint.pt", tmp_path)
    refused = runs.run(tmp_path, 2, RESUME=1, NUM_LAYERS=3)
    assert "another NUM_LAYERS" in runs.user_error(refused.err)


WEIGHTS = {
    "a number for a name": lambda state: state.update({7: torch.zeros(2)}),
    "a NaN": lambda state: state["blocks.0.mlp.fc.weight"].view(-1)[3:4].fill_(float("nan")),
    "an infinity": lambda state: state["smear.gate"][0:1].fill_(float("-inf")),
    "weights whose scores are not finite": lambda state: state["blocks.0.mlp.proj.weight"].fill_(3e38),
    "text for a tensor": lambda state: state.update({"smear.gate": "text"}),
}


@pytest.mark.parametrize("flaw", WEIGHTS)
def test_a_state_dict_that_cannot_be_scored_is_one_line(tmp_path, whole, flaw):
    state = torch.load(whole.folder / "final_model.pt", weights_only=True)
    WEIGHTS[flaw](state)
    torch.save(state, tmp_path / "weights.pt")
    refused = runs.run(tmp_path / "run", 2, EVAL_ONLY=tmp_path / "weights.pt", TTT_N_EPOCHS=1)
    runs.user_error(refused.err)
    assert "Traceback" not in refused.err and FINAL not in refused.out
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize("world", [1, 2])
def test_adapters_that_diverge_are_an_error_and_not_a_score_without_adaptation(tmp_path, scoring, world):
    ended = runs.ranks(tmp_path, world, **scoring | dict(TTT_LORA_LR=1e37))
    assert [process.wait() for process in ended] == [2] * world, ended[0].err
    assert "learning rates" in runs.user_error(ended[0].err) and not (tmp_path / "result.json").exists()


@pytest.mark.parametrize(
    "variables",
    [
        dict(RANK=0),
        dict(WORLD_SIZE=2),
        dict(RANK="x", WORLD_SIZE=2),
        dict(RANK=2, WORLD_SIZE=2),
        dict(RANK=0, WORLD_SIZE=2),
    ],
)
def test_half_a_place_among_ranks_is_one_line(tmp_path, variables):
    refused = runs.run(tmp_path, 2, before=no_patience, **variables)
    assert "torchrun" in runs.user_error(refused.err) and "Traceback" not in refused.err


def test_a_console_that_goes_away_does_not_end_the_run(tmp_path):
    done = runs.run(tmp_path, before=closed_console, TTT_N_EPOCHS=1)
    assert FINAL in done.log.splitlines()[-1] and "space" not in done.err and done.result["training"]["steps"] == 12


def test_weights_that_are_not_finite_after_the_only_step_are_laid_to_the_settings(tmp_path):
    ended = runs.run(tmp_path, 2, ADAM_EPS=0, ITERATIONS=1, MUON_MOMENTUM_WARMUP_STEPS=0)
    message = runs.user_error(ended.err)
    assert "ADAM_EPS" in message and "damaged" not in message and not (tmp_path / "final_model.ptz").exists()


def test_a_finished_checkpoint_gives_the_same_artifact_again_under_any_number_of_ranks(tmp_path):
    """Calibration is done again, its rows on other ranks. Matrices are wide enough for GPTQ to round them."""
    settings = dict(MODEL_DIM=96, ITERATIONS=6, TTT_ENABLED=0, CALIBRATION_TOKENS=7 * 32)
    first = runs.run(tmp_path / "first", **settings)
    assert {"int5", "int6"} <= first.result["artifact"]["kinds"].keys()
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        shutil.copy(first.folder / "checkpoint.pt", folder)
        again = runs.ranks(folder, world, RESUME=1, **settings)
        assert [process.wait() for process in again] == [0] * world, again[0].err
        assert again[0].artifact == first.artifact and figures(again[0]) == figures(first)
    assert runs.run(folder, RESUME=1, QUANTIZER="nearest", **settings).artifact != first.artifact


def test_a_setting_of_the_export_may_change_after_training(tmp_path, whole):
    shutil.copy(whole.folder / "checkpoint.pt", tmp_path)
    done = runs.run(tmp_path, RESUME=1, PRUNE_FRACTION=0.1, ARTIFACT_MAX_BYTES=17_000_000, TTT_N_EPOCHS=1)
    assert done.result["training"]["resumed"] is True and "step:12/12 train_loss" not in done.out
