"""Compress a pretrained Marian model, such as an OPUS-MT checkpoint, into a folder that one ships.

    rs-transformer compress Helsinki-NLP/opus-mt-ja-en --output_dir runs/small --budget_minutes 90 \\
        --train_file corpus.ja corpus.en --test_file test.ja test.en --source_lang ja --target_lang en
    rs-transformer compress runs/parent --output_dir runs/small --monolingual_file news.ja --target_size 4
    rs-transformer compress runs/parent --output_dir runs/small --train_file train.jsonl --dry_run

The stages, each a command of its own: translate monolingual text (synthesize), trim the vocabulary, collapse, distil
from the parent, lay out (publish), export. Each has a folder in the
output folder; the child is in `model`, what engines load in `export`. `compress.json` has the plan. The same command
goes on where it was stopped; several processes share the work (`accelerate launch`).
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers.utils import logging

from ..checkpoints import load_config, load_parent, load_translator
from ..compare.comparison import compare
from ..compare.report import print_report, write_report
from ..compress.arguments import CompressOptions
from ..compress.material import Material, load_material
from ..compress.plan import (
    CHANGEABLE,
    FORMAT,
    VERIFIED,
    WORD_TOP_K,
    Plan,
    engines_of,
    fixed_options,
    make_plan,
    parent_digest,
    text_digest,
)
from ..configuration_rs_marian import SIDES
from ..corpus import CorpusArguments, load_evaluation_splits, load_split, read_sentences
from ..distillation.losses import DistillationLossArguments
from ..distillation.targets import TargetArguments
from ..distillation.teachers import TeacherArguments
from ..export import install, is_installed, load_engine
from ..model_card import COMPARISON, card_disagreements, card_facts, renew_card
from ..tokenization import TokenizerArguments
from ..training.arguments import TranslationTrainingArguments
from ..training.model import ModelArguments
from ..training.run_folder import complete_checkpoints, is_finished
from ..utils.console import set_up_logging
from ..utils.files import check_output, claimed, read_mapping, staged_folder, write_json, write_text
from ..utils.map_shards import check_settings
from ..utils.memory import keep_freed_memory
from ..utils.plotting import check_matplotlib
from ..utils.processes import PatientGroup, all_threads, alone, run
from ..utils.recipes import RecipeParser
from ..utils.tables import markdown_table
from ..vocabulary import TEXT_SIDES, plan_trim
from .collapse import CollapseArguments, collapse_checkpoint
from .depth_sweep import DepthSweepArguments, sweep_depths
from .distill import DistillArguments, DistillOptions, distill
from .evaluate import EvaluateArguments, evaluate_systems
from .export import ExportArguments, export_checkpoint
from .publish import lay_out
from .synthesize import PAIRS, SynthesisArguments, synthesize
from .synthesize import RECORD as SYNTHESIS
from .train import TrainOptions, run_training
from .trim import TrimArguments, VocabularyArguments, trimmed_sizes, write_trimmed

logger = logging.get_logger(__name__)

GO_ON = "the same command goes on where it was stopped"

PLAN, DEPTHS = "compress.json", "depths.json"
TRAIN_FILE, HELD_OUT_FILE, VERIFICATION_FILE = "train.parquet", "validation.jsonl", "verification.txt"
MODEL, CONVERTED = "model", "parent_ctranslate2"
CTRANSLATE2 = "ctranslate2"
WARM_UP = 100  # updates


@dataclass(frozen=True)
class Stage:
    """One step of a compression.

    Attributes:
        name: also of its folder.
        done: whether it is finished, by what it has left.
        work: does it, or goes on with it; called by all processes.
        shared: whether they share the work; else the main process does all of it.
    """

    name: str
    done: Callable[[], bool]
    work: Callable[[], Any]
    shared: bool = False


def compress(options: CompressOptions) -> Plan:
    """Run all stages, or those that are still to be done; everything that can be checked is checked before the first.

    Returns:
        The plan that was followed; with `dry_run` nothing else is done, and nothing written.

    Raises:
        ValueError, OSError: an option, the parent or the text is wrong or not there, a goal cannot be reached, there
            is too little room on the disk, or the folder has a compression with other options.
    """
    started = time.perf_counter()
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # the plan chooses it, on whatever machine it goes on
    state, group, output = PartialState(), PatientGroup(), Path(options.compress.output_dir)
    dry_run = options.compress.dry_run
    set_up_logging(state.is_local_main_process)
    check_engines(options)
    TranslationTrainingArguments(output_dir=str(output))  # says what no training here could do
    if state.device.type == "cpu":
        keep_freed_memory()
    with claimed(output, state.is_main_process and not dry_run):
        plan: Plan | None = None
        if state.is_main_process:
            if plan := found_plan(options, output):
                check_engines(options, plan)
            else:
                plan = new_plan(options, output, started)
            print_plan(plan, options)
        group.wait()  # planning takes longer than a collective waits
        plan = broadcast_object_list([plan])[0]
        if not dry_run:
            Compression(options, plan, group).run()
    return plan


def check_engines(options: CompressOptions, plan: Plan | None = None) -> None:
    """Raise `ValueError` for an engine that is not installed, or a quantization that none of them has.

    Args:
        plan: of a compression that goes on.
    """
    if options.shipping.report:
        check_matplotlib("report=true")
    known = {}
    for engine in engines_of(options, plan):
        known[engine] = load_engine(engine, option="engines").QUANTIZATIONS
        if engine == "marian":
            load_engine(engine).check_path(options.compress.output_dir)
        if not is_installed(engine):
            raise ValueError(f"engines={engine} needs: {install(engine)}, to verify what is exported")
    quantization = options.shipping.quantization
    if options.shipping.report and "transformers" in known and quantization in known["transformers"][1:]:
        raise ValueError(
            f"the report compares engines=transformers in float32, not in {quantization}: set report=false for it"
        )
    if known and not any(quantization in each for each in known.values()):
        names = dict.fromkeys(name for each in known.values() for name in each)
        raise ValueError(f"quantization must be one of {', '.join(names)}, got {quantization!r}")


def found_plan(options: CompressOptions, output: Path) -> Plan | None:
    """The plan that a folder has.

    Raises:
        ValueError: it was made with other options, from other text or for another parent; or the folder holds
            something else.
    """
    content = read_mapping(output / PLAN)
    if not content:
        check_output(output)
        return None
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{output} was begun by another version of rs-transformer: go on with that one, or choose another folder"
        )
    plan = Plan.from_json(content)
    if "installed" not in content:  # of a version whose stages were told the branch
        plan.parent["commit"] = None
    before = {name: value for name, value in plan.options.items() if name not in CHANGEABLE}
    check_settings(output, before, fixed_options(options))
    name, revision = options.compress.model_name_or_path, options.compress.revision
    load_config(name, plan.parent["commit"] or revision)  # says what is wrong with it
    if parent_digest(name) != plan.parent["digest"]:
        raise ValueError(f"{output} was made from another {name}: bring it back, or choose another output_dir")
    if text_digest(options) != plan.text["digest"]:
        raise ValueError(
            f"{output} was made from other text: bring the former files back, or choose another output_dir"
        )
    return plan


def new_plan(options: CompressOptions, output: Path, started: float) -> Plan:
    """Make a plan; unless it is for show, write it, and the text that is held out, verified with, or a dataset's."""
    material = load_material(options)
    plan = make_plan(options, material, started)
    if options.compress.dry_run:
        return plan
    check_room(output, disk_bytes(plan))
    with staged_folder(output) as staging:
        if material.corpus.files("train") is None and material.train is not None:
            load_split(replace(material.corpus, synthetic_file=None), "train").to_parquet(staging / TRAIN_FILE)
        if material.held_out is not None:
            corpus = material.corpus
            names = (corpus.source_column or "source", corpus.target_column or "target")
            rows = (dict(zip(names, (row["source"], row["target"]), strict=True)) for row in material.held_out)
            write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), staging / HELD_OUT_FILE)
        write_text("".join(f"{text}\n" for text in verification_sentences(material)), staging / VERIFICATION_FILE)
        write_json(asdict(plan), staging / PLAN)
    return Plan.from_json(read_mapping(output / PLAN))


