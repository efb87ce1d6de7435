"""`training/synthesize.py`: training pairs of monolingual text, and what a training makes of them."""

import json

import pyarrow.parquet as pq
import pytest
from conftest import RECIPE, script, task_options
from reverse_task import reverse_pairs
from transformers import AutoTokenizer, pipeline

from rs_transformer.corpus import CorpusArguments, load_split
from rs_transformer.tokenization import encode, train_tokenizer
from rs_transformer.training.model import ModelArguments, build_model

TEACHER = ["--teacher_num_beams", 1, "--max_source_length", 16, "--max_target_length", 16, "--shard_size", 20]


@pytest.fixture
def text(tmp_path):
    """Monolingual text, with a blank line and a sentence that is there twice, and its reversal."""
    pairs = reverse_pairs(60, seed=9)
    file = tmp_path / "mono.txt"
    file.write_text("\n".join([*(source.upper() for source, _ in pairs), "", pairs[0][0].upper()]) + "\n")
    return file, dict(pairs)


def pairs_of(folder):
    return pq.read_table(folder / "pairs.parquet").to_pylist()


@pytest.mark.parametrize("side", ["target", "source"])
def test_text_and_translations_are_the_pairs_of_a_training(trained, text, tmp_path, side):
    file, reversals = text
    # The model goes from fw to bw; translating back it serves one that is to go from bw to fw.
    languages = ("bw", "fw") if side == "target" else ("fw", "bw")
    options = ["--monolingual_file", file, "--lowercase", "true", "--teachers", trained, "--side", side, *TEACHER]
    options += ["--source_lang", languages[0], "--target_lang", languages[1], "--output_dir", tmp_path / "pairs"]
    script("synthesize")(*options)
    rows = pairs_of(tmp_path / "pairs")
    record = json.loads((tmp_path / "pairs" / "synthesis.json").read_text())
    assert record["sentences"] == 60
    assert record["pairs"] == len(rows) == 60 - sum(record["left_out"].values())
    assert record["corpus"]["origins"][0]["teachers"][0]["name"] == str(trained)
    right = 0
    for row in rows:
        given, made = (row["target"], row["source"]) if side == "target" else (row["source"], row["target"])
        if side == "target":
            assert made.startswith(">>bt<< ")
            made = made.removeprefix(">>bt<< ")
        right += made == reversals[given]
    assert right > 0.9 * len(rows)
    corpus = tmp_path / "pairs" / "translated.parquet"
    before = corpus.stat().st_mtime_ns
    script("synthesize")(*options)
    assert corpus.stat().st_mtime_ns == before, "it was translated again"
    with pytest.raises(ValueError, match="num_beams"):
        script("synthesize")(*options, "--teacher_num_beams", 2)


def test_a_tag_and_what_was_cut_are_left_out_and_a_model_of_the_wrong_direction_is_refused(trained, text, tmp_path):
    options = ["--monolingual_file", text[0], "--lowercase", "true", "--teachers", trained, *TEACHER]
    languages = ["--source_lang", "bw", "--target_lang", "fw", "--tag", "false", "--max_target_length", 6]
    script("synthesize")(*options, *languages, "--output_dir", tmp_path / "untagged")
    sources = [row["source"] for row in pairs_of(tmp_path / "untagged")]
    assert not any(">>" in source for source in sources)
    assert max(len(source.split()) for source in sources) == 5  # and the end: no half of a longer one is among them
    longer = sum(len(source.split()) > 5 for source in text[1])
    left_out = json.loads((tmp_path / "untagged" / "synthesis.json").read_text())["left_out"]
    assert left_out["too long or cut"] == pytest.approx(longer, abs=2)
    with pytest.raises(ValueError, match="translates from fw to bw"):
        script("synthesize")(*options, "--source_lang", "fw", "--target_lang", "bw", "--output_dir", tmp_path / "no")
    assert not (tmp_path / "no").exists()
    two = ["--teachers", trained, trained, "--teacher_mode", "pool"]
    with pytest.raises(ValueError, match="teacher_mode=pool has several translations of a sentence, and one is kept"):
        script("synthesize")(*options, *languages, *two, "--output_dir", tmp_path / "no")


