"""The artifact: what is stored comes back, in the same bytes each time, smaller than the reference packing, without pickle."""
import builtins
import functools
import hashlib
import io
import json
import pickle

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from conftest import random_model, small

quiet = lambda *_, **__: None
KINDS = ("fp16", "fp32", "int5", "int6", "int8")


def by_hand(weight, kind):
    """What a row-wise quantised matrix must come back as, computed in numpy: codes, scales and values."""
    w = weight.numpy()
    low, high = dict(int5=(-16, 15), int6=(-32, 31), int8=(-127, 127))[kind]
    if kind == "int8":
        top = np.array([np.quantile(abs(row).astype(np.float64), 0.9999984) for row in w])[:, None]
        scale = np.maximum(top / 127, 1 / 127)
        return np.clip(np.round(np.clip(w, -top, top) / scale), low, high), scale[:, 0]
    scale = (abs(w).max(1, keepdims=True) / np.float32(high)).astype(np.float16)
    scale = np.maximum(scale, np.float16(2.0**-14))
    return np.clip(np.round(w / scale.astype(np.float32)), low, high), scale[:, 0].astype(np.float64)


@settings(deadline=None, max_examples=80)
@given(st.sampled_from(KINDS), st.integers(1, 12), st.integers(1, 40), st.sampled_from((1e-9, 1e-4, 0.05, 1.0, 30.0)),
       st.booleans(), st.integers(0, 99))
def test_quantised_values_are_those_of_the_rules(kind, rows, cols, size, empty_row, seed):
    weight = size * torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    if empty_row:
        weight[seed % rows] = 0
    values, scale = train_gpt.quantize(weight, kind)
    restored = train_gpt.dequantize(values, scale)
    assert restored.dtype == torch.float32 and restored.shape == weight.shape
    if kind in ("fp16", "fp32"):
        assert scale is None and restored.equal(weight.half().float() if kind == "fp16" else weight)
        return
    codes, scales = by_hand(weight, kind)
    assert values.dtype == torch.int8 and scale.dtype == torch.float16
    assert abs(values.numpy() - codes).max() <= (1 if kind == "int8" else 0)  # a quantile in float32 may round the other way
    np.testing.assert_allclose(scale.numpy(), scales, rtol=1e-3, atol=0)
    assert (restored[(weight == 0).all(1)] == 0).all()
    step = scale.float()[:, None] * (0.51 if kind != "int8" else 0.6)
    assert ((restored - weight).abs() <= step).all()


@pytest.mark.parametrize("name, shape, kind", (
    ("blocks.3.attn_scale", (512,), "fp16"), ("skip_weights", (5, 512), "fp16"), ("bigram.scale", (), "fp16"), ("smear.gate", (512,), "fp16"),
    ("blocks.0.attn.q_gain", (8,), "fp16"), ("blocks.0.resid_mix", (2, 4096), "fp16"), ("blocks.0.resid_mix", (2, 4097), "fp32"),
    ("skip_weights", (128, 72), "fp32"), ("blocks.0.mlp.fc.weight", (64, 128), "fp16"), ("blocks.0.mlp.fc.weight", (64, 129), "int5"),
    ("blocks.0.mlp.proj.weight", (512, 1536), "int5"), ("blocks.0.attn.proj.weight", (512, 512), "int6"),
    ("bigram.embed.weight", (10240, 128), "int6"), ("bigram.proj.weight", (512, 128), "int6"), ("tok_emb.weight", (1024, 512), "fp16"),
    ("blocks.8.attn.c_k.weight", (256, 512), "fp16"), ("blocks.7.attn.c_k.weight", (256, 512), "int6"), ("lm_head.weight", (1024, 512), "int8")))
def test_the_first_rule_that_fits_decides_the_kind(name, shape, kind):
    assert train_gpt.kind_of(name, torch.zeros(shape), ["tok_emb", "blocks.8.attn.c_k"]) == kind


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 9), st.floats(0.001, 0.15))
def test_pruning_zeroes_the_smallest_magnitudes_of_large_matrices(seed, fraction):
    g = torch.Generator().manual_seed(seed)
    large = torch.randn(257, 257, generator=g)
    pruned = train_gpt.prune(large, fraction)
    zeroed = pruned == 0
    assert zeroed.sum().item() == pytest.approx(fraction * large.numel(), abs=2)
    assert pruned[~zeroed].equal(large[~zeroed]) and large[zeroed].abs().max() <= large[~zeroed].abs().min()
    for kept in (torch.randn(256, 256, generator=g), torch.randn(70_000, generator=g), torch.randn(3, 200, 200, generator=g)):
        assert train_gpt.prune(kept, fraction).equal(kept)
    assert train_gpt.prune(large, 0.0).equal(large)


