"""Damaged and hostile files: artifacts, shards, tokenizers. Each ends in a one-line UserError or is a whole, honest file."""

from __future__ import annotations

import collections
import copy
import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
import zstandard
from runs import train_gpt

UserError = train_gpt.UserError
ARTIFACTS, SHARDS = 10_000, 2_000


@pytest.fixture(scope="module")
def artifact() -> bytes:
    """A small artifact with tensors of every kind but fp32."""
    s = runs.micro(MODEL_DIM=8, NUM_HEADS=1, BIGRAM_VOCAB_SIZE=1100, MLP_MULT=4, BIGRAM_DIM=8)
    torch.manual_seed(0)
    state = {name: torch.randn_like(weight) for name, weight in train_gpt.GPT(s).state_dict().items()}
    return train_gpt.pack(state, train_gpt.model_config(s), 0.03, [])[0]


class Parts:
    """An artifact's expanded content in two parts: streams and table."""

    def __init__(self, blob: bytes):
        with zstandard.ZstdDecompressor().stream_reader(blob[60:], read_across_frames=True) as reader:
            self.raw = reader.read()
        start = len(self.raw) - 4 - int.from_bytes(self.raw[-4:], "little")
        self.streams, self.text = self.raw[:start], self.raw[start:-4]
        self.table = json.loads(self.text)

    def with_text(self, text: bytes) -> bytes:
        return runs.sign(self.streams + text + len(text).to_bytes(4, "little"))

    def with_table(self, change) -> bytes:
        table = copy.deepcopy(self.table)
        replacement = change(table)
        return self.with_text(json.dumps(table if replacement is None else replacement).encode())


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
    assert "format 2" in refusal(artifact[:8] + (2).to_bytes(4, "little") + artifact[12:])


def tensor(index: int, place: int, value):
    """A change of a table: one field of one tensor."""
    return lambda table: table["tensors"][index].__setitem__(place, value)


def config(name: str, value):
    return lambda table: table["config"].__setitem__(name, value)


LIES = {
    "no tensors": lambda table: table["tensors"].clear(),
    "a tensor too many": lambda table: table["tensors"].append(["more", [0], "fp16"]),
    "a name twice": lambda table: table["tensors"].append(table["tensors"][-1]),
    "a name twice for another": lambda table: table["tensors"].__setitem__(0, table["tensors"][1]),
    "a foreign name": tensor(0, 0, "../../etc/passwd"),
    "a name that is a number": tensor(0, 0, 7),
    "a name that is a list": tensor(0, 0, ["a"]),
    "another order of the axes": lambda table: table["tensors"][1][1].reverse() or table["tensors"][0][1].reverse(),
    "negative dimension": tensor(1, 1, [-300, -8]),
    "float dimension": tensor(1, 1, [300.0, 8.0]),
    "true as a dimension": tensor(0, 1, [True]),
    "huge dimension": tensor(0, 1, [2**62, 2**62]),
    "dimension NaN": tensor(0, 1, [float("nan")]),
    "infinite dimension": tensor(0, 1, [float("inf")]),
    "dimension of text": tensor(0, 1, [10**9, "ab"]),
    "dimension of lists": tensor(0, 1, [10**12, [0]]),
    "shape that is no list": tensor(0, 1, 8),
    "shape of text": tensor(0, 1, "88"),
    "shape of an object": tensor(0, 1, {"8": 8}),
    "a million dimensions": tensor(0, 1, [1] * 1_000_000),
    "a number of 5,000 digits": lambda table: None,  # written as text below
    "an unknown kind": tensor(0, 2, "int4"),
    "a stream's name as a kind": tensor(0, 2, "scale"),
    "a kind that is a list": tensor(0, 2, []),
    "another kind": tensor(0, 2, "int8"),
    "a tensor of two fields": lambda table: table["tensors"][0].pop(),
    "tensors that are an object": lambda table: table.__setitem__("tensors", {"a": 1}),
    "tensors that are a number": lambda table: table.__setitem__("tensors", 5),
    "no configuration": lambda table: table.pop("config"),
    "a configuration without a field": lambda table: table["config"].pop("num_layers"),
    "a configuration with a field more": config("seed", 1),
    "a configuration that is a list of the names": lambda table: table.__setitem__("config", list(table["config"])),
    "a configuration that is text": lambda table: table.__setitem__("config", "num_layers"),
    "a configuration that is null": lambda table: table.__setitem__("config", None),
    "a billion layers": config("num_layers", 10**9),
    "256 layers": config("num_layers", 256),
    "a billion columns": config("model_dim", 10**9),
    "no heads": config("num_heads", 0),
    "heads that do not divide": config("num_heads", 3),
    "layers as text": config("num_layers", "2"),
    "layers as a float": config("num_layers", 2.0),
    "layers as a truth": config("num_layers", True),
    "an infinite RoPE base": config("rope_base", float("inf")),
    "a soft cap of NaN": config("logit_softcap", float("nan")),
    "a hidden width of -1": config("mlp_mult", -1.0),
    "a huge hidden width": config("mlp_mult", 1e300),
    "a list at the top": lambda table: [1, 2],
    "null at the top": lambda table: json.loads("null") or [],
    "text at the top": lambda table: "config",
}


