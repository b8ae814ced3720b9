"""The figures of golden/expected.json, which an independent implementation computed on the same inputs."""

import json
import sys
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch

import train_gpt
from conftest import loaded, run_of, small

STORED = {"passthrough": "fp16", "passthrough_fp16": "fp16"}  # the figures' words for a kind, and ours


class Golden:
    """Inputs, expectations, and the real token stream with its bytes."""

    def __init__(self, shared, run):
        sys.path.insert(0, str(shared / "golden"))
        import inputs

        sys.path.pop(0)
        self.inputs = inputs
        self.expected = json.loads((shared / "golden" / "expected.json").read_text())
        self.s = small(
            **inputs.CONFIG,
            train_seq_len=256,
            train_batch_tokens=1024,
            eval_stride=64,
            eval_batch_seqs=32,
            ttt_chunk_size=64,
            ttt_eval_seq_len=256,
            ttt_lora_rank=8,
            ttt_lora_lr=0.001,
            quantizer="nearest",
            quant_sigmas="0",
        )
        self.run = run_of(run, self.s)
        self.state = {name: torch.from_numpy(w) for name, w in inputs.weights().items()}
        self.model = self.load(self.state)
        self.tokens = train_gpt.open_shard(shared / "fineweb" / "fineweb_val_000000.bin")[:]
        sp = train_gpt.load_tokenizer(str(shared / "fineweb" / "fineweb_1024_bpe.model"), 1024)
        self.bytes = train_gpt.target_bytes(sp, self.tokens)

    def load(self, state, attention="flash"):
        model = train_gpt.GPT(self.s, attention=attention)
        train_gpt.load_weights(model, state, "golden", self.run)
        return model.requires_grad_(False)

    def nll(self, model, first, end):
        x = torch.from_numpy(self.tokens[first:end].astype(np.int64))[None]
        return model(x[:, :-1], x[:, 1:])[0].double()

    def stream(self, tokens):
        return train_gpt.Stream(self.tokens[:tokens], self.bytes[: tokens - 1], self.run.device)

    def stored(self, name, weight):
        """How a weight is stored at the record's patterns and pruning, and the pruned weight."""
        s = replace(self.s, prune_fraction=0.03, fp16_keep_name_patterns="tok_emb,blocks.8.attn.c_k")
        return train_gpt.quantize_model({name: weight}, s)[name], train_gpt.prune(weight, 0.03)

    def documents(self, documents, **changes):
        """Losses without adaptation and of each epoch of these documents, (documents, 1 + epochs), from one batch."""
        expected = self.expected["ttt_replay"]["docs"]
        stream = self.stream(sum(d["targets"] for d in expected) + 1)
        assert stream.lengths.tolist() == [d["targets"] for d in expected]
        assert stream.document_bytes.tolist() == [d["bytes"] for d in expected]
        run = run_of(self.run, replace(self.s, **changes))
        batch = loaded(self.model, stream, documents, run)
        of_layer = [
            [[self.inputs.lora_a(7, i, target, d, 8, 128) for target in "qv"] for i in range(10)] for d in documents
        ]
        nll = batch.read(a=np.array(of_layer, np.float32).reshape(len(documents), -1)).totals()
        return nll.T / stream.lengths[documents][:, None]

    def check_test_time_training(self, section, figures, how, batches):
        """Each named figure of the section, all from one reading of each batch of documents."""
        docs = self.expected[section]["docs"]
        for documents in batches:
            for d, losses in zip(documents, self.documents(documents, **how), strict=True):
                for figure, place in figures.items():
                    expected = np.atleast_1d(docs[d][figure]).tolist()
                    assert losses[place].tolist() == pytest.approx(expected, rel=1e-3), (figure, d)


@pytest.fixture(scope="module")
def golden(shared, run):
    return Golden(shared, run)


def test_the_real_stream_has_its_documents_targets_and_bytes(golden):
    starts, targets = train_gpt.find_documents(golden.tokens)
    assert (len(starts), targets.sum(), golden.bytes.sum(dtype=np.int64)) == (625, 700_328, 1_684_897)


def test_the_state_dict_has_the_names_and_shapes_of_the_reference_scripts(golden):
    shapes = {name: tuple(w.shape) for name, w in train_gpt.GPT(golden.s).state_dict().items()}
    assert shapes == golden.inputs.shapes()


def test_forward(golden):
    e = golden.expected["forward"]
    nll = golden.nll(golden.model, *e["tokens"])
    assert nll.mean().item() == pytest.approx(e["mean_nll"], rel=1e-4)
    assert nll[:16].tolist() == pytest.approx(e["nll_first_16"], rel=1e-4)
    assert golden.bytes[e["tokens"][0] : e["tokens"][1] - 1].sum() == e["bytes"]


def test_sliding_window(golden):
    e = golden.expected["sliding"]
    assert (golden.s.train_seq_len, golden.s.eval_stride) == (e["seq_len"], e["stride"])
    score = train_gpt.evaluate_sliding(golden.model, golden.stream(e["tokens"][1]), golden.run)
    assert (score.targets, score.bytes) == (e["targets"], e["bytes"])
    assert score.loss == pytest.approx(e["val_loss"], rel=1e-4)
    assert score.bpb == pytest.approx(e["val_bpb"], rel=1e-4)


