"""An interruption costs time and nothing else: whatever was interrupted, wherever, goes on to the figures of a run that
nobody interrupted, under any number of ranks; and nothing in between is told wrongly.

Everything here goes through whole processes. The faults are planted in a process before it starts."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import runs
import scored
from conftest import small, stream_of
from runs import train_gpt

TARGETS = sum(runs.LENGTHS) - 1
DOCUMENTS = list(range(len(runs.LENGTHS)))
FINAL = "final_int8_zlib_roundtrip_exact"
SCORING = dict(TTT_N_EPOCHS=4, TTT_BATCH_SIZE=4)  # a batch for each of up to three ranks


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> runs.Run:
    """The run that nobody interrupts."""
    return runs.run(tmp_path_factory.mktemp("whole"), **SCORING)


@pytest.fixture(scope="module")
def scoring(whole) -> dict:
    """Settings that evaluate its artifact once more."""
    return dict(EVAL_ONLY=whole.folder / "final_model.ptz", **SCORING)


def figures(run: runs.Run) -> list[str]:
    """Every figure of an evaluation, to the last digit."""
    last = run.log.rpartition("\nevaluating ")[2]  # a killed process may have come as far as to log them
    return [line for line in last.splitlines() if line.startswith(("no_adaptation v", "ttt_epoch:", "final_"))]


# ---- Faults, planted in a process before it starts


def hook(name: str, before=lambda batch: None) -> None:
    """Let DocumentBatch announce the real documents of each call of `name`, and do something `before`."""
    work = getattr(train_gpt.DocumentBatch, name)

    def hooked(batch, *arguments, **options):
        if batch.stream.target_count == TARGETS:  # not a rehearsal
            print(name, *arguments[:1], "documents", *batch.documents, flush=True)
            before(batch)
        return work(batch, *arguments, **options)

    setattr(train_gpt.DocumentBatch, name, hooked)


def announce() -> None:
    hook("score")
    hook("adapt")


def announced(run: runs.Run, name: str) -> list[int]:
    """The documents of all calls of `name`: "score", "adapt 1" for what is the score, "adapt 4" for replay."""
    lines = [line.removeprefix(f"{name} documents ") for line in run.lines if line.startswith(f"{name} documents ")]
    return sorted(int(i) for line in lines for i in line.split())


def of_all(processes: list[runs.Run], name: str) -> list[int]:
    return sorted(itertools.chain.from_iterable(announced(process, name) for process in processes))


def stop_in_adapt(call: int, number: int = signal.SIGTERM) -> None:
    """A signal to this process in its n-th batch of adaptation."""
    calls = itertools.count(1)
    hook("score")
    hook("adapt", lambda batch: next(calls) == call and os.kill(os.getpid(), number))


def late_rank(rank: int) -> None:
    """One rank comes late to its first batch without adaptation: the first one has adapted to something by then."""
    console = Path(os.environ["OUTPUT_DIR"], "console.0.out")
    late = os.environ["RANK"] == str(rank)
    calls = itertools.count()

    def wait(batch):
        deadline = time.monotonic() + 30 * (late and next(calls) == 0)
        while time.monotonic() < deadline and "\nadapt 1 " not in console.read_text():
            time.sleep(0.01)

    hook("score", wait)
    hook("adapt")


def other_plan() -> None:
    """Documents shared out differently, as on another device or in another version; stopped in the second batch."""
    plan = train_gpt.batch_documents
    train_gpt.batch_documents = lambda *arguments: plan(*arguments)[::-1]
    stop_in_adapt(2)


def patience(seconds: float, rank: int = 1, slow: float = 0.0) -> None:
    """A rank that is silent for so long is dead; one rank waits in its first batch without adaptation."""
    train_gpt.PATIENCE, train_gpt.GRACE = seconds, 3.0
    calls = itertools.count()
    late = os.environ["RANK"] == str(rank)

    def wait(batch):
        deadline = time.monotonic() + slow * (late and next(calls) == 0)
        while time.monotonic() < deadline:
            time.sleep(0.05)

    hook("score", wait)
    hook("adapt")


def die_before_the_result() -> None:
    """kill -9 when everything is scored and result.json is next."""
    announce()

    def write(run, name, content, inner=train_gpt.Run.write):
        if name == "result.json" and not run.folder.name.startswith("preflight_"):
            os.kill(os.getpid(), signal.SIGKILL)
        inner(run, name, content)

    train_gpt.Run.write = write


# ---- Ranks that wait for each other


@pytest.fixture(scope="module")
def waiting(tmp_path_factory, scoring):
    """Three pairs of ranks, side by side since they mostly wait. Each pair's exit codes are in `codes`, by name."""
    folder = tmp_path_factory.mktemp
    pairs = dict(
        stopped=runs.ranks(folder("stopped"), before=partial(patience, 45, slow=600), **scoring),
        slow=runs.ranks(folder("slow"), before=partial(patience, 3, slow=8), **scoring, EVAL_MAX_SECONDS=0),
        still=runs.ranks(folder("still"), before=partial(patience, 6, slow=3), **scoring),
    )
    for name in ("stopped", "still"):
        pairs[name][1].until("score documents ")
    pairs["stopped"][0].until("replay: batch ")
    for process in pairs["still"]:
        process.kill(signal.SIGSTOP)
    time.sleep(3)  # until the first one has nothing left to do but wait in a collective
    pairs["stopped"][0].kill(signal.SIGTERM)
    began = time.monotonic()
    codes = dict(stopped=[process.wait() for process in pairs["stopped"]])
    seconds = time.monotonic() - began
    time.sleep(max(0, 5 - seconds))
    for process in pairs["still"]:
        process.kill(signal.SIGCONT)
        time.sleep(0.3)
    for name in ("slow", "still"):
        codes[name] = [process.wait() for process in pairs[name]]
    return dict(pairs=pairs, codes=codes, seconds=seconds)