def verification_sentences(material: Material) -> list[str]:
    """What an export is verified with: sentences of the test, validation or training text, each on one line."""
    texts = material.monolingual or material.train["source"][:]
    for pairs in material.evaluated.values():
        texts = pairs["source"][:]
    lines = (" ".join(text.split()) for text in texts if text and text.strip())
    return list(islice(dict.fromkeys(lines), VERIFIED))


def disk_bytes(plan: Plan) -> int:
    """What all stages together leave on the disk, roughly."""
    child, parent = plan.child["float32"], plan.parent["float32"]
    runs = len(plan.training["updates"].keys() - {"collapsed"})
    # In shards, and once more while these are joined.
    distributions = 2 * plan.text["tokens"] * WORD_TOP_K * 6 * bool(plan.training["word_weight"])
    return parent + child + 2 * 4 * runs * child + 3 * child + distributions


def check_room(folder: Path, needed: int) -> None:
    """Raise `OSError` if a disk has less room than will be needed."""
    there = next(each for each in (folder, *folder.resolve().parents) if each.is_dir())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise OSError(
            f"output_dir: the stages leave about {needed / 1e9:.2g} GB in {folder}, and there are {free / 1e9:.2g} GB "
            "free: make room, or choose another disk"
        )


class Compression:
    """The stages of a plan.

    Args:
        group: of all processes.
    """

    def __init__(self, options: CompressOptions, plan: Plan, group: PatientGroup):
        self.options, self.plan, self.group = options, plan, group
        self.output = Path(options.compress.output_dir)

    def run(self) -> None:
        """Do what is not done yet, one stage after the other."""
        stages, state = self.stages(), PartialState()
        for number, stage in enumerate(stages, start=1):
            done = broadcast_object_list([stage.done() if state.is_main_process else None])[0]
            if state.is_main_process:
                print(f"[{number}/{len(stages)}] {stage.name}{': done already' if done else ''}", flush=True)
            if not done:
                with nullcontext() if stage.shared else all_threads():
                    stage.work()
            self.group.wait()
        if state.is_main_process:
            print(f"The child is in {self.output / MODEL}.", flush=True)

    def stages(self) -> list[Stage]:
        """All of them, in order."""
        out, plan = self.output, self.plan
        stages = []
        if self.options.compress.allow_pickle:
            stages.append(Stage("parent", (out / "parent").is_dir, self.save_parent))
        if self.converts_parent:
            stages.append(Stage(CONVERTED, (out / CONVERTED).is_dir, self.convert_parent))
        if self.options.compress.monolingual_file is not None:
            stages.append(Stage("monolingual", (out / "monolingual" / SYNTHESIS).is_file, self.translate, shared=True))
        if plan.vocabulary["trim"]:
            stages.append(Stage("trimmed", (out / "trimmed").is_dir, self.trim))
        stages.append(Stage("collapsed", (out / "collapsed").is_dir, self.collapse))
        stages.append(Stage("distilled", partial(is_finished, out / "distilled"), self.distill, shared=True))
        if plan.child["decoder_layers"] is None:
            stages.append(Stage("depths", (out / DEPTHS).is_file, self.choose_depth, shared=True))
        if "shallow" in plan.training["updates"]:
            stages.append(Stage("shallow", partial(is_finished, out / "shallow"), self.distill_shallow, shared=True))
        stages.append(Stage(MODEL, self.is_laid_out, self.lay_out))
        for engine in engines_of(self.options, plan):
            name = f"export/{engine}"
            stages.append(Stage(name, (out / name).is_dir, partial(self.export, engine)))
        if self.options.shipping.report:
            stages.append(Stage("report", self.has_report, self.report))
        return stages

    # What the stages are told

    @property
    def parent(self) -> tuple[str, str]:
        """Name and revision of the parent, or of its copy in a form that all stages read."""
        if self.options.compress.allow_pickle:
            return str(self.output / "parent"), "main"
        return self.options.compress.model_name_or_path, self.revision

    @property
    def revision(self) -> str:
        """The parent's as it was planned with, to which its repository may have added since."""
        return self.plan.parent["commit"] or self.options.compress.revision

    @property
    def base(self) -> tuple[str, str]:
        """Name and revision of what the child starts from: the parent, with the child's vocabulary."""
        return (str(self.output / "trimmed"), "main") if self.plan.vocabulary["trim"] else self.parent

    @property
    def converts_parent(self) -> bool:
        """Whether the parent is to translate in CTranslate2, which is faster on a CPU."""
        return self.options.compress.monolingual_file is not None and CTRANSLATE2 in self.plan.installed

    def corpus(self) -> CorpusArguments:
        """What is trained on, the parent's translations among it."""
        corpus = replace(
            self.evaluated, validation_file=None, test_file=None, dataset_name=None, dataset_config_name=None
        )
        if (self.output / TRAIN_FILE).is_file():
            train = {"train_file": [str(self.output / TRAIN_FILE)], "max_train_samples": None}
            corpus = replace(corpus, **train, source_column="source", target_column="target")
        if self.options.compress.monolingual_file is None:
            return corpus
        pairs = str(self.output / "monolingual" / PAIRS)
        if not corpus.has_split("train"):
            return replace(corpus, train_file=[pairs], source_column=None, target_column=None)
        return replace(corpus, synthetic_file=[*(corpus.synthetic_file or []), pairs])

    @property
    def evaluated(self) -> CorpusArguments:
        """What is given, with the evaluation splits."""
        corpus = replace(self.options.corpus, **self.plan.text["corpus"])
        if self.plan.text["held_out"]:
            corpus = replace(corpus, validation_file=[str(self.output / HELD_OUT_FILE)])
        return corpus

    @property
    def depth(self) -> int:
        """Of the child's decoder: planned, or chosen by validation."""
        return self.plan.child["decoder_layers"] or json.loads((self.output / DEPTHS).read_text())["decoder_layers"]

    def groups(self, stage: str, **model: Any) -> dict[str, Any]:
        """What a training is told.

        Args:
            model: fields of `ModelArguments`.
        """
        return {
            "model": ModelArguments(dropout=self.options.student.dropout, **model),
            "corpus": self.corpus(),
            "tokenizer": TokenizerArguments(),
            "decoding": self.options.decoding,
            "training": self.training_arguments(stage),
        }

    def train(self, stage: str, **model: Any) -> None:
        """Train a model on the targets."""
        groups = self.groups(stage, **model)
        if complete_checkpoints(self.output / stage):
            groups["training"].resume_from_checkpoint = "true"
        run_training(TrainOptions(**groups))

    def teach(self, stage: str, **model: Any) -> None:
        """Train the child: on the targets and by the parent's distributions, or on the targets alone."""
        training, (teacher, revision) = self.plan.training, self.parent
        if not training["word_weight"]:
            self.train(stage, **model)
            return
        weights = {"word_weight": training["word_weight"], "word_top_k": WORD_TOP_K}
        distill(
            DistillOptions(
                distill=DistillArguments(stages=["train"], distributions_dir=str(self.output / "distributions")),
                teacher=TeacherArguments(teachers=[teacher], teacher_revision=revision, skip_empty_sources=True),
                targets=TargetArguments(targets="reference"),
                loss=DistillationLossArguments(**weights),
                **self.groups(stage, **model),
            )
        )

    def training_arguments(self, stage: str) -> TranslationTrainingArguments:
        """How a stage trains: as the recipes in training/recipes, for as many updates as are planned."""
        student, training = self.options.student, self.plan.training
        updates, child = training["updates"][stage], self.plan.child
        elastic = stage == "distilled" and child["decoder_layers"] is None
        return TranslationTrainingArguments(
            output_dir=str(self.output / stage),
            seed=student.seed,
            max_steps=updates,
            max_tokens=student.max_tokens,
            learning_rate=training["learning_rate"],
            lr_scheduler_type="linear",
            warmup_steps=min(WARM_UP, updates // 10),
            adam_beta2=0.98,
            label_smoothing_factor=0.1,
            bf16=training["bf16"],
            use_cpu=PartialState().device.type == "cpu",  # where bf16 is refused without it
            elastic_decoder_layers=min(child["decoder_depths"]) if elastic else None,
            eval_strategy="no",
            save_strategy="steps",
            save_steps=training["save_steps"][stage],
            save_total_limit=1,
            logging_steps=50,
            report_to="none",
        )

    # The stages

    def save_parent(self) -> None:
        """The parent, as safetensors."""
        args, folder = self.options.compress, self.output / "parent"
        if PartialState().is_main_process:
            model, tokenizer = load_parent(args.model_name_or_path, self.revision, allow_pickle=True)
            with staged_folder(folder) as staging:
                model.save_pretrained(staging)
                tokenizer.save_pretrained(staging)

    def convert_parent(self) -> None:
        """The parent, for CTranslate2."""
        self.write_export(*self.parent, CTRANSLATE2, self.output / CONVERTED)

    def translate(self) -> None:
        """Monolingual text, by the parent."""
        args, corpus, (parent, revision) = self.options.compress, self.evaluated, self.parent
        engine = {"engine": CTRANSLATE2, "ctranslate2_models": [str(self.output / CONVERTED)]}
        synthesize(
            SynthesisArguments(
                monolingual_file=args.monolingual_file,
                output_dir=str(self.output / "monolingual"),
                source_lang=corpus.source_lang,
                target_lang=corpus.target_lang,
                side="source",
                text_column=args.text_column,
                max_source_length=corpus.max_source_length,
                max_target_length=corpus.max_target_length,
            ),
            TeacherArguments(
                teachers=[parent],
                teacher_revision=revision,
                teacher_num_beams=args.teacher_num_beams,
                **(engine if self.converts_parent else {}),
            ),
            TargetArguments(),
        )

    def trim(self) -> None:
        """The parent's vocabulary, to the text that is learned from."""
        wanted, args = self.plan.vocabulary, self.options.compress
        model, tokenizer = load_parent(args.model_name_or_path, self.revision, args.allow_pickle)
        train = load_split(self.corpus(), "train")
        texts = ([text for text in train[side] if text] for side in TEXT_SIDES)
        options = {name: wanted[name] for name in ("max_vocabulary", "characters")}
        plan = plan_trim(model, tokenizer, *texts, **options)
        record = {"text": self.plan.text, **options, **trimmed_sizes(model, tokenizer, plan)}
        trimming = TrimArguments(args.model_name_or_path, str(self.output / "trimmed"), self.revision)
        write_trimmed(trimming, model, tokenizer, plan, record)

    def collapse(self) -> None:
        """The parent's layers, into those that are stored."""
        args, child, student = self.options.compress, self.plan.child, self.options.student
        model, revision = self.base
        if self.base == self.parent:  # by its own name, which goes into the record
            model, revision = args.model_name_or_path, self.revision
        calibration = {"method": "average"}
        if (updates := self.plan.training["updates"].get("collapsed")) is not None:
            calibration = {"method": "calibrated", "calibration_updates": updates}
        collapse_checkpoint(
            CollapseArguments(
                model_name_or_path=model,
                revision=revision,
                allow_pickle=args.allow_pickle,
                output_dir=str(self.output / "collapsed"),
                **{f"{side}_unique_layers": child[f"{side}_unique_layers"] for side in SIDES},
                **{name: child[name] or None for name in ("step_layer_norms", "step_biases")},
                **calibration,
                calibration_max_tokens=student.max_tokens,
                seed=student.seed,
            ),
            self.corpus(),
            self.options.decoding,
            VocabularyArguments(),
        )

    def distill(self) -> None:
        """The parent into the child; where its depth is to be chosen, for all of them."""
        depth = self.plan.child["decoder_layers"]
        self.teach("distilled", model_name_or_path=str(self.output / "collapsed"), decoder_layers=depth)

    def choose_depth(self) -> None:
        """The least depth of the decoder that loses no more BLEU on validation data than it may."""
        most = self.options.goal.max_bleu_loss
        depths = sorted(self.plan.child["decoder_depths"], reverse=True)
        args = DepthSweepArguments(
            model_name_or_path=str(self.output / "distilled"),
            decoder_depths=depths,
            split="validation",
            rounds=1,
        )
        rows = sweep_depths(args, self.evaluated, self.options.decoding)
        name, revision = self.parent
        system = EvaluateArguments(systems=[name], split="validation")
        loaded = {name: load_translator(name, revision)}
        (parent,) = evaluate_systems(system, self.evaluated, self.options.decoding, loaded)
        losses = {row["decoder_layers"]: parent["bleu"] - row["bleu"] for row in rows}
        within = [depth for depth in depths if losses[depth] <= most]
        chosen = min(within, default=max(depths))
        if PartialState().is_main_process:
            if not within:
                logger.warning(
                    f"No decoder depth of {', '.join(map(str, depths))} is within {most:g} BLEU of the parent's "
                    f"{parent['bleu']:.2f} before the last distillation: depth {chosen} falls short by "
                    f"{losses[chosen] - most:.2f}."
                )
            print(f"decoder depth {chosen}: {losses[chosen]:.2f} BLEU behind the parent on validation", flush=True)
            record = {"decoder_layers": chosen, "within": bool(within), "parent": parent, "depths": rows}
            write_json(record, self.output / DEPTHS)

    def distill_shallow(self) -> None:
        """The parent into the child at the depth that was chosen."""
        self.teach("shallow", model_name_or_path=str(self.output / "distilled"), decoder_layers=self.depth)

    def is_laid_out(self) -> bool:
        """Whether what is put on the Hub is there, with a card for that repository, or somebody's own."""
        model = self.output / MODEL
        asked = self.options.shipping.repo
        return model.is_dir() and (asked is None or card_facts(model).get("repository") in (None, asked))

    def lay_out(self) -> None:
        """What is put on the Hub, with its card; where only that is of another repository, the card."""
        if not PartialState().is_main_process:
            return
        if (self.output / MODEL).is_dir():
            renew_card(self.output / MODEL, repository=self.repo, **self.said)
        else:
            last = list(self.plan.training["updates"])[-1]
            lay_out(self.output / last, self.output / MODEL, self.repo, **self.said)

    def has_report(self) -> bool:
        """Whether there is a comparison in all engines, and the child's card has it."""
        model = self.output / MODEL
        whole = (self.output / "report" / "report.html").is_file() and (model / COMPARISON).is_file()
        return whole and self.compares_all and not card_disagreements(model)

    @property
    def compares_all(self) -> bool:
        """Whether the report has all engines."""
        compared = read_mapping(self.output / "report" / "report.json").get("engines", [])
        return {row["engine"] for row in compared} >= set(engines_of(self.options, self.plan))

    @property
    def repo(self) -> str:
        return self.options.shipping.repo or str(self.output / MODEL)

    @property
    def said(self) -> dict[str, Any]:
        """What the card says beside what the folder knows."""
        parent = self.options.compress.model_name_or_path
        return {} if Path(parent).is_dir() else {"base_model": parent}

    def export(self, engine: str) -> None:
        """The child, for an engine, verified, with a shortlist where the engine takes one."""
        folder = self.output / "export" / engine
        self.write_export(str(self.output / MODEL), "main", engine, folder, shortlist=self.options.shipping.shortlist)
        file, most = folder / "model.bin", self.options.goal.target_size
        taken = file.stat().st_size / 1e6 if file.is_file() else 0.0
        if most is not None and self.options.shipping.quantization == "int8" and taken > most:
            logger.warning(f"{file} has {taken:.2f} MB, more than target_size {most:g}")

    def write_export(self, model: str, revision: str, engine: str, folder: Path, shortlist: bool = False) -> None:
        """A model for an engine, by the main process."""
        if not PartialState().is_main_process:
            return
        shipping, module = self.options.shipping, load_engine(engine)
        known = module.QUANTIZATIONS
        folder.parent.mkdir(exist_ok=True)
        export_checkpoint(
            ExportArguments(
                model_name_or_path=model,
                revision=revision,
                to=engine,
                output_dir=str(folder),
                quantization=shipping.quantization if shipping.quantization in known else known[0],
                verify=[str(self.output / VERIFICATION_FILE)],
                min_same=shipping.min_same,
                shortlist=shortlist and hasattr(module, "write_shortlist"),
            ),
            self.corpus(),
            self.options.decoding,
        )

    def report(self) -> None:
        """Parent and child side by side, in the engines that the child was exported to; also in the child's card."""
        if not PartialState().is_main_process:
            return
        corpus, folder, (parent, revision) = self.evaluated, self.output / "report", self.parent
        now = self.options.decoding.decoding_max_tokens
        batches = read_mapping(folder / "work" / "settings.json").get("decoding_max_tokens", now)
        if ((folder / "report.html").is_file() and not self.compares_all) or batches != now:
            shutil.rmtree(folder)
        found = load_evaluation_splits(corpus)
        if (pairs := found.get("test", found.get("validation"))) is not None:
            sources, references = pairs["source"][:], pairs["target"][:]
            split = "test" if "test" in found else "validation"
            name = corpus.split_name(split)
        else:
            name, split = VERIFICATION_FILE, "train"
            sources, references = read_sentences(str(self.output / name), "source"), None
        engines = engines_of(self.options, self.plan)
        exports = [self.output / "export" / engine for engine in engines]
        with alone():  # each engine has a process
            result = compare(
                parent,
                str(self.output / MODEL),
                sources,
                references,
                folder,
                engines=None if exports else ["transformers"],
                parent_exports=[self.output / CONVERTED] if self.converts_parent and CTRANSLATE2 in engines else [],
                child_exports=exports,
                revision=revision,
                decoding=self.options.decoding,
                source_lang=corpus.source_lang,
                target_lang=corpus.target_lang,
                dataset=name,
                split=split,
            )
        result["parent"]["model"] = self.options.compress.model_name_or_path  # not its copy, if it was a pickle
        write_report(result, folder, repository=self.repo, **self.said)
        print_report(result)


def print_plan(plan: Plan, options: CompressOptions) -> None:
    """Print the sizes of parent and child, and the stages with their updates and minutes."""
    header = ["", "encoder", "decoder", "vocabulary", "parameters", "float32 MB", "int8 MB"]
    rows = []
    for name, model in (("parent", plan.parent), ("child", plan.child)):
        entries = list(plan.vocabulary[name].values())
        if not plan.vocabulary["separate_vocabs"]:
            del entries[1:]
        rows.append([name, *(_shape(model, side) for side in SIDES), " + ".join(f"{size:,}" for size in entries)])
        rows[-1] += [f"{model['parameters']:,}", *(f"{model[kind] / 1e6:.2f}" for kind in ("float32", "int8"))]
    print(markdown_table(header, rows))
    if not plan.vocabulary["trim"]:
        print(f"The vocabulary stays: the text needs {plan.vocabulary['needed']:.0%} of its entries.")
    else:
        covered = " and ".join(f"{share:.1%} of the {side}" for side, share in plan.vocabulary["covered"].items())
        print(f"The pieces that stay are {covered} tokens; the others are spelled with them.")
        if plan.text["sentences"]:
            print("The vocabulary is about so large: the pieces of the parent's translations come to it.")
    for depth, ratio in plan.speedup.items():
        print(f"decoder depth {depth}: {ratio:.2f} times the parent's speed on single sentences")
    output, updates = Path(options.compress.output_dir), plan.training["updates"]
    stages = Compression(options, plan, None).stages()
    table = []
    for stage in stages:
        where = output / (DEPTHS if stage.name == "depths" else stage.name)
        table.append([stage.name, where, updates.get(stage.name, ""), f"{plan.minutes.get(stage.name, 0):.1f}"])
    table.append(["all", "", sum(updates.values()), f"{sum(plan.minutes.values()):.1f}"])
    print(markdown_table(["stage", "where", "updates", "minutes, about"], table), flush=True)


def _shape(model: dict[str, Any], side: str) -> str:
    depth = model[f"{side}_layers"] or "/".join(map(str, model["decoder_depths"]))
    stored = model[f"{side}_unique_layers"]
    return f"{depth}" if stored == model[f"{side}_layers"] else f"{stored} x {depth} steps"


def main(argv: list[str] | None = None) -> None:
    unused = ("streaming", "shuffle_buffer_size")
    parser = RecipeParser(CompressOptions.types(), positional="model_name_or_path", unused=unused, description=__doc__)
    compress(CompressOptions(*parser.parse_recipe(argv)))


if __name__ == "__main__":
    run(main, GO_ON)
