"""Turns the result.json of N runs into submission.json: scores, their spread, and each of the challenge's rules judged.

    python data/record.py runs/seed42 runs/seed43 runs/seed44 --baseline-loss 1.9296

The score is the backward-looking figure: every token was scored before any update had seen it. Replay's last epoch has
trained on what it scores; it stands in a field of its own and takes part in nothing. With --placeholder instead of runs,
the file has the same fields and says that nothing was measured.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from text import Parser, UserError
from text import run as run_tool

# The challenge's rules, in its numbers.
SIZE_CAP = 16_000_000  # bytes, train_gpt.py and artifact together
TRAIN_SECONDS = EVAL_SECONDS = 600
WORLD_SIZE, DEVICE = 8, "H100"
DOCUMENTS, MILLION_TOKENS, VOCABULARY = 50_000, 62.0, 1024  # of the full FineWeb validation split
MARGIN = 0.005  # nats per token by which a record must beat the one before
SIGNIFICANCE = 0.01

LONGEST_LAST_STEP = 0.5  # training ends with the step under way at 600 s: 0.09 s on 8xH100; slower steps get no more
SCHEMA_VERSION = 1
PASS, FAIL, NOT_APPLICABLE = "pass", "fail", "not applicable"
UNMEASURED = "not measured on 8xH100"

# The settings behind the figures, as in result.json. These values, the defaults, are the placeholder's.
PROTOCOL = {
    "ttt_enabled": True,
    "ttt_protocol": "replay",
    "ttt_context": "cached",
    "ttt_n_epochs": 50,
    "ttt_lora_lr": 0.001,
    "ttt_lora_rank": 8,
    "ttt_chunk_size": 256,
    "ttt_eval_seq_len": 2048,
    "eval_stride": 64,
}
# Settings in which the runs of one submission may differ: none of them changes the experiment.
FREE_SETTINGS = {"seed", "run_id", "resume", "checkpoint_every", "eval_only", "ttt_audit"}
FREE_SETTINGS |= {"data_path", "tokenizer_path", "output_dir"}  # the same files may lie elsewhere

SCORE_LABEL = "backward-looking: every token is scored once, before any update has seen it"
REPLAY_LABEL = "not a compression rate: the adapters have trained on the whole document before this pass scores it"
NAME = "10L 512d GPT, int5 MLP, int6 attention, SWA, per-document LoRA test-time training"
AUTHOR = "the train_gpt.py authors"
BLURB = (
    "10 layers of width 512 with GQA, U-Net skips, a hashed bigram embedding and SmearGate; Muon and AdamW, warmdown "
    "against the wall clock, SWA; int5 MLPs, int6 attention, zstd-22 in a container without pickle; rank-8 LoRA on Q and "
    "V adapted per document. Only scores made before any update had seen the token count."
)


# ---------------------------------------------------------------------------------------------- reading runs


class Figure(NamedTuple):
    """One score over the validation stream: nats per token, bits per byte, and what was counted."""

    val_loss: float
    val_bpb: float
    targets: int
    bytes: int
    backward_looking: bool
    epoch: int | None  # of replay

    @property
    def counted(self) -> tuple[int, int]:
        """The stream that was scored, as far as a figure tells: its targets and their bytes."""
        return self.targets, self.bytes


@dataclass(frozen=True)
class Run:
    """What a submission needs of one result.json; None where the run did not train or make the artifact itself."""

    path: Path
    run_id: str
    seed: int
    source_sha256: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    world_size: int
    quantised: bool
    val_loss: float
    val_bpb: float
    score: Figure
    figures: list[Figure]  # all of them, `score` among them
    audit: list[tuple[int, bool]]  # (document, did a later token reach an earlier, backward-looking score?)
    documents: int | None  # unknown to the sliding window
    unfinished: int
    eval_seconds: float
    steps: int | None
    train_seconds: float | None
    bytes_model: int | None
    bytes_code: int | None
    bytes_total: int | None
    artifact_sha256: str | None

    @property
    def device(self) -> str:
        """The name of the accelerator, or of the processor."""
        return str(self.environment.get("device"))

    @property
    def replay_last_epoch(self) -> Figure | None:
        """The figure of replay's last epoch, if there was more than one."""
        last = self.figures[-1]
        return None if last.backward_looking else last

    @property
    def train_limit(self) -> float:
        """Seconds: the budget and one step, since the step under way when the time is up is finished."""
        return TRAIN_SECONDS + min((self.train_seconds or 0) / max(self.steps or 0, 1), LONGEST_LAST_STEP)


