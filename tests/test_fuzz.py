"""Damaged and hostile files: artifacts, shards, tokenizers. Each ends in a one-line UserError or is whole."""

from __future__ import annotations

import collections
import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard

import runs
from conftest import batch_of
from runs import train_gpt

UserError = train_gpt.UserError
ARTIFACTS, SHARDS = 10_000, 2_000


@pytest.fixture(scope="module")
def artifact() -> bytes:
    """A small artifact with tensors of every kind but fp32."""
    run = runs.alone(
        NUM_HEADS=1, BIGRAM_VOCAB_SIZE=1100, VOCAB_SIZE=520, MLP_MULT=33, FP16_KEEP_NAME_PATTERNS="1.mlp.p"
    )
    s = run.s
    torch.manual_seed(0)
    state = {name: torch.randn_like(weight).round() for name, weight in train_gpt.GPT(s).state_dict().items()}
    blob, report = train_gpt.pack(train_gpt.quantize_model(state, s), s)
    assert report.keys() == {"int5", "int6", "int8", "scale", "fp16"}
    return blob


class Parts:
    """An artifact's expanded content in two parts: configuration and streams."""

    def __init__(self, blob: bytes):
        with zstandard.ZstdDecompressor().stream_reader(blob[60:], read_across_frames=True) as reader:
            self.raw = reader.read()
        start = 4 + int.from_bytes(self.raw[:4], "little")
        self.text, self.streams = self.raw[4:start], self.raw[start:]
        self.config = json.loads(self.text)

    def with_text(self, text: bytes, streams: bytes | None = None) -> bytes:
        return runs.sign(len(text).to_bytes(4, "little") + text + (self.streams if streams is None else streams))

    def with_config(self, change) -> bytes:
        config = dict(self.config)
        replacement = change(config)
        return self.with_text(json.dumps(config if replacement is None else replacement).encode())


@pytest.fixture(scope="module")
def parts(artifact) -> Parts:
    return Parts(artifact)


def refusal(blob: bytes) -> str:
    """The text of the UserError that `blob` must raise."""
    with pytest.raises(UserError) as caught:
        train_gpt.unpack(blob)
    text = str(caught.value)
    assert " — " in text and len(text.splitlines()) == 1, text
    return text


# ---- Artifacts


def test_the_unharmed_artifact_is_read_also_when_signed_again(artifact, parts):
    first, second = (train_gpt.unpack(blob) for blob in (artifact, runs.sign(parts.raw)))
    assert first[0] == second[0] and all(torch.equal(first[1][name], weight) for name, weight in second[1].items())


def test_an_artifact_cut_short_at_any_length_is_refused(artifact):
    for length in range(len(artifact)):
        refusal(artifact[:length])


def test_a_flipped_bit_in_any_byte_is_refused(artifact):
    for i in range(len(artifact)):
        refusal(artifact[:i] + bytes([artifact[i] ^ 1 << i % 8]) + artifact[i + 1 :])


def test_trailing_bytes_wrong_magic_and_wrong_version_are_refused(artifact):
    refusal(artifact + b"\0")
    refusal(b"PK\3\4" + artifact[4:])
    for version in (0, 1, 3, 2**32 - 1):  # 1 was another layout
        assert "format 2" in refusal(artifact[:8] + version.to_bytes(4, "little") + artifact[12:])


def config(name: str, value):
    return lambda config: config.__setitem__(name, value)


