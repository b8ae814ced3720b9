"""The artifact: what is stored comes back, the same bytes each time, smaller than the reference packing, no pickle."""

import builtins
import functools
import hashlib
import io
import json
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from conftest import random_model, run_of, small

KINDS = ("fp16", "fp32", "int5", "int6", "int8")


def quantised(weight, kind, s, stretch=1.0):
    """A matrix as it is stored, by its own steps, each weight rounded by itself."""
    step = train_gpt.row_steps(weight, kind, s, stretch)
    codes = train_gpt.nearest(weight, step, train_gpt.LIMITS[kind])
    return train_gpt.Stored(kind, codes.to(torch.int8), step.half().flatten())


def by_hand(weight, kind, sigmas, stretch):
    """What a row-wise quantised matrix must come back as, computed in numpy: codes and scales."""
    w = weight.numpy()
    low, high = dict(int5=(-16, 15), int6=(-32, 31), int8=(-127, 127))[kind]
    if kind == "int8":
        top = np.array([np.quantile(abs(row).astype(np.float64), 0.9999984) for row in w])[:, None]
        scale = np.maximum(top / 127, 1 / 127)
        return np.clip(np.round(np.clip(w, -top, top) / scale), low, high), scale[:, 0]
    sizes = abs(w).max(1, keepdims=True)
    if sigmas:
        sizes = np.float32(sigmas[kind == "int6"] * np.sqrt((w.astype(np.float64) ** 2).mean(1, keepdims=True)))
    scale = (sizes / np.float32(high) * np.float32(stretch)).astype(np.float16)
    scale = np.maximum(scale, np.float16(2.0**-14))
    return np.clip(np.round(w / scale.astype(np.float32)), low, high), scale[:, 0].astype(np.float64)


@settings(deadline=None, max_examples=120)
@given(
    st.sampled_from(("int5", "int6", "int8")),
    st.integers(1, 12),
    st.integers(1, 40),
    st.sampled_from((1e-9, 1e-4, 0.05, 1.0, 30.0)),
    st.booleans(),
    st.integers(0, 99),
    st.sampled_from((1.0, 1.0, 1.125, 3.5)),
    st.sampled_from((None, None, (1.0, 1.0), (2.25, 3.5), (4.0, 30.0))),
)
def test_quantised_values_are_those_of_the_rules(kind, rows, cols, size, empty_row, seed, stretch, sigmas):
    weight = size * torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    if empty_row:
        weight[seed % rows] = 0
    s = small(quant_sigmas="{},{}".format(*sigmas) if sigmas else "0")
    stored = quantised(weight, kind, s, stretch)
    restored, values, scale = stored.restored(), stored.values, stored.scale
    assert restored.dtype == torch.float32 and restored.shape == values.shape == weight.shape
    codes, scales = by_hand(weight, kind, sigmas, stretch)
    assert scale.dtype == torch.float16 and scale.shape == (rows,)
    np.testing.assert_allclose(scale.numpy(), scales, rtol=1e-3, atol=0)
    if (scale.double().numpy() == scales).all() or kind == "int8":  # else the root in float32 falls on a boundary
        # a quantile in float32 may round the other way
        assert abs(values.numpy() - codes).max() <= (1 if kind == "int8" else 0)
    assert (restored[(weight == 0).all(1)] == 0).all()
    step = scale.float()[:, None] * (0.51 if kind != "int8" else 0.6)
    low, high = dict(int5=(-16, 15), int6=(-32, 31), int8=(-127, 127))[kind]
    within = (weight > (low - 0.4) * scale.float()[:, None]) & (weight < (high + 0.4) * scale.float()[:, None])
    assert ((restored - weight).abs() <= step)[within].all() and (sigmas or kind == "int8" or within.all())


@pytest.mark.parametrize("sigmas", ("0", "2.5,3.5"))
def test_a_model_is_quantised_by_the_kinds_of_its_tensors(sigmas):
    s = small(vocab_size=600, model_dim=66, num_heads=1, num_kv_heads=1, bigram_vocab_size=600, quant_sigmas=sigmas)
    s = replace(s, tie_embeddings=False, fp16_keep_name_patterns="1.mlp.fc", prune_fraction=0.0)
    state = random_model(s).state_dict() | dict(skip_weights=torch.randn(130, 66))
    stored = train_gpt.quantize_model(state, s, None, 1.25)
    assert list(stored) == list(state) and {tensor.kind for tensor in stored.values()} == set(KINDS)
    for name, weight in state.items():
        kind, values, scale = stored[name]
        assert kind == kind_of(name, weight, s)
        if scale is None:
            assert values.equal(weight.half() if kind == "fp16" else weight) and values.dtype != torch.int8
        else:
            expected = quantised(weight, kind, s, 1.25)
            assert values.equal(expected.values) and scale.equal(expected.scale) and values.dtype == torch.int8


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
    back = {}
    for name, weight in state.items():
        kind, weight = kind_of(name, weight, s), train_gpt.prune(weight, s.prune_fraction)
        back[name] = weight.half().float() if kind == "fp16" else weight
        if kind in train_gpt.LIMITS:
            back[name] = quantised(weight, kind, s, stretch).restored()
    return back