@pytest.mark.parametrize(("weight", "number"), [(1, 50), (2, 100), (0.5, 25), (1.5, 75)])
def test_synthetic_pairs_count_as_their_weight_says(task, text, tmp_path, weight, number):
    rows = [{"source": f">>bt<< {target}", "target": source} for source, target in text[1].items()][:50]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    options = {"source_lang": "bw", "target_lang": "fw", "train_file": [str(task["train"])], "max_train_samples": 200}
    args = CorpusArguments(**options, synthetic_file=[str(file)], synthetic_weight=weight)
    train = load_split(args, "train")
    plain = load_split(CorpusArguments(**options), "train")
    assert train[:200] == plain[:]
    added = train.select(range(200, len(train))).to_list()
    assert len(added) == number
    counts = [added.count(row) for row in rows]
    assert set(counts) <= {int(weight), int(weight) + (weight % 1 > 0)}
    assert sum(counts) == number
    with pytest.raises(ValueError, match="synthetic_weight must be more than 0"):
        CorpusArguments(**options, synthetic_file=[str(file)], synthetic_weight=0)
    with pytest.raises(ValueError, match="synthetic_file and streaming do not go together"):
        CorpusArguments(**options, synthetic_file=[str(file)], streaming=True)
    with pytest.raises(FileNotFoundError, match="synthetic_file: there is no file"):
        load_split(CorpusArguments(**options, synthetic_file=["nothing.parquet"]), "train")


@pytest.mark.parametrize("vocabulary", ["merged", "joint", "separate"])
def test_a_new_tokenizer_has_the_codes_that_sources_begin_with(tmp_path, vocabulary):
    sources, targets = zip(*reverse_pairs(300, seed=1), strict=True)
    marked = [*sources, *(f">>bt<< {source}" for source in sources), ">>deu<<a b c"]
    options = {"source_lang": "fw", "target_lang": "bw", "vocab_size": 28, "vocabulary": vocabulary}
    train_tokenizer(marked, [*targets, *targets, "c b a"], tmp_path / "marked", **options)
    train_tokenizer([*sources, *sources, "a b c"], [*targets, *targets, "c b a"], tmp_path / "plain", **options)
    tokenizer, plain = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("marked", "plain"))
    codes = [encode(tokenizer, [f"{code} a b c"])[0] for code in (">>bt<<", ">>deu<<", ">>fra<<")]
    for name in ("source.spm", "target.spm"):  # the pieces are those of the text alone
        assert (tmp_path / "marked" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    (bare,) = encode(tokenizer, ["a b c"])
    assert codes[0][1:] == codes[1][1:] == bare
    assert len({codes[0][0], codes[1][0], tokenizer.unk_token_id}) == 3
    assert len(codes[2]) > len(bare) + 1, "one that it has not is text"
    assert len(bare) == len(encode(plain, ["a b c"])[0])
    build_model(ModelArguments(d_model=16, encoder_attention_heads=2, decoder_attention_heads=2), tokenizer)


def test_the_tag_is_no_language_of_a_trained_model(task, text, tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [{"source": f">>bt<< {target}", "target": source} for source, target in text[1].items()]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    options = [RECIPE, *task_options(task), "--synthetic_file", file, "--max_steps", 2, "--eval_strategy", "no"]
    script("train")(*options, "--save_strategy", "no", "--vocab_size", 28, "--output_dir", tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["training"]["pairs"] == 4060
    translator = pipeline("translation_fw_to_bw", model=str(tmp_path / "run"))
    assert translator.tokenizer.supported_language_codes == [">>bt<<"]
    translator("a b c", src_lang="fw", tgt_lang="bw")
    with pytest.raises(ValueError, match="translates from fw to bw"):
        pipeline("translation_bw_to_fw", model=str(tmp_path / "run"))("a b c")
