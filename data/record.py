"""Turns the results of N runs into submission.json: scores, their spread, and each of the challenge's rules judged.

    python data/record.py runs/seed42 runs/seed43 runs/seed44 --baseline-loss 1.9296 [--folder records/NAME]

The score is the backward-looking figure: every token was scored before any update had seen it. Replay's last epoch has
trained on what it scores; it stands in a field of its own and takes part in nothing. --folder makes what a pull request
to the challenge needs: README.md, submission.json, train_gpt.py and the logs. Name, author and blurb come from the
repository's submission.json, which has the same fields and says, until there are runs, that nothing was measured.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common import Parser, Run, UserError, new_directory, number, read_log, read_run, run_tool, value_of, write_atomic

# The challenge's rules, in its numbers.
LIMITS = [
    ("size_cap", "artifact.total_bytes", 16_000_000, "bytes"),  # train_gpt.py and artifact together
    ("train_seconds", "training.seconds", 600, "s"),
    ("eval_seconds", "evaluation.seconds", 600, "s"),
]
WORLD_SIZE, DEVICE = 8, "H100"
DOCUMENTS, MILLION_TOKENS, VOCABULARY = 50_000, 62.0, 1024  # of the full FineWeb validation split
MARGIN = 0.005  # nats per token by which a record must beat the one before
SIGNIFICANCE = 0.01
SOURCE_RULE = "no_network_no_training_data_at_evaluation"

LONGEST_LAST_STEP = 0.5  # training ends with the step under way at 600 s: 0.09 s on 8xH100; slower steps get no more
OUTCOMES = {True: "pass", False: "fail", None: "not applicable"}

# The settings behind the figures, as in result.json.
PROTOCOL = [
    *("ttt_enabled", "ttt_protocol", "ttt_context", "ttt_n_epochs", "ttt_lora_lr", "ttt_lora_rank"),
    *("ttt_chunk_size", "ttt_eval_seq_len", "eval_stride"),
]
# What must agree in all runs of a submission, beside all settings but those that change nothing of the experiment.
SHARED = [
    *("source_sha256", "data.validation", "data.train"),
    *("environment.torch", "environment.dtype", "environment.device"),
]
FREE = {"seed", "run_id", "resume", "checkpoint_every", "eval_only", "data_path", "tokenizer_path", "output_dir"}
# What no two trainings have in common.
UNIQUE = ["seed", "run_id", "weights_sha256", "artifact.sha256", "training.seconds"]

SCORE_LABEL = "backward-looking: every token is scored once, before any update has seen it"
REPLAY_LABEL = "not a compression rate: the adapters have trained on the whole document before this pass scores it"
PLACEHOLDER = Path(__file__).resolve().parent.parent / "submission.json"  # what a submission says of itself
ABOUT = ("name", "author", "github_id", "blurb")


def mean_std(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Returns the mean and the sample standard deviation, None where there are too few values."""
    mean = statistics.fmean(values) if values else None
    return mean, statistics.stdev(values) if len(values) > 1 else None


def largest(runs: Sequence[Run], path: str) -> float | None:
    """Returns the maximum of what stands at a dotted path, or None if a run has nothing there or there is no run."""
    values = [value_of(run.result, path) for run in runs]
    return None if not values or None in values else max(values)


# ---------------------------------------------------------------------------------------------- rules

Verdict = tuple[bool | None, str]  # is a rule kept (None: that cannot be judged), and on what it was judged


def judge_limits(runs: Sequence[Run]) -> dict[str, Verdict]:
    """Bytes, seconds and machine."""
    judged: dict[str, Verdict] = {}
    for name, path, limit, unit in LIMITS:
        most = largest(runs, path)
        judged[name] = None, f"a run has no {path}"
        if most is not None:
            over = [value_of(run.result, path) > limit + last_step(run) * (name == "train_seconds") for run in runs]
            judged[name] = not any(over), f"{most:,} of {limit:,} {unit}"
    machines = {(run.result["world_size"], run.result["environment"]["device"]) for run in runs}
    fits = all(world == WORLD_SIZE and DEVICE in device.split() for world, device in machines)
    judged["hardware_8xH100"] = fits, ", ".join(sorted(f"{world} x {device}" for world, device in machines))
    return judged


