"""`training/compare.py`: a parent and its child in the same engines, as a report and in the child's model card."""

import json
import multiprocessing.forkserver
import re
import shutil
import statistics
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import yaml
from conftest import script
from huggingface_hub import ModelCard, parse_eval_result_entries
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from rs_transformer import with_depth
from rs_transformer.checkpoints import load_translator
from rs_transformer.commands.publish import files_to_publish
from rs_transformer.compare import comparison
from rs_transformer.compare.comparison import compare
from rs_transformer.compare.report import markdown, page, write_report
from rs_transformer.decoding import DecodingArguments, translate
from rs_transformer.metrics import corpus_scores, sentence_chrf
from rs_transformer.model_card import build_card, card_disagreements, write_card

run = script("compare")
DECODING = DecodingArguments(num_beams=1, max_new_tokens=16)
OPTIONS = ["--num_beams", 1, "--max_new_tokens", 16, "--rounds", 2, "--timed_sentences", 8, "--examples", 3]
OPTIONS += ["--bootstrap_samples", 100]
ENGINES = ["--engines", "ctranslate2:float32", "transformers"]
BENCHMARK = ["--benchmark", "org/reverse", "fw-bw"]


@pytest.fixture(scope="module")
def compared(trained, task, tmp_path_factory):
    """A comparison that was stopped when the child was to be loaded, and went on by the same command."""
    folder = tmp_path_factory.mktemp("compare")
    child, output = folder / "child", folder / "report"
    # At a depth that it was not trained for: it translates badly.
    with_depth(AutoModelForSeq2SeqLM.from_pretrained(trained), decoder_layers=1).save_pretrained(child)
    AutoTokenizer.from_pretrained(trained).save_pretrained(child)
    multiprocessing.forkserver.ensure_running()  # with the libraries of forked.py
    command = [trained, child, *ENGINES, "--test_file", task["test"], "--output_dir", output, *OPTIONS, *BENCHMARK]
    translated, translate_all, start = [], comparison._translate, comparison.EngineProcess

    def stop(deployment):
        if deployment.model == str(child):
            raise KeyboardInterrupt
        return start(deployment)

    def noted(process, what, sentences):
        translated.append(what)
        return translate_all(process, what, sentences)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "_translate", noted)
        with patch.context() as stopped:
            stopped.setattr(comparison, "EngineProcess", stop)
            with pytest.raises(KeyboardInterrupt):
                run(*command)
        run(*command)
    result = json.loads((output / "report.json").read_text())
    return SimpleNamespace(child=child, output=output, command=command, translated=translated, result=result)


def test_figures_are_those_of_both_models_in_each_engine(compared, trained, task):
    result = compared.result
    rows = [json.loads(line)["translation"] for line in task["test"].read_text().splitlines()]
    sources, references = ([row[language] for row in rows] for language in ("fw", "bw"))
    models = {"parent": trained, "child": compared.child}
    texts = {
        side: translate(*load_translator(str(model)), sources, DECODING, progress=False)
        for side, model in models.items()
    }
    assert result["parent"]["parameters"] == result["child"]["parameters"] == 85504
    assert [(row["engine"], row["quantization"]) for row in result["engines"]] == [
        ("ctranslate2", "float32"),
        ("transformers", "float32"),
    ]
    for row in result["engines"]:
        for side, translations in texts.items():
            score = row["quality"][side]
            assert score["bleu"] == pytest.approx(corpus_scores(translations, references)["bleu"])
            assert score["bleu_ci"] > 0
            its = row[side]
            assert min(its["single"], its["batched"], its["load_seconds"], its["peak_mib"]) > 0
            assert its["single"] == statistics.median(its["single_rounds"])
        ratios = [
            after / before
            for before, after in zip(row["parent"]["single_rounds"], row["child"]["single_rounds"], strict=True)
        ]
        assert row["speedup"]["single"] == pytest.approx(statistics.median(ratios))
        assert row["quality"]["child"]["bleu_p"] < 0.05
        assert row["same"] == sum(map(str.__eq__, *texts.values())) / len(sources)
        assert row["chrf_to_parent"] == corpus_scores(texts["child"], texts["parent"])["chrf"]
    ctranslate2, transformers = (row["parent"]["bytes"] for row in result["engines"])
    assert ctranslate2 == (compared.output / "work/parent-ctranslate2-float32/model.bin").stat().st_size
    assert transformers == (trained / "model.safetensors").stat().st_size
    # Where the child differs most, the first of equals first.
    scores = sentence_chrf(texts["child"], texts["parent"])
    order = [index for index in sorted(range(len(scores)), key=scores.__getitem__) if scores[index] < 100][:3]
    assert [example["sentence"] - 1 for example in result["examples"]] == order
    first = result["examples"][0]
    assert (first["source"], first["reference"]) == (sources[order[0]], references[order[0]])
    assert (first["parent"], first["child"]) == (texts["parent"][order[0]], texts["child"][order[0]])


