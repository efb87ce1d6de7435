"""Marian's format and its own engine: the same translations, and the model back from the file."""

import json
import re
from collections import Counter

import numpy as np
import pytest
import torch
import yaml
from conftest import RECIPE, ROOT, odd_tokenizer, script, task_options
from oracle import batch, marian, rs_model, with_own_weights
from reverse_task import reverse_pairs
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, MarianTokenizer, pipeline

from rs_transformer.checkpoints import load_translator
from rs_transformer.decoding import DecodingArguments, TransformersEngine, generate_texts
from rs_transformer.shortlist import make_shortlist, restricted
from rs_transformer.tokenization import train_tokenizer
from rs_transformer.tokenization import vocabulary as side_of
from rs_transformer.training.model import config_from_tokenizer

pytest.importorskip("pymarian", reason="there are wheels of pymarian for Linux on x86-64 and Python < 3.13 alone")
from rs_transformer.export import marian as marian_export

export = script("export")
# Padded batches: short sentences and longer ones than the model has learned.
SENTENCES = [source for source, _ in reverse_pairs(30, seed=11)] + ["a b c d e f g h i j k l a b", "l k j i h g f e d"]


@pytest.fixture(scope="module")
def adapted(trained, task, made_once):
    """The trained model after one more epoch, with the positions of Marian's engine."""
    options = ["--model_name_or_path", trained, "--marian_positions", "true", "--num_train_epochs", 1]
    options += ["--warmup_steps", 5, "--lr_scheduler_type", "linear", *task_options(task), "--output_dir"]
    return made_once("adapted", lambda folder: script("train")(RECIPE, *options, folder))


def save(folder, *parts):
    for part in parts:
        part.save_pretrained(folder)
    return folder


def translations(engine, tokenizer, sentences=SENTENCES):
    return engine.translate_batch([tokenizer(sentence)["input_ids"] for sentence in sentences])


def snippets():
    page = (ROOT / "docs" / "export.md").read_text().split("## Marian\n")[1]
    return re.findall(r"```python\n(.+?)```", page, re.DOTALL)


@pytest.mark.parametrize("decoder_layers", [1, 2, 6])
def test_marians_engine_gives_the_translations_of_pytorch(adapted, tmp_path, decoder_layers):
    model = AutoModelForSeq2SeqLM.from_pretrained(adapted, decoder_layers=decoder_layers)
    tokenizer = AutoTokenizer.from_pretrained(adapted)
    save(tmp_path / "model", model, tokenizer)
    texts = ["--verify", *SENTENCES, "--max_new_tokens", 31]
    export(tmp_path / "model", "--to", "marian", "--output_dir", tmp_path / "marian", *texts)
    found = {}
    for search in ({"num_beams": 1, "max_new_tokens": 31}, {"num_beams": 4, "max_new_tokens": 6}):
        decoding = DecodingArguments(length_penalty=0.0, **search)
        ours = translations(TransformersEngine(model, tokenizer, decoding), tokenizer)
        found[search["num_beams"]] = ours
        # The tokenizer comes along, so the folder is all that is needed.
        engine = marian_export.load(tmp_path / "marian", AutoTokenizer.from_pretrained(tmp_path / "marian"), decoding)
        assert translations(engine, tokenizer) == ours
    # At the depth that it was trained at the model has learned the task, and the limit on the length shows.
    assert decoder_layers != 2 or found[1][0] == [" ".join(reversed(SENTENCES[0].split()))]
    assert max(len(text.split()) for (text,) in found[4]) <= 5


def test_the_file_has_the_shared_decoder_layer_once_and_the_encoder_written_out(adapted, tmp_path):
    marian_export.convert(str(adapted), tmp_path)
    with np.load(tmp_path / "model.npz") as file:
        options = yaml.safe_load(file["special:model.yml"].tobytes().decode().rstrip("\0"))
        layers = {re.match(r"(encoder|decoder)_l(\d+)", name) for name in file.files} - {None}
    assert {match.group() for match in layers} == {"encoder_l1", "encoder_l2", "decoder_l1"}
    assert options["transformer-tied-layers"] == [1, 1]


