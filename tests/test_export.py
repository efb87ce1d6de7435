"""`training/export.py` and the engines that it writes for: the same translations as PyTorch's."""

import json
import re
import shutil
import sys
from importlib.metadata import version

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from conftest import ROOT, odd_tokenizer, script
from forked import fork
from oracle import marian, rs_model, unrolled_marian, with_own_weights
from reverse_task import reverse_pairs
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, MarianConfig, MarianMTModel

from rs_transformer.checkpoints import load_translator
from rs_transformer.commands import export as command
from rs_transformer.decoding import DecodingArguments, TransformersEngine, decode_all, encode_sources, translate
from rs_transformer.export import ctranslate2 as ctranslate2_export
from rs_transformer.export import onnx as onnx_export
from rs_transformer.export import version_of
from rs_transformer.model_card import build_card
from rs_transformer.tokenization import convert_source_ids_to_tokens, train_tokenizer
from rs_transformer.training.model import config_from_tokenizer

export = script("export")
# Padded batches: short sentences and longer ones than the model has learned.
SENTENCES = [source for source, _ in reverse_pairs(30, seed=11)] + ["a b c d e f g h i j k l a b", "l k j i h g f e d"]


def options(model, output, *more):
    return [model, "--output_dir", output, "--verify", *SENTENCES, "--max_new_tokens", 31, *more]


@pytest.mark.parametrize("decoder_layers", [1, 2, 6])
def test_ctranslate2_gives_the_translations_of_pytorch(trained, tmp_path, decoder_layers):
    model = AutoModelForSeq2SeqLM.from_pretrained(trained, decoder_layers=decoder_layers)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    export(*options(tmp_path / "model", tmp_path / "ct2", "--to", "ctranslate2"))
    # The tokenizer comes along, so the folder is all that is needed.
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ct2")
    for search in ({"num_beams": 1}, {"num_beams": 4, "length_penalty": 0.0}):
        decoding = DecodingArguments(max_new_tokens=31, **search)
        engine = ctranslate2_export.load(tmp_path / "ct2", tokenizer, decoding)
        found = engine.translate_batch([tokenizer(sentence)["input_ids"] for sentence in SENTENCES])
        assert [text for (text,) in found] == translate(model, tokenizer, SENTENCES, decoding, progress=False)
    record = json.loads((tmp_path / "ct2" / "export.json").read_text())
    assert [(row["num_beams"], row["same"]) for row in record["verification"]] == [(1, 1), (4, 1)]


@pytest.mark.parametrize(
    "fields",
    [
        {"deepnorm": True},
        {"step_embeddings": True, "step_layer_norms": True, "step_biases": True, "decoder_unique_layers": 2},
        {"step_adapter_rank": 2, "decoder_unique_layers": 2},
        {"encoder_unique_layers": 2, "decoder_unique_layers": 3, "layer_sharing": "cycle_rev"},
        {"tie_encoder_decoder_layers": True, "step_biases": True},
        {"encoder_attention_heads": 4, "decoder_attention_heads": 1},
    ],
    ids=["deepnorm", "steps-told-apart", "adapters", "several-layers", "tied-sides", "heads"],
)
def test_ctranslate2_takes_every_kind_of_model(tokenizer, tmp_path, fields):
    sizes = {"encoder_layers": 3, "decoder_layers": 4, "max_position_embeddings": 64}
    for part in (rs_model(**config_from_tokenizer(tokenizer), **{**sizes, **fields}), tokenizer):
        part.save_pretrained(tmp_path / "model")
    export(*options(tmp_path / "model", tmp_path / "ct2", "--to", "ctranslate2"))


