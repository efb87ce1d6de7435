"""`training/distill.py`: teacher decoding, targets, training and evaluation, stage by stage."""

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import ctranslate2  # noqa: F401  the engine of one of the tests
import pyarrow.parquet as pq
import pytest
import sentencepiece
import torch
import yaml
from conftest import CHECKPOINTING, script, task_options
from datasets import Dataset
from forked import fork
from killing import kill
from oracle import rs_model
from reverse_task import reverse_pairs, write_jsonl
from sacrebleu.metrics import CHRF
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    M2M100Config,
    M2M100ForConditionalGeneration,
    M2M100Tokenizer,
    MarianMTModel,
)

from rs_transformer import expand
from rs_transformer.commands import distill as distill_command
from rs_transformer.commands import evaluate as evaluate_command
from rs_transformer.corpus import CorpusArguments, load_split
from rs_transformer.decoding import DecodingArguments, translate
from rs_transformer.distillation import teacher_corpus
from rs_transformer.distillation.targets import (
    TargetArguments,
    closest_to_reference,
    longest_repetition,
    reason_to_leave_out,
    write_targets,
)
from rs_transformer.distillation.teacher_corpus import CORPUS_SCHEMA, generate_corpus
from rs_transformer.distillation.teachers import Teacher, TeacherArguments, load_teachers, set_languages
from rs_transformer.export import ctranslate2 as ctranslate2_export
from rs_transformer.modeling_rs_marian import PAD_LOGIT_BIAS
from rs_transformer.tokenization import train_tokenizer
from rs_transformer.utils.map_shards import map_shards, read_record

# A student as small as the teacher: the task is tiny.
STUDENT = ["--d_model", 64, "--encoder_ffn_dim", 128, "--decoder_ffn_dim", 128, "--encoder_attention_heads", 4]
STUDENT += ["--decoder_attention_heads", 4, "--encoder_layers", 2, "--decoder_layers", 2, "--dropout", 0]
STUDENT += ["--init_std", 0.1, "--max_position_embeddings", 32]
TRAINING = ["--max_tokens", 512, "--learning_rate", 2e-3, "--warmup_steps", 100, "--label_smoothing_factor", 0.1]
TRAINING += ["--max_steps", 250, "--eval_strategy", "no", "--save_strategy", "steps", "--save_steps", 100]
TRAINING += ["--report_to", "none", "--seed", 3, "--logging_steps", 50]
LENGTHS = ["--max_source_length", 16, "--max_target_length", 16, "--max_new_tokens", 16, "--num_beams", 1]
LANGUAGES = ["--source_lang", "fw", "--target_lang", "bw"]
DECODING = ["--teacher_num_beams", 3, "--teacher_n_best", 2, "--shard_size", 20]


def options(teacher, task, output, *more):
    return ["--teachers", teacher, "--output_dir", output, *LANGUAGES, *task_options(task), *LENGTHS, *DECODING, *more]


@pytest.fixture(scope="module")
def small(task, made_once) -> dict[str, Path]:
    """The task with 1,000 training pairs."""
    lines = task["train"].read_text().splitlines(keepends=True)
    folder = made_once("small", lambda folder: (folder / "train.jsonl").write_text("".join(lines[:1000])))
    return {**task, "train": folder / "train.jsonl"}


@pytest.fixture(scope="module")
def generated(trained, small, made_once) -> Path:
    """The corpus that the trained model translates in one process, and the targets beside it."""

    def generate(folder: Path) -> None:
        arguments = options(trained, small, folder / "student", "--distilled_dir", folder)
        fork("training/distill.py", "generate", "filter", *arguments)

    return made_once("generated", generate) / "corpus.parquet"


# Teacher decoding


def test_the_corpus_is_the_teachers_beam_search_in_source_order_with_its_provenance(trained, small, generated):
    rows = pq.read_table(generated).to_pylist()
    corpus = load_split(CorpusArguments("fw", "bw", train_file=[str(small["train"])]), "train")
    assert [row["source"] for row in rows] == corpus["source"][:]
    assert [row["target"] for row in rows] == corpus["target"][:]
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(trained), AutoTokenizer.from_pretrained(trained)
    decoding = DecodingArguments(num_beams=3, max_new_tokens=16)
    expected = translate(model, tokenizer, corpus["source"][:], decoding, progress=False)
    assert [row["hypotheses"][0] for row in rows] == expected
    assert {len(row["hypotheses"]) for row in rows} <= {1, 2}  # different hypotheses may have one text
    record = read_record(generated)
    assert record["origins"][0]["teachers"] == [{"name": str(trained), "revision": "main", "commit": None}]
    assert record["origins"][0]["versions"]["torch"] == torch.__version__
    assert record["settings"]["num_beams"] == 3
    assert record["settings"]["n_best"] == 2
    assert len(record["settings"]["teacher_weights"][0]) == 64