def test_a_signal_to_a_rank_that_waits_for_another_ends_both_within_a_minute(waiting):
    assert waiting["codes"]["stopped"] == [143, 143] and waiting["seconds"] < 60
    assert not any("Traceback" in process.err for process in waiting["pairs"]["stopped"])
    lines = [line for process in waiting["pairs"]["stopped"] for line in process.err.splitlines() if "SIGTERM" in line]
    assert len(lines) == 1 and "RESUME=1" in lines[0]
    print(f"figure: two ranks, one of them stuck in a collective, ended {waiting['seconds']:.0f} s after a SIGTERM")


@pytest.fixture(scope="module")
def gone_on(waiting, scoring) -> tuple[list[runs.Run], dict[str, list[int]]]:
    """The stopped pair once more, and what the first rank had finished in the first session."""
    names = ("score", "adapt 1", "adapt 4")
    before = {name: announced(waiting["pairs"]["stopped"][0], name) for name in names}
    pair = runs.ranks(waiting["pairs"]["stopped"][0].folder, before=announce, RESUME=1, **scoring)
    assert runs.codes(pair) == [0, 0]
    return pair, before


def test_what_a_waiting_rank_had_finished_is_not_done_again(gone_on, whole):
    pair, before = gone_on
    for name, done in before.items():
        assert done and of_all(pair, name) == sorted(set(DOCUMENTS) - set(done))
    assert figures(pair[0]) == figures(whole)


def test_sessions_say_who_scored_how_long_and_how_it_ended(gone_on, waiting):
    evaluation, sessions = gone_on[0][0].result["evaluation"], gone_on[0][0].result["sessions"]
    first, second = sessions
    assert [(row["stage"], row["world_size"]) for row in sessions] == [("evaluation", 2)] * 2
    assert len(first["devices"]) == len(second["devices"]) == 2 and second["ended"] == "finished"
    # Who is stuck cannot say so; who waited for it in a collective may hear of its end before it is told why.
    assert "SIGTERM" in first["ended"] or first["ended"] == "killed" or "dead or out of reach" in first["ended"]
    assert evaluation["seconds"] >= first["seconds"] + second["seconds"] - 0.5 > 3  # waiting for another counts
    assert evaluation["at_least"] is (first["ended"] == "killed")


def test_a_rank_that_computes_for_longer_than_one_may_be_silent_is_not_taken_for_dead(waiting, whole):
    assert waiting["codes"]["slow"] == [0, 0], waiting["pairs"]["slow"][0].err
    assert figures(waiting["pairs"]["slow"][0]) == figures(whole)


