"""A program as the teacher of `training/distill.py` and `training/synthesize.py`."""

import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import script, task_options
from reverse_task import reverse_pairs, write_jsonl
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from rs_transformer.corpus import CorpusArguments, load_split
from rs_transformer.utils.map_shards import read_record

# Backwards and in capitals. It notes how many lines it got, and dies at a line where a file says so.
PROGRAM = """
import sys
from pathlib import Path
here = Path(sys.argv[1])
lines = sys.stdin.read().split("\\n")[:-1]
with open(here / "calls", "a") as calls:
    print(len(lines), file=calls)
for line in lines:
    if (here / "deadly").is_file() and (here / "deadly").read_text() == line:
        sys.exit("loading\\nout of memory")
    print(line[::-1].upper())
"""
LANGUAGES = ["--source_lang", "fw", "--target_lang", "bw"]
SIZES = ["--d_model", 16, "--encoder_ffn_dim", 16, "--decoder_ffn_dim", 16, "--encoder_attention_heads", 2]
SIZES += ["--decoder_attention_heads", 2, "--encoder_layers", 2, "--decoder_layers", 2]
SIZES += ["--max_position_embeddings", 32, "--vocabulary", "joint", "--vocab_size", 30]
TRAINING = ["--max_tokens", 256, "--max_steps", 2, "--eval_strategy", "no", "--report_to", "none", "--num_beams", 1]
TRAINING += ["--max_new_tokens", 4]
PAIRS = reverse_pairs(60, seed=9)


def make_program(folder: Path) -> str:
    (folder / "translate.py").write_text(PROGRAM)
    return f"{sys.executable} -S '{folder / 'translate.py'}' '{folder}'"