def last_step(run: Run) -> float:
    """Seconds that training may exceed its budget by: the step under way at the end may finish."""
    training = run.result["training"] or {"seconds": 0, "steps": 0}
    return min(training["seconds"] / max(training["steps"], 1), LONGEST_LAST_STEP)


def judge_split(runs: Sequence[Run]) -> Verdict:
    """The full split is known by its counts, if all runs scored one text; that it is FineWeb's no result can show."""
    paths = "data.validation", "settings.vocab_size", "evaluation.documents"
    found = {(run.score["targets"] + 1, *(value_of(run.result, path) for path in paths)) for run in runs}
    detail = "tokens, fingerprint, vocabulary and documents: " + "; ".join(sorted(map(str, found)))
    tokens, _, vocabulary, documents = found.pop()
    full = not found and (round(tokens / 1e6, 1), vocabulary) == (MILLION_TOKENS, VOCABULARY)
    if documents is None and full:
        return None, f"{detail}; the sliding window does not count documents"
    return full and documents == DOCUMENTS, f"{detail}; not verifiable here: that this text is FineWeb's"


def judge_scores(runs: Sequence[Run]) -> dict[str, Verdict]:
    """What was scored, in which order, and from which file."""
    first = runs[0].score
    audited = sum(len({row["document"] for row in audit_of(run)}) for run in runs)
    judged: dict[str, Verdict] = {
        "every_target_scored_once": (True, f"{first['targets']:,} targets, {first['bytes']:,} bytes in every figure"),
        "backward_looking_score": (True, f"{SCORE_LABEL}; documents audited: {audited}"),
        "quantised_artifact": (True, "scored from the artifact"),
    }
    for run in runs:
        result, score = run.result, run.score
        seed = f"seed {result['seed']}"
        for figure in run.figures:
            whole = figure["targets"] == score["targets"] > 0 and figure["bytes"] == score["bytes"] > 0
            nats = figure["val_bpb"] * figure["bytes"] * math.log(2)
            if not whole or not math.isclose(nats, figure["val_loss"] * figure["targets"]):
                judged["every_target_scored_once"] = False, f"the figures of {seed} contradict one another"
        reported = result["val_loss"], result["val_bpb"]
        if not score["backward_looking"] or reported != (score["val_loss"], score["val_bpb"]):
            judged["backward_looking_score"] = False, f"the score of {seed} is not its backward-looking figure"
        if any(row["backward_looking"] and row["change"] > row["repeat"] for row in audit_of(run)):
            judged["backward_looking_score"] = False, f"the audit of {seed} found later tokens in earlier scores"
        if not result["quantised"]:
            judged["quantised_artifact"] = False, f"{seed} scored an unquantised state dict"
        elif result["artifact"] and result["artifact"]["sha256"] != result["weights_sha256"]:
            judged["quantised_artifact"] = False, f"{seed} scored another file than the artifact it made"
    return judged


def audit_of(run: Run) -> list[dict[str, Any]]:
    """The rows of a run's audit, if there was one."""
    return run.result["evaluation"].get("audit") or []


def judge_repetition(runs: Sequence[Run]) -> dict[str, Verdict]:
    """The runs repeat one experiment, each with a training of its own: one artifact scored twice is not two seeds."""

    def conditions(run: Run) -> dict[str, Any]:
        settings = {f"settings.{name}": value for name, value in run.result["settings"].items() if name not in FREE}
        scored = {f"{name} scored": run.score[name] for name in ("targets", "bytes")}
        return {path: value_of(run.result, path) for path in SHARED} | scored | settings

    first = conditions(runs[0])
    differences = {}
    for other in map(conditions, runs[1:]):
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                differences[name] = f"{name}: {first.get(name)} and {other.get(name)}"
    repeated = []
    for path in UNIQUE:
        counts = Counter(value_of(run.result, path) for run in runs)
        repeated += [f"{path} {value} more than once" for value, n in counts.items() if value is not None and n > 1]
    same = "source, data, settings, torch, dtype and device agree"
    return {
        "same_experiment": (not differences, "; ".join(differences.values()) or same),
        "distinct_trainings": (not repeated, "; ".join(repeated) or "every seed has a model of its own"),
    }


