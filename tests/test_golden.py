"""The figures of golden/expected.json, which an independent implementation computed on the same inputs."""
import json
import os
import sys
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch

import train_gpt
from conftest import small

PATTERNS = ["tok_emb", "blocks.8.attn.c_k"]
STORED = {"passthrough": "fp16", "passthrough_fp16": "fp16"}


class Golden:
    """Inputs, expectations, and the real token stream with its bytes."""
    def __init__(self, shared, run):
        sys.path.insert(0, str(shared / "golden"))
        import inputs
        sys.path.pop(0)
        self.inputs, self.run = inputs, run
        self.expected = json.loads((shared / "golden" / "expected.json").read_text())
        self.s = small(**inputs.CONFIG, train_seq_len=256, train_batch_tokens=1024, eval_stride=64, eval_batch_seqs=32,
                       ttt_chunk_size=64, ttt_eval_seq_len=256, ttt_lora_rank=8, ttt_lora_lr=0.001)
        self.state = {name: torch.from_numpy(w) for name, w in inputs.weights().items()}
        self.model = self.load(self.state)
        self.tokens = np.asarray(train_gpt.open_shard(shared / "fineweb" / "fineweb_val_000000.bin"))
        sp = train_gpt.load_tokenizer(str(shared / "fineweb" / "fineweb_1024_bpe.model"), 1024)
        self.bytes = train_gpt.target_bytes(sp, self.tokens)

    def load(self, state):
        model = train_gpt.GPT(self.s)
        train_gpt.load_weights(model, state, "golden")
        return model.requires_grad_(False)

    def nll(self, model, first, end):
        x = torch.from_numpy(self.tokens[first:end].astype(np.int64))[None]
        return model(x[:, :-1], x[:, 1:])[0][0].double()

    def stream(self, tokens):
        return train_gpt.Stream(self.tokens[:tokens], self.bytes[: tokens - 1], self.run.device)

    def adapters(self, documents):
        a = [[np.concatenate([self.inputs.lora_a(7, layer, target, d, 8, 128) for target in "qv"]) for layer in range(10)]
             for d in documents]
        return train_gpt.Adapters(np.array(a), self.s, self.run.device)

    def documents(self, documents, plain=False, **changes):
        """Losses of each figure of these documents, (documents, figures), from one batch."""
        count = sum(d["targets"] for d in self.expected["ttt_cached"]["docs"])
        batch = train_gpt.DocumentBatch(self.model, self.stream(count + 1), np.array(documents), replace(self.s, **changes), self.run)
        batch.plain(self.adapters(documents)) if plain else batch.adapt(self.adapters(documents))
        nll, targets, bytes_ = batch.sums.permute(2, 1, 0).numpy()
        expected = self.expected["ttt_replay"]["docs"]
        assert (targets == np.array([[expected[d]["targets"]] for d in documents])).all()
        assert (bytes_ == np.array([[expected[d]["bytes"]] for d in documents])).all()
        return nll / targets


@pytest.fixture(scope="module")
def golden(shared, run):
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    yield Golden(shared, run)
    torch.set_num_threads(threads)


def test_the_real_stream_has_its_documents_targets_and_bytes(golden):
    starts, targets = train_gpt.find_documents(golden.tokens)
    assert (len(starts), targets.sum(), golden.bytes.sum(dtype=np.int64)) == (625, 700_328, 1_684_897)


def test_the_state_dict_has_the_names_and_shapes_of_the_reference_scripts(golden):
    assert {name: tuple(w.shape) for name, w in train_gpt.GPT(golden.s).state_dict().items()} == golden.inputs.shapes()


def test_forward(golden):
    e = golden.expected["forward"]
    nll = golden.nll(golden.model, *e["tokens"])
    assert nll.mean().item() == pytest.approx(e["mean_nll"], rel=1e-4)
    assert nll[:16].tolist() == pytest.approx(e["nll_first_16"], rel=1e-4)
    assert golden.bytes[e["tokens"][0] : e["tokens"][1] - 1].sum() == e["bytes"]


def test_sliding_window(golden):
    e = golden.expected["sliding"]
    assert (golden.s.train_seq_len, golden.s.eval_stride) == (e["seq_len"], e["stride"])
    score = train_gpt.evaluate_sliding(golden.model, golden.stream(e["tokens"][1]), golden.s, golden.run)
    assert (score.targets, score.bytes) == (e["targets"], e["bytes"])
    assert score.loss == pytest.approx(e["val_loss"], rel=1e-4)
    assert score.bpb == pytest.approx(e["val_bpb"], rel=1e-4)