def calls(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "calls").read_text().splitlines()]


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A folder with a program, and a student in `student` that it has taught after it had died once; its options."""
    folder = tmp_path_factory.mktemp("taught")
    task = {"train": [(source, "x y z") for source, _ in PAIRS]}  # references say nothing of the translations
    task["test"] = [(source, target.upper()) for source, target in reverse_pairs(10, seed=8)]
    task = {split: write_jsonl(folder / f"{split}.jsonl", pairs) for split, pairs in task.items()}
    options = ["--teacher_command", make_program(folder), *LANGUAGES, *task_options(task), "--shard_size", 20]
    options += [*TRAINING, "--max_reference_ratio", 0, "--distilled_dir", folder]
    (folder / "deadly").write_text(PAIRS[25][0])
    with pytest.raises(
        ValueError, match=r"shard 1 \(rows 20 to 39\): teacher_command .*translate.py.* out of memory$"
    ):
        script("distill")(*options, *SIZES, "--output_dir", folder / "student")
    shards = [file.name for file in (folder / "corpus.parquet.shards").glob("*.parquet")]
    assert shards == ["00000000.parquet"]
    (folder / "deadly").unlink()
    script("distill")(*options, *SIZES, "--output_dir", folder / "student")
    assert calls(folder) == [20, 20, 20, 20, 10], "a shard was translated again, or the test set was not"
    return folder, options


def test_a_student_made_anew_learns_from_what_the_program_says(taught):
    folder, options = taught
    rows = pq.read_table(folder / "corpus.parquet").to_pylist()
    assert [row["source"] for row in rows] == [source for source, _ in PAIRS]
    assert [row["hypotheses"] for row in rows] == [[target.upper()] for _, target in PAIRS]
    record = read_record(folder / "corpus.parquet")
    assert "translate.py" in record["settings"]["teacher_command"]
    assert "translate.py" in record["origins"][0]["teachers"][0]["command"]
    student = folder / "student"
    pieces = AutoTokenizer.from_pretrained(student).get_vocab()
    assert {"A", "a"} <= {piece.strip("▁") for piece in pieces}, "the tokenizer knows sources and translations"
    assert not {"x", "▁x"} & pieces.keys(), "and not the references"
    teacher, own = json.loads((student / "evaluation.json").read_text())
    assert (teacher["system"], own["system"]) == (f"{student}/_distillation/teacher_translations.txt", str(student))
    assert teacher["bleu"] == pytest.approx(100)
    assert "Distilled from" in (student / "README.md").read_text()
    assert "training/distill.py recipe.yaml" in (student / "README.md").read_text()
    before = calls(folder)
    script("distill")(*options, *SIZES, "--output_dir", student)
    assert calls(folder) == before


def test_a_student_of_a_checkpoint_shares_the_corpus_and_another_command_is_refused(taught, tmp_path):
    folder, options = taught
    options = [*options, "--model_name_or_path", folder / "student", "--output_dir", tmp_path / "second"]
    script("distill")("generate", "filter", "train", *options)
    assert calls(folder) == [20, 20, 20, 20, 10]
    sizes = [
        AutoModelForSeq2SeqLM.from_pretrained(part).config.d_model
        for part in (folder / "student", tmp_path / "second")
    ]
    assert sizes == [16, 16]
    options += ["--output_dir", tmp_path / "third", "--teacher_command", f"{make_program(folder)} --beam 5"]
    with pytest.raises(ValueError, match=r"corpus.parquet was made with teacher_command=.*, now it is .* --beam 5"):
        script("distill")("generate", *options)


def test_monolingual_text_becomes_all_that_a_training_needs(tmp_path):
    lines = [source for source, _ in PAIRS[:40]]
    odd = ["a b\u2028c d", "e\rf g", ">>bt<< h i", " \u200b", ""]
    (tmp_path / "mono.txt").write_bytes("".join(f"{line}\n" for line in [*lines, *odd]).encode())
    options = ["--monolingual_file", tmp_path / "mono.txt", "--side", "source", *LANGUAGES, "--shard_size", 25]
    options += ["--teacher_command", make_program(tmp_path), "--output_dir", tmp_path / "made"]
    script("synthesize")(*options)
    assert calls(tmp_path) == [25, 18]  # blank text is not given to it
    pairs = tmp_path / "made" / "pairs.parquet"
    found = load_split(CorpusArguments("fw", "bw", train_file=[str(pairs)]), "train")
    assert found["source"][:] == [*lines, *odd[:3]]
    assert found["target"][:] == [*(line[::-1].upper() for line in lines), "D C B A", "G F E", "I H"]
    record = json.loads((tmp_path / "made" / "synthesis.json").read_text())
    assert record["left_out"] == {"no translation": 1}
    training = [*LANGUAGES, "--train_file", pairs, *SIZES, *TRAINING, "--output_dir", tmp_path / "run"]
    script("train")(*training)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["training"]["pairs"] == 43


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--teachers", "somebody"], "teachers is for models that teach, and teacher_command is a program"),
        (["--teacher_num_beams", 4], "teacher_num_beams is for models that teach"),
        (["--teacher_n_best", 2], "teacher_n_best is for models that teach"),
        (["--engine", "ctranslate2"], "engine is for models that teach"),
        (["--word_weight", 0.5], "a program as teacher gives one translation of each sentence and nothing else"),
        (["--targets", "closest"], "a program as teacher gives one translation of each sentence and nothing else"),
        (["--teacher_command", "no-such-program -x"], "teacher_command: there is no program 'no-such-program'"),
        (["--teacher_command", "'"], 'teacher_command "\'" cannot be cut into words'),
    ],
)
def test_what_a_program_cannot_give_is_refused_before_any_work(task, tmp_path, more, message):
    options = ["--teacher_command", make_program(tmp_path), *LANGUAGES, *task_options(task), "--max_train_samples", 9]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        script("distill")(*options, *TRAINING, *SIZES, *more, "--output_dir", tmp_path / "student")
    assert not (tmp_path / "student").exists()
    assert not (tmp_path / "calls").exists()


def test_a_teacher_is_needed_and_tokens_of_a_program_are_not_counted(tmp_path):
    (tmp_path / "mono.txt").write_text("a b c\n")
    options = ["--monolingual_file", tmp_path / "mono.txt", *LANGUAGES, "--output_dir", tmp_path / "made"]
    with pytest.raises(ValueError, match="there is no teacher: give models as teachers, or a program as teacher_comm"):
        script("synthesize")(*options)
    with pytest.raises(ValueError, match="max_source_length and max_target_length count the tokens of a model"):
        script("synthesize")(*options, "--teacher_command", make_program(tmp_path), "--max_source_length", 9)
    assert not (tmp_path / "made").exists()
