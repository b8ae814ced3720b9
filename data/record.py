"""Turns the results of N runs into submission.json: scores, their spread, and each of the challenge's rules judged.

    python data/record.py runs/seed42 runs/seed43 runs/seed44 --baseline-loss 1.9296 --out FILE

The score is the backward-looking figure, or with TTT_MIXTURE=1 the mixture of it with the prediction before adaptation.
Replay's last epoch has trained on what it scores: it stands in a field of its own and takes part in nothing. Without
--out, the JSON is printed. --folder makes what a pull request needs: README, submission.json, source and logs.
"""

from common import Run, UserError, new_directory, number, place, read_log, read_run, value_of, write_atomic

# isort: split
import argparse
import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

import common

BACKWARD_LOOKING = "backward-looking: every token is scored once, before any update has seen it"
LABELS = {
    "sliding": BACKWARD_LOOKING,
    "backward_looking": BACKWARD_LOOKING,
    "mixture": f"mixture of the predictions without and with adaptation; {BACKWARD_LOOKING}",
}
REPLAY_LABEL = "not a compression rate: the adapters have trained on the whole document before this pass scores it"
PLACEHOLDER = Path(__file__).resolve().parent.parent / "submission.json"  # what it says of its authors
ABOUT = ("name", "author", "github_id", "blurb")
SHAPE = "num_layers model_dim num_heads num_kv_heads swa_enabled max_wallclock_seconds ttt_enabled ttt_lora_rank"

# The challenge's rules, in its numbers, and what is said of one that is kept.
SIZE_CAP, BUDGET = 16_000_000, 600  # bytes of train_gpt.py and artifact together; seconds
LONGEST_LAST_STEP = 0.5  # training ends with the step under way at 600 s: 0.09 s on 8xH100; slower steps get no more
WORLD_SIZE, DEVICE = 8, "H100"
AFTERWARDS = 60.0  # seconds of an evaluation's session in which its files are written
LAG = 10.0  # seconds that a killed session may have worked beyond its account, which is written every 5 s or step
DOCUMENTS, MILLION_TOKENS, VOCABULARY = 50_000, 62.0, 1024  # of the full FineWeb validation split
MARGIN = 0.005  # nats per token by which a record must beat the one before
SIGNIFICANCE = 0.01
ENOUGH = "at least 2 runs that trained, with different losses"
STATUSES = {
    "record": "every rule is kept",
    "non-record": "a rule of the challenge fails",
    "incomplete": "no rule fails, and one cannot be judged",
}
SOURCE_RULE = "no_network_no_training_data_at_evaluation"
KEPT = {
    "size_cap": "train_gpt.py and artifact together have at most 16,000,000 bytes",
    "train_seconds": "training and calibration took at most 600 s, but for the step under way at their end",
    "eval_seconds": "at most 600 s",
    "hardware_8xH100": "every session that trained or scored had 8 x H100",
    "full_validation_split": "50,000 documents, 62.0 M tokens; not verifiable here: that this text is FineWeb's",
    "every_target_scored_once": "all figures count the same targets and bytes, and loss and bpb agree",
    "backward_looking_score": BACKWARD_LOOKING,
    "quantised_artifact": "scored from the artifact",
    "same_experiment": "source, data, settings, torch, dtype and device agree",
    "distinct_trainings": "every seed has a model of its own",
    "significant_improvement": f"p < {SIGNIFICANCE} against an improvement of no more than {MARGIN} nats",
}
# The certificate's findings, as rules of their own, which only data/audit.py can judge: none makes a run incomplete.
CERTIFICATE = {
    "causal": "no score moved when later tokens, or those of other documents, were replaced",
    "normalised": "probabilities of what may come next are 1 together, and the score is of them",
    "repeated": "documents scored again had the NLL that the run kept",
    "bytes": "the counted bytes of every document are those of its decoded text",
    "disjoint": "no validation document stands in the training shards",
    "decodes": "files that expand to the documents have the size that the score says",
}
OUTCOMES = {True: "pass", False: "fail", None: "not applicable"}