def test_what_a_collective_says_of_its_failure_is_told():
    """Whatever the cause: mostly another rank that is gone, but a network, too."""
    ranks = train_gpt.Ranks()
    ranks.world = 2
    error = RuntimeError("[/gloo/transport/tcp/device.cc:93] Unable to find interface for: eth7")
    assert "dead or out of reach" in (line := ranks.lost(error)) and "Unable to find interface for: eth7" in line
    assert "Broken pipe" in ranks.lost(train_gpt.dist.DistNetworkError("Broken pipe"))
    assert ranks.lost(RuntimeError("shapes differ")) == ranks.lost(ValueError("connection")) == ""


@pytest.mark.parametrize("every", (1, 2, 7))
def test_silence_is_counted_from_the_last_sign_of_life(monkeypatch, every):
    """However late in the run, and whether or not each look finds a new sign."""
    ranks = train_gpt.Ranks()
    ranks.world, ranks.beats, ranks.knock = 2, [0, 0], None
    turns, last, ended = itertools.count(1), 994, []

    def half_a_second(*_):
        turn = next(turns)
        if turn <= last and turn % every == 0:
            ranks.beats = [0, turn]
        return [], [], []

    monkeypatch.setattr(train_gpt.select, "select", half_a_second)
    monkeypatch.setattr(train_gpt._thread, "interrupt_main", lambda number: ended.append(next(turns) - 1))
    monkeypatch.setattr(time, "sleep", lambda seconds: setattr(ranks, "leaving", True))
    ranks.watch()
    assert train_gpt.PATIENCE <= (ended[0] - last) / 2 <= train_gpt.PATIENCE + 1 and ranks.ending[0] == 1


def test_a_job_that_stands_still_as_a_whole_goes_on(waiting, whole):
    """SIGSTOP to all ranks for longer than a rank may be silent, as by ctrl-Z; they do not wake at the same time."""
    assert waiting["codes"]["still"] == [0, 0], waiting["pairs"]["still"][0].err
    assert figures(waiting["pairs"]["still"][0]) == figures(whole)


def only_share_out() -> None:
    """Instead of a run: three queues, of which one rank is slow to take its part; each prints what it got."""

    def entry() -> int:
        ranks = train_gpt.Ranks()
        ranks.join(os.environ)
        ranks.connect(torch.device("cpu"))
        for name, count in (("first", 40), ("second", 1), ("third", 0)):
            for number, item in ranks.queue([f"{name}{i}" for i in range(count)]):
                print("item", item, number, flush=True)
                time.sleep(0.001 + 0.1 * (ranks.rank == 1))
        ranks.leave()
        return 0

    train_gpt.entry = entry


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_item_of_a_shared_list_goes_to_exactly_one_rank_in_order(tmp_path, world):
    ended = runs.ranks(tmp_path, world, before=only_share_out)
    assert runs.codes(ended) == [0] * world
    taken = [[line.split()[1] for line in process.lines if line.startswith("item ")] for process in ended]
    expected = [f"first{i}" for i in range(40)] + ["second0"]
    assert sorted(sum(taken, [])) == sorted(expected)
    numbers = [line.split()[1:] for process in ended for line in process.lines if line.startswith("item ")]
    assert all(int(number) == 1 + int(re.sub(r"\D", "", item)) for item, number in numbers)
    for mine in taken:
        assert mine == sorted(mine, key=expected.index)
    if world > 1:  # who is slow gets less
        first = [sum(item.startswith("first") for item in mine) for mine in taken]
        assert 0 < first[1] < 20 and first[1] < min(first[:1] + first[2:])


def test_a_rank_that_comes_late_changes_no_figure_and_nothing_is_scored_twice_or_never(tmp_path, scoring, whole):
    settings = scoring | dict(TTT_BATCH_SIZE=1, EVAL_MAX_SECONDS=0)
    pair = runs.ranks(tmp_path, before=partial(late_rank, 1), **settings)
    assert runs.codes(pair) == [0, 0]
    for name in ("score", "adapt 1", "adapt 4"):
        assert of_all(pair, name) == DOCUMENTS
    assert np.allclose(pair[0].figures("ttt_epoch"), whole.figures("ttt_epoch"), rtol=1e-6)


# ---- The evaluation's progress


def test_documents_that_another_plan_gave_to_other_ranks_count_once(tmp_path, scoring, whole):
    pair = runs.ranks(tmp_path, before=other_plan, **scoring)
    assert runs.codes(pair) == [143, 143]
    pair = runs.ranks(tmp_path, RESUME=1, **scoring)
    assert runs.codes(pair) == [0, 0]
    assert figures(pair[0]) == figures(whole)


