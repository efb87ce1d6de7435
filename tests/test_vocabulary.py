"""Trimming a vocabulary in memory: what stays is as it was, in segmentation, logits and translations."""

import copy
import json
import pickle
import re
from functools import partial

import pytest
import sentencepiece
import torch
from conftest import ROOT, odd_tokenizer
from oracle import marian, rs_model, with_own_weights
from subwords import KINDS, SIDES, make_tokenizer
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, BertTokenizer, MarianTokenizer, pipeline

from rs_transformer import RSMarianForConditionalGeneration, trim_vocabulary
from rs_transformer.decoding import DecodingArguments, translate
from rs_transformer.tokenization import count_tokens, encode, entries_of, train_tokenizer
from rs_transformer.utils.sentencepiece_model import Subwords, without_pieces
from rs_transformer.vocabulary import TEXT_SIDES, embedding_rows, plan_trim, removed_entries

FEW = [texts[:300] for texts in SIDES.values()]


@pytest.fixture(scope="module")
def tokenizer_of(made_once):
    """A tokenizer by the name of its kind."""
    return partial(make_tokenizer, made_once=made_once)


def model_of(tokenizer, build=marian, **fields):
    """A random model of a tokenizer's size."""
    size, pad = max(tokenizer.get_vocab().values()) + 1, tokenizer.pad_token_id
    small = {"encoder_layers": 2, "decoder_layers": 2, "encoder_unique_layers": 2, "decoder_unique_layers": 2}
    if build is rs_model:
        small = {"encoder_layers": 2, "decoder_layers": 2}
    elif build is marian:
        small = {"encoder_layers": 6, "decoder_layers": 6}
    return build(**{**small, "vocab_size": size, "pad_token_id": pad, "decoder_start_token_id": pad, **fields})


def names(tokenizer, side):
    return {index: token for token, index in entries_of(tokenizer, side).items()}


def tokens(tokenizer, texts, side):
    """The tokens by their names, unknown ones as such."""
    known = names(tokenizer, side)
    return [[known[index] for index in ids] for ids in encode(tokenizer, texts, target=side == "target")]


def of_own_pieces(tokenizer, rows, side):
    """Whether the tokens of each row are all of the side's own SentencePiece model, or unknown.

    Those that are not are runs of characters unknown to it that happen to be an entry of the other side.
    """
    model = getattr(tokenizer, f"spm_{side}")
    pieces = {model.id_to_piece(index) for index in range(model.get_piece_size())}
    return [set(row) <= pieces for row in rows]


# Segmentation


