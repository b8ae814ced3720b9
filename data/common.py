"""What the tools of this folder share: consoles, errors, command lines, whole files and folders, shards, and runs."""

import os
import signal
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: see train_gpt.py
if os.path.dirname(os.path.realpath(getattr(sys.modules["__main__"], "__file__", os.devnull))) == os.path.dirname(
    os.path.realpath(__file__)
):  # a tool has been started: until run_tool() takes over, it imports, which may take seconds
    sys.excepthook = lambda _, error, trace: fail_to_import(error, trace)
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # else it is to be ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

# Python's own modules alone: each tool imports this one first, and is soon in a state to be interrupted.
import argparse
import errno
import hashlib
import io
import json
import math
import re
import shutil
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

if TYPE_CHECKING:
    import numpy as np
    from tqdm import tqdm

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024


class UserError(Exception):
    """Something the user can put right. The message reads `what is wrong — what to do`."""


class Parser(argparse.ArgumentParser):
    """argparse, but a bad command line is a UserError: one line instead of the usage text."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} — see --help")

    def print_help(self, file: TextIO | None = None) -> None:
        deliver(self.format_help().rstrip())


def progress_bar(label: str, tokens: int) -> "tqdm":
    """Of tokens, on stderr; where that is no terminal, only of what takes over half a minute, and twice a minute."""
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no thread of its own
    pace = {} if sys.stderr and sys.stderr.isatty() else dict(delay=30, mininterval=30)
    return tqdm(desc=label, total=tokens, unit=" tokens", leave=False, disable=sys.stderr is None, **pace)


def place(text: str) -> Path:
    """An argparse type: a path. An empty one, as of a variable that is not set, would mean the folder at hand."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no path")
    return Path(text)


def dataset_place(text: str) -> Path:
    """An argparse type: a path that train_gpt.py takes for DATA_PATH, which is to be text that can be printed."""
    path = place(text)
    if not (text + os.path.basename(os.path.realpath(path))).isprintable():
        what = f"--out {ascii(text)} has characters that cannot be printed, and train_gpt.py takes no such DATA_PATH"
        raise UserError(f"{what} — choose another name")
    return path


def delimiter(text: str) -> str:
    r"""An argparse type: what parts documents; a shell passes on `\n`, `\r` and `\t` as two characters."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty, as of a variable that is not set")
    return re.sub(r"\\[nrt]", lambda found: {"n": "\n", "r": "\r", "t": "\t"}[found[0][1]], text)


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], Any]:
    """Returns an argparse type: an int from `low` to `high`, or a float strictly between them."""

    def number(text: str) -> Any:  # argparse says "invalid number value" for what is none
        value = kind(text)
        if not (low <= value <= high if kind is int else low < value < high):
            ends = "" if kind is int else ", both excluded"
            raise argparse.ArgumentTypeError(f"{text} is not between {low:,} and {high:,}{ends}")
        return value

    return number


class Console:
    """A stream of text that ends nothing: characters that it has not are escaped, and one that is closed, gone or full
    (`lost` says why) loses what is written."""

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream or io.StringIO()  # None: the process was started without it
        self.lost: Exception | None = None if stream else OSError(errno.EBADF, "closed")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        encoding = self.stream.encoding or "utf-8"
        self.attempt(self.stream.write, text.encode(encoding, "backslashreplace").decode(encoding))
        self.flush()
        return len(text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, call: Callable, *arguments: str) -> None:
        if self.lost:
            return
        try:
            call(*arguments)
        except (OSError, ValueError) as error:  # ValueError: the stream was closed
            self.lost = error
            with suppress(OSError, ValueError):  # what is still in the buffer must not fail when Python ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def deliver(text: str) -> None:
    """Prints what a tool was run for; OSError if it is lost, unless whoever read it has gone."""
    print(text)
    lost = getattr(sys.stdout, "lost", None)
    if isinstance(lost, OSError) and lost.errno != errno.EPIPE:
        lost.filename = "standard output"
        raise lost


# What to do about an error of the system, where its cause is certain.
ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space, or ask for a larger quota",
    errno.EFBIG: "allow larger files (ulimit -f), or use another file system",
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.ENFILE: "end programs that hold many files open",
    errno.EACCES: "change its permissions, or use another place",
    errno.EPERM: "change its permissions, or use another place",
    errno.EROFS: "use another place: this one is read only",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "give a file",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "these links lead in a circle: give another path",
}


def required() -> set[str]:
    """The packages that the requirements files name, each as it is imported."""
    here, found = Path(__file__).resolve().parent, set()
    for path in (here / "requirements.txt", here.parent / "requirements.txt"):
        with suppress(OSError):
            found.update(re.findall(r"^([\w-]+)==", path.read_text(), re.MULTILINE))
    return found


def explain(error: Exception, usage: str = "") -> str | None:
    """What is wrong and what to do, or None for an error of the program. `usage` names the tool's options."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or str(error)).split(".")[0]
        if package in required():
            return f"this needs {package}, which is not installed — pip install {package}"
        return f"this needs the module {package}, which is not there — install Python and its packages anew"
    # torch's own, which it has for a GPU and, without a class of its own, for a CPU; nothing here imports it
    torchs = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    if isinstance(error, MemoryError) or torchs:
        return "memory ran out — end other programs, or give less at once"
    if re.search("start new thread|^Resource temporarily unavailable", str(error)):  # Python's words, a C++ library's
        fewer = ", or lower --threads" if "--threads" in usage else ""
        return f"no further thread can be started — allow more processes (ulimit -u){fewer}"
    if isinstance(error, OSError):
        advice = ADVICE.get(error.errno, "mend that, then run it again")
        return f"{error.filename or 'input/output'}: {error.strerror or error} — {advice}"
    return None