def test_quantised_codes_of_every_tensor(golden):
    e = golden.expected["quantize"]
    assert set(e["kind"]) == set(golden.state)
    for name, weight in golden.state.items():
        stored, pruned = golden.stored(name, weight)
        assert stored.kind == STORED.get(e["kind"][name], e["kind"][name]), name
        if name in e["pruned_zeros"]:
            assert (pruned == 0).sum() == e["pruned_zeros"][name], name
        else:
            assert pruned.equal(weight), name
        if stored.scale is None:
            assert stored.values.equal(pruned.half()) and name not in e["q_sum"]
            continue
        assert stored.values.sum(dtype=torch.int64) == e["q_sum"][name], name
        assert stored.values.abs().sum(dtype=torch.int64) == e["q_abs_sum"][name], name
        assert zlib.crc32(stored.values.numpy().tobytes()) == e["q_crc32"][name], name
        assert stored.scale.double().sum().item() == pytest.approx(e["scale_sum"][name], rel=1e-6), name


def test_loss_after_the_round_trip_through_the_artifact(golden):
    blob, _ = train_gpt.pack(train_gpt.quantize_model(golden.model.state_dict(), golden.s), golden.s)
    _, state = train_gpt.unpack(blob)
    nll = golden.nll(golden.load(state), *golden.expected["forward"]["tokens"])
    assert nll.mean().item() == pytest.approx(golden.expected["quantize"]["roundtrip_mean_nll"], rel=1e-4)


def test_quantised_matrices_of_the_record_model(golden):
    for name, e in golden.expected["quantize_record_width"].items():
        weight = golden.inputs.rng_for(7, "record." + name).standard_normal(e["shape"]) / np.sqrt(e["shape"][1])
        stored, pruned = golden.stored(name, torch.tensor(weight, dtype=torch.float32))
        restored = stored.restored().double()
        assert stored.kind == STORED.get(e["kind"], e["kind"]), name
        assert (pruned == 0).sum() == e["pruned_zeros"], name
        assert restored.abs().sum().item() == pytest.approx(e["dequantized_sum_abs"], rel=1e-6), name
        assert (restored - pruned.double()).square().sum().item() == pytest.approx(e["error_sum_sq"], rel=1e-4), name
        if stored.scale is not None:
            assert stored.values.flatten()[:16].tolist() == e["q_first_16"], name
            assert stored.values.abs().sum(dtype=torch.int64) == e["q_abs_sum"], name
            assert zlib.crc32(stored.values.numpy().tobytes()) == e["q_crc32"], name
            assert stored.scale[:4].tolist() == e["scale_first_4"], name


PLAIN, FIRST, ALL = slice(0, 1), slice(1, 2), slice(1, None)  # of a reading: without adaptation, epoch 1, every epoch
REPLAY = {"replay_epochs_1_val_loss": FIRST, "replay_epochs_4_val_loss": ALL, "no_adaptation_val_loss": PLAIN}
TTT = [  # section, its figures, settings
    (
        "ttt_replay",
        {"epochs_1_val_loss": FIRST, "epochs_4_val_loss": ALL},
        dict(ttt_context="recompute", ttt_n_epochs=4),
    ),
    ("ttt_cached", REPLAY, dict(ttt_n_epochs=4)),
    ("ttt_cached", {"single_pass_epochs_3_val_loss": ALL}, dict(ttt_protocol="single_pass", ttt_n_epochs=3)),
]
LONGEST_FIRST = [1, 0, 2]  # of the three documents, of 1,259, 523 and 331 targets
SHORTER = LONGEST_FIRST[1:]  # of more targets than a window, too


@pytest.mark.parametrize("section, figures, how", TTT, ids=["recompute", "replay", "single_pass"])
def test_losses_of_test_time_training(golden, section, figures, how):
    """The longest document in replay alone: it takes as long as all else here."""
    e = golden.expected[section]
    setting = [golden.s.ttt_chunk_size, golden.s.ttt_eval_seq_len, golden.s.ttt_lora_rank, golden.s.ttt_lora_lr]
    assert setting == [e[name] for name in ("chunk_size", "eval_seq_len", "rank", "lr")]
    golden.check_test_time_training(section, figures, how, [LONGEST_FIRST if figures is REPLAY else SHORTER])


def test_losses_of_a_document_alone(golden):
    first = {"replay_epochs_1_val_loss": ALL, "no_adaptation_val_loss": PLAIN}
    golden.check_test_time_training("ttt_cached", first, dict(ttt_n_epochs=1), [SHORTER[1:]])


def test_everything_through_plain_attention(golden, monkeypatch):
    """As on a GPU without flash kernels."""
    model = golden.load(golden.state, attention="plain")
    e = golden.expected["forward"]
    assert golden.nll(model, *e["tokens"])[:16].tolist() == pytest.approx(e["nll_first_16"], rel=1e-4)
    monkeypatch.setattr(golden, "model", model)
    first = {"replay_epochs_1_val_loss": ALL, "no_adaptation_val_loss": PLAIN}
    golden.check_test_time_training("ttt_cached", first, dict(ttt_n_epochs=1), [SHORTER[1:]])