def test_a_stopped_comparison_goes_on_and_a_finished_one_is_not_made_again(compared, monkeypatch):
    sides = [
        f"{name}, {side}" for name in ("ctranslate2:float32", "transformers:float32") for side in comparison.SIDES
    ]
    assert compared.translated == sides  # each once, though the first run was stopped after two
    monkeypatch.setattr(comparison, "EngineProcess", lambda deployment: pytest.fail("an engine is started again"))
    run(*compared.command)
    assert json.loads((compared.output / "report.json").read_text()) == compared.result


class Page(HTMLParser):
    """The tags of a page, what it loads, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_the_report_shows_the_figures_and_needs_no_network(compared):
    text = (compared.output / "report.md").read_text()
    shown = Page((compared.output / "report.html").read_text())
    row = compared.result["engines"][0]
    for side in comparison.SIDES:
        score = row["quality"][side]
        cells = [f"{score['bleu']:.2f} ± {score['bleu_ci']:.2f}", f"{row[side]['single']:.1f}"]
        assert all(cell in text and cell in shown.text for cell in cells)
    for line in (score["bleu_signature"], compared.result["machine"]["cpu"], compared.result["examples"][0]["child"]):
        assert line in text
        assert line in shown.text
    assert shown.addresses
    assert all(address.startswith("data:") for address in shown.addresses)
    assert "script" not in shown.tags
    assert (compared.output / "report.png").read_bytes().startswith(b"\x89PNG")


def test_text_of_models_and_corpora_is_text_in_the_report(compared):
    evil = "</dd><script>alert(1)</script>\n# x ![a](http://b) `c` | <img src=x>"
    pages, texts = [], []
    for word in (evil, "word"):
        result = json.loads(json.dumps(compared.result))
        result["examples"] = [example | dict.fromkeys(("source", "child"), word) for example in result["examples"]]
        result |= {"dataset": word, "child": result["child"] | {"model": word}}
        pages.append(Page(page(result, b"")))
        texts.append(markdown(result, "report.png"))
    assert pages[0].tags == pages[1].tags
    assert pages[0].addresses == pages[1].addresses
    assert evil in pages[0].text
    assert [line[:2] for line in texts[0].splitlines()] == [line[:2] for line in texts[1].splitlines()]


def test_the_childs_card_has_the_figures_in_the_form_of_the_hub(compared, tmp_path):
    child = tmp_path / "child"
    shutil.copytree(compared.child, child)
    card = ModelCard.load(child / "README.md")
    said = {
        (result.metric_args["engine"], result.metric_type): result.metric_value for result in card.data.eval_results
    }
    assert said == {
        (f"{row['engine']}:{row['quantization']}", metric): round(row["quality"]["child"][metric], 2)
        for row in compared.result["engines"]
        for metric in ("bleu", "chrf")
    }
    assert "## Beside its parent" in card.text
    assert card_disagreements(child) == []
    (entry,) = parse_eval_result_entries(yaml.safe_load((child / ".eval_results/comparison.yaml").read_text()))
    assert (entry.dataset_id, entry.task_id) == ("org/reverse", "fw-bw")
    assert entry.value == said["ctranslate2:float32", "bleu"]
    assert {"comparison.json", ".eval_results/comparison.yaml"} <= set(files_to_publish(child))
    record = json.loads((child / "comparison.json").read_text())
    record["engines"][0]["quality"]["child"]["bleu"] = 1.234
    (child / "comparison.json").write_text(json.dumps(record))
    bleu = said["ctranslate2:float32", "bleu"]
    line = f"test bleu ctranslate2:float32: {bleu} in README.md, 1.23 in comparison.json"
    assert card_disagreements(child) == [line]
    record["child"]["weights_sha256"] = "of other weights"
    (child / "comparison.json").write_text(json.dumps(record))
    assert build_card(child).data.eval_results is None
    # What was said when it was laid out for the Hub stays, and what somebody wrote.
    write_card(child, "org/small", base_model="org/large", license="cc-by-4.0")
    write_report(compared.result | {"child": compared.result["child"] | {"model": str(child)}}, tmp_path)
    card = ModelCard.load(child / "README.md")
    assert (card.data.base_model, card.data.license) == ("org/large", "cc-by-4.0")
    assert 'pipeline("translation", model="org/small")' in card.text
    (child / "card.yaml").write_text("license: apache-2.0\n")  # what is corrected there wins over the former card
    write_report(compared.result | {"child": compared.result["child"] | {"model": str(child)}}, tmp_path)
    assert ModelCard.load(child / "README.md").data.license == "apache-2.0"
    (child / "README.md").write_text("# Ours\n")
    write_report(compared.result | {"child": compared.result["child"] | {"model": str(child)}}, tmp_path)
    assert (child / "README.md").read_text() == "# Ours\n"


@pytest.fixture(scope="module")
def exports(trained, compared, tmp_path_factory):
    """CTranslate2 folders of both; the child's has a shortlist that lets it say nothing but "a"."""
    folder = tmp_path_factory.mktemp("exports")
    for side, model in (("parent", trained), ("child", compared.child)):
        options = ["--to", "ctranslate2", "--output_dir", folder / side, "--verification", "false"]
        script("export")(model, *options)
    (folder / "child" / "vmap.txt").write_text("\t</s> ▁a\n")
    record = json.loads((folder / "parent" / "export.json").read_text())
    assert record.pop("model_digest")  # as an earlier version wrote it: believed
    (folder / "parent" / "export.json").write_text(json.dumps(record))
    return folder


