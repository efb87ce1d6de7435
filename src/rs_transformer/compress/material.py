"""What a compression starts from: the parent and the text, loaded, and checked to go together."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, MarianMTModel, PreTrainedTokenizerBase

from ..checkpoints import bar_padding, load_parent
from ..corpus import CorpusArguments, check_script, load_evaluation_splits, load_split, read_sentences, warn_of_overlap
from ..decoding import source_limit
from ..pipeline_rs_marian import target_codes
from ..tokenization import check_language_pair, encode
from ..training.losses import label_smoothed_nll, without_padding
from ..vocabulary import check_belonging
from .arguments import CompressOptions

HELD_OUT = 1000  # pairs, where validation is needed and there is none
SHOWN = 128  # pairs that the parent reads
LEAST_GAIN = 0.15  # 0.05 is what chance does


@dataclass
class Material:
    """The parent and the text.

    Attributes:
        model: the parent, in float32 on this process's device, in evaluation mode.
        corpus: what the stages read, but for the parent's translations.
        train: training pairs; None where there is monolingual text alone.
        evaluated: the validation and test pairs, those that there are.
        held_out: training pairs that are kept for validation, if need be.
        monolingual: sentences of the source language.
    """

    model: MarianMTModel
    tokenizer: PreTrainedTokenizerBase
    corpus: CorpusArguments
    train: Dataset | None
    evaluated: dict[str, Dataset]
    held_out: Dataset | None
    monolingual: list[str]


def load_material(options: CompressOptions) -> Material:
    """Load parent and text; check that they go together.

    Raises:
        ValueError, OSError: something is not there, damaged, of another kind or of other languages; says what.
    """
    args, corpus = options.compress, options.corpus
    if not corpus.has_split("train") and args.monolingual_file is None:
        raise ValueError("there is no text to learn from: give train_file, dataset_name or monolingual_file")
    model, tokenizer = load_parent(args.model_name_or_path, args.revision, args.allow_pickle, dtype=torch.float32)
    check_belonging(model, tokenizer)
    if target_codes(tokenizer):
        raise ValueError(
            f"{args.model_name_or_path} is told its target language by a code, as by "
            f"{sorted(target_codes(tokenizer))[0]}: such a parent cannot be compressed"
        )
    bar_padding(model)  # as in every student
    corpus = resolved_corpus(corpus, model, tokenizer)
    check_language_pair(tokenizer, corpus.source_lang, corpus.target_lang)
    evaluated, train, held_out = load_evaluation_splits(corpus), None, None
    validating = options.goal.max_bleu_loss is not None and "validation" not in evaluated
    if corpus.has_split("train"):
        if validating:
            corpus, held_out = hold_out(corpus)
        train = load_split(corpus, "train")
    elif validating:
        raise ValueError(
            "max_bleu_loss needs pairs to validate on, and there is monolingual text alone: give validation_file"
        )
    monolingual = read_monolingual(args.monolingual_file, args.text_column, corpus.source_lang)
    model = model.eval().to(PartialState().device)
    material = Material(model, tokenizer, corpus, train, evaluated, held_out, monolingual)
    check_pairs(material, args.model_name_or_path)
    return material


def resolved_corpus(
    corpus: CorpusArguments, model: MarianMTModel, tokenizer: PreTrainedTokenizerBase
) -> CorpusArguments:
    """The corpus with the parent's languages where none are named, and no longer pairs than the parent takes.

    Raises:
        ValueError: neither the options nor the parent's tokenizer name the languages.
    """
    languages = {
        name: getattr(corpus, name) or getattr(tokenizer, name, None) for name in ("source_lang", "target_lang")
    }
    if None in languages.values():
        raise ValueError("the parent's tokenizer does not name its languages: give source_lang and target_lang")
    limit = source_limit(model, tokenizer)
    longest = {name: min(getattr(corpus, name), limit) for name in ("max_source_length", "max_target_length")}
    return replace(corpus, **languages, **longest)


def hold_out(corpus: CorpusArguments) -> tuple[CorpusArguments, Dataset]:
    """Keep the last training pairs for validation: the corpus without them, and these, where no side is blank."""
    pairs = load_split(replace(corpus, synthetic_file=None), "train")
    kept = len(pairs) - min(HELD_OUT, len(pairs) // 10)
    last = [row for row in range(kept, len(pairs)) if all((text or "").strip() for text in pairs[row].values())]
    if not last:
        raise ValueError(
            f"the last tenth of the train split, of {len(pairs)} pairs, has none with both texts to hold out: "
            "give validation_file"
        )
    corpus, held_out = replace(corpus, max_train_samples=kept), pairs.select(last)
    warn_of_overlap(load_split(corpus, "train"), {"held out": held_out})
    return corpus, held_out


def read_monolingual(file: str | None, column: str, language: str) -> list[str]:
    """The different sentences of a file, blank ones left out; none where there is no file.

    Raises:
        FileNotFoundError, ValueError: there is no such file or column, no sentence, or it is of another language.
    """
    if file is None:
        return []
    texts = [text for text in dict.fromkeys(read_sentences(file, column, "monolingual_file")) if text.strip()]
    if not texts:
        raise ValueError(f"monolingual_file: {file} has no sentence in it")
    check_script(texts, language, f"monolingual_file: {file}")
    return texts


def check_pairs(material: Material, parent: str) -> None:
    """Raise `ValueError` unless the parent can tell translations from others in the training and test pairs."""
    corpus, limit = material.corpus, source_limit(material.model, material.tokenizer)
    sets = material.evaluated if material.train is None else {"train": material.train, **material.evaluated}
    for split, dataset in sets.items():
        chosen = dataset.shuffle(seed=0).select(range(min(len(dataset), 4 * SHOWN)))
        texts = [(pair["source"], pair["target"]) for pair in chosen]
        for side, language in enumerate((corpus.source_lang, corpus.target_lang)):
            check_script([pair[side] or "" for pair in texts], language, f"the {split} split")
        filled = [pair for pair in texts if all(text and text.strip() for text in pair)]
        sides = zip(*filled, strict=True)
        encoded = [encode(material.tokenizer, column, target=bool(side)) for side, column in enumerate(sides)]
        pairs = [pair for pair in zip(*encoded, strict=True) if max(map(len, pair)) <= limit][:SHOWN]
        if len(pairs) > 1 and gain_from_sources(material.model, material.tokenizer, pairs) < LEAST_GAIN:
            raise ValueError(
                f"to {parent} translations of the {split} split are as probable after other sources as after their "
                f"own: are they text of its languages, {corpus.source_lang} to {corpus.target_lang}, line by line?"
            )


def gain_from_sources(
    model: MarianMTModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[list[int], list[int]]]
) -> float:
    """The share of a translation's negative log-likelihood after another's source that its own source takes away.

    More than half where the model translates such text; about nothing where the pairs are of another language than
    the model's, or are not translations.

    Args:
        pairs: token ids of sources and targets, at least two pairs.
    """
    sources, targets = zip(*pairs, strict=True)
    own, others = (
        _nll(model, tokenizer, list(zip(side, targets, strict=True)))
        for side in (sources, [*sources[1:], *sources[:1]])
    )
    return 1 - own / others


@torch.inference_mode()
def _nll(
    model: MarianMTModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[list[int], list[int]]]
) -> float:
    """Of the targets given their sources, in nats."""
    collator, total = DataCollatorForSeq2Seq(tokenizer, model=model), 0.0
    for start in range(0, len(pairs), 32):
        batch = collator([{"input_ids": s, "labels": t} for s, t in pairs[start : start + 32]]).to(model.device)
        labels = without_padding(batch.pop("labels"), tokenizer.pad_token_id)
        log_probs = model(**batch, use_cache=False).logits.float().log_softmax(-1)
        total += label_smoothed_nll(log_probs, labels, 0.0).item()
    return total
