"""Tests of the tools that turn runs into results: data/record.py, data/plot.py and data/compare.py.

Results are those of real micro runs; for what a micro run cannot be (a record, a run that was killed) a copy with other
numbers in its fields."""

from __future__ import annotations

import atexit
import errno
import functools
import hashlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import runs as processes
import train_gpt
from tools import ROOT, call, compare, is_one_line_error, plot, record

TARGETS, BYTES, DOCUMENTS = 62_021_845, 151_000_000, 50_000
BASELINE = 1.95
PLACEHOLDER = json.loads((ROOT / "submission.json").read_text())
FAST = settings(deadline=None, max_examples=50)


# ---------------------------------------------------------------------------------------------- results


SOURCE = (
    '"""A script\n\nthat scores."""\nprint(f"step:{step}/{n} val_loss:{loss}")\n'  # logs begin with what wrote them
)
SHAPE = dict(num_layers=10, model_dim=512, num_heads=8, num_kv_heads=4, swa_enabled=True, max_wallclock_seconds=600.0)
SHA256 = hashlib.sha256(SOURCE.encode()).hexdigest()


@functools.cache
def micro() -> dict[str, Path]:
    """The folders of a micro run with replay and of evaluations of its artifact: single_pass with the mixture, the
    sliding window, and replay whose time is over when every document is scored without adaptation."""
    folder = Path(tempfile.mkdtemp(prefix="train_gpt_results_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    weights = folder / "replay" / "final_model.ptz"
    evaluations = {
        "replay": {},
        "mixture": dict(EVAL_ONLY=weights, TTT_PROTOCOL="single_pass", TTT_MIXTURE=1),
        "sliding": dict(EVAL_ONLY=weights, TTT_ENABLED=0),
        "late": dict(EVAL_ONLY=weights, TTT_MIXTURE=1, TTT_MIXTURE_LR=0.02, EVAL_MAX_SECONDS=1e-3),
    }
    for name, settings_ in evaluations.items():
        processes.run(folder / name, TTT_N_EPOCHS=3, **settings_)
    return {name: folder / name for name in evaluations}


@functools.cache
def left_by(name: str) -> str:
    """A micro run's result.json."""
    return (micro()[name] / "result.json").read_text()


def scale(figure: dict[str, Any], loss: float) -> None:
    """Gives a figure the record's text and this loss."""
    figure.update(val_loss=loss, val_bpb=loss * TARGETS / math.log(2) / BYTES, targets=TARGETS, bytes=BYTES)


def evaluation_of(name: str, loss: float) -> dict[str, Any]:
    """A micro run's evaluation with a record's numbers: `loss` is the score's, replay's epochs go down from it."""
    evaluation = json.loads(left_by(name))["evaluation"]
    for figure in (evaluation.get("sliding"), evaluation.get("mixture"), *evaluation.get("curve", [])):
        if figure:
            scale(figure, loss - 0.15 * (figure.get("epoch", 1) - 1))
    if "curve" in evaluation:
        scale(evaluation["no_adaptation"], loss + 0.01)
        first, last = (dict(evaluation["curve"][i]) for i in (0, -1))
        evaluation.update(backward_looking=first, last_epoch=last, documents=DOCUMENTS)
    return evaluation | {"seconds": 480.5}


def a_result(seed: int, loss: float) -> dict[str, Any]:
    """What train_gpt.py writes after a record run: a micro run's result with the numbers of one that keeps every
    rule."""
    result = json.loads(left_by("replay"))
    device = "NVIDIA H100 80GB HBM3"
    result.update(
        run_id=f"run{seed}",
        seed=seed,
        source_sha256=SHA256,
        source_bytes=len(SOURCE),
        weights_sha256=f"{seed:064x}",
        world_size=8,
        evaluation=evaluation_of("replay", loss),
    )
    result["settings"].update(SHAPE | PLACEHOLDER["protocol"], seed=seed, run_id=f"run{seed}", vocab_size=1024)
    result["environment"].update(torch="2.13.0", device=device, dtype="bfloat16", world_size=8)
    result["training"].update(steps=6700, seconds=595.04 + seed / 1e4, calibration=5.0, averaged=30)
    result["artifact"].update(
        model_bytes=15_800_000 + seed,
        code_bytes=len(SOURCE),
        total_bytes=15_800_000 + seed + len(SOURCE),
        sha256=f"{seed:064x}",
    )
    kinds = ("int5", "int6")  # the micro model is too small for them
    result["artifact"]["kinds"] = {kind: {"weights": 10_000_000, "bytes": 7_000_000} for kind in kinds}
    for row, seconds in zip(result["sessions"], (690.0, 480.5), strict=True):
        row.update(world_size=8, devices=[device] * 8, seconds=seconds)
    result.update({name: result["evaluation"]["backward_looking"][name] for name in ("val_loss", "val_bpb")})
    return result


def a_log(result: dict[str, Any], source: str = SOURCE) -> str:
    step = "step:1/9 train_loss:6.9 train_time:9ms step_avg:9ms"
    figures = [result[name] for name in ("val_loss", "val_bpb")]
    score = " ".join(
        f"{name}:{figure}" for name, figure in zip(("val_loss", "val_bpb"), map(decimals, figures), strict=True)
    )
    last = f"final_int8_zlib_roundtrip_exact {score}"
    return f"{source}\n* PRESET=record\n  RUN_ID={result['run_id']}\n* SEED=42\n{step}\n{last}\n"


def decimals(figure: object) -> str:
    """As logs have it."""
    return f"{figure:.8f}" if type(figure) is float else str(figure)


LOSSES = (1.9300, 1.9312, 1.9295)
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def runs(tmp_path: Path) -> Callable[..., list[Path]]:
    """Writes the result.json of record runs, each changed by one of `changes`, and returns their paths."""

    def write(*changes: Change, losses: tuple[float, ...] = LOSSES) -> list[Path]:
        paths = []
        for index, loss in enumerate(losses):
            result = a_result(42 + index, loss)
            if index < len(changes):
                changes[index](result)
            paths.append(tmp_path / f"run{index}" / "result.json")
            paths[-1].parent.mkdir(exist_ok=True)
            paths[-1].write_text(json.dumps(result))
            paths[-1].with_name("train.log").write_text(a_log(result | dict(run_id=f"run{42 + index}")))
        return paths

    return write


def submit(tmp_path: Path, *arguments: object) -> dict[str, Any]:
    out = tmp_path / "submission.json"
    result = call(record, *arguments, "--out", out)
    assert result.code == 0, result.err
    return json.loads(out.read_text())


def put(path: str, value: object) -> Change:
    """A change: sets the value at a dotted path."""

    def change(result: dict[str, Any]) -> None:
        *sections, name = path.split(".")
        for section in sections:
            result = result[section]
        result[name] = value

    return change


def both(name: str, epoch: int, **values: object) -> Change:
    """A change of a figure and of the epoch of replay's curve that it is."""

    def change(result: dict[str, Any]) -> None:
        for figure in (result["evaluation"][name], result["evaluation"]["curve"][epoch]):
            figure.update(values)

    return change


def session(stage: str, **values: object) -> Change:
    """A change of the session of a stage."""

    def change(result: dict[str, Any]) -> None:
        (row,) = (row for row in result["sessions"] if row["stage"] == stage)
        row.update(values)

    return change


def audit_row(**values: object) -> Change:
    """A change: an audit with one row, of a score."""
    row = {"document": 7, "t": 300, "figure": "epoch_1", "backward_looking": True}
    return put("evaluation.audit", [row | values])


def same(change: Change) -> tuple[Change, Change, Change]:
    return change, change, change


# ---------------------------------------------------------------------------------------------- record.py: the t-test


def p_value(t: float, freedom: int) -> float:
    """What the t-test says of losses whose mean lies `t` standard errors below the baseline less the margin."""
    losses = np.linspace(-1, 1, freedom + 1)
    losses = 2 + losses / losses.std(ddof=1)
    found = record.t_test(losses.tolist(), 2 + record.MARGIN + t / math.sqrt(freedom + 1))
    assert found["t"] == pytest.approx(t, rel=1e-6, abs=1e-6)
    assert found["degrees_of_freedom"] == freedom
    return found["p"]


@pytest.mark.parametrize(
    ("t", "freedom", "p"),
    [  # from tables of Student's distribution
        (3.078, 1, 0.1),
        (6.314, 1, 0.05),
        (31.821, 1, 0.01),
        (6.965, 2, 0.01),
        (9.925, 2, 0.005),
        (4.541, 3, 0.01),
        (2.015, 5, 0.05),
        (2.228, 10, 0.025),
        (2.750, 30, 0.005),
        (2.660, 60, 0.005),
        (1.962, 1000, 0.025),
    ],
)
def test_p_agrees_with_tables(t: float, freedom: int, p: float):
    assert p_value(t, freedom) == pytest.approx(p, rel=2e-3)
    assert p_value(-t, freedom) == pytest.approx(1 - p, rel=1e-3)


@FAST
@given(st.floats(-1e4, 1e4))
def test_p_has_closed_forms(t: float):
    assert p_value(t, 1) == pytest.approx(0.5 - math.atan(t) / math.pi, abs=1e-6)
    assert p_value(t, 2) == pytest.approx(0.5 - t / (2 * math.sqrt(2 + t * t)), abs=1e-6)


def test_t_test_by_hand():
    # Mean 2, deviation 1, so the standard error of 4 runs is 0.5 and t = (3 - 0.005 - 2) / 0.5.
    losses = [2 - math.sqrt(0.75), 2 + math.sqrt(0.75)] * 2
    found = record.t_test(losses, 3.0)
    assert (found["t"], found["degrees_of_freedom"]) == (pytest.approx(1.99), 3)
    assert found["p"] == pytest.approx(0.0703, abs=2e-4)
    assert found["improvement_nats"] == pytest.approx(1)


@pytest.mark.parametrize(("losses", "baseline"), [([], 2.0), ([1.9], 2.0), ([1.9, 1.9], 2.0), ([1.9, 1.8], None)])
def test_t_test_says_nothing_without_evidence(losses: list[float], baseline: float | None):
    assert record.t_test(losses, baseline)["p"] is None


# ---------------------------------------------------------------------------------------------- record.py: statuses


def test_three_good_runs_are_a_record(runs: Callable[..., list[Path]], tmp_path: Path):
    found = submit(tmp_path, *runs(), "--baseline-loss", BASELINE, "--name", "N", "--github-id", "g", "--author", "A")
    assert (found["status"], found["reasons"]) == ("record", [])
    assert (found["name"], found["github_id"], found["author"]) == ("N", "g", "A")
    assert found["val_loss"] == pytest.approx(np.mean(LOSSES))
    assert found["val_loss_std"] == pytest.approx(np.std(LOSSES, ddof=1))
    assert found["val_bpb"] == pytest.approx(np.mean(LOSSES) * TARGETS / math.log(2) / BYTES)
    assert [run["seed"] for run in found["runs"]] == [42, 43, 44]
    assert found["bytes_total"] == 15_800_044 + len(SOURCE)  # the largest
    assert (found["train_seconds"], found["eval_seconds"]) == (600.0444, 480.5)
    assert (found["train_seconds_at_least"], found["eval_seconds_at_least"]) == (False, False)
    assert found["significance"]["p"] < 0.01
    outcomes = {name: rule["outcome"] for name, rule in found["rules"].items()}
    unseen = {f"certificate_{name}" for name in record.CERTIFICATE} | {record.SOURCE_RULE}
    assert {name for name, outcome in outcomes.items() if outcome == "not applicable"} == unseen
    assert {outcome for name, outcome in outcomes.items() if name not in unseen} == {"pass"}


def test_replays_last_epoch_stands_apart_and_is_labelled(runs: Callable[..., list[Path]], tmp_path: Path):
    found = submit(tmp_path, *runs())
    last = found["replay_last_epoch"]
    assert last["val_loss"] == pytest.approx(np.mean(LOSSES) - 0.3)
    assert last["epoch"] == 3
    assert "not a compression rate" in last["label"]
    assert found["val_loss"] == pytest.approx(np.mean(LOSSES))
    assert all("not a compression rate" in run["replay_last_epoch"]["label"] for run in found["runs"])


def single_pass(result: dict[str, Any]) -> None:
    mixture(result)
    del result["evaluation"]["mixture"]
    result["evaluation"]["score"] = "backward_looking"


def mixture(result: dict[str, Any]) -> None:
    result["evaluation"] = evaluation_of("mixture", result["val_loss"])
    result["settings"].update(ttt_protocol="single_pass", ttt_mixture=True)


def sliding(result: dict[str, Any]) -> None:
    result["evaluation"] = evaluation_of("sliding", result["val_loss"])


def test_single_pass_and_sliding_runs_have_no_replay_figure(runs: Callable[..., list[Path]], tmp_path: Path):
    found = submit(tmp_path, *runs(*same(single_pass)), "--baseline-loss", BASELINE)
    assert found["status"] == "record"
    assert found["replay_last_epoch"]["val_bpb"] is None
    found = submit(tmp_path, *runs(*same(sliding)), "--baseline-loss", BASELINE)
    assert found["status"] == "incomplete"  # the sliding window counts no documents
    assert [reason.split(":")[0] for reason in found["reasons"]] == ["full_validation_split"]
    assert found["replay_last_epoch"]["val_bpb"] is None

    def short(result: dict[str, Any]) -> None:
        sliding(result)
        result["evaluation"]["sliding"]["targets"] //= 2

    found = submit(tmp_path, *runs(*same(short)), "--baseline-loss", BASELINE)
    assert found["rules"]["full_validation_split"]["outcome"] == "fail"


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (put("environment.device", "NVIDIA H200"), "hardware_8xH100"),
        (put("world_size", 1), "hardware_8xH100"),
        (session("training", devices=["NVIDIA H100 80GB HBM3"] * 7 + ["NVIDIA H200"]), "hardware_8xH100"),
        (session("evaluation", devices=["NVIDIA H100 80GB HBM3"] * 7), "hardware_8xH100"),
        (session("evaluation", devices=["NVIDIA H100 80GB HBM3"] * 16, world_size=16), "hardware_8xH100"),
        (put("evaluation.documents", 625), "full_validation_split"),
        (put("settings.vocab_size", 4096), "full_validation_split"),
        (put("evaluation.no_adaptation.targets", TARGETS - 1), "every_target_scored_once"),
        (both("last_epoch", -1, val_bpb=1.0), "every_target_scored_once"),
        (put("val_bpb", 1.0), "backward_looking_score"),
        (audit_row(change=0.1, repeat=0.0), "certificate_causal"),
        (put("quantised", False), "quantised_artifact"),
        (lambda result: result.update(weights_sha256=f"{result['seed'] + 7:064x}"), "quantised_artifact"),
        (
            lambda result: result["artifact"].update(model_bytes=16_000_001 - len(SOURCE), total_bytes=16_000_001),
            "size_cap",
        ),
        (lambda result: result["training"].update(seconds=612.3 + result["seed"]), "train_seconds"),
        (lambda result: result["training"].update(seconds=595.2 + result["seed"] / 1e4), "train_seconds"),  # > a step
        (put("training.calibration", 9.0), "train_seconds"),
        (put("evaluation.seconds", 600.01), "eval_seconds"),
    ],
)
def test_a_broken_rule_makes_a_non_record(change: Change, rule: str, runs: Callable[..., list[Path]], tmp_path: Path):
    found = submit(tmp_path, *runs(*same(change)), "--baseline-loss", BASELINE)
    assert found["status"] == "non-record"
    assert [name for name, judged in found["rules"].items() if judged["outcome"] == "fail"] == [rule]
    assert len(found["reasons"]) == 1
    assert found["reasons"][0].startswith(rule)


