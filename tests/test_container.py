"""The artifact: what is stored comes back, the same bytes each time, smaller than the reference packing, no pickle."""

import builtins
import functools
import hashlib
import io
import json
import math
import pickle

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from conftest import random_model, run_of, small

KINDS = ("fp16", "fp32", "int5", "int6", "int8")


def by_hand(weight, kind, stretch):
    """What a row-wise quantised matrix must come back as, computed in numpy: codes, scales and values."""
    w = weight.numpy()
    low, high = dict(int5=(-16, 15), int6=(-32, 31), int8=(-127, 127))[kind]
    if kind == "int8":
        top = np.array([np.quantile(abs(row).astype(np.float64), 0.9999984) for row in w])[:, None]
        scale = np.maximum(top / 127, 1 / 127)
        return np.clip(np.round(np.clip(w, -top, top) / scale), low, high), scale[:, 0]
    scale = (abs(w).max(1, keepdims=True) / np.float32(high) * np.float32(stretch)).astype(np.float16)
    scale = np.maximum(scale, np.float16(2.0**-14))
    return np.clip(np.round(w / scale.astype(np.float32)), low, high), scale[:, 0].astype(np.float64)


@settings(deadline=None, max_examples=80)
@given(
    st.sampled_from(KINDS),
    st.integers(1, 12),
    st.integers(1, 40),
    st.sampled_from((1e-9, 1e-4, 0.05, 1.0, 30.0)),
    st.booleans(),
    st.integers(0, 99),
    st.sampled_from((1.0, 1.0, 1.125, 3.5)),
)
def test_quantised_values_are_those_of_the_rules(kind, rows, cols, size, empty_row, seed, stretch):
    weight = size * torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    if empty_row:
        weight[seed % rows] = 0
    stored = train_gpt.quantize(weight, kind, stretch)
    restored, values, scale = stored.restored(), stored.values, stored.scale
    assert stored.kind == kind and values.shape == weight.shape
    assert restored.dtype == torch.float32 and restored.shape == weight.shape
    if kind in ("fp16", "fp32"):
        assert scale is None and restored.equal(weight.half().float() if kind == "fp16" else weight)
        return
    codes, scales = by_hand(weight, kind, stretch)
    assert values.dtype == torch.int8 and scale.dtype == torch.float16
    assert abs(values.numpy() - codes).max() <= (
        1 if kind == "int8" else 0
    )  # a quantile in float32 may round the other way
    np.testing.assert_allclose(scale.numpy(), scales, rtol=1e-3, atol=0)
    assert (restored[(weight == 0).all(1)] == 0).all()
    step = scale.float()[:, None] * (0.51 if kind != "int8" else 0.6)
    assert ((restored - weight).abs() <= step).all()


@pytest.mark.parametrize(
    "name, shape, kind",
    (
        ("blocks.3.attn_scale", (512,), "fp16"),
        ("skip_weights", (5, 512), "fp16"),
        ("bigram.scale", (), "fp16"),
        ("smear.gate", (512,), "fp16"),
        ("blocks.0.attn.q_gain", (8,), "fp16"),
        ("blocks.0.resid_mix", (2, 4096), "fp16"),
        ("blocks.0.resid_mix", (2, 4097), "fp32"),
        ("skip_weights", (128, 72), "fp32"),
        ("blocks.0.mlp.fc.weight", (64, 128), "fp16"),
        ("blocks.0.mlp.fc.weight", (64, 129), "int5"),
        ("blocks.0.mlp.proj.weight", (512, 1536), "int5"),
        ("blocks.0.attn.proj.weight", (512, 512), "int6"),
        ("bigram.embed.weight", (10240, 128), "int6"),
        ("bigram.proj.weight", (512, 128), "int6"),
        ("tok_emb.weight", (1024, 512), "fp16"),
        ("blocks.8.attn.c_k.weight", (256, 512), "fp16"),
        ("blocks.7.attn.c_k.weight", (256, 512), "int6"),
        ("lm_head.weight", (1024, 512), "int8"),
    ),
)
def test_the_first_rule_that_fits_decides_the_kind(name, shape, kind):
    assert train_gpt.kind_of(name, math.prod(shape), "tok_emb,blocks.8.attn.c_k") == kind


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 9), st.floats(0.001, 0.15))
def test_pruning_zeroes_the_smallest_magnitudes_of_large_matrices(seed, fraction):
    g = torch.Generator().manual_seed(seed)
    large = torch.randn(257, 257, generator=g)
    pruned = train_gpt.prune(large, fraction)
    zeroed = pruned == 0
    assert zeroed.sum().item() == pytest.approx(fraction * large.numel(), abs=2)
    assert pruned[~zeroed].equal(large[~zeroed]) and large[zeroed].abs().max() <= large[~zeroed].abs().min()
    for kept in (
        torch.randn(256, 256, generator=g),
        torch.randn(70_000, generator=g),
        torch.randn(3, 200, 200, generator=g),
    ):
        assert train_gpt.prune(kept, fraction).equal(kept)
    assert train_gpt.prune(large, 0.0).equal(large)