def kind_of(name, w, s):
    return train_gpt.kind_of(name, w.numel(), s.fp16_keep_name_patterns)


def packed(state, s, stretch=1.0):
    return train_gpt.pack(train_gpt.quantize_model(state, s, None, stretch), s)


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
    quant_sigmas=st.sampled_from(("0", "3.5,4.25")),
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
    assert packed(dict(reversed(state.items())), s, stretch)[0] == blob  # whatever the order
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
    codes = torch.cat([quantised(w, "int5", s).values.flatten() for name, w in state.items() if ".mlp." in name])
    p = torch.unique(codes, return_counts=True)[1].double() / len(codes)
    assert report["int5"]["weights"] == len(codes)
    assert report["int5"]["entropy"] == pytest.approx(-(p * p.log2()).sum().item(), rel=1e-9)
    assert report["int5"]["entropy"] < report["int5"]["bits_per_weight"]


def test_the_artifact_is_smaller_than_torch_save_and_zstd():
    """On rows of different sizes and heavy tails, as training leaves them."""
    s = small(
        vocab_size=1024, model_dim=256, num_layers=2, num_heads=8, num_kv_heads=4, bigram_vocab_size=2048,
        bigram_dim=64, fp16_keep_name_patterns="tok_emb,blocks.1.attn.c_k",
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
    assert count > 1.5e6 and len(blob) <= 0.975 * len(usual)


@pytest.fixture(scope="module")
def small_artifact():
    s = small()
    state = random_model(s).state_dict()
    return s, state, packed(state, s)[0]


def test_an_artifact_has_the_same_bytes_on_any_number_of_cores(monkeypatch):
    """Of more than one job's size."""
    s = small(num_layers=3, model_dim=384, mlp_mult=4)
    tensors = train_gpt.quantize_model(random_model(s).state_dict(), s)
    artifacts = []
    for cores in (None, 3):
        monkeypatch.setattr(train_gpt.os, "cpu_count", lambda cores=cores: cores)
        artifacts.append(train_gpt.pack(tensors, s)[0])
    assert sum(tensor.values.numel() for tensor in tensors.values()) > 2 << 21 and len(set(artifacts)) == 1


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


# ---- As coarse as the cap asks for

# MLP matrices are pruned
WIDE = dict(model_dim=160, num_layers=2, num_heads=2, num_kv_heads=1, mlp_mult=2.6, bigram_dim=8)
CODE = len(train_gpt.SOURCE_BYTES)


def random_hessians(state, seed=0):
    """E[x x'] of correlated inputs for every matrix of the first block."""
    g, hessians = torch.Generator().manual_seed(seed), {}
    for name, w in state.items():
        if name.startswith("blocks.0.mlp.") or name == "blocks.0.attn.c_q.weight":  # the others are rounded to nearest
            x = torch.randn(2 * w.shape[1], w.shape[1], generator=g, dtype=torch.float64).cumsum(1)
            hessians[name] = x.mT @ x / len(x)
    return hessians


@pytest.fixture(scope="module", params=["row_maximum", "gptq"])
def wide(request):
    """Settings, weights and Hessians; the sizes of the artifact by its stretch are remembered."""
    s = small(**WIDE, quant_sigmas="0" if request.param == "row_maximum" else "3.5,4.5")
    state = random_model(s).state_dict()
    hessians = {} if request.param == "row_maximum" else random_hessians(state)

    @functools.cache
    def at(stretch):
        return train_gpt.pack(train_gpt.quantize_model(state, s, hessians, stretch), s)

    return s, state, hessians, at


def exported(run, wide, folder, cap):
    s, state, hessians, _ = wide
    return train_gpt.export(state, hessians, run_of(run, replace(s, artifact_max_bytes=cap), folder))


def test_an_artifact_under_a_cap_that_binds_fits_with_at_most_half_a_percent_to_spare(run, tmp_path, wide):
    s, state, _, at = wide
    before, sizes = {name: w.clone() for name, w in state.items()}, [len(at(x)[0]) for x in (1.0, 5.0)]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < 0.7 * sizes[0]
    caps = [CODE + sizes[0], CODE + sizes[0] - 1, CODE + sizes[1]]
    accounts = [exported(run, wide, tmp_path, cap) for cap in caps]
    stretches = [account["stretch"] for account in accounts]
    assert stretches == sorted(stretches) and stretches[0] == 1.0 < stretches[1]
    for cap, account in zip(caps, accounts, strict=True):
        blob, kinds = at(account["stretch"])
        assert account["model_bytes"] == len(blob) and account["kinds"] == kinds
        assert account["sha256"] == hashlib.sha256(blob).hexdigest()
        assert account["fits"] is True and account["total_bytes"] == len(blob) + CODE <= cap
        assert (account["code_bytes"], account["max_bytes"]) == (CODE, cap)
        assert account["stretch"] == 1.0 or account["total_bytes"] >= 0.995 * cap
    assert (tmp_path / "final_model.ptz").read_bytes() == blob  # of the last one
    assert same(state, before) and same(torch.load(tmp_path / "final_model.pt", weights_only=True), before)


@pytest.mark.parametrize("edge", (1.1, 1.6, 2.3, 3.7, 6.1, 7.9))
def test_of_all_that_was_tried_the_largest_artifact_that_fits_is_kept(run, monkeypatch, edge):
    """Sizes that jump over the cap and half a percent below it, wherever the search ends: what was tried last may be
    too large."""
    s = small(artifact_max_bytes=CODE + 9_000)
    tried = []

    def pack(stretch, s):
        tried.append((bytes(10_000 if stretch < edge else 1_000), stretch))
        return tried[-1][0], {}

    first = {"tok_emb.weight": train_gpt.Stored("fp16", torch.zeros(2, 2))}
    monkeypatch.setattr(train_gpt, "quantize_model", lambda state, s, hessians=None, stretch=None: stretch or first)
    monkeypatch.setattr(train_gpt, "pack", pack)
    stretch, blob, _ = train_gpt.fit({"tok_emb.weight": torch.zeros(2, 2)}, {}, run_of(run, s))
    assert len(blob) == 1_000 and stretch == min(x for b, x in tried if len(b) == 1_000)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")], ids=str)
def test_a_machine_short_of_memory_is_not_taken_for_a_damaged_file(run, tmp_path, monkeypatch, error):
    blob, _ = train_gpt.pack(train_gpt.quantize_model(random_model(run.s).state_dict(), run.s), run.s)

    def fail(*_):
        raise error

    monkeypatch.setattr(train_gpt, "restored", fail)
    monkeypatch.setattr(train_gpt, "load_pt", fail)
    (tmp_path / "model.pt").write_bytes(b"")
    for work in (lambda: train_gpt.unpack(blob), lambda: train_gpt.read_weights(tmp_path / "model.pt", run)):
        with pytest.raises(type(error)):
            work()


def test_a_model_larger_than_any_artifact_may_expand_to_is_refused_when_it_is_made(run, monkeypatch):
    tensors = train_gpt.quantize_model(random_model(run.s).state_dict(), run.s)
    monkeypatch.setattr(train_gpt, "MOST_EXPANDED", 1000)
    with pytest.raises(train_gpt.UserError, match="an artifact 1000 — lower MODEL_DIM or NUM_LAYERS"):
        train_gpt.pack(tensors, run.s)


@pytest.mark.parametrize("wide", ["row_maximum"], indirect=True)
def test_a_cap_that_nothing_meets_gets_the_coarsest_artifact_and_says_how_much_it_lacks(run, tmp_path, wide):
    _, state, _, at = wide
    before, (blob, _) = {name: w.clone() for name, w in state.items()}, at(train_gpt.LARGEST_STRETCH)
    limit, lines = len(blob) + CODE - 1, []
    s, weights, hessians, _ = wide
    run = run_of(run, replace(s, artifact_max_bytes=limit), tmp_path)
    run.log = lambda line, console=True: lines.append(line)
    account = train_gpt.export(weights, hessians, run)
    assert account["fits"] is False and account["stretch"] == train_gpt.LARGEST_STRETCH
    assert account["total_bytes"] == limit + 1 and (tmp_path / "final_model.ptz").read_bytes() == blob
    assert any(f" -1 bytes free of ARTIFACT_MAX_BYTES={limit}" in line for line in lines)
    assert same(state, before) and same(torch.load(tmp_path / "final_model.pt", weights_only=True), before)
    assert exported(run, wide, tmp_path, limit + 1)["fits"] is True