LIES = {
    "nothing": lambda config: config.clear(),
    "a configuration without a field": lambda config: config.pop("num_layers"),
    "a configuration without patterns": lambda config: config.pop("fp16_keep_name_patterns"),
    "a configuration with a field more": config("seed", 1),
    "a configuration with a foreign field": config("__class__", "os"),
    "a configuration that is a list of the names": list,
    "a configuration that is a list of pairs": lambda config: [list(item) for item in config.items()],
    "a configuration that is text": lambda config: "num_layers",
    "a configuration that is a number": lambda config: 5,
    "a configuration that is null": lambda config: json.dumps(None) and [],
    "a layer more": lambda config: config.__setitem__("num_layers", config["num_layers"] + 1),
    "a layer less": lambda config: config.__setitem__("num_layers", config["num_layers"] - 1),
    "a wider model": config("model_dim", 18),
    "a narrower model": config("model_dim", 8),
    "another vocabulary": config("vocab_size", 521),
    "a table of two rows": config("bigram_vocab_size", 2),
    "a hidden width more": config("mlp_mult", 33.0625),
    "untied": config("tie_embeddings", False),
    "a billion layers": config("num_layers", 10**9),
    "256 layers": config("num_layers", 256),
    "a billion columns": config("model_dim", 10**9),
    "10**400 columns": config("model_dim", 10**400),
    "no columns": config("model_dim", 0),
    "a negative width": config("bigram_dim", -8),
    "no heads": config("num_heads", 0),
    "heads that do not divide": config("num_heads", 3),
    "key heads that do not divide": config("num_kv_heads", 2),
    "an odd head": lambda config: config.update(num_heads=16, num_kv_heads=16),
    "layers as text": config("num_layers", "2"),
    "layers as a float": config("num_layers", 2.0),
    "layers as a truth": config("num_layers", True),
    "layers as a list": config("num_layers", [2]),
    "layers as null": config("num_layers", None),
    "tied as a number": config("tie_embeddings", 1),
    "tied as text": config("tie_embeddings", "1"),
    "an infinite RoPE base": config("rope_base", float("inf")),
    "a RoPE base below 1": config("rope_base", 0.5),
    "a soft cap of NaN": config("logit_softcap", float("nan")),
    "a soft cap of zero": config("logit_softcap", 0.0),
    "a hidden width of -1": config("mlp_mult", -1.0),
    "a huge hidden width": config("mlp_mult", 1e300),
    "the largest that is allowed": lambda config: config.update(
        vocab_size=65536, num_layers=256, model_dim=16384, mlp_mult=64.0, bigram_vocab_size=1 << 24, bigram_dim=16384
    ),
    "patterns that are no text": config("fp16_keep_name_patterns", ["1.mlp.p"]),
    "patterns that keep all": config("fp16_keep_name_patterns", "."),
    "patterns that keep nothing": config("fp16_keep_name_patterns", ""),
    "patterns with a line's end": config("fp16_keep_name_patterns", "1.mlp.p\n,x"),
    "patterns with a terminal's command": config("fp16_keep_name_patterns", "1.mlp.p,\x1b[2J"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_configuration_that_lies_is_refused_though_its_hash_is_right(parts, lie):
    refusal(parts.with_config(LIES[lie]))


@pytest.mark.parametrize("name", list(runs.alone().s.of(train_gpt.ModelSettings)))
def test_every_field_of_the_configuration_is_checked(parts, name):
    """Against its type, its range and 5,000 digits."""
    for value in (None, [], {}, "", "x", -1, -1.0, 0.0, 10**30, float("nan"), float("inf"), float("-inf")):
        refusal(parts.with_config(config(name, value)))
    shown = json.dumps({name: parts.config[name]})[1:-1].encode()
    assert parts.text.count(shown) == 1
    refusal(parts.with_text(parts.text.replace(shown, f'"{name}": '.encode() + b"9" * 5000)))


TEXTS = {
    "empty": b"", "not JSON": b"{", "NaN": b"NaN", "null": b"null", "invalid UTF-8": b'{"model_dim": "\xff\xfe"}',
    "null bytes": bytes(64), "nested": b"[" * 200_000, "closed and nested": b"[" * 900 + b"]" * 900,
    "nested objects": b'{"a":' * 200_000, "a pickle": b"\x80\x04K\x01.", "another encoding": "{}".encode("utf-16"),
}  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_configuration_that_is_none_is_refused(parts, text):
    refusal(parts.with_text(TEXTS[text]))


def test_a_repeated_field_cannot_smuggle_a_second_configuration(parts):
    """Of a name that comes twice JSON takes the last: the streams must be those of that one."""
    refusal(parts.with_text(parts.text[:-1] + b', "num_layers": 3}'))
    assert train_gpt.unpack(parts.with_text(b'{"num_layers": 3, ' + parts.text[1:]))[0].num_layers == 2


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**32 - 1])
def test_a_wrong_length_of_the_configuration_is_refused(parts, length):
    refusal(runs.sign(length.to_bytes(4, "little") + parts.raw[4:]))


