"""A teacher's distributions for a student with a part of its vocabulary."""

import pytest
import torch
from conftest import ROOT
from datasets import Dataset
from subwords import SIDES, make_tokenizer
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from rs_transformer import trim_vocabulary
from rs_transformer.distillation.cache import cache_top_k
from rs_transformer.distillation.resegmentation import Resegmentation, is_part
from rs_transformer.tokenization import encode

ODD = {
    "source": ["猫😀が好き😀😀", ">>fra<< 猫", "</s> ▁ <unk>", "ｶﾅ １２"],
    "target": ["a 😀 cat", "</s> x", "☃☃ ▁", "é"],
}


@pytest.fixture(scope="module")
def teacher():
    folder = ROOT / "hub_cards" / "marian-ja-en"
    return AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def part(teacher):
    """The tokenizer with half of the pieces."""
    return trim_vocabulary(*teacher, *SIDES.values(), max_vocabulary=3400)[1]


def ids_of(tokenizer, texts, side):
    return encode(tokenizer, texts, target=side == "target")


@pytest.mark.parametrize("side", SIDES)
def test_the_teacher_reads_the_text_as_it_would_by_itself(teacher, part, side):
    texts, resegmentation = [*SIDES[side][:200], *ODD[side]], Resegmentation(part, teacher[1])
    ours, theirs = ids_of(part, texts, side), ids_of(teacher[1], texts, side)
    assert sum(map(len, ours)) > 1.05 * sum(map(len, theirs))
    assert [resegmentation.teacher_ids(ids, side) for ids in ours] == theirs


def test_probabilities_are_the_teachers_where_both_begin_a_piece_and_certain_in_between(teacher, part):
    (model, whole), resegmentation = teacher, Resegmentation(part, teacher[1])
    written = {  # what the student begins a word with that is a piece of the teacher's
        index: part.get_vocab()[part.spm_target.encode(token.lstrip("▁"), out_type=str)[0]]
        for token, index in whole.get_vocab().items()
        if token[0] == "▁" and token[1:].isascii() and token not in part.get_vocab()
    }
    kept = {index: part.get_vocab()[token] for token, index in whole.get_vocab().items() if token in part.get_vocab()}
    assert len(written) > 100
    certain = together = 0
    for source, target in zip(SIDES["source"][:40], SIDES["target"][:40], strict=True):
        shown = {side: ids_of(whole, [text], side)[0] for side, text in (("source", source), ("target", target))}
        labels = ids_of(part, [target], "target")[0]
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([shown["source"]]), labels=torch.tensor([shown["target"]])).logits
        log_probs = logits[0].log_softmax(-1)
        result = resegmentation.log_probs(log_probs, labels, shown["target"]).exp()
        assert result.shape == (len(labels), len(part))
        torch.testing.assert_close(result.sum(-1), torch.ones(len(labels)))
        places = resegmentation.places(labels, shown["target"])
        begun = [place for place in places if place >= 0]
        assert begun == sorted(set(begun))
        assert (begun[0], begun[-1]) == (0, len(shown["target"]) - 1)
        together += len(begun) / len(shown["target"])
        for position, (place, label) in enumerate(zip(places, labels, strict=True)):
            if place < 0:
                assert result[position, label] == 1
                certain += 1
                continue
            own, given = shown["target"][place], log_probs[place].exp()
            assert result[position, label] >= given[own] - 1e-6
            for pieces in (kept, written):
                wanted = torch.zeros(len(part))
                others = {index: piece for index, piece in pieces.items() if index != own}
                wanted.index_add_(0, torch.tensor([*others.values()]), given[torch.tensor([*others])])
                assert (result[position] >= wanted - 1e-6).all()
    assert certain > 20
    assert together > 0.95 * 40


def test_what_is_kept_of_them_is_as_it_is_without_padding(teacher, part, tmp_path):
    (model, whole), resegmentation = teacher, Resegmentation(part, teacher[1])
    rows = [(SIDES["source"][row], SIDES["target"][row]) for row in (0, 5, 9)]
    pairs = {
        name: [ids_of(part, [pair[place]], side)[0] for pair in rows]
        for place, (name, side) in enumerate((("input_ids", "source"), ("labels", "target")))
    }
    options = {"teacher_digest": "t", "teacher_tokenizer": whole}
    cached = cache_top_k(Dataset.from_dict(pairs), model, part, 8, tmp_path / "cache.parquet", **options)
    for row, (source, target) in zip(cached, rows, strict=True):
        labels = ids_of(whole, [target], "target")[0]
        with torch.inference_mode():
            inputs = {"input_ids": torch.tensor(ids_of(whole, [source], "source")), "labels": torch.tensor([labels])}
            log_probs = model(**inputs).logits[0].log_softmax(-1)
        values = resegmentation.log_probs(log_probs, row["labels"], labels).topk(8).values
        found = torch.tensor(row["teacher_log_probs"]).reshape(-1, 8)
        torch.testing.assert_close(found.exp(), values.exp(), atol=2e-3, rtol=0)
        assert (torch.tensor(row["teacher_ids"]) < len(part)).all()


def test_a_part_has_nothing_that_the_whole_lacks(teacher, part):
    assert is_part(part, teacher[1])
    assert is_part(part, part)
    assert not is_part(teacher[1], part)


def test_a_vocabulary_of_bytes_has_no_part(made_once):
    whole = make_tokenizer("unigram-bytes", made_once)
    assert not is_part(whole, whole)
    plain = make_tokenizer("unigram-unknown", made_once)
    assert is_part(plain, plain)