@pytest.mark.parametrize("vocabulary", ["joint", "separate"])
@pytest.mark.parametrize(
    ("fields", "unique_layers"),
    [
        ({}, [1, 1]),
        ({"deepnorm": True}, [1, 1]),
        # What tells the steps apart is folded into layers that differ.
        ({"step_embeddings": True, "step_layer_norms": True, "step_biases": True}, [3, 4]),
        ({"encoder_unique_layers": 2, "decoder_unique_layers": 3, "layer_sharing": "cycle_rev"}, [2, 3]),
    ],
    ids=["one-layer", "deepnorm", "steps-told-apart", "several-layers"],
)
def test_every_kind_of_model_translates_in_marian_and_comes_back(tmp_path, vocabulary, fields, unique_layers):
    languages = {"source_lang": "fw", "target_lang": "bw"}
    sides = zip(*reverse_pairs(1000, seed=1), strict=True)
    tokenizer = train_tokenizer(*sides, tmp_path / "t", vocab_size=28, vocabulary=vocabulary, **languages)
    sizes = {"encoder_layers": 3, "decoder_layers": 4, "marian_positions": True}
    model = rs_model(**config_from_tokenizer(tokenizer), **{**sizes, **fields})
    marian_export.convert(str(save(tmp_path / "model", model, tokenizer)), tmp_path / "marian")
    back = marian_export.read(tmp_path / "marian" / "model.npz", tokenizer)
    assert [back.config.encoder_unique_layers, back.config.decoder_unique_layers] == unique_layers
    inputs = batch() | {"labels": batch()["labels"] % 20}
    inputs["input_ids"] = inputs["input_ids"] % 20
    with torch.inference_mode():
        logits = [part(**inputs).logits for part in (model, back)]
    torch.testing.assert_close(*logits, atol=2e-4, rtol=1e-4)
    # Random models repeat themselves whatever the source: the scores show more than the translations do.
    decoding = DecodingArguments(num_beams=4, length_penalty=0.0, max_new_tokens=12)
    inputs = tokenizer(SENTENCES, return_tensors="pt", padding=True)
    kwargs = decoding.generate_kwargs(model)
    ours = model.generate(**inputs, **kwargs, return_dict_in_generate=True, output_scores=True).sequences_scores
    engine = marian_export.load(tmp_path / "marian", tokenizer, decoding).engine
    lines = [" ".join(tokenizer.tokenize(sentence)) for sentence in SENTENCES]
    limit = {"max-length-factor": 11 / inputs["input_ids"].shape[1], "mini-batch": len(lines), "maxi-batch": 1}
    best = {}
    for line in engine.translate(lines, **limit, **{"n-best": True}):
        number, *_, score = line.split(" ||| ")
        best.setdefault(int(number), float(score))
    assert best == pytest.approx(dict(enumerate(ours.tolist())), abs=2e-3)


def test_the_documented_loop_translates(adapted, tmp_path, monkeypatch):
    marian_export.convert(str(adapted), tmp_path / "rs6-marian")
    monkeypatch.chdir(tmp_path)
    lines = snippets()[0].replace("彼は水泳が得意だ。", "a b c").rstrip().rsplit("\n", 1)
    names = {}
    exec(f"{lines[0]}\ntranslation = {lines[1]}", names)
    assert names["translation"] == [["c b a"]]


def test_stock_marian_in_half_precision_with_padding_amid_its_vocabulary(tokenizer, tmp_path):
    """And with an emoji, other widths a side, and a vocabulary that is smaller than the embeddings."""
    entries = sorted(tokenizer.encoder, key=tokenizer.encoder.get)
    entries.remove("<pad>")
    entries[5:5] = ["<pad>", "▁😀", "no", '"\\']
    (tmp_path / "vocab.json").write_text(json.dumps({entry: index for index, entry in enumerate(entries)}))
    pieces = {"source_spm": tokenizer.spm_files[0], "target_spm": tokenizer.spm_files[1]}
    other = MarianTokenizer(vocab=str(tmp_path / "vocab.json"), **pieces, source_lang="a", target_lang="b")
    fields = config_from_tokenizer(other) | {"vocab_size": len(entries) + 8, "decoder_vocab_size": len(entries) + 8}
    model = marian(**fields, encoder_ffn_dim=48).half()
    with torch.no_grad():  # the engine has no rows for them
        model.final_logits_bias[:, len(entries) :] = -1e4
    marian_export.convert(str(save(tmp_path / "model", model, other)), tmp_path / "marian")
    back = marian_export.read(tmp_path / "marian" / "model.npz", other)
    assert back.config.pad_token_id == 5
    assert torch.equal(back.model.shared.weight, model.model.shared.weight[: len(entries)].float())
    decoding = DecodingArguments(num_beams=1, max_new_tokens=12)
    ours = translations(TransformersEngine(back, other, decoding), other)
    assert translations(marian_export.load(tmp_path / "marian", other, decoding), other) == ours


