"""Segmentations by chance: of the text, as likely as they should be, and the same for a seed everywhere."""

import json
import math
import pickle
from collections import Counter

import pytest
from forked import fork
from subwords import SIDES, make_tokenizer
from transformers import BertTokenizer, MarianTokenizer

from rs_transformer.corpus import PairFilter, encode_pairs
from rs_transformer.subword_sampling import SubwordSampler
from rs_transformer.tokenization import encode, train_tokenizer

SOURCES, TARGETS = SIDES.values()
DRAWS = 3000


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Makes a tokenizer of a kind of SentencePiece model, once."""
    made: dict[str, MarianTokenizer] = {}

    def make(kind: str) -> MarianTokenizer:
        if kind not in made:
            languages = {"source_lang": "ja", "target_lang": "en", "vocab_size": 1300}
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = train_tokenizer(SOURCES, TARGETS, folder, model_type=kind, **languages)
        return made[kind]

    return make


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_segmentations_are_of_the_text_and_others_for_another_seed(trained, kind):
    tokenizer = trained(kind)
    sampler = SubwordSampler(tokenizer, 0.3)
    for texts, target in ((SOURCES[:50], False), (TARGETS[:50], True)):
        best = encode(tokenizer, texts, target=target)
        drawn = [sampler.encode(texts, seed, target=target) for seed in (1, 2, 1)]
        assert drawn[0] == drawn[2] != drawn[1] != best
        assert sum(map(len, drawn[0])) > sum(map(len, best))
        for ids in drawn:
            assert tokenizer.batch_decode(ids) == tokenizer.batch_decode(best)
        assert encode(tokenizer, texts, target=target) == best  # the tokenizer itself is as before
    assert sampler.encode(["", "a"], 1)[0] == [tokenizer.eos_token_id]


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_a_seed_gives_the_same_in_every_process_and_after_pickling(trained, kind, tmp_path):
    texts, tokenizer = TARGETS[:20], trained(kind)
    tokenizer.save_pretrained(tmp_path)
    code = f"""
import json
from transformers import AutoTokenizer
from rs_transformer.subword_sampling import SubwordSampler
sampler = SubwordSampler(AutoTokenizer.from_pretrained({str(tmp_path)!r}), 0.3)
print(json.dumps(sampler.encode({texts!r}, 2, target=True)))
"""
    sampler = SubwordSampler(tokenizer, 0.3)
    drawn = sampler.encode(texts, 2, target=True)
    assert json.loads(fork("-c", code).stdout) == drawn
    assert pickle.loads(pickle.dumps(sampler)).encode(texts, 2, target=True) == drawn


@pytest.mark.parametrize(("kind", "alpha"), [("unigram", 1e3), ("bpe", 0.0)])
def test_where_nothing_is_left_to_chance_it_is_the_tokenizers_own_segmentation(trained, kind, alpha):
    tokenizer = trained(kind)
    for texts, target in ((SOURCES[:500], False), (TARGETS[:500], True)):
        texts = [*texts, "a ☃☃☃ b ☃ ☃"]  # unknown characters, in a row and not
        own = encode(tokenizer, texts, target=target)
        assert SubwordSampler(tokenizer, alpha).encode(texts, 1, target=target) == own


@pytest.mark.parametrize("kind", ["bpe-bytes", "bpe-user"])
def test_of_bytes_and_users_pieces_too(made_once, kind):
    tokenizer = make_tokenizer(kind, made_once)
    for texts, target in ((SOURCES[:500], False), (TARGETS[:500], True)):
        texts = [*texts, "a ☃☃☃ b ☃ ☃", "singing てて"]
        own = encode(tokenizer, texts, target=target)
        assert SubwordSampler(tokenizer, 0.0).encode(texts, 1, target=target) == own
        drawn = SubwordSampler(tokenizer, 0.3).encode(texts, 1, target=target)
        assert [row.count(tokenizer.unk_token_id) for row in drawn] == [
            row.count(tokenizer.unk_token_id) for row in own
        ]


def test_a_unigram_models_segmentations_are_as_likely_as_their_probabilities_say(trained):
    tokenizer = trained("unigram")
    sampler, model = SubwordSampler(tokenizer, 0.5), tokenizer.spm_target
    found = Counter(tuple(sampler.encode(["tomorrow"], seed, target=True)[0][:-1]) for seed in range(DRAWS))
    candidates = model.nbest_encode("tomorrow", nbest_size=64, out_type=str)
    weights = [math.exp(0.5 * sum(model.get_score(model.piece_to_id(piece)) for piece in c)) for c in candidates]
    for pieces, weight in zip(candidates, weights, strict=True):
        expected = DRAWS * weight / sum(weights)
        count = found.pop(tuple(tokenizer.encoder[piece] for piece in pieces), 0)
        assert abs(count - expected) < 5 * math.sqrt(expected) + 2
    assert not found


def test_each_merge_of_a_bpe_model_is_passed_over_as_often_as_alpha_says(trained):
    tokenizer = trained("bpe")
    # Two characters and one merge: the piece is whole unless the merge is passed over.
    piece = next(p for p in sorted(tokenizer.encoder) if len(p) == 2 and p[0] == "▁" and p[1].isascii())
    sampler = SubwordSampler(tokenizer, 0.3)
    whole = [len(sampler.encode([piece[1]], seed, target=True)[0]) == 2 for seed in range(DRAWS)]
    assert abs(sum(whole) - 0.7 * DRAWS) < 5 * math.sqrt(0.21 * DRAWS)


def test_no_segmentation_is_drawn_of_a_pair_that_is_left_out(trained):
    texts = ["a b c " * 2000, "a b c"]
    batch = {"source": texts, "target": texts}
    sampler = SubwordSampler(trained("bpe"), 0.1)
    encoded = encode_pairs(batch, trained("bpe"), PairFilter(50, 50, 9.0), sampler)
    assert encoded["left_out"] == ["source over 50 tokens", ""]
    assert encoded["length"][1] >= len(encoded["input_ids"][1])


def test_special_tokens_stay_text_and_codes_stay_codes(trained):
    tokenizer = trained("unigram")
    sampler = SubwordSampler(tokenizer, 0.2)
    for seed in range(5):
        for ids in sampler.encode(["a </s> b <pad>", "</s>", ">>deu<< a"], seed):
            assert not {tokenizer.eos_token_id, tokenizer.pad_token_id} & {*ids[:-1]}


def test_other_tokenizers_are_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("[UNK]\n[PAD]\n[CLS]\n[SEP]\n[MASK]\na\n")
    with pytest.raises(ValueError, match="subword_sampling needs a MarianTokenizer, got a BertTokenizer"):
        SubwordSampler(BertTokenizer(str(tmp_path / "vocab.txt")), 0.1)
