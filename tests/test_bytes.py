"""Bytes of targets against text: tokenizers of every kind, texts of every script, and what must be refused.

The truth is the text itself where a tokenizer gives it back, and otherwise what SentencePiece decodes."""

from __future__ import annotations

import functools
import io
import itertools
import random
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

import runs
import train_gpt
from conftest import run_of, small

BOS, EOS, UNKNOWN, SEPARATOR = 1, 2, 3, 4
NORMAL, UNUSED = 1, 5  # of sentencepiece_model.proto's types of pieces
USER_DEFINED = ("▁▁", "q▁q", "éé")


class Kind(NamedTuple):
    """How a tokenizer is trained; `extras`: with user-defined and with unused pieces."""

    model: str = "bpe"
    byte_fallback: bool = True
    dummy_prefix: bool = True
    suffix: bool = False
    joined: bool = False
    kept: bool = False
    normal_form: str = "identity"
    extras: bool = False

    def gives_back(self) -> bool:
        """Whether decoding returns the very text, but for U+2581."""
        return self.byte_fallback and self.kept and not self.suffix and self.normal_form == "identity"


NO_YES = (False, True)
KINDS = [
    Kind(*choice)
    for choice in itertools.product(
        ("bpe", "unigram"), NO_YES, NO_YES, NO_YES, NO_YES, NO_YES, ("identity", "nfkc"), NO_YES
    )
]


def corpus() -> list[str]:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghq", k=rng.randint(1, 6))) for _ in range(60)]
    spaces = (" ", " ", " ", "  ", "    ")
    lines = ["".join(w + rng.choice(spaces) for w in rng.choices(words, k=12)) for _ in range(60)]
    return [" " * (i % 3) + "abc def  " * 3 + line for i, line in enumerate(lines)]


def varint(blob: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (blob[at] & 127) << shift
        shift += 7
        at += 1
        if blob[at - 1] < 128:
            return value, at


def as_varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128, *as_varint(value >> 7)])


def with_unused(model: bytes, pieces: set[str]) -> bytes:
    """A model file in which these pieces are unused: field 1 holds a piece, whose fields 1 and 3 are name and type."""
    out, at = b"", 0
    while model[at : at + 1] == b"\x0a":  # pieces come first
        size, start = varint(model, at + 1)
        at = start + size
        piece = model[start:at]
        name_size, name = varint(piece, 1)
        if piece[name : name + name_size].decode() in pieces:
            piece += bytes([3 << 3, UNUSED])  # of a field given twice the last counts
        out += b"\x0a" + as_varint(len(piece)) + piece
    return out + model[at:]


@functools.cache
def model_of(kind: Kind, **changes) -> bytes:
    options = dict(vocab_size=360 if kind.byte_fallback else 100, hard_vocab_limit=False, num_threads=1)
    options |= dict(pad_id=0, bos_id=BOS, eos_id=EOS, unk_id=UNKNOWN, control_symbols=["<sep>"], minloglevel=2)
    if kind.extras:
        options |= dict(user_defined_symbols=list(USER_DEFINED))
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=file, model_type=kind.model, byte_fallback=kind.byte_fallback,
        add_dummy_prefix=kind.dummy_prefix, treat_whitespace_as_suffix=kind.suffix, split_by_whitespace=not kind.joined,
        remove_extra_whitespaces=not kind.kept, allow_whitespace_only_pieces=kind.kept,
        normalization_rule_name=kind.normal_form, **(options | changes),
    )  # fmt: skip
    model = file.getvalue()
    if kind.extras:
        sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        learnt = [p for p in map(sp.id_to_piece, range(sp.vocab_size())) if len(p) > 2 and "<" not in p]
        model = with_unused(model, {*learnt[-40::4]} - {*USER_DEFINED})
    return model


@functools.cache
def tokenizer(kind: Kind):
    return sentencepiece.SentencePieceProcessor(model_proto=model_of(kind))


def stream(documents: list[list[int]]) -> np.ndarray:
    """Documents as shards hold them, and a last BOS, so that each document ends as the others do."""
    return np.array([token for ids in documents for token in (BOS, *ids)] + [BOS], np.uint16)


def counted(sp, tokens: np.ndarray) -> list[int]:
    bytes_ = train_gpt.target_bytes(sp, tokens)
    assert bytes_.dtype == np.int16 and bytes_.shape == (len(tokens) - 1,)
    starts, lengths = train_gpt.find_documents(tokens)
    return [int(bytes_[start : start + n].sum()) for start, n in zip(starts, lengths, strict=True)]