def test_empty_sources_and_the_longest_translation(adapted, tokenizer, tmp_path):
    save(tmp_path / "model", rs_model(**config_from_tokenizer(tokenizer), marian_positions=True), tokenizer)
    sentences = ["a b", "", "c d", "", ""]
    for folder, longest in ((adapted, 16), (tmp_path / "model", 32)):
        marian_export.convert(str(folder), tmp_path / f"marian{longest}")
        decoding = DecodingArguments(num_beams=1, max_new_tokens=longest)
        its_tokenizer = AutoTokenizer.from_pretrained(folder)
        engine = marian_export.load(tmp_path / f"marian{longest}", its_tokenizer, decoding)
        found = translations(engine, its_tokenizer, sentences)
        assert [bool(text) for (text,) in found] == [True, False, True, False, False]
        assert translations(engine, its_tokenizer, ["", ""]) == [[""], [""]]
    # The random model never ends; float(31 / 29) * 29 is more than 31.
    source = [3] * 28 + [tokenizer.eos_token_id]
    ours = TransformersEngine(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model"), tokenizer, decoding)
    assert engine.translate_batch([source]) == ours.translate_batch([source])


def test_vocabularies_are_read_as_marian_writes_them(tmp_path):
    (tmp_path / "vocab.yml").write_text(
        "</s>: 0\n<unk>: 1\n1: 2\nno: 3\n=: 4\n~: 5\n2020-01-01: 6\n", encoding="utf-8"
    )
    spm = tmp_path / "spm"
    train_tokenizer(["a b c"], ["x y z"], spm, source_lang="a", target_lang="b", vocab_size=7)
    files = [tmp_path / "vocab.yml", tmp_path / "spm" / ".." / "vocab.yml"]
    names = {"source_lang": "a", "target_lang": "b"}
    found = marian_export.convert_tokenizer(files, spm / "source.spm", spm / "target.spm", tmp_path / "out", **names)
    assert not found.separate_vocabs
    expected = ["</s>", "<unk>", "1", "no", "=", "~", "2020-01-01", "<pad>"]
    assert found.convert_ids_to_tokens(range(8)) == expected


def test_layers_that_no_scheme_shares_so_are_stored_and_named(tokenizer, tmp_path, caplog):
    model = marian(**config_from_tokenizer(tokenizer))
    model.model.decoder.layers[4].load_state_dict(model.model.decoder.layers[0].state_dict())
    marian_export.convert(str(save(tmp_path / "model", model, tokenizer)), tmp_path / "marian")
    with caplog.at_level("WARNING", logger="rs_transformer"):
        back = marian_export.read(tmp_path / "marian" / "model.npz", tokenizer)
    assert back.config.decoder_unique_layers == 6
    assert "decoder's layers are shared as [0, 1, 2, 3, 0, 4]" in caplog.text


def test_a_model_that_marian_trained_becomes_a_folder_as_documented(adapted, tmp_path, monkeypatch):
    """What Marian leaves, as `convert` writes it, without our tokenizer's files."""
    marian_export.convert(str(adapted), tmp_path / "marian")
    for file in (tmp_path / "marian").iterdir():
        if file.name not in ("model.npz", "vocab.yml", "source.spm", "target.spm"):
            file.unlink()
    monkeypatch.chdir(tmp_path)
    exec(snippets()[1], {})
    translator = pipeline("translation", model="rs-marian", max_length=31)
    original = pipeline("translation", model=str(adapted), max_length=31)
    assert translator(SENTENCES) == original(SENTENCES)
    assert translator.model.config.decoder_unique_layers == 1


def test_positions_that_marian_does_not_compute_are_warned_of(trained, tmp_path, caplog):
    with caplog.at_level("WARNING", logger="rs_transformer"):
        marian_export.convert(str(trained), tmp_path)
    assert "see marian_positions in docs/export.md" in caplog.text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation_function": "gelu"}, "no activation_function 'gelu', only swish, silu, relu"),
        ({"decoder_attention_heads": 2}, "one number of heads, the model 4 in the encoder and 2 in the decoder"),
        ({"scale_embedding": False}, "scale_embedding=false"),
        ({"tie_word_embeddings": False}, "weights of its own"),
    ],
)
def test_models_that_marian_cannot_run_are_named(tokenizer, tmp_path, fields, message):
    folder = save(tmp_path / "model", rs_model(**config_from_tokenizer(tokenizer), **fields), tokenizer)
    with pytest.raises(ValueError, match=message):
        marian_export.convert(str(folder), tmp_path / "marian")