def test_an_improvement_within_the_margin_is_no_record(runs: Callable[..., list[Path]], tmp_path: Path):
    found = submit(tmp_path, *runs(), "--baseline-loss", np.mean(LOSSES) + 0.0051)
    assert found["status"] == "non-record"
    assert found["significance"]["p"] > 0.01
    assert found["significance"]["improvement_nats"] == pytest.approx(0.0051)


def test_what_cannot_be_judged_leaves_it_incomplete(runs: Callable[..., list[Path]], tmp_path: Path):
    paths = runs()
    found = submit(tmp_path, paths[0], "--baseline-loss", BASELINE)
    assert found["status"] == "incomplete"
    assert found["val_loss_std"] is None
    assert "at least 2 runs" in found["reasons"][0]
    found = submit(tmp_path, *paths)
    assert (found["status"], "baseline" in found["reasons"][0]) == ("incomplete", True)

    def only_evaluated(result: dict[str, Any]) -> None:
        result.update(training=None, artifact=None)

    found = submit(tmp_path, *runs(*same(only_evaluated)), "--baseline-loss", BASELINE)
    assert found["status"] == "incomplete"
    assert (found["bytes_total"], found["train_seconds"]) == (None, None)
    assert [reason.split(":")[0] for reason in found["reasons"]] == [
        "size_cap",
        "train_seconds",
        "significant_improvement",
    ]


def of_the_first(*names: str) -> Change:
    """A change that gives a run what the first run has."""

    def change(result: dict[str, Any]) -> None:
        for name in names:
            put(name, value_at(a_result(42, LOSSES[0]), name))(result)

    return change


def value_at(result: dict[str, Any], path: str) -> Any:
    for name in path.split("."):
        result = result[name]
    return result


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("data.validation", "cc" * 32),
        ("data.train", "cc" * 32),
        ("data.train", None),
        ("environment.dtype", "float32"),
        ("environment.torch", "2.11.0"),
        ("environment.device", "NVIDIA H100 PCIe"),
        ("settings.ttt_lora_lr", 0.002),
        ("settings.a_new_one", 1),
    ],
)
def test_runs_that_differ_in_more_than_the_seed_are_no_record(
    path: str, value: object, runs: Callable[..., list[Path]], tmp_path: Path
):
    found = submit(tmp_path, *runs(lambda _: None, put(path, value)), "--baseline-loss", BASELINE)
    assert found["status"] == "non-record"
    rule = found["rules"]["same_experiment"]
    before = None if path == "settings.a_new_one" else value_at(a_result(42, 1.9), path)
    assert rule["outcome"] == "fail"
    assert f"{path}: {before} and {value}" in rule["detail"]
    split = found["rules"]["full_validation_split"]
    assert split["outcome"] == ("fail" if path == "data.validation" else "pass")
    assert ("not verifiable" in split["detail"]) == (path != "data.validation")


@pytest.mark.parametrize("names", [("seed", "settings.seed"), ("weights_sha256", "artifact.sha256"), ("training",)])
def test_a_training_twice_is_not_two_seeds(names: tuple[str, ...], runs: Callable[..., list[Path]], tmp_path: Path):
    found = submit(tmp_path, *runs(lambda _: None, of_the_first(*names)), "--baseline-loss", BASELINE)
    assert found["status"] == "non-record"
    rule = found["rules"]["distinct_trainings"]
    assert (rule["outcome"], "more than once" in rule["detail"]) == ("fail", True)
    assert found["significance"]["degrees_of_freedom"] == (1 if "weights_sha256" in names else 2)


def test_one_artifact_under_three_seeds_is_no_sample(runs: Callable[..., list[Path]], tmp_path: Path):
    def evaluated(result: dict[str, Any]) -> None:
        result.update(training=None, artifact=None, weights_sha256="dd" * 32)

    found = submit(tmp_path, *runs(*same(evaluated)), "--baseline-loss", BASELINE)
    assert found["status"] == "non-record"
    assert found["rules"]["distinct_trainings"]["outcome"] == "fail"
    assert found["significance"]["p"] is None


def test_three_seeds_of_a_tiny_run_have_a_t_test(runs: Callable[..., list[Path]], tmp_path: Path):
    def tiny(result: dict[str, Any]) -> None:
        result["environment"].update(device="x86_64", dtype="float32")
        result["training"].update(steps=160, seconds=27.0 + result["seed"] / 100)
        result.update(world_size=1)
        result["evaluation"].update(documents=11, seconds=38.0)

    found = submit(tmp_path, *runs(*same(tiny)), "--baseline-loss", BASELINE)
    assert found["status"] == "non-record"
    assert found["significance"]["p"] < 0.01
    failed = [name for name, rule in found["rules"].items() if rule["outcome"] == "fail"]
    assert failed == ["hardware_8xH100", "full_validation_split"]


def test_the_folder_of_a_pull_request_holds_all_it_needs(runs: Callable[..., list[Path]], tmp_path: Path):
    folder = tmp_path / "records" / "name"
    paths = runs()
    result = call(record, *paths, "--baseline-loss", BASELINE, "--folder", folder)
    assert result.code == 0, result.err
    logs = [f"train_seed{seed}.log" for seed in (42, 43, 44)]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["README.md", "submission.json", "train_gpt.py", *logs]
    )
    assert (folder / "train_gpt.py").read_text() == SOURCE
    assert [(folder / log).read_text() for log in logs] == [a_log(json.loads(path.read_text())) for path in paths]
    readme = (folder / "README.md").read_text()
    assert "status: record" in readme
    assert f"{np.mean(LOSSES):.6f}" not in readme.split("mean:")[0]
    assert json.loads((folder / "submission.json").read_text())["status"] == "record"
    assert is_one_line_error(call(record, *paths, "--folder", folder), "not empty")


def test_the_committed_placeholder_has_the_fields_of_a_submission(runs: Callable[..., list[Path]], tmp_path: Path):
    committed = PLACEHOLDER
    found = submit(tmp_path, *runs(), "--baseline-loss", BASELINE)
    assert list(committed) == list(found)
    for section in ("replay_last_epoch", "significance", "rules", "protocol"):
        assert list(committed[section]) == list(found[section])
    if not committed["runs"]:
        assert committed["val_bpb"] is None
        assert committed["status"] == "not measured on 8xH100"
        assert not any(committed[name] for name in committed if name.startswith(("val_", "bytes_")))
    assert [committed[name] for name in record.ABOUT] == [found[name] for name in record.ABOUT]


def test_a_submission_has_every_setting_of_its_protocol() -> None:
    names = {name for name in train_gpt.Settings.__dataclass_fields__ if name.startswith("ttt_")}
    assert names - {"ttt_batch_size"} <= PLACEHOLDER["protocol"].keys()