def refused(sp, tokens: np.ndarray) -> re.Match | None:
    """The refusal's document, counted and decoded bytes, if it comes to one."""
    try:
        train_gpt.compare_bytes(sp, tokens, train_gpt.target_bytes(sp, tokens), *train_gpt.find_documents(tokens))
    except train_gpt.UserError as e:
        found = re.match(r"validation document (\d+) counts (\d+) bytes, but its decoded text has (\d+)\b.* — ", str(e))
        assert found, e
        return found
    return None


def decoded(sp, ids: list[int]) -> int:
    """UTF-8 bytes of a text from its tokens, a U+2581 that is left being a space without a piece."""
    return len(sp.decode(ids).replace("▁", " ").encode())


# ---- Texts


TEXTS = ["abc", "abc  def", "  abc   def  ", "a b  c   d    e", " ", "", "hq  " * 9, "\tabc\ndef \n\n  fed"]
SCRIPTS = ["é", "日本語  テキスト", "😀 abc\U00020000", "a\u3000b\u00a0\u2003c", "ﬁ Å ½", "a\ufffdb", "q q", "éé  éé"]


@pytest.mark.parametrize("model", ("bpe", "unigram"))
def test_tokenizers_of_all_kinds_count_the_bytes_of_their_texts(model):
    kinds = [kind for kind in KINDS if kind.model == model]
    for kind in kinds:
        sp = tokenizer(kind)
        texts = TEXTS[:-1] if not kind.byte_fallback else TEXTS + SCRIPTS
        ids = [sp.encode(text) for text in texts]
        tokens = stream(ids)
        found = counted(sp, tokens)
        assert found == [decoded(sp, x) for x in ids] and refused(sp, tokens) is None, kind
        if kind.gives_back():
            assert found == [len(text.encode()) for text in texts], kind
    assert len(kinds) == 128


def test_the_kinds_are_what_they_are_called():
    """The test above would say little if no piece joined words and none were unused."""
    for kind in KINDS:
        sp = tokenizer(kind)
        pieces = [sp.id_to_piece(i) for i in range(sp.vocab_size())]
        inner = any("▁" in piece.strip("▁") for piece in pieces if piece not in USER_DEFINED)
        assert inner == kind.joined, kind
        assert any(map(sp.is_unused, range(sp.vocab_size()))) == kind.extras, kind
        assert any(map(sp.is_byte, range(sp.vocab_size()))) == kind.byte_fallback, kind
        ends = any(len(piece.strip("▁")) > 0 and piece.endswith("▁") for piece in pieces)
        assert ends == kind.suffix or kind.joined, kind
        assert sp.normalize("a").startswith("▁") == (kind.dummy_prefix and not kind.suffix), kind
        assert ("▁▁" in sp.normalize("a  b")) == kind.kept, kind
        assert ("fi" in sp.normalize("ﬁ")) == (kind.normal_form == "nfkc"), kind


part = (
    st.text(st.characters(exclude_categories=("Cs",)), max_size=6)
    | st.text(st.sampled_from("abcdefghq "), max_size=12)
    | st.text(st.sampled_from(" \t\n\u00a0\u2003\u3000\u200b"), max_size=6)
    | st.sampled_from(("▁", "▁▁", "q▁q", "q q", "éé", "<sep>", "<0x41>", "<unk>", "\ufffd", "ﬁ"))
)
text = st.lists(part, max_size=6).map("".join)
texts = st.lists(text, min_size=1, max_size=4)
texts_of_spaces = st.lists(text.map(lambda text: text.replace("▁", " ")), min_size=1, max_size=4)


@settings(deadline=None, max_examples=300, derandomize=True)
@given(st.sampled_from(KINDS), texts)
@example(Kind(extras=True), ["▁▁abc"])
@example(Kind(suffix=True, kept=True), ["  abc"])
@example(Kind(byte_fallback=False), ["abc", "a😀 b"])
def test_counted_bytes_are_decoded_bytes_or_the_text_is_refused(kind, texts):
    sp = tokenizer(kind)
    ids = [sp.encode(text) for text in texts]
    found, true = counted(sp, stream(ids)), [decoded(sp, x) for x in ids]
    refusal = refused(sp, stream(ids))
    if refusal:
        i = int(refusal[1])
        assert (int(refusal[2]), int(refusal[3])) == (found[i], true[i]) and found[:i] == true[:i] != found[i]
        # Nothing else may be refused: what a tokenizer has no piece for; and where it drops extra spaces but not a
        # text's own U+2581, of which the decoder drops all in front.
        assert any(map(sp.is_unknown, ids[i])) or (texts[i].lstrip().startswith("▁") and not kind.kept)
    else:
        assert found == true
    if kind.gives_back() and not kind.extras:
        assert found == [len(text.replace("▁", " ").encode()) for text in texts]