@pytest.mark.parametrize("lie", LIES)
def test_a_table_that_lies_is_refused_though_its_hash_is_right(parts, lie):
    refusal(parts.with_table(LIES[lie]) if "digits" not in lie else parts.with_text(parts.text.replace(b"[8]", b"[" + b"9" * 5000 + b"]")))


TEXTS = {
    "empty": b"", "not JSON": b"{", "NaN": b"NaN", "invalid UTF-8": b'{"config": "\xff\xfe"}', "null bytes": bytes(64),
    "nested": b"[" * 200_000, "closed and nested": b"[" * 900 + b"]" * 900, "nested objects": b'{"a":' * 200_000, "a pickle": b"\x80\x04K\x01.",
}  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_table_that_is_not_one_is_refused(parts, text):
    refusal(parts.with_text(TEXTS[text]))


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**32 - 1])
def test_a_wrong_length_of_the_table_is_refused(parts, length):
    refusal(runs.sign(parts.raw[:-4] + length.to_bytes(4, "little")))


@pytest.mark.parametrize("raw", [b"", b"\0", bytes(4), b"{}\2\0\0\0"])
def test_an_artifact_with_hardly_anything_in_it_is_refused(raw):
    refusal(runs.sign(raw))


def test_streams_that_are_too_long_or_too_short_are_refused(parts):
    for streams in (parts.streams + b"\0", parts.streams[:-1], b"", parts.streams * 2):
        refusal(runs.sign(streams + parts.raw[len(parts.streams) :]))


def test_a_weight_that_is_not_finite_is_refused(parts):
    # fp16 high bytes lie together: 0x7E.. is NaN wherever it falls among scales or fp16 values
    streams = bytearray(parts.streams)
    streams[-1] = 0x7E
    assert "not finite" in refusal(runs.sign(bytes(streams) + parts.raw[len(parts.streams) :]))


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
attempt("table", length + 4, frame(b"[", *objects, b"0]", (length).to_bytes(4, "little")))
zeros = frame(*[bytes(1 << 20)] * 2048)
attempt("claims little", 1000, zeros)
attempt("honest", 2048 << 20, zeros)
attempt("claims the most", 1 << 29, zeros)
"""


@pytest.fixture(scope="module")
def bombs() -> dict[str, int]:
    """Megabytes by which memory grew until each artifact was refused, in a process that is given 6 GiB."""
    code = BOMBS.format(path=[str(runs.ROOT), str(runs.ROOT / "tests")])
    cap = lambda: resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    env = dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=90, preexec_fn=cap, env=env)
    print(done.stdout, done.stderr[-2000:])
    return {line.rpartition(" ")[0]: int(line.split()[-1]) for line in done.stdout.splitlines()}


@pytest.mark.parametrize("claim", ["honest", "claims little", "claims the most"])
def test_a_frame_that_expands_to_gigabytes_is_refused_in_bounded_memory(bombs, claim):
    assert bombs[claim] < 1000


def test_a_table_of_millions_of_objects_is_refused_in_bounded_memory(bombs):
    """56 MB of JSON become 2 GB of objects when parsed: the table's length must be checked before."""
    assert bombs["table"] < 1000


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
                data[at : at + n] = rng.choice([b"\0", b"\xff", b"9", b"-", b'"', b"[", b"null", b"1e9", b"{}", b","]) * n
    return bytes(data)


def test_ten_thousand_mutated_artifacts_end_in_a_user_error_or_a_whole_model(artifact, parts):
    """Most are damaged files; the others are signed again, with a changed table, changed streams or a changed frame."""
    rng, ends = random.Random(0), collections.Counter()
    frame = artifact[60:]
    ways = {
        "raw file": (lambda: mutated(rng, artifact), ARTIFACTS - 3200),
        "table, signed": (lambda: parts.with_text(mutated(rng, parts.text)), 2000),
        "content, signed": (lambda: runs.sign(mutated(rng, parts.raw)), 400),
        "frame, signed": (lambda: runs.sign(b"", frame=mutated(rng, frame), expanded=len(parts.raw)), 800),
    }
    shapes = {name: weight.shape for name, weight in train_gpt.unpack(artifact)[1].items()}
    for way, (make, count) in ways.items():
        for _ in range(count):
            try:
                loaded, state = train_gpt.unpack(blob := make())
            except UserError as e:
                assert " — " in str(e) and len(str(e).splitlines()) == 1
                ends[way, "refused"] += 1
            else:
                assert way != "raw file" or blob == artifact
                assert {name: weight.shape for name, weight in state.items()} == shapes and loaded.keys() == parts.table["config"].keys()
                assert all(weight.isfinite().all() for weight in state.values())
                ends[way, "another whole model"] += 1
    assert ends.total() == ARTIFACTS
    print(f"figure: {ends.total()} mutated artifacts:", dict(ends))


