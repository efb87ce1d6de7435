"""Lexical shortlists: what is in them, and that translations with them are those of a masked softmax."""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import pytest
import torch
from conftest import odd_tokenizer, script
from oracle import marian, rs_model
from reverse_task import reverse_pairs
from transformers import LogitsProcessor, LogitsProcessorList

from rs_transformer.attention.alignment import count_links
from rs_transformer.decoding import DecodingArguments, TransformersEngine
from rs_transformer.export import ctranslate2 as ctranslate2_export
from rs_transformer.shortlist import (
    LEAST_PROBABILITY,
    Shortlist,
    ShortlistEngine,
    coverage,
    make_shortlist,
    restricted,
)
from rs_transformer.tokenization import encode, entries_of, train_tokenizer, vocabulary
from rs_transformer.training.model import config_from_tokenizer

export = script("export")
SENTENCES = [source for source, _ in reverse_pairs(12, seed=11)]
SIDES = ("source", "target")
SIZES = {"encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 64}


class Masked(LogitsProcessor):
    """The oracle: the whole softmax, in which all but some entries are barred."""

    def __init__(self, kept):
        self.kept = torch.tensor(kept)

    def __call__(self, input_ids, scores):
        masked = torch.full_like(scores, -torch.inf)
        masked[:, self.kept] = scores[:, self.kept]
        return masked


def some_shortlist(tokenizer, candidates=2, frequent=2):
    """Each source piece becomes two target pieces, drawn by chance."""
    sides = [[i for t, i in vocabulary(tokenizer, side).items() if t not in ("</s>", "<unk>")] for side in SIDES]
    generator = torch.Generator().manual_seed(0)
    links = {
        source: Counter(
            {sides[1][i]: 3 - n for n, i in enumerate(torch.randperm(len(sides[1]), generator=generator)[:3])}
        )
        for source in sides[0]
    }
    return make_shortlist(tokenizer, links, Counter(sides[1][:4]), candidates=candidates, frequent=frequent)


@pytest.mark.parametrize("kind", [rs_model, marian], ids=["rs", "marian"])
@pytest.mark.parametrize(
    "search", [{}, {"num_beams": 3}, {"do_sample": True, "num_beams": 1}], ids=["greedy", "beam", "sampling"]
)
def test_generate_over_a_shortlist_is_that_of_a_masked_softmax(tokenizer, kind, search):
    model = kind(**config_from_tokenizer(tokenizer))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs = tokenizer(SENTENCES[:4], return_tensors="pt", padding=True)
    kept = some_shortlist(tokenizer).entries(inputs["input_ids"][:2].flatten().tolist())
    assert len(kept) < len(tokenizer) - 2
    options = {"max_new_tokens": 9, "output_logits": True, "return_dict_in_generate": True, **search}
    found = []
    for part, more in (
        (restricted(model, kept), {}),
        (model, {"logits_processor": LogitsProcessorList([Masked(kept)])}),
    ):
        torch.manual_seed(3)
        found.append(part.generate(**inputs, **options, **more))
    assert torch.equal(*(each.sequences for each in found))
    assert set(found[0].sequences.flatten().tolist()) <= {*kept, tokenizer.pad_token_id}
    ours, theirs = (torch.stack(each.logits)[..., kept].log_softmax(-1) for each in found)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_threads_translate_with_shortlists_of_their_own(tokenizer):
    model = rs_model(**config_from_tokenizer(tokenizer))
    shortlist, decoding = some_shortlist(tokenizer), DecodingArguments(num_beams=2, max_new_tokens=8)
    engines = [ShortlistEngine(model, tokenizer, decoding, shortlist=shortlist)] * 4
    engines += [TransformersEngine(model, tokenizer, decoding)] * 4
    batches = [[tokenizer(sentence)["input_ids"]] for sentence in SENTENCES[:4]] * 2
    expected = [engine.translate_batch(batch) for engine, batch in zip(engines, batches, strict=True)]
    assert expected[:4] != expected[4:]
    with ThreadPoolExecutor(8) as pool:
        assert (
            list(pool.map(lambda pair: pair[0].translate_batch(pair[1]), zip(engines, batches, strict=True)))
            == expected
        )


@pytest.mark.parametrize("vocabulary_kind", ["joint", "separate"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_ctranslate2_says_what_the_shortlist_has_and_nothing_else(tmp_path, vocabulary_kind, num_beams):
    """With padding amid the vocabulary, tokens that were added, a code, and embeddings filled up to a multiple."""
    tokenizer = odd_tokenizer(tmp_path / "model", vocabulary_kind)
    model = rs_model(**config_from_tokenizer(tokenizer))
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    if vocabulary_kind == "separate":
        model.resize_decoder_token_embeddings(64)
    model.save_pretrained(tmp_path / "model")
    ctranslate2_export.convert(str(tmp_path / "model"), tmp_path / "ct2")
    decoding = DecodingArguments(num_beams=num_beams, length_penalty=0.0, max_new_tokens=9)
    whole = ctranslate2_export.load(tmp_path / "ct2", tokenizer, decoding)
    batches = [[tokenizer(text)["input_ids"]] for text in (">>eng<< a f <term> b", "c d e <term>", "a", "f f b", "d")]
    (said,) = whole.translate_batch(batches[0])
    barred = encode(tokenizer, said, target=True)[0][-2]  # a random model may say the same whatever the source
    shortlist = some_shortlist(tokenizer, candidates=2, frequent=num_beams)
    rows = {source: {t: p for t, p in row.items() if t != barred} for source, row in shortlist.candidates.items()}
    shortlist = Shortlist(rows, shortlist.end)
    ctranslate2_export.write_shortlist(shortlist, tmp_path / "ct2", tokenizer)
    engine = ctranslate2_export.load(tmp_path / "ct2", tokenizer, decoding, use_shortlist=True)
    oracle = ShortlistEngine(model, tokenizer, decoding, shortlist=shortlist)
    for batch in [*batches, list(chain(*batches))]:
        assert engine.translate_batch(batch) == oracle.translate_batch(batch)
    assert engine.translate_batch(batches[0]) != [said]


def test_without_its_file_a_shortlist_is_asked_for(tokenizer, tmp_path):
    for part in (rs_model(**config_from_tokenizer(tokenizer), **SIZES), tokenizer):
        part.save_pretrained(tmp_path / "model")
    ctranslate2_export.convert(str(tmp_path / "model"), tmp_path / "ct2")
    with pytest.raises(ValueError, match=r"has no shortlist \(vmap.txt\)"):
        ctranslate2_export.load(tmp_path / "ct2", tokenizer, DecodingArguments(), use_shortlist=True)


def test_a_shortlist_has_the_probable_the_frequent_the_piece_itself_and_the_end(tokenizer):
    ids = vocabulary(tokenizer, "target")
    a, b, c, d = (ids[f"▁{letter}"] for letter in "abcd")
    links = {a: Counter({b: 6, c: 3, d: 1})}
    made = make_shortlist(tokenizer, links, Counter({d: 5, c: 1}), candidates=2, frequent=1)
    assert made.candidates[a] == {b: 0.6, c: 0.3, a: LEAST_PROBABILITY}
    assert made.candidates[b] == {b: LEAST_PROBABILITY}
    assert set(made.candidates[made.end]) == {ids["</s>"], ids["<unk>"], d}
    assert made.entries([a, made.end]) == sorted({ids["</s>"], ids["<unk>"], a, b, c, d})
    assert make_shortlist(tokenizer, links, Counter(), min_probability=0.5).candidates[a].keys() == {b, a}
    found = coverage(tokenizer, made, [[a, made.end], [b, made.end]], [[b, c, ids["</s>"]], [b, c, ids["</s>"]]])
    assert found == {"entries": 5, "coverage": 0.75}


@pytest.mark.parametrize("vocabulary_kind", ["joint", "separate"])
def test_a_shortlist_comes_back_from_its_file_and_not_with_another_vocabulary(tmp_path, vocabulary_kind):
    tokenizer = odd_tokenizer(tmp_path / "model", vocabulary_kind)
    shortlist = some_shortlist(tokenizer)
    shortlist.save(tmp_path / "lex.s2t", tokenizer)
    back = Shortlist.load(tmp_path / "lex.s2t", tokenizer)
    assert back.end == shortlist.end
    assert back.candidates == {source: pytest.approx(row, rel=1e-5) for source, row in shortlist.candidates.items()}
    other = train_tokenizer(["a b c"], ["x y z"], tmp_path / "t", source_lang="a", target_lang="b", vocab_size=7)
    with pytest.raises(ValueError, match="is a shortlist of another vocabulary: the tokenizer has no"):
        Shortlist.load(tmp_path / "lex.s2t", other)
    with pytest.raises(ValueError, match="has the target id 60, the model 48 entries"):
        restricted(rs_model(), [1, 60])
    (tmp_path / "lex.s2t").write_text("x y")
    with pytest.raises(ValueError, match="line 1 is not `target source probability`: 'x y'"):
        Shortlist.load(tmp_path / "lex.s2t", tokenizer)


def test_links_go_to_pieces_and_not_to_special_tokens_or_codes(tmp_path):
    tokenizer = odd_tokenizer(tmp_path, "joint")
    model = rs_model(**config_from_tokenizer(tokenizer))
    sides = [encode(tokenizer, [">>eng<< a f b", "c"]), encode(tokenizer, ["z v u", "w"], target=True)]
    links = count_links(model, tokenizer, *sides, predicted=3)
    silent = {entries_of(tokenizer, "source")[token] for token in (">>eng<<", "</s>", "<unk>", "<pad>")}
    assert links.keys() <= set(chain(*sides[0])) - silent
    expected = Counter(index for index in chain(*sides[1]) if index not in silent)
    for source, target in zip(*sides, strict=True):  # and what the model itself would say at each place
        logits = model(torch.tensor([source]), labels=torch.tensor([target])).logits[0]
        for row in logits.softmax(-1):
            expected.update(
                {index: row[index].item() for index in row.topk(3).indices.tolist() if index not in silent}
            )
    counted = sum(links.values(), Counter())
    assert counted == {index: pytest.approx(count, rel=1e-4) for index, count in expected.items()}
    assert model.config._attn_implementation == "sdpa"


def options(model, output, task, *more):
    languages = ["--source_lang", "fw", "--target_lang", "bw", "--test_file", task["test"], "--max_new_tokens", 16]
    return [model, "--output_dir", output, *languages, "--shortlist", *more]


@pytest.fixture(scope="module")
def random_model(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("random") / "model"
    for part in (rs_model(**config_from_tokenizer(tokenizer), **SIZES), tokenizer):
        part.save_pretrained(folder)
    return folder


def test_export_reports_coverage_and_what_stays_the_same(random_model, task, tmp_path, capsys):
    sizes = ["--shortlist_candidates", 3, "--shortlist_frequent", 2, "--max_train_samples", 200]
    pairs = ["--train_file", task["train"], *sizes]
    export(*options(random_model, tmp_path / "ct2", task, "--to", "ctranslate2", *pairs))
    record = json.loads((tmp_path / "ct2" / "export.json").read_text())
    assert record["shortlist"]["pairs"] == 200
    assert 0 < record["shortlist"]["coverage"] <= 1
    assert 3 < record["shortlist"]["entries"] < 26
    for row in record["verification"]:
        assert row["same"] == 1
        assert 0 <= row["without_shortlist"]["same"] <= 1
        assert {"bleu", "whole_bleu"} <= row["without_shortlist"].keys()
    assert (tmp_path / "ct2" / "vmap.txt").read_text().startswith("\t</s> <unk> ")
    printed = capsys.readouterr().out
    assert "shortlist of 200 pairs: " in printed
    assert f"{record['shortlist']['coverage']:.1%} of the references' pieces among them" in printed
    assert "of the translations are the same without shortlist; BLEU" in printed


@pytest.mark.parametrize(
    ("lines", "more", "message"),
    [
        (None, [], "a shortlist is made of a corpus: give train_file or dataset_name, source_lang and target_lang"),
        ([("", "a")], [], "the train split has no pair for a shortlist: all of its 1 are blank or too long"),
        (
            [("ω ψ χ", "a b")] * 3,
            [],
            r"50% of the pieces of the train split's source are unknown to the model: .* language, fw",
        ),
        ([("a", "b")], ["--to", "onnx"], "there is no shortlist for to=onnx, only for ctranslate2 and marian"),
        ([("a", "b")], ["--shortlist_candidates", -1], "shortlist_candidates must be at least 0, got -1"),
    ],
)
def test_a_corpus_that_gives_no_shortlist_is_named(random_model, task, tmp_path, lines, more, message):
    train = []
    if lines is not None:
        text = "".join(json.dumps({"translation": {"fw": s, "bw": t}}) + "\n" for s, t in lines)
        (tmp_path / "train.jsonl").write_text(text)
        train = ["--train_file", tmp_path / "train.jsonl"]
    with pytest.raises(ValueError, match=message):
        export(*options(random_model, tmp_path / "out", task, "--to", "ctranslate2", *train, *more))
    assert not (tmp_path / "out").exists()