@settings(deadline=None, max_examples=80, derandomize=True)
@given(st.sampled_from([kind for kind in KINDS if kind.byte_fallback and not kind.extras]), texts_of_spaces)
def test_texts_between_control_pieces_are_texts_of_their_own(kind, texts):
    """A separator or an end of text as a dataset may have them: none of them, and no space that follows, is text."""
    sp = tokenizer(kind)
    ids = [sp.encode(text) for text in texts]
    tokens = stream([[token for x in ids for token in (*x, SEPARATOR)] + [EOS]])
    assert refused(sp, tokens) is None and counted(sp, tokens) == [sum(decoded(sp, x) for x in ids)]


# ---- Tokens that no text has


@settings(deadline=None, max_examples=120, derandomize=True)
@given(st.sampled_from([kind for kind in KINDS if kind.byte_fallback and kind.kept and not kind.extras]), st.data())
def test_bytes_that_are_no_utf8_raise_no_false_alarm(kind, data):
    """Characters cut in halves, as where a document ends early, or random tokens."""
    sp = tokenizer(kind)
    tokens = stream(data.draw(st.lists(st.lists(st.integers(SEPARATOR + 1, sp.vocab_size() - 1)), max_size=4)))
    assert refused(sp, tokens) is None
    assert refused(sp, tokens[:-1]) is None and refused(sp, tokens[1:]) is None  # nor where the first BOS is missing


def ids_of(sp, *pieces: str) -> list[int]:
    ids = [sp.piece_to_id(piece) for piece in pieces]
    assert [sp.id_to_piece(i) for i in ids] == [*pieces]
    return ids


@pytest.mark.parametrize(
    "pieces, expected",
    (
        (("<0xE2>", "<0x98>", "<0x83>"), 3),  # a snowman
        (("<0xE2>", "<0x98>"), 2),  # two thirds of it
        (("a", "<0xE2>", "▁", "a"), 4),
        (("<0xFF>", "<0x41>", "<0xC3>", "<0xA9>"), 4),
        (("<0x00>",), 1),
        (("<0xEF>", "<0xBF>", "<0xBD>", "<0x80>"), 4),  # U+FFFD itself, and half a character
        (("▁", "▁", "a"), 2),
        (("<0x41>", "▁", "a"), 3),  # only the very first space is the tokenizer's own
        (("<sep>", "▁", "a", "</s>", "▁", "a"), 2),
        ((), 0),
    ),
)
def test_bytes_of_tokens(pieces, expected):
    sp = tokenizer(Kind(kept=True))
    tokens = stream([ids_of(sp, *pieces)])
    assert counted(sp, tokens) == [expected] and refused(sp, tokens) is None


@settings(deadline=None, max_examples=120, derandomize=True)
@given(st.sampled_from(KINDS), st.data())
def test_any_tokens_are_compared_or_refused(kind, data):
    """Unknown, unused and control pieces anywhere: counted as decoded, or refused with both numbers as they are."""
    sp = tokenizer(kind)
    ids = data.draw(st.lists(st.integers(BOS + 1, sp.vocab_size() - 1), max_size=8))
    tokens = stream([ids])
    silent = [sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in ids]
    assert all(n == 0 for n, s in zip(train_gpt.target_bytes(sp, tokens), silent, strict=False) if s)
    refusal, has_bytes = refused(sp, tokens), any(map(sp.is_byte, ids))
    if not any(map(sp.is_control, ids)) and not has_bytes:
        assert (refusal is None) == (counted(sp, tokens) == [decoded(sp, ids)])


def test_a_document_with_unknown_pieces_is_refused_with_their_number():
    """An unknown piece stands for any text and decodes to a sign of its own: there is no byte to count."""
    sp = tokenizer(Kind(byte_fallback=False))
    tokens = stream([sp.encode("abc"), sp.encode("abc 😀 abc 日本")])
    with pytest.raises(train_gpt.UserError, match="document 1 counts .* and 2 unknown pieces — "):
        train_gpt.compare_bytes(sp, tokens, train_gpt.target_bytes(sp, tokens), *train_gpt.find_documents(tokens))