# What must agree in all runs of a submission, beside all settings but those that change nothing of the experiment.
SHARED = {"source_sha256", *(f"data.{x}" for x in ("validation", "tokenizer", "train"))}
SHARED |= {f"environment.{x}" for x in ("torch", "dtype", "device")}
FREE = {"seed", "run_id", "resume", "checkpoint_every", "eval_only", "data_path", "tokenizer_path", "output_dir"}
ABOUT_RUN = "seed run_id val_bpb val_loss world_size weights_sha256 environment.device training.steps"
# What no two trainings have in common.
UNIQUE = ["seed", "run_id", "weights_sha256", "artifact.sha256", "training.seconds"]


def describe(run: Run) -> dict[str, str]:
    """Name and blurb by what a run trained and scored; UserError if its settings do not tell."""
    s = run.result["settings"]
    if lacking := [name for name in SHAPE.split() if name not in s]:
        raise UserError(f"{run.path} has no settings.{lacking[0]} — give --name and --blurb")
    packed = {"int5": "int5 MLP", "int6": "int6 attention"}
    parts = [part for kind, part in packed.items() if value_of(run.result, f"artifact.kinds.{kind}")]
    swa = ["SWA"] if s["swa_enabled"] else []
    adapted = ["per-document LoRA test-time training"] if s["ttt_enabled"] else []
    heads = "attention" if s["num_heads"] == s["num_kv_heads"] else "GQA"
    body = f"{s['num_layers']} layers of width {s['model_dim']} with {heads}, U-Net skips, a hashed bigram embedding"
    warmdown = "warmdown against the wall clock" if s["max_wallclock_seconds"] else "warmdown over the last steps"
    trained = ", ".join(["Muon and AdamW", warmdown, *swa])
    packed = ", ".join(
        [*parts, "zstd-22 in a container without pickle"] if run.result["quantised"] else ["unquantised"]
    )
    lora = f"; rank-{s['ttt_lora_rank']} LoRA adapted per document" if adapted else ""
    rates = f" and with one at {s['ttt_mixture_lr']}" if s.get("ttt_mixture_lr") else ""
    lora += f", mixed with the prediction without it{rates}" * (run.score_name == "mixture")
    return {
        "name": ", ".join([f"{s['num_layers']}L {s['model_dim']}d GPT", *parts, *swa, *adapted]),
        "blurb": f"{body} and SmearGate; {trained}; {packed}{lora}. "
        "Only scores made before any update had seen the token count.",
    }


def spread(name: str, values: list[float]) -> dict[str, float | None]:
    """The mean and the sample standard deviation, None where there are too few values."""
    mean = statistics.fmean(values) if values else None
    return {name: mean, f"{name}_std": statistics.stdev(values) if len(values) > 1 else None}


def killed(run: Run, stage: str) -> bool:
    """Whether a session of this stage ended without a full account, so that its seconds are a lower bound.

    What an evaluation did before an error or a signal is counted. A training that is resumed counts from its checkpoint
    on: only a stop that wrote one, and says so, loses nothing."""
    ends = [row["ended"] for row in run.result["sessions"] if row["stage"] == stage]
    if stage == "evaluation":
        return run.result["evaluation"]["at_least"] or "killed" in ends
    return any(end != "finished" and "; its checkpoint is in " not in end for end in ends)


def measures(run: Run) -> dict[str, float | bool | None]:
    """Bytes and seconds, and whether these are a lower bound; None for what an evaluation alone does not do."""
    training = value_of(run.result, "training")
    return {
        **{f"bytes_{part}": value_of(run.result, f"artifact.{part}_bytes") for part in ("total", "model", "code")},
        "train_seconds": training and training["seconds"] + training["calibration"],  # that reads training data, too
        "train_seconds_at_least": training and killed(run, "training"),
        "eval_seconds": run.result["evaluation"]["seconds"],
        "eval_seconds_at_least": killed(run, "evaluation"),
    }


Finding = tuple[str, bool | None, str]  # a rule that is broken (False) or cannot be judged (None), and why