def test_a_start_embedding_that_is_not_zero_is_named(tokenizer, tmp_path):
    model = marian(**config_from_tokenizer(tokenizer))
    with torch.no_grad():
        model.model.shared.weight[model.config.decoder_start_token_id] = 1.0
    with pytest.raises(ValueError, match="starts a translation from an embedding of zeros"):
        marian_export.convert(str(save(tmp_path / "model", model, tokenizer)), tmp_path / "marian")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transformer-preprocess": "n"}, "has transformer-preprocess 'n'; only '' can be read"),
        ({"type": "s2s"}, "has type 's2s'; only 'transformer' can be read"),
        ({"right-left": True}, "has right-left True; only False can be read"),
        ({"tied-embeddings-all": False}, "neither tied-embeddings-all nor tied-embeddings"),
    ],
)
def test_what_cannot_be_read_is_named(trained, tmp_path, options, message):
    marian_export.convert(str(trained), tmp_path)
    with np.load(tmp_path / "model.npz") as file:
        tensors = dict(file)
    known = yaml.safe_load(tensors["special:model.yml"].tobytes().decode().rstrip("\0"))
    text = yaml.safe_dump(known | options).encode() + b"\0"
    tensors["special:model.yml"] = np.frombuffer(text, dtype=np.int8)
    np.savez(tmp_path / "other.npz", **tensors)
    with pytest.raises(ValueError, match=message):
        marian_export.read(tmp_path / "other.npz")
    del tensors["special:model.yml"]
    np.savez(tmp_path / "none.npz", **tensors)
    with pytest.raises(ValueError, match="is no model of Marian's"):
        marian_export.read(tmp_path / "none.npz")


@pytest.mark.parametrize("vocabulary", ["joint", "separate"])
def test_marian_takes_each_token_by_its_id(tmp_path, vocabulary):
    """With padding amid the vocabulary, tokens that were added, and embeddings filled up to a multiple."""
    tokenizer = odd_tokenizer(tmp_path / "model", vocabulary)
    model = rs_model(**config_from_tokenizer(tokenizer), marian_positions=True)
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    if vocabulary == "separate":
        model.resize_decoder_token_embeddings(64)
    model.save_pretrained(tmp_path / "model")
    marian_export.convert(str(tmp_path / "model"), tmp_path / "marian")
    model, tokenizer = load_translator(str(tmp_path / "model"))
    back = marian_export.read(tmp_path / "marian" / "model.npz", tokenizer)
    sentences = [">>eng<< a f <term> b", "c d e <term>", "a"]
    inputs = tokenizer(sentences, text_target=["<term> z v u", "w", "x y"], return_tensors="pt", padding=True)
    with torch.inference_mode():
        given, found = (part(**inputs).logits[..., : len(tokenizer)] for part in (model, back))
    torch.testing.assert_close(found, given, atol=2e-4, rtol=1e-4)
    decoding = DecodingArguments(num_beams=2, length_penalty=0.0, max_new_tokens=9)
    engine = marian_export.load(tmp_path / "marian", tokenizer, decoding)
    ours = translations(TransformersEngine(model, tokenizer, decoding), tokenizer, sentences)
    assert translations(engine, tokenizer, sentences) == ours


@pytest.mark.parametrize("vocabulary", ["merged", "separate"])
def test_marian_says_what_the_shortlist_has(tmp_path, vocabulary):
    """And what fills it up to a multiple of eight: as if that were in the shortlist."""
    languages = {"source_lang": "fw", "target_lang": "bw"}
    letters = [[" ".join(chr(first + i) for i in range(20))] * 9 for first in (ord("a"), ord("α"))]
    tokenizer = train_tokenizer(*letters, tmp_path / "model", vocab_size=25, vocabulary=vocabulary, **languages)
    model = rs_model(**config_from_tokenizer(tokenizer), marian_positions=True)
    save(tmp_path / "model", model, tokenizer)
    sources, targets = (list(side_of(tokenizer, side).values()) for side in ("source", "target"))
    links = {source: Counter({targets[-1 - source % 9]: 3, targets[-1 - source % 7]: 1}) for source in sources[2:]}
    shortlist = make_shortlist(tokenizer, links, Counter(targets[-3:]))
    marian_export.convert(str(tmp_path / "model"), tmp_path / "marian")
    with pytest.raises(ValueError, match=r"there is no shortlist .*lex.s2t"):
        marian_export.load(tmp_path / "marian", tokenizer, DecodingArguments(), use_shortlist=True)
    marian_export.write_shortlist(shortlist, tmp_path / "marian", tokenizer)
    settings = yaml.safe_load((tmp_path / "marian" / "decoder.yml").read_text())
    assert settings["shortlist"][0] == "lex.s2t"
    decoding = DecodingArguments(num_beams=2, length_penalty=0.0, max_new_tokens=9)
    engine = marian_export.load(tmp_path / "marian", tokenizer, decoding, use_shortlist=True)
    whole = marian_export.load(tmp_path / "marian", tokenizer, decoding)
    differ = 0
    for sentence in ("a b", "c", "d e f"):
        ids = tokenizer(sentence)["input_ids"]
        kept = set(shortlist.entries(ids))
        fill = iter(targets[1:])
        while len(kept) % 8:
            kept.add(next(fill))
        ours = generate_texts(restricted(model, sorted(kept)), tokenizer, [ids], decoding)
        assert engine.translate_batch([ids]) == ours
        differ += whole.translate_batch([ids]) != ours
    assert differ