@pytest.mark.parametrize("world", [1, 3])
def test_another_number_of_ranks_goes_on_where_two_were_stopped(tmp_path, scoring, whole, world):
    pair = runs.ranks(tmp_path, before=partial(stop_in_adapt, 2), **scoring)
    assert runs.codes(pair) == [143, 143]
    assert len(list(tmp_path.glob("scores_*"))) == 2
    first = {name: of_all(pair, name) for name in ("score", "adapt 1")}
    again = runs.ranks(tmp_path, world, before=announce, RESUME=1, **scoring)
    assert runs.codes(again) == [0] * world
    assert (
        len(of_all(again, "score")) < len(DOCUMENTS) and sorted({*first["score"], *of_all(again, "score")}) == DOCUMENTS
    )
    assert sorted({*first["adapt 1"], *of_all(again, "adapt 1")}) == DOCUMENTS and first["adapt 1"]
    assert figures(again[0]) == figures(whole) and not list(tmp_path.glob("scores_*"))


def test_a_kill_between_the_last_figure_and_the_result_costs_nothing_that_was_scored(tmp_path, scoring, whole):
    dead = runs.run(tmp_path, 137, before=die_before_the_result, **scoring)
    assert announced(dead, "adapt 4") == DOCUMENTS and not (tmp_path / "result.json").exists()
    again = runs.run(tmp_path, before=announce, RESUME=1, **scoring)
    assert of_all([again], "score") == of_all([again], "adapt 1") == of_all([again], "adapt 4") == []
    assert figures(again) == figures(whole) and again.result["val_bpb"] == whole.result["val_bpb"]


@pytest.mark.parametrize(
    "earlier, expected",
    (
        ([("evaluation", "finished", 1000)], 0),
        ([("another", "stopped by SIGTERM", 1000)], 0),
        (
            [
                ("training", "finished", 9000),
                ("evaluation", "stopped by SIGTERM", 1000),
                ("evaluation", "killed", 2000),
            ],
            3000,
        ),
        ([("evaluation", "killed", 1000), ("evaluation", "finished", 2000), ("evaluation", "killed", 4000)], 4000),
    ),
)
def test_seconds_of_earlier_sessions_count_where_none_has_finished_since(tmp_path, earlier, expected):
    """One that has finished leaves no scores, one under other settings leaves none for this: all is done anew. A killed
    one took a little longer than its account says."""
    data, weights = scored.write_data(tmp_path / "data"), scored.write_weights(tmp_path / "weights.pt")
    files = dict(EVAL_ONLY=weights, DATA_PATH=data, TOKENIZER_PATH=data / "tokenizer.model")
    run = runs.alone(tmp_path, **scored.SETTINGS, **files)
    tags = dict(another="of other settings")
    for stage, ended, seconds in earlier:
        stage, tag = stage.replace("another", "evaluation"), tags.get(stage, "")
        run.sessions.append(dict(stage=stage, tag=tag, ended=ended, seconds=seconds))
    train_gpt.score_file(train_gpt.scoring_model(run), train_gpt.load_validation(run), run)
    evaluation = json.loads((tmp_path / "result.json").read_bytes())["evaluation"]
    assert expected <= evaluation["seconds"] < expected + 500
    assert evaluation["at_least"] is (earlier[-1][1] == "killed")


def test_scores_whose_seconds_nobody_knows_are_of_at_least_those_that_are_counted(tmp_path, scoring):
    runs.run(tmp_path, 143, before=partial(stop_in_adapt, 3), **scoring)
    shutil.copytree(tmp_path, whole := tmp_path / "with its account")
    (tmp_path / "sessions.json").unlink()
    for folder in (tmp_path, whole):
        runs.run(folder, 143, before=partial(stop_in_adapt, 2), RESUME=1, **scoring)  # nor does a second one
        evaluation = runs.run(folder, RESUME=1, **scoring).result["evaluation"]
        assert evaluation["at_least"] is (folder == tmp_path)