@pytest.mark.parametrize("model", ["trained", "trained_apart"], ids=["one-vocabulary", "two-vocabularies"])
def test_the_ctranslate2_examples_of_page_and_card_translate(model, request, tmp_path, monkeypatch):
    folder = request.getfixturevalue(model)
    ctranslate2_export.convert(str(folder), tmp_path / "rs6-ct2")
    (tmp_path / "rs6").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    for text in ((ROOT / "docs" / "export.md").read_text(), build_card("rs6", "rs6").text):
        blocks = re.findall(r"```python\n(.+?)```", text, re.DOTALL)
        (example,) = (block for block in blocks if block.startswith("import ctranslate2\nfrom"))
        assert last_value(re.sub("彼は水泳が得意だ。|…", "g h i j", example)) == "j i h g"


def last_value(example):
    """What the last line of an example gives."""
    *lines, last = example.rstrip().split("\n")
    names = {}
    exec("\n".join([*lines, f"last = {last}"]), names)
    return names["last"]


def test_ctranslate2_takes_separate_vocabularies(tmp_path):
    sides = [["a b c d e f"] * 4, ["u v w x y z"] * 4]
    names = {"source_lang": "aa", "target_lang": "zz", "vocab_size": 11, "vocabulary": "separate"}
    tokenizer = train_tokenizer(*sides, tmp_path / "model", **names)
    model = rs_model(**config_from_tokenizer(tokenizer), encoder_layers=2, decoder_layers=2)
    model.save_pretrained(tmp_path / "model")
    texts = ["--verify", "a b f", "c", "e d c b a"]
    export(tmp_path / "model", "--to", "ctranslate2", "--output_dir", tmp_path / "ct2", *texts, "--max_new_tokens", 20)
    vocabulary = json.loads((tmp_path / "ct2" / "target_vocabulary.json").read_text())
    assert "▁z" in vocabulary
    assert "▁a" not in vocabulary


@pytest.mark.parametrize(
    ("vocabulary", "kind", "multiple"),
    [
        ("joint", rs_model, 64),
        ("joint", marian, None),
        ("separate", rs_model, 64),
        ("joint", lambda **fields: with_own_weights(rs_model(**fields)), None),
    ],
    ids=["rs", "marian", "separate", "own-projection"],
)
def test_ctranslate2_takes_each_token_by_its_id(tmp_path, vocabulary, kind, multiple):
    """With padding amid the vocabulary, tokens that were added, and embeddings filled up to a multiple."""
    folder = tmp_path / "model"
    tokenizer = odd_tokenizer(folder, vocabulary)
    model = kind(**config_from_tokenizer(tokenizer))
    if multiple:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=multiple, mean_resizing=False)
        if vocabulary == "separate":
            model.resize_decoder_token_embeddings(multiple)
    model.save_pretrained(folder)
    ctranslate2_export.convert(str(folder), tmp_path / "ct2")
    model, tokenizer = load_translator(str(folder))
    engine = ctranslate2_export.load(tmp_path / "ct2", tokenizer, DecodingArguments(max_new_tokens=9))
    text, target = ">>eng<< a f <term> b", "<term> z v u"
    inputs = tokenizer(text, text_target=target, return_tensors="pt")
    tokens = convert_source_ids_to_tokens(tokenizer, inputs["input_ids"][0].tolist())
    assert tokens == [*tokenizer.tokenize(text), tokenizer.eos_token]  # as the documents have them
    names = {index: token for token, index in engine.entries.items()}
    labels = [names[index] for index in inputs["labels"][0].tolist()]
    (found,) = engine.engine.score_batch([tokens], [labels[:-1]])
    with torch.inference_mode():
        log_probs = model(**inputs).logits.log_softmax(-1).gather(-1, inputs["labels"][..., None]).flatten()
    torch.testing.assert_close(torch.tensor(found.log_probs), log_probs, rtol=1e-4, atol=1e-4)
    sources = [inputs["input_ids"][0].tolist(), tokenizer("c d e <term>")["input_ids"]]
    assert engine.translate_batch(sources) == TransformersEngine(
        model, tokenizer, DecodingArguments(max_new_tokens=9)
    ).translate_batch(sources)