def fail_to_import(error: BaseException, trace: TracebackType | None) -> None:
    """What Python does with an error outside of run_tool(): one line for a package that is not installed."""
    if not isinstance(error, ModuleNotFoundError):
        sys.__excepthook__(type(error), error, trace)
        return
    print(f"error: {explain(error)}", file=sys.stderr)
    sys.exit(2)


STOPS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]  # Windows has none
PATIENCE = 2.0  # seconds


def handle_stops() -> None:
    """From now on the first signal to stop raises KeyboardInterrupt or SystemExit, so that what was begun is removed.
    Another one does nothing, but over PATIENCE later, when something must be stuck, it ends the process at once."""
    first = None

    def stop(number: int, _: object) -> None:
        nonlocal first
        if first is None:
            first = time.monotonic()
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        if time.monotonic() > first + PATIENCE:
            os._exit(128 + number)

    set_stops(stop)


def set_stops(handler: Any) -> None:
    """Handles the signals to stop so, but for those that are to be ignored, as nohup says."""
    for number in STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


@contextmanager
def unstopped() -> Iterator[None]:
    """No signal to stop disturbs the block: it is soon over, and so is the tool."""
    kept = {number: signal.signal(number, signal.SIG_IGN) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def run_tool(main: Callable[[argparse.ArgumentParser], None]) -> NoReturn:
    """Runs a tool's main function; what goes wrong ends in one line on stderr and exit code 2 (130 for Ctrl-C)."""
    streams = sys.stdout, sys.stderr
    code, message, parser = 0, None, None
    try:
        handle_stops()
        parser = Parser(description=main.__globals__["__doc__"], formatter_class=argparse.RawDescriptionHelpFormatter)
        while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:  # a closed console's number would be the next file's
            pass
        os.close(descriptor)
        sys.stdout, sys.stderr = map(Console, streams)
        main(parser)
    except KeyboardInterrupt:
        code, message = 130, "interrupted — run it again"
    except Exception as error:
        code, message = 2, explain(error, parser.format_usage() if parser else "")
        if not message:
            raise
    finally:
        set_stops(signal.SIG_DFL)  # a handler would raise into the end of Python
        if message:
            print("error: " + " ".join(message.split()), file=sys.stderr)
        sys.stdout, sys.stderr = streams
    sys.exit(code)


def followed(path: Path) -> Path:
    """Where a path leads, absolute; OSError for links in a circle, of which Path.resolve() makes another error."""
    with suppress(FileNotFoundError):
        path.stat()
    return Path(os.path.realpath(path))


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError from within that names no file gets this one: those of reading, writing and closing name none."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def write_atomic(path: Path, content: bytes, new: bool = False) -> None:
    """Writes a file that is at any moment the old one or the new one, whole; OSError naming it, and nothing left. One
    that is to be `new` replaces none: UserError."""
    if is_stream(path):
        with naming(path), path.open("ab") as file:  # nothing replaces it, or what an open file has already
            file.write(content)
        return
    path = followed(path)  # a link stays one
    partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with naming(path):
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            place_new(partial, path) if new else partial.replace(path)
    except OSError as error:
        error.filename = str(path)  # not the partial file's: nobody asked for that
        raise
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def require_writable(path: Path) -> None:
    """OSError naming a file that write_atomic() could not write, for one to be written after long work."""
    if is_stream(path):
        return
    try:
        with tempfile.TemporaryFile(dir=followed(path).parent):
            pass
    except OSError as error:
        error.filename = str(path)
        raise


def place_new(partial: Path, path: Path) -> None:
    """Gives a file its name; UserError if that is taken, even at this moment where the file system has hard links."""
    try:
        os.link(partial, path)
        return
    except OSError:  # the name is taken, or there are no links
        taken = path.exists()
    if taken:
        raise UserError(f"{path} has been made meanwhile — delete it, or choose another name")
    partial.replace(path)


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Yields an empty folder to fill, whose files become `out`'s if the block ends well; UserError if that is taken.

    What is there and empty may be a mount point, which cannot be renamed over: it is filled from a folder within."""
    require_file(out, "choose another folder")
    there = out.is_dir()
    if out.is_file() or (there and set(os.listdir(out)) - {"lost+found"}):
        raise UserError(f"{out} is a file or a folder that is not empty — choose another folder, or delete it")
    out = followed(out)
    partial = out / f".partial-{os.getpid()}" if there else out.with_name(f"{out.name}.partial-{os.getpid()}")
    moved: list[Path] = []
    try:
        partial.mkdir(parents=True)
        if there and (others := set(os.listdir(out)) - {"lost+found", partial.name}):
            who = "another run" if any(name.startswith(".partial-") for name in others) else "something else"
            raise UserError(f"{who} began to fill {out} at the same moment — run it again")
        yield partial
        if out.exists() and not there:
            raise UserError(f"{out} has been made meanwhile, as another run would — use that, or choose another folder")
        if not there:
            partial.rename(out)
        for path in sorted(partial.iterdir()) if there else ():
            moved.append(out / path.name)
            path.rename(moved[-1])
    except BaseException:
        for path in moved:
            path.unlink(missing_ok=True)
        raise
    finally:
        with unstopped():
            shutil.rmtree(partial, ignore_errors=True)


def is_special(path: Path) -> bool:
    """Whether this is what may keep a reader waiting forever: a pipe, a socket, a device."""
    return path.exists() and not path.is_file() and not path.is_dir()


def is_stream(path: Path) -> bool:
    """Whether what is written there goes to something that is open: a pipe, a device, or by the name of a descriptor
    (/dev/stdout) even a file."""
    return is_special(path) or bool(re.fullmatch(r"/dev/std(in|out|err)|(/dev|/proc/[\w/]+)/fd/\d+", str(path)))


def require_file(path: Path, cure: str = "give a file") -> Path:
    """The path; UserError for what may keep a reader waiting forever."""
    if is_special(path):
        raise UserError(f"{path} is a pipe, a socket or a device — {cure}")
    return path


def walk(folder: Path) -> list[Path]:
    """All that a folder holds at any depth, but folders, sorted. Links are followed, and no folder is read twice;
    OSError for one that cannot be read."""

    def fail(error: OSError) -> NoReturn:
        raise error

    found, seen = [], set()
    for place, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()
        paths = [Path(place, name) for name in files]
        for path in paths:  # what os.walk() cannot look into is none of its folders
            try:
                path.is_symlink() and path.stat()
            except OSError as error:
                broken = errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG  # which is counted
                if error.errno not in broken:
                    raise
        found += paths
    return sorted(found)


def check_shard(path: Path) -> int:
    """Returns the number of tokens in a shard; UserError unless magic, version, count and size agree, and it
    has some."""
    with naming(path), require_file(path).open("rb") as file:
        header = file.read(12)
    magic, version, count = struct.unpack("<3i", header) if len(header) == 12 else (0, 0, 0)
    if (magic, version) != (MAGIC, VERSION) or count < 1 or path.stat().st_size != HEADER_BYTES + 2 * count:
        raise UserError(f"{path} is not a whole token shard — delete it and get or build it again")
    return count


# What result.json and its parts hold: dotted paths, by the type that they must be of.
RESULT = {
    str: "run_id source_sha256 weights_sha256 environment.torch environment.device environment.dtype data.validation"
    " data.tokenizer",
    int: "seed settings.seed source_bytes world_size",
    float: "evaluation.seconds",
    bool: "quantised evaluation.at_least evaluation.within_budget",
    list: "sessions",
}
FIGURE = {int: "targets bytes lacking", bool: "backward_looking"}
OPTIONAL = {
    "training": {int: "steps", float: "seconds calibration"},
    "artifact": {int: "model_bytes code_bytes total_bytes", str: "sha256"},
    "evaluation.certificate": {str: "source_sha256", dict: "findings"},
}
ROWS = {
    "sessions": {str: "stage ended", int: "world_size", float: "seconds", list: "devices"},
    "evaluation.audit": {int: "document", str: "figure", bool: "backward_looking", float: "change repeat"},
    "evaluation.curve": {int: "epoch not_finite"},
}
FINDING = {str: "outcome detail", float: "figure"}
MOST = 2**63  # that a figure or a count may be; a setting may be anything that float32 holds
UNTOUCHED = "give a finished run as it was left"
SCORES = ("backward_looking", "mixture")  # what test-time training may name as its score
FIGURES = ("sliding", "no_adaptation", *SCORES, "last_epoch")


@dataclass(frozen=True)
class Run:
    """What a run left in its folder: `result`, the content of its result.json, checked, and the files beside it."""

    path: Path  # result.json
    result: dict[str, Any]

    @property
    def figures(self) -> dict[str, dict[str, Any]]:
        """The figures of the evaluation by name; replay's last epoch, if any, comes last."""
        return {name: figure for name in FIGURES if (figure := self.result["evaluation"].get(name))}

    @property
    def score_name(self) -> str:
        """Which figure counts: that of the sliding window, or what test-time training names as its score."""
        return "sliding" if "sliding" in self.figures else self.result["evaluation"]["score"]

    @property
    def score(self) -> dict[str, Any]:
        """The figure that counts."""
        return self.figures[self.score_name]

    @property
    def cut(self) -> str:
        """What a deadline kept from documents, in words; empty where it kept nothing."""
        return deadline_cut(self.score["lacking"], self.figures.get("last_epoch", self.score)["lacking"])

    @property
    def findings(self) -> dict[str, dict[str, Any]]:
        """The certificate, as audit.py writes it: by name, `outcome` (pass, fail, not judged), `figure` and `detail`.
        Empty without one, and where another train_gpt.py than the run's made it."""
        certificate = self.result["evaluation"].get("certificate")
        own = certificate and certificate["source_sha256"] == self.result["source_sha256"]
        return certificate["findings"] if own else {}


def deadline_cut(score: int, last: int) -> str:
    """What it means that so many documents lack the score and replay's last epoch; empty where none does."""
    words = [f"{score:,} documents count without adaptation in the score"] if score else []
    words += [f"{last:,} did not reach the last epoch"] if last > score else []
    return f"time ran out: {', '.join(words)}" if words else ""


def read_run(path: Path) -> Run:
    """Reads a run by its folder, or by the result.json in it; UserError if it is anything else."""
    if not path.exists():
        raise UserError(f"{path} does not exist — give a run's folder")
    path = path / "result.json" if path.is_dir() else path
    if path.name != "result.json":
        raise UserError(f"{path} is no run — give a run's folder")
    if not path.exists():
        raise UserError(
            f"{path.parent} has no result.json, which a run writes at its end — give a finished run's folder"
        )
    try:
        content = require_file(path).read_bytes()
        result = json.loads(content, parse_int=finite, parse_float=finite, parse_constant=finite)
        json.dumps(result, ensure_ascii=False).encode()  # no half of a character
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON of a run ({error}) — {UNTOUCHED}") from error
    check_version(path, value_of(result, "schema_version"))
    check_form(path, result)
    return Run(path, result)


def check_version(path: Path, version: object) -> None:
    """UserError unless a result is of the form that is read here."""
    if version == 2:
        weights = path.with_name("final_model.ptz")
        cure = f"score its weights again: EVAL_ONLY={weights}, its settings, an OUTPUT_DIR of its own; or train again"
        raise UserError(f"{path} has schema_version 2, an earlier train_gpt.py's, not 3 — {cure}")
    if version != 3:
        raise UserError(f"{path} has schema_version {version!r}, not 3 — {UNTOUCHED}")


def require(path: Path, form: dict[type, str], place: str, part: Any) -> None:
    """UserError unless a part of the result, which stands at `place`, has all that `form` names, of its type."""
    for kind, names in form.items():
        for name in names.split():
            value = value_of(part, name)
            if type(value) is not kind and (type(value), kind) != (int, float):
                raise UserError(f"{path} has no {place}{name} of type {kind.__name__} — {UNTOUCHED}")
            if kind in (int, float) and not abs(value) < MOST:
                raise UserError(f"{path} has {place}{name} {value:.3g}, which no run counts — {UNTOUCHED}")


def require_figure(path: Path, place: str, figure: Any, finite: bool = False) -> None:
    """UserError unless this is a figure; one that is not finite, and need not be, is null."""
    require(path, FIGURE, place, figure)
    for name in ("val_loss", "val_bpb"):
        if finite or figure.get(name, "") is not None:
            require(path, {float: name}, place, figure)


def check_form(path: Path, result: dict[str, Any]) -> None:
    """UserError unless everything that the tools read is there and of its type, and the score is a number."""
    require(path, RESULT, "", result)
    evaluation, window = result["evaluation"], "sliding" in result["evaluation"]
    if not window and evaluation.get("score") not in SCORES:
        raise UserError(f"{path} has no evaluation.score of {' or '.join(SCORES)} — {UNTOUCHED}")
    score = "sliding" if window else evaluation["score"]
    if None in (result.get("val_loss", 0), result.get("val_bpb", 0)):
        raise UserError(f"the score of {path} is not finite — lower the learning rates, or score other weights")
    require(path, {float: "val_loss val_bpb"}, "", result)
    there = [name for name in FIGURES if name in evaluation]
    for name in there if window else dict.fromkeys(["no_adaptation", "backward_looking", "last_epoch", score, *there]):
        require_figure(path, f"evaluation.{name}.", evaluation.get(name), name == score)
    for name, form in OPTIONAL.items():
        if value_of(result, name) is not None:
            require(path, form, f"{name}.", value_of(result, name))
    for name, finding in (value_of(evaluation, "certificate.findings") or {}).items():
        require(path, FINDING, f"evaluation.certificate.findings.{name}.", finding)
    for name, form in ROWS.items():
        if value_of(result, name) is not None:
            require(path, {list: name}, "", result)
            for index, row in enumerate(value_of(result, name)):
                require(path, form, f"{name}[{index}].", row)
    for index, row in enumerate(evaluation.get("curve") or []):
        require_figure(path, f"evaluation.curve[{index}].", row)
    if any(type(device) is not str for row in result["sessions"] for device in row["devices"]):
        raise UserError(f"{path} has a session whose devices are no names — {UNTOUCHED}")
    if result["seed"] != result["settings"]["seed"]:
        raise UserError(f"{path} has seed {result['seed']} and another in its settings — {UNTOUCHED}")


def check_agreement(path: Path, result: dict[str, Any]) -> None:
    """UserError where a result contradicts itself: one run writes all of it at once."""
    evaluation, artifact, training = result["evaluation"], value_of(result, "artifact"), value_of(result, "training")
    curve = evaluation.get("curve") or []
    figures = {name: figure for name in FIGURES if (figure := evaluation.get(name))}
    counts = {f"evaluation.{name}.{part}": figures[name][part] for name in figures for part in FIGURE[int].split()}
    counts |= {f"evaluation.{name}.val_loss": figures[name]["val_loss"] or 0 for name in figures}
    counts |= {"evaluation.seconds": evaluation["seconds"], "source_bytes": result["source_bytes"]}
    counts |= {f"training.{name}": training[name] for name in ("steps", "seconds", "calibration") if training}
    counts |= {f"sessions[{i}].seconds": row["seconds"] for i, row in enumerate(result["sessions"])}
    for name, count in counts.items():
        if count < 0:
            raise UserError(f"{path} has {name} {count:,}, less than nothing — {UNTOUCHED}")
    contradictions = {
        "artifact.total_bytes": artifact
        and artifact["total_bytes"] != artifact["model_bytes"] + artifact["code_bytes"],
        "artifact.code_bytes": artifact and artifact["code_bytes"] != result["source_bytes"],
        "evaluation.backward_looking": curve and curve[0] != evaluation["backward_looking"],
        "evaluation.last_epoch": curve and curve[-1] != evaluation["last_epoch"],
        "evaluation.curve": any(
            row["epoch"] != i or row["backward_looking"] != (i == 1) for i, row in enumerate(curve, 1)
        ),
    }
    for name, contradicted in contradictions.items():
        if contradicted:
            raise UserError(f"{path} contradicts itself in {name} — {UNTOUCHED}")


def finite(digits: str) -> float:
    """A number of JSON; ValueError for one that is no finite float."""
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits:.20} is no number")
    return value if set(digits) & set(".eE") else int(digits)


