"""`tokenizer.json` gives what `MarianTokenizer` gives, in tokenizers and in transformers.js."""

import json
import random
import shutil
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import pytest
import sentencepiece
from conftest import ROOT, odd_tokenizer, run
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, MarianTokenizer

from rs_transformer.export.tokenizer_json import write_tokenizer_json
from rs_transformer.tokenization import entries_of, train_tokenizer

SHIPPED = ROOT / "hub_cards" / "rs-marian-ja-en"
EXCERPT = ROOT / "training" / "data" / "tanaka-excerpt"
NASTY = [
    *["", " ", "   ", "\u3000", "\t\n", "\u200b", "\x01", "\x00a", " a ", "  a   b  ", "a\nb\r\nc", "\ufeffa\u2028b"],
    *[
        "👩\u200d👩\u200d👧 家族",
        "☃☃",
        "私☃は",
        "żółć",
        "Привет",
        "안녕하세요",
        "你好",
        "नमस्ते",
        "สวัสดี",
        "\U0001e030\U0001ccd6",
    ],
    *["ＡＢＣ　１２３", "ﾊﾝｶｸ ｶﾞｷﾞ", "か\u3099 カ\u309a ｶ\u3099", "～ ~ 〜", "㍍ ① ㈱ ﷺ ¨a ℃\u0327", "＄＄ $& $1 $$"],
    *["e\u0301 e\u0323\u0302 e\u0302\u0323", "q\u0323\u0307", "a\u0327\u0301", "\u0301", "x\u0301\x01\u0301"],
    *["</s>", "a</s>b", "<unk> x<pad>", "< /s>", "▁", "▁a ▁ b▁", "a ▁▁", "\ufdd0\ufdd1a\ufdd2", "ᄀ\x01ᅡ"],
    *[">>deu<< x", ">>eng<<", ">>eng<< x", ">>eng<<x >>eng<< y", " >>eng<< x", ">>a b<<y", ">><<", ">> x"],
    *["a</s>>>eng<< b", "\ufdd1>>eng<<", "<term> a", "a<term>b", "\U0001e030\U0001ccd6"],
    "とても長い文 long text … " * 300,
]


def random_texts(tokenizer: MarianTokenizer, number: int) -> list[str]:
    """Texts of letters of the vocabulary, marks, blanks and what is rare."""
    draw = random.Random(1)
    letters = sorted(set().union(*tokenizer.get_vocab()))
    rare = [*range(0x300, 0x345), *range(0x1100, 0x1200), 0x3099, 0x309A, *range(0xFF61, 0xFFA0)]
    pools = [letters, letters, [*map(chr, rare)], [*map(chr, range(0x20, 0xD7FF))], [*" ><▁\x01～"]]
    return ["".join(draw.choice(draw.choice(pools)) for _ in range(draw.randrange(1, 30))) for _ in range(number)]


def random_ids(tokenizer: MarianTokenizer, number: int) -> list[list[int]]:
    """Ids of translations, some of them special."""
    draw = random.Random(1)
    pools = [sorted(entries_of(tokenizer, "target").values())] * 3 + [tokenizer.all_special_ids]
    return [[draw.choice(draw.choice(pools)) for _ in range(draw.randrange(1, 12))] for _ in range(number)]


def ask_transformers_js(folder: Path, questions: Sequence) -> list:
    """Ids of the questions that are texts, texts of those that are ids with `skip_special_tokens`."""
    lines = "".join(f"{json.dumps(question)}\n" for question in questions)
    done = run("node", ROOT / "tests" / "web" / "tokenize.mjs", folder, input=lines)
    assert done.stderr == ""  # transformers.js warns of tokenizers that are not exact
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(tokenizer: MarianTokenizer, folder: Path, texts: Sequence[str], ids: Sequence[list[int]]) -> None:
    """Both implementations encode texts and decode ids as the tokenizer does."""
    write_tokenizer_json(tokenizer, folder)
    decoding = folder
    if tokenizer.separate_vocabs:
        decoding = folder / "target"
        decoding.mkdir()
        shutil.copy(folder / "target_tokenizer.json", decoding / "tokenizer.json")
        shutil.copy(folder / "tokenizer_config.json", decoding)
    encoded = tokenizer(texts, verbose=False)["input_ids"]
    questions = [(row, skip) for row in ids for skip in (False, True)]
    decoded = [tokenizer.decode(row, skip_special_tokens=skip) for row, skip in questions]
    fast, decoder = (AutoTokenizer.from_pretrained(where) for where in (folder, decoding))
    found = {
        "tokenizers": fast(texts, verbose=False)["input_ids"]
        + [decoder.decode(row, skip_special_tokens=skip) for row, skip in questions],
        "transformers.js": ask_transformers_js(folder, texts) + ask_transformers_js(decoding, questions),
    }
    for name, answers in found.items():
        for question, answer, wanted in zip([*texts, *questions], answers, encoded + decoded, strict=True):
            assert answer == wanted, (name, question)


def tokenizer_of(folder: Path, sources: list[str], targets: list[str], **options) -> MarianTokenizer:
    languages = {"source_lang": "aa", "target_lang": "zz"}
    return train_tokenizer(sources, targets, folder, **languages, **options)


def write_spm(file: Path, texts: list[str], **options) -> None:
    """A SentencePiece model with options that ours do not have."""
    options |= {"hard_vocab_limit": False, "minloglevel": 2}
    with file.open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=model, **options)


@pytest.fixture(scope="module")
def excerpt() -> list[tuple[str, str]]:
    lines = [
        json.loads(line) for file in EXCERPT.glob("*.jsonl") for line in file.read_text("utf-8").split("\n") if line
    ]
    return [(line["translation"]["ja"], line["translation"]["en"]) for line in lines]