def test_a_damaged_placeholder_is_one_line_and_none_for_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "PLACEHOLDER", tmp_path / "submission.json")
    without = {name: value for name, value in PLACEHOLDER.items() if name != "author"}
    for content, word in (
        ('{"name": 1,}', "no JSON"),
        ("[]", "no name"),
        (json.dumps(without), "no author"),
        (json.dumps(PLACEHOLDER | {"protocol": []}), "protocol"),
    ):
        record.PLACEHOLDER.write_text(content)
        assert is_one_line_error(call(record, "run"), "submission.json", word, "restore it")
    assert call(record, "--help").code == 0


def test_name_and_blurb_are_those_of_the_model(runs: Callable[..., list[Path]], tmp_path: Path):
    def tiny(result: dict[str, Any]) -> None:
        tiny = dict(num_layers=4, model_dim=96, num_kv_heads=8, swa_enabled=False, max_wallclock_seconds=0.0)
        result["settings"].update(tiny)
        result["artifact"]["kinds"].pop("int6")

    found = submit(tmp_path, *runs(*same(tiny)))
    assert found["name"] == "4L 96d GPT, int5 MLP, per-document LoRA test-time training"
    assert found["blurb"].startswith("4 layers of width 96 with attention,")
    assert not any(word in found["blurb"] for word in ("GQA", "wall clock", "SWA", "int6"))
    found = submit(tmp_path, *runs(*same(tiny)), "--name", "mine", "--blurb", "said")
    assert (found["name"], found["blurb"], found["author"]) == ("mine", "said", PLACEHOLDER["author"])

    def without(result: dict[str, Any]) -> None:
        del result["settings"]["num_layers"]

    assert is_one_line_error(call(record, *runs(*same(without))), "settings.num_layers", "--name")


def test_without_a_place_the_submission_is_printed(runs: Callable[..., list[Path]], monkeypatch: Any, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    paths = runs()
    before = {path: path.read_bytes() for path in (ROOT / "submission.json", *tmp_path.rglob("*")) if path.is_file()}
    with io.TextIOWrapper(io.BytesIO(), "ascii") as stream:
        result = call(record, *paths, "--baseline-loss", BASELINE, "--author", "Zoë 🐝", stdout=stream)
        assert result.code == 0 and "status: record" in result.err
        found = json.loads(stream.buffer.getvalue())
    assert (found["status"], found["author"]) == ("record", "Zoë 🐝")
    assert {path: path.read_bytes() for path in before} == before
    assert {path for path in tmp_path.rglob("*") if path.is_file()} <= before.keys()


def lacks(score: int, last: int) -> Change:
    """A change: a deadline kept so many documents from the score and from the last epoch."""

    def change(result: dict[str, Any]) -> None:
        both("backward_looking", 0, lacking=score)(result)
        both("last_epoch", -1, lacking=last)(result)

    return change


def test_a_deadline_is_said_in_words_wherever_the_budget_is_kept(runs: Callable[..., list[Path]], tmp_path: Path):
    result = call(record, *runs(lacks(31, 40)), "--out", tmp_path / "s.json")
    first, second, *rest = result.out.splitlines()
    words = "time ran out: 31 documents count without adaptation in the score, 40 did not reach the last epoch"
    assert words in first and "time" not in second
    (budget,) = (line for line in rest if "eval_seconds:" in line)
    assert budget.startswith("pass") and budget.endswith(f"seed 42: {words}")
    found = json.loads((tmp_path / "s.json").read_text())
    assert found["rules"]["eval_seconds"]["detail"].endswith(words)
    assert [run["cut"] for run in found["runs"]] == [words, None, None]
    only_last = submit(tmp_path, *runs(lacks(0, 40)))["rules"]["eval_seconds"]["detail"]
    assert only_last.endswith("seed 42: time ran out: 40 did not reach the last epoch")


def test_a_run_that_ran_out_of_time_says_so(tmp_path: Path):
    found = submit(tmp_path, micro()["late"])
    result = json.loads(left_by("late"))
    count = len(processes.LENGTHS)
    assert result["evaluation"]["mixture"]["lacking"] == count
    words = f"time ran out: {count} documents count without adaptation in the score"
    assert found["runs"][0]["cut"] == words and words in found["rules"]["eval_seconds"]["detail"]


# ---------------------------------------------------------------------------------------------- record.py: sessions


def sessions(*rows: tuple[str, int, float, str]) -> Change:
    """A change: sessions of a stage, on so many H100, that took so many seconds and ended so."""
    names = ("stage", "world_size", "seconds", "ended")

    def change(result: dict[str, Any]) -> None:
        rows_ = [dict(zip(names, row, strict=True)) for row in rows]
        result["sessions"] = [row | {"devices": ["NVIDIA H100 80GB HBM3"] * row["world_size"]} for row in rows_]

    return change


STOPPED = "stopped by SIGTERM after step 6000; its checkpoint is in runs/a"


def test_sixty_four_gpus_for_nine_of_ten_minutes_are_not_eight(runs: Callable[..., list[Path]], tmp_path: Path):
    change = sessions(
        ("training", 64, 560.0, STOPPED), ("training", 8, 130.0, "finished"), ("evaluation", 8, 480.5, "finished")
    )
    found = submit(tmp_path, *runs(change), "--baseline-loss", BASELINE)
    assert found["status"] == "non-record"
    assert [name for name, rule in found["rules"].items() if rule["outcome"] == "fail"] == ["hardware_8xH100"]
    detail = found["rules"]["hardware_8xH100"]["detail"]
    assert detail == "seed 42: training (560 s) on 64 x NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(
    "change",
    [
        sessions(),
        sessions(("evaluation", 8, 480.5, "finished")),
        sessions(("training", 8, 690.0, "finished")),
        sessions(("training", 8, 130.0, "finished"), ("evaluation", 8, 480.5, "finished")),  # of 600 s of training
    ],
)
def test_hardware_without_an_account_is_not_judged(change: Change, runs: Callable[..., list[Path]], tmp_path: Path):
    found = submit(tmp_path, *runs(change), "--baseline-loss", BASELINE)
    rule = found["rules"]["hardware_8xH100"]
    assert (found["status"], rule["outcome"]) == ("incomplete", "not applicable")
    assert "sessions account for" in rule["detail"]


def test_a_resumed_run_with_a_whole_account_is_a_record(runs: Callable[..., list[Path]], tmp_path: Path):
    change = sessions(
        ("training", 8, 400.0, STOPPED),
        ("training", 8, 290.0, "finished"),
        ("evaluation", 8, 80.0, "stopped by SIGTERM"),
        ("evaluation", 8, 400.5, "finished"),
    )
    assert submit(tmp_path, *runs(change), "--baseline-loss", BASELINE)["status"] == "record"


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (put("evaluation.at_least", True), "eval_seconds"),
        (
            sessions(
                ("training", 8, 690.0, "finished"),
                ("evaluation", 8, 90.0, "killed"),
                ("evaluation", 8, 390.5, "finished"),
            ),
            "eval_seconds",
        ),
        (
            sessions(
                ("training", 8, 400.0, "killed"),
                ("training", 8, 400.0, "finished"),
                ("evaluation", 8, 480.5, "finished"),
            ),
            "train_seconds",
        ),
        (
            sessions(  # by a second signal, which waits for no checkpoint
                ("training", 8, 400.0, "stopped by SIGTERM"),
                ("training", 8, 400.0, "finished"),
                ("evaluation", 8, 480.5, "finished"),
            ),
            "train_seconds",
        ),
    ],
)
def test_a_lower_bound_keeps_no_limit(change: Change, rule: str, runs: Callable[..., list[Path]], tmp_path: Path):
    found = submit(tmp_path, *runs(change), "--baseline-loss", BASELINE)
    judged = found["rules"][rule]
    assert (found["status"], judged["outcome"]) == ("incomplete", "not applicable")
    seconds = 480.5 if rule == "eval_seconds" else 600.0
    assert judged["detail"].startswith(f"seed 42: at least {seconds} s")
    assert found[f"{rule}_at_least"] is True
    assert [run[f"{rule}_at_least"] for run in found["runs"]] == [True, False, False]


def test_a_lower_bound_above_the_limit_breaks_it(runs: Callable[..., list[Path]], tmp_path: Path):
    def change(result: dict[str, Any]) -> None:
        result["evaluation"].update(at_least=True, seconds=601.0)

    judged = submit(tmp_path, *runs(change))["rules"]["eval_seconds"]
    assert judged == {"outcome": "fail", "detail": "seed 42: at least 601.0 of 600"}


# ---------------------------------------------------------------------------------------------- record.py: mixtures


def test_the_mixture_is_a_valid_score_and_labelled(runs: Callable[..., list[Path]], tmp_path: Path):
    found = submit(tmp_path, *runs(*same(mixture)), "--baseline-loss", BASELINE)
    assert found["status"] == "record"
    assert found["score"].startswith("mixture of the predictions without and with adaptation")
    assert "mixed with the prediction without it" in found["blurb"]
    assert {run["score"] for run in found["runs"]} == {"mixture"}
    assert list(found["runs"][0]["figures_val_bpb"]) == ["no_adaptation", "backward_looking", "mixture"]
    assert found["replay_last_epoch"]["val_bpb"] is None
    mixed = submit(tmp_path, *runs(mixture), "--baseline-loss", BASELINE)
    assert mixed["rules"]["same_experiment"]["outcome"] == "fail"
    assert "settings.ttt_mixture: True and False" in mixed["rules"]["same_experiment"]["detail"]
    wrong = submit(tmp_path, *runs(*same(lambda result: (mixture(result), result.update(val_loss=1.0)))))
    assert wrong["rules"]["backward_looking_score"]["outcome"] == "fail"


def test_the_score_of_a_real_mixture_is_read(tmp_path: Path):
    result = json.loads(left_by("mixture"))
    found = submit(tmp_path, micro()["mixture"])
    assert found["val_bpb"] == result["evaluation"]["mixture"]["val_bpb"]
    assert found["rules"]["every_target_scored_once"]["outcome"] == "pass"
    assert found["rules"]["backward_looking_score"]["outcome"] == "pass"


def test_epochs_that_diverge_are_no_figure_of_replay(runs: Callable[..., list[Path]], tmp_path: Path):
    def change(result: dict[str, Any]) -> None:
        evaluation = result["evaluation"]
        for figure in (evaluation["last_epoch"], evaluation["curve"][-1]):
            figure.update(val_loss=None, val_bpb=None, not_finite=3)

    found = submit(tmp_path, *runs(change), "--baseline-loss", BASELINE)
    assert found["status"] == "record"
    assert found["replay_last_epoch"]["val_bpb"] is None


# ---------------------------------------------------------------------------------------------- record.py: certificates


def certified(**outcomes: str) -> Change:
    """A change: a certificate whose findings pass, but for `outcomes`, and the rows of its audit."""
    passed = dict.fromkeys(record.CERTIFICATE, "pass") | outcomes
    findings = {name: dict(outcome=outcome, figure=0.25, detail="said") for name, outcome in passed.items()}

    def change(result: dict[str, Any]) -> None:
        audit_row(change=0.0, repeat=0.0)(result)
        result["evaluation"]["certificate"] = dict(source_sha256=SHA256, documents=2, findings=findings)

    return change