def bounded(digits: str) -> float:
    """A figure or a count; ValueError for one that 64 bits could not count."""
    value = finite(digits)
    if not abs(value) < MOST:
        raise ValueError(f"{digits:.20} is no figure")
    return value


def value_of(value: Any, path: str) -> Any:
    """The value at a dotted path of a JSON object; None where there is nothing."""
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def read_log(run: Run) -> tuple[bytes, bytes]:
    """Returns a run's log and the source that stands in it; UserError if the log is another run's or not there."""
    path = run.path.with_name("train.log")
    log = require_file(path).read_bytes()
    ids = re.findall(rb"^[* ]*RUN_ID=(.*?)\s*$", log, re.MULTILINE)
    if not ids:
        raise UserError(f"{path} names no RUN_ID — {UNTOUCHED}")
    if run.result["run_id"].encode().rstrip() not in ids:
        raise UserError(f"{path} belongs to another run than {run.result['run_id']} — {UNTOUCHED}")
    for found in re.finditer(rb'^"""', log, re.MULTILINE):  # the source begins with its docstring
        source = log[found.start() : found.start() + run.result["source_bytes"]]
        if hashlib.sha256(source).hexdigest() == run.result["source_sha256"]:
            return log, source
    raise UserError(f"{path} does not hold the source of {run.path} — {UNTOUCHED}")