def test_two_processes_give_the_same_bytes_as_one(trained, small, generated, tmp_path):
    done = fork("training/distill.py", "generate", *options(trained, small, tmp_path), processes=2)
    assert "50 shards of 20 sentences on 2 processes" in done.stderr
    assert (tmp_path / "_distillation" / "corpus.parquet").read_bytes() == generated.read_bytes()


class Echo:
    """An engine that gives back what it was shown."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def translate_batch(self, input_ids):
        return [["".join(self.tokenizer.convert_ids_to_tokens(ids)[:-1]).replace("▁", " ")] for ids in input_ids]


@pytest.mark.parametrize("knows", [False, "merged", "separate"])
def test_the_tag_of_back_translations_is_shown_to_teachers_that_know_it(tokenizer, tmp_path, monkeypatch, knows):
    tag, args, corpus_args = ">>bt<< ", TeacherArguments(["t"]), CorpusArguments("fw", "bw")
    if knows:
        sides = zip(*reverse_pairs(300, seed=1), strict=True)
        sources, targets = ([*side, *side] for side in sides)
        marked = [*sources[:300], *(tag + source for source in sources[300:])]
        options = {"vocab_size": 28, "vocabulary": knows, "source_lang": "fw", "target_lang": "bw"}
        tokenizer = train_tokenizer(marked, targets, tmp_path, **options)
    size = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    teacher = Teacher("t", None, rs_model(**size, decoder_start_token_id=tokenizer.pad_token_id), tokenizer)
    monkeypatch.setattr(teacher_corpus, "make_engines", lambda *given: [(Echo(tokenizer), teacher)])
    plain, tagged = (
        Dataset.from_dict({"source": sources, "target": ["x"] * 2}) for sources in (["a b", "c"], ["a b", f"{tag}c"])
    )
    file = generate_corpus(tagged, [teacher], args, corpus_args, tmp_path / "c.parquet")
    assert pq.read_table(file)["hypotheses"].to_pylist() == [[" a b"], [">>bt<< c" if knows else " c"]]
    # What was decoded before is no longer taken; other corpora are.
    former = teacher_corpus.generation_settings([teacher], args, corpus_args)
    for name, rows, same in (("plain", plain, True), ("tagged", tagged, bool(knows))):
        made = map_shards(
            rows,
            lambda shard, _: shard | {"hypotheses": [["x"]] * 2},
            tmp_path / name,
            schema=CORPUS_SCHEMA,
            settings=former,
        )
        if same:
            teacher_corpus.check_corpus(made, rows, [teacher], args, corpus_args)
        else:
            with pytest.raises(ValueError, match="was made with back_translated_tag=None"):
                teacher_corpus.check_corpus(made, rows, [teacher], args, corpus_args)


DECODE = "rs_transformer.distillation.teacher_corpus.TransformersEngine.translate_batch"
# Between decoding a shard and writing it, with half of it written, with a whole one that lacks its name, in the merge.
MOMENTS = [(DECODE, 4, "after"), ("pyarrow.parquet.write_table", 9, "amid"), ("os.fsync", 7, "after")]
MOMENTS += [(DECODE, 5, "before"), ("pyarrow.parquet.read_table", 30, "before")]


def test_killed_at_any_moment_it_still_gives_the_same_bytes(trained, small, generated, tmp_path):
    arguments = options(trained, small, tmp_path)
    corpus = tmp_path / "_distillation" / "corpus.parquet"
    shards = corpus.with_name("corpus.parquet.shards")
    kept: dict[str, int] = {}
    for at, call, moment in MOMENTS:
        kill("training/distill.py", "generate", *arguments, at=at, call=call, moment=moment)
        now = {file.name: file.stat().st_mtime_ns for file in shards.glob("*.parquet")}
        assert kept.items() <= now.items()  # a finished shard is not done again
        assert len(now) > len(kept)
        kept = now
    assert len(kept) == 50
    assert not corpus.exists()
    script("distill")("generate", *arguments)
    assert corpus.read_bytes() == generated.read_bytes()


def test_ctranslate2_gives_the_same_translations(trained, small, tmp_path):
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(trained), AutoTokenizer.from_pretrained(trained)
    expand(model).save_pretrained(tmp_path / "marian")
    tokenizer.save_pretrained(tmp_path / "marian")
    ctranslate2_export.convert(str(tmp_path / "marian"), tmp_path / "ct2")
    # The engines count a hypothesis's length differently, so they are compared without a length penalty.
    same = ["--teacher_length_penalty", 0, "--max_train_samples", 200]
    script("distill")("generate", *options(trained, small, tmp_path / "a", *same))
    engine = ["--engine", "ctranslate2", "--ctranslate2_models", tmp_path / "ct2"]
    other = other_vocabulary(trained, tmp_path)
    with pytest.raises(ValueError, match="has not the source vocabulary of the tokenizer"):
        script("distill")("generate", *options(other, small, tmp_path / "b", *same, *engine))
    script("distill")("generate", *options(trained, small, tmp_path / "b", *same, *engine))
    ours, theirs = (tmp_path / name / "_distillation" / "corpus.parquet" for name in "ab")
    best = [[row["hypotheses"][0] for row in pq.read_table(file).to_pylist()] for file in (ours, theirs)]
    assert best[0] == best[1]
    both = [[row["hypotheses"] for row in pq.read_table(file).to_pylist()] for file in (ours, theirs)]
    same = sum(mine == others for mine, others in zip(*both, strict=True))
    assert same >= 190  # of 200: the second best may be one of two that are equally probable
    assert read_record(theirs)["settings"]["engine"] == "ctranslate2"
    assert "ctranslate2" in read_record(theirs)["origins"][0]["versions"]


@pytest.mark.parametrize("mode", ["ensemble", "pool"])
def test_several_teachers_decode_together_or_in_turn(trained, small, tmp_path, mode):
    more = ["--teachers", trained, expanded_copy(trained, tmp_path), "--teacher_mode", mode, "--targets", "closest"]
    script("distill")("generate", *options(trained, small, tmp_path, *more, "--max_train_samples", 50))
    script("distill")("generate", *options(trained, small, tmp_path / "one", "--max_train_samples", 50))
    both, one = (
        pq.read_table(folder / "_distillation" / "corpus.parquet").to_pylist()
        for folder in (tmp_path, tmp_path / "one")
    )
    assert both == one  # equal teachers: the mean is the same, and so is the pool without repetitions
    record = read_record(tmp_path / "_distillation" / "corpus.parquet")
    assert record["settings"]["teacher_mode"] == mode
    assert len(record["origins"][0]["teachers"]) == 2


def expanded_copy(folder, tmp_path):
    expand(AutoModelForSeq2SeqLM.from_pretrained(folder)).save_pretrained(tmp_path / "copy")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "copy")
    return tmp_path / "copy"


# Targets


@pytest.mark.parametrize(
    ("text", "times"),
    [("", 0), ("a b c", 1), ("a a b", 2), ("x a b a b a b y", 3), ("a b c d a b c d", 2), ("no no no no", 4)],
)
def test_longest_repetition(text, times):
    assert longest_repetition(text.split()) == times


@pytest.mark.parametrize(
    ("source", "reference", "translation", "reason"),
    [
        ("s", "a b c", "a b c", ""),
        ("s", "a b c", "", "no translation"),
        ("s", "a b c", None, "no translation"),
        ("s", "a b c d", "a a a a", "repetition"),
        ("s", "ha ha ha ha", "ha ha ha ha", ""),
        ("s", "a", "a b c d", "length"),
        ("s", "a b c d", "e", "length"),
        ("s", None, "a b c d", ""),
        ("A  b", "c d", "a b", "copy of the source"),
        ("a b", "A b", "a b", ""),
    ],
)
def test_reasons_to_leave_a_translation_out(source, reference, translation, reason):
    assert reason_to_leave_out(source, reference, translation, TargetArguments(), "en") == reason
    off = TargetArguments(max_repetitions=0, max_reference_ratio=0, keep_copies=True)
    assert reason_to_leave_out(source, reference, translation, off, "en") == ("" if translation else "no translation")


def test_japanese_is_counted_in_characters():
    for code in ("ja", "jap", "JPN", "jpn_Jpan"):
        assert reason_to_leave_out("s", "こんにちは世界", "ははははは世界", TargetArguments(), code) == "repetition"
    assert reason_to_leave_out("s", "1万円です", "10000円です", TargetArguments(), "ja") == ""


def corpus(tmp_path, rows):
    names = ("source", "target", "hypotheses")
    dataset = Dataset.from_dict(
        {name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
    )
    return map_shards(dataset, lambda shard, advance: shard, tmp_path / "c.parquet", schema=CORPUS_SCHEMA, settings={})


ROWS = [
    ("s1", "the cat sat down", ["a dog stood up", "the cat sat up"]),
    ("s2", "yes", ["yes yes yes yes yes"]),
    ("s3", "he is here", ["s3"]),
    ("s4", "we go", []),
]


@pytest.mark.parametrize("similarity", ["bleu", "chrf"])
def test_targets_are_the_best_or_the_closest_to_the_reference_with_what_is_left_out_counted(tmp_path, similarity):
    file = corpus(tmp_path, ROWS)
    record = write_targets(file, tmp_path / "best.parquet", TargetArguments(), "en")
    assert pq.read_table(tmp_path / "best.parquet").to_pylist() == [
        {"source": "s1", "target": "a dog stood up", "origin": "distilled"}
    ]
    assert record["left_out"] == {"copy of the source": 1, "no translation": 1, "repetition": 1}
    assert (record["pairs"], record["distilled"]) == (1, 1)
    args = TargetArguments(targets="closest", similarity=similarity, add_references=True)
    write_targets(file, tmp_path / "closest.parquet", args, "en")
    rows = [tuple(row.values()) for row in pq.read_table(tmp_path / "closest.parquet").to_pylist()]
    assert rows == [
        ("s1", "the cat sat up", "distilled"),
        *((source, reference, "reference") for source, reference, _ in ROWS),
    ]


def test_translations_that_were_cut_are_left_out_and_counted(tmp_path, tokenizer):
    file = corpus(tmp_path, [("s1", "", ["a b c"]), ("s2", "", ["a b c d"])])
    bound = {"tokenizer": tokenizer, "longest": len(tokenizer(text_target="a b c")["input_ids"])}
    record = write_targets(file, tmp_path / "t.parquet", TargetArguments(), "en", **bound)
    assert (record["pairs"], record["left_out"]) == (1, {"too long or cut": 1})
    assert pq.read_table(tmp_path / "t.parquet")["source"].to_pylist() == ["s1"]
    with pytest.raises(ValueError, match=r"was made with longest=\d, now it is None"):
        write_targets(file, tmp_path / "t.parquet", TargetArguments(), "en")


def test_of_equally_close_hypotheses_the_better_one_is_taken():
    assert closest_to_reference(["b a", "x y", "a b"], "q r", CHRF()) == "b a"


def test_targets_of_other_settings_are_not_overwritten(tmp_path):
    file = corpus(tmp_path, ROWS)
    write_targets(file, tmp_path / "t.parquet", TargetArguments(), "en")
    assert write_targets(file, tmp_path / "t.parquet", TargetArguments(), "en")["pairs"] == 1
    with pytest.raises(ValueError, match="was made with max_repetitions=3, now it is 1"):
        write_targets(file, tmp_path / "t.parquet", TargetArguments(max_repetitions=1), "en")
    with pytest.raises(ValueError, match="no translation of the teacher is left of 1"):
        write_targets(corpus(tmp_path / "other", ROWS[1:2]), tmp_path / "u.parquet", TargetArguments(), "en")


def test_a_translation_that_was_cut_is_no_target_whoever_counts_the_tokens(trained, small, tmp_path):
    more = ["--new_tokenizer", "true", "--max_train_samples", 60, "--teacher_max_new_tokens", 6]
    script("distill")("generate", "filter", *options(trained, small, tmp_path, *more))
    folder = tmp_path / "_distillation"
    translated = [row[0] for row in pq.read_table(folder / "corpus.parquet")["hypotheses"].to_pylist()]
    targets = pq.read_table(folder / "targets.parquet")["target"].to_pylist()
    whole = [text for text in translated if len(text.split()) <= 4]  # and the end of sentence
    assert targets == whole != translated


# The whole command


@pytest.fixture(scope="module")
def distilled(trained, small, generated, made_once) -> Path:
    """A student of the sequence and the word level, by all stages in one command."""
    more = ["--distilled_dir", generated.parent, "--word_weight", 0.5, "--word_top_k", 4, *STUDENT, *TRAINING]

    def train(folder: Path) -> None:
        done = fork("training/distill.py", *options(trained, small, folder, *more))
        (folder / "printed.txt").write_text(done.stdout + done.stderr)

    return made_once("student", train)


def test_one_command_leaves_a_student_that_has_learned_with_its_record(distilled, trained, generated):
    printed = (distilled / "printed.txt").read_text()
    assert "targets: " in printed
    evaluation = json.loads((distilled / "evaluation.json").read_text())
    assert [row["system"] for row in evaluation] == [str(trained), str(distilled)]
    assert evaluation[1]["bleu"] == json.loads((distilled / "results.json").read_text())["test"]["bleu"]
    assert evaluation[1]["bleu"] > 20
    assert evaluation[1]["bootstrap"]["bleu_p"] is not None
    record = json.loads((distilled / "distillation.json").read_text())
    assert record["corpus"].items() <= read_record(generated).items()
    assert record["targets"]["pairs"] + sum(record["targets"]["left_out"].values()) == 1000
    recipe = yaml.safe_load((distilled / "recipe.yaml").read_text())
    assert (recipe["teachers"], recipe["word_weight"], recipe["word_top_k"]) == ([str(trained)], 0.5, 4)
    assert AutoModelForSeq2SeqLM.from_pretrained(distilled).config.decoder_unique_layers == 1


def test_two_processes_learn_what_one_does(trained, small, generated, distilled, tmp_path):
    more = ["--distilled_dir", generated.parent, "--word_weight", 0.5, "--word_top_k", 4, *STUDENT, *TRAINING]
    more += ["--max_steps", 50, "--logging_steps", 1]
    losses = []
    for processes, budget in ((1, 512), (2, 256)):
        folder = tmp_path / str(processes)
        each = ["--max_tokens", budget]
        arguments = options(trained, small, folder, *more, *each)
        fork("training/distill.py", "filter", "train", *arguments, processes=processes)
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        losses.append([row["loss"] for row in history if "loss" in row])
    assert len(losses[0]) == 50
    assert losses[1] == pytest.approx(losses[0], abs=2e-3)


def test_the_same_command_does_nothing_twice_and_another_is_refused(distilled, trained, small, generated):
    before = {file: file.stat().st_mtime_ns for file in distilled.rglob("*") if file.is_file()}
    more = ["--distilled_dir", generated.parent, "--word_weight", 0.5, "--word_top_k", 4, *STUDENT, *TRAINING]
    script("distill")(*options(trained, small, distilled, *more))
    changed = {file.name for file, moment in before.items() if file.stat().st_mtime_ns != moment}
    assert changed == {"distillation.json", "evaluation.json", "run.log"}
    with pytest.raises(ValueError, match=r"holds a run with word_weight=0.5, now it is 0.25"):
        script("distill")(*options(trained, small, distilled, *more, "--word_weight", 0.25))
    with pytest.raises(ValueError, match=r"holds a run with warmup_steps=100.0, now it is 9"):
        script("distill")(*options(trained, small, distilled, *more, "--warmup_steps", 9))


def test_a_training_that_was_stopped_goes_on(trained, small, generated, distilled, tmp_path):
    more = ["--distilled_dir", generated.parent, "--word_weight", 0.5, "--word_top_k", 4, *STUDENT, *TRAINING]
    arguments = options(trained, small, tmp_path, *more)
    save = "rs_transformer.training.trainer.TranslationTrainer._save_checkpoint"
    kill("training/distill.py", *arguments, at=save, moment="after")
    script("distill")("train", *arguments)
    results = [json.loads((folder / "results.json").read_text()) for folder in (tmp_path, distilled)]
    assert results[0]["test"] == results[1]["test"]


def test_word_level_alone_learns_from_the_references_and_matching_runs_in_two_processes(trained, small, tmp_path):
    more = ["--targets", "reference", "--word_weight", 0.7, "--hidden_weight", 0.1, "--attention_weight", 0.1]
    more += [*STUDENT, *TRAINING, "--max_steps", 20, "--decoder_layers", 1]
    fork("training/distill.py", "train", "evaluate", *options(trained, small, tmp_path, *more), processes=2)
    assert not (tmp_path / "_distillation" / "corpus.parquet").exists()
    assert json.loads((tmp_path / "results.json").read_text())["training"]["updates"] == 20
    teacher, _ = json.loads((tmp_path / "evaluation.json").read_text())
    model = AutoModelForSeq2SeqLM.from_pretrained(trained)
    assert teacher["parameters"] == model.num_parameters(only_trainable=True)


def test_a_student_can_have_a_tokenizer_of_its_own(trained, small, generated, tmp_path):
    more = [
        "--distilled_dir",
        generated.parent,
        "--new_tokenizer",
        "true",
        "--vocabulary",
        "joint",
        "--vocab_size",
        20,
    ]
    script("distill")(
        "filter", "train", *options(trained, small, tmp_path, *more, *STUDENT, *TRAINING, "--max_steps", 5)
    )
    sizes = [len(AutoTokenizer.from_pretrained(folder)) for folder in (trained, tmp_path)]
    assert sizes[0] != sizes[1]


def test_a_collapsed_parent_is_distilled_further(trained, small, generated, tmp_path):
    more = ["--distilled_dir", generated.parent, "--model_name_or_path", trained, "--decoder_layers", 1, *TRAINING]
    script("distill")("filter", "train", *options(trained, small, tmp_path, *more, "--max_steps", 20))
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path).config.decoder_layers == 1


# Errors, before any decoding starts


@pytest.fixture
def no_decoding(monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("decoding has started")

    monkeypatch.setattr("rs_transformer.commands.distill.generate_corpus", forbidden)


def other_vocabulary(trained, tmp_path):
    AutoModelForSeq2SeqLM.from_pretrained(trained).save_pretrained(tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(trained)
    tokenizer.save_pretrained(tmp_path / "other")
    file = tmp_path / "other" / "vocab.json"
    vocabulary = json.loads(file.read_text())
    first, second = list(vocabulary)[5:7]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(vocabulary))
    return tmp_path / "other"


def test_another_vocabulary_is_named_where_distributions_are_learned(trained, small, tmp_path, no_decoding):
    other = other_vocabulary(trained, tmp_path)
    more = [*STUDENT, *TRAINING, "--tokenizer_name_or_path", other]
    with pytest.raises(ValueError, match=r"must have one vocabulary .* the vocabulary differs \(28 and 28 entries, '"):
        script("distill")(*options(trained, small, tmp_path / "s", *more, "--word_weight", 0.5))
    with pytest.raises(AssertionError, match="decoding has started"):  # for translations alone it does not matter
        script("distill")(*options(trained, small, tmp_path / "s", *more))
    with pytest.raises(ValueError, match="cannot be in an ensemble with"):
        script("distill")(*options(trained, small, tmp_path / "s", "--teachers", trained, other))


def test_a_teacher_that_is_no_sequence_to_sequence_model_is_named(trained, small, tmp_path, no_decoding):
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=28)
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="is a bert model, no sequence-to-sequence model: it cannot teach"):
        script("distill")(*options(tmp_path / "bert", small, tmp_path / "s"))


@pytest.mark.parametrize("known", [True, False])
def test_a_teacher_of_several_target_languages_is_told_which(trained, small, tmp_path, known):
    shutil.copytree(trained, tmp_path / "many", ignore=shutil.ignore_patterns("checkpoint-*"))
    file = tmp_path / "many" / "vocab.json"
    vocabulary = json.loads(file.read_text())
    file.write_text(json.dumps({(">>bw<<" if entry == "▁" else entry): i for entry, i in vocabulary.items()}))
    more = ["--teachers", tmp_path / "many", "--max_train_samples", 3]
    if known:
        script("distill")("generate", *options(trained, small, tmp_path / "s", *more, "--teacher_target_code", "bw"))
        record = read_record(tmp_path / "s" / "_distillation" / "corpus.parquet")
        assert record["settings"]["teacher_codes"] == [None, "bw"]
    else:
        with pytest.raises(ValueError, match="has several target languages: give teacher_target_code, one of bw"):
            script("distill")("generate", *options(trained, small, tmp_path / "s", *more))


def test_a_teacher_of_several_target_languages_is_scored_with_its_code(task, tokenizer, tmp_path, monkeypatch):
    size = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    model = rs_model(**size, decoder_start_token_id=tokenizer.pad_token_id)
    corpus_args, shown = CorpusArguments("fw", "bw", test_file=[str(task["test"])]), []

    def translated(model, tokenizer, sources, decoding):
        shown.append(sources[0])
        return sources, 1.0

    monkeypatch.setattr(evaluate_command, "timed_translate", translated)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    monkeypatch.setattr(distill_command, "is_finished", lambda folder: True)
    told = SimpleNamespace(teacher=TeacherArguments(["t"]), corpus=corpus_args, decoding=DecodingArguments())
    told.output = tmp_path
    test = load_split(corpus_args, "test")
    distill_command.compare_to_teachers(told, [Teacher("t", None, model, tokenizer, ">>bw<< ")], test, None)
    assert shown == [f">>bw<< {test['source'][0]}", test["source"][0]]
    rows = json.loads((tmp_path / "evaluation.json").read_text())
    assert [row["system"] for row in rows] == ["t", str(tmp_path)]


def test_a_multilingual_teacher_starts_with_its_target_language(tmp_path):
    tokenizer = multilingual(tmp_path)
    model = M2M100ForConditionalGeneration(
        M2M100Config(
            vocab_size=len(tokenizer),
            d_model=8,
            encoder_layers=1,
            decoder_layers=1,
            encoder_ffn_dim=8,
            encoder_attention_heads=1,
            decoder_attention_heads=1,
            decoder_ffn_dim=8,
        )
    )
    args = TeacherArguments(["m"], teacher_source_code="fr", teacher_target_code="deu_Latn")
    assert set_languages("m", model, tokenizer, args) == ""
    assert tokenizer("a")["input_ids"][0] == tokenizer.get_lang_id("fr")
    assert model.generation_config.forced_bos_token_id == tokenizer.get_lang_id("de")
    with pytest.raises(ValueError, match="m is multilingual: give teacher_source_code and teacher_target_code"):
        set_languages("m", model, tokenizer, TeacherArguments(["m"]))
    args = TeacherArguments(["m"], teacher_source_code="xx", teacher_target_code="de")
    with pytest.raises(ValueError, match="m knows no language 'xx'"):
        set_languages("m", model, tokenizer, args)


def multilingual(tmp_path):
    words = io.BytesIO()
    sentences = iter(["a b c d e f", "g h i j k l"] * 20)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=sentences, model_writer=words, vocab_size=17)
    (tmp_path / "m.model").write_bytes(words.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=words.getvalue())
    entries = ["<s>", "<pad>", "</s>", "<unk>"] + [pieces.id_to_piece(i) for i in range(3, 17)]
    (tmp_path / "vocab.json").write_text(json.dumps({entry: index for index, entry in enumerate(entries)}))
    return M2M100Tokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "m.model"))


def test_padding_of_a_stock_teacher_is_barred(trained, small, tmp_path):
    folder = expanded_copy(trained, tmp_path)
    stock = MarianMTModel.from_pretrained(folder)
    stock.final_logits_bias.zero_()
    stock.save_pretrained(folder)
    (teacher,) = load_teachers(TeacherArguments([str(folder)]), CorpusArguments("fw", "bw"))
    assert teacher.model.final_logits_bias[0, teacher.tokenizer.pad_token_id] == PAD_LOGIT_BIAS


def test_a_corpus_of_another_search_is_not_taken_for_the_one_asked_for(trained, small, generated, tmp_path):
    more = ["--distilled_dir", generated.parent, "--teacher_num_beams", 2]
    with pytest.raises(ValueError, match=r"was made with num_beams=3, now it is 2"):
        script("distill")("filter", *options(trained, small, tmp_path, *more))
    more = ["--distilled_dir", generated.parent]
    with pytest.raises(ValueError, match=r"was made with rows=1000, now it is 900"):
        script("distill")("filter", *options(trained, small, tmp_path, *more, "--max_train_samples", 900))
    script("distill")("filter", *options(trained, small, tmp_path, *more))
    more += [*STUDENT, *TRAINING, "--teacher_num_beams", 2]
    with pytest.raises(ValueError, match=r"was made with num_beams=3, now it is 2"):
        script("distill")("train", *options(trained, small, tmp_path, *more))


def test_a_teacher_of_another_depth_is_another_teacher(trained):
    deep, shallow = (
        Teacher(
            "t", None, AutoModelForSeq2SeqLM.from_pretrained(trained, **depth), AutoTokenizer.from_pretrained(trained)
        )
        for depth in ({}, {"decoder_layers": 1})
    )
    assert deep.digest != shallow.digest


def test_an_empty_source_is_named_and_can_be_skipped(trained, small, generated, tmp_path, no_decoding):
    pairs = [("a b", "b a"), ("  ", "c"), ("d e", "e d")]
    files = {**small, "train": write_jsonl(tmp_path / "train.jsonl", pairs)}
    with pytest.raises(ValueError, match=r"source of 1 training pairs is empty, first in row 1 \(from 0\)"):
        script("distill")("generate", *options(trained, files, tmp_path / "s"))


def test_skipped_sources_and_overlong_ones_get_no_translation(trained, small, tmp_path):
    pairs = [("a b", "b a"), (None, "c"), ("d e", "e d"), (" ".join("abcdefghijkl" * 2), "l k")]
    files = {**small, "train": write_jsonl(tmp_path / "train.jsonl", pairs)}
    script("distill")("generate", "filter", *options(trained, files, tmp_path / "s", "--skip_empty_sources", "true"))
    rows = pq.read_table(tmp_path / "s" / "_distillation" / "corpus.parquet").to_pylist()
    assert [bool(row["hypotheses"]) for row in rows] == [True, False, True, False]
    record = json.loads((tmp_path / "s" / "distillation.json").read_text())
    assert record["targets"]["left_out"] == {"no translation": 2}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--target_lang", "xx"], "train.jsonl has no language 'xx'; its languages: fw, bw"),
        (["--source_lang", "bw", "--target_lang", "fw"], "the model translates from fw to bw, not from bw to fw"),
        (["--teacher_n_best", 9], r"teacher_n_best must be at most teacher_num_beams \(3\), got 9"),
        (["--stages", "train", "cook"], "there is no stage 'cook'; stages: generate, filter, train, evaluate"),
        (["--targets", "reference"], "targets=reference distils nothing: set word_weight"),
        (["--decoder_layers", 0], "decoder_layers must be at least 1, got 0"),
        (["--engine", "ctranslate2"], "ctranslate2_models and engine=ctranslate2 go together"),
        (["--word_weight", 0.5, "--word_top_k", 99], r"word_top_k must be at most the vocabulary \(28\), got 99"),
        (["--hidden_weight", 1, "--d_model", 32], r"hidden_weight needs equal widths, got d_model 32 \(student\)"),
        (["--hidden_weight", 1, "--decoder_layer_mapping", 0, 5], r"holds the teacher's layers 0..1, or -1, got 5"),
        (["--targets", "closest", "--teacher_n_best", 1], "targets=closest has nothing to choose from"),
        (["--streaming", "true"], "streaming does not go with distillation"),
        (["--attention_weight", 1, "--attention_dropout", 0.1], "set attention_dropout to 0, got 0.1"),
        (["--word_weight", 0.5, "--max_source_length", 64], r"has 32 positions: lower max_source_length .* \(64\)"),
        (["--new_tokenizer", "true", "--word_weight", 0.5], "need the teacher's tokenizer, not a new one"),
        (["--teacher_target_code", "xx"], "is not multilingual: leave teacher_source_code"),
        (
            ["--hidden_weight", 1, "--elastic_decoder_layers", 1],
            "need every step in each update: leave growing_depths",
        ),
        (["--growing_depths", 1, "--growing_updates", 999], "growing_updates must end before the last update"),
        (["--elastic_decoder_layers", 7], r"elastic_decoder_layers must lie between .* got 7"),
        (["--metric_for_best_model", "blue"], "metric_for_best_model must be one of loss, bleu, chrf, got 'blue'"),
        (["--lr_scheduler_type", "warmup_stable_decay"], "lr_scheduler_type and lr_scheduler_kwargs: .*num_decay_st"),
        (["--lr_scheduler_kwargs", '{"foo": 1}'], "lr_scheduler_type and lr_scheduler_kwargs: .*foo"),
        (
            [
                "--attention_weight",
                1,
                f"--{CHECKPOINTING}",
                "true",
                f"--{CHECKPOINTING}_kwargs",
                '{"use_reentrant": true}',
            ],
            "attention_weight learns nothing through reentrant checkpointing",
        ),
        (["--label_names", "foo"], "there is no use for label_names here"),
        (["--remove_unused_columns", "false"], "there is no use for remove_unused_columns here"),
        (["--optim", "schedule_free_adamw"], "optim: .*schedulefree"),
        (["--report_to", "wandb"], "report_to: .*wandb"),
        (["--teachers", "nowhere"], "there is no folder 'nowhere', and the Hub does not give it"),
    ],
)
def test_bad_options_are_named_before_any_decoding_starts(trained, small, tmp_path, no_decoding, more, message):
    with pytest.raises((ValueError, OSError), match=message):
        script("distill")(*options(trained, small, tmp_path / "s", *STUDENT, *TRAINING, *more))
    assert not (tmp_path / "s").exists()


def test_a_stage_whose_input_is_missing_says_which_stage_makes_it(trained, small, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no teacher's corpus .* the stage generate makes it"):
        script("distill")("filter", *options(trained, small, tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no targets .* the stage filter makes them"):
        script("distill")("train", *options(trained, small, tmp_path, *STUDENT, *TRAINING))
    with pytest.raises(FileNotFoundError, match=r"no trained student .* the stage train makes it"):
        script("distill")("evaluate", *options(trained, small, tmp_path))