def test_pruning_keeps_ties_at_the_threshold():
    weight = torch.ones(300, 300)
    weight[:5] = 0.5  # 1.7% of the weights, so the 3% quantile is 1
    assert (train_gpt.prune(weight, 0.03) == 0).sum() == 1500


def stored(state, fraction, patterns):
    """What must come back of a state dict, from the rules' parts."""
    return {name: train_gpt.dequantize(*train_gpt.quantize(train_gpt.prune(w, fraction), train_gpt.kind_of(name, w, patterns)))
            for name, w in state.items()}


def same(a, b):
    return list(a) == list(b) and all(x.dtype == y.dtype and x.shape == y.shape and x.equal(y) for x, y in zip(a.values(), b.values()))


@settings(deadline=None, max_examples=10)
@given(st.builds(dict, model_dim=st.sampled_from((32, 96, 132)), num_layers=st.integers(2, 4), tie_embeddings=st.booleans(),
                 bigram_vocab_size=st.sampled_from((2, 700)), bigram_dim=st.sampled_from((1, 32)), mlp_mult=st.sampled_from((0.5, 3.0)),
                 rope_base=st.sampled_from((10000.0, 123.456)), num_heads=st.sampled_from((1, 2))).map(lambda c: c | dict(num_kv_heads=1)),
       st.sampled_from(([], ["tok_emb"], ["blocks.1.attn.c_k", "mlp"])), st.sampled_from((0.0, 0.03)), st.integers(0, 99))
def test_weights_of_every_kind_come_back(config, patterns, fraction, seed):
    s = small(**config)
    state = dict(random_model(s, seed).state_dict())
    state["tok_emb.weight"][::3] = 0  # whole rows
    state["blocks.0.mlp.fc.weight"][0] = -0.0
    blob, report = train_gpt.pack(state, train_gpt.model_config(s), fraction, patterns)
    config, restored = train_gpt.unpack(blob)
    assert config == train_gpt.model_config(s) and same(restored, stored(state, fraction, patterns))
    assert train_gpt.pack(dict(state), train_gpt.model_config(s), fraction, patterns)[0] == blob
    weights = {kind: sum(w.numel() for name, w in state.items() if train_gpt.kind_of(name, w, patterns) == kind) for kind in KINDS}
    assert {kind: report[kind]["weights"] if kind in report else 0 for kind in KINDS} == weights
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
    restored = train_gpt.unpack(train_gpt.pack(state, train_gpt.model_config(s))[0])[1]
    assert restored["skip_weights"].equal(state["skip_weights"])


def test_the_entropy_of_the_codes_is_shannons():
    s = small(model_dim=96, num_layers=2, num_heads=2, num_kv_heads=1)
    state = random_model(s).state_dict()
    report = train_gpt.pack(state, train_gpt.model_config(s))[1]
    codes = torch.cat([train_gpt.quantize(w, "int5")[0].flatten() for name, w in state.items() if ".mlp." in name])
    p = torch.unique(codes, return_counts=True)[1].double() / len(codes)
    assert report["int5"]["weights"] == len(codes)
    assert report["int5"]["entropy"] == pytest.approx(-(p * p.log2()).sum().item(), rel=1e-9)
    assert report["int5"]["entropy"] < report["int5"]["bits_per_weight"]


def test_the_artifact_is_smaller_than_torch_save_and_zstd():
    """On rows of different sizes and heavy tails, as training leaves them."""
    s = small(vocab_size=1024, model_dim=256, num_layers=6, num_heads=8, num_kv_heads=4, bigram_vocab_size=2048, bigram_dim=64)
    g, patterns = torch.Generator().manual_seed(0), ["tok_emb", "blocks.4.attn.c_k"]
    state = {}
    for name, w in random_model(s).state_dict().items():
        if w.ndim == 2 and w.numel() > 8192:
            rows = torch.exp(0.4 * torch.randn(len(w), 1, generator=g))
            tail = (torch.randn(6, *w.shape, generator=g) ** 2).sum(0)
            w = 0.05 * rows * torch.randn(w.shape, generator=g) / (tail / 6).sqrt()  # Student's t, 6 degrees of freedom
        state[name] = w
    blob, _ = train_gpt.pack(state, train_gpt.model_config(s), 0.03, patterns)
    quantised = {}
    for name, w in state.items():
        kind = train_gpt.kind_of(name, w, patterns)
        values, scale = train_gpt.quantize(train_gpt.prune(w, 0.03), kind)
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
    return s, state, train_gpt.pack(state, train_gpt.model_config(s))[0]