def t_test(losses: Sequence[float], baseline: float | None) -> dict[str, float | int | None]:
    """One-sided t-test that `baseline` exceeds the mean of `losses` by more than MARGIN; None where it cannot tell."""
    mean = mean_std(losses)[0]
    t = p = None
    if baseline is not None and len(losses) > 1 and not math.isclose(min(losses), max(losses), rel_tol=1e-12):
        from scipy import stats

        test = stats.ttest_1samp(losses, baseline - MARGIN, alternative="less")
        t, p = -float(test.statistic), float(test.pvalue)
    return {
        "baseline_val_loss": baseline,
        "improvement_nats": None if baseline is None or mean is None else baseline - mean,
        "margin_nats": MARGIN,
        "t": t,
        "degrees_of_freedom": max(len(losses) - 1, 0),
        "p": p,
    }


def judge_significance(test: dict[str, Any]) -> Verdict:
    """The rule that makes a record, given what t_test returned."""
    if test["p"] is None:
        return None, "a baseline and at least 2 runs that trained models of their own, with other losses, are needed"
    detail = f"{test['improvement_nats']:.5f} nats; p = {test['p']:.3g} against an improvement of no more than {MARGIN}"
    return test["p"] < SIGNIFICANCE, detail


# ---------------------------------------------------------------------------------------------- submission


def submission(runs: Sequence[Run], baseline: float | None, about: dict[str, str | None]) -> dict[str, Any]:
    """Returns the content of submission.json. `about`: name, author and the like.

    A rule that fails makes a non-record; short of that, one that cannot be judged leaves the submission incomplete.
    """
    # A sample of the t-test is a run that trained, one for each model.
    trained = {run.result["weights_sha256"]: run.result["val_loss"] for run in runs if run.result["training"]}
    test = t_test(list(trained.values()), baseline)
    judged = judge_limits(runs) | {"full_validation_split": judge_split(runs)}
    judged |= judge_scores(runs) | judge_repetition(runs) | {"significant_improvement": judge_significance(test)}
    reasons = [f"{name}: {OUTCOMES[kept]} ({detail})" for name, (kept, detail) in judged.items() if not kept]
    failed = any(kept is False for kept, _ in judged.values())
    judged |= {SOURCE_RULE: (None, "a property of the source, which no result can show")}
    loss, loss_std = mean_std([run.result["val_loss"] for run in runs])
    bpb, bpb_std = mean_std([run.result["val_bpb"] for run in runs])
    return about | {
        "status": "non-record" if failed else "incomplete" if reasons else "record",
        "reasons": reasons,
        "val_bpb": bpb,
        "val_bpb_std": bpb_std,
        "val_loss": loss,
        "val_loss_std": loss_std,
        "score": SCORE_LABEL,
        "replay_last_epoch": replay_summary(runs),
        "bytes_total": largest(runs, "artifact.total_bytes"),
        "bytes_model": largest(runs, "artifact.model_bytes"),
        "bytes_code": largest(runs, "artifact.code_bytes"),
        "train_seconds": largest(runs, "training.seconds"),
        "eval_seconds": largest(runs, "evaluation.seconds"),
        "significance": test,
        "rules": {name: {"outcome": OUTCOMES[kept], "detail": detail} for name, (kept, detail) in judged.items()},
        "protocol": {name: value_of(runs[0].result, f"settings.{name}") for name in PROTOCOL},
        "source_sha256": runs[0].result["source_sha256"],
        "runs": [run_summary(run) for run in runs],
    }


def replay_summary(runs: Sequence[Run]) -> dict[str, Any]:
    """The last epoch of replay over all runs, kept apart from the score and labelled; empty if a run has none."""
    figures = [run.figures[-1] for run in runs]
    if any(figure["backward_looking"] for figure in figures):
        figures = []
    bpb, deviation = mean_std([figure["val_bpb"] for figure in figures])
    epoch = figures[0].get("epoch") if figures else None
    loss, _ = mean_std([figure["val_loss"] for figure in figures])
    return {"label": REPLAY_LABEL, "epoch": epoch, "val_bpb": bpb, "val_bpb_std": deviation, "val_loss": loss}


