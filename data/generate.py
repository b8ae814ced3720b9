"""Text from a run's artifact: `python data/generate.py RUN --prompt TEXT` prints the prompt and how it goes on.

Each token is drawn from the model's prediction; at --temperature 0 it is the likeliest. --adapt adapts to the prompt
first, as replay does to a document; --prompt - reads it from standard input.
"""

import common

# isort: split
import argparse
import sys

import numpy as np
import torch

import sequential
from sequential import train_gpt


def sample(nll: np.ndarray, temperature: float, top_k: int, rng: np.random.Generator) -> int:
    """A token drawn from probabilities ∝ exp(-nll / temperature), among the `top_k` likeliest unless that is 0.
    UserError for what is no distribution."""
    sequential.probabilities(nll)
    order = np.argsort(nll, kind="stable")[: top_k or None]
    if temperature < 1e-6:  # float64 could not hold the difference to the likeliest
        return int(order[0])
    scaled = -nll[order].astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    return int(rng.choice(order, p=weights / weights.sum()))


def adapted(model, run, prompt: list[int]) -> torch.Tensor:
    """The adapters (1, n) float32 after TTT_N_EPOCHS epochs over the prompt, BOS included, as replay has them."""
    run = run.using(ttt_protocol="replay")
    place = np.array([0]), np.array([len(prompt) - 1])
    tokens = np.array(prompt)
    batch = train_gpt.DocumentBatch(model, train_gpt.Stream(tokens, tokens[1:] * 0, run.device, place), 1, run)
    batch.load(np.array([0]))
    batch.adapt(run.s.ttt_n_epochs)
    return batch.adapters.flat


def generate(model, run, prompt: list[int], options: argparse.Namespace) -> list[int]:
    """Up to `options.tokens` tokens after the prompt, BOS included; fewer if the text ends with another BOS."""
    rng = np.random.default_rng(options.seed)
    drawn: list[int] = []

    def choose(position: int, nll: np.ndarray) -> int:
        if position + 1 < len(prompt):
            return prompt[position + 1]
        token = sample(nll, options.temperature, options.top_k, rng)
        if token == train_gpt.BOS:
            raise sequential.Enough
        drawn.append(token)
        return token

    figure = sequential.ADAPTED if options.adapt else sequential.NO_ADAPTATION
    reader = sequential.Sequential(model, run, len(prompt) - 1 + options.tokens, choose, figure)
    if options.adapt and len(prompt) > 1:
        reader.adapters.flat.copy_(adapted(model, run, prompt))
    reader.read_on()
    return drawn


def main(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", type=common.place, metavar="RUN", help="a run's folder: its artifact, settings and tokenizer")
    add("--prompt", default="", metavar="TEXT", help="how the text begins; -: standard input (default: nothing)")
    add(
        "--tokens",
        type=common.number(int, 1, 10**9),
        default=200,
        metavar="N",
        help="tokens to draw at most (default: 200)",
    )
    add("--temperature", type=temperature, default=0.8, metavar="T", help="0: the likeliest token (default: 0.8)")
    add("--top-k", type=common.number(int, 0), default=0, metavar="K", help="draw among the K likeliest (default: all)")
    add("--seed", type=common.number(int, 0), default=0, metavar="S", help="of the draws (default: 0)")
    add("--adapt", action="store_true", help="adapt to the prompt first")
    options = parser.parse_args()
    left = common.read_run(options.run)
    torch.set_num_threads(1)
    model, run = sequential.open_run(left, "cpu")
    tokenizer = sequential.open_tokenizer(left, run)
    text = standard_input() if options.prompt == "-" else options.prompt
    prompt = tokenizer.encode(text.encode("utf-8", "replace").decode())
    drawn = generate(model, run, [train_gpt.BOS, *prompt], options)
    begun = tokenizer.decode(prompt)
    common.deliver(text + tokenizer.decode(prompt + drawn).removeprefix(begun))


def standard_input() -> str:
    """All of it, line ends as they are, U+FFFD for each byte that is not UTF-8; UserError if it is closed."""
    if sys.stdin is None:
        raise common.UserError("standard input is closed — give the prompt itself, --prompt TEXT")
    return sys.stdin.buffer.read().decode(errors="replace")


def temperature(text: str) -> float:
    """An argparse type: a float from 0 to 100."""
    value = float(text)  # argparse says "invalid temperature value" for what is none
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 100")
    return value


if __name__ == "__main__":
    common.run_tool(main)