@pytest.mark.parametrize("name, value", [("LOGIT_SOFTCAP", 2), ("ROPE_BASE", 100)])
def test_nothing_is_taken_over_from_an_evaluation_under_another_setting(tmp_path, whole, name, value):
    """Of a state dict as it is, whose configuration comes from the environment alone."""
    settings = dict(EVAL_ONLY=whole.folder / "final_model.pt", **SCORING)
    runs.run(tmp_path / "stopped", 143, before=partial(stop_in_adapt, 2), **settings)
    again = runs.run(tmp_path / "stopped", before=announce, RESUME=1, **settings | {name: value})
    assert announced(again, "score") == announced(again, "adapt 1") == announced(again, "adapt 4") == DOCUMENTS
    stopped, finished = again.result["sessions"]
    assert stopped["tag"] != finished["tag"]
    assert again.result["evaluation"]["seconds"] < finished["seconds"] + 0.5  # without those of the stopped one
    if name == "LOGIT_SOFTCAP":
        assert figures(again) == figures(runs.run(tmp_path / "whole", **settings | {name: value}))


def test_an_evaluation_is_known_by_all_that_its_figures_depend_on_and_by_nothing_else(run):
    """Progress is taken over under the same tag alone: no setting of the scoring may be missing, no rank be in it."""
    stream = stream_of(small(), [20, 30])
    tag = train_gpt.evaluation_tag
    changes = dict(
        ttt_protocol="single_pass", ttt_context="recompute", ttt_lora_rank=3, ttt_lora_lr=0.02, ttt_weight_decay=0.5,
        ttt_lora_targets="c_q", ttt_lora_alpha=9.0, ttt_mixture=True, ttt_mixture_lr=0.3,
        ttt_n_epochs=3, ttt_chunk_size=8, ttt_eval_seq_len=32, ttt_enabled=False, seed=1,
        beta1=0.8, beta2=0.9, eval_stride=4, num_layers=4, mlp_mult=2.0, rope_base=100.0, logit_softcap=2.0,
    )  # fmt: skip
    tags = [tag("weights", stream, run.using(**{name: value})) for name, value in changes.items()]
    tags += [tag("others", stream, run), tag("weights", stream_of(small(), [20, 30], seed=1), run)]
    tags += [tag("weights", stream_of(small(), [30, 20]), run), tag("weights", stream, run)]
    assert len(set(tags)) == len(tags)
    other = run.using(eval_max_seconds=1, output_dir="x", run_id="y", resume=True, iterations=3, data_path="z")
    other = other.using(ttt_batch_size=3, ttt_mixture_share=0.2)  # of which a target's NLL knows nothing
    other.ranks, other.folder = train_gpt.Ranks(), Path("x")
    other.ranks.rank, other.ranks.world = 2, 3
    assert tag("weights", stream, other) == tags[-1]


def test_fewer_documents_at_once_go_on_with_what_more_have_scored(tmp_path, scoring):
    """As a run that is out of memory says to do."""
    runs.run(tmp_path, 143, before=partial(stop_in_adapt, 3), **scoring | dict(TTT_BATCH_SIZE=6))
    again = runs.run(tmp_path, before=announce, RESUME=1, **scoring | dict(TTT_BATCH_SIZE=3))
    assert announced(again, "score") == announced(again, "adapt 1") == [] and announced(again, "adapt 4") == DOCUMENTS


def test_nothing_is_taken_over_from_an_evaluation_of_other_text_of_the_same_shape(tmp_path, scoring):
    data = tmp_path / "data"
    shutil.copytree(runs.data(), data)
    runs.run(tmp_path / "run", 143, before=partial(stop_in_adapt, 2), **scoring, DATA_PATH=data)
    tokens = runs.documents(runs.LENGTHS, 7)
    tokens[tokens == 5] = 6
    runs.write_shard(data / "fineweb_val_000000.bin", tokens)
    again = runs.run(tmp_path / "run", before=announce, RESUME=1, **scoring, DATA_PATH=data)
    assert announced(again, "score") == announced(again, "adapt 1") == announced(again, "adapt 4") == DOCUMENTS


# ---- What a run says of itself, and where


def test_shards_are_known_by_every_token_and_their_order(tmp_path):
    one, two = (np.random.default_rng(seed).integers(2, 300, 700_000) for seed in (0, 1))

    def known(*shards: np.ndarray) -> str:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        for number, tokens in enumerate(shards):
            runs.write_shard(folder / f"fineweb_train_{number:06}.bin", tokens)
        return train_gpt.fingerprint(train_gpt.open_shards("train", runs.alone(DATA_PATH=folder)))

    whole = known(one, two)
    assert known(one, two) == whole
    for place in (0, 5500, 350_001, -1):
        changed = two.copy()
        changed[place] -= 1
        assert known(one, changed) != whole, place
    for others in ([two, one], [one], [one, two[:-1]], [np.append(one, two)], [one, np.append(two, two[-1])]):
        assert known(*others) != whole