def test_exports_that_are_there_are_used_and_sources_alone_are_enough(compared, trained, exports, tmp_path):
    (tmp_path / "sources.txt").write_text("a b c d\n\ne f g\n")
    given = [part for side in ("parent", "child") for part in (f"--{side}_exports", exports / side)]
    more = ["--input_file", tmp_path / "sources.txt", "--output_dir", tmp_path / "report", "--card", "false"]
    before = (compared.child / "comparison.json").read_text()
    run(trained, compared.child, *given, *more, *OPTIONS)
    result = json.loads((tmp_path / "report" / "report.json").read_text())
    (row,) = result["engines"]
    assert (row["engine"], row["quantization"]) == ("ctranslate2", "float32")
    assert (row["parent"]["shortlist"], row["child"]["shortlist"]) == (False, True)
    assert row["child"]["shortlist_bytes"] == (exports / "child" / "vmap.txt").stat().st_size
    assert not list((tmp_path / "report" / "work").glob("*/model.bin"))
    assert "quality" not in row
    assert row["same"] == 1 / 3  # the blank one
    assert all(set(example["child"]) <= set("a ") for example in result["examples"])
    text = (tmp_path / "report" / "report.md").read_text()
    assert "BLEU" not in text
    assert re.search(r"parent +d c b a\n", text)
    assert (compared.child / "comparison.json").read_text() == before


def test_an_engine_that_fails_is_named_with_its_model(compared, trained, exports, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(exports / "child", broken)
    (broken / "model.bin").write_bytes((broken / "model.bin").read_bytes()[:1000])
    with pytest.raises(RuntimeError, match=f"^ctranslate2 with {broken}: RuntimeError: "):
        compare(
            str(compared.child),
            str(compared.child),
            ["a b"],
            None,
            tmp_path / "out",
            engines=["ctranslate2:float32"],
            parent_exports=[broken],
        )


def test_what_cannot_be_compared_is_said_before_any_work(compared, trained, task, exports, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "EngineProcess", lambda deployment: pytest.fail("work has begun"))
    models, test = [trained, compared.child], ["--test_file", task["test"]]
    new = ["--output_dir", tmp_path / "new"]
    with pytest.raises(ValueError, match="give test sentences: a dataset"):
        run(*models, *new)
    with pytest.raises(ValueError, match="there are no test sentences to compare on"):
        compare(*map(str, models), [" "], None, tmp_path / "new")
    with pytest.raises(ValueError, match="a comparison is of two models, parent and child, got"):
        run(trained, *new, *test)
    with pytest.raises(ValueError, match=r"engines: 'tensorrt' is none of ctranslate2, onnx, marian, transformers"):
        run(*models, *new, *test, "--engines", "tensorrt")
    with pytest.raises(ValueError, match="engines: 'onnx:int4' must have one of float32, float16, int8"):
        run(*models, *new, *test, "--engines", "onnx:int4")
    with pytest.raises(ValueError, match=r"child is of ctranslate2:float32, and the engines are onnx:int8"):
        run(*models, *new, *test, "--engines", "onnx", "--child_exports", exports / "child")
    with pytest.raises(ValueError, match=r"has no export\.json: it must be made by training/export\.py"):
        run(*models, *new, *test, "--child_exports", trained)
    with pytest.raises(ValueError, match=rf"parent_exports: \S+/child is of other weights than {trained}: "):
        run(*models, *new, *test, "--engines", "ctranslate2:float32", "--parent_exports", exports / "child")
    with monkeypatch.context() as patch:
        patch.setitem(comparison.TARGETS, "onnx", "no_such_package")
        with pytest.raises(ValueError, match=r"engines=onnx needs: pip install .rs-transformer\[onnx\]"):
            run(*models, *new, *test, "--engines", "onnx")
    with pytest.raises(ValueError, match="was made with rounds=2, now it is 3: go on with the former, choose another"):
        run(*compared.command, "--rounds", 3)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(FileExistsError, match="is there already and not empty"):
        run(*models, *test, "--output_dir", tmp_path / "full")
    other = tmp_path / "other"
    shutil.copytree(compared.child, other)
    config = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(config | {"target_lang": "de"}))
    with pytest.raises(ValueError, match=r"translates fw to bw, .* fw to de: compare models of one language pair"):
        run(trained, other, *new, *test)
    assert not (tmp_path / "new").exists()