def test_embeddings_of_their_own_are_written_and_an_output_of_its_own_is_named(tokenizer, tmp_path):
    model = rs_model(**config_from_tokenizer(tokenizer), encoder_layers=2, decoder_layers=2, marian_positions=True)
    own = with_own_weights(model, "model.encoder.embed_tokens.weight")
    marian_export.convert(str(save(tmp_path / "model", own, tokenizer)), tmp_path / "marian")
    back = marian_export.read(tmp_path / "marian" / "model.npz", tokenizer)
    inputs = tokenizer(SENTENCES[:3], text_target=SENTENCES[:3], return_tensors="pt", padding=True)
    with torch.inference_mode():
        torch.testing.assert_close(back(**inputs).logits, own(**inputs).logits, atol=2e-4, rtol=1e-4)
    save(tmp_path / "other", with_own_weights(model), tokenizer)
    with pytest.raises(ValueError, match="the output has weights of its own"):
        marian_export.convert(str(tmp_path / "other"), tmp_path / "none")


def rewritten(change):
    """Writes a model's tensors anew, changed."""

    def rewrite(file):
        with np.load(file) as opened:
            tensors = dict(opened)
        change(tensors)
        np.savez(file, **tensors)

    return rewrite


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-5000]), "model.npz is missing, truncated or damaged"),
        (flip, "model.npz is missing, truncated or damaged"),
        (lambda file: file.write_bytes(b""), "model.npz is missing, truncated or damaged"),
        (lambda file: file.unlink(), "model.npz is missing, truncated or damaged"),
        (rewritten(lambda tensors: tensors.pop("decoder_l1_ffn_W1")), "model.npz lacks decoder_l1_ffn_W1"),
        (
            rewritten(lambda tensors: tensors.update(Wemb=tensors["Wemb"][:-1])),
            r"model.npz has Wemb in the shape \(26, 64\), which must be \(27, 64\)",
        ),
        (lambda file: file.with_name("decoder.yml").write_text("models"), r"has no decoder\.yml that can be read"),
        (lambda file: file.with_name("vocab.yml").write_text('"a": 0'), "has not the source vocabulary"),
    ],
)
def test_a_damaged_folder_is_named_and_does_not_end_the_process(trained, tmp_path, damage, message):
    marian_export.convert(str(trained), tmp_path)
    damage(tmp_path / "model.npz")
    with pytest.raises(ValueError, match=message):
        marian_export.load(tmp_path, AutoTokenizer.from_pretrained(trained), DecodingArguments())


def test_a_folder_of_another_model_is_named(trained, tmp_path):
    other = train_tokenizer(["a b c"], ["x y z"], tmp_path / "t", source_lang="a", target_lang="b", vocab_size=7)
    decoding = DecodingArguments()
    with pytest.raises(ValueError, match=r"has no decoder\.yml"):
        marian_export.load(tmp_path, other, decoding)
    marian_export.convert(str(trained), tmp_path / "marian")
    with pytest.raises(ValueError, match="has not the source vocabulary of the tokenizer"):
        marian_export.load(tmp_path / "marian", other, decoding)
    with pytest.raises(ValueError, match="they do not belong together"):
        marian_export.read(tmp_path / "marian" / "model.npz", other)
    with pytest.raises(ValueError, match="takes no path with a space"):
        marian_export.load(tmp_path / "my marian", other, decoding)


def test_ctranslate2_takes_marians_positions(adapted, tmp_path):
    texts = ["--verify", *SENTENCES, "--max_new_tokens", 31]
    export(adapted, "--to", "ctranslate2", "--output_dir", tmp_path / "out", *texts)


def test_stock_marian_is_refused_positions_that_it_would_lose(adapted, tmp_path):
    with pytest.raises(ValueError, match="has marian_positions"):
        export(adapted, "--to", "transformers", "--output_dir", tmp_path / "out", "--verify", "a b")
    assert not list(tmp_path.iterdir())