def read_run(path: Path) -> Run:
    """Reads a result.json, or the one in a run's folder; UserError if it is anything else."""
    path = path / "result.json" if path.is_dir() else path
    advice = "give the result.json of a finished run"
    try:
        result = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist — {advice}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON ({error}) — {advice}") from error
    version = result.get("schema_version") if isinstance(result, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(f"{path} has schema_version {version!r}, not {SCHEMA_VERSION} — {advice}")

    def get(keys: str, kind: type) -> Any:
        """The value at a dotted path, checked: `float` takes any finite number, and only `bool` takes a truth value."""
        value = result
        for key in keys.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        accepted = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise UserError(f"{path} has no {keys} of type {kind.__name__} — {advice}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{path} has {keys} = {value} — {advice}")
        return value

    def figure(name: str) -> Figure:
        of = f"evaluation.{name}."
        counts = get(of + "targets", int), get(of + "bytes", int)
        epoch = get(of + "epoch", int) if "epoch" in get(of[:-1], dict) else None
        return Figure(
            get(of + "val_loss", float), get(of + "val_bpb", float), *counts, get(of + "backward_looking", bool), epoch
        )

    evaluation = get("evaluation", dict)
    if sliding := "sliding" in evaluation:
        figures = [score := figure("sliding")]
    else:
        figures = [figure("no_adaptation"), score := figure("backward_looking"), figure("last_epoch")]
    trained, packed = result.get("training") is not None, result.get("artifact") is not None
    return Run(
        path=path,
        run_id=get("run_id", str),
        seed=get("seed", int),
        source_sha256=get("source_sha256", str),
        settings=get("settings", dict),
        environment=get("environment", dict),
        world_size=get("world_size", int),
        quantised=get("quantised", bool),
        val_loss=get("val_loss", float),
        val_bpb=get("val_bpb", float),
        score=score,
        figures=figures,
        audit=read_audit(get("evaluation.audit", list), path) if "audit" in evaluation else [],
        documents=None if sliding else get("evaluation.documents", int),
        unfinished=0 if sliding else len(get("evaluation.unfinished_documents", list)),
        eval_seconds=get("evaluation.seconds", float),
        steps=get("training.steps", int) if trained else None,
        train_seconds=get("training.seconds", float) if trained else None,
        bytes_model=get("artifact.model_bytes", int) if packed else None,
        bytes_code=get("artifact.code_bytes", int) if packed else None,
        bytes_total=get("artifact.total_bytes", int) if packed else None,
        artifact_sha256=get("artifact.sha256", str) if packed else None,
    )


def read_audit(rows: list[Any], path: Path) -> list[tuple[int, bool]]:
    """Returns (document, leak) for each row of an audit: a leak is a change beyond that of an unchanged repeat."""
    try:
        return [(row["document"], row["backward_looking"] and not row["change"] <= row["repeat"]) for row in rows]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path} has another form of audit than expected ({error!r}) — give an untouched result.json"
        ) from error


def refuse_over_limit(run: Run) -> None:
    """UserError if the run breaks a limit of the challenge, so that no submission can contain it."""
    if run.bytes_total is not None and run.bytes_total > SIZE_CAP:
        raise UserError(
            f"{run.path} has {run.bytes_total:,} bytes, over the cap of {SIZE_CAP:,} — prune or quantise more"
        )
    if run.train_seconds is not None and run.train_seconds > run.train_limit:
        advice = f"train with MAX_WALLCLOCK_SECONDS={TRAIN_SECONDS}"
        raise UserError(
            f"{run.path} trained for {run.train_seconds:.2f} s, over the limit of {TRAIN_SECONDS} s — {advice}"
        )
    if run.eval_seconds > EVAL_SECONDS:
        advice = f"evaluate with EVAL_MAX_SECONDS={EVAL_SECONDS}"
        raise UserError(
            f"{run.path} evaluated for {run.eval_seconds:.2f} s, over the limit of {EVAL_SECONDS} s — {advice}"
        )


def refuse_unlike(runs: Sequence[Run]) -> None:
    """UserError unless the runs are one experiment repeated: same source, settings and text, different seeds."""
    for one, other in pairwise(runs):
        pair = f"{one.path} and {other.path}"
        if one.source_sha256 != other.source_sha256:
            raise UserError(f"{pair} come from different sources (source_sha256) — give runs of one train_gpt.py")
        names = sorted((one.settings.keys() | other.settings.keys()) - FREE_SETTINGS)
        if changed := [name for name in names if one.settings.get(name) != other.settings.get(name)]:
            raise UserError(f"{pair} differ in {', '.join(changed)} — give runs that differ in the seed alone")
        if one.score.counted != other.score.counted:
            raise UserError(f"{pair} scored different validation text — give runs on one validation split")
    for attribute, what in (("seed", "seed"), ("artifact_sha256", "artifact")):
        first: dict[Any, Run] = {}
        for run in runs:
            value = getattr(run, attribute)
            if value is not None and first.setdefault(value, run) is not run:
                raise UserError(
                    f"{first[value].path} and {run.path} have the same {what} {value} — give each seed once"
                )


