"""Tests of data/compress.py: every file comes back, its size is the score's, and what cannot come back is refused."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import math
import os
import random
import struct
import tempfile
import tracemalloc
from pathlib import Path

import constriction
import numpy as np
import pytest
import sentencepiece
import zstandard

import runs
import scored
import train_gpt
from tools import call, common, is_one_line_error, text

compress, sequential = scored.tool("compress"), scored.tool("sequential")
ODD = {
    "nothing": b"",
    "letters": b"abc de fgh",
    "white space": b"  a\r\nb\n\n\tc  ",
    "not UTF-8": b"abc\xff\xfe de\x80",
    "U+2581": "a ▁b▁▁".encode(),
    "normalised": "ﬁ ｆｕｌｌ e\u0301 x\u00a0y \u2028".encode(),
    "half a surrogate pair": b"a\xed\xa0\x80b",
    "controls and pieces": b"\x00 <s> </s> <unk> <0x41> \xef\xbf\xbd",
    "random": random.Random(0).randbytes(300),
    "text with some of it": b"a bad cab fed a deaf cafe bee " * 9 + b"\xff\n" + "▁ 中😀".encode(),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scored.write_data(tmp_path_factory.mktemp("compress") / "data")


@pytest.fixture(scope="module")
def weights(data: Path) -> Path:
    return scored.write_weights(data.parent / "weights.pt")


@pytest.fixture(scope="module")
def mixed(data: Path, weights: Path) -> Path:
    return scored.evaluate(data.parent / "mixed", weights, data, **scored.THREE)


@pytest.fixture(scope="module")
def replayed(data: Path, weights: Path) -> Path:
    return scored.evaluate(data.parent / "replayed", weights, data)


@pytest.fixture(scope="module")
def made(mixed: Path) -> Path:
    """A file of mixed predictions, and what it was made of, beside it."""
    folder = mixed.parent
    (folder / "made.txt").write_bytes(b"abc\xff\n\nabd efg\n\n")
    found = call(compress, "compress", mixed, folder / "made.txt", folder / "made", "--delimiter", "\\n\\n")
    assert found.code == 0, found.err
    return folder / "made"


def tokenizers(folder: Path) -> list:
    train = dict(vocab_size=300, model_type="bpe", minloglevel=2, pad_id=0, bos_id=1, eos_id=2, unk_id=3)
    model = text.train_tokenizer([ODD["text with some of it"].decode(errors="ignore") * 9], 290)
    sentences = dict(input=str(runs.data() / "text"), model_prefix=str(folder / "other"))
    sentencepiece.SentencePieceTrainer.train(**train | sentences | dict(vocab_size=40, byte_fallback=False))
    paths = runs.data() / "tokenizer.model", folder / "other.model"
    return [
        sentencepiece.SentencePieceProcessor(model_proto=x) for x in (model, *(path.read_bytes() for path in paths))
    ]


def test_any_bytes_are_tokens_and_what_they_lack(tmp_path: Path) -> None:
    # One loses nothing; one puts a space in front, drops others and folds; one has few letters and no bytes.
    for tokenizer in tokenizers(tmp_path):
        for name, part in ODD.items():
            tokens, patches, inserted = compress.tokenize(part, tokenizer)
            assert compress.restored(tokens, patches, inserted, tokenizer) == part, name
            assert len(inserted) == sum(patches[2::3])
        tokens, _, inserted = compress.tokenize(ODD["text with some of it"], tokenizer)
        assert len(tokens) > 20 and len(inserted) < 40  # the text does not go beside its tokens for what is odd in it


def test_counts_are_what_the_coder_codes() -> None:
    nll = -np.log(np.random.default_rng(0).dirichlet(np.full(300, 0.05)) + 1e-300)
    counts = compress.quantised(nll)
    assert counts.sum() == 2**24 - 300 and counts.min() == 0 and (counts == counts.round()).all()
    for token in (int(counts.argmax()), int(np.argsort(counts)[-3]), int(counts.argmin())):
        coder = constriction.stream.queue.RangeEncoder()
        distribution = constriction.stream.model.Categorical(counts, perfect=False, lazy=True)
        coder.encode(np.full(4000, token, np.int32), distribution)
        bits = -math.log2((counts[token] + 1) / 2**24)
        assert coder.num_bits() == pytest.approx(4000 * bits, abs=64)
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(common.UserError, match="NaN"):
            compress.quantised(np.full(300, bad))


RECOMPUTED = dict(TTT_CONTEXT="recompute")
SHORT = dict(TTT_EVAL_SEQ_LEN=11)  # the document goes on beyond it, and no chunk begins where a window does


@pytest.mark.parametrize(
    ("figure", "settings"),
    [
        ("no_adaptation", {}),
        ("backward_looking", {}),
        ("backward_looking", RECOMPUTED),
        ("backward_looking", scored.MIXTURE),
        ("mixture", scored.MIXTURE),
        ("mixture", scored.MIXTURE | RECOMPUTED),
        ("backward_looking", SHORT),
        ("backward_looking", RECOMPUTED | SHORT),
        ("mixture", scored.MIXTURE | RECOMPUTED | SHORT),
        ("mixture", scored.THREE),
        ("mixture", scored.THREE | RECOMPUTED),
        ("mixture", scored.THREE | dict(TTT_PROTOCOL="replay")),
    ],
)
def test_one_token_at_a_time_predicts_what_the_evaluation_does(
    figure: str, settings: dict, data: Path, weights: Path
) -> None:
    files = dict(EVAL_ONLY=weights, DATA_PATH=data, TOKENIZER_PATH=data / "tokenizer.model")
    run = runs.alone(**scored.SETTINGS | files | settings)
    model = train_gpt.scoring_model(run)
    train_gpt.load_weights(model, train_gpt.read_weights(weights, run).state, "weights", run)
    stream = train_gpt.load_validation(run)
    expected = scored.target_nll(run, model, stream, 0, figure)
    tokens = stream.tokens.numpy()
    found = []

    def choose(position: int, nll: np.ndarray) -> int:
        found.append(nll[tokens[position + 1]])
        assert np.exp(-nll.astype(np.float64)).sum() == pytest.approx(1, abs=1e-5)
        return tokens[position + 1]

    read = sequential.Sequential(model, run, len(expected), choose, figure).read(0)
    assert (read == tokens[: len(expected) + 1]).all()
    assert np.array(found) == pytest.approx(expected, abs=1e-4)


def test_a_file_comes_back(made: Path, mixed: Path, tmp_path: Path) -> None:
    found = call(compress, "expand", mixed, made, tmp_path / "back")
    assert found.code == 0, found.err
    assert (tmp_path / "back").read_bytes() == made.with_suffix(".txt").read_bytes()
    assert "tokens/s" in found.out
    assert is_one_line_error(call(compress, "expand", mixed, made, tmp_path / "back"), "already")


def test_a_pipe_gets_the_data_alone(replayed: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "in").write_bytes(b"abc")
    for command, name in (("compress", "in"), ("expand", "file")):
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        options = ["--delimiter", "|"] if command == "compress" else []
        found = call(compress, command, replayed, tmp_path / name, pipe, *options)
        data = os.read(reader, 1 << 16)
        os.close(reader)
        assert found.code == 0 and not found.out and "tokens/s" in found.err
        (tmp_path / "file").write_bytes(data)
    assert data == b"abc"


def test_standard_output_may_be_a_file(replayed: Path, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"abc")
    assert call(compress, "compress", replayed, tmp_path / "in", tmp_path / "file").code == 0
    kept = os.dup(1)
    try:
        with (tmp_path / "out").open("wb") as file:
            os.dup2(file.fileno(), 1)
        os.write(1, b"before ")
        found = call(compress, "expand", replayed, tmp_path / "file", "/dev/stdout")
    finally:
        os.dup2(kept, 1)
        os.close(kept)
    assert found.code == 0 and not found.out and "wrote /dev/stdout" in found.err
    assert (tmp_path / "out").read_bytes() == b"before abc"


def test_a_folder_that_cannot_be_written_is_found_first(
    made: Path, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: object, dir: Path, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(dir / "tmp123"))

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    monkeypatch.setattr(sequential, "open_run", None)  # no work is begun
    for command in ("compress", "expand"):
        found = call(compress, command, mixed, made, tmp_path / "out")
        assert is_one_line_error(found, f"error: {tmp_path / 'out'}: Read-only file system")


@pytest.mark.parametrize("links", [True, False])
def test_a_file_made_meanwhile_is_left_alone(
    links: bool, made: Path, replayed: Path, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").write_bytes(b"abc")
    open_run = sequential.open_run

    def other_run_finishes_first(*arguments: object) -> tuple:
        (tmp_path / "out").write_bytes(b"other")
        return open_run(*arguments)

    def no_links(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
        assert call(compress, "expand", mixed, made, tmp_path / "alone").code == 0
    monkeypatch.setattr(sequential, "open_run", other_run_finishes_first)
    for command, folder, path in (("compress", replayed, tmp_path / "in"), ("expand", mixed, made)):
        assert is_one_line_error(call(compress, command, folder, path, tmp_path / "out"), "made meanwhile", "delete it")
        assert (tmp_path / "out").read_bytes() == b"other" and not list(tmp_path.glob("*.tmp-*"))
        (tmp_path / "out").unlink()


@pytest.mark.parametrize("part", ["nothing", "not UTF-8", "random"])
def test_odd_files_come_back(part: str, replayed: Path, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(ODD[part])
    assert call(compress, "compress", replayed, tmp_path / "in", tmp_path / "file").code == 0
    assert call(compress, "expand", replayed, tmp_path / "file", tmp_path / "out").code == 0
    assert (tmp_path / "out").read_bytes() == ODD[part]


def test_sizes_are_what_the_score_says(mixed: Path, replayed: Path) -> None:
    for folder, figure, arrays in (
        (mixed, None, "nll_mixture"),
        (replayed, None, "nll_per_epoch"),
        (mixed, "no_adaptation", "nll_no_adaptation"),
    ):
        found = call(compress, "check", folder, "--documents", 1, *(["--figure", figure] if figure else []))
        assert found.code == 0, found.err
        row = dict(word.split(":") for word in found.out.splitlines()[0].split() if ":" in word)
        with np.load(folder / "ttt_documents.npz") as kept:
            nll = np.atleast_2d(kept[arrays])[0, int(row["document"])]
        assert float(row["score"]) == pytest.approx(nll / math.log(2) / 8, abs=0.06)
        assert abs(int(row["size"]) - nll / math.log(2) / 8) <= 16 + 0.005 * nll


def test_a_size_unlike_the_score_fails(mixed: Path, tmp_path: Path) -> None:
    for path in mixed.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    result = json.loads((mixed / "result.json").read_text())
    for figure in (result, result["evaluation"]["mixture"]):
        figure |= {name: 10 * figure[name] for name in ("val_loss", "val_bpb")}
    with np.load(mixed / "ttt_documents.npz") as kept:
        arrays = dict(kept)
    arrays["nll_mixture"] = arrays["nll_mixture"] * 10
    np.savez(tmp_path / "ttt_documents.npz", **arrays)
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert call(compress, "check", tmp_path, "--documents", 1).code == 1


def test_checks_find_the_first_difference(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other machine's model differs by a millionth, or only from the second document on."""
    monkeypatch.setattr(compress, "CHECKED_TOKENS", 2)
    codec = compress.Codec.open(common.read_run(mixed), "no_adaptation")
    tokens = runs.documents([30], 3)[1:]
    documents = [compress.Document(i, 29, tokens) for i in range(2)]
    words = codec.encode(documents)
    unknown = [dataclasses.replace(document, tokens=None) for document in documents]
    assert all((found == tokens).all() for found in codec.decode(unknown, words))
    decoding = codec.decode(unknown, words)
    assert (next(decoding) == tokens).all()
    with train_gpt.torch.no_grad():
        codec.model.tok_emb.weight.mul_(1 + 1e-6)
    with pytest.raises(common.UserError, match="of document 1"):
        next(decoding)
    with pytest.raises(common.UserError, match="behind token 8 of document 0"):  # of its first chunk, which has 4 bits
        next(codec.decode(unknown, words))