def test_a_length_of_the_configuration_that_is_off_by_one_is_refused(parts):
    for change in (-1, 1):
        refusal(runs.sign((len(parts.text) + change).to_bytes(4, "little") + parts.raw[4:]))


@pytest.mark.parametrize("raw", [b"", b"\0", bytes(4), b"\2\0\0\0{}", b"\2\0\0\0[]"])
def test_an_artifact_with_hardly_anything_in_it_is_refused(raw):
    refusal(runs.sign(raw))


def test_streams_that_are_too_long_or_too_short_are_refused(parts):
    for streams in (parts.streams + b"\0", parts.streams[:-1], b"", parts.streams * 2):
        refusal(parts.with_text(parts.text, streams))


def test_a_weight_that_is_not_finite_is_refused(parts):
    # the high bytes of fp16 values lie together, last of all: 0x7E.. is NaN, 0x7C.. may be infinite
    for at, byte in ((-1, 0x7E), (-1, 0xFE), (-9, 0x7F), (-(10**3), 0xFF)):
        streams = bytearray(parts.streams)
        streams[at] = byte
        assert "not finite" in refusal(parts.with_text(parts.text, bytes(streams)))


def test_a_scale_that_is_not_finite_is_refused(artifact, parts):
    shapes = {name: weight.shape for name, weight in train_gpt.unpack(artifact)[1].items()}
    kinds = {name: train_gpt.kind_of(name, shape.numel(), "1.mlp.p") for name, shape in shapes.items()}
    rows = sum(shape[0] for name, shape in shapes.items() if kinds[name].startswith("int"))
    halves = sum(shape.numel() for name, shape in shapes.items() if kinds[name] == "fp16")
    end = len(parts.streams) - 2 * halves  # of the scales' high bytes
    for at in (end - 1, end - rows):
        streams = bytearray(parts.streams)
        streams[at] = 0x7E
        assert "not finite" in refusal(parts.with_text(parts.text, bytes(streams)))


def test_a_frame_that_is_no_zstd_or_lies_about_its_size_is_refused(parts):
    refusal(runs.sign(parts.raw, frame=b"not zstd at all"))
    refusal(runs.sign(parts.raw, expanded=len(parts.raw) - 1))
    refusal(runs.sign(parts.raw, expanded=len(parts.raw) + 1))
    refusal(runs.sign(parts.raw, expanded=2**63))
    refusal(runs.sign(parts.raw, frame=zstandard.ZstdCompressor(1).compress(parts.raw)[:-9]))


BOMBS = """
import resource, sys
sys.path[:0] = {path!r}
import runs, zstandard
from runs import train_gpt

def frame(*pieces):
    squeeze = zstandard.ZstdCompressor(1).compressobj()
    return b"".join(squeeze.compress(piece) for piece in pieces) + squeeze.flush()

def attempt(name, claim, frame):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # the peak so far: the greediest must come first
    try:
        train_gpt.unpack(runs.sign(b"", frame=frame, expanded=claim))
    except train_gpt.UserError:
        print(name, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10, flush=True)

objects = [b'{{"":0}},' * (1 << 20)] * 8
length = 3 + sum(map(len, objects))
attempt("configuration", length + 4, frame(length.to_bytes(4, "little"), b"[", *objects, b"0]"))
zeros = frame(*[bytes(1 << 20)] * 2048)
attempt("claims little", 1000, zeros)
attempt("honest", 2048 << 20, zeros)
attempt("claims the most", 1 << 29, zeros)
"""


def cap_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))


@pytest.fixture(scope="module")
def bombs() -> dict[str, int]:
    """Megabytes by which memory grew until each artifact was refused, in a process that is given 6 GiB."""
    code = BOMBS.format(path=[str(runs.ROOT), str(runs.ROOT / "tests")])
    env = dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=90, preexec_fn=cap_memory, env=env
    )
    print(done.stdout, done.stderr[-2000:])
    return {line.rpartition(" ")[0]: int(line.split()[-1]) for line in done.stdout.splitlines()}