def test_a_checkpoint_of_other_shards_of_the_same_sizes_is_refused(tmp_path, whole):
    data = tmp_path / "data"
    shutil.copytree(runs.data(), data)
    for i in range(2):
        runs.write_shard(data / f"fineweb_train_{i:06}.bin", runs.documents([100, 37, 211, 52] * 5, i + 5))
    (tmp_path / "run").mkdir()
    shutil.copy(whole.folder / "checkpoint.pt", tmp_path / "run")
    refused = runs.run(tmp_path / "run", 2, RESUME=1, DATA_PATH=data)
    assert "another DATA" in runs.user_error(refused.err)


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


def real_validations(act) -> None:
    """Let act(n) precede the n-th validation of the real text, the one before training included."""
    calls = itertools.count()

    def evaluate(forward, stream, *arguments, inner=train_gpt.evaluate_standard):
        if stream.target_count == TARGETS:
            act(next(calls))
        return inner(forward, stream, *arguments)

    train_gpt.evaluate_standard = evaluate


def end_in_validation(number: int, validation: int) -> None:
    real_validations(lambda n: n == validation and os.kill(os.getpid(), number))


def test_a_signal_in_a_validation_is_heard_when_that_ends(tmp_path):
    stopped = runs.run(tmp_path, 143, before=partial(end_in_validation, signal.SIGTERM, 1), TRAIN_LOG_EVERY=1)
    assert "after step 6; its checkpoint is in" in stopped.err and "step:7/" not in stopped.out


def test_a_kill_in_the_last_validation_costs_no_training(tmp_path, whole):
    """Which may take longer than a launcher waits for the end."""
    runs.run(tmp_path, 137, before=partial(end_in_validation, signal.SIGKILL, 2), **SCORING)
    again = runs.run(tmp_path, RESUME=1, **SCORING)
    assert "at step 12" in again.out and "train_loss" not in again.out
    assert again.artifact == whole.artifact and figures(again) == figures(whole)


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
    assert not (tmp_path / "run" / "result.json").exists()  # the preflight has scored them


def nan_in_the_score() -> None:
    """One target of document 3, as where adapters diverge."""
    adapt = train_gpt.DocumentBatch.adapt

    def planted(batch, *arguments, **named):
        adapt(batch, *arguments, **named)
        row = np.flatnonzero(batch.documents == 3)
        if batch.stream.target_count == TARGETS and len(row):
            batch.nll[row[0], 5] = math.nan

    train_gpt.DocumentBatch.adapt = planted


@pytest.mark.parametrize("settings", [dict(TTT_MIXTURE=1), dict(TTT_PROTOCOL="single_pass")], ids=str)
@pytest.mark.parametrize("world", [1, 2])
def test_a_score_that_is_not_finite_is_an_error_once_the_result_is_written(tmp_path, scoring, world, settings):
    """Of two predictions one may be infinite: their mixture is not."""
    ended = runs.ranks(tmp_path, world, before=nan_in_the_score, **scoring | settings)
    mixes = "TTT_MIXTURE" in settings
    assert runs.codes(ended) == [0 if mixes else 2] * world
    result = json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)
    evaluation = result["evaluation"]
    assert evaluation["backward_looking"]["val_bpb"] is None and evaluation["backward_looking"]["not_finite"] == 1
    assert evaluation["no_adaptation"]["val_bpb"] > 0 and (result["val_bpb"] is None) != mixes
    if not mixes:
        assert "learning rates" in runs.one_error(ended) and ended[0].lines[-1] == f"{FINAL} val_loss:inf val_bpb:inf"


def nan_in_epoch(epoch: int) -> None:
    """The sums of document 3 are NaN in one epoch of replay: in the others they are finite."""
    adapt = train_gpt.DocumentBatch.adapt

    def planted(batch, epochs, *arguments, **options):
        adapt(batch, epochs, *arguments, **options)
        row = np.flatnonzero(batch.documents == 3)
        if batch.stream.target_count == TARGETS and epochs >= epoch and len(row):
            batch.epochs[epoch - 1][row[0]] = math.nan

    train_gpt.DocumentBatch.adapt = planted


