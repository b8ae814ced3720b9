"""Tests of data/generate.py: the likeliest continuation is the model's own, and draws are of its probabilities."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import scored
import train_gpt
from tools import call, common, is_one_line_error

generate, sequential = scored.tool("generate"), scored.tool("sequential")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("generate")
    data = scored.write_data(base / "data")
    return scored.evaluate(base / "run", scored.write_weights(base / "weights.pt"), data)


def test_the_likeliest_tokens_are_those_of_whole_forward_passes(folder: Path) -> None:
    left = common.read_run(folder)
    model, run = sequential.open_run(left, "cpu")
    tokenizer = sequential.open_tokenizer(left, run)
    prompt = tokenizer.encode("abc de")
    tokens = [train_gpt.BOS, *prompt]
    for _ in range(10):  # fewer than the context holds
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    assert train_gpt.BOS not in tokens[1:]
    found = call(generate, folder, "--prompt", "abc de", "--tokens", 10, "--temperature", 0)
    assert found.code == 0, found.err
    assert found.out == "abc de" + tokenizer.decode(tokens[1:])[len(tokenizer.decode(prompt)) :] + "\n"


def test_draws_repeat_by_their_seed_and_adapting_changes_them(folder: Path) -> None:
    def text(*options: object) -> str:
        found = call(generate, folder, "--prompt", "ab cd ef", "--tokens", 8, *options)
        assert found.code == 0 and found.out.startswith("ab cd ef"), found.err
        return found.out

    assert text("--seed", 3) == text("--seed", 3)
    assert len({text("--seed", 3), text("--seed", 4), text("--seed", 3, "--adapt")}) == 3
    assert text("--top-k", 1, "--seed", 5) == text("--temperature", 0)


def test_adapting_to_a_prompt_is_replay_whatever_the_protocol_of_the_run(folder: Path) -> None:
    """The adapters after the epochs of an evaluation of the prompt as a document."""
    model, run = sequential.open_run(common.read_run(folder), "cpu")
    prompt = [train_gpt.BOS, *range(40, 90)]
    tokens = np.array(prompt)
    stream = train_gpt.Stream(tokens, tokens[1:] * 0, run.device, (np.array([0]), np.array([len(prompt) - 1])))
    batch = train_gpt.DocumentBatch(model, stream, 1, run.using(ttt_protocol="replay"))
    batch.load(np.array([0]))
    batch.adapt(run.s.ttt_n_epochs)
    assert batch.adapters.flat[:1].any()
    for protocol in ("replay", "single_pass"):
        found = generate.adapted(model, run.using(ttt_protocol=protocol), prompt)
        assert torch.equal(found[:1], batch.adapters.flat[:1]), protocol


def test_draws_follow_temperature_and_top_k() -> None:
    nll = -np.log(np.array([0.1, 0.4, 0.2, 0.3]))
    rng = np.random.default_rng(0)
    shares = np.bincount([generate.sample(nll, 1.0, 0, rng) for _ in range(4000)], minlength=4) / 4000
    assert shares == pytest.approx([0.1, 0.4, 0.2, 0.3], abs=0.03)
    shares = np.bincount([generate.sample(nll, 0.5, 2, rng) for _ in range(4000)], minlength=4) / 4000
    assert shares == pytest.approx([0, 0.64, 0, 0.36], abs=0.03)  # 0.4 and 0.3, squared
    assert generate.sample(nll, 0, 0, rng) == 1


def test_predictions_that_are_none_are_one_line() -> None:
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(common.UserError, match="no probabilities"):
            generate.sample(np.full(4, bad), 1.0, 0, np.random.default_rng(0))


def with_settings(folder: Path, source: Path, **settings: str) -> Path:
    """A copy of a run whose result has other settings."""
    shutil.copytree(source, folder)
    result = json.loads((folder / "result.json").read_text())
    result["settings"] |= settings
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def test_a_folder_of_any_name_is_opened_unless_a_setting_would_have_to_name_it(folder: Path, tmp_path: Path) -> None:
    """As one that was renamed: the artifact's path is the folder's, where settings name none."""
    named = with_settings(tmp_path / "two\nlines", folder)
    assert call(generate, named, "--tokens", 1).code == 0
    nameless = with_settings(tmp_path / "three\nlines", folder, eval_only="")
    found = call(generate, nameless, "--tokens", 1)
    assert is_one_line_error(found, "three\\nlines", "cannot be printed", "rename") and "OUTPUT_DIR" not in found.err


def test_pipes_in_the_places_of_files_are_refused(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    os.mkfifo(data / "fineweb_val_000000.bin")
    os.mkfifo(tmp_path / "pipe.model")
    other = with_settings(tmp_path / "a", folder, tokenizer_path=str(tmp_path / "pipe.model"))
    assert is_one_line_error(call(generate, other), "pipe.model is a pipe")
    other = with_settings(tmp_path / "b", folder, data_path=str(data))
    found = call(scored.tool("compress"), "check", other)
    assert is_one_line_error(found, "fineweb_val_000000.bin is a pipe")


def test_a_text_ends_with_the_next_ones_bos(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter([7, 8, train_gpt.BOS])
    monkeypatch.setattr(generate, "sample", lambda *_: next(drawn))
    model, run = sequential.open_run(common.read_run(folder), "cpu")
    options = type("Options", (), dict(seed=0, temperature=1.0, top_k=0, tokens=50, adapt=False))
    assert generate.generate(model, run, [train_gpt.BOS], options) == [7, 8]


def test_a_prompt_from_standard_input_may_be_any_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff\r\ncd"), "utf-8"))
    found = call(generate, folder, "--prompt", "-", "--tokens", 1)
    assert found.code == 0 and found.out.startswith("ab\ufffd\r\ncd"), found.err
    monkeypatch.setattr("sys.stdin", None)
    assert is_one_line_error(call(generate, folder, "--prompt", "-"), "standard input is closed", "--prompt TEXT")


def test_a_run_whose_paths_are_relative_is_opened_from_anywhere(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder.parent, tmp_path / "project")
    (tmp_path / "project" / "data" / "tokenizer.model").rename(tmp_path / "project" / "tokenizer.model")
    path = tmp_path / "project" / "run" / "result.json"
    result = json.loads(path.read_text())
    result["settings"] |= dict(eval_only="weights.pt", data_path="data", tokenizer_path="tokenizer.model")
    path.write_text(json.dumps(result))
    monkeypatch.chdir(tmp_path)
    assert call(generate, "project/run", "--tokens", 1).code == 0
    check = scored.tool("compress"), "check", path.parent, "--documents", 1
    assert call(*check).code == 0
    for setting, name in dict(TOKENIZER_PATH="tokenizer.model", DATA_PATH="data", EVAL_ONLY="weights.pt").items():
        (tmp_path / "project" / name).rename(tmp_path / "away")
        assert is_one_line_error(call(*check), f"{setting}={name}", str(path), "where the run was started")
        (tmp_path / "away").rename(tmp_path / "project" / name)
    result["settings"]["tokenizer_path"] = str(tmp_path / "gone.model")
    path.write_text(json.dumps(result))
    assert is_one_line_error(call(generate, path.parent), "gone.model", str(path), "put it back")


def test_mistakes_are_one_line(folder: Path, tmp_path: Path) -> None:
    assert is_one_line_error(call(generate, tmp_path, "--prompt", "a"), "result.json")
    assert is_one_line_error(call(generate, folder, "--tokens", 0), "--tokens")
    for temperature in (-1, 100.5, "nan"):
        found = call(generate, folder, "--temperature", temperature)
        assert is_one_line_error(found, "--temperature", f"{temperature} is not from 0 to 100")
    assert call(generate, folder, "--tokens", 1, "--temperature", 100).code == 0