def read_arrays(path: Path, axes: dict[str, int]) -> "dict[str, np.ndarray]":
    """Reads an .npz of numbers with so many axes each, the last as long in all; UserError if it is anything else."""
    import numpy as np

    try:
        with np.load(require_file(path)) as file:
            arrays = dict(file)
        fit = all(arrays[name].ndim == n and arrays[name].dtype.kind in "iuf" for name, n in axes.items())
        if not fit or len({arrays[name].shape[-1] for name in axes}) != 1:
            raise ValueError("shapes or types")
    except Exception as error:  # a damaged archive raises many kinds, errors of the system among them
        if isinstance(error, (UserError, MemoryError)) or (isinstance(error, OSError) and error.errno in ADVICE):
            raise
        raise UserError(f"{path} is damaged or unreadable ({type(error).__name__}: {error}) — {UNTOUCHED}") from error
    return arrays


def check_files(run: Run) -> None:
    """UserError where a result contradicts itself, or a file beside it is not that run's: its log, and what there is of
    its artifact and of the files of test-time training."""
    log, _ = read_log(run)  # which may lack its end: a console and a disk may go away
    check_agreement(run.path, run.result)
    said = re.findall(rb"^final_int8_zlib_roundtrip_exact val_loss:(\S+) val_bpb:(\S+)\s*$", log, re.MULTILINE)
    if said and said[-1] != tuple(f"{run.result[name]:.8f}".encode() for name in ("val_loss", "val_bpb")):
        raise UserError(f"{run.path.with_name('train.log')} ends with another score than {run.path} — {UNTOUCHED}")
    weights, artifact = run.path.with_name("final_model.ptz"), value_of(run.result, "artifact")
    if artifact and weights.exists():
        content = require_file(weights).read_bytes()
        if (len(content), hashlib.sha256(content).hexdigest()) != (artifact["model_bytes"], artifact["sha256"]):
            raise UserError(f"{weights} is not the artifact of {run.path} — {UNTOUCHED}")
    for name, read in (("ttt_documents.npz", read_documents), ("ttt_positions.npz", read_positions)):
        if "sliding" not in run.figures and run.path.with_name(name).exists():
            read(run)