# ---------------------------------------------------------------------------------------------- statistics


def incomplete_beta(a: float, b: float, x: float) -> float:
    """Returns the regularised incomplete beta function I_x(a, b), by its continued fraction (DLMF 8.17.22).

    Good to about 1e-14 for a and b up to some thousands.
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # there the fraction of the mirrored function converges faster
        return 1 - incomplete_beta(b, a, 1 - x)
    fraction = 1.0
    for m in range(200, 0, -1):
        even = m * (b - m) / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m - 1) * (a + b + m - 1) / ((a + 2 * m - 2) * (a + 2 * m - 1))
        fraction = 1 + odd * x / (1 + even * x / fraction)
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    return math.exp(a * math.log(x) + b * math.log1p(-x) - log_beta) / (a * fraction)


def t_tail(t: float, freedom: int) -> float:
    """Returns P(T > t) for Student's t distribution with `freedom` degrees of freedom."""
    square = t * t
    if square < freedom:  # this form is exact for a small t, the other one for a small tail
        tail = (1 - incomplete_beta(0.5, freedom / 2, square / (freedom + square))) / 2
    else:
        tail = incomplete_beta(freedom / 2, 0.5, freedom / (freedom + square)) / 2
    return tail if t >= 0 else 1 - tail


def t_test(losses: Sequence[float], baseline: float | None) -> dict[str, float | int | None]:
    """One-sided t-test that `baseline` exceeds the mean of `losses` by more than MARGIN; None where it cannot be said."""
    mean, deviation = mean_std(losses)
    t = p = None
    if baseline is not None and deviation:
        t = (baseline - MARGIN - mean) / (deviation / math.sqrt(len(losses)))
        p = t_tail(t, len(losses) - 1)
    return {
        "baseline_val_loss": baseline,
        "improvement_nats": None if baseline is None or mean is None else baseline - mean,
        "margin_nats": MARGIN,
        "t": t,
        "degrees_of_freedom": max(len(losses) - 1, 0),
        "p": p,
    }