@pytest.mark.parametrize("claim", ["honest", "claims little", "claims the most"])
def test_a_frame_that_expands_to_gigabytes_is_refused_in_bounded_memory(bombs, claim):
    assert bombs[claim] < 1000


def test_a_configuration_of_millions_of_objects_is_refused_in_bounded_memory(bombs):
    """56 MB of JSON become 2 GB of objects when parsed: the configuration's length must be checked before."""
    assert bombs["configuration"] < 1000


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Flipped, replaced, removed, repeated or inserted bytes, one to four times."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, n = rng.randrange(len(data) + 1), rng.choice([1, 1, 2, 4, 8, 64])
        match rng.randrange(6):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at : at + n] = rng.randbytes(n)
            case 2:
                del data[at : at + n]
            case 3:
                data[at:at] = data[at : at + n]
            case 4:
                data[at:at] = rng.randbytes(n)
            case 5:
                data[at : at + n] = (
                    rng.choice([b"\0", b"\xff", b"9", b"-", b'"', b"[", b"null", b"1e9", b"{}", b","]) * n
                )
    return bytes(data)


def test_ten_thousand_mutated_artifacts_end_in_a_user_error_or_a_whole_model(artifact, parts):
    """Most are damaged files; the others are signed again, with a changed configuration, content or frame."""
    rng, ends = random.Random(0), collections.Counter()
    frame = artifact[60:]
    ways = {
        "raw file": (lambda: mutated(rng, artifact), ARTIFACTS - 3200),
        "configuration, signed": (lambda: parts.with_text(mutated(rng, parts.text)), 2000),
        "content, signed": (lambda: runs.sign(mutated(rng, parts.raw)), 400),
        "frame, signed": (lambda: runs.sign(b"", frame=mutated(rng, frame), expanded=len(parts.raw)), 800),
    }
    for way, (make, count) in ways.items():
        for _ in range(count):
            try:
                loaded, state = train_gpt.unpack(blob := make())
            except UserError as e:
                assert " — " in str(e) and len(str(e).splitlines()) == 1
                ends[way, "refused"] += 1
            else:
                assert way != "raw file" or blob == artifact
                with torch.device("meta"):
                    shapes = {name: weight.shape for name, weight in train_gpt.GPT(loaded).state_dict().items()}
                assert {name: weight.shape for name, weight in state.items()} == shapes
                assert all(weight.isfinite().all() for weight in state.values())
                ends[way, "another whole model"] += 1
    assert ends.total() == ARTIFACTS
    print(f"figure: {ends.total()} mutated artifacts:", dict(ends))


# ---- Shards


def only_shard(path: Path) -> np.ndarray:
    """The shard at `path` as a run reads it that has no other for training."""
    (shard,) = train_gpt.open_shards("train", runs.alone(DATA_PATH=path.parent))
    return shard[:]


def shard_error(path: Path) -> str:
    with pytest.raises((UserError, OSError)) as caught:
        only_shard(path)
    text = runs.line_of(caught.value)
    assert " — " in text and len(text.splitlines()) == 1 and str(path) in text
    return text