def test_quantised_codes_of_every_tensor(golden):
    e = golden.expected["quantize"]
    assert set(e["kind"]) == set(golden.state)
    for name, weight in golden.state.items():
        kind, pruned = train_gpt.kind_of(name, weight, PATTERNS), train_gpt.prune(weight, 0.03)
        values, scale = train_gpt.quantize(pruned, kind)
        assert kind == STORED.get(e["kind"][name], e["kind"][name]), name
        if name in e["pruned_zeros"]:
            assert (pruned == 0).sum() == e["pruned_zeros"][name], name
        else:
            assert pruned.equal(weight), name
        if scale is None:
            assert values.equal(pruned.half()) and name not in e["q_sum"]
            continue
        assert values.sum(dtype=torch.int64) == e["q_sum"][name], name
        assert values.abs().sum(dtype=torch.int64) == e["q_abs_sum"][name], name
        assert zlib.crc32(values.numpy().tobytes()) == e["q_crc32"][name], name
        assert scale.double().sum().item() == pytest.approx(e["scale_sum"][name], rel=1e-6), name


def test_loss_after_the_round_trip_through_the_artifact(golden):
    blob, _ = train_gpt.pack(golden.state, train_gpt.model_config(golden.s), 0.03, PATTERNS)
    model = golden.load(train_gpt.unpack(blob)[1])
    nll = golden.nll(model, *golden.expected["forward"]["tokens"])
    assert nll.mean().item() == pytest.approx(golden.expected["quantize"]["roundtrip_mean_nll"], rel=1e-4)


def test_quantised_matrices_of_the_record_model(golden):
    for name, e in golden.expected["quantize_record_width"].items():
        weight = golden.inputs.rng_for(7, "record." + name).standard_normal(e["shape"]) / np.sqrt(e["shape"][1])
        pruned = train_gpt.prune(torch.tensor(weight, dtype=torch.float32), 0.03)
        kind = train_gpt.kind_of(name, pruned, PATTERNS)
        values, scale = train_gpt.quantize(pruned, kind)
        restored = train_gpt.dequantize(values, scale).double()
        assert kind == STORED.get(e["kind"], e["kind"]), name
        assert (pruned == 0).sum() == e["pruned_zeros"], name
        assert restored.abs().sum().item() == pytest.approx(e["dequantized_sum_abs"], rel=1e-6), name
        assert (restored - pruned.double()).square().sum().item() == pytest.approx(e["error_sum_sq"], rel=1e-4), name
        if scale is not None:
            assert values.flatten()[:16].tolist() == e["q_first_16"], name
            assert values.abs().sum(dtype=torch.int64) == e["q_abs_sum"], name
            assert zlib.crc32(values.numpy().tobytes()) == e["q_crc32"], name
            assert scale[:4].tolist() == e["scale_first_4"], name


TTT = [("ttt_replay", f"epochs_{n}_val_loss", dict(ttt_context="recompute", ttt_n_epochs=n)) for n in (1, 4)]
TTT += [("ttt_cached", f"replay_epochs_{n}_val_loss", dict(ttt_n_epochs=n)) for n in (1, 4)]
# four epochs' first is one epoch's, so that alone they cover both
TTT += [("ttt_cached", "single_pass_epochs_3_val_loss", dict(ttt_protocol="single_pass", ttt_n_epochs=3)),
        ("ttt_cached", "no_adaptation_val_loss", dict(plain=True))]


CASES = [(*case, together) for case in TTT for together in (True, False) if together or "epochs_1_" not in case[1]]


@pytest.mark.parametrize("section, figure, how, together", CASES, ids=[f"{a}-{b}-{'one_batch' if c else 'alone'}" for a, b, _, c in CASES])
def test_losses_of_test_time_training(golden, section, figure, how, together):
    e = golden.expected[section]
    assert (golden.s.ttt_chunk_size, golden.s.ttt_eval_seq_len, golden.s.ttt_lora_rank, golden.s.ttt_lora_lr) == (
        e["chunk_size"], e["eval_seq_len"], e["rank"], e["lr"])
    longest_first = sorted(range(3), key=lambda d: -e["docs"][d]["targets"])
    for documents in [longest_first] if together else [[d] for d in longest_first]:
        for d, losses in zip(documents, golden.documents(documents, **how)):
            assert losses.tolist() == pytest.approx(np.atleast_1d(e["docs"][d][figure]).tolist(), rel=1e-3), d