def test_pruning_keeps_ties_at_the_threshold():
    weight = torch.ones(300, 300)
    weight[:5] = 0.5  # 1.7% of the weights, so the 3% quantile is 1
    assert (train_gpt.prune(weight, 0.03) == 0).sum() == 1500


def restored(state, s, stretch=1.0):
    """What must come back of a state dict, from the rules' parts."""
    pruned = {name: train_gpt.prune(w, s.prune_fraction) for name, w in state.items()}
    return {name: train_gpt.quantize(w, kind_of(name, w, s), stretch).restored() for name, w in pruned.items()}


def kind_of(name, w, s):
    return train_gpt.kind_of(name, w.numel(), s.fp16_keep_name_patterns)


def packed(state, s, stretch=1.0):
    return train_gpt.pack(train_gpt.quantize_model(state, s, stretch), s)


def same(a, b):
    pairs = zip(a.values(), b.values(), strict=True)
    return list(a) == list(b) and all(x.dtype == y.dtype and x.shape == y.shape and x.equal(y) for x, y in pairs)


CONFIGURATIONS = st.builds(
    dict,
    model_dim=st.sampled_from((32, 96, 132)),
    num_layers=st.integers(2, 4),
    tie_embeddings=st.booleans(),
    bigram_vocab_size=st.sampled_from((2, 700)),
    bigram_dim=st.sampled_from((1, 32, 96)),
    mlp_mult=st.sampled_from((0.5, 3.0)),
    rope_base=st.sampled_from((10000.0, 123.456)),
    logit_softcap=st.sampled_from((30.0, 15.5)),
    num_heads=st.sampled_from((1, 2)),
    num_kv_heads=st.just(1),
    fp16_keep_name_patterns=st.sampled_from(("", "tok_emb", "blocks.1.attn.c_k,mlp", ",nothing,,")),
    prune_fraction=st.sampled_from((0.0, 0.03)),
)


@settings(deadline=None, max_examples=10)
@given(CONFIGURATIONS, st.sampled_from((1.0, 2.5)), st.integers(0, 99))
def test_weights_of_every_kind_come_back(configuration, stretch, seed):
    s = small(**configuration)
    state = dict(random_model(s, seed).state_dict())
    state["tok_emb.weight"][::3] = 0  # whole rows
    state["blocks.0.mlp.fc.weight"][0] = -0.0
    blob, report = packed(state, s, stretch)
    theirs, back = train_gpt.unpack(blob)
    assert theirs.of(train_gpt.ModelSettings) == s.of(train_gpt.ModelSettings)
    assert theirs.fp16_keep_name_patterns == s.fp16_keep_name_patterns
    assert same(back, restored(state, s, stretch))
    assert packed(dict(state), s, stretch)[0] == blob
    counted = {kind: sum(w.numel() for name, w in state.items() if kind_of(name, w, s) == kind) for kind in KINDS}
    assert {kind: report[kind]["weights"] if kind in report else 0 for kind in KINDS} == counted
    assert len(blob) - 600 < sum(row["bytes"] for row in report.values()) < len(blob)
    for kind, row in report.items():
        assert row["bits_per_weight"] == pytest.approx(8 * row["bytes"] / row["weights"])
        assert ("entropy" in row) == kind.startswith("int")