def test_the_findings_of_a_certificate_are_rules(runs: Callable[..., list[Path]], tmp_path: Path):
    names = [f"certificate_{name}" for name in record.CERTIFICATE]
    found = submit(tmp_path, *runs(*same(certified())), "--baseline-loss", BASELINE)
    assert {found["rules"][name]["outcome"] for name in names} == {"pass"}
    assert found["status"] == "record"
    found = submit(tmp_path, *runs(certified(disjoint="fail", decodes="not judged")), "--baseline-loss", BASELINE)
    assert found["status"] == "non-record"
    assert found["reasons"][0].startswith("certificate_disjoint: fail (seed 42: 0.25 said")
    assert found["rules"]["certificate_decodes"]["outcome"] == "not applicable"
    assert "seed 43: no certificate" in found["rules"]["certificate_causal"]["detail"]


def test_a_certificate_counts_only_with_its_rows_and_for_the_source_that_ran(
    runs: Callable[..., list[Path]], tmp_path: Path
):
    def without_rows(result: dict[str, Any]) -> None:
        certified()(result)
        del result["evaluation"]["audit"]

    found = submit(tmp_path, *runs(*same(without_rows)), "--baseline-loss", BASELINE)
    assert found["rules"]["certificate_causal"]["outcome"] == "not applicable"
    assert "no rows" in found["rules"]["certificate_causal"]["detail"]

    def foreign(result: dict[str, Any]) -> None:
        certified()(result)
        result["evaluation"]["certificate"]["source_sha256"] = "cc" * 32

    found = submit(tmp_path, *runs(*same(foreign)), "--baseline-loss", BASELINE)
    rules = [found["rules"][f"certificate_{name}"] for name in record.CERTIFICATE]
    assert {rule["outcome"] for rule in rules} == {"not applicable"}
    assert all("another train_gpt.py" in rule["detail"] for rule in rules)


# ---------------------------------------------------------------------------------------------- record.py: refusals


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("schema_version", 1), ["schema_version 1"]),
        (put("schema_version", 2), ["schema_version 2", "EVAL_ONLY="]),
        (put("evaluation.score", "last_epoch"), ["evaluation.score"]),
        (put("evaluation.score", "mixture"), ["evaluation.mixture"]),
        (put("sessions", None), ["sessions"]),
        (session("training", devices=[8]), ["devices"]),
        (session("evaluation", seconds="long"), ["sessions[1].seconds"]),
        (put("evaluation.certificate", {"source_sha256": "a", "findings": {"causal": {}}}), ["causal.outcome"]),
        (lambda result: result.update(val_loss=None, val_bpb=None), ["not finite", "learning rates"]),
        (put("seed", 43), ["seed 43", "settings"]),
        (put("val_loss", "low"), ["val_loss"]),
        (put("val_loss", math.nan), ["no JSON of a run"]),
        (put("val_loss", 10**400), ["no JSON of a run"]),
        (put("evaluation.seconds", 10**400), ["no JSON of a run"]),
        (put("settings.grad_clip_norm", 10**400), ["no JSON of a run"]),
        (put("evaluation.seconds", 2**63), ["evaluation.seconds 9.22e+18"]),
        (put("val_loss", -1e300), ["val_loss -1e+300"]),
        (put("evaluation.seconds", [1]), ["evaluation.seconds"]),
        (put("seed", True), ["seed"]),
        (put("run_id", "\ud800"), ["no JSON of a run"]),
        (put("evaluation", {}), ["evaluation.seconds"]),
        (put("evaluation.audit", [{}]), ["evaluation.audit[0].document"]),
        (put("evaluation.audit", {}), ["evaluation.audit"]),
        (put("artifact", []), ["artifact"]),
        (put("data", None), ["data"]),
        (put("run_id", "other"), ["train.log", "another run"]),
        (put("source_sha256", "ab" * 32), ["train.log", "source"]),
        (put("source_bytes", len(SOURCE) - 1), ["train.log", "source"]),
    ],
)
def test_refusals(change: Change, words: list[str], runs: Callable[..., list[Path]], tmp_path: Path):
    out = tmp_path / "submission.json"
    out.write_text("before")
    assert is_one_line_error(call(record, *runs(change), "--baseline-loss", BASELINE, "--out", out), *words)
    assert out.read_text() == "before"


def test_a_setting_may_be_as_large_as_training_takes_it(runs: Callable[..., list[Path]], tmp_path: Path):
    found = submit(tmp_path, *runs(*same(put("settings.grad_clip_norm", 1e20))), "--baseline-loss", BASELINE)
    assert found["status"] == "record"


def test_a_setting_of_an_odd_type_is_shown_as_it_is(runs: Callable[..., list[Path]], tmp_path: Path):
    def change(result: dict[str, Any]) -> None:
        mixture(result)
        result["settings"]["ttt_mixture_lr"] = "0.01"

    assert "and with one at 0.01" in submit(tmp_path, *runs(*same(change)))["blurb"]


@pytest.mark.parametrize(
    ("tool", "name"), [(record, "result.json"), (record, "train.log"), (compare, "ttt_documents.npz")]
)
def test_a_pipe_in_a_files_place_is_refused(
    runs: Callable[..., list[Path]], tool: ModuleType, name: str, tmp_path: Path
) -> None:
    """Whoever opened it would wait forever."""
    (path,) = runs(losses=LOSSES[:1])
    path.with_name(name).unlink(missing_ok=True)
    os.mkfifo(path.with_name(name))
    assert is_one_line_error(call(tool, path.parent), f"{name} is a pipe", "give a file")


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (put("artifact.total_bytes", 15_000_000), "artifact.total_bytes"),
        (put("source_bytes", len(SOURCE) + 1), "source"),
        (lambda result: result["artifact"].update(code_bytes=0, total_bytes=15_800_042), "artifact.code_bytes"),
        (put("training.calibration", -400.0), "training.calibration -400"),
        (put("evaluation.seconds", -1.0), "evaluation.seconds -1"),
        (session("evaluation", seconds=-5.0), "sessions[1].seconds -5"),
        (both("backward_looking", 0, lacking=-3), "evaluation.backward_looking.lacking -3"),
        (both("last_epoch", -1, val_loss=-0.5), "evaluation.last_epoch.val_loss -0.5"),
        (put("evaluation.backward_looking.val_bpb", 1.0), "evaluation.backward_looking"),
        (put("evaluation.last_epoch.val_bpb", 1.0), "evaluation.last_epoch"),
        (both("last_epoch", -1, backward_looking=True), "evaluation.curve"),
        (both("backward_looking", 0, backward_looking=False), "evaluation.curve"),
        (lambda result: result["evaluation"]["curve"].pop(1), "evaluation.curve"),
    ],
)
def test_a_result_that_contradicts_itself_is_refused(change: Change, where: str, runs: Callable[..., list[Path]]):
    (path,) = runs(change, losses=LOSSES[:1])
    assert is_one_line_error(call(record, path), where, "as it was left")


def test_files_of_another_run_beside_a_result_are_refused(tmp_path: Path):
    mine = Path(shutil.copytree(micro()["replay"], tmp_path / "mine"))
    assert call(record, mine).code == 0
    for name in ("ttt_documents.npz", "ttt_positions.npz"):
        with np.load(mine / name) as file:
            arrays = dict(file)
        np.savez(mine / name, **{key: 1.01 * value if "nll" in key else value for key, value in arrays.items()})
        assert is_one_line_error(call(record, mine), name)
        (mine / name).unlink()
    content = (mine / "final_model.ptz").read_bytes()
    (mine / "final_model.ptz").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert is_one_line_error(call(record, mine), "final_model.ptz", "not the artifact")


def test_a_session_much_longer_than_its_evaluation_is_not_judged(runs: Callable[..., list[Path]], tmp_path: Path):
    found = submit(tmp_path, *runs(session("evaluation", seconds=7000.0)), "--baseline-loss", BASELINE)
    assert found["rules"]["eval_seconds"]["outcome"] == "not applicable"
    assert "7,000 s" in found["rules"]["eval_seconds"]["detail"]


def test_a_log_is_compared_with_its_result(runs: Callable[..., list[Path]], tmp_path: Path):
    out = "--out", tmp_path / "s.json"
    (path,) = runs(losses=LOSSES[:1])
    log = path.with_name("train.log")
    result = json.loads(path.read_text())
    earlier, other = result | dict(run_id="run9", val_loss=2.5), result | dict(run_id="run420")
    log.write_text(a_log(earlier) + a_log(result))  # resumed: both are its own
    assert call(record, path, *out).code == 0
    swapped, renamed = a_log(result) + a_log(earlier), a_log(result, SOURCE.replace("n", "m"))
    for wrong in (a_log(other), swapped, renamed, "RUN_ID=run42\n", ""):
        log.write_text(wrong)
        assert is_one_line_error(call(record, path, *out), "train.log")
    log.unlink()
    assert is_one_line_error(call(record, path, *out), "train.log")


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=3) | st.sampled_from([0, -1, 10**19, 10**400, 1e308]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=3,
)