def judge_run(run: Run) -> Iterator[Finding]:
    """What is wrong with a run by itself."""
    yield from judge_limits(run)
    yield from judge_hardware(run)
    yield from judge_score(run)
    yield from judge_certificate(run)
    result, artifact, seed = run.result, value_of(run.result, "artifact"), f"seed {run.result['seed']}"
    if not result["quantised"]:
        yield "quantised_artifact", False, f"{seed} scored an unquantised state dict"
    elif artifact and artifact["sha256"] != result["weights_sha256"]:
        yield "quantised_artifact", False, f"{seed} scored another file than the artifact it made"


def judge_limits(run: Run) -> Iterator[Finding]:
    """Bytes and seconds. Seconds that are a lower bound show that a limit was passed, never that it was kept."""
    spent, training, seed = measures(run), value_of(run.result, "training"), f"seed {run.result['seed']}"
    step = min(training["seconds"] / max(training["steps"], 1), LONGEST_LAST_STEP) if training else 0
    limits = {"bytes_total": SIZE_CAP, "train_seconds": BUDGET + step, "eval_seconds": BUDGET}
    for name, limit in limits.items():
        rule = "size_cap" if name == "bytes_total" else name
        bound = spent.get(f"{name}_at_least")
        least = "at least " if bound else ""
        if spent[name] is None:
            yield rule, None, f"{seed} trained nothing: it has no {name}"
        elif spent[name] > limit:
            yield rule, False, f"{seed}: {least}{spent[name]:,} of {limit:,}"
        elif bound:
            yield (
                rule,
                None,
                f"{seed}: at least {spent[name]:,.1f} s: a session was killed, failed or left no account",
            )


def judge_hardware(run: Run) -> Iterator[Finding]:
    """Every session that trained or scored, and every rank's device; sessions must account for what was done."""
    result, seed, rule = run.result, f"seed {run.result['seed']}", "hardware_8xH100"
    sessions, training = result["sessions"], value_of(result, "training")
    places = [(f"{row['stage']} ({row['seconds']:,.0f} s)", row["world_size"], row["devices"]) for row in sessions]
    places.append(("the run as a whole", result["world_size"], {result["environment"]["device"]: result["world_size"]}))
    for what, world, devices in places:
        counts = Counter(devices)
        ranks = sum(counts.values())
        if world != WORLD_SIZE or ranks != world or not all(DEVICE in device.split() for device in counts):
            named = " and ".join(f"{count:,} x {device}" for device, count in counts.items())
            yield rule, False, f"{seed}: {what} on {named or 'no device'}{f', {world:,} ranks' * (ranks != world)}"
    for stage, seconds in (("training", measures(run)["train_seconds"] if training else None), ("evaluation", 0)):
        rows = [row for row in sessions if row["stage"] == stage]
        known = sum(row["seconds"] + LAG * (row["ended"] == "killed") for row in rows)
        if seconds is not None and (not rows or known < seconds):
            yield rule, None, f"{seed}: sessions account for {known:,.0f} s of {seconds:,.0f} s of {stage}"
    last, evaluation = sessions[-1] if sessions else None, result["evaluation"]["seconds"]
    if last and last["stage"] == "evaluation" and last["seconds"] > evaluation + AFTERWARDS:
        yield "eval_seconds", None, f"{seed}: {evaluation:,.0f} s, but the session took {last['seconds']:,.0f} s"