def test_checks_cost_a_bit_for_so_many_tokens_however_long_the_text(
    mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = compress.Codec.open(common.read_run(mixed), "no_adaptation")
    document = compress.Document(0, 200, runs.documents([201], 3)[1:])
    sizes = {}
    for tokens in (2, 1 << 30):
        monkeypatch.setattr(compress, "CHECKED_TOKENS", tokens)
        sizes[tokens] = 32 * len(codec.encode([document]))
    assert abs(sizes[2] - sizes[1 << 30] - 200 / 2) <= 64  # the coder's words have 32 bits


def test_a_machine_that_computes_otherwise_writes_nothing(
    made: Path, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict = sequential.Sequential._predict
    monkeypatch.setattr(sequential.Sequential, "_predict", lambda *args: predict(*args) * np.float32(1 + 1e-6))
    found = call(compress, "expand", mixed, made, tmp_path / "back")
    assert is_one_line_error(found, str(made), "computes other probabilities")
    assert not (tmp_path / "back").exists()


def test_bits_that_no_symbol_has_are_another_machines(mixed: Path) -> None:
    codec = compress.Codec.open(common.read_run(mixed), "no_adaptation")
    words = np.full(4, 2**32 - 1, np.uint32)
    with pytest.raises(common.UserError, match="computes other probabilities"):
        next(codec.decode([compress.Document(0, 29)], words))


def test_what_stands_beside_the_tokens_is_no_head(replayed: Path, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(ODD["random"])
    found = call(compress, "compress", replayed, tmp_path / "in", tmp_path / "file")
    _, inserted, words = compress.unpack(tmp_path / "file")
    rate = float(found.out.partition(" bits per byte, ")[2].split()[0])
    assert rate * 300 / 8 == pytest.approx(300 + 13 + words.nbytes, abs=5)  # 13 of the frame
    assert inserted == ODD["random"]


def test_delimiters_are_text_py_s_and_one_that_is_not_there_is_said(replayed: Path, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"abc\r\nde")
    found = call(compress, "compress", replayed, tmp_path / "in", tmp_path / "cut", "--delimiter", r"\r\n")
    assert found.code == 0 and "--delimiter" not in found.out
    assert len(compress.unpack(tmp_path / "cut")[0]["lengths"]) == 2
    found = call(compress, "compress", replayed, tmp_path / "in", tmp_path / "whole", "--delimiter", r"\t")
    assert found.code == 0 and r"--delimiter '\t' is not in" in found.out


def test_other_runs_and_damaged_files_are_refused(
    made: Path, mixed: Path, replayed: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(folder: Path, path: Path, word: str) -> bool:
        found = call(compress, "expand", folder, path, tmp_path / "back")
        return is_one_line_error(found, word) and not (tmp_path / "back").exists()

    assert refused(replayed, made, "ttt_protocol")
    other = scored.write_weights(tmp_path / "other.pt", seed=1)
    assert refused(scored.evaluate(tmp_path / "other", other, data, **scored.THREE), made, "artifact")
    blob = made.read_bytes()
    damaged = tmp_path / "damaged"
    for place in (0, 9, 15, 30, len(blob) // 2, len(blob) - 1):
        damaged.write_bytes(blob[:place] + bytes([blob[place] ^ 1]) + blob[place + 1 :])
        assert refused(mixed, damaged, "damaged"), place
    for size in (0, 5, 20, len(blob) - 1):
        damaged.write_bytes(blob[:size])
        assert refused(mixed, damaged, "damaged"), size
    monkeypatch.setattr(np, "__version__", "1.0")
    assert refused(mixed, made, "numpy")


def forge(path: Path, made: Path, damage: str) -> Path:
    """A file with a right hash whose content is none of compress.py's."""
    head, inserted, words = compress.unpack(made)
    squeeze = zstandard.ZstdCompressor().compress
    changes = {
        "lengths": ([-1], ["a"], [10**9], [True], 3, [], [1], None),
        "patches": ([[1]] * 3, [[0, 0, 10**6]] * 3, [[-1, 0, 1], [], []], [0, 0, 0], None),
        "delimiter": (5, "\ud800"),
        "settings": ([],),
        "figure": ("last_epoch", {}),
    }
    name, _, which = damage.partition(" ")
    if name in changes:
        head[name] = changes[name][int(which)]
    frames = [squeeze(json.dumps(head).encode()), squeeze(inserted)]
    heads = {"no JSON": b"{", "a list": b"[]", "deep": b"[" * 10**5, "UTF-8": b'"\xff"', "bomb": bytes(1 << 28)}
    frames[0] = squeeze(heads[damage]) if damage in heads else b"abc" * 9 if damage == "no zstd" else frames[0]
    frames[1] = squeeze(bytes(1 << 28)) if damage == "second bomb" else frames[1]
    sizes = [len(frames[0]), 2**32 - 1 if damage == "too long" else len(frames[1])]
    body = struct.pack("<II", *sizes) + b"".join(frames) + words.tobytes() + bytes(damage == "half a word")
    path.write_bytes(compress.MAGIC + struct.pack("<I", 1) + hashlib.sha256(body).digest()[:16] + body)
    return path


FORGED = ["no JSON", "a list", "deep", "UTF-8", "bomb", "second bomb", "no zstd", "too long", "half a word"]
FORGED += [*(f"lengths {i}" for i in range(8)), *(f"patches {i}" for i in range(5))]
FORGED += ["delimiter 0", "delimiter 1", "settings 0", "figure 0", "figure 1"]


def test_a_right_hash_proves_nothing(made: Path, mixed: Path, tmp_path: Path) -> None:
    assert call(compress, "expand", mixed, forge(tmp_path / "whole", made, "nothing"), tmp_path / "back").code == 0
    for damage in FORGED:
        path = forge(tmp_path / "forged", made, damage)
        tracemalloc.start()
        found = call(compress, "expand", mixed, path, tmp_path / "out")
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert is_one_line_error(found, str(path), "is damaged or no file of compress.py"), (damage, found)
        assert most < 100 << 20 and not (tmp_path / "out").exists(), damage


def test_what_is_very_regular_comes_back() -> None:
    for content in (b"", b"\xff" * (20 << 20)):
        assert compress.stretch(compress.squeeze(content)) == content


def test_the_last_epoch_has_no_file_and_the_tool_says_why(replayed: Path, mixed: Path, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"abc")
    found = call(compress, "compress", replayed, tmp_path / "in", tmp_path / "out", "--figure", "last_epoch")
    assert is_one_line_error(found, "trained on the text that it predicts", "backward_looking")
    found = call(compress, "compress", replayed, tmp_path / "in", tmp_path / "out", "--figure", "mixture")
    assert is_one_line_error(found, "has no mixture")