def test_reading_an_artifact_never_unpickles(small_artifact, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("unpickled")
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    for name in ("eval", "exec"):
        monkeypatch.setattr(builtins, name, refuse)
    s, state, blob = small_artifact
    assert same(train_gpt.unpack(blob)[1], stored(state, 0.03, ["tok_emb", "blocks.8.attn.c_k"]))


def test_the_frame_is_plain_zstd_that_ends_in_a_json_table(small_artifact):
    s, state, blob = small_artifact
    assert blob[28:60] == hashlib.sha256(blob[60:]).digest()
    raw = zstandard.ZstdDecompressor().decompress(blob[60:])
    length = int.from_bytes(raw[-4:], "little")
    table = json.loads(raw[-4 - length : -4])
    assert [(name, tuple(shape)) for name, shape, _ in table["tensors"]] == [(name, tuple(w.shape)) for name, w in state.items()]
    assert table["config"]["num_layers"] == 3


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


def test_export_takes_the_smallest_fraction_that_fits(monkeypatch):
    s = small(model_dim=160, num_layers=2, num_heads=2, num_kv_heads=1, bigram_dim=8)  # MLP matrices of 76,800
    state, whole = random_model(s).state_dict(), train_gpt.pack
    large = [name for name, w in state.items() if w.numel() > 65_536]
    assert len(large) == 4
    for name in large:  # of uniform weights, unlike normal ones, no more than 3% are quantised to zero anyway
        state[name].uniform_(-1, 1, generator=torch.Generator().manual_seed(len(name)))
    packed = functools.cache(lambda fraction: whole(state, train_gpt.model_config(s), fraction, ["tok_emb", "blocks.8.attn.c_k"]))
    monkeypatch.setattr(train_gpt, "pack", lambda weights, config, fraction, patterns: packed(round(fraction, 6)))
    code = train_gpt.SOURCE.stat().st_size
    grid = [round(0.03 + 0.005 * k, 6) for k in range(25)]
    totals = [len(packed(fraction)[0]) + code for fraction in grid]
    assert grid[-1] == 0.15 and totals == sorted(totals, reverse=True)
    limits = [10**8, totals[0], totals[0] - 1, totals[1], totals[13], totals[13] - 1, totals[-1]]
    for limit in limits:
        expected = next(i for i, total in enumerate(totals) if total <= limit)
        blob, account = train_gpt.export(state, small(**vars(s) | dict(artifact_max_bytes=limit)), quiet)
        assert account["fits"] is True and account["prune_fraction"] == pytest.approx(grid[expected])
        assert blob == packed(grid[expected])[0] and len(blob) == account["model_bytes"]
        assert (account["code_bytes"], account["total_bytes"], account["max_bytes"]) == (code, totals[expected], limit)
    blob, account = train_gpt.export(state, small(**vars(s) | dict(artifact_max_bytes=totals[-1] - 1)), quiet)
    assert account["fits"] is False and account["prune_fraction"] == 0.15 and account["total_bytes"] == totals[-1]
    assert blob == packed(0.15)[0]
    finer = [k / 200 for k in range(31) if k / 200 > 0.042]  # from a start off the grid
    limit = len(packed(round(finer[2], 6))[0]) + code
    account = train_gpt.export(state, small(**vars(s) | dict(artifact_max_bytes=limit, prune_fraction=0.042)), quiet)[1]
    assert account["prune_fraction"] == pytest.approx(finer[2])


def test_export_always_prunes_the_unpruned_weights():
    s = small(model_dim=160, num_layers=2, num_heads=2, num_kv_heads=1, bigram_dim=8)
    state = random_model(s).state_dict()
    before = {name: w.clone() for name, w in state.items()}
    blob, account = train_gpt.export(state, small(**vars(s) | dict(artifact_max_bytes=1)), quiet)
    assert same(state, before)
    assert blob == train_gpt.pack(before, train_gpt.model_config(s), 0.15, ["tok_emb", "blocks.8.attn.c_k"])[0]