@pytest.fixture(scope="module")
def shipped() -> MarianTokenizer:
    return MarianTokenizer.from_pretrained(SHIPPED)


@pytest.fixture(scope="module")
def shipped_fast(shipped, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shipped")
    write_tokenizer_json(shipped, folder)
    return AutoTokenizer.from_pretrained(folder)


def test_shipped_tokenizer(shipped, excerpt, tmp_path):
    ja, en = map(list, zip(*excerpt, strict=True))
    ids = shipped(text_target=en[:500])["input_ids"] + random_ids(shipped, 1000)
    check(shipped, tmp_path, [*ja, *en, *NASTY, *random_texts(shipped, 1000)], ids)


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("私はthe e\u0301か\u3099<>/s▁")))
)
def test_any_text(shipped, shipped_fast, text):
    assert shipped_fast(text)["input_ids"] == shipped(text)["input_ids"]


@pytest.mark.parametrize(
    "options",
    [
        {"vocab_size": 400},
        {"vocab_size": 400, "model_type": "bpe"},
        {"vocab_size": 500, "vocabulary": "joint"},
        {"vocab_size": 400, "vocabulary": "separate"},
        {"vocab_size": 400, "vocabulary": "separate", "model_type": "bpe"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_trained_tokenizers(excerpt, tmp_path, options):
    codes = [">>eng<< ", ">>zho_Hans<< ", ""]
    sources = [codes[i % 3] + en for i, (_, en) in enumerate(excerpt[:600])]
    targets = [en.translate(str.maketrans("aeirn.", "äéィβ☃。")) for _, en in excerpt[:600]]
    tokenizer = tokenizer_of(tmp_path / "marian", sources, targets, **options)
    check(tokenizer, tmp_path, [*sources, *targets, *NASTY, *random_texts(tokenizer, 500)], random_ids(tokenizer, 300))


def test_composed_letters(tmp_path):
    words = ["tiếng Việt Nam có nhiều dấu", "한국어 각 값 갂 뷁 안녕", "हिन्दी क़िला", "ガギグ パピプ", "ǖ ṩ ế ǻ"]
    sides = (words * 4, ["한글 ếx ő", "й ё ї"] * 4)
    tokenizer = tokenizer_of(tmp_path / "marian", *sides, vocabulary="joint", vocab_size=57)
    spelled = [unicodedata.normalize("NFD", word) for word in words]
    spelled += ["ㄱㅏㄱ ﾡￂ 각 각ᆨ", "ê\u0301 e\u0301\u0302 ｅ\u0302\u0341", "s\u0323\u0307 s\u0307\u0323"]
    check(tokenizer, tmp_path, [*words, *spelled, *NASTY, *random_texts(tokenizer, 3000)], [])


@pytest.mark.parametrize("rules", ["identity", "nfkc", "nmt_nfkc_cf"])
def test_normalization_rules(excerpt, tmp_path, rules):
    texts = [text for ja, en in excerpt[:300] for text in (f"{ja}ｶﾞ①Ａ", en.title())]
    pieces = tokenizer_of(tmp_path / "marian", texts, texts, vocab_size=1000, vocabulary="joint").get_vocab()
    write_spm(tmp_path / "marian" / "source.spm", texts, vocab_size=1200, normalization_rule_name=rules)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "marian" / "source.spm"))
    for piece in map(model.id_to_piece, range(3, model.get_piece_size())):
        pieces.setdefault(piece, len(pieces))
    (tmp_path / "marian" / "vocab.json").write_text(json.dumps(pieces))
    tokenizer = MarianTokenizer.from_pretrained(tmp_path / "marian")
    check(tokenizer, tmp_path, [*texts, *NASTY, *random_texts(tokenizer, 500)], [])


@pytest.mark.parametrize("vocabulary", ["joint", "separate"])
def test_added_tokens(tmp_path, vocabulary):
    tokenizer = odd_tokenizer(tmp_path / "marian", vocabulary)
    check(tokenizer, tmp_path, [*NASTY, *random_texts(tokenizer, 200)], random_ids(tokenizer, 200))


def test_refusals(tokenizer, shipped_fast, tmp_path):
    with pytest.raises(ValueError, match="made from a MarianTokenizer, got a"):
        write_tokenizer_json(shipped_fast, tmp_path / "json")

    def refused(message: str, **options) -> None:
        with pytest.raises(ValueError, match=message):
            write_tokenizer_json(MarianTokenizer.from_pretrained(marian), tmp_path / "json")

    marian = tmp_path / "marian"
    tokenizer.save_pretrained(marian)
    vocabulary = json.loads((marian / "vocab.json").read_text())
    (marian / "vocab.json").write_text(json.dumps({key: value for key, value in vocabulary.items() if key != "▁"}))
    refused("1 pieces of source.spm have no id")
    for options, message in [
        ({"byte_fallback": True, "vocab_size": 280}, "has '<0x00>', a byte"),
        ({"user_defined_symbols": ["<term>"]}, "has '<term>', a byte or a piece of the user's"),
        ({"model_type": "char"}, "neither a unigram nor a BPE model"),
        ({"remove_extra_whitespaces": False}, "keeps blanks"),
        ({"add_dummy_prefix": False}, "begins texts without one"),
    ]:
        write_spm(marian / "source.spm", ["a b c d e f g h"] * 9, **{"vocab_size": 13} | options)
        (marian / "vocab.json").write_text(json.dumps(vocabulary))
        refused(message)
    assert not (tmp_path / "json").exists()