def beside(run: Run, name: str, axes: dict[str, int]) -> "tuple[Path, dict[str, np.ndarray]]":
    """Path and arrays of the file of test-time training called `name` in a run's folder."""
    if "sliding" in run.figures:
        raise UserError(f"{run.path} is of a sliding window — give runs with test-time training")
    path = run.path.with_name(name)
    return path, read_arrays(path, axes)


def check_sums(path: Path, run: Run, sums: dict[str, float]) -> None:
    """UserError unless NLL that a file sums up, by figure, are those of the result, so that both are of one run."""
    for name, nats in sums.items():
        figure = run.figures[name]
        if figure["val_loss"] is not None and not math.isclose(
            nats, figure["val_loss"] * figure["targets"], rel_tol=1e-6
        ):
            raise UserError(f"{path} has other figures than {run.path} — {UNTOUCHED}")


def read_documents(run: Run) -> "dict[str, np.ndarray]":
    """Reads a run's ttt_documents.npz: bytes and nll_no_adaptation (D,), nll_per_epoch (E, D), in nats; nll_mixture
    (D,) where the run has one."""
    mixture = {"nll_mixture": 1} if "mixture" in run.figures else {}
    axes = {"bytes": 1, "nll_no_adaptation": 1, "nll_per_epoch": 2, "figures_finished": 1} | mixture
    path, arrays = beside(run, "ttt_documents.npz", axes)
    if not len(arrays["nll_per_epoch"]):
        raise UserError(f"{path} has no epoch — {UNTOUCHED}")
    sums = {"no_adaptation": arrays["nll_no_adaptation"].sum(), "backward_looking": arrays["nll_per_epoch"][0].sum()}
    check_sums(path, run, sums | {name.removeprefix("nll_"): arrays[name].sum() for name in mixture})
    return arrays