def test_a_number_that_is_not_finite_in_a_later_epoch_is_null_there_and_nothing_else_suffers(tmp_path, scoring, whole):
    done = runs.run(tmp_path, before=partial(nan_in_epoch, 2), **scoring)
    curve, known = done.result["evaluation"]["curve"], whole.result["evaluation"]["curve"]
    assert [row["not_finite"] for row in curve] == [0, 1, 0, 0] and curve[1]["val_bpb"] is curve[1]["val_loss"] is None
    for row, expected in zip(curve, known, strict=True):
        assert row["epoch"] == 2 or row["val_bpb"] == expected["val_bpb"]
    assert done.lines[-1] == whole.lines[-1]
    json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize(
    "variables",
    [
        dict(RANK=0),
        dict(WORLD_SIZE=2),
        dict(RANK="x", WORLD_SIZE=2),
        dict(RANK=2, WORLD_SIZE=2),
        dict(RANK=0, WORLD_SIZE=2),
        dict(RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT="in use"),
    ],
)
def test_half_a_place_among_ranks_is_one_line(tmp_path, variables):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        in_use = "MASTER_PORT" in variables
        refused = runs.run(tmp_path, 2, **variables | (dict(MASTER_PORT=taken.getsockname()[1]) if in_use else {}))
    assert "torchrun" in runs.user_error(refused.err) and "Traceback" not in refused.err
    assert ("EADDRINUSE" in refused.err) is in_use


def a_console_that_goes(kind: str) -> None:
    """Standard output is a pipe or a terminal whose other end goes after a line, a pipe that nobody reads, a full disk,
    or knows only ASCII."""
    if kind == "ascii":
        sys.stdout.reconfigure(encoding="ascii", errors="strict")
        return
    if kind == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
        return
    reading, writing = os.openpty() if kind == "terminal" else os.pipe()
    os.dup2(writing, 1)
    os.close(writing)
    if kind == "unread":
        train_gpt.STALL = 0.3
        os.set_blocking(1, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(1, b"x" * 4096)
        os.set_blocking(1, True)
        return

    def read() -> None:
        seen = b""
        while b"step:0/12 val" not in seen:
            seen += os.read(reading, 4096)
        os.close(reading)

    threading.Thread(target=read, daemon=True).start()


@pytest.mark.parametrize("kind", ["pipe", "terminal", "unread", "full", "ascii"])
def test_a_console_that_goes_away_or_is_full_or_narrow_does_not_end_the_run(tmp_path, kind):
    if kind == "full" and not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    misspelt = dict(TTT_EPOCHS=1) if kind == "ascii" else {}  # whose warning has a dash that ASCII does not know
    done = runs.run(tmp_path, before=partial(a_console_that_goes, kind), TTT_ENABLED=0, **misspelt)
    assert FINAL in done.log.splitlines()[-1] and not done.err and done.result["training"]["steps"] == 12
    notes = [line for line in done.log.splitlines() if line.startswith("note: the console is gone (")]
    assert len(notes) == (kind != "ascii")
    if kind == "ascii":
        assert FINAL in done.lines[-1] and "did you mean TTT_N_EPOCHS?" in done.out


def test_weights_that_are_not_finite_after_the_only_step_are_laid_to_the_settings(tmp_path):
    ended = runs.run(tmp_path, 2, SCALAR_LR=1e30, WEIGHT_DECAY=1e30, ITERATIONS=1)
    message = runs.user_error(ended.err)
    assert (
        "not finite" in message
        and "WEIGHT_DECAY" in message
        and "damaged" not in message
        and not (tmp_path / "final_model.ptz").exists()
    )


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
        assert runs.codes(again) == [0] * world
        assert again[0].artifact == first.artifact and figures(again[0]) == figures(first)
    (folder / "result.json").unlink()
    assert runs.run(folder, RESUME=1, QUANTIZER="nearest", **settings).artifact != first.artifact


def test_a_setting_of_the_export_may_change_after_training(tmp_path, whole):
    shutil.copy(whole.folder / "checkpoint.pt", tmp_path)
    done = runs.run(tmp_path, RESUME=1, PRUNE_FRACTION=0.1, ARTIFACT_MAX_BYTES=17_000_000, TTT_N_EPOCHS=1)
    assert done.result["training"]["resumed"] is True and "step:12/12 train_loss" not in done.out