def paths_in(value: object, prefix: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The place of everything in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [prefix, *(path for key, inner in items for path in paths_in(inner, (*prefix, key)))]


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_value_in_any_place_is_judged_or_refused(runs: Callable[..., list[Path]], tmp_path: Path, data: Any):
    result = a_result(42, LOSSES[0])
    *sections, name = data.draw(st.sampled_from(paths_in(result)[1:]))
    inner = result
    for section in sections:
        inner = inner[section]
    inner[name] = data.draw(ANYTHING)
    path, other = runs(losses=LOSSES[:2])
    path.write_text(json.dumps(result))
    found = call(record, path, other, "--baseline-loss", BASELINE, "--out", tmp_path / "s.json")
    assert found.code == 0 or is_one_line_error(found)
    if found.code == 0:
        json.loads((tmp_path / "s.json").read_text(), parse_constant=pytest.fail)


def test_files_of_another_kind_are_refused(runs: Callable[..., list[Path]], tmp_path: Path):
    (path,) = runs(losses=LOSSES[:1])
    other = path.rename(path.with_name("result_single_pass.json"))
    assert is_one_line_error(call(record, other, "--out", tmp_path / "s.json"), "folder")
    for content in ("[]", "{}", "no json", "null"):
        (tmp_path / "result.json").write_text(content)
        assert is_one_line_error(call(record, tmp_path, "--out", tmp_path / "s.json"), "result.json")
    assert is_one_line_error(call(record, tmp_path / "missing.json"), "missing.json")
    assert is_one_line_error(call(record, tmp_path, "--baseline-loss", "-1"), "baseline-loss")
    assert is_one_line_error(call(record, "--out", tmp_path / "s.json"), "RUN")
    pair = "--folder", tmp_path / "folder", "--out", tmp_path / "s.json"
    assert is_one_line_error(call(record, path.parent, *pair), "--out", "--folder")
    assert not (tmp_path / "folder").exists()
    assert not (tmp_path / "s.json").exists()


def test_what_is_to_be_changed_is_named_as_it_is_set(runs: Callable[..., list[Path]], tmp_path: Path) -> None:
    report = call(record, *runs(lambda _: None, put("settings.ttt_lora_lr", 0.002)), "--baseline-loss", 1.936).err
    assert "settings.ttt_lora_lr: 0.001 and 0.002 (set TTT_LORA_LR alike)" in report
    assert "better than the baseline: p = " in report and "not below 0.01" in report
    assert "no certificate: python data/audit.py RUN" in report
    assert report.endswith("status: non-record (a rule of the challenge fails)\n")
    report = call(record, *runs()).err
    assert (
        "takes --baseline-loss and at least 2 runs" in report and "(no rule fails, and one cannot be judged)" in report
    )


def test_a_run_that_is_not_there_or_not_finished_is_said_to_be_so(tmp_path: Path) -> None:
    (tmp_path / "begun").mkdir()
    for tool in (record, compare):
        assert is_one_line_error(call(tool, tmp_path / "none"), "none does not exist")
        assert is_one_line_error(call(tool, tmp_path / "begun"), "begun has no result.json", "finished run")


def test_one_cause_is_given_for_a_folder_that_cannot_be_made(runs: Callable[..., list[Path]], tmp_path: Path) -> None:
    out = "--folder", tmp_path / "folder"
    paths = runs()
    assert is_one_line_error(call(record, *paths, paths[0], *out), "same seed")
    other = SOURCE.replace("scores", "counts")

    def change(result: dict[str, Any]) -> None:
        result.update(source_sha256=hashlib.sha256(other.encode()).hexdigest())

    paths = runs(change)
    paths[0].with_name("train.log").write_text(a_log(json.loads(paths[0].read_text()), other))
    assert is_one_line_error(call(record, *paths, *out), "several train_gpt.py")


def test_a_log_without_a_name_is_not_called_anothers(runs: Callable[..., list[Path]]) -> None:
    (path,) = runs(losses=LOSSES[:1])
    path.with_name("train.log").write_text(SOURCE)
    assert is_one_line_error(call(record, path), "names no RUN_ID")


# ---------------------------------------------------------------------------------------------- plot.py

OURS = SOURCE + "\n".join(
    [
        "step:0/40 val_loss:6.89257524 val_bpb:4.12179666 train_time:0ms step_avg:0.00ms",
        *(f"step:{i}/40 train_loss:{6 - i / 20:.8f} train_time:{90 * i}ms step_avg:90.00ms" for i in range(1, 41)),
        "step:40/40 val_loss:3.90000000 val_bpb:2.33000000 train_time:3600ms step_avg:90.00ms",
        "export kind:int5 weights:1000 bytes:600 bits_per_weight:4.8000 entropy:4.7000",
        "export kind:scale weights:10 bytes:20 bits_per_weight:16.0000",
        "export model_bytes:700 code_bytes:300 total_bytes:1000 max_bytes:2000 fits:True seconds:0.1",
        "no_adaptation val_loss:3.91000000 val_bpb:2.34000000",
        "final_ttt_exact protocol:replay context:cached backward_looking_val_bpb:2.33 last_epoch_val_bpb:2.25",
        "final_int8_zlib_roundtrip_exact val_loss:3.90000000 val_bpb:2.33000000",
    ]
)
REFERENCE = (
    SOURCE
    + """\
step:0/20000 val_loss:6.9357 val_bpb:4.1077 train_time:0ms step_avg:0.01ms
step:200/20000 train_loss:2.7801 train_time:8700ms step_avg:43.50ms
step:13780/20000 val_loss:2.0606 val_bpb:1.2172 train_time:600038ms step_avg:43.54ms
stopping_early: wallclock_cap train_time:600038ms step:13780/20000
Serialized model: 67224983 bytes
Code size: 47642 bytes
Total submission size: 67272625 bytes
Serialized model int8+zlib: 15815847 bytes (payload:17178912 raw_torch:17224025 payload_ratio:3.91x)
Total submission size int8+zlib: 15863489 bytes
final_int8_zlib_roundtrip val_loss:2.0727 val_bpb:1.2244 eval_time:1401ms
final_int8_zlib_roundtrip_exact val_loss:2.07269931 val_bpb:1.22436570
"""
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's folder."""
    path = tmp_path / "ours"
    path.mkdir()
    (path / "train.log").write_text(OURS)
    return path


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    """A reference script's log."""
    path = tmp_path / "reference.txt"
    path.write_text(REFERENCE)
    return path


@pytest.fixture
def scored(folder: Path) -> Path:
    """A run's folder with an evaluation: replay of 9 epochs."""
    without = np.array([50.0, 60.0])
    a_scored_run(folder, without, without - 1, np.array([7, 8]), ttt_protocol="replay", epochs=9)
    return folder


def panels(figure: Any) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes]


def drawn(*paths: Path, what: tuple[str, ...] = tuple(plot.PANELS)) -> Any:
    with matplotlib.rc_context(plot.STYLE):
        return plot.draw(plot.read_runs(paths), what)


def legend(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_our_log_is_read(folder: Path):
    (run,) = plot.read_runs([folder])
    assert list(run.train) == list(range(1, 41))
    assert [(*point.values(),) for point in run.val.values()] == [(0, 0, 6.89257524, 4.12179666), (40, 3.6, 3.9, 2.33)]
    assert run.kinds == {"int5": 600, "scale": 20, "header": 80, "code": 300}
    assert (run.cap, run.final) == (2000, 2.33)
    assert panels(drawn(folder, what=("bytes",))) == ["Bytes: 1,000, 50.0% of the cap"]


def test_a_reference_log_is_read(reference: Path):
    (run,) = plot.read_runs([reference])
    assert run.train == {200: {"step": 200, "seconds": 8.7, "loss": 2.7801}}
    assert run.val[13780] == {"step": 13780, "seconds": 600.038, "loss": 2.0606, "bpb": 1.2172}
    assert (run.final, sum(run.kinds.values()), run.cap) == (1.2243657, 15_863_489, 16_000_000)
    assert not run.epochs


def test_a_resumed_log_counts_once(folder: Path):
    (folder / "train.log").write_text(OURS + "\n" + OURS)
    (again,) = plot.read_runs([folder])
    (folder / "train.log").write_text(OURS)
    assert [again] == plot.read_runs([folder])


def test_panels_without_figures_are_left_out(scored: Path, reference: Path):
    assert len(panels(drawn(scored))) == 7
    assert len(panels(drawn(reference))) == 4
    assert not any("Test-time" in title for title in panels(drawn(reference)))
    assert panels(drawn(scored, reference, what=("loss",))) == ["Loss against steps"]


def test_a_short_run_stays_in_sight_beside_a_long_one(folder: Path, tmp_path: Path):
    lines = (f"step:{i * 100}/9000 train_loss:2.0 train_time:{i}ms step_avg:1ms" for i in range(1, 91))
    (tmp_path / "long.txt").write_text("\n".join(lines))
    (axes,) = drawn(folder, tmp_path / "long.txt", what=("loss",)).axes
    low, high = axes.get_ylim()
    assert low < 2.0
    assert high > 5.5


def test_epoch_1_is_marked_and_the_rest_labelled(scored: Path):
    (axes,) = drawn(scored, what=("ttt",)).axes
    said = " ".join(" ".join(text.get_text().split()) for text in axes.texts)
    assert "epochs 2 to 9: has trained on what it scores" in said
    assert "epoch 1: backward-looking, a valid score" in said
    plain = f"no adaptation {110 / math.log(2) / 15:.4f}"
    assert legend(axes) == [plain, "epoch 1 2.9000, a valid score", "epoch 9 2.1000 (not a score)"]
    full = [line for line in axes.lines if line.get_marker() == "o" and line.get_markerfacecolor() == line.get_color()]
    assert [line.get_xydata().tolist() for line in full] == [[[1, 2.9]]]


def test_a_run_without_test_time_training_is_not_in_its_legend(scored: Path, reference: Path):
    (axes,) = drawn(scored, reference, what=("ttt",)).axes
    assert {text.split(":")[0] for text in legend(axes)} == {f"{scored.parent.name}/ours"}


def test_the_cap_is_drawn_when_it_is_in_reach(reference: Path, folder: Path):
    (axes,) = drawn(reference, what=("bytes",)).axes
    assert [line.get_xdata()[0] for line in axes.lines] == [16e6]
    (folder / "train.log").write_text(OURS.replace("max_bytes:2000", "max_bytes:16000000"))
    (axes,) = drawn(folder, what=("bytes",)).axes
    assert not axes.lines
    assert "beyond the frame" in axes.get_xlabel()


def test_png_and_svg_are_written_and_the_same_again(scored: Path, reference: Path, tmp_path: Path):
    for name in ("one/a", "two/b.svg"):
        result = call(plot, scored, reference, "--what", "bytes", "ttt", "--out", tmp_path / name)
        assert result.code == 0, result.err
    first, second = ((tmp_path / name).with_suffix(".svg").read_bytes() for name in ("one/a", "two/b"))
    assert first == second
    assert ET.fromstring(first).tag.endswith("svg")
    assert b"<dc:date>" not in first
    png = (tmp_path / "one/a.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert png == (tmp_path / "two/b.png").read_bytes()
    assert int.from_bytes(png[16:20], "big") == 1800  # twice the width of a README


def test_the_background_is_opaque_white(scored: Path, tmp_path: Path):
    assert call(plot, scored, "--what", "ttt", "--out", tmp_path / "a").code == 0
    pixels = matplotlib.image.imread(tmp_path / "a.png")
    assert (pixels[..., 3:] == 1).all()
    assert (pixels[[0, 0, -1, -1], [0, -1, 0, -1], :3] == 1).all()


def test_runs_are_called_by_the_ends_of_their_paths(scored: Path, reference: Path):
    (axes,) = drawn(scored, scored / "result.json", what=("ttt",)).axes
    assert {text.rpartition(": ")[0] for text in legend(axes)} == {f"{scored.parent.name}/ours", "ours/result.json"}


def test_mistakes_are_one_line(folder: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = "--out", tmp_path / "x"
    assert is_one_line_error(call(plot, tmp_path / "none", *out), "none")
    assert is_one_line_error(call(plot, tmp_path, *out), "train.log")
    assert is_one_line_error(call(plot, reference, "--what", "ttt", "--out", tmp_path / "x" / "y"), "ttt")
    assert is_one_line_error(call(plot, folder, "--what", "pie", *out), "pie")
    assert is_one_line_error(call(plot, *[folder] * 8, *out), "8 runs")
    (tmp_path / "other.txt").write_bytes(b"\xff\xfe not a log")
    assert is_one_line_error(call(plot, tmp_path / "other.txt", *out), "no figures")
    (tmp_path / "other.txt").write_text("step:7/9 train_loss:broken train_time:1ms step_avg:1ms\n")
    assert is_one_line_error(call(plot, tmp_path / "other.txt", *out), "line 1")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert is_one_line_error(call(plot, folder, *out), "pip install matplotlib")
    assert not list(tmp_path.glob("x*"))


def test_a_picture_that_cannot_be_written_is_not_painted(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", "tmp123")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", None)
    found = call(plot, reference, "--what", "loss", "--out", tmp_path / "x")
    assert is_one_line_error(found, f"error: {tmp_path / 'x'}: Read-only file system")


def test_the_folder_at_hand_is_called_by_its_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert plot.label_of(Path(".")) == plot.label_of(folder) == f"{folder.parent.name}/ours"


STEP = "step:{}/40 train_loss:{} train_time:{}ms step_avg:1ms\n"


@pytest.mark.parametrize(
    ("line", "word"),
    [
        (STEP.format("-5", 2, 9), "-5"),
        (STEP.format("10" * 3000, 2, 9), "1010"),
        (STEP.format("1e3", 2, 9), "1e3"),
        (STEP.format(1, "1e300", 9), "1e300"),
        (STEP.format(1, 2, -9), "-9"),
        (STEP.format(1, 2, "nan"), "nan"),
        (STEP.format(1, 2, "inf"), "inf"),
        ("Code size: -7 bytes\n", "-7"),
        ("export model_bytes:7 code_bytes:3 total_bytes:10 max_bytes:0\n", "0"),
        ("export kind:int5 bytes:9\nexport model_bytes:7 code_bytes:3 max_bytes:10\n", "7"),
    ],
)
def test_a_number_that_no_log_has_is_damage(tmp_path: Path, line: str, word: str) -> None:
    (tmp_path / "x.txt").write_text(line)
    result = call(plot, tmp_path / "x.txt", "--out", tmp_path / "x")
    assert is_one_line_error(result, f"x.txt line {line.count(chr(10))}", word) and len(result.err) < 300


def test_losses_that_are_not_finite_are_said(tmp_path: Path) -> None:
    log = tmp_path / "x.txt"
    log.write_text(STEP.format(1, 6, 9) + STEP.format(2, "nan", 18) + STEP.format(3, "inf", 27))
    result = call(plot, log, "--out", tmp_path / "x")
    assert (result.code, result.err) == (0, "") and "2 of 3 losses are not finite" in result.out


def test_a_log_that_was_cut_off_is_drawn_up_to_there(tmp_path: Path) -> None:
    whole = (micro()["replay"] / "train.log").read_text()
    (line,) = (line for line in whole.splitlines() if line.startswith("step:10/12 train"))
    for end in (r"train_lo", r"train_time:\d"):  # within a name, and within a number
        (tmp_path / "cut.log").write_text(whole[: whole.index(line) + re.search(end, line).end()])
        (run,) = plot.read_runs([tmp_path / "cut.log"])
        assert max(run.train) == 9 and run.final is None


def test_a_log_that_goes_back_is_drawn_in_order(tmp_path: Path) -> None:
    log = tmp_path / "x.txt"
    log.write_text("".join(STEP.format(step, 6 - step / 10, 90 * step) for step in (2, 4, 6, 3, 5, 7)))
    (axes,) = drawn(log, what=("loss",)).axes
    assert list(axes.lines[0].get_xdata()) == [2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("line", ["a" * (8 << 20), "step:" * (2 << 20), "a:" * (2 << 20), "\0\x80" * (2 << 20)])
def test_a_line_of_megabytes_takes_no_time(tmp_path: Path, line: str) -> None:
    log = tmp_path / "x.txt"
    log.write_bytes(line.encode("latin-1") + b"\n" + STEP.format(1, 6, 9).encode())
    began = time.monotonic()
    (run,) = plot.read_runs([log])
    assert list(run.train) == [1] and time.monotonic() - began < 5


def test_a_picture_is_of_no_pipe_or_device(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "train.log")
    for path in (tmp_path, tmp_path / "train.log", Path("/dev/zero")):
        assert is_one_line_error(call(plot, path, "--out", tmp_path / "x"), "a device", "give a file")


def test_long_names_leave_room_for_the_panels_and_like_ones_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(plot.STYLE, "savefig.dpi", 20)
    paths = [tmp_path / place / ("x" * 200) / ("y" * 200) for place in "ab"]
    for path in paths:
        path.mkdir(parents=True)
        (path / "train.log").write_text(OURS)
    labels = [run.label for run in plot.read_runs(paths)]
    assert len(set(labels)) == 2 and all(label.startswith("xx") and len(label) < 60 for label in labels)
    result = call(plot, *paths, "--out", tmp_path / "x")
    assert (result.code, result.err) == (0, "")


def test_many_validations_are_drawn_without_marks(tmp_path: Path) -> None:
    line = "step:{}/9 val_loss:2 val_bpb:1 train_time:9ms step_avg:9ms\n"
    for count, marked in ((200, True), (201, False)):
        (tmp_path / "x.txt").write_text("".join(line.format(step) for step in range(count)))
        (axes,) = drawn(tmp_path / "x.txt", what=("bpb",)).axes
        assert (axes.lines[1].get_marker() == "o") == marked


def curve_of(*epochs: int) -> Change:
    """A change: a curve of replay with rows of these epochs."""

    def change(result: dict[str, Any]) -> None:
        first = result["evaluation"]["curve"][0]
        result["evaluation"]["curve"] = [dict(first, epoch=epoch) for epoch in epochs]

    return change


def changed(folder: Path, change: Change) -> Path:
    """A run's folder whose result has this change."""
    result = json.loads((folder / "result.json").read_text())
    change(result)
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def test_epochs_and_spans_out_of_order_are_refused_and_any_number_is_drawn(scored: Path, tmp_path: Path) -> None:
    out = "--what", "ttt", "position", "--out", tmp_path / "x"
    for epochs in ((0, 1), (-3, 1), (2, 1)):
        assert is_one_line_error(call(plot, changed(scored, curve_of(*epochs)), *out), "epochs do not go up")
    (axes,) = drawn(changed(scored, curve_of(1, 10**18)), what=("ttt",)).axes
    assert len(axes.get_xticks()) < 30
    path = scored / "ttt_positions.npz"
    with np.load(path) as file:
        arrays = dict(file)
    for ends in ([0, 1, 2, 3, 4], [5, 4, 3, 2, 1], [1, 2, 3, 4, math.nan]):
        np.savez(path, **arrays | {"ends": np.array(ends)})
        assert is_one_line_error(call(plot, scored, *out), "ends do not go up")


# ---------------------------------------------------------------------------------------------- compare


def a_scored_run(
    folder: Path,
    without: np.ndarray,
    adapted: np.ndarray,
    bytes_: np.ndarray,
    mixed: np.ndarray | None = None,
    lacking: int = 0,
    weights: str = "aa",
    last_share: float = 1 / 11,
    epochs: int = 2,
    **changes: object,
) -> Path:
    """What train_gpt.py leaves of a test-time training evaluation, with these NLL in nats of its documents."""
    folder.mkdir(exist_ok=True)
    result = a_result(42, 2.0)
    evaluation = result["evaluation"]
    about = {"ttt_protocol": "single_pass", "ttt_n_epochs": 10, "ttt_context": "cached", "ttt_eval_seq_len": 1024}
    result["settings"] |= about | changes
    result["weights_sha256"] = weights * 32
    replay = changes.get("ttt_protocol") == "replay"  # later epochs have trained on what they score: never to be read
    figures_of = np.stack([adapted, adapted / 2]) if replay else adapted[None]
    targets = np.maximum(bytes_ // 2, 1)
    counts = {"targets": int(targets.sum()), "bytes": int(bytes_.sum()), "lacking": 0}

    def fill(figure: dict[str, Any], nats: np.ndarray) -> None:
        loss, bpb = nats.sum() / counts["targets"], nats.sum() / math.log(2) / counts["bytes"]
        figure.update(counts | {"val_loss": float(loss), "val_bpb": float(bpb)})

    fill(evaluation["no_adaptation"], without)
    fill(evaluation["backward_looking"], adapted)
    fill(evaluation["last_epoch"], figures_of[-1])
    first = evaluation["curve"][0]
    curve = [dict(first, val_bpb=3.0 - epoch / 10, epoch=epoch) for epoch in range(1, epochs + 1)]
    evaluation["curve"] = curve if replay else curve[:1]
    if mixed is not None:
        evaluation.update(mixture=evaluation_of("mixture", 2.0)["mixture"], score="mixture")
        fill(evaluation["mixture"], mixed)
    score = evaluation[evaluation["score"]]
    for figure in (score, evaluation["backward_looking"]):
        figure["lacking"] = lacking
    result.update(val_loss=score["val_loss"], val_bpb=score["val_bpb"])
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "train.log").touch()
    arrays = dict(index=np.arange(len(bytes_)), targets=targets, bytes=bytes_, nll_no_adaptation=without)
    arrays |= dict(nll_per_epoch=figures_of, figures_finished=np.full(len(bytes_), len(figures_of)))
    arrays["figures_finished"][:lacking] = 0
    if mixed is not None:
        arrays["nll_mixture"] = mixed
    np.savez(folder / "ttt_documents.npz", **arrays)
    named = {"no_adaptation": without, "epoch_1" if replay else "single_pass": adapted, "mixture": mixed}
    named = {name: nats.sum() for name, nats in named.items() if nats is not None}
    share = np.array([4 / 11, 3 / 11, 2 / 11, 2 / 11 - last_share, last_share])  # of the bytes, by span
    np.savez(
        folder / "ttt_positions.npz",
        figures=[*named],
        nll=np.outer([*named.values()], np.arange(1, 6) / 15),
        ends=np.array([64, 128, 256, 512, 600]),
        targets=share * counts["targets"],
        bytes=share * counts["bytes"],
    )
    return folder


def cells(out: str) -> list[dict[str, str]]:
    """The rows of a Markdown table, by the names of its columns."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line[:1] == "|"]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


INTERVAL, BEHIND = "95% interval", "behind the best, 95% interval"


def test_compare_shows_the_best_first_with_intervals_that_the_normal_law_confirms(tmp_path: Path) -> None:
    rng, n = np.random.default_rng(3), 400
    bytes_ = np.full(n, 3000)
    without = rng.normal(5000, 800, n)
    gains = {"worse": rng.normal(5, 20, n), "better": rng.normal(12, 20, n)}
    runs = [
        a_scored_run(tmp_path / name, without, without - gain, bytes_, ttt_lora_lr=lr)
        for (name, gain), lr in zip(gains.items(), (0.1, 0.2), strict=True)
    ]
    result = call(compare, *runs, "--samples", 4000)
    assert result.code == 0, result.err
    best, second = cells(result.out)
    assert (best["lora_lr"], second["lora_lr"]) == ("0.2", "0.1") and "400 documents, 1,200,000 bytes" in result.out
    scale = math.log(2) * 3000
    for row, gain in ((best, gains["better"]), (second, gains["worse"])):
        assert float(row["gain"]) == pytest.approx(gain.mean() / scale, abs=5e-5)
        assert float(row["adapted"]) == pytest.approx((without - gain).sum() / math.log(2) / bytes_.sum(), abs=5e-5)
        low, high = map(float, row[INTERVAL].split(" to "))
        assert high - low == pytest.approx(2 * 1.96 * gain.std() / math.sqrt(n) / scale, rel=0.08)
    low, high = map(float, second[BEHIND].split(" to "))
    difference = gains["better"] - gains["worse"]
    assert (low + high) / 2 == pytest.approx(difference.mean() / scale, abs=1e-4) and best[BEHIND] == "–"


def test_compare_weighs_documents_by_their_bytes(tmp_path: Path) -> None:
    bytes_, without = np.array([10, 1000]), np.array([100.0, 100.0])
    run = a_scored_run(
        tmp_path / "a", without, without - np.array([0.0, 10.0]), bytes_, ttt_protocol="replay", ttt_n_epochs=50
    )
    out = call(compare, run).out
    assert "protocol to mixture_lr are settings" in out and "gain is how far" in out
    (row,) = cells(out)
    assert row["run"] == str(run)
    assert float(row["gain"]) == pytest.approx(10 / math.log(2) / 1010, abs=5e-5)
    assert (row["protocol"], row["n_epochs"], row["lora_lr"]) == ("replay", "1 of 50", "0.001")
    assert (row["mixture"], row["mixture_share"]) == ("–", "–")


def test_behind_the_best_is_by_the_score_whatever_there_was_without(tmp_path: Path) -> None:
    """Other sizes of chunks and windows score otherwise without adaptation, too: the larger gain may be a worse run."""
    bytes_ = np.full(40, 1000)
    nats = bytes_ * math.log(2)
    a = a_scored_run(tmp_path / "a", 2.4156 * nats, 2.3676 * nats, bytes_, ttt_chunk_size=64)
    b = a_scored_run(tmp_path / "b", 2.3724 * nats, 2.3627 * nats, bytes_, ttt_chunk_size=256)
    best, second = cells(call(compare, a, b, "--samples", 50).out)
    assert (best["run"], best[BEHIND], second[BEHIND]) == (str(b), "–", "+0.0049 to +0.0049")
    assert (best["gain"], second["gain"]) == ("+0.0097", "+0.0480")


def test_compare_draws_a_documents_bits_together_with_its_bytes() -> None:
    """Documents of all sizes at one rate: whatever is drawn has that rate."""
    bytes_ = np.arange(1, 60) ** 2
    assert compare.interval(bytes_ / 4, bytes_, 500, 0) == "+0.2500 to +0.2500"


def test_compare_judges_a_mixture_by_the_mixture(tmp_path: Path) -> None:
    bytes_, without = np.array([100, 1000]), np.array([100.0, 900.0])
    mixed = a_scored_run(tmp_path / "mixed", without, without + 50, bytes_, mixed=without - 20)
    plain = a_scored_run(tmp_path / "plain", without, without - 10, bytes_)
    best, second = cells(call(compare, plain, mixed).out)
    assert float(best["gain"]) == pytest.approx(40 / math.log(2) / 1100, abs=5e-5)
    assert float(best["mixture"]) == pytest.approx(960 / math.log(2) / 1100, abs=5e-5)
    assert float(best["adapted"]) == pytest.approx(1100 / math.log(2) / 1100, abs=5e-5)
    assert (best["mixture_share"], second["mixture"]) == ("0.1", "–")


def test_real_runs_are_compared(tmp_path: Path) -> None:
    rows = cells(call(compare, micro()["replay"], micro()["mixture"], "--samples", 50).out)
    by_protocol = {row["protocol"]: row for row in rows}
    for name, protocol in (("replay", "replay"), ("mixture", "single_pass")):
        evaluation = json.loads(left_by(name))["evaluation"]
        shown = [by_protocol[protocol][column] for column in ("no adaptation", "adapted", "mixture")]
        figures = [evaluation.get(figure) for figure in ("no_adaptation", "backward_looking", "mixture")]
        assert shown == ["–" if figure is None else f"{figure['val_bpb']:.4f}" for figure in figures]
    assert is_one_line_error(call(compare, micro()["late"], micro()["late"]), "time ran out", "EVAL_MAX_SECONDS")
    assert is_one_line_error(call(compare, micro()["sliding"]), "sliding window")


def test_compare_refuses_what_cannot_be_compared(tmp_path: Path) -> None:
    a, b = np.array([5.0, 6.0]), np.array([7, 8])
    good = a_scored_run(tmp_path / "good", a, a, b)
    assert is_one_line_error(call(compare, tmp_path / "none"), "none")
    assert is_one_line_error(
        call(compare, good, a_scored_run(tmp_path / "other", a, a, b + 1)), "other", "same documents"
    )
    same_scores = a_scored_run(tmp_path / "model", a, a, b, weights="bb")  # equal scores do not make one model
    result = call(compare, good, same_scores)
    assert is_one_line_error(result, "different models", f"EVAL_ONLY={good / 'final_model.ptz'}", "record.py")
    assert is_one_line_error(
        call(compare, a_scored_run(tmp_path / "late", a, a, b, lacking=1)), "late", "EVAL_MAX_SECONDS"
    )
    stale = a_scored_run(tmp_path / "stale", 2 * a, a, b)
    (stale / "ttt_documents.npz").write_bytes((good / "ttt_documents.npz").read_bytes())
    assert is_one_line_error(call(compare, stale), "other figures")
    window = a_scored_run(tmp_path / "sliding", a, a, b)
    result = json.loads((window / "result.json").read_text())
    sliding(result)
    result.update({name: result["evaluation"]["sliding"][name] for name in ("val_loss", "val_bpb")})
    (window / "result.json").write_text(json.dumps(result))
    assert is_one_line_error(call(compare, window), "sliding window")
    whole = (good / "ttt_documents.npz").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"not a zip", b""):
        (good / "ttt_documents.npz").write_bytes(damaged)
        assert is_one_line_error(call(compare, good), "good")


def test_compare_warns_of_few_documents(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    for count, few in ((2, True), (29, True), (30, False)):
        without = rng.normal(5000, 800, count)
        run = a_scored_run(tmp_path / str(count), without, without - 9, np.full(count, 3000))
        out = call(compare, run, "--samples", 50).out
        assert (f"warning: {count} documents are few, and the intervals too narrow" in out) == few
        assert ("warning" in out) == few


def test_compare_gives_no_interval_of_documents_without_bytes(tmp_path: Path) -> None:
    without = np.full(60, 50.0)
    bytes_ = np.zeros(60, int)
    bytes_[:3] = 100
    for name, gain in (("a", np.ones(60)), ("still", bytes_ / 100)):  # a set's bits without bytes are infinite, or NaN
        run = a_scored_run(tmp_path / name, without, without - gain, bytes_)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # on a console they would stand above the table
            result = call(compare, run, "--samples", 2000)
        (row,) = cells(result.out)
        assert (result.code, result.err, row[INTERVAL]) == (0, "", "none")
        assert float(row["gain"]) == pytest.approx(gain.sum() / math.log(2) / 300, abs=5e-5)
        assert "only 3 of 60 documents have bytes" in result.out and "nan" not in result.out
    bytes_[1:] = 0
    assert is_one_line_error(
        call(compare, a_scored_run(tmp_path / "b", without, without - 1, bytes_)), "fewer than two"
    )


@pytest.mark.parametrize(("place", "code"), [("/dev/full", 2), ("nobody", 0), ("ascii", 0)])
def test_compare_tells_whether_its_table_arrived(tmp_path: Path, place: str, code: int) -> None:
    without = np.array([50.0, 60.0])
    runs = [a_scored_run(tmp_path / str(i), without, without - 1, np.array([7, 8])) for i in range(2)]
    reading, writing = os.pipe()
    os.close(reading)
    streams = {"nobody": lambda: os.fdopen(writing, "w"), "ascii": lambda: io.TextIOWrapper(io.BytesIO(), "ascii")}
    with streams.get(place, lambda: open(place, "w"))() as stream:
        result = call(compare, *runs, "--samples", 50, stdout=stream)
        if place == "ascii":
            assert b"\\u2013" in stream.buffer.getvalue()
    assert result.code == code
    assert not code or is_one_line_error(result, "standard output", "No space left")


def test_too_little_memory_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path) -> None:
        raise MemoryError

    run = a_scored_run(tmp_path / "run", np.array([5.0, 6.0]), np.array([5.0, 5.5]), np.array([7, 8]))
    monkeypatch.setattr(np, "load", fail)
    assert is_one_line_error(call(compare, run), "memory ran out")


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0), st.integers(0, 255), st.none() | st.integers(0), st.booleans())
def test_damaged_documents_are_read_or_refused(
    tmp_path: Path, place: int, byte: int, end: int | None, compressed: bool
) -> None:
    run = a_scored_run(tmp_path / "run", np.array([5.0, 6.0]), np.array([5.0, 5.5]), np.array([7, 8]))
    path = run / "ttt_documents.npz"
    if compressed:
        with np.load(path) as file:
            np.savez_compressed(path, **dict(file))
    content = bytearray(path.read_bytes())
    content[place % len(content)] = byte
    path.write_bytes(content[: end and end % len(content)])
    found = call(compare, run, "--samples", 10)
    assert found.code == 0 or is_one_line_error(found)


def test_two_evaluations_of_one_model_are_compared_and_drawn(tmp_path: Path) -> None:
    a, b = np.array([50.0, 60.0]), np.array([7, 8])
    replay = a_scored_run(tmp_path / "replay", a, a - 1, b, ttt_protocol="replay", ttt_n_epochs=50)
    other = a_scored_run(tmp_path / "single", a, a - 2, b)
    assert [row["protocol"] for row in cells(call(compare, replay, other).out)] == ["single_pass", "replay"]
    ttt, position = drawn(replay, other, what=("ttt", "position")).axes
    bpb = [(a - nats).sum() / math.log(2) / 15 for nats in (0, 2)]
    scores = [
        "epoch 1 2.9000, a valid score",
        "epoch 2 2.8000 (not a score)",
        f"single pass {bpb[1]:.4f}, a valid score",
    ]
    assert legend(ttt) == [f"no adaptation {bpb[0]:.4f}", *scores]
    assert legend(position) == ["no adaptation", "epoch 1, a valid score", "single pass, a valid score"]
    third = a_scored_run(tmp_path / "again", a, a - 3, b)
    assert "/again: " in legend(drawn(replay, other, third, what=("ttt",)).axes[0])[-1]


def test_evaluations_that_differ_without_adaptation_are_both_drawn_so(tmp_path: Path) -> None:
    a, b = np.array([50.0, 60.0]), np.array([7, 8])
    one = a_scored_run(tmp_path / "one", a, a - 1, b)
    other = a_scored_run(tmp_path / "other", a + 1, a - 2, b, ttt_chunk_size=64)
    ttt, position = drawn(one, other, what=("ttt", "position")).axes
    names = [f"{tmp_path.name}/{name}: " for name in ("one", "other")]
    plain = [(nats.sum() / math.log(2) / 15) for nats in (a, a + 1)]
    assert [label for label in legend(ttt) if "no adaptation" in label] == [
        f"{name}no adaptation {bpb:.4f}" for name, bpb in zip(names, plain, strict=True)
    ]
    assert [label for label in legend(position) if "no adaptation" in label] == [
        f"{name}no adaptation" for name in names
    ]


def test_the_mixture_is_drawn_as_a_valid_score_of_its_own(tmp_path: Path) -> None:
    a, b = np.array([50.0, 60.0]), np.array([7, 8])
    run = a_scored_run(tmp_path / "run", a, a + 1, b, mixed=a - 2, ttt_protocol="replay")
    ttt, position, documents = drawn(run, what=("ttt", "position", "documents")).axes
    bpb = (a - 2).sum() / math.log(2) / 15
    assert f"mixture with epoch 1 {bpb:.4f}, a valid score" in legend(ttt)
    (line,) = [line for line in ttt.lines if line.get_label().startswith("mixture")]
    assert list(line.get_ydata()) == pytest.approx([bpb, bpb])
    assert legend(position) == ["no adaptation", "epoch 1, a valid score", "mixture with epoch 1, a valid score"]
    assert len({str(line.get_linestyle()) + str(line._dash_pattern) for line in position.lines}) == 3
    assert legend(documents) == [
        f"epoch 1: 2 of 2 lose, at most {1 / math.log(2) / 7:.4f}",
        "mixture with epoch 1: 0 of 2 lose, at most 0.0000",
    ]
    _, adapted, mixed = documents.lines
    assert adapted.get_ydata() == pytest.approx(-1 / math.log(2) / np.array([7, 8]))
    assert mixed.get_ydata() == pytest.approx(2 / math.log(2) / np.array([8, 7]))


def test_a_single_pass_alone_has_its_panel_without_words_of_epochs(folder: Path) -> None:
    a, b = np.array([50.0, 60.0]), np.array([7, 8])
    a_scored_run(folder, a, a - 1, b)
    (axes,) = drawn(folder, what=("ttt",)).axes
    assert [label.split()[0] for label in legend(axes)] == ["no", "single"]
    assert not axes.texts


def test_documents_that_a_deadline_cut_off_gain_nothing_and_are_not_drawn(folder: Path) -> None:
    a, b = np.array([50.0, 60.0, 70.0]), np.array([7, 8, 0])
    a_scored_run(folder, a, a - 1, b, lacking=1)
    (axes,) = drawn(folder, what=("documents",)).axes
    assert legend(axes) == ["single pass: 0 of 1 lose, at most 0.0000\n(time ran out for 1 documents)"]
    assert axes.lines[1].get_ydata() == pytest.approx([1 / math.log(2) / 8])


def test_an_epoch_that_is_not_finite_is_said(folder: Path) -> None:
    a, b = np.array([50.0, 60.0]), np.array([7, 8])
    a_scored_run(folder, a, a - 1, b, ttt_protocol="replay", epochs=4)
    result = json.loads((folder / "result.json").read_text())
    for figure in (result["evaluation"]["last_epoch"], *result["evaluation"]["curve"][2:]):
        figure.update(val_loss=None, val_bpb=None)
    (folder / "result.json").write_text(json.dumps(result))
    (axes,) = drawn(folder, what=("ttt",)).axes
    assert legend(axes)[-1] == "epoch 4 not finite (not a score)"


def test_the_panels_of_real_runs_show_what_the_runs_kept() -> None:
    replay, mixture_, late = (micro()[name] for name in ("replay", "mixture", "late"))
    ttt, position, documents = drawn(replay, mixture_, what=("ttt", "position", "documents")).axes
    names = ["no adaptation", "epoch 1", "single pass", "mixture with single pass"]
    assert [label.split(",")[0] for label in legend(position)] == names
    assert [label.split(":")[0] for label in legend(documents)] == names[1:]
    figures = {name: json.loads(left_by(name))["evaluation"] for name in ("replay", "mixture")}
    assert f"epoch 1 {figures['replay']['backward_looking']['val_bpb']:.4f}, a valid score" in legend(ttt)
    assert f"mixture with single pass {figures['mixture']['mixture']['val_bpb']:.4f}, a valid score" in legend(ttt)
    with np.load(mixture_ / "ttt_positions.npz") as arrays:
        bits, bytes_ = arrays["nll"][-1] / math.log(2), arrays["bytes"]
    assert position.lines[-1].get_ydata() == pytest.approx(bits / bytes_)
    assert bits.sum() / bytes_.sum() == pytest.approx(figures["mixture"]["mixture"]["val_bpb"], rel=1e-6)
    count = len(processes.LENGTHS)
    assert (
        f"late: time ran out: {count} documents count without adaptation" in plot.notes(plot.read_runs([late]), [])[0]
    )


def test_positions_are_drawn_where_their_spans_end(folder: Path) -> None:
    a, b = np.array([50.0, 60.0]), np.array([7, 8])
    a_scored_run(folder, a, a - 1, b, ttt_protocol="replay")
    (axes,) = drawn(folder, what=("position",)).axes
    plain, first = axes.lines
    assert plain.get_xdata().tolist() == [64, 128, 256, 512, 600]
    for line, nats in ((plain, 110), (first, 108)):
        rates = nats * np.arange(1, 6) / 15 / (15 * np.array([4, 3, 2, 1, 1]) / 11)
        assert line.get_ydata() == pytest.approx(rates / math.log(2))
    a_scored_run(folder, a, a - 1, b, last_share=0)  # a last span that holds the next document's BOS alone
    (axes,) = drawn(folder, what=("position",)).axes
    assert np.isfinite(axes.lines[0].get_ydata()).tolist() == [True, True, True, True, False]


def test_positions_are_drawn_only_where_they_are_this_runs(folder: Path) -> None:
    a_scored_run(folder, np.array([50.0, 60.0]), np.array([49.0, 58.0]), np.array([7, 8]), ttt_protocol="replay")
    _, position = drawn(folder, what=("ttt", "position")).axes
    assert legend(position) == ["no adaptation", "epoch 1, a valid score"]
    with np.load(folder / "ttt_positions.npz") as file:
        arrays = dict(file)
    others = {"nll": 1.01 * arrays["nll"]}, {"figures": np.array(["a", "b"])}, {"bytes": 2 * arrays["bytes"]}
    for wrong in (*others, {"figures": arrays["figures"][:1]}, {"targets": 2 * arrays["targets"]}):
        np.savez(folder / "ttt_positions.npz", **arrays | wrong)
        assert is_one_line_error(call(plot, folder, "--out", folder / "x"), "ttt_positions.npz", "other figures")
    for wrong in ({"nll": np.ones(3)}, {"bytes": np.ones(4)}, {"ends": np.array(["a"] * 5)}):
        np.savez(folder / "ttt_positions.npz", **arrays | wrong)
        assert is_one_line_error(call(plot, folder, "--out", folder / "x"), "ttt_positions.npz", "damaged")
    (folder / "ttt_positions.npz").unlink()
    assert len(drawn(folder, what=("ttt", "position")).axes) == 1


NAMES = [("a$_{$b", "$x$"), ("_hidden", "new\nline"), ("bell\a", "--> <b>&"), ("caf\udce9", "語")]


@pytest.mark.parametrize("names", NAMES)
def test_names_of_runs_are_no_grammar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, str]) -> None:
    monkeypatch.chdir(tmp_path)
    for path in map(Path, names):
        path.mkdir()
        (path / "train.log").write_text(OURS)
        without = np.array([50.0, 60.0])
        a_scored_run(
            path, without, without - 1, np.array([7, 8]), ttt_protocol="replay", weights=path.name[:1].ljust(2)
        )
    monkeypatch.setattr(plot, "WIDTH", 20.0)
    monkeypatch.setitem(plot.STYLE, "savefig.dpi", 20)
    result = call(plot, *names, "--what", "loss", "ttt", "--out", "x")
    assert (result.code, result.err) == (0, "")
    ET.parse("x.svg")
    told = {"\n": "\\n", "\a": "\\x07", "\udce9": "\\udce9", "語": "\\u8a9e"}
    one, other = ("".join(told.get(letter, letter) for letter in name) for name in names)
    ttt = drawn(*map(Path, names), what=("loss", "ttt"))
    assert [label.split(":")[0].strip() for label in legend(ttt.axes[1])] == [one] * 3 + [other] * 3
    assert [text.get_text().strip() for text in ttt.legends[0].get_texts()] == [one, other]


def test_a_panel_that_is_left_out_is_said(scored: Path, reference: Path, tmp_path: Path) -> None:
    (scored / "ttt_positions.npz").unlink()
    out = call(plot, scored, reference, "--what", "loss", "ttt", "position", "--out", tmp_path / "x").out
    assert "no panel position: it takes result.json and ttt_positions.npz of test-time training" in out
    (said,) = [line for line in out.splitlines() if "panel ttt" in line]
    assert said.endswith("/reference.txt: it takes result.json of test-time training") and "ours" not in said
    assert "loss" not in out


def test_what_a_deadline_cut_is_said_in_words(folder: Path, tmp_path: Path) -> None:
    a, b = np.array([50.0, 60.0]), np.array([7, 8])
    a_scored_run(folder, a, a - 1, b, ttt_protocol="replay", epochs=9, lacking=2)
    figure = drawn(folder, what=("ttt",))
    assert legend(figure.axes[0])[1] == "epoch 1 2.9000, a valid score\n(time ran out for 2 documents)"
    words = "/ours: time ran out: 2 documents count without adaptation in the score"
    assert re.search(words, figure.get_supxlabel().replace("\n", " "))
    assert re.search(words, call(plot, folder, "--what", "ttt", "--out", tmp_path / "x").out)
    a_scored_run(folder, a, a - 1, b, ttt_protocol="replay", epochs=9)
    assert not drawn(folder, what=("ttt",)).get_supxlabel()
    log = tmp_path / "bare.txt"
    log.write_text(OURS.replace("final_ttt", "ttt documents:9 seconds:600.1 first_lacks:2 last_lacks:5\nfinal_ttt"))
    figure = drawn(log, what=("loss", "bpb"))
    assert "2 documents count without adaptation in the score, 5 did not reach" in figure.get_supxlabel().replace(
        "\n", " "
    )


def test_the_score_of_the_artifact_is_no_later_evaluations(folder: Path, tmp_path: Path) -> None:
    other = "* EVAL_ONLY=runs/a/final_model.pt\n* VAL_DOCS=1\nttt documents:1 first_lacks:1 last_lacks:1\n"
    other += "final_int8_zlib_roundtrip_exact val_loss:1.00000000 val_bpb:0.50000000\n"
    log = tmp_path / "bare.txt"
    begun = "  EVAL_ONLY=\n" + OURS + "\n"
    unfinished = begun.replace("final_int8", "not yet")
    for content, star in ((begun, [2.33]), (begun + other, [2.33]), (unfinished + other, [])):
        log.write_text(content)
        (axes,) = drawn(log, what=("bpb",)).axes
        drawn_stars = [line for line in axes.lines if line.get_marker() == "*" and len(line.get_xdata())]
        assert [line.get_ydata()[0] for line in drawn_stars] == star
        assert plot.read_runs([log])[0].lacks == ((0, 0) if star else (1, 1))


def test_a_picture_needs_no_tokenizer(folder: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "import sys; sys.modules['sentencepiece'] = sys.modules['scipy'] = None; import plot",
    ]
    command[-1] += "; plot.run_tool(plot.main)"
    arguments = [folder, "--what", "loss", "--out", tmp_path / "x"]
    assert subprocess.run([*command, *arguments], cwd=ROOT / "data", check=False).returncode == 0