def judge_score(run: Run) -> Iterator[Finding]:
    """What was scored, and whether it is a score."""
    result, score, seed = run.result, run.score, f"seed {run.result['seed']}"
    tokens, documents = score["targets"] + 1, value_of(result, "evaluation.documents")
    vocabulary = value_of(result, "settings.vocab_size")
    full = (round(tokens / 1e6, 1), vocabulary) == (MILLION_TOKENS, VOCABULARY)
    if documents is None and full:
        yield "full_validation_split", None, f"{seed}: the sliding window does not count documents"
    elif not full or documents != DOCUMENTS:
        yield "full_validation_split", False, f"{seed}: {tokens:,} tokens, {documents} documents, {vocabulary} pieces"
    for figure in run.figures.values():
        whole = figure["targets"] == score["targets"] > 0 and figure["bytes"] == score["bytes"] > 0
        loss, bpb = figure["val_loss"], figure["val_bpb"]
        agree = loss is bpb is None  # neither is finite
        if None not in (loss, bpb):
            agree = math.isclose(bpb * figure["bytes"] * math.log(2), loss * figure["targets"])
        if not whole or not agree:
            yield "every_target_scored_once", False, f"the figures of {seed} contradict one another"
    if not score["backward_looking"] or any(result[name] != score[name] for name in ("val_loss", "val_bpb")):
        yield "backward_looking_score", False, f"the score of {seed} is not its {run.score_name} figure"


def judge_certificate(run: Run) -> Iterator[Finding]:
    """What data/audit.py found by experiment."""
    evaluation, seed = run.result["evaluation"], f"seed {run.result['seed']}"
    foreign = evaluation.get("certificate") and not run.findings
    own = "no certificate: python data/audit.py RUN makes one"
    why = f"{seed}: {'a certificate of another train_gpt.py' if foreign else own}"
    for name in CERTIFICATE:
        finding = run.findings.get(name)
        outcome = {"pass": True, "fail": False}.get(finding["outcome"]) if finding else None
        if not finding:
            yield f"certificate_{name}", None, f"{seed}: not in the certificate" if run.findings else why
        elif not outcome:
            yield f"certificate_{name}", outcome, f"{seed}: {finding['figure']:.3g} {finding['detail']}"
    rows = evaluation.get("audit") or []
    if any(row["backward_looking"] and row["change"] > row["repeat"] for row in rows):
        yield "certificate_causal", False, f"the audit of {seed} found later tokens in earlier scores"
    elif run.findings and not rows:
        yield "certificate_causal", None, f"{seed}: the certificate has no rows of an audit"


def judge_repetition(runs: list[Run]) -> Iterator[Finding]:
    """The runs repeat one experiment, each with a training of its own: one artifact scored twice is not two seeds."""
    settings = {f"settings.{name}" for run in runs for name in run.result["settings"] if name not in FREE}
    for path in sorted(settings | SHARED):
        values = dict.fromkeys(str(value_of(run.result, path)) for run in runs)
        if len(values) > 1:
            cure = f" (set {path.removeprefix('settings.').upper()} alike)" if path in settings else ""
            yield "same_experiment", False, f"{path}: {' and '.join(values)}{cure}"
            if path == "data.validation":
                yield "full_validation_split", False, "the runs scored several texts"
    for path in UNIQUE:
        for value, count in Counter(value_of(run.result, path) for run in runs).items():
            if value is not None and count > 1:
                yield "distinct_trainings", False, f"{path} {value} more than once"


def t_test(losses: list[float], baseline: float | None) -> dict[str, float | int | None]:
    """One-sided t-test that `baseline` exceeds the mean of `losses` by more than MARGIN; None where it cannot tell."""
    t = p = None
    if baseline is not None and len(losses) > 1 and not math.isclose(min(losses), max(losses), rel_tol=1e-12):
        from scipy import stats

        test = stats.ttest_1samp(losses, baseline - MARGIN, alternative="less")
        t, p = -float(test.statistic), float(test.pvalue)
    improvement = baseline - statistics.fmean(losses) if baseline is not None and losses else None
    found = dict(baseline_val_loss=baseline, improvement_nats=improvement, margin_nats=MARGIN)
    return found | dict(t=t, degrees_of_freedom=max(len(losses) - 1, 0), p=p)


