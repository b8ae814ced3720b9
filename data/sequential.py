"""A run's model and evaluation, opened again, and its documents read token after token: for audit, compress, generate.

What is read is unknown until it is chosen, so no prediction can depend on it. The steps between the tokens are those of
train_gpt.py's own evaluation: Sequential is a DocumentBatch that predicts what the evaluation is about to score.
"""

import contextlib
import hashlib
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F

import common

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt

NO_ADAPTATION, ADAPTED, MIXTURE, LAST_EPOCH = "no_adaptation", "backward_looking", "mixture", "last_epoch"
Choose = Callable[[int, np.ndarray], int]


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """train_gpt.py's errors of the user as this folder's."""
    try:
        yield
    except train_gpt.UserError as error:
        raise common.UserError(str(error)) from error


def require(left: common.Run, run: train_gpt.Run, name: str) -> None:
    """UserError where the path in a setting that the run had leads nowhere, or to what is no file."""
    path = getattr(run.s, name)
    for file in (Path(path), *Path(path).glob("fineweb_val_*.bin")):  # of a dataset what is scored
        common.require_file(file)
    if os.path.exists(path) or not left.result["settings"].get(name):
        return
    what = f"{name.upper()}={path}, as {left.path} has it,"
    if os.path.isabs(path):
        raise common.UserError(f"{what} is not there any more — put it back")
    where = "leads nowhere from here or from a folder above the run's"
    raise common.UserError(f"{what} {where} — put it back, or run this where the run was started")


def open_run(left: common.Run, device: str = "auto") -> tuple[train_gpt.GPT, train_gpt.Run]:
    """The model that a run scored, frozen, and its settings; UserError if the weights are not what they were."""
    known = train_gpt.Settings.__dataclass_fields__
    kept = {name: value for name, value in left.result["settings"].items() if name in known}
    kept["eval_only"] = kept.get("eval_only") or str(left.path.with_name("final_model.ptz"))
    paths = {"eval_only", "data_path", "tokenizer_path"} & kept.keys()
    kept |= {name: train_gpt.located(str(kept[name]), left.path) for name in paths}
    for name in paths:
        if not kept[name].isprintable():  # no setting may be so
            what = f"{ascii(kept[name])[1:-1]} has characters that cannot be printed"
            raise common.UserError(f"{what} — rename the file or the folder")
    kept |= {"output_dir": "", "resume": False, "compile": 0, "device": device}  # nothing is written
    texts = {name.upper(): str(int(value) if isinstance(value, bool) else value) for name, value in kept.items()}
    with user_errors():
        run = train_gpt.Run(train_gpt.Settings.from_env(texts))
        require(left, run, "eval_only")
        weights = train_gpt.read_weights(Path(run.s.eval_only), run)
        if weights.sha256 != left.result["weights_sha256"]:
            raise common.UserError(
                f"{run.s.eval_only} is another artifact than {left.path} scored — {common.UNTOUCHED}"
            )
        run = run.using(**weights.settings.of(train_gpt.ModelSettings))
        model = train_gpt.scoring_model(run)
        train_gpt.load_weights(model, weights.state, run.s.eval_only, run)
    return model, run


def open_stream(left: common.Run, run: train_gpt.Run) -> train_gpt.Stream:
    """The text that a run scored; UserError if it is not what it was."""
    require(left, run, "data_path")
    require(left, run, "tokenizer_path")
    with user_errors():
        stream = train_gpt.load_validation(run)
    if stream.fingerprint != left.result["data"]["validation"]:
        raise common.UserError(f"{left.path} scored another text than is in {run.s.data_path} — {common.UNTOUCHED}")
    return stream


def open_tokenizer(left: common.Run, run: train_gpt.Run) -> sentencepiece.SentencePieceProcessor:
    """The tokenizer of a run; UserError if it is not what it was."""
    require(left, run, "tokenizer_path")
    with user_errors():
        tokenizer = train_gpt.load_tokenizer(run.s.tokenizer_path, run.s.vocab_size)
    if hashlib.sha256(Path(run.s.tokenizer_path).read_bytes()).hexdigest() != left.result["data"]["tokenizer"]:
        raise common.UserError(f"{run.s.tokenizer_path} is another tokenizer than {left.path} had — {common.UNTOUCHED}")
    return tokenizer


def probabilities(nll: np.ndarray) -> np.ndarray:
    """Of the tokens, float64 (vocabulary,); UserError for what is no distribution."""
    found = np.exp(-nll.astype(np.float64))
    if not 0 < found.sum() < math.inf:
        what = "the model predicts no probabilities: their sum is 0, infinite or NaN"
        raise common.UserError(f"{what} — use a run whose score is finite")
    return found


class Enough(Exception):
    """No further token is to be chosen."""


