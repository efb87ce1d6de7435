"""What is read off the attention of each step and head, and the measures of it."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import scipy.stats
import torch
from oracle import rs_model, unrolled_marian
from reverse_task import reverse_pairs
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

from rs_transformer.attention import collection
from rs_transformer.attention.collection import KINDS, STATES, attention_statistics, collect_attention
from rs_transformer.attention.measures import (
    attention_measures,
    bootstrap_mean,
    entropy,
    hidden_state_measures,
    jackknife_cka,
    linear_cka,
)
from rs_transformer.decoding import DecodingArguments
from rs_transformer.ensemble import EnsembleForSeq2SeqLM
from rs_transformer.tokenization import train_tokenizer
from rs_transformer.training.model import config_from_tokenizer

SOURCES, TARGETS = (list(side)[:5] for side in zip(*reverse_pairs(40, seed=7), strict=True))


@pytest.fixture
def model(tokenizer):
    return rs_model(**config_from_tokenizer(tokenizer), encoder_layers=3, decoder_layers=2)


@pytest.mark.parametrize(
    "fields",
    [
        {"encoder_layers": 6, "decoder_layers": 4},
        {"encoder_unique_layers": 2, "decoder_unique_layers": 2, "layer_sharing": "sequence", "decoder_layers": 3},
        {"step_layer_norms": True, "step_embeddings": True, "step_biases": True, "step_adapter_rank": 2},
    ],
    ids=["one-layer", "two-layers", "steps-told-apart"],
)
def test_arrays_equal_those_of_the_unrolled_marian(tokenizer, fields):
    model = rs_model(**{**config_from_tokenizer(tokenizer), "encoder_layers": 3, "decoder_layers": 2, **fields})
    ours, marians = (collect_attention(m, tokenizer, SOURCES, TARGETS) for m in (model, unrolled_marian(model)))
    for mine, stock in zip(ours, marians, strict=True):
        for name in (*KINDS, *STATES):
            np.testing.assert_allclose(getattr(mine, name), getattr(stock, name), atol=2e-5)
        source, target = len(mine.encoder_tokens), len(mine.decoder_tokens)
        encoder, decoder, heads = model.config.encoder_layers, model.config.decoder_layers, 4
        assert mine.encoder_attentions.shape == (encoder, heads, source, source)
        assert mine.decoder_attentions.shape == (decoder, heads, target, target)
        assert mine.cross_attentions.shape == (decoder, heads, target, source)
        assert mine.encoder_hidden_states.shape == (encoder + 1, source, 32)
        assert mine.decoder_hidden_states.shape == (decoder + 1, target, 32)


def test_rows_sum_to_one_and_padding_gets_nothing(model, tokenizer):
    together = collect_attention(model, tokenizer, SOURCES, TARGETS)
    assert len({len(sentence.encoder_tokens) for sentence in together}) > 1
    for index, sentence in enumerate(together):
        for kind in KINDS:
            np.testing.assert_allclose(getattr(sentence, kind).sum(-1), 1, atol=1e-5)
        assert np.all(np.triu(sentence.decoder_attentions, 1) == 0)
        (alone,) = collect_attention(model, tokenizer, SOURCES[index : index + 1], TARGETS[index : index + 1])
        for name in (*KINDS, *STATES):
            np.testing.assert_allclose(getattr(sentence, name), getattr(alone, name), atol=2e-5)


def test_tokens_stand_at_their_rows_and_columns(model, tokenizer):
    (sentence,) = collect_attention(model, tokenizer, ["abc"], ["cba"])
    assert sentence.encoder_tokens == [*tokenizer.tokenize("abc"), "</s>"]
    assert sentence.output_tokens == [*tokenizer.tokenize("cba"), "</s>"]
    assert sentence.decoder_tokens == ["<pad>", *sentence.output_tokens[:-1]]
    assert sentence.tokens("cross_attentions") == (sentence.output_tokens, sentence.encoder_tokens)
    assert sentence.tokens("decoder_attentions") == (sentence.decoder_tokens, sentence.decoder_tokens)


def test_tokens_of_separate_vocabularies_are_each_sides_own(tmp_path):
    sides = [["abcdefg"] * 4, ["tuvwxyz"] * 4]
    options = {"source_lang": "aa", "target_lang": "zz", "vocab_size": 11, "vocabulary": "separate"}
    tokenizer = train_tokenizer(*sides, tmp_path, **options)
    model = rs_model(**config_from_tokenizer(tokenizer), encoder_layers=1, decoder_layers=1)
    (sentence,) = collect_attention(model, tokenizer, ["gab"], ["zxt"])
    assert "".join(sentence.encoder_tokens) == "▁gab</s>"
    assert "".join(sentence.output_tokens) == "▁zxt</s>"


def test_attention_along_its_own_translation_is_what_generate_attends_to(trained):
    model = AutoModelForSeq2SeqLM.from_pretrained(trained, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(trained)
    greedy = DecodingArguments(num_beams=1, max_new_tokens=16)
    sentences = collect_attention(model, tokenizer, SOURCES, decoding=greedy)
    for source, sentence in zip(SOURCES, sentences, strict=True):
        generated = model.generate(
            **tokenizer(source, return_tensors="pt"),
            **greedy.generate_kwargs(model),
            return_dict_in_generate=True,
            output_attentions=True,
        )
        assert sentence.output_tokens == tokenizer.convert_ids_to_tokens(generated.sequences[0, 1:].tolist())
        # A tuple for each token of a tuple for each step, (batch, heads, 1, keys).
        cross = torch.stack([torch.stack(steps)[:, 0, :, 0] for steps in generated.cross_attentions], dim=2)
        np.testing.assert_allclose(sentence.cross_attentions, cross.numpy(), atol=1e-5)


def test_a_model_is_left_as_it_was(model, tokenizer):
    model.set_attn_implementation("sdpa")
    model.train()
    collect_attention(model, tokenizer, SOURCES, TARGETS)
    assert model.config._attn_implementation == "sdpa"
    assert model.training


def test_threads_look_into_a_model_that_others_translate_with(model, tokenizer):
    model.set_attn_implementation("sdpa")
    model.eval()
    inputs = tokenizer(SOURCES, return_tensors="pt", padding=True)

    def look():
        found = collect_attention(model, tokenizer, SOURCES, TARGETS)
        return np.concatenate([sentence.cross_attentions.ravel() for sentence in found])

    def translate():
        return model(**inputs, labels=inputs["input_ids"]).logits.detach().numpy()

    expected = look(), translate()
    with ThreadPoolExecutor(4) as pool:
        futures = [
            (pool.submit(task), its) for _ in range(20) for task, its in zip((look, translate), expected, strict=True)
        ]
    for future, its in futures:
        np.testing.assert_allclose(future.result(), its, atol=1e-5)


@pytest.mark.parametrize(
    ("sources", "targets", "message"),
    [
        ([], None, "there is no sentence"),
        (["abc", " "], None, "sentence 2 is empty"),
        (["abc", None], None, "sentence 2 is empty"),
        (["\u200b", "abc"], None, r"sentence 1 is empty; leave it out: '.u200b'"),
        (["abc", "bcd"], ["cba", ""], "reference 2 is empty"),
        (["abc"], ["cba", "dcb"], "1 sentences have 2 references"),
        (
            ["abc", "ab " * 40],
            None,
            r"sentence 2 has \d+ tokens, the model takes 32: split it or leave it out",
        ),
        (["abc"], ["ab " * 40], r"reference 1 has \d+ tokens, the model takes 32"),
    ],
)
def test_sentences_that_cannot_be_looked_into_are_named(model, tokenizer, sources, targets, message):
    with pytest.raises(ValueError, match=message):
        collect_attention(model, tokenizer, sources, targets)


def test_a_model_that_gives_no_attentions_is_named(model, tokenizer):
    with pytest.raises(ValueError, match="EnsembleForSeq2SeqLM gives no encoder_attentions"):
        collect_attention(EnsembleForSeq2SeqLM([model]), tokenizer, SOURCES, TARGETS)


SMALL = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 64}


def other_model(kind, tokenizer, **fields):
    """A small model of another architecture for a tokenizer of ours."""
    ids = config_from_tokenizer(tokenizer)
    names = ("vocab_size", "pad_token_id", "eos_token_id", "decoder_start_token_id", "forced_eos_token_id")
    torch.manual_seed(0)
    return AutoModelForSeq2SeqLM.from_config(
        AutoConfig.for_model(kind, **{name: ids[name] for name in names}, **fields)
    )


@pytest.mark.parametrize(
    ("kind", "fields"), [("bart", SMALL), ("m2m_100", SMALL), ("t5", {"d_model": 32, "num_layers": 2, "num_heads": 4})]
)
def test_other_architectures_are_looked_into_too(tokenizer, kind, fields):
    model = other_model(kind, tokenizer, **fields).eval()
    for targets in (TARGETS, None):
        sentences = collect_attention(
            model, tokenizer, SOURCES, targets, DecodingArguments(num_beams=2, max_new_tokens=9)
        )
        for sentence in sentences:
            for kind in KINDS:
                np.testing.assert_allclose(getattr(sentence, kind).sum(-1), 1, atol=1e-5)
            assert sentence.decoder_tokens == ["<pad>", *sentence.output_tokens[:-1]]


def test_weights_that_are_not_of_each_position_for_each_other_are_refused(tokenizer):
    fields = {"attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64}
    model = other_model("led", tokenizer, **{**SMALL, **fields})
    with pytest.raises(ValueError, match=r"the encoder_attentions of LED\w+ are no weights of each position"):
        collect_attention(model, tokenizer, SOURCES, TARGETS)


def test_translations_that_run_on_are_looked_into_in_smaller_batches(model, tokenizer, monkeypatch):
    greedy = DecodingArguments(num_beams=1, max_new_tokens=30)
    expected = collect_attention(model, tokenizer, SOURCES, decoding=greedy)
    sizes = []
    forced_pass = collection._forced_pass
    monkeypatch.setattr(collection, "_forced_pass", lambda *args: sizes.append(len(args[2])) or forced_pass(*args))
    longest = max(len(sentence.output_tokens) for sentence in expected)
    monkeypatch.setattr(collection, "BATCH_BYTES", 2 * 4 * 3 * 3 * 4 * longest**2)
    found = collect_attention(model, tokenizer, SOURCES, decoding=greedy)
    assert sizes == [2, 2, 1]
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine.cross_attentions, theirs.cross_attentions, atol=2e-5)


def test_entropy_is_scipys(model, tokenizer):
    for sentence in collect_attention(model, tokenizer, SOURCES, TARGETS):
        for kind in KINDS:
            attention = getattr(sentence, kind)
            bits = scipy.stats.entropy(attention, base=2, axis=-1)
            np.testing.assert_allclose(entropy(attention), bits, atol=1e-5)
            rows = slice(1 if kind == "decoder_attentions" else 0, None)
            np.testing.assert_allclose(
                attention_measures(attention, kind)["entropy"], bits[..., rows].mean(-1), atol=1e-5
            )


def check(measures, **expected):
    for name, values in expected.items():
        np.testing.assert_allclose(measures[name], values, atol=1e-6, err_msg=name)


def test_measures_of_attention_that_one_can_work_out():
    uniform = attention_measures(np.full((2, 1, 4, 4), 0.25, np.float32), "encoder_attentions")
    check(uniform, entropy=2, normalized_entropy=1, diagonal_distance=(6 + 4 + 4 + 6) / 16, eos_mass=0.25)
    check(uniform, same_position_mass=0.25, step_cosine=1, mean_head_cosine=1)

    causal = np.tril(np.ones((4, 4), np.float32)) / np.arange(1, 5, dtype=np.float32)[:, None]
    causal = attention_measures(causal[None, None], "decoder_attentions")
    third = (1 / 2 + 1 / 3 + 1 / 4) / 3  # the first position has no choice
    check(causal, normalized_entropy=1, entropy=(1 + np.log2(3) + 2) / 3, start_mass=third, same_position_mass=third)
    assert "eos_mass" not in causal

    # Three rows over five keys: the diagonal is at keys 0, 2 and 4.
    aligned = np.zeros((2, 2, 3, 5), np.float32)
    aligned[0, :, [0, 1, 2], [0, 2, 4]] = 1
    aligned[1, :, :, 4] = 1
    aligned = attention_measures(aligned, "cross_attentions")
    check(aligned, entropy=0, diagonal_distance=[[0, 0], [2, 2]], eos_mass=[[1 / 3, 1 / 3], [1, 1]], step_cosine=1 / 3)
    assert "same_position_mass" not in aligned


def test_mean_head_cosine_does_not_depend_on_the_order_of_heads(model, tokenizer):
    attention = collect_attention(model, tokenizer, SOURCES, TARGETS)[0].cross_attentions
    shuffled = attention.copy()
    shuffled[1] = shuffled[1, [2, 0, 3, 1]]
    before, after = (attention_measures(a, "cross_attentions") for a in (attention, shuffled))
    np.testing.assert_allclose(before["mean_head_cosine"], after["mean_head_cosine"], rtol=1e-6)
    assert not np.allclose(before["step_cosine"], after["step_cosine"])


def test_hidden_states_at_a_fixed_point_have_cosine_one_and_no_change():
    states = np.array([[[1.0, 0.0], [0.0, 2.0]], [[0.0, 1.0], [0.0, 2.0]], [[0.0, 1.0], [0.0, 2.0]]])
    measures = hidden_state_measures(states)
    assert measures["cosine"] == pytest.approx([0.5, 1])
    assert measures["relative_change"] == pytest.approx([np.sqrt(2) / 2, 0])


def test_cka_is_debiased_and_blind_to_rotation_and_scale():
    generator = np.random.default_rng(0)
    first, other = generator.normal(size=(2, 60, 40))
    rotation = scipy.stats.ortho_group.rvs(40, random_state=0)
    assert linear_cka(first, 3 * first @ rotation + 5) == pytest.approx(1)
    assert abs(linear_cka(first, other)) < 0.1  # the usual estimator: 0.4

    def hsic(first, second):  # Song et al. 2012, equation 5
        first, second = (gram - np.diag(np.diag(gram)) for gram in (first @ first.T, second @ second.T))
        n, ones = len(first), np.ones(len(first))
        total = np.trace(first @ second) + (ones @ first @ ones) * (ones @ second @ ones) / ((n - 1) * (n - 2))
        return (total - 2 / (n - 2) * ones @ first @ second @ ones) / (n * (n - 3))

    mixed = first + other
    expected = hsic(first, mixed) / np.sqrt(hsic(first, first) * hsic(mixed, mixed))
    assert linear_cka(first, mixed) == pytest.approx(expected)
    with pytest.raises(ValueError, match="at least 4; got 3 and 3"):
        linear_cka(first[:3], other[:3])


def test_intervals_are_as_wide_as_theory_says():
    generator = np.random.default_rng(0)
    values = generator.normal(size=(400, 3)) * [1, 2, 3]
    estimate = bootstrap_mean(values)
    theory = 1.96 * values.std(0, ddof=1) / np.sqrt(400)
    np.testing.assert_allclose((estimate.high - estimate.low) / 2, theory, rtol=0.1)
    np.testing.assert_allclose(estimate.mean, values.mean(0))
    # Of 200 corpora the interval of CKA should hold the value of a very large one in about 95 of 100.
    mixing = generator.normal(size=(4, 4))

    def corpus(n):
        first = generator.normal(size=(n, 4))
        return np.stack([first, first @ mixing + generator.normal(size=(n, 4))])

    truth = linear_cka(*corpus(4000))
    estimates = [jackknife_cka(corpus(100)) for _ in range(200)]
    assert 0.88 < np.mean([e.low[0] < truth < e.high[0] for e in estimates]) <= 0.99


def test_statistics_are_the_means_of_the_sentences(model, tokenizer, monkeypatch):
    sources, targets = (list(side) for side in zip(*reverse_pairs(30, seed=3), strict=True))
    statistics = attention_statistics(model, tokenizer, sources, targets)
    sentences = collect_attention(model, tokenizer, sources, targets)
    for kind in KINDS:
        measures = [attention_measures(getattr(sentence, kind), kind) for sentence in sentences]
        for name, estimate in statistics.by_step[kind].items():
            values = np.nanmean([its[name] for its in measures], axis=0)
            if name != "mean_head_cosine":
                np.testing.assert_allclose(statistics.by_head[kind][name].mean, values)
                values = values.mean(-1)
            np.testing.assert_allclose(estimate.mean, values)
            assert np.all((estimate.low <= estimate.mean) & (estimate.mean <= estimate.high))
    assert statistics.sentences == 30
    # CKA takes a position of each sentence, of a thousand sentences at most.
    cka = {name: statistics.by_step[name]["cka"] for name in STATES}
    for estimate in cka.values():
        assert np.all((estimate.low < estimate.mean) & (estimate.mean < estimate.high))
    monkeypatch.setattr(collection, "CKA_SENTENCES", 15)
    half = attention_statistics(model, tokenizer, sources, targets)
    for name in STATES:
        every_other = np.stack([collection._draw(sentences[index], index)[name] for index in range(0, 30, 2)], axis=1)
        expected = [linear_cka(before, after) for before, after in pairwise(every_other)]
        np.testing.assert_allclose(half.by_step[name]["cka"].mean, expected, atol=1e-5)
        assert np.isnan(half.by_step[name]["cka"].low).all()  # of 15 sentences


def test_positions_that_cka_takes_are_spread_over_the_sentence(model, tokenizer):
    (sentence,) = collect_attention(model, tokenizer, SOURCES[:1], TARGETS[:1])
    states = sentence.encoder_hidden_states
    drawn = [collection._draw(sentence, index)["encoder_hidden_states"][0] for index in range(100)]
    positions = [int(np.abs(states[0] - row).sum(-1).argmin()) for row in drawn]
    assert set(positions) == set(range(states.shape[1]))


def test_a_decoder_that_reads_the_start_token_alone_has_no_self_attention_to_measure():
    measures = attention_measures(np.ones((2, 3, 1, 1), np.float32), "decoder_attentions")
    assert all(np.isnan(values).all() for values in measures.values())
    known = np.array([[1.0], [3.0]])
    values = np.stack([known, np.full((2, 1), np.nan), known + 1])
    np.testing.assert_allclose(bootstrap_mean(values).mean, known + 0.5)  # such a sentence does not count


def test_few_sentences_have_means_but_no_intervals(model, tokenizer):
    statistics = attention_statistics(model, tokenizer, ["abc"] * 3, ["cba"] * 3).to_dict()
    entropy = statistics["by_step"]["cross_attentions"]["entropy"]
    assert all(value is not None for value in entropy["mean"])
    assert entropy["low"] == entropy["high"] == [None, None]
    assert statistics["by_step"]["decoder_hidden_states"]["cka"]["mean"] == [None, None]