@pytest.mark.parametrize("characters", ["all", "text"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_whose_pieces_stay_is_segmented_as_before(tokenizer_of, kind, characters):
    parent = tokenizer_of(kind)
    _, trimmed = trim_vocabulary(model_of(parent), parent, *FEW, characters=characters)
    assert len(trimmed) < 0.9 * len(parent)
    for side, texts in SIDES.items():
        before, after = (tokens(tokenizer, texts, side) for tokenizer in (parent, trimmed))
        assert before[:300] == after[:300]
        kept = entries_of(trimmed, side).keys()
        same = [set(row) <= kept for row in before]
        assert sum(same) > 350
        assert [row for row, stays in zip(before, same, strict=True) if stays] == [
            row for row, stays in zip(after, same, strict=True) if stays
        ]
        if characters == "all":  # whatever falls apart, nothing more is unknown
            own = of_own_pieces(parent, before, side)
            assert sum(own) > 1700
            unknown = [[row.count("<unk>") for row in rows] for rows in (before, after)]
            assert [a for a, mine in zip(unknown[0], own, strict=True) if mine] == [
                b for b, mine in zip(unknown[1], own, strict=True) if mine
            ]


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_is_spelled_by_what_stays(tokenizer_of, kind):
    parent = tokenizer_of(kind)
    _, trimmed = trim_vocabulary(model_of(parent), parent, ["彼"], ["he"])
    for side, texts in SIDES.items():
        own = of_own_pieces(parent, tokens(parent, texts[:500], side), side)
        texts = [text for text, mine in zip(texts[:500], own, strict=True) if mine]
        before, after = (
            [
                tokenizer.decode(ids, skip_special_tokens=True, use_source_tokenizer=side == "source")
                for ids in encode(tokenizer, texts, target=side == "target")
            ]
            for tokenizer in (parent, trimmed)
        )
        assert before == after


@pytest.mark.parametrize("kind", ["bpe", "bpe-bytes"])
def test_every_piece_of_a_bpe_model_can_still_be_reached(tokenizer_of, kind):
    parent = tokenizer_of(kind)
    _, trimmed = trim_vocabulary(model_of(parent), parent, *FEW)
    for side, texts in zip(TEXT_SIDES, FEW, strict=True):
        used = count_tokens(parent, texts, target=side == "target")
        assert used == count_tokens(trimmed, texts, target=side == "target")
    assert len(trimmed) < len(parent) - 300


def test_unknown_characters_cost_a_unigram_model_what_they_did(tokenizer_of):
    """It reckons that, and what a user's piece costs, from its lowest and its highest score."""
    parent = tokenizer_of("unigram-user")
    _, trimmed = trim_vocabulary(model_of(parent), parent, ["彼"], ["he"], characters="text")
    for side in ("spm_source", "spm_target"):
        scores = []
        for model in (getattr(parent, side), getattr(trimmed, side)):
            indices = [i for i in range(model.get_piece_size()) if model.get_score(i) < 0]
            scores.append({end(map(model.get_score, indices)) for end in (min, max)})
        assert scores[0] == scores[1]
    assert {"て", "ing"} <= trimmed.get_vocab().keys()  # the user's
    assert len(trimmed) < 30


def test_the_surface_of_an_unknown_piece_keeps_the_entry_that_it_has(tmp_path):
    """`MarianTokenizer` looks a character that the source's model does not know up in the whole vocabulary."""
    sides = [["a b c d e f"] * 4, ["u v w x y z"] * 4]
    parent = train_tokenizer(*sides, tmp_path, vocab_size=11, source_lang="aa", target_lang="zz")
    text, other = ["a u b", "c"], ["x"]
    assert tokens(parent, text, "source")[0] == ["▁", "a", "▁", "u", "▁", "b", "</s>"]
    for characters in ("all", "text"):
        _, trimmed = trim_vocabulary(model_of(parent), parent, text, other, characters=characters)
        assert tokens(trimmed, text, "source") == tokens(parent, text, "source")
        assert tokens(trimmed, ["a ☃ b"], "source")[0] == ["▁", "a", "▁", "<unk>", "▁", "b", "</s>"]
    assert not {"v", "w", "d"} & trimmed.get_vocab().keys()
    assert tokens(trimmed, ["d v"], "source") == [["▁", "<unk>", "▁", "<unk>", "</s>"]]


def test_pieces_without_an_entry_stay_unknown_where_the_text_has_them(tmp_path, tokenizer_of):
    parent = tokenizer_of("unigram")
    parent.save_pretrained(tmp_path)
    (common, _), *_ = [each for each in count_tokens(parent, FEW[0]).most_common() if len(each[0]) > 2]
    last = parent.convert_ids_to_tokens(len(parent) - 2)
    entries = parent.encoder | {last: parent.encoder[common]}
    del entries[common]
    entries["<pad>"] = len(entries) - 1
    (tmp_path / "vocab.json").write_text(json.dumps(entries))
    parent = MarianTokenizer.from_pretrained(tmp_path)
    _, trimmed = trim_vocabulary(model_of(parent), parent, *FEW)
    assert any("<unk>" in row for row in tokens(parent, FEW[0], "source"))
    assert tokens(trimmed, FEW[0], "source") == tokens(parent, FEW[0], "source")


# Models


SEPARATE = {"share_encoder_decoder_embeddings": False}
MODELS = {
    "marian": (marian, {}),
    "marian-untied": (marian, {"tie_word_embeddings": False}),
    "marian-two-tables": (marian, SEPARATE),
    "rs": (rs_model, {}),
    "rs-own": (rs_model, {"step_layer_norms": True, "step_biases": True, "step_adapter_rank": 2}),
    "rs-untied": (rs_model, {"tie_word_embeddings": False}),
    "rs-two-tables": (rs_model, SEPARATE),
    "rs-positions": (rs_model, {"marian_positions": True, "deepnorm": True}),
    "marian-filled": (marian, {"extra": 7}),
    "rs-filled": (rs_model, {"extra": 7}),
}
VOCABULARIES = {"merged": ("merged", {}), "separate": ("separate", SEPARATE)}


@pytest.fixture(scope="module")
def separate(made_once):
    options = {"vocab_size": 1350, "vocabulary": "separate", "source_lang": "ja", "target_lang": "en"}
    folder = made_once("subwords-separate", lambda folder: train_tokenizer(*SIDES.values(), folder, **options))
    return MarianTokenizer.from_pretrained(folder)


def parent_of(kind, tokenizer):
    """A random model of a kind, with a bias at each entry."""
    build, fields = MODELS[kind]
    fields = dict(fields)
    size = len(tokenizer) + fields.pop("extra", 0)
    if not fields.get("share_encoder_decoder_embeddings", True):
        fields["decoder_vocab_size"] = size
    model = model_of(tokenizer, build, vocab_size=size, **fields)
    bias = torch.randn(model.final_logits_bias.shape, generator=torch.Generator().manual_seed(3))
    bias[:, tokenizer.pad_token_id] = -1e4
    model.final_logits_bias.copy_(bias)
    return model


def batch_of(tokenizer, number=24):
    """Source ids, mask and labels of the first pairs."""
    batch = tokenizer(FEW[0][:number], text_target=FEW[1][:number], return_tensors="pt", padding=True)
    return {**batch, "labels": batch["labels"].masked_fill(batch["labels"] == tokenizer.pad_token_id, -100)}


def assert_equal_logits(parent, parent_tokenizer, trimmed, trimmed_tokenizer):
    """Logits of teacher forcing over the entries that stay, found by their names."""
    kept = entries_of(trimmed_tokenizer, "target")
    old = torch.tensor([entries_of(parent_tokenizer, "target")[token] for token in kept])
    new = torch.tensor(list(kept.values()))
    assert sorted(new.tolist()) == list(range(trimmed.final_logits_bias.shape[-1]))
    with torch.no_grad():
        before = parent(**batch_of(parent_tokenizer)).logits[..., old]
        after = trimmed(**batch_of(trimmed_tokenizer)).logits[..., new]
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6 * before.abs().clamp(max=1e3).max().item())


@pytest.mark.parametrize("kind", MODELS)
def test_logits_over_the_entries_that_stay_are_the_parents(tokenizer_of, kind):
    tokenizer = tokenizer_of("unigram")
    parent = parent_of(kind, tokenizer)
    before = copy.deepcopy(parent.state_dict())
    trimmed, its_tokenizer = trim_vocabulary(parent, tokenizer, *FEW)
    assert type(trimmed) is type(parent)
    assert_equal_logits(parent, tokenizer, trimmed, its_tokenizer)
    assert trimmed.config.vocab_size == len(its_tokenizer) == its_tokenizer.pad_token_id + 1  # padding still last
    # The parent is as it was.
    assert all(torch.equal(tensor, before[name]) for name, tensor in parent.state_dict().items())
    assert parent.config.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("kind", ["marian-two-tables", "rs-two-tables"])
@pytest.mark.parametrize("tied", [True, False])
def test_two_vocabularies_are_trimmed_each_to_its_side(separate, kind, tied):
    parent = parent_of(kind, separate)
    if not tied:
        parent = with_own_weights(parent)
    trimmed, tokenizer = trim_vocabulary(parent, separate, *FEW)
    assert_equal_logits(parent, separate, trimmed, tokenizer)
    rows = embedding_rows(trimmed)
    assert rows["source"] == len(tokenizer.encoder) != rows["target"] == len(tokenizer.target_encoder)
    for side, texts in zip(TEXT_SIDES, FEW, strict=True):
        assert tokens(tokenizer, texts, side) == tokens(separate, texts, side)
    for token in ("</s>", "<unk>", "<pad>"):  # one id on both sides, as the configuration has one
        assert tokenizer.encoder[token] == tokenizer.target_encoder[token]
    assert trimmed.config.pad_token_id == trimmed.config.decoder_start_token_id == tokenizer.encoder["<pad>"]


@pytest.mark.parametrize("name", ["lm_head.weight", "model.decoder.embed_tokens.weight"])
@pytest.mark.parametrize("kind", ["marian", "rs"])
def test_weights_of_their_own_where_the_configuration_says_tied_stay_their_own(tokenizer_of, tmp_path, kind, name):
    tokenizer = tokenizer_of("unigram")
    parent = with_own_weights(parent_of(kind, tokenizer), name)
    assert not torch.equal(parent.get_parameter(name), parent.model.shared.weight)
    trimmed, its_tokenizer = trim_vocabulary(parent, tokenizer, *FEW)
    assert_equal_logits(parent, tokenizer, trimmed, its_tokenizer)
    trimmed.save_pretrained(tmp_path)
    assert_equal_logits(parent, tokenizer, type(trimmed).from_pretrained(tmp_path), its_tokenizer)


@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize("kind", ["marian", "rs", "marian-filled", "separate"])
def test_translations_are_those_of_the_parent_with_the_other_entries_barred(tokenizer_of, separate, kind, num_beams):
    tokenizer = separate if kind == "separate" else tokenizer_of("unigram")
    parent = parent_of("marian-two-tables" if kind == "separate" else kind, tokenizer)
    trimmed, its_tokenizer = trim_vocabulary(parent, tokenizer, *FEW)
    kept = entries_of(its_tokenizer, "target")
    barred = torch.ones(parent.final_logits_bias.shape[-1], dtype=torch.bool)
    barred[[entries_of(tokenizer, "target")[token] for token in kept]] = False
    assert barred.sum() > 300
    parent.final_logits_bias[:, barred] = -torch.inf
    found = []
    for model, its in ((parent, tokenizer), (trimmed, its_tokenizer)):
        batch = its(FEW[0][:16], return_tensors="pt", padding=True)
        options = {"num_beams": num_beams, "max_new_tokens": 12, "do_sample": False, "no_repeat_ngram_size": 2}
        known = names(its, "target")
        found.append([[known[index] for index in row] for row in model.generate(**batch, **options).tolist()])
    assert found[0] == found[1]
    assert len({token for row in found[0] for token in row}) > 10


@pytest.fixture(scope="module")
def trained_parent():
    folder = ROOT / "hub_cards" / "marian-ja-en"
    return AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("num_beams", [1, 5])
def test_a_trained_model_translates_as_before_where_the_pieces_of_its_translations_stay(trained_parent, num_beams):
    sources = SIDES["source"][1900:1960]
    decoding = DecodingArguments(num_beams=num_beams, max_new_tokens=40)
    before = translate(*trained_parent, sources, decoding, progress=False)
    trimmed = trim_vocabulary(*trained_parent, sources, before)
    assert len(trimmed[1]) < 0.5 * len(trained_parent[1])
    after = translate(*trimmed, sources, decoding, progress=False)
    # What is left of the probability is shared out anew, which a search for more than one may see.
    assert sum(map(str.__eq__, before, after)) >= (len(sources) if num_beams == 1 else 0.9 * len(sources))


def test_half_precision_and_mode_are_the_parents(tokenizer_of):
    tokenizer = tokenizer_of("unigram")
    parent = parent_of("rs", tokenizer).half().train()
    trimmed, _ = trim_vocabulary(parent, tokenizer, *FEW)
    assert trimmed.dtype == torch.float16
    assert trimmed.training
    assert not trim_vocabulary(parent.eval(), tokenizer, *FEW)[0].training


def test_ids_in_the_configurations_are_those_of_the_same_tokens(tokenizer_of):
    tokenizer = tokenizer_of("unigram")
    parent = parent_of("marian", tokenizer)
    by_name = tokenizer.get_vocab()
    kept = next(token for token in count_tokens(tokenizer, FEW[1], target=True) if len(token) > 3)
    gone = [token for token in by_name if len(token) > 5][-1]
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    old, generation = parent.config, parent.generation_config
    old.forced_eos_token_id, old.bos_token_id = eos, by_name[gone]
    generation.eos_token_id, generation.forced_eos_token_id = [eos, by_name[kept]], eos
    generation.bad_words_ids = [[pad], [by_name[gone]], [by_name[kept], by_name[gone]], [by_name[kept], pad]]
    generation.suppress_tokens = [by_name[kept], by_name["a"]]
    generation.begin_suppress_tokens = [by_name[gone]]
    generation.sequence_bias = [[[by_name[kept]], -1.0]]
    trimmed, its_tokenizer = trim_vocabulary(parent, tokenizer, *FEW)
    new = its_tokenizer.get_vocab()
    config, search = trimmed.config, trimmed.generation_config
    assert (config.pad_token_id, config.decoder_start_token_id, config.eos_token_id) == (new["<pad>"], new["<pad>"], 0)
    assert (search.pad_token_id, search.decoder_start_token_id) == (new["<pad>"], new["<pad>"])
    assert config.bos_token_id == new[gone]  # a configuration names it, so it stays
    assert search.eos_token_id == [0, new[kept]]
    assert search.bad_words_ids == [[new["<pad>"]], [new[gone]], [new[kept], new[gone]], [new[kept], new["<pad>"]]]
    assert search.suppress_tokens == [new[kept], new["a"]]
    assert search.sequence_bias == [[[new[kept]], -1.0]]
    old.bos_token_id = None
    trimmed, its_tokenizer = trim_vocabulary(parent, tokenizer, *FEW)
    new = its_tokenizer.get_vocab()
    assert gone not in new
    assert trimmed.generation_config.bad_words_ids == [[new["<pad>"]], [new[kept], new["<pad>"]]]
    assert trimmed.generation_config.begin_suppress_tokens is None


@pytest.mark.parametrize("vocabulary", ["joint", "separate"])
def test_added_tokens_codes_and_padding_amid_the_vocabulary_stay(tmp_path, vocabulary):
    parent = odd_tokenizer(tmp_path / "parent", vocabulary)
    size = max(parent.get_vocab().values()) + 1
    fields = {"decoder_vocab_size": size, **SEPARATE} if vocabulary == "separate" else {}
    model = model_of(parent, vocab_size=size, **fields)
    texts, targets = [">>eng<< a b <term> a", "b"], ["u v <term>"]
    trimmed, tokenizer = trim_vocabulary(model, parent, texts, targets, characters="text")
    for pair in ((parent, tokenizer), (parent, MarianTokenizer.from_pretrained(saved(tokenizer, tmp_path / "saved")))):
        for side, given in zip(TEXT_SIDES, (texts, targets), strict=True):
            assert tokens(pair[0], given, side) == tokens(pair[1], given, side)
    specials = {"</s>", "<unk>", "<pad>", ">>eng<<", "<term>"}
    extreme = {"▁z", "▁f"}  # the piece with the lowest score stays, too
    source = {"▁", "a", "b", *specials}
    expected = {"joint": (source | {"u", "v"},) * 2, "separate": (source, {"▁", "u", "v", *specials})}[vocabulary]
    for side, least in zip(TEXT_SIDES, expected, strict=True):
        assert least <= entries_of(tokenizer, side).keys()
        left = entries_of(tokenizer, side).keys() - least
        assert len(left) <= 4, left | extreme
    for token in specials:
        ids = {entries_of(tokenizer, side)[token] for side in TEXT_SIDES}
        assert len(ids) == 1, token
    for side, rows in embedding_rows(trimmed).items():
        assert sorted(entries_of(tokenizer, side).values()) == list(range(rows))
    assert trimmed.config.pad_token_id == tokenizer.pad_token_id
    old, new = (model_.model.get_decoder().embed_tokens.weight for model_ in (model, trimmed))
    for token, index in entries_of(tokenizer, "target").items():
        assert torch.equal(new[index], old[entries_of(parent, "target")[token]]), token


def test_codes_of_languages_stay_whether_the_text_has_them_or_not(tmp_path):
    sides = [[">>deu<< a b c", ">>fra<< a b d", "a b e"] * 4, ["u v w x y z"] * 4]
    parent = train_tokenizer(*sides, tmp_path, vocab_size=10, source_lang="aa", target_lang="zz")
    text = [">>deu<< a b", "b"]
    _, tokenizer = trim_vocabulary(model_of(parent), parent, text, ["u v"], characters="text")
    assert tokens(tokenizer, text, "source") == tokens(parent, text, "source")
    assert tokens(tokenizer, [">>fra<< a"], "source")[0][0] == ">>fra<<"
    assert tokenizer.supported_language_codes == parent.supported_language_codes == [">>deu<<", ">>fra<<"]
    assert len(tokenizer) < len(parent)


def saved(part, folder):
    part.save_pretrained(folder)
    return folder


# How much stays


def test_a_second_trim_by_the_same_text_changes_nothing(tokenizer_of, separate):
    for tokenizer, kind in ((tokenizer_of("unigram"), "rs"), (tokenizer_of("bpe"), "rs"), (separate, "rs-two-tables")):
        for characters in ("all", "text"):
            once = trim_vocabulary(parent_of(kind, tokenizer), tokenizer, *FEW, characters=characters)
            plan = plan_trim(*once, *FEW, characters=characters)
            assert removed_entries(once[0], plan) == {"source": 0, "target": 0}
            model, twice = trim_vocabulary(*once, *FEW, characters=characters)
            assert twice.encoder == once[1].encoder
            assert getattr(twice, "target_encoder", None) == getattr(once[1], "target_encoder", None)
            for side in ("spm_source", "spm_target"):
                models = [getattr(each, side).serialized_model_proto() for each in (once[1], twice)]
                assert models[0] == models[1]
            states = model.state_dict(), once[0].state_dict()
            assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


def test_coverage_keeps_the_most_frequent_pieces(separate):
    model = parent_of("marian-two-tables", separate)
    plans = {share: plan_trim(model, separate, *FEW, coverage=share) for share in (0.8, 0.95, 1.0)}
    for side, texts in zip(TEXT_SIDES, FEW, strict=True):
        sizes = [len(plan.ids[side]) for plan in plans.values()]
        assert sizes == sorted(set(sizes))
        counts = count_tokens(separate, texts, target=side == "target")
        for share, plan in plans.items():
            kept = {token: number for token, number in counts.items() if token in plan.tokens[side]}
            assert share <= sum(kept.values()) / counts.total() == plan.covered[side]
            longer = [number for token, number in kept.items() if len(token) > 1]
            gone = [number for token, number in counts.items() if token not in kept]
            assert max(gone, default=0) <= min(longer)
            if share < 1:  # no more than it takes
                assert (sum(kept.values()) - min(longer)) / counts.total() < share


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_a_maximum_is_kept_and_filled(tokenizer_of, kind):
    parent = tokenizer_of(kind)
    whole = len(plan_trim(model_of(parent), parent, *FEW).ids["source"])
    with pytest.raises(ValueError, match=r"max_vocabulary must be at least \d+, got 5: .*Raise it") as error:
        plan_trim(model_of(parent), parent, *FEW, max_vocabulary=5)
    least = int(re.search(r"at least (\d+)", str(error.value))[1])
    assert len(plan_trim(model_of(parent), parent, *FEW, max_vocabulary=least).ids["source"]) == least
    for maximum in (least + 50, whole - 20):
        _, trimmed = trim_vocabulary(model_of(parent), parent, *FEW, max_vocabulary=maximum)
        assert maximum - 12 <= len(trimmed) <= maximum
        unknown = [sum(row.count("<unk>") for row in tokens(its, FEW[0], "source")) for its in (parent, trimmed)]
        assert unknown[0] == unknown[1]
    assert len(plan_trim(model_of(parent), parent, *FEW, max_vocabulary=10**6).ids["source"]) == whole
    fewer = plan_trim(model_of(parent), parent, ["彼"], ["he"], characters="text", max_vocabulary=least - 200)
    assert len(fewer.ids["source"]) < 30


def test_a_maximum_keeps_the_parts_of_the_words_that_go(tokenizer_of):
    """The text is written with fewer tokens than by the most frequent ones alone, as SentencePiece itself counts."""
    parent = tokenizer_of("unigram")
    model, texts = model_of(parent), list(SIDES.values())
    plan = plan_trim(model, parent, *texts, max_vocabulary=1500)
    counts = {
        side: count_tokens(parent, part, target=side == "target") for side, part in zip(TEXT_SIDES, texts, strict=True)
    }
    shares = {
        token: sum(each[token] / each.total() for each in counts.values()) for token in set().union(*counts.values())
    }
    least = plan_trim(model, parent, ["彼"], ["he"]).tokens  # special tokens and single characters
    free = sorted(shares.keys() - least["source"], key=shares.get, reverse=True)
    frequent = least["source"] | set(free[: 1500 - len(entries_of(parent, "source").keys() & least["source"])])
    assert abs(len(frequent & entries_of(parent, "source").keys()) - len(plan.ids["source"])) < 5
    lengths = {"pruned": 0, "frequent": 0}
    for side, part in zip(TEXT_SIDES, texts, strict=True):
        whole = getattr(parent, f"spm_{side}").serialized_model_proto()
        for name, kept in (("pruned", plan.tokens[side]), ("frequent", frequent)):
            smaller = sentencepiece.SentencePieceProcessor(model_proto=without_pieces(whole, kept))
            lengths[name] += sum(map(len, smaller.encode(part)))
            subwords, marked = Subwords(whole), "\ue000"  # behind an unknown character, as in the middle of a word
            known = [token for token in counts[side] if set(token) <= subwords.scores.keys()]
            for token in sorted(set(known) - kept)[:200]:
                written = smaller.encode(marked + token.replace("▁", " "), out_type=str)
                behind = next(place for place, piece in enumerate(written, start=1) if marked in piece)
                assert subwords.spelled(token, kept)[0] == written[behind:]
    assert lengths["pruned"] < 0.98 * lengths["frequent"]


# Files


def test_what_is_saved_loads_copies_and_translates(trained_parent, tmp_path):
    trimmed, tokenizer = trim_vocabulary(*trained_parent, *FEW)
    for part in (trimmed, tokenizer):
        part.save_pretrained(tmp_path)
    config = (tmp_path / "tokenizer_config.json").read_text()
    assert "trimmed-" not in config
    assert "is_local" not in config
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for other in (loaded, copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert encode(other, FEW[0]) == encode(tokenizer, FEW[0])
        assert encode(other, FEW[1], target=True) == encode(tokenizer, FEW[1], target=True)
    assert (loaded.source_lang, loaded.target_lang, loaded.model_max_length) == ("ja", "en", 256)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert type(model) is RSMarianForConditionalGeneration
    assert_equal_logits(trimmed.eval(), tokenizer, model.eval(), loaded)
    translator = pipeline("translation", model=str(tmp_path))
    decoding = DecodingArguments(num_beams=5, max_new_tokens=40)
    expected = translate(trimmed, tokenizer, FEW[0][:4], decoding, progress=False)
    assert [each["translation_text"] for each in translator(FEW[0][:4], max_new_tokens=40)] == expected


# What cannot be trimmed


@pytest.mark.parametrize(
    ("sources", "targets", "options", "message"),
    [
        ([], FEW[1], {}, "there is no source text to trim the vocabulary to: give some sentences"),
        (FEW[0], ["", " "], {}, "there is no target text"),
        (FEW[0], ["Это совсем другой язык."], {}, r"\d+% of the characters of the target text are unknown .*'\w+'"),
        (FEW[0], FEW[0], {}, r"of the characters of the target text are unknown .*exchanged, put the source first"),
        (*FEW, {"coverage": 0.0}, "coverage must be more than 0 and at most 1, got 0.0"),
        (*FEW, {"coverage": 1.1}, "coverage must be more than 0 and at most 1, got 1.1"),
        (*FEW, {"characters": "some"}, "characters must be one of all, text, got 'some'"),
    ],
)
def test_a_text_or_an_option_that_does_not_fit_is_named(tokenizer_of, sources, targets, options, message):
    tokenizer = tokenizer_of("unigram")
    with pytest.raises(ValueError, match=message):
        trim_vocabulary(model_of(tokenizer), tokenizer, sources, targets, **options)


def test_models_and_tokenizers_of_another_kind_are_refused(tokenizer_of, separate, tmp_path):
    tokenizer = tokenizer_of("unigram")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    with pytest.raises(ValueError, match="is trimmed with its MarianTokenizer, got a Bert"):
        trim_vocabulary(model_of(tokenizer), BertTokenizer(str(tmp_path / "vocab.txt")), *FEW)
    with pytest.raises(TypeError, match="expected a MarianMTModel or an RSMarian, got a Linear"):
        trim_vocabulary(torch.nn.Linear(2, 2), tokenizer, *FEW)
    with pytest.raises(ValueError, match="they do not belong together"):
        trim_vocabulary(marian(), tokenizer, *FEW)
    with pytest.raises(ValueError, match="the tokenizer has two vocabularies, the model one"):
        trim_vocabulary(model_of(separate), separate, *FEW)
    model = model_of(tokenizer)
    model.model.encoder.layers[0].fc1.adapter = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"other tensors than Marian's: .*fc1\.adapter.*; merge or unload adapters"):
        trim_vocabulary(model, tokenizer, *FEW)