def read_scores(run: Run) -> "dict[str, np.ndarray]":
    """NLL (D,) in nats of each document by the names of an evaluation's figures; NaN where a deadline cut one off."""
    import numpy as np

    arrays = read_documents(run)
    finished = arrays["figures_finished"] > 0
    scores = {"backward_looking": arrays["nll_per_epoch"][0], "mixture": arrays.get("nll_mixture")}
    found = {name: np.where(finished, nll, np.nan) for name, nll in scores.items() if nll is not None}
    return found | {"no_adaptation": arrays["nll_no_adaptation"]}


def read_positions(run: Run) -> "dict[str, np.ndarray]":
    """Reads a run's ttt_positions.npz: by span of the document `ends`, `bytes`, `targets` (S,), and `nll` (F, S) in
    nats of the figures that `figures` (F,) names: no_adaptation, epoch_1 or single_pass, mixture."""
    path, arrays = beside(run, "ttt_positions.npz", {"nll": 2, "ends": 1, "bytes": 1, "targets": 1})
    adapted = "epoch_1" if value_of(run.result, "settings.ttt_protocol") == "replay" else "single_pass"
    known = {"no_adaptation": "no_adaptation", adapted: "backward_looking", "mixture": "mixture"}
    names = arrays["figures"].tolist() if "figures" in arrays else []
    counted = all(math.isclose(arrays[name].sum(), run.score[name]) for name in ("targets", "bytes"))
    expected = [name for name, figure in known.items() if figure in run.figures]
    if not counted or names != expected or len(arrays["nll"]) != len(names):
        raise UserError(f"{path} has other figures than {run.path} — {UNTOUCHED}")
    sums = {known[name]: nats for name, nats in zip(names, arrays["nll"].sum(1).tolist(), strict=True)}
    check_sums(path, run, sums)
    return arrays