def test_a_control_tensor_of_more_than_8192_elements_comes_back_exactly():
    s = small(num_layers=256, model_dim=66, num_heads=1, num_kv_heads=1, mlp_mult=0.125)
    with torch.device("meta"):
        shapes = {name: w.shape for name, w in train_gpt.GPT(s).state_dict().items()}
    state = {name: torch.zeros(shape) for name, shape in shapes.items()}
    state["skip_weights"] = torch.randn(128, 66)
    assert state["skip_weights"].numel() > 8192
    back = train_gpt.unpack(packed(state, s)[0])[1]
    assert back["skip_weights"].equal(state["skip_weights"])


def test_the_entropy_of_the_codes_is_shannons():
    s = small(model_dim=96, num_layers=2, num_heads=2, num_kv_heads=1)
    state = random_model(s).state_dict()
    report = packed(state, s)[1]
    codes = torch.cat([train_gpt.quantize(w, "int5").values.flatten() for name, w in state.items() if ".mlp." in name])
    p = torch.unique(codes, return_counts=True)[1].double() / len(codes)
    assert report["int5"]["weights"] == len(codes)
    assert report["int5"]["entropy"] == pytest.approx(-(p * p.log2()).sum().item(), rel=1e-9)
    assert report["int5"]["entropy"] < report["int5"]["bits_per_weight"]


def test_the_artifact_is_smaller_than_torch_save_and_zstd():
    """On rows of different sizes and heavy tails, as training leaves them."""
    s = small(
        vocab_size=1024, model_dim=256, num_layers=6, num_heads=8, num_kv_heads=4, bigram_vocab_size=2048,
        bigram_dim=64, fp16_keep_name_patterns="tok_emb,blocks.4.attn.c_k",
    )  # fmt: skip
    g = torch.Generator().manual_seed(0)
    state = {}
    for name, w in random_model(s).state_dict().items():
        if w.ndim == 2 and w.numel() > 8192:
            rows = torch.exp(0.4 * torch.randn(len(w), 1, generator=g))
            tail = (torch.randn(6, *w.shape, generator=g) ** 2).sum(0)
            w = 0.05 * rows * torch.randn(w.shape, generator=g) / (tail / 6).sqrt()  # Student's t, 6 degrees of freedom
        state[name] = w
    tensors = train_gpt.quantize_model(state, s)
    blob, _ = train_gpt.pack(tensors, s)
    quantised = {}
    for name, (_, values, scale) in tensors.items():
        quantised |= {name: values} if scale is None else {name + ".q": values, name + ".scale": scale}
    reference = io.BytesIO()
    torch.save(quantised, reference)
    usual = zstandard.ZstdCompressor(level=22).compress(reference.getvalue())
    count = sum(w.numel() for w in state.values())
    print(f"figure: {count} weights: {len(blob)} bytes, {len(blob) / len(usual):.4f} of torch.save and zstd-22")
    assert 3e6 < count < 6e6 and len(blob) <= 0.975 * len(usual)


@pytest.fixture(scope="module")
def small_artifact():
    s = small()
    state = random_model(s).state_dict()
    return s, state, packed(state, s)[0]


def test_reading_an_artifact_never_unpickles(small_artifact, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    for name in ("eval", "exec"):
        monkeypatch.setattr(builtins, name, refuse)
    s, state, blob = small_artifact
    assert same(train_gpt.unpack(blob)[1], restored(state, s))


def test_the_frame_is_plain_zstd_of_the_configuration_and_nothing_but_planes():
    """Read by hand: the configuration in JSON, then the streams in their order, low bytes before high ones."""
    s = small(model_dim=96, num_heads=2, num_kv_heads=1, bigram_vocab_size=700, fp16_keep_name_patterns="1.mlp.fc")
    state = random_model(s).state_dict()
    blob = packed(state, s)[0]
    assert blob[28:60] == hashlib.sha256(blob[60:]).digest()
    raw = zstandard.ZstdDecompressor().decompress(blob[60:])
    length = int.from_bytes(raw[:4], "little")
    expected = s.of(train_gpt.ModelSettings) | dict(fp16_keep_name_patterns=s.fp16_keep_name_patterns)
    assert json.loads(raw[4 : 4 + length]) == expected
    tensors = train_gpt.quantize_model(state, s).values()
    streams = {kind: [t.values for t in tensors if t.kind == kind] for kind in ("int5", "int6", "int8", "fp16")}
    streams["scale"] = [t.scale for t in tensors if t.scale is not None]
    arrays = [torch.cat([x.flatten() for x in streams[k]]).numpy() for k in ("int5", "int6", "int8", "scale", "fp16")]
    planes = [x.tobytes()[byte :: x.itemsize] for x in arrays for byte in range(x.itemsize)]
    assert raw[4 + length :] == b"".join(planes) and [x.itemsize for x in arrays] == [1, 1, 1, 2, 2]


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_any_flipped_bit_is_refused(small_artifact, data):
    _, _, blob = small_artifact
    at, bit = data.draw(st.integers(0, len(blob) - 1) | st.integers(0, 70)), data.draw(st.integers(0, 7))
    damaged = bytearray(blob)
    damaged[at] ^= 1 << bit
    with pytest.raises(train_gpt.UserError, match="—"):
        train_gpt.unpack(bytes(damaged))


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.binary(max_size=40))
def test_any_other_length_is_refused(small_artifact, end, more):
    _, _, blob = small_artifact
    for damaged in (blob[: end % len(blob)], blob + b"\0" + more, more):
        with pytest.raises(train_gpt.UserError):
            train_gpt.unpack(damaged)