def test_a_space_that_three_byte_pieces_spell_is_refused():
    """A tokenizer without U+2581, as of texts without a space, counts 3 bytes for one and decodes to U+2581."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["ACGTTGCAACGT" * 4] * 30), model_writer=file, vocab_size=290, model_type="bpe",
        byte_fallback=True, add_dummy_prefix=False, pad_id=0, bos_id=BOS, eos_id=EOS, unk_id=UNKNOWN, minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    sp = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
    assert sp.is_unknown(sp.piece_to_id("▁"))
    assert refused(sp, stream([sp.encode("ACGT")])) is None
    assert refused(sp, stream([sp.encode("ACGT"), sp.encode("AC GT")])).groups() == ("1", "7", "5")


# ---- The challenge's tokenizer


def test_the_challenges_tokenizer_has_the_reference_scripts_rule_for_all_pairs(shared):
    """Per piece: byte 1, else its length without a leading U+2581; plus 1 for that, unless the one before is silent."""
    sp = train_gpt.load_tokenizer(str(shared / "fineweb" / "fineweb_1024_bpe.model"), 1024)
    ids = range(1024)
    silent = np.array([sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in ids])
    names = [sp.id_to_piece(i) for i in ids]
    plain = [0 if silent[i] else 1 if sp.is_byte(i) else len(names[i].removeprefix("▁").encode()) for i in ids]
    space = [names[i].startswith("▁") and not silent[i] for i in ids]
    pairs = np.stack(np.meshgrid(ids, ids, indexing="ij"), -1).astype(np.uint16)
    found = train_gpt.target_bytes(sp, pairs.ravel())[::2].reshape(1024, 1024)
    assert (found == np.array(plain) + np.outer(~silent, space)).all()


# ---- At a run's start


def dataset(folder: Path, model: bytes, tokens: np.ndarray) -> dict:
    """A folder as DATA_PATH and TOKENIZER_PATH, and the settings that name it."""
    for split in ("train", "val"):
        runs.write_shard(folder / f"fineweb_{split}_000000.bin", tokens)
    path = folder / "tokenizer.model"
    path.write_bytes(model)
    size = sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()
    return dict(data_path=folder, tokenizer_path=path, vocab_size=size)


WITHOUT_BYTES = functools.partial(model_of, Kind(byte_fallback=False, joined=True), vocab_size=300)


def field_rule(sp, tokens):
    """Each U+2581 after the first of a piece counts 3 bytes, as in the field's scripts."""
    pieces = ["?" if sp.is_byte(i) else sp.id_to_piece(i) for i in range(sp.vocab_size())]
    silent = np.array([sp.is_control(i) or sp.is_unknown(i) for i in range(sp.vocab_size())])
    length = np.array([len(piece.removeprefix("▁").encode()) for piece in pieces], np.int16) * ~silent
    space = np.array([piece.startswith("▁") for piece in pieces]) & ~silent
    return length[tokens[1:]] + (space[tokens[1:]] & ~silent[tokens[:-1]])


def bytes_thrice(sp, tokens):
    """A byte piece counts as the U+FFFD that it decodes to alone."""
    byte = np.array([sp.is_byte(i) for i in range(sp.vocab_size())])
    return RULE(sp, tokens) + 2 * byte[tokens[1:]]


def first_space_counts(sp, tokens):
    space = np.array([sp.id_to_piece(i).startswith("▁") for i in range(sp.vocab_size())])
    return RULE(sp, tokens) + (space[tokens[1:]] & (tokens[:-1] == BOS))


def control_is_text(sp, tokens):
    return RULE(sp, tokens) + 3 * (tokens[1:] == BOS)


RULE = train_gpt.target_bytes


@pytest.mark.parametrize(
    "rule, kind, document",
    (
        (field_rule, Kind(joined=True, kept=True), 1),
        (field_rule, Kind(suffix=True), 0),
        (field_rule, Kind(kept=True), 1),
        (bytes_thrice, Kind(), 2),
        (first_space_counts, Kind(), 0),
        (control_is_text, Kind(), 0),
    ),
)
def test_a_wrong_rule_is_found_out_before_the_run_begins(tmp_path, run, monkeypatch, rule, kind, document):
    sp = tokenizer(kind)
    joined = max((p for p in map(sp.id_to_piece, range(sp.vocab_size())) if "▁" in p[1:]), key=len, default="▁abc")
    texts = ["abc", "ab  " + joined.replace("▁", " ") * 3, "😀 日本語"]
    files = dataset(tmp_path, model_of(kind), stream([sp.encode(text) for text in texts]))
    other = run_of(run, small(**files))
    assert train_gpt.load_validation(other).byte_count == sum(decoded(sp, sp.encode(text)) for text in texts)
    monkeypatch.setattr(train_gpt, "target_bytes", rule)
    with pytest.raises(train_gpt.UserError) as caught:
        train_gpt.load_validation(other)
    true = decoded(sp, sp.encode(texts[document]))
    line = rf"validation document {document} counts \d+ bytes, but its decoded text has {true} — "
    assert re.match(line, str(caught.value)), caught.value