def run_summary(run: Run) -> dict[str, Any]:
    """What submission.json says of one run."""
    names = ["seed", "run_id", "val_bpb", "val_loss", "world_size", "weights_sha256"]
    paths = ["environment.device", "training.steps"]
    paths += [f"artifact.{name}_bytes" for name in ("total", "model", "code")]
    return (
        {name: run.result[name] for name in names}
        | {path.split(".")[1]: value_of(run.result, path) for path in paths}
        | {
            "train_seconds": value_of(run.result, "training.seconds"),
            "eval_seconds": value_of(run.result, "evaluation.seconds"),
        }
        | {"documents_scored_without_adaptation": run.score["lacking"], "replay_last_epoch": replay_summary([run])}
    )


def summary(content: dict[str, Any]) -> list[str]:
    """A submission in lines: each run, the mean, replay's last epoch."""
    form = "seed {seed}: val_bpb {val_bpb:.6f}, val_loss {val_loss:.6f}"
    lines = [form.format(**run) for run in content["runs"]]
    spread = "" if content["val_bpb_std"] is None else f" ± {content['val_bpb_std']:.6f}"
    lines.append(f"mean: val_bpb {content['val_bpb']:.6f}{spread}, {SCORE_LABEL}")
    replay = content["replay_last_epoch"]
    if replay["val_bpb"] is not None:
        lines.append(f"replay epoch {replay['epoch']}: {replay['val_bpb']:.6f}, {replay['label']}")
    return lines


def write_folder(folder: Path, runs: Sequence[Run], content: dict[str, Any], encoded: bytes) -> None:
    """Makes the folder of a pull request to the challenge; UserError unless it is new and the runs have one source."""
    logs = {f"train_seed{run.result['seed']}.log": read_log(run) for run in runs}
    sources = {source for _, source in logs.values()}
    if len(sources) > 1 or len(logs) < len(runs):
        raise UserError("the runs have several sources, or a seed twice — give one train_gpt.py, each seed once")
    scores = "\n".join(f"- {line}" for line in summary(content))
    rules = "\n".join(f"| {name} | {rule['outcome']} | {rule['detail']} |" for name, rule in content["rules"].items())
    settings = " ".join(f"{name.upper()}={value}" for name, value in content["protocol"].items())
    readme = f"""# {content["name"]}

{content["blurb"]}

By {content["author"]}. Status: **{content["status"]}**.

{scores}

| rule | outcome | judged on |
| --- | --- | --- |
{rules}

`train_gpt.py` is the source that ran: every log begins with it, and lists all settings and versions after it. Evaluated
with `{settings}`.
"""
    with new_directory(folder) as partial:
        (partial / "README.md").write_text(readme, encoding="utf-8")
        (partial / "submission.json").write_bytes(encoded)
        (partial / "train_gpt.py").write_bytes(sources.pop())
        for name, (log, _) in logs.items():
            (partial / name).write_bytes(log)


def main() -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("results", nargs="+", type=Path, metavar="RUN", help="a run's folder, or a result.json with its log beside it")
    add("--baseline-loss", type=number(float, 0), metavar="NATS", help="per token: val_loss of the record to beat")
    add("--out", type=Path, default=Path("submission.json"), help="default: submission.json")
    add("--folder", type=Path, help="make the folder of a pull request instead")
    for name, value in json.loads(PLACEHOLDER.read_bytes()).items():
        if name in ABOUT:
            add("--" + name.replace("_", "-"), default=value, help="default: what submission.json says")
    options = parser.parse_args()
    runs = [read_run(path) for path in options.results]
    for run in runs:
        read_log(run)  # is it this run's?
    about = {name: getattr(options, name) for name in ABOUT} | {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    }
    content = submission(runs, options.baseline_loss, about)
    encoded = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
    if options.folder:
        write_folder(options.folder, runs, content, encoded)
    else:
        write_atomic(options.out, encoded)
    rules = [f"{rule['outcome']:<14} {name}: {rule['detail']}" for name, rule in content["rules"].items()]
    print("\n".join([*summary(content), *rules, f"status: {content['status']}"]))
    print(f"wrote {options.folder or options.out}")


if __name__ == "__main__":
    run_tool(main)