def submission(runs: list[Run], baseline: float | None, about: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """The content of submission.json: a non-record if a rule fails, incomplete if one cannot be judged."""
    # A sample of the t-test is a run that trained, one for each model.
    trained = {run.result["weights_sha256"]: run.result["val_loss"] for run in runs if value_of(run.result, "training")}
    test = t_test(list(trained.values()), baseline)
    found = [*chain.from_iterable(map(judge_run, runs)), *judge_repetition(runs)]
    if test["p"] is None:
        found.append(("significant_improvement", None, f"takes --baseline-loss and {ENOUGH}"))
    elif test["p"] >= SIGNIFICANCE:
        what = f"{test['improvement_nats']:.5f} nats better than the baseline: p = {test['p']:.3g}"
        found.append(("significant_improvement", False, f"{what}, not below {SIGNIFICANCE}"))
    rules = {rule: judge(rule, kept, found) for rule, kept in KEPT.items()}
    if cuts := [f"seed {run.result['seed']}: {run.cut}" for run in runs if run.cut]:
        rules["eval_seconds"]["detail"] += f"; {'; '.join(cuts)}"  # else it were kept at no cost
    certified = {f"certificate_{name}": kept for name, kept in CERTIFICATE.items()}
    certified = {rule: judge(rule, kept, found) for rule, kept in certified.items()}
    decisive = rules | {rule: judged for rule, judged in certified.items() if judged["outcome"] == "fail"}
    reasons = [f"{rule}: {j['outcome']} ({j['detail']})" for rule, j in decisive.items() if j["outcome"] != "pass"]
    failed = any(outcome is False for _, outcome, _ in found)
    rules |= certified
    rules[SOURCE_RULE] = {"outcome": OUTCOMES[None], "detail": "a property of the source, which no result can show"}
    columns = {name: [measures(run)[name] for run in runs] for name in measures(runs[0])}
    return about | {
        "status": "non-record" if failed else "incomplete" if reasons else "record",
        "reasons": reasons,
        **spread("val_bpb", [run.result["val_bpb"] for run in runs]),
        **spread("val_loss", [run.result["val_loss"] for run in runs]),
        "score": LABELS[runs[0].score_name],
        "replay_last_epoch": replay_summary(runs),
        **{name: None if None in values else max(values) for name, values in columns.items()},
        "significance": test,
        "rules": rules,
        "protocol": {name: value_of(runs[0].result, f"settings.{name}") for name in settings},
        "source_sha256": runs[0].result["source_sha256"],
        "runs": list(map(summary, runs)),
    }


def judge(rule: str, kept: str, found: list[Finding]) -> dict[str, str]:
    """A rule's outcome over all runs, and why."""
    outcomes = {outcome for name, outcome, _ in found if name == rule}
    outcome = False if False in outcomes else None if outcomes else True
    why = dict.fromkeys(detail for name, _, detail in found if name == rule)
    return {"outcome": OUTCOMES[outcome], "detail": "; ".join(why) or kept}


def summary(run: Run) -> dict[str, Any]:
    """A run by itself: its score and what the score was made of, bytes, seconds, and what a deadline cut."""
    parts = {name: run.figures[name]["val_bpb"] for name in run.figures if name != "last_epoch"}
    return {
        **{path.split(".")[-1]: value_of(run.result, path) for path in ABOUT_RUN.split()},
        "score": run.score_name,
        "figures_val_bpb": parts,
        **measures(run),
        "documents_scored_without_adaptation": run.score["lacking"],
        "documents_without_last_epoch": run.figures.get("last_epoch", run.score)["lacking"],
        "cut": run.cut or None,
        "replay_last_epoch": replay_summary([run]),
    }


def replay_summary(runs: list[Run]) -> dict[str, Any]:
    """The last epoch of replay over all runs, kept apart from the score and labelled; empty if a run has none."""
    figures = [run.figures.get("last_epoch", run.score) for run in runs]
    if any(figure["backward_looking"] or None in (figure["val_loss"], figure["val_bpb"]) for figure in figures):
        figures = []
    bpb = spread("val_bpb", [figure["val_bpb"] for figure in figures])
    loss = spread("val_loss", [figure["val_loss"] for figure in figures])["val_loss"]
    epoch = figures[0].get("epoch") if figures else None
    return {"label": REPLAY_LABEL, "epoch": epoch, **bpb, "val_loss": loss}


def report(content: dict[str, Any]) -> str:
    """A submission in lines: each run, the mean, replay's last epoch, the rules."""
    form = "seed {seed}: val_bpb {val_bpb:.6f}, val_loss {val_loss:.6f}"
    lines = [form.format(**run) + (f"; {run['cut']}" if run["cut"] else "") for run in content["runs"]]
    deviation = "" if content["val_bpb_std"] is None else f" ± {content['val_bpb_std']:.6f}"
    lines.append(f"mean: val_bpb {content['val_bpb']:.6f}{deviation}, {content['score']}")
    replay = content["replay_last_epoch"]
    if replay["val_bpb"] is not None:
        lines.append(f"replay epoch {replay['epoch']}: {replay['val_bpb']:.6f}, {replay['label']}")
    lines += [f"{rule['outcome']:<14} {name}: {rule['detail']}" for name, rule in content["rules"].items()]
    return "\n".join([*lines, f"status: {content['status']} ({STATUSES[content['status']]})"])


def write_folder(folder: Path, runs: list[Run], content: dict[str, Any], encoded: bytes) -> None:
    """Makes the folder of a pull request to the challenge; UserError unless it is new and the runs have one source."""
    logs = {f"train_seed{run.result['seed']}.log": read_log(run) for run in runs}
    if len(logs) < len(runs):
        raise UserError("two runs have the same seed — give each seed once")
    if len({source for _, source in logs.values()}) > 1:
        raise UserError("the runs are of several train_gpt.py — give runs of one")
    readme = "# {name}\n\n{blurb}\n\nBy {author}.\n".format(**content) + f"\n```\n{report(content)}\n```\n"
    files = {"README.md": readme.encode(errors="backslashreplace"), "submission.json": encoded}
    for name, (log, source) in logs.items():
        files |= {name: log, "train_gpt.py": source}
    with new_directory(folder) as partial:
        for name, data in files.items():
            write_atomic(partial / name, data)


def placeholder() -> dict[str, Any]:
    """The repository's submission.json, from which come authors and the settings of a protocol; UserError if they are
    not there."""
    try:
        content = json.loads(PLACEHOLDER.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{PLACEHOLDER} is no JSON ({error}) — restore it") from error
    for name in (*ABOUT, "protocol"):
        if not isinstance(content, dict) or name not in content:
            raise UserError(f"{PLACEHOLDER} has no {name} — restore it")
    if not isinstance(content["protocol"], dict):
        raise UserError(f"{PLACEHOLDER} has a protocol without settings — restore it")
    return content


def main(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("results", nargs="+", type=place, metavar="RUN", help="a run's folder")
    add("--baseline-loss", type=number(float, 0), metavar="NATS", help="per token: val_loss of the record to beat")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--out", type=place, metavar="FILE", help="write the JSON there (default: print it)")
    one.add_argument("--folder", type=place, help="make the folder of a pull request instead")
    for name in ABOUT:
        default = "the author in submission.json" if name in ("author", "github_id") else "by the first run's settings"
        add("--" + name.replace("_", "-"), help=f"default: {default}")
    options = parser.parse_args()
    known = placeholder()
    runs = [read_run(path) for path in options.results]
    for run in runs:
        common.check_files(run)
    given = {name: value for name in ABOUT if (value := getattr(options, name)) is not None}
    own = {} if {"name", "blurb"} <= given.keys() else describe(runs[0])
    about = {name: (known | own | given)[name] for name in ABOUT} | {"date": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"}
    content = submission(runs, options.baseline_loss, about, list(known["protocol"]))
    encoded = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
    if options.folder:
        write_folder(options.folder, runs, content, encoded)
    elif options.out:
        write_atomic(options.out, encoded)
    else:
        print(report(content), file=sys.stderr)
        common.deliver(json.dumps(content, indent=2))  # in ASCII, which every console shows as it is
        return
    print(f"{report(content)}\nwrote {options.folder or options.out}")


if __name__ == "__main__":
    common.run_tool(main)