def test_a_run_whose_bytes_are_not_its_texts_ends_with_one_line(tmp_path):
    sp = sentencepiece.SentencePieceProcessor(model_proto=WITHOUT_BYTES())
    files = dataset(tmp_path, WITHOUT_BYTES(), stream([sp.encode("abc def")] * 40 + [sp.encode("a 日 b")]))
    done = runs.run(tmp_path / "run", code=2, **{name.upper(): value for name, value in files.items()})
    assert "validation document 40 counts" in runs.user_error(done.err)
    assert not (tmp_path / "run" / "train.log").exists()


def test_a_thousand_documents_are_compared(tmp_path, run):
    sp = sentencepiece.SentencePieceProcessor(model_proto=WITHOUT_BYTES())
    right, wrong = sp.encode("abc"), sp.encode("日")
    files = dataset(tmp_path, WITHOUT_BYTES(), stream([right] * 999 + [wrong]))
    with pytest.raises(train_gpt.UserError, match="document 999 "):
        train_gpt.load_validation(run_of(run, small(**files)))
    assert len(train_gpt.load_validation(run_of(run, small(**files, val_docs=999))).lengths) == 999  # without it
    files = dataset(tmp_path, WITHOUT_BYTES(), stream([right] * 1000 + [wrong]))
    assert len(train_gpt.load_validation(run_of(run, small(**files))).lengths) == 1001


def test_a_long_document_is_compared_as_far_as_time_allows(tmp_path, run, monkeypatch):
    """Cut within a character it is still its own text."""
    kind = Kind(dummy_prefix=False)
    sp = tokenizer(kind)
    files = dataset(tmp_path, model_of(kind), stream([sp.encode("日" * 20)] * 2))
    judge, seen = train_gpt.decoded_bytes, []
    monkeypatch.setattr(train_gpt, "decoded_bytes", lambda sp, x: seen.append([len(d) for d in x]) or judge(sp, x))
    monkeypatch.setattr(train_gpt, "COMPARED_TOKENS", 81)
    assert train_gpt.load_validation(run_of(run, small(**files))).byte_count == 120
    assert seen == [[62, 20]]


# ---- BOS


def test_a_tokenizer_whose_bos_is_another_token_is_refused(tmp_path):
    model = model_of(Kind(), pad_id=0, unk_id=1, bos_id=2, eos_id=3)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model)
    size = sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()
    with pytest.raises(train_gpt.UserError, match="BOS 2.* token 1 — .*bos_id=1"):
        train_gpt.load_tokenizer(str(path), size)


def test_without_bos_in_the_tokenizer_all_text_is_one_document(tmp_path, run, capsys):
    """Its token 1 is an end of text here, and no document begins with it."""
    model = model_of(Kind(), bos_id=-1, eos_id=1, pad_id=0, unk_id=2)
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = [sp.encode(text) for text in ("abc  def", "日本語", "fed")]
    tokens = np.array([token for x in ids for token in (*x, sp.eos_id())])
    assert sp.eos_id() == BOS and sp.bos_id() == -1
    found = train_gpt.load_validation(run_of(run, small(**dataset(tmp_path, model, tokens))))
    assert (found.starts.tolist(), found.lengths.tolist()) == ([0], [len(tokens) - 1])
    first = decoded(sp, ids[0][:1])  # is no target
    assert found.byte_count == sum(decoded(sp, x) for x in ids) - first and first > 0
    assert capsys.readouterr().out.startswith(f"warning: no document in {tmp_path} begins with BOS")


@pytest.mark.parametrize("tokens, warned", (([9, 8, 1, 7], False), ([1, 9, 8], False), ([9, 8, 7], True)))
def test_a_stream_without_bos_is_said_to_be_one_document(tmp_path, run, capsys, tokens, warned):
    model = model_of(Kind())
    for count in (0, 1):
        train_gpt.load_validation(run_of(run, small(**dataset(tmp_path, model, np.array(tokens)), val_docs=count)))
        assert ("begins with BOS" in capsys.readouterr().out) == warned