def mean_std(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Returns the mean and the sample standard deviation, None where there are too few values."""
    mean = statistics.fmean(values) if values else None
    return mean, statistics.stdev(values) if len(values) > 1 else None


def largest(values: Sequence[float | None]) -> float | None:
    """Returns the maximum, or None if a value is missing or there is none."""
    return None if not values or None in values else max(values)


# ---------------------------------------------------------------------------------------------- rules


class Verdict(NamedTuple):
    """How a rule was judged, and on what."""

    outcome: str
    detail: str


def verdict(passed: bool, detail: str) -> Verdict:
    return Verdict(PASS if passed else FAIL, detail)


def size_cap(runs: Sequence[Run]) -> Verdict:
    size = largest([run.bytes_total for run in runs])
    if size is None:
        return Verdict(NOT_APPLICABLE, "a run made no artifact, so its size with the code is unknown")
    return verdict(size <= SIZE_CAP, f"{size:,} of {SIZE_CAP:,} bytes")


def train_budget(runs: Sequence[Run]) -> Verdict:
    seconds = largest([run.train_seconds for run in runs])
    if seconds is None:
        return Verdict(NOT_APPLICABLE, "a run did not train")
    detail = f"{seconds:.2f} of {TRAIN_SECONDS} s (the step under way at the end may finish)"
    return verdict(all(run.train_seconds <= run.train_limit for run in runs), detail)


def eval_budget(runs: Sequence[Run]) -> Verdict:
    seconds = max(run.eval_seconds for run in runs)
    return verdict(seconds <= EVAL_SECONDS, f"{seconds:.2f} of {EVAL_SECONDS} s")


def hardware(runs: Sequence[Run]) -> Verdict:
    found = sorted({f"{run.world_size} x {run.device}" for run in runs})
    passed = all(run.world_size == WORLD_SIZE and DEVICE in run.device.split() for run in runs)
    return verdict(passed, ", ".join(found))


def validation_split(runs: Sequence[Run]) -> Verdict:
    first = runs[0]
    documents, tokens, vocabulary = first.documents, first.score.targets + 1, first.settings.get("vocab_size")
    counted = "documents not counted" if documents is None else f"{documents:,} documents"
    passed = round(tokens / 1e6, 1) == MILLION_TOKENS and vocabulary == VOCABULARY and documents in (None, DOCUMENTS)
    return verdict(passed, f"{counted}, {tokens:,} tokens of a vocabulary of {vocabulary}")


def scored_once(runs: Sequence[Run]) -> Verdict:
    def consistent(run: Run, figure: Figure) -> bool:
        if figure.counted != run.score.counted or min(figure.counted) < 1:
            return False
        bits = figure.val_loss * figure.targets / math.log(2)
        return math.isclose(figure.val_bpb, bits / figure.bytes, rel_tol=1e-9)

    passed = all(consistent(run, figure) for run in runs for figure in run.figures)
    return verdict(passed, f"{runs[0].score.targets:,} targets and {runs[0].score.bytes:,} bytes in every figure")


def backward_looking(runs: Sequence[Run]) -> Verdict:
    for run in runs:
        if not run.score.backward_looking or (run.val_loss, run.val_bpb) != (run.score.val_loss, run.score.val_bpb):
            return Verdict(FAIL, f"the score of seed {run.seed} is not its backward-looking figure")
        if any(leak for _, leak in run.audit):
            return Verdict(FAIL, f"the audit of seed {run.seed} found later tokens in earlier scores")
    audited = sum(len({document for document, _ in run.audit}) for run in runs)
    return Verdict(PASS, f"{SCORE_LABEL}; documents audited: {audited}")


def quantised(runs: Sequence[Run]) -> Verdict:
    passed = all(run.quantised for run in runs)
    return verdict(passed, "scored from the artifact" if passed else "a run scored an unquantised state dict")


RULES: dict[str, Callable[[Sequence[Run]], Verdict]] = {
    "size_cap": size_cap,
    "train_seconds": train_budget,
    "eval_seconds": eval_budget,
    "hardware_8xH100": hardware,
    "full_validation_split": validation_split,
    "every_target_scored_once": scored_once,
    "backward_looking_score": backward_looking,
    "quantised_artifact": quantised,
}
SOURCE_RULE = "no_network_no_training_data_at_evaluation"


def significance(runs: Sequence[Run], test: dict[str, Any]) -> Verdict:
    """The rule that makes a record, given what t_test returned."""
    if test["baseline_val_loss"] is None:
        return Verdict(NOT_APPLICABLE, "no baseline was given")
    if test["p"] is None:
        reason = "at least 2 runs are needed" if len(runs) < 2 else "the losses of the runs do not differ at all"
        return Verdict(NOT_APPLICABLE, reason)
    detail = f"{test['improvement_nats']:.5f} nats; p = {test['p']:.3g} against an improvement of no more than {MARGIN}"
    return verdict(test["p"] < SIGNIFICANCE, detail)


def judge(runs: Sequence[Run], test: dict[str, Any]) -> tuple[dict[str, Verdict], str, list[str]]:
    """Returns the verdict on every rule, the status, and the reasons why it is not `record`.

    A rule that fails makes a non-record; short of that, one that cannot be judged leaves the submission incomplete.
    """
    verdicts = {name: rule(runs) if runs else Verdict(NOT_APPLICABLE, "no runs") for name, rule in RULES.items()}
    verdicts["significant_improvement"] = significance(runs, test) if runs else Verdict(NOT_APPLICABLE, "no runs")
    open_rules = {name: found for name, found in verdicts.items() if found.outcome != PASS}
    reasons = [f"{name}: {found.outcome} ({found.detail})" for name, found in open_rules.items()]
    failed = any(found.outcome == FAIL for found in open_rules.values())
    status = "non-record" if failed else "incomplete" if reasons else "record"
    verdicts[SOURCE_RULE] = Verdict(NOT_APPLICABLE, "a property of the source, which no result can show")
    return verdicts, status if runs else UNMEASURED, reasons if runs else [UNMEASURED]


# ---------------------------------------------------------------------------------------------- submission


def submission(runs: Sequence[Run], baseline: float | None = None, **about: str | None) -> dict[str, Any]:
    """Returns the content of submission.json. `about`: name, author, github_id, blurb, date. No runs: the placeholder."""
    losses = [run.val_loss for run in runs]
    test = t_test(losses, baseline)
    verdicts, status, reasons = judge(runs, test)
    (loss, loss_std), (bpb, bpb_std) = mean_std(losses), mean_std([run.val_bpb for run in runs])
    settings = runs[0].settings if runs else PROTOCOL
    return about | {
        "status": status,
        "reasons": reasons,
        "val_bpb": bpb,
        "val_bpb_std": bpb_std,
        "val_loss": loss,
        "val_loss_std": loss_std,
        "score": SCORE_LABEL,
        "replay_last_epoch": replay_summary(runs),
        "bytes_total": largest([run.bytes_total for run in runs]),
        "bytes_model": largest([run.bytes_model for run in runs]),
        "bytes_code": largest([run.bytes_code for run in runs]),
        "train_seconds": largest([run.train_seconds for run in runs]),
        "eval_seconds": largest([run.eval_seconds for run in runs]),
        "significance": test,
        "rules": {name: found._asdict() for name, found in verdicts.items()},
        "protocol": {name: settings.get(name) for name in PROTOCOL},
        "source_sha256": runs[0].source_sha256 if runs else None,
        "runs": [run_summary(run) for run in runs],
    }


def replay_summary(runs: Sequence[Run]) -> dict[str, Any]:
    """The last epoch of replay over all runs, kept apart from the score and labelled; empty if a run has none."""
    figures = [run.replay_last_epoch for run in runs]
    present = figures if all(figures) else []
    bpb, deviation = mean_std([figure.val_bpb for figure in present])
    return {
        "label": REPLAY_LABEL,
        "epoch": present[0].epoch if present else None,
        "val_bpb": bpb,
        "val_bpb_std": deviation,
        "val_loss": mean_std([figure.val_loss for figure in present])[0],
    }


def run_summary(run: Run) -> dict[str, Any]:
    """What submission.json says of one run."""
    names = "seed run_id val_bpb val_loss steps train_seconds eval_seconds world_size device bytes_total bytes_model bytes_code"
    last = run.replay_last_epoch
    return {name: getattr(run, name) for name in names.split()} | {
        "documents_scored_without_adaptation": run.unfinished,
        "artifact_sha256": run.artifact_sha256,
        "replay_last_epoch": {"label": REPLAY_LABEL, "epoch": last.epoch, "val_bpb": last.val_bpb} if last else None,
    }


def summary(content: dict[str, Any]) -> str:
    """A submission for the terminal: one line per run, the mean, the rules, the status."""
    lines = [
        f"seed {run['seed']}: val_bpb {run['val_bpb']:.6f}, val_loss {run['val_loss']:.6f}" for run in content["runs"]
    ]
    if content["val_bpb"] is not None:
        spread = "" if content["val_bpb_std"] is None else f" ± {content['val_bpb_std']:.6f}"
        lines.append(f"mean: val_bpb {content['val_bpb']:.6f}{spread}, {SCORE_LABEL}")
    replay = content["replay_last_epoch"]
    if replay["val_bpb"] is not None:
        lines.append(f"replay epoch {replay['epoch']}: {replay['val_bpb']:.6f}, {replay['label']}")
    lines += [f"{rule['outcome']:<14} {name}: {rule['detail']}" for name, rule in content["rules"].items()]
    return "\n".join([*lines, f"status: {content['status']}"])


# ---------------------------------------------------------------------------------------------- command line


def loss(text: str) -> float:
    """An argparse type: nats per token."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a loss in nats per token")
    return value


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, metavar="RESULT", help="a result.json, or a run's folder")
    parser.add_argument(
        "--baseline-loss", type=loss, metavar="NATS", help="val_loss of the record to beat, in nats per token"
    )
    parser.add_argument("--placeholder", action="store_true", help="write what stands in until there are runs")
    parser.add_argument("--out", type=Path, default=Path("submission.json"), help="default: submission.json")
    parser.add_argument("--name", default=NAME, help="of the submission")
    parser.add_argument("--author", default=AUTHOR)
    parser.add_argument("--github-id")
    parser.add_argument("--blurb", default=BLURB, help="what it does, in a few sentences")
    parser.add_argument("--date", help="of the measurement; default: now, in UTC")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    if bool(options.results) == options.placeholder:
        raise UserError("give either runs or --placeholder — see --help")
    runs = [read_run(path) for path in options.results]
    for run in runs:
        refuse_over_limit(run)
    refuse_unlike(runs)
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if runs else None
    about = {name: getattr(options, name) for name in ("name", "author", "github_id", "blurb")}
    content = submission(runs, options.baseline_loss, **about, date=options.date or now)
    partial = options.out.with_name(options.out.name + ".tmp")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(options.out)
    if runs:
        print(summary(content))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    run_tool(main)
