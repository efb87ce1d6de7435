"""The plan of a compression: what the child will be, how long it is trained, what each stage takes.

It is made once, from the parent, the text and some timed updates, and kept: a compression that goes on goes on by it.
"""

import copy
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property, partial
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, MarianConfig, MarianMTModel, PreTrainedTokenizerBase

from ..attention.alignment import count_links
from ..calibration import UPDATES
from ..checkpoints import commit_of
from ..configuration_rs_marian import SIDES, RSMarianConfig
from ..corpus import prepare_training_pairs
from ..decoding import DecodingArguments, Engine, TransformersEngine, decode_all, encode_sources
from ..distillation.resegmentation import is_part
from ..export import is_installed, load_engine
from ..layer_transfer import collapse, collapsed_config, depth_config, expand, with_depth
from ..modeling_rs_marian import RSMarianForConditionalGeneration
from ..shortlist import Shortlist, make_shortlist
from ..tokenization import encode
from ..training.batches import TokenBatchSampler
from ..utils.text_files import digest
from ..vocabulary import (
    Counts,
    apply_trim,
    count_sides,
    embedding_rows,
    least_vocabulary,
    plan_from_counts,
)
from .arguments import CompressOptions
from .material import Material
from .sizes import largest_vocabulary, sizes_of, with_vocabulary
from .timing import endless, pass_of, seconds_of, speedups, update_of

WORD_WEIGHT, WORD_TOP_K = 0.5, 16
DEPTH = 2  # of the decoder, where nobody chooses
EPOCHS, MOST_EPOCHS = 10, 50
LEAST_UPDATES = 200  # of both distillations
CALIBRATION_SHARE, LEAST_CALIBRATION = 0.1, 100  # of a budget; updates
SHARE = 0.6  # of the updates, for the first distillation, where there are two
WORTH_TRIMMING = 0.95  # of the entries: where as many stay, trimming gives nothing
SAMPLE = 10_000  # pairs that are encoded
TRANSLATED = 32  # sentences whose translation is timed
SPEED_LENGTH, SPEED_SENTENCES = 24, 8  # tokens of a translation, and sentences, of which the speed is measured
ALIGNED = 4000  # pairs of which the shortlist is made that speed is measured with
VERIFIED = 200  # sentences that an export is verified with
CHECKPOINT_SECONDS = 120
MARGIN = 1.15  # what estimates are multiplied by where there is a budget
MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.bin", "*.spm", "*vocab.json")
# What material makes of options.
RESOLVED = ("source_lang", "target_lang", "max_source_length", "max_target_length", "max_train_samples")
FORMAT = 4  # of compress.json: other stages have another one
# Options that no finished stage depends on.
CHANGEABLE = ("output_dir", "dry_run", "engines", "min_same", "report", "repo")
CHANGEABLE += ("decoding_max_tokens", "preprocessing_num_workers")


def default_engines() -> list[str]:
    """What is exported to where nobody says."""
    return ["ctranslate2"] if is_installed("ctranslate2") else []


@dataclass
class Plan:
    """What `compress.json` holds.

    Attributes:
        options: what was asked for, but for `CHANGEABLE`.
        parent: name, `commit` and `digest`, shape and sizes.
        text: `pairs`, `sentences` of one language, `held_out`, and the `digest` of the files.
        vocabulary: `trim`, and how (`max_vocabulary`, `characters`); entries of each side, and the share `covered`.
        child: shape and sizes; `decoder_layers` is None where validation is to choose among `decoder_depths`.
        training: what the distillations are told; `updates` of each stage.
        minutes: of each stage, estimated.
        speedup: on single sentences by decoder depth, where that was measured.
        installed: engines that were there, of those that are taken where nobody says.
        format: `FORMAT` of the version that made it.
    """

    options: dict[str, Any]
    parent: dict[str, Any]
    text: dict[str, Any]
    vocabulary: dict[str, Any]
    child: dict[str, Any]
    training: dict[str, Any] = field(default_factory=dict)
    minutes: dict[str, float] = field(default_factory=dict)
    speedup: dict[int, float] = field(default_factory=dict)
    installed: list[str] = field(default_factory=default_engines)
    format: int = FORMAT

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Plan":
        known = {each.name for each in fields(cls)}
        return cls(**{name: value for name, value in content.items() if name in known})