@pytest.mark.parametrize("kind", [rs_model, marian])
def test_ctranslate2_starts_from_the_models_own_embedding_where_that_is_not_zero(kind, tokenizer, tmp_path):
    """As in an OPUS-MT model that the Trainer of transformers has tuned, whose start moves with the tied output."""
    model = kind(**config_from_tokenizer(tokenizer)).eval()
    inputs = tokenizer("a b c", text_target="d e", return_tensors="pt")
    with torch.no_grad():
        before = model(**inputs).logits
        model.model.shared.weight[model.config.decoder_start_token_id] = torch.linspace(-1, 1, model.config.d_model)
        logits = model(**inputs).logits
    assert not torch.allclose(logits, before, atol=1e-2)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    ctranslate2_export.convert(str(tmp_path / "model"), tmp_path / "ct2")
    engine = ctranslate2_export.load(tmp_path / "ct2", tokenizer, DecodingArguments(max_new_tokens=9))
    tokens = [tokenizer.convert_ids_to_tokens(inputs[name][0].tolist()) for name in ("input_ids", "labels")]
    (found,) = engine.engine.score_batch([tokens[0]], [tokens[1][:-1]])
    log_probs = logits[..., :-1].log_softmax(-1).gather(-1, inputs["labels"][..., None]).flatten()  # without padding
    torch.testing.assert_close(torch.tensor(found.log_probs), log_probs, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def onnx_folder(trained, made_once):
    """The trained model for ONNX Runtime, which takes long to write."""
    return made_once("rs6-onnx", lambda folder: export(*options(trained, folder, "--to", "onnx")))


EVERY_OPTION = {
    **dict.fromkeys(("step_layer_norms", "step_biases", "step_embeddings", "deepnorm", "marian_positions"), True),
    **{"step_adapter_rank": 3, "tie_encoder_decoder_layers": True, "layer_sharing": "cycle_rev"},
    **{"encoder_layers": 2, "encoder_unique_layers": 2, "decoder_layers": 3, "decoder_unique_layers": 2},
}
TWO_LAYERS = {"encoder_layers": 1, "decoder_layers": 2, "decoder_unique_layers": 2}
ONNX_MODELS = {
    "every-option": lambda **fields: rs_model(**EVERY_OPTION, **fields),
    "separate": lambda **fields: unrolled_marian(with_own_weights(rs_model(**TWO_LAYERS, **fields))),
}


@pytest.fixture
def make_onnx_model(trained, onnx_folder, made_once, tokenizer, tmp_path):
    """By name a model, its tokenizer, and the folder of its graphs."""

    def make(name):
        if name == "trained":
            return AutoModelForSeq2SeqLM.from_pretrained(trained), AutoTokenizer.from_pretrained(trained), onnx_folder
        its_tokenizer = tokenizer if name != "separate" else odd_tokenizer(tmp_path / "tokenizer", "separate")
        sizes = config_from_tokenizer(its_tokenizer)
        if name != "separate":
            sizes |= {"vocab_size": 8192, "decoder_vocab_size": 8192}  # PyTorch copies small embeddings
        model = ONNX_MODELS[name](**sizes)

        def fill(folder):
            for part in (model, its_tokenizer):
                part.save_pretrained(folder / "model")
            onnx_export.convert(str(folder / "model"), folder / "onnx")

        return model, its_tokenizer, made_once(f"onnx-{name}", fill) / "onnx"

    return make


def write_quantized(graphs, quantization):
    """Beside graphs in float32 those of fewer bits, as `convert` writes them."""
    written = [file.with_name(f"{file.stem}{onnx_export.SUFFIXES[quantization]}.onnx") for file in graphs]
    for file, small in zip(graphs, written, strict=True):
        onnx_export._write(onnx_ir.load(file), small, quantization)
    return written


@pytest.fixture(params=["trained", *ONNX_MODELS])
def onnx_model(request, make_onnx_model):
    return make_onnx_model(request.param)


@pytest.fixture
def graphs(make_onnx_model):
    """A model of random weights, and its graphs."""
    model, _, folder = make_onnx_model("every-option")
    return model, onnx_export.OnnxForSeq2SeqLM(folder)


def test_without_a_mask_all_tokens_of_a_source_count(graphs):
    model, onnx_model = graphs
    ids = torch.tensor([[3, 4, 5, model.config.eos_token_id]])
    search = {"max_new_tokens": 5, "num_beams": 2}
    assert onnx_model.generate(ids, **search).tolist() == model.generate(ids, **search).tolist()
    start = torch.full((1, 1), model.config.decoder_start_token_id)
    logits = [each(input_ids=ids, decoder_input_ids=start).logits for each in graphs]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def onnx_sessions(folder):
    return [onnxruntime.InferenceSession(file) for file in onnx_export.graph_files(folder)]


def named_tensors(nodes):
    return [(node.name, node.type, node.shape) for node in nodes]


def test_onnx_graphs_give_the_logits_of_pytorch(onnx_model):
    """Two tokens at first, then two with a cache, then one by one."""
    model, tokenizer, folder = onnx_model
    encoder, decoder = onnx_sessions(folder)
    source = tokenizer(SENTENCES[:5] + SENTENCES[-2:], return_tensors="pt", padding=True)
    targets = torch.randint(1, 10, (7, 6), generator=torch.Generator().manual_seed(0))
    targets[:, 0] = model.config.decoder_start_token_id
    with torch.inference_mode():
        expected = model(**source, decoder_input_ids=targets, use_cache=False).logits.numpy()
    source, targets = {name: tensor.numpy() for name, tensor in source.items()}, targets.numpy()
    (states,) = encoder.run(None, source)
    feed = {"encoder_attention_mask": source["attention_mask"], "encoder_hidden_states": states}
    for past in decoder.get_inputs()[3:-1]:
        feed[past.name] = np.zeros((7, past.shape[1], 0, past.shape[3]), np.float32)
    names = [output.name for output in decoder.get_outputs()]
    for start, end in [(0, 2), (2, 4), (4, 5), (5, 6)]:
        feed |= {"input_ids": targets[:, start:end], "use_cache_branch": np.array([start > 0])}
        logits, *presents = decoder.run(names, feed)
        np.testing.assert_allclose(logits, expected[:, start:end], atol=1e-4)
        feed |= {
            name.replace("present", "past_key_values"): new for name, new in zip(names[1:], presents, strict=True)
        }
        names = [name for name in names if "encoder" not in name]


def test_onnx_graphs_have_the_names_and_shapes_of_optimum(onnx_model):
    model, _, folder = onnx_model
    encoder, decoder = onnx_sessions(folder)
    source, width, config = ["batch_size", "encoder_sequence_length"], model.config.d_model, model.config
    ids = ("tensor(int64)", source)
    assert named_tensors(encoder.get_inputs()) == [("input_ids", *ids), ("attention_mask", *ids)]
    assert named_tensors(encoder.get_outputs()) == [("last_hidden_state", "tensor(float)", [*source, width])]

    heads = config.decoder_attention_heads
    sides = {"decoder": "past_decoder_sequence_length", "encoder": "encoder_sequence_length_out"}
    pasts = [
        (f"{step}.{side}.{part}", "tensor(float)", ["batch_size", heads, length, width // heads])
        for step in range(config.decoder_layers)
        for side, length in sides.items()
        for part in ("key", "value")
    ]
    assert named_tensors(decoder.get_inputs()) == [
        ("encoder_attention_mask", *ids),
        ("input_ids", "tensor(int64)", ["batch_size", "decoder_sequence_length"]),
        ("encoder_hidden_states", "tensor(float)", [*source, width]),
        *((f"past_key_values.{name}", *rest) for name, *rest in pasts),
        ("use_cache_branch", "tensor(bool)", [1]),
    ]
    entries = config.decoder_vocab_size
    logits, *presents = named_tensors(decoder.get_outputs())
    assert logits == ("logits", "tensor(float)", ["batch_size", "decoder_sequence_length", entries])
    assert [name for name, *_ in presents] == [f"present.{name}" for name, *_ in pasts]


def test_onnx_folder_says_that_it_is_a_marian(onnx_model):
    model, tokenizer, folder = onnx_model
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("marian", ["MarianMTModel"])
    stock = MarianConfig.from_pretrained(folder)
    for name in ("encoder_layers", "decoder_layers", "d_model", "vocab_size", "pad_token_id", "scale_embedding"):
        assert getattr(stock, name) == getattr(model.config, name)
    assert not {"auto_map", "custom_pipelines", "layer_sharing", "step_biases"} & config.keys()
    assert not list(folder.glob("*.py"))
    assert AutoTokenizer.from_pretrained(folder)(SENTENCES[0]) == tokenizer(SENTENCES[0])


def stored_weights(file):
    """Of a graph and the branches in it."""
    graph = onnx.load(file).graph
    branches = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return [onnx.numpy_helper.to_array(tensor) for each in (graph, *branches) for tensor in each.initializer]


@pytest.mark.parametrize("quantization", ["float32", "int8"])
def test_onnx_graphs_hold_each_weight_once(make_onnx_model, tmp_path, quantization):
    model, _, folder = make_onnx_model("every-option")
    graphs = onnx_export.graph_files(folder)
    if quantization == "int8":
        shutil.copytree(folder, tmp_path / "int8")
        graphs = write_quantized(onnx_export.graph_files(tmp_path / "int8"), "int8")
    sides = ([model.model.encoder], [model.model.decoder, model.lm_head])
    for file, modules in zip(graphs, sides, strict=True):
        parameters = {each for module in modules for each in module.parameters()}
        stored = stored_weights(file)
        found = sorted(array.size for array in stored if array.ndim == 2 and len(array) > 1)
        assert found == sorted(each.numel() for each in parameters if each.dim() == 2)
        if quantization == "int8":
            assert sum(each.nbytes for each in stored) < 0.4 * sum(each.nbytes for each in parameters)


def test_onnx_without_its_files_is_named(onnx_folder):
    with pytest.raises(ValueError, match=r"has no onnx/encoder_model_quantized\.onnx"):
        onnx_export.OnnxForSeq2SeqLM(onnx_folder, "int8")


def test_onnx_gives_the_translations_of_pytorch_and_the_documented_loop_works(onnx_folder, monkeypatch):
    record = json.loads((onnx_folder / "export.json").read_text())
    assert [(row["num_beams"], row["same"]) for row in record["verification"]] == [(1, 1), (4, 1)]
    told = json.loads((onnx_folder / "tokenizer_config.json").read_text())
    assert not {"is_local", "local_files_only"} & told.keys()
    page = (ROOT / "docs" / "export.md").read_text().split("## ONNX Runtime")[1]
    loop = re.search(r"```python\n(.+?)```", page, re.DOTALL).group(1)
    assert loop.rstrip().endswith("skip_special_tokens=True)")
    monkeypatch.chdir(onnx_folder.parent)
    assert last_value(loop.replace("彼は水泳が得意だ。", "a b c")) == "c b a"


@pytest.mark.parametrize("search", [{}, {"use_cache": False}, {"num_return_sequences": 2, "num_beams": 3}])
def test_onnx_begins_a_translation_as_it_is_told(tokenizer, graphs, search):
    source = tokenizer(["a b c", "d e f g h"], return_tensors="pt", padding=True)
    start = torch.full((2, 1), tokenizer.pad_token_id)
    beginning = torch.tensor([[3, 4, 5], [6, 7, 8]])
    prefix = torch.cat([start, beginning], dim=1)
    with torch.inference_mode():
        expected, found = (
            engine.generate(**source, decoder_input_ids=prefix, max_new_tokens=8, **search) for engine in graphs
        )
    assert torch.equal(found, expected)
    assert torch.equal(found[:: len(found) // 2, 1:4], beginning)


def test_onnx_gives_the_logits_after_every_token(tokenizer, graphs):
    source = tokenizer(["a b c", "d e f g h"], return_tensors="pt", padding=True)
    targets = torch.tensor([[tokenizer.pad_token_id, 3, 4, 5], [tokenizer.pad_token_id, 6, 7, 8]])
    with torch.inference_mode():
        expected, found = (engine(**source, decoder_input_ids=targets).logits for engine in graphs)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("quantization", "least"), [("float16", 1.0), ("int8", 0.8)])
def test_onnx_of_fewer_bits_translates_nearly_the_same(onnx_folder, trained, task, tmp_path, quantization, least):
    shutil.copytree(onnx_folder, tmp_path, dirs_exist_ok=True)
    graphs = onnx_export.graph_files(tmp_path)
    write_quantized(graphs, quantization)
    for file in graphs:
        file.unlink()
    model, tokenizer = load_translator(str(trained))
    decoding = DecodingArguments(num_beams=1, max_new_tokens=16)
    rows = [json.loads(line)["translation"]["fw"] for line in task["test"].read_text().splitlines()]
    ids = encode_sources(model, tokenizer, rows)
    engines = (TransformersEngine(model, tokenizer, decoding), onnx_export.load(tmp_path, tokenizer, decoding))
    expected, found = (decode_all(engine, ids, 4096) for engine in engines)
    assert sum(map(list.__eq__, found, expected)) >= least * len(rows)


def test_each_shared_layer_is_in_the_file_once(trained, tmp_path):
    sizes = {}
    for depth in (2, 12):
        model = AutoModelForSeq2SeqLM.from_pretrained(trained, encoder_layers=depth, decoder_layers=depth)
        for part in (model, AutoTokenizer.from_pretrained(trained)):
            part.save_pretrained(tmp_path / f"model{depth}")
        for quantization in ("float32", "int8"):
            folder = tmp_path / f"{quantization}{depth}"
            ctranslate2_export.convert(str(tmp_path / f"model{depth}"), folder, quantization)
            sizes[depth, quantization] = (folder / "model.bin").stat().st_size
    layer = sum(p.numel() for p in model.model.decoder.layers[0].parameters())
    for quantization, bytes_each in (("float32", 4), ("int8", 1)):
        growth = sizes[12, quantization] - sizes[2, quantization]
        assert growth < layer * bytes_each  # the names of twenty more layers, and none of their weights
    assert sizes[2, "int8"] < 0.4 * sizes[2, "float32"]


def test_quantized_translations_are_counted_and_scored(trained, task, tmp_path, capsys):
    data = ["--test_file", task["test"], "--source_lang", "fw", "--target_lang", "bw", "--max_new_tokens", 31]
    export(trained, "--to", "ctranslate2", "--quantization", "int8", "--output_dir", tmp_path / "ct2", *data)
    for row in json.loads((tmp_path / "ct2" / "export.json").read_text())["verification"]:
        assert 0.5 <= row["same"] <= 1
        assert abs(row["bleu"] - row["pytorch_bleu"]) < 10
        assert row["pytorch_bleu"] > 50
        assert row["bleu_to_pytorch"] > 80
    printed = capsys.readouterr().out
    assert f"BLEU of all to PyTorch's {row['bleu_to_pytorch']:.2f}; to the references {row['bleu']:.2f}" in printed
    assert row["bleu_signature"] in printed


def test_where_ctranslate2_cannot_use_the_gpu_it_says_so_and_translates_on_the_cpu(
    trained, tmp_path, caplog, monkeypatch
):
    """As where it was built for another CUDA than PyTorch, or for none."""
    translator = ctranslate2_export.Translator

    def without_cuda(folder, device, **place):
        if device == "cuda":
            raise RuntimeError("Library libcublas.so.12 is not found or cannot be loaded")
        return translator(folder, device=device, **place)

    monkeypatch.setattr(ctranslate2_export, "Translator", without_cuda)
    ctranslate2_export.convert(str(trained), tmp_path / "ct2")
    model, tokenizer = load_translator(str(trained))
    decoding = DecodingArguments(max_new_tokens=31)
    engine = ctranslate2_export.load(tmp_path / "ct2", tokenizer, decoding, device=torch.device("cuda"))
    assert "CTranslate2 cannot use the GPU, and translates on the CPU: Library libcublas" in caplog.text
    (found,) = engine.translate_batch([tokenizer("a b c")["input_ids"]])
    assert found == translate(model, tokenizer, ["a b c"], decoding)


def test_ctranslate2s_own_command_converts_with_the_package(trained, tmp_path):
    options = ["--model", trained, "--output_dir", tmp_path / "ct2", "--quantization", "int8"]
    fork("-m", "rs_transformer.export.ctranslate2", *options)
    assert (tmp_path / "ct2" / "model.bin").is_file()


def test_a_model_in_memory_is_left_as_it_is(tokenizer, tmp_path):
    """CTranslate2 quantizes in place."""
    model = unrolled_marian(rs_model(**config_from_tokenizer(tokenizer)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ctranslate2_export.LoadedConverter(model, tokenizer).convert(str(tmp_path / "ct2"), quantization="int8")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_sentences_to_verify_with_go_with_a_dataset_that_is_named(trained, task, tmp_path):
    """Whose test split nobody has asked for; its training split is for the shortlist."""
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "test"):
        shutil.copy(task["validation"], data / f"{split}.jsonl")
    more = ["--dataset_name", data, "--source_lang", "fw", "--target_lang", "bw", "--shortlist", "--min_same", 0]
    export(*options(trained, tmp_path / "ct2", "--to", "ctranslate2", *more))
    record = json.loads((tmp_path / "ct2" / "export.json").read_text())
    assert record["shortlist"]["pairs"] == 100
    assert record["verification"][0]["sentences"] == len(SENTENCES)


def test_export_to_transformers_is_stock_marian(trained, tmp_path):
    export(*options(trained, tmp_path / "marian", "--to", "transformers"))
    config = json.loads((tmp_path / "marian" / "config.json").read_text())
    assert config["architectures"] == ["MarianMTModel"]
    assert "auto_map" not in config
    export(*options(trained, tmp_path / "half", "--to", "transformers", "--quantization", "bfloat16"))
    assert MarianMTModel.from_pretrained(tmp_path / "half").dtype.itemsize == 2


def test_a_mismatch_is_an_error_and_leaves_no_folder(trained, tmp_path, monkeypatch):
    """The converter is given another model, one step shallower."""
    shallow = AutoModelForSeq2SeqLM.from_pretrained(trained, decoder_layers=1)
    for part in (shallow, AutoTokenizer.from_pretrained(trained)):
        part.save_pretrained(tmp_path / "shallow")
    convert = ctranslate2_export.convert
    monkeypatch.setattr(
        ctranslate2_export, "convert", lambda _, *arguments: convert(str(tmp_path / "shallow"), *arguments)
    )
    message = r"\d+ of 32 translations \(beam 1\) by ctranslate2 float32 are not PyTorch's. The first: '.+' gives"
    with pytest.raises(ValueError, match=rf"{message} .*\. --min_same 0\.?\d* would accept them"):
        export(*options(trained, tmp_path / "ct2", "--to", "ctranslate2"))
    assert {path.name for path in tmp_path.iterdir()} == {"shallow"}
    export(*options(trained, tmp_path / "ct2", "--to", "ctranslate2", "--min_same", 0))
    record = json.loads((tmp_path / "ct2" / "export.json").read_text())
    assert record["verification"][0]["same"] < 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--to", "ctranslate2", "--quantization", "int3"], "quantization must be one of float32, .*got 'int3'"),
        (["--to", "transformers", "--quantization", "int8"], "quantization must be one of float32, float16, bfloat16"),
        (["--to", "ctranslate2", "--min_same", 2], "min_same must be at least 0 and at most 1, got 2"),
        (["--to", "ctranslate2", "--test_file", "x.jsonl"], "not both; or verification=false"),
    ],
)
def test_bad_options_are_named_before_anything_is_written(trained, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        export(*options(trained, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_what_there_is_to_say_about_folders_and_models(trained, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("")
    with pytest.raises(FileExistsError, match="is there already and not empty"):
        export(*options(trained, tmp_path / "out", "--to", "ctranslate2"))
    with pytest.raises(FileExistsError, match="is there already and not empty"):
        ctranslate2_export.convert(str(trained), tmp_path / "out")
    with pytest.raises(ValueError, match=r"activation_function=tanh is none of CTranslate2's: gelu, "):
        ctranslate2_export.RSMarianLoader().get_model_spec(marian(activation_function="tanh"))
    with pytest.raises(ValueError, match="give source sentences to verify with"):
        export(trained, "--to", "ctranslate2", "--output_dir", tmp_path / "new")
    unrolled_marian(AutoModelForSeq2SeqLM.from_pretrained(trained)).save_pretrained(tmp_path / "marian")
    with pytest.raises(ValueError, match="is a marian model, which is not exported to transformers"):
        export(*options(tmp_path / "marian", tmp_path / "new", "--to", "transformers"))


@pytest.mark.parametrize(
    ("target", "package"), [("ctranslate2", "ctranslate2"), ("onnx", "onnxruntime"), ("marian", "pymarian")]
)
def test_without_its_extra_the_command_says_which_to_install(trained, tmp_path, monkeypatch, target, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"rs_transformer.export.{target}", raising=False)
    with pytest.raises(ValueError, match=rf"to={target} needs: pip install .rs-transformer\[{target}\]"):
        export(*options(trained, tmp_path / "out", "--to", target))


def test_marians_format_is_written_where_there_is_no_engine_of_marians(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pymarian", None)
    export(trained, "--to", "marian", "--output_dir", tmp_path / "out", "--verification", "false")
    assert (tmp_path / "out" / "model.npz").is_file()
    assert json.loads((tmp_path / "out" / "export.json").read_text())["versions"].keys() == {
        "rs-transformer",
        "transformers",
    }


def test_verification_translates_long_input_as_pytorch_does(trained, tmp_path):
    """Cut to what the model takes, on both sides."""
    long = " ".join("abcdefghijkl" * 4)
    arguments = command.ExportArguments(str(trained), "ctranslate2", str(tmp_path / "ct2"), verify=[long, "a b"])
    corpus = command.OptionalCorpusArguments()
    record = command.export_checkpoint(arguments, corpus, DecodingArguments(max_new_tokens=31))
    assert [row["same"] for row in record["verification"]] == [1, 1]


def test_a_sentence_to_verify_with_may_be_longer_than_the_name_of_a_file():
    long = "日本" * 60
    arguments = command.ExportArguments("m", "ctranslate2", "out", verify=[long])
    assert command._verification_data(arguments, command.OptionalCorpusArguments()) == ([long], None)


def test_a_package_has_the_version_of_the_distribution_that_brings_it(monkeypatch):
    monkeypatch.setattr("rs_transformer.export.packages_distributions", lambda: {"onnxruntime_gpu": ["sacrebleu"]})
    assert version_of("onnxruntime_gpu") == version("sacrebleu")
    assert version_of("torch") == version("torch")


def test_the_engine_of_pytorch_gives_the_best_translations_in_order(trained):
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(trained), AutoTokenizer.from_pretrained(trained)
    decoding = DecodingArguments(num_beams=2, max_new_tokens=16)
    found = TransformersEngine(model, tokenizer, decoding, n_best=2).translate_batch([tokenizer("a b c")["input_ids"]])
    assert found[0][0] == "c b a"
    assert len(found[0]) == 2