def test_a_shard_that_is_cut_lies_or_cannot_be_read_is_refused(tmp_path):
    path, tokens = tmp_path / "fineweb_train_0.bin", [1, 5, 9, 299]
    whole = runs.write_shard(path, tokens).read_bytes()
    assert only_shard(path).tolist() == tokens
    for length in (0, 1, 12, 1023, 1024, 1025, len(whole) - 1):
        path.write_bytes(whole[:length])
        shard_error(path)
    path.write_bytes(whole + b"\0")  # an odd trailing byte
    assert "4.5" in shard_error(path)
    for lie in (dict(magic=20240521), dict(version=2), dict(count=3), dict(count=5), dict(count=-1), dict(count=0)):
        shard_error(runs.write_shard(path, tokens, **lie))
    shard_error(runs.write_shard(path, []))
    assert "token 300" in shard_error(runs.write_shard(path, [1, 300, 2]))
    path.unlink()
    path.symlink_to("nowhere")
    shard_error(path)
    path.unlink()
    path.mkdir()
    shard_error(path)
    path.rmdir()
    with pytest.raises(UserError, match="no fineweb_train_.* — "):
        only_shard(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_shard_without_read_permission_is_refused(tmp_path):
    path = runs.write_shard(tmp_path / "fineweb_train_0.bin", [1, 2])
    path.chmod(0)
    assert "Permission denied" in shard_error(path)


@pytest.mark.parametrize(
    "lengths, tokens",
    [
        ([2000], None),
        ([1, 1, 1, 5], None),
        ([5, 1], None),
        (None, [7, 8, 9] * 40),
        (None, [99, 98]),
        (None, [1, 99, 1]),
        (None, [99, 99, 1, 98]),
    ],
)
def test_streams_with_odd_documents_are_scored_once_per_target(tmp_path, lengths, tokens):
    """Longer than any window, of one token, a lone final BOS, no BOS at all, tokens before the first BOS."""
    tokens = runs.documents(lengths, 0) if lengths else tokens
    runs.write_shard(tmp_path / "fineweb_val_000000.bin", tokens)
    run = runs.alone(DATA_PATH=tmp_path, TTT_N_EPOCHS=2)
    stream = train_gpt.load_validation(run)
    assert int(stream.lengths.sum()) == len(tokens) - 1
    torch.manual_seed(0)
    model = train_gpt.GPT(run.s)
    longest_first = np.array(sorted(range(len(stream.lengths)), key=lambda i: -stream.lengths[i]))
    batch = batch_of(model, stream, longest_first, run)
    for row in batch.rows:
        assert sum(map(len, row)) == len(tokens) - 1 and all(np.isfinite(nll).all() for nll in row)


def test_a_validation_stream_of_one_token_has_no_target_and_is_refused(tmp_path):
    runs.write_shard(tmp_path / "fineweb_val_000000.bin", [1])
    with pytest.raises(UserError, match="no target.* — "):
        train_gpt.load_validation(runs.alone(DATA_PATH=tmp_path))


def test_more_documents_asked_for_than_there_are_is_refused():
    with pytest.raises(UserError, match="VAL_DOCS=13.*12.* — "):
        train_gpt.load_validation(runs.alone(VAL_DOCS=13))


def test_two_thousand_mutated_shards_end_in_a_user_error_or_a_readable_shard(tmp_path):
    rng, ends, path = random.Random(0), collections.Counter(), tmp_path / "fineweb_train_0.bin"
    whole = runs.write_shard(path, runs.documents([40, 30], 3)).read_bytes()
    for _ in range(SHARDS):
        path.write_bytes(blob := mutated(rng, whole))
        try:
            tokens = only_shard(path)
        except UserError as e:
            assert " — " in str(e) and len(str(e).splitlines()) == 1
            ends["refused"] += 1
        else:
            assert blob[1024:] == np.asarray(tokens).tobytes() and max(tokens) < runs.VOCABULARY
            ends["another readable shard"] += 1
    assert ends.total() == SHARDS
    print(f"figure: {ends.total()} mutated shards:", dict(ends))


# ---- Tokenizers


@pytest.mark.parametrize("content", [None, b"", b"text", bytes(1000), b"\x0a\xff\xff\xff\x7f", "cut", "directory"])
def test_a_tokenizer_that_is_missing_or_no_model_is_refused(tmp_path, content):
    path = tmp_path / "tokenizer.model"
    if content == "directory":
        path.mkdir()
    elif content is not None:
        path.write_bytes((runs.data() / "tokenizer.model").read_bytes()[:1000] if content == "cut" else content)
    with pytest.raises((UserError, OSError)) as caught:
        train_gpt.load_tokenizer(str(path), runs.VOCABULARY)
    text = runs.line_of(caught.value)
    assert len(text.splitlines()) == 1 and str(path) in text and " — " in text


def test_a_tokenizer_of_another_size_is_refused_naming_both_sizes():
    with pytest.raises(UserError, match="300 pieces but VOCAB_SIZE=1024 — "):
        train_gpt.load_tokenizer(str(runs.data() / "tokenizer.model"), 1024)