# ---- Shards


def one_process() -> train_gpt.Runtime:
    """A Runtime without its signal handlers: one rank on a CPU."""
    runtime = object.__new__(train_gpt.Runtime)
    runtime.rank, runtime.world, runtime.device = 0, 1, torch.device("cpu")
    return runtime


def shard_error(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        train_gpt.check_tokens([train_gpt.open_shard(path)], runs.VOCABULARY, one_process())
    text = str(caught.value)
    assert " — " in text and len(text.splitlines()) == 1 and str(path) in text
    return text


def test_a_shard_that_is_cut_lies_or_cannot_be_read_is_refused(tmp_path):
    path, tokens = tmp_path / "shard.bin", [1, 5, 9, 299]
    whole = runs.write_shard(path, tokens).read_bytes()
    assert train_gpt.open_shard(path).tolist() == tokens
    for length in (0, 1, 12, 1023, 1024, 1025, len(whole) - 1):
        path.write_bytes(whole[:length])
        shard_error(path)
    path.write_bytes(whole + b"\0")  # an odd trailing byte
    assert "4.5" in shard_error(path)
    for lie in (dict(magic=20240521), dict(version=2), dict(count=3), dict(count=5), dict(count=-1), dict(count=0)):
        shard_error(runs.write_shard(path, tokens, **lie))
    shard_error(runs.write_shard(path, []))
    assert "token 300" in shard_error(runs.write_shard(path, [1, 300, 2]))
    shard_error(tmp_path / "missing.bin")
    shard_error(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_shard_without_read_permission_is_refused(tmp_path):
    path = runs.write_shard(tmp_path / "shard.bin", [1, 2])
    path.chmod(0)
    assert "Permission denied" in shard_error(path)


@pytest.mark.parametrize(
    "lengths, tokens",
    [([2000], None), ([1, 1, 1, 5], None), ([5, 1], None), (None, [7, 8, 9] * 40), (None, [99, 98]), (None, [1, 99, 1]), (None, [99, 99, 1, 98])],
)
def test_streams_with_odd_documents_are_scored_once_per_target(tmp_path, lengths, tokens):
    """Longer than any window, of one token, a lone final BOS, no BOS at all, tokens before the first BOS."""
    tokens = runs.documents(lengths, 0) if lengths else tokens
    runs.write_shard(tmp_path / "fineweb_val_000000.bin", tokens)
    s = runs.micro(DATA_PATH=tmp_path, TTT_N_EPOCHS=2)
    stream = train_gpt.load_validation(s, one_process())
    batch_of = sorted(range(len(stream.targets)), key=lambda i: -stream.targets[i])
    assert int(stream.targets.sum()) == len(tokens) - 1
    torch.manual_seed(0)
    model = train_gpt.GPT(s)
    runtime = one_process()
    runtime.compile, runtime.signal, runtime.event = False, 0, None
    batch = train_gpt.DocumentBatch(model, stream, np.array(batch_of), s, runtime)
    fresh = np.stack([train_gpt.draw_lora_a(s, document) for document in batch_of])
    batch.plain(train_gpt.Adapters(fresh, s, runtime.device))
    assert batch.sums[0, :, 1].sum() == len(tokens) - 1 and batch.sums.isfinite().all()


def test_a_validation_stream_of_one_token_has_no_target_and_is_refused(tmp_path):
    runs.write_shard(tmp_path / "fineweb_val_000000.bin", [1])
    with pytest.raises(UserError, match="no target.* — "):
        train_gpt.load_validation(runs.micro(DATA_PATH=tmp_path), one_process())


def test_more_documents_asked_for_than_there_are_is_refused():
    with pytest.raises(UserError, match="VAL_DOCS=13.*12.* — "):
        train_gpt.load_validation(runs.micro(VAL_DOCS=13), one_process())


def test_two_thousand_mutated_shards_end_in_a_user_error_or_a_readable_shard(tmp_path):
    rng, ends, path = random.Random(0), collections.Counter(), tmp_path / "shard.bin"
    whole = runs.write_shard(path, runs.documents([40, 30], 3)).read_bytes()
    for _ in range(SHARDS):
        path.write_bytes(blob := mutated(rng, whole))
        try:
            tokens = train_gpt.open_shard(path)
            train_gpt.check_tokens([tokens], runs.VOCABULARY, one_process())
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
    with pytest.raises(UserError, match="tokenizer.model.* — ") as caught:
        train_gpt.load_tokenizer(str(path), runs.VOCABULARY)
    assert len(str(caught.value).splitlines()) == 1


def test_a_tokenizer_of_another_size_is_refused_naming_both_sizes():
    with pytest.raises(UserError, match="300 pieces but VOCAB_SIZE=1024 — "):
        train_gpt.load_tokenizer(str(runs.data() / "tokenizer.model"), 1024)