class Sequential(train_gpt.DocumentBatch):
    """A document of `length` targets of which at first only the token before them, `lead`, is known.

    `choose(position, nll)` gets the NLL (vocabulary,) float32, or float64 of a mixture, of what may follow the tokens
    up to `position`, and returns the token that does. `figure` says which of the evaluation's predictions they are."""

    def __init__(self, model, run, length: int, choose: Choose, figure: str, lead: int = train_gpt.BOS):
        tokens = np.zeros(length + 1, np.int64)
        tokens[0] = lead
        place = np.array([0]), np.array([length])
        super().__init__(model, train_gpt.Stream(tokens, tokens[1:], run.device, place), 1, run)
        self.load(np.array([0]))
        self.choose, self.kind = choose, figure
        self.parts = [self]  # of a mixture, in the order of its weights; each reads the same text
        if figure == MIXTURE:
            others = [Sequential(model, run, length, choose, NO_ADAPTATION)]
            others += [Sequential(model, run, length, choose, ADAPTED) for _ in run.s.ttt_rates[1:]]
            self.parts = [others[0], self, *others[1:]]
            for other in others:
                other.stream = self.stream
        self.weights = np.full((len(self.parts), 1), 1 / len(self.parts))

    def read(self, document: int) -> np.ndarray:
        """Chooses all tokens, under the adapters of the document of that number, and returns them, `lead` included. It
        ends early if `choose` raises Enough."""
        with contextlib.suppress(Enough):
            if self.kind == NO_ADAPTATION:
                self.score()
            else:
                drawn = train_gpt.draw_lora_a(self.run.s, document)[None]
                for number, other in enumerate(self.parts[2:], 1):
                    other.adapters.begin(drawn)
                    other.peak_lr = self.run.s.ttt_rates[number]
                self.adapt(1, a=drawn)
        return self.stream.tokens.cpu().numpy()

    def read_on(self) -> None:
        """Chooses all tokens under the adapters as they are, or until `choose` raises Enough."""
        self.deadline = math.inf
        with contextlib.suppress(Enough):
            self._read_through(cached=True, train=False)

    def _set_lr(self, wave: float) -> None:
        super()._set_lr(wave)
        for other in self.parts[2:]:
            other._set_lr(wave)

    def _run_step(self, chunk: int, n: int, cached: bool, **asked) -> None:
        if asked.get("score"):  # what is to be scored is yet to be chosen
            self._choose_chunk(chunk * self.run.s.ttt_chunk_size, cached)
            if len(self.parts) > 1:
                self.parts[0]._run_step(chunk, n, cached=True, keep=True)
        super()._run_step(chunk, n, cached, **asked)
        for other in self.parts[2:] if asked.get("train") or asked.get("keep") else ():  # no score: it is known
            other._run_step(chunk, n, cached, **(asked | {"score": False}))

    @torch.no_grad()
    def _choose_chunk(self, first: int, cached: bool) -> None:
        end = min(first + self.run.s.ttt_chunk_size, int(self.lengths[0]))
        mixed = len(self.parts) > 1
        for number, part in enumerate(self.parts):
            part._begin(first, end, cached or (mixed and number == 0))
        for position in range(first, end):
            if mixed:
                predicted = np.exp(-np.stack([part._predict(position) for part in self.parts]).astype(np.float64))
                predicted = np.nan_to_num(predicted)  # as the evaluation has it: a part that diverged predicts nothing
                p, after = train_gpt.mix(self.weights, predicted, self.run.s.ttt_mixture_share)
                token = self.choose(position, -np.log(p))
                self.weights = after[:, token : token + 1]
            else:
                token = self.choose(position, self._predict(position))
            self.stream.tokens[position + 1] = token

    def _begin(self, first: int, end: int, cached: bool) -> None:
        """Prepares for the tokens of a chunk: adapters, and the keys and values that they attend to.

        A recomputed window begins at position 0 of `kv`, and all of it before the chunk is run at once."""
        self.loras = self.adapters.layers(1)[1] if self.kind != NO_ADAPTATION else None
        self.origin = 0 if cached else max(0, end - self.run.s.ttt_eval_seq_len)  # where RoPE counts from
        self.slot = self.window - min(first, self.window) if cached else 0  # of the context's first token
        self.shift = self.window - first if cached else -self.origin  # from a token's position to its slot
        if not cached and first > self.origin:
            self._forward(self.origin, first)

    def _forward(self, begin: int, end: int) -> torch.Tensor:
        """Logits (end - begin, vocabulary) after each of the tokens from `begin` to before `end`."""
        at = torch.arange(begin - train_gpt.GPT.LEAD, end, device=self.kv.device).clamp_min(0)
        past = train_gpt.Past(begin - self.origin, self.kv[..., self.slot : end + self.shift, :])
        return self.model(self.stream.tokens[at].long()[None], None, self.loras, past)[0]

    def _predict(self, position: int) -> np.ndarray:
        return -F.log_softmax(self._forward(position, position + 1)[0], dim=-1).cpu().numpy()