WIDE = dict(model_dim=160, num_layers=2, num_heads=2, num_kv_heads=1, bigram_dim=8)  # MLP matrices of 76,800


def test_export_stretches_the_steps_no_more_than_the_cap_asks_for(run, tmp_path, monkeypatch):
    s, code = small(**WIDE), len(train_gpt.SOURCE_BYTES)
    state, tried = random_model(s).state_dict(), []
    quantize_model, pack = train_gpt.quantize_model, train_gpt.pack
    at = functools.cache(lambda stretch: pack(quantize_model(state, s, stretch), s))  # each stretch is packed once

    def try_it(weights, settings, stretch):
        assert weights is state  # the weights themselves each time, not what an earlier try has left of them
        tried.append(stretch)
        return stretch

    monkeypatch.setattr(train_gpt, "quantize_model", try_it)
    monkeypatch.setattr(train_gpt, "pack", lambda stretch, settings: at(stretch))
    totals = [len(at(stretch)[0]) + code for stretch in (1.0, 1 + 1 / 64, 1.4, 3.0, 8.0)]
    assert totals == sorted(totals, reverse=True) and totals[-1] - code < 0.6 * (totals[0] - code)
    for limit in [10**8, totals[0], totals[0] - 1, *totals[1:]]:
        tried.clear()
        account = train_gpt.export(state, run_of(run, small(**WIDE, artifact_max_bytes=limit), tmp_path))
        blob, report = at(best := account["stretch"])
        assert account["fits"] is True and account["total_bytes"] == len(blob) + code <= limit
        if limit >= totals[0]:
            assert tried == [1.0]
        else:
            too_small = max(stretch for stretch in tried if len(at(stretch)[0]) + code > limit)
            assert 0 < best - too_small <= 1 / 64 and len(tried) <= 2 + 9  # nine halves from 1 to 8 make 1/64
        assert (tmp_path / "final_model.ptz").read_bytes() == blob and account["model_bytes"] == len(blob)
        assert account["sha256"] == hashlib.sha256(blob).hexdigest() and account["kinds"] == report
        assert (account["code_bytes"], account["max_bytes"]) == (code, limit)


def test_export_under_a_cap_that_nothing_meets_stretches_the_most_and_leaves_the_weights_alone(run, tmp_path):
    s = small(**WIDE)
    state = random_model(s).state_dict()
    before = {name: w.clone() for name, w in state.items()}
    limit = len(packed(state, s, 8.0)[0]) + len(train_gpt.SOURCE_BYTES) - 1
    account = train_gpt.export(state, run_of(run, small(**WIDE, artifact_max_bytes=limit), tmp_path))
    assert same(state, before)
    assert account["fits"] is False and account["stretch"] == 8.0 and account["total_bytes"] == limit + 1
    blob = (tmp_path / "final_model.ptz").read_bytes()
    assert blob == packed(before, s, 8.0)[0] and same(train_gpt.unpack(blob)[1], restored(before, s, 8.0))
    assert same(torch.load(tmp_path / "final_model.pt"), before)