def fixed_options(options: CompressOptions) -> dict[str, Any]:
    """The options that a compression must go on with."""
    return {name: value for name, value in options.options().items() if name not in CHANGEABLE}


def text_digest(options: CompressOptions) -> str:
    """What the contents of all files are known by that a compression reads."""
    corpus = options.corpus
    files = [corpus.train_file, corpus.validation_file, corpus.test_file, corpus.synthetic_file]
    given = [*chain.from_iterable(filter(None, files)), *filter(None, [options.compress.monolingual_file])]
    return digest(given)


def parent_digest(name: str) -> str | None:
    """What a model in a folder is known by; None for one on the Hub, whose commit tells it."""
    if not Path(name).is_dir():
        return None
    return digest(sorted(str(file) for pattern in MODEL_FILES for file in Path(name).glob(pattern)))


def make_plan(options: CompressOptions, material: Material, started: float) -> Plan:
    """Choose what is to be chosen, and time what is to be done.

    Args:
        started: when the compression began, by `time.perf_counter`: a budget counts from there.

    Raises:
        ValueError: an impossible shape, or a goal that cannot be reached; says what can.
    """
    planner = Planner(options, material)
    planner.choose_shape()
    plan = planner.plan()
    planner.choose_updates(plan, started)
    return plan


class Planner:
    """Makes a plan, step by step.

    Attributes:
        pairs: sentence pairs as text, a sample; of monolingual text the parent's translations.
        shape: fields of the child's configuration that were chosen, but for the depth.
        depths: the decoder's depths that the child may have, the greatest first.
        speedup: of each decoder depth that was measured.
    """

    def __init__(self, options: CompressOptions, material: Material):
        self.options, self.material = options, material
        self.parent, self.tokenizer = material.model, material.tokenizer
        self.speedup: dict[int, float] = {}
        self.decode_seconds = 0.0
        sentences = self._timed_translation()
        self.pairs = self._sample(sentences)
        start = time.perf_counter()
        self.counts = self._count(sentences)
        self.count_seconds = time.perf_counter() - start

    # Text

    def _timed_translation(self) -> list[tuple[str, str]]:
        """Some sentences, translated by the parent as it translates monolingual text and the test set."""
        train, monolingual, args = self.material.train, self.material.monolingual, self.options.compress
        texts = monolingual or [text for text in train["source"][: 20 * TRANSLATED] if text and text.strip()]
        if not texts:
            raise ValueError(f"the first {20 * TRANSLATED} sources of the train split are blank")
        chosen = texts[:: max(1, len(texts) // TRANSLATED)][:TRANSLATED]
        beams = max(args.teacher_num_beams, self.options.decoding.num_beams)
        decoding = DecodingArguments(num_beams=beams, max_new_tokens=self.material.corpus.max_target_length)
        sources = encode_sources(self.parent, self.tokenizer, chosen)
        with tempfile.TemporaryDirectory() as folder:
            engine = self._engine(self.parent, self.tokenizer, decoding, Path(folder, "parent"))
            start = time.perf_counter()
            translations = [texts[0] for texts in decode_all(engine, sources, decoding.batch_tokens)]
            self.decode_seconds = (time.perf_counter() - start) / len(chosen)
        return list(zip(chosen, translations, strict=True))

    def _sample(self, translated: list[tuple[str, str]]) -> Dataset:
        train = self.material.train
        if train is None:
            sentences = len(self.material.monolingual)
            translated = list(islice(cycle(translated), min(sentences, SAMPLE)))  # as many as fill batches
            sides = map(list, zip(*translated, strict=True))
            return Dataset.from_dict(dict(zip(("source", "target"), sides, strict=True)))
        return train.shuffle(seed=self.options.student.seed).select(range(min(len(train), SAMPLE)))

    def _count(self, translated: list[tuple[str, str]]) -> Counts:
        train, sources, targets = self.material.train, list(self.material.monolingual), []
        if train is None:
            targets = [target for _, target in translated]
        else:
            sources += filter(None, train["source"][:])
            targets += filter(None, train["target"][:])
        return count_sides(self.tokenizer, sources, targets)

    # Shape

    def choose_shape(self) -> None:
        """Vocabulary, stored layers and the decoder's depth, by the goals and the options."""
        shape, goal, config = self.options.shape, self.options.goal, self.parent.config
        deepest = config.decoder_layers
        if shape.decoder_layers is not None and shape.decoder_layers > deepest:
            raise ValueError(f"decoder_layers must lie in 1..{deepest}, the parent's, got {shape.decoder_layers}")
        measured = [name for name in ("target_speedup", "max_bleu_loss") if getattr(goal, name) is not None]
        if measured and shape.decoder_layers is not None:
            raise ValueError(f"{measured[0]} chooses the decoder's depth: leave decoder_layers out")
        if goal.budget_minutes is not None and self.options.student.updates is not None:
            raise ValueError("budget_minutes chooses the updates: leave updates out")
        given = shape.decoder_layers or min(DEPTH, deepest)
        least = min(shape.decoder_unique_layers or 1, deepest)
        self.depths = list(range(deepest, least - 1, -1)) if measured else [given]
        self.stored = {side: getattr(shape, f"{side}_unique_layers") or 1 for side in SIDES}
        for side, most in (("encoder", config.encoder_layers), ("decoder", min(self.depths))):
            if self.stored[side] > most:
                raise ValueError(f"{side}_unique_layers must lie in 1..{most}, got {self.stored[side]}")
        self.trim_options: dict[str, Any] = {"max_vocabulary": shape.max_vocabulary, "characters": "all"}
        self.kept = plan_from_counts(self.parent, self.tokenizer, self.counts, **self.trim_options)
        if goal.target_size is not None:
            self._fit_size(round(goal.target_size * 1e6))
        self.trim = self._worth_trimming()
        self.base, self.base_tokenizer = self.parent, self.tokenizer
        if self.trim:
            self.base, self.base_tokenizer = apply_trim(self.parent, self.tokenizer, self.kept)
            if self.word_weight and not is_part(self.base_tokenizer, self.tokenizer):
                raise ValueError(
                    "the parent's vocabulary has bytes, and its distributions cannot be learned with a part of it: "
                    "set word_weight=0, to learn from translations alone"
                )
        self.child = collapse(self.base, **self.sharing())
        if "marian" in engines_of(self.options):
            load_engine("marian").check_model(expand(self.child), self.base_tokenizer)
        if goal.target_speedup is not None:
            self._reach_speed(goal.target_speedup)

    @property
    def word_weight(self) -> float:
        """Of the parent's distributions in the loss."""
        given = self.options.student.word_weight
        return WORD_WEIGHT if given is None else given

    def sharing(self) -> dict[str, Any]:
        """What `collapse` takes."""
        own = {name: getattr(self.options.shape, name) or None for name in ("step_layer_norms", "step_biases")}
        return {f"{side}_unique_layers": layers for side, layers in self.stored.items()} | own

    def config(self, sizes: dict[str, int], **stored: int) -> RSMarianConfig:
        """The child's configuration with a vocabulary and stored layers, at the greatest depth that it may have."""
        config = with_vocabulary(self.parent.config, sizes["source"], sizes["target"])
        return depth_config(collapsed_config(config, **self.sharing() | stored), None, self.depths[0])

    def _fit_size(self, most: int) -> None:
        """The most stored layers with all of the vocabulary that is needed, or the most entries with one layer."""
        sizes = {side: len(ids) for side, ids in self.kept.ids.items()}
        shape, depths = self.options.shape, {"encoder": self.parent.config.encoder_layers, "decoder": min(self.depths)}
        free = [side for side in SIDES if getattr(shape, f"{side}_unique_layers") is None]
        most_entries = embedding_rows(self.parent) if self.material.monolingual else sizes
        # Of monolingual text alone nobody knows yet how many entries the translations need.
        for layers in range(max(depths.values()) if self.material.train is not None else 1, 0, -1):
            stored = self.stored | {side: min(layers, depths[side]) for side in free}
            if any(depths[side] % stored[side] for side in free):
                continue  # some steps would have a layer of their own
            if sizes_of(self.config(sizes, **_named(stored))).int8 <= most:
                self.stored = stored
                if self.material.monolingual:
                    entries = largest_vocabulary(self.config(sizes), most, most_entries)
                    self.trim_options["max_vocabulary"] = min(entries, shape.max_vocabulary or entries)
                return
        entries = largest_vocabulary(self.config(sizes), most, most_entries)
        # Of monolingual text not all pieces and characters of the translations are known yet.
        for characters in ("all",) if self.material.monolingual else ("all", "text"):
            least = least_vocabulary(self.parent, self.tokenizer, self.counts, characters)
            if entries >= least:
                self.trim_options = {"max_vocabulary": entries, "characters": characters}
                self.kept = plan_from_counts(self.parent, self.tokenizer, self.counts, **self.trim_options)
                return
        smallest = sizes_of(self.config({"source": least, "target": least})).int8
        raise ValueError(
            f"target_size {self.options.goal.target_size:g} MB cannot be reached: with the {least:,} entries that "
            f"single characters and special tokens take, the child has {smallest / 1e6:.2f} MB in int8"
        )

    def _worth_trimming(self) -> bool:
        rows = embedding_rows(self.parent)
        left = sum(len(ids) for ids in self.kept.ids.values()) / sum(rows.values())
        size = self.options.goal.target_size
        bounded = self.trim_options["max_vocabulary"] is not None
        bounded |= size is not None and sizes_of(self.config(rows)).int8 > size * 1e6
        return left < 1 if bounded else left < WORTH_TRIMMING

    def _reach_speed(self, wanted: float) -> None:
        """Keep the depths at which the child is as many times as fast as its parent."""
        children = [with_depth(self.child, decoder_layers=depth) for depth in self.depths]
        found = dict(zip(self.depths, self._speedups(children), strict=True))
        self.speedup = {depth: round(ratio, 2) for depth, ratio in found.items()}
        reached = [depth for depth, ratio in found.items() if ratio >= wanted]
        if not reached:
            least = min(found)
            raise ValueError(
                f"target_speedup {wanted:g} cannot be reached: with decoder depth {least} the child is "
                f"{found[least]:.2f} times as fast as its parent on single sentences"
            )
        self.depths = reached if self.options.goal.max_bleu_loss is not None else reached[:1]

    def _speedups(self, children: Sequence[RSMarianForConditionalGeneration]) -> list[float]:
        models = [(self.parent, self.tokenizer), *((child, self.base_tokenizer) for child in children)]
        beams = self.options.decoding.num_beams
        length = DecodingArguments(num_beams=beams, length_penalty=0.0, max_new_tokens=SPEED_LENGTH + 1)
        texts = [text for text in self.pairs["source"] if text and text.strip()]
        lengths = [len(ids) for ids in encode(self.tokenizer, texts[:500])]
        order = sorted(range(len(lengths)), key=lambda index: abs(lengths[index] - SPEED_LENGTH))
        chosen = [texts[index] for index in order[:SPEED_SENTENCES]]
        sources = [encode_sources(model, tokenizer, chosen) for model, tokenizer in models]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with tempfile.TemporaryDirectory() as folder:
                engines = []
                for number, (model, tokenizer) in enumerate(models):
                    shortlist = self.shortlist if number else None
                    model = endless(model, tokenizer.eos_token_id).cpu()
                    engines.append(self._engine(model, tokenizer, length, Path(folder, str(number)), shortlist))
                return speedups(engines, sources)[1:]
        finally:
            torch.set_num_threads(threads)

    def _engine(
        self,
        model: MarianMTModel,
        tokenizer: PreTrainedTokenizerBase,
        decoding: DecodingArguments,
        folder: Path,
        shortlist: Shortlist | None = None,
    ) -> Engine:
        """What a model translates in, on its device: CTranslate2 in int8, where that is installed, or PyTorch."""
        if not is_installed("ctranslate2"):
            return TransformersEngine(model, tokenizer, decoding)
        engine = load_engine("ctranslate2")
        engine.LoadedConverter(model, tokenizer).convert(str(folder), quantization="int8")
        if shortlist is not None:
            engine.write_shortlist(shortlist, folder, tokenizer)
        return engine.load(folder, tokenizer, decoding, use_shortlist=shortlist is not None, device=model.device)

    @cached_property
    def shortlist(self) -> Shortlist | None:
        """One made of some pairs, if the child is to have one."""
        shipping = self.options.shipping
        if not shipping.shortlist or "ctranslate2" not in engines_of(self.options) or self.material.train is None:
            return None
        pairs = self.pairs.select(range(min(len(self.pairs), ALIGNED)))
        limit = self.material.corpus.max_source_length
        sides = [
            encode(self.base_tokenizer, [text or "" for text in pairs[side]], target=side == "target")
            for side in ("source", "target")
        ]
        kept = [pair for pair in zip(*sides, strict=True) if max(map(len, pair)) <= limit]
        sources, targets = zip(*kept, strict=True)
        links = count_links(self.base, self.base_tokenizer, sources, targets)
        return make_shortlist(self.base_tokenizer, links, Counter(chain.from_iterable(targets)))

    # Updates

    def batches(self) -> tuple[list[Any], int]:
        """Batches as the child will get them, on this process's device, and how many an epoch has."""
        student, corpus = self.options.student, self.material.corpus
        pairs = prepare_training_pairs(self.pairs, self.base_tokenizer, corpus)
        sampler = TokenBatchSampler(pairs["length"][:], student.max_tokens, seed=student.seed)
        collate = DataCollatorForSeq2Seq(self.base_tokenizer, model=self.child)
        columns = pairs.select_columns(["input_ids", "labels"])
        chosen = [batch for batch, _ in zip(sampler, range(7), strict=False)]
        share = self.text_size() / len(self.pairs)
        total = max(1, round(len(sampler) * share / PartialState().num_processes))
        return [collate([columns[index] for index in batch]).to(self.child.device) for batch in chosen], total

    def text_size(self) -> int:
        """How many pairs and sentences there are to learn from."""
        return len(self.material.train or ()) + len(self.material.monolingual)

    def plan(self) -> Plan:
        """What is chosen so far."""
        args, material, corpus = self.options.compress, self.material, self.material.corpus
        rows, kept = embedding_rows(self.parent), self.kept.ids
        sizes = {side: len(kept[side]) if self.trim else rows[side] for side in rows}
        chosen = self.options.goal.max_bleu_loss is None
        config = self.config(sizes)
        steps = ("step_layer_norms", "step_biases")
        return Plan(
            options=fixed_options(self.options),
            parent={
                "name": args.model_name_or_path,
                "commit": commit_of(args.model_name_or_path, args.revision),
                "digest": parent_digest(args.model_name_or_path),
                "d_model": config.d_model,
                **{f"{side}_layers": getattr(self.parent.config, f"{side}_layers") for side in SIDES},
                **{f"{side}_unique_layers": stored_layers(self.parent.config, side) for side in SIDES},
                **asdict(sizes_of(self.parent.config)),
            },
            text={
                "pairs": len(material.train or ()),
                "held_out": len(material.held_out or ()),
                "sentences": len(material.monolingual),
                "digest": text_digest(self.options),
                "corpus": {name: getattr(corpus, name) for name in RESOLVED},
            },
            vocabulary={
                "trim": self.trim,
                "separate_vocabs": self.tokenizer.separate_vocabs,
                **self.trim_options,
                "parent": rows,
                "child": sizes,
                "needed": sum(map(len, kept.values())) / sum(rows.values()),
                "covered": self.kept.covered if self.trim else dict.fromkeys(rows, 1.0),
            },
            child={
                **{f"{side}_layers": getattr(config, f"{side}_layers") for side in SIDES},
                "decoder_layers": self.depths[0] if chosen else None,
                "decoder_depths": self.depths,
                **{f"{side}_unique_layers": layers for side, layers in self.stored.items()},
                **{name: getattr(self.options.shape, name) for name in steps},
                **asdict(sizes_of(config)),
            },
            speedup=self.speedup,
        )

    def choose_updates(self, plan: Plan, started: float) -> None:
        """Time an update and all else, and divide what is left of the budget between the distillations."""
        student = self.options.student
        batches, epoch = self.batches()
        seconds = self._timed(batches, WORD_TOP_K if self.word_weight else 0)
        precisions = [False, True] if student.bf16 is None else [student.bf16]
        shares = {"distilled": 1.0}
        if self.options.goal.max_bleu_loss is not None:  # all depths first, then the chosen one
            shares = {"distilled": SHARE, "shallow": 1 - SHARE}
        bf16 = min(precisions, key=lambda precision: sum(seconds[stage, precision] for stage in shares))
        calibrating, updates = seconds["calibrated"] + seconds["pass"], {}
        if any(layers < stored_layers(self.parent.config, side) for side, layers in self.stored.items()):
            updates["collapsed"] = self.calibration_updates(calibrating)
        minutes = self._other_minutes(plan, epoch, seconds["aligned"])
        minutes |= {"collapsed": updates.get("collapsed", 0) * calibrating / 60}
        minutes |= {"distilled": 1.5 * epoch * seconds["pass"] / 60 * bool(self.word_weight)}
        planned = (time.perf_counter() - started) / 60
        mean = sum(share * seconds[stage, bf16] for stage, share in shares.items()) / 60
        number = self._updates_in(planned + MARGIN * sum(minutes.values()), MARGIN * mean, epoch)
        updates |= {stage: max(1, round(share * number)) for stage, share in shares.items()}
        for stage in shares:
            minutes[stage] = minutes.get(stage, 0.0) + updates[stage] * seconds[stage, bf16] / 60
        trained = [stage for stage in updates if stage != "collapsed"]
        width = self.parent.config.d_model
        plan.training = {
            "bf16": bf16,
            "word_weight": self.word_weight,
            "learning_rate": student.learning_rate or float(f"{1e-3 * (128 / width) ** 0.5:.2g}"),
            "updates": updates,
            "updates_an_epoch": epoch,
            "seconds_an_update": {stage: seconds[stage, bf16] for stage in trained},
            "save_steps": {stage: save_steps(updates[stage], seconds[stage, bf16]) for stage in trained},
        }
        plan.minutes = {stage: round(number, 2) for stage, number in minutes.items() if number}
        plan.text["tokens"] = epoch * PartialState().num_processes * student.max_tokens

    def _timed(self, batches: list[Any], top_k: int) -> dict[Any, float]:
        """Seconds of a batch: the teacher's pass, the child's, a calibration's child, and each stage's update.

        Returns:
            By `"pass"`, `"aligned"`, `"calibrated"`, or a stage that there may be and whether in bfloat16.
        """
        depth, elastic = self.depths[0], self.options.goal.max_bleu_loss is not None
        if elastic:  # trained for all of them
            depth = (min(self.depths) + self.parent.config.decoder_layers) // 2
        updates = {"distilled": update_of(with_depth(self.child, decoder_layers=depth), top_k)}
        if elastic:
            updates["shallow"] = update_of(with_depth(self.child, decoder_layers=self.depths[0]), top_k)
        works: dict[Any, Any] = {"pass": pass_of(self.parent)}
        works["aligned"] = pass_of(with_depth(self.child, decoder_layers=self.depths[0]))
        works["calibrated"] = partial(update_of(copy.deepcopy(self.child)), bf16=False)
        works |= {
            (stage, bf16): partial(update, bf16=bf16) for stage, update in updates.items() for bf16 in (False, True)
        }
        return seconds_of(works, batches)

    def _updates_in(self, needed: float, mean: float, epoch: int) -> int:
        """Updates of both distillations: as given, or as many as the budget allows, or some epochs.

        Args:
            needed: minutes for all else.
            mean: minutes of an update.
            epoch: updates that it has.
        """
        given, budget = self.options.student.updates, self.options.goal.budget_minutes
        if given is not None:
            return given
        if budget is None:
            return max(LEAST_UPDATES, EPOCHS * epoch)
        updates = int((budget - needed) / mean)
        if updates < LEAST_UPDATES:
            raise ValueError(
                f"budget_minutes {budget:g} is not enough: with {LEAST_UPDATES} updates it takes about "
                f"{needed + LEAST_UPDATES * mean:.1f} minutes, {needed:.1f} of them for all else"
            )
        return min(updates, max(LEAST_UPDATES, MOST_EPOCHS * epoch))

    def calibration_updates(self, seconds: float) -> int:
        """As given; else the usual number, or as many as a share of the budget allows."""
        given, budget = self.options.student.calibration_updates, self.options.goal.budget_minutes
        if given is not None or budget is None:
            return given or UPDATES
        return max(LEAST_CALIBRATION, min(UPDATES, int(CALIBRATION_SHARE * 60 * budget / seconds)))

    def _other_minutes(self, plan: Plan, epoch: int, aligned: float) -> dict[str, float]:
        """Estimates of the stages that train nothing.

        Args:
            aligned: seconds of the child's pass over a batch.
        """
        text, goal = plan.text, self.options.goal
        processes = PartialState().num_processes
        sizes = {split: len(dataset) for split, dataset in self.material.evaluated.items()}
        validated = sizes.get("validation", text["held_out"])
        compared = sizes.get("test", sizes.get("validation", VERIFIED))
        engines = engines_of(self.options, plan)
        seconds = {
            "monolingual": text["sentences"] * self.decode_seconds / processes,
            "trimmed": self.trim * (self.count_seconds + 2),
            "depths": validated * self.decode_seconds * (1 + len(self.depths)) * (goal.max_bleu_loss is not None),
        }
        for engine in engines:
            aligning = 2 * epoch * processes * aligned * self.options.shipping.shortlist
            seconds[f"export/{engine}"] = 10 + aligning + 8 * VERIFIED * self.decode_seconds
        if self.options.shipping.report:
            seconds["report"] = max(1, len(engines)) * (60 + 2 * compared * self.decode_seconds)
        return {stage: number / 60 for stage, number in seconds.items()}


def save_steps(updates: int, seconds: float) -> int:
    """Updates from one checkpoint to the next: some minutes, and a fifth of all at most.

    Args:
        seconds: of an update.
    """
    return min(-(-updates // 5), max(1, round(CHECKPOINT_SECONDS / seconds)))


def engines_of(options: CompressOptions, plan: Plan | None = None) -> list[str]:
    """The engines that are exported to: those that were asked for, or that were installed when it was planned."""
    if options.shipping.engines is not None:
        return list(dict.fromkeys(options.shipping.engines))
    return default_engines() if plan is None else plan.installed


def stored_layers(config: MarianConfig, side: str) -> int:
    """Of a Marian, which stores all, or an RSMarian."""
    return getattr(config, f"{side}_unique_layers", getattr(config, f"{side}_layers"))


def _named(stored: dict[str, int]) -> dict[str, int]:
    return {f"{side}_unique_layers": layers for side, layers in stored.items()}
