"""A saved folder on its own, in processes of their own: with the package, and where it cannot be imported."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import COMMIT, ROOT, run, write_hub_cache
from forked import fork
from oracle import batch, rs_model
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from rs_transformer.configuration_rs_marian import REMOTE_CODE_FILES

WITHOUT_PACKAGE = "import sys; sys.modules['rs_transformer'] = None\n"
WITH_PACKAGE = "import rs_transformer\n"
LOAD = """
import sys
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer, pipeline
name, folder, options = sys.argv[1], sys.argv[2], {options}
model = AutoModelForSeq2SeqLM.from_pretrained(name, **options)
print("class", type(model).__module__.split(".")[0], type(model).__name__)
print("base", type(AutoModel.from_pretrained(name, **options)).__name__)
print("config", type(AutoConfig.from_pretrained(name, **options)).__name__)
tokenizer = AutoTokenizer.from_pretrained(name, **options)
output = model.generate(**tokenizer("a b c d", return_tensors="pt"))
print("model", tokenizer.decode(output[0], skip_special_tokens=True))
print("shallow", AutoModelForSeq2SeqLM.from_pretrained(name, decoder_layers=1, **options).config.decoder_layer_map)
translator = pipeline("translation", model=name, **options)
print("pipeline", translator(["a b c", "d e f"], batch_size=2))
print("named task", pipeline("translation_fw-GB_to_bw", model=name, **options)("g h i j", num_beams=2))
translator.save_pretrained(folder)
"""


def load(prelude: str, name: object, folder: object, cwd: Path, options: str) -> list[str]:
    """What the snippet prints, in a process outside the project that has not imported the package."""
    return fork("-c", prelude + LOAD.replace("{options}", options), name, folder, cwd=cwd).stdout.splitlines()


def expected(origin: str) -> list[str]:
    return [
        f"class {origin} RSMarianForConditionalGeneration",
        "base RSMarianModel",
        "config RSMarianConfig",
        "model d c b a",
        "shallow [0]",
        "pipeline [{'translation_text': 'c b a'}, {'translation_text': 'f e d'}]",
        "named task [{'translation_text': 'j i h g'}]",
    ]


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    """Just the files of the Hub repository."""
    copied = tmp_path_factory.mktemp("hub") / "rs-marian-fw-bw"
    shutil.copytree(trained, copied, ignore=shutil.ignore_patterns("checkpoint-*", "runs", "*.bin", "*.txt"))
    return copied


def test_saved_folder_carries_its_source_and_says_where_it_is(folder):
    for name in ("configuration", "modeling", "pipeline"):
        file = f"{name}_rs_marian.py"
        assert (folder / file).read_text() == (ROOT / "src" / "rs_transformer" / file).read_text()


def test_folder_loads_with_the_package_imported_and_no_trust(folder, tmp_path):
    assert load(WITH_PACKAGE, folder, tmp_path / "saved", tmp_path, "{}") == expected("rs_transformer")


def test_folder_loads_where_the_package_cannot_be_imported_and_again_from_what_that_saves(folder, tmp_path):
    options = "{'trust_remote_code': True}"
    for name, saved in ((folder, tmp_path / "saved"), (tmp_path / "saved", tmp_path / "again")):
        assert load(WITHOUT_PACKAGE, name, saved, tmp_path, options) == expected("transformers_modules")
    assert sorted(file.name for file in (tmp_path / "again").iterdir()) == sorted(
        file.name for file in (tmp_path / "saved").iterdir()
    )


@pytest.fixture(scope="module")
def hub_name(folder):
    """The name of a repository that lies in the cache of this test run."""
    write_hub_cache(folder, Path(os.environ["HF_HOME"], "hub"), "org/rs-marian-fw-bw")
    return "org/rs-marian-fw-bw"


@pytest.mark.parametrize(
    ("prelude", "options", "origin"),
    [
        (WITH_PACKAGE, "{}", "rs_transformer"),
        (WITHOUT_PACKAGE, "{'trust_remote_code': True}", "transformers_modules"),
    ],
    ids=["with-package", "without-package"],
)
def test_hub_name_loads_from_the_cache_with_the_network_off(hub_name, tmp_path, prelude, options, origin):
    assert load(prelude, hub_name, tmp_path / "saved", tmp_path, options) == expected(origin)
    assert (tmp_path / "saved" / "pipeline_rs_marian.py").is_file()
    assert hub_name not in (tmp_path / "saved" / "config.json").read_text()


@pytest.mark.parametrize("there", [True, False])
def test_what_is_loaded_at_a_revision_is_saved_with_the_source_of_that_revision(folder, tmp_path, monkeypatch, there):
    """The pipeline's file has not been fetched when a model alone is loaded; `main` may have another by now."""
    hub_cache = write_hub_cache(folder, tmp_path / "hub", "org/rs-marian-fw-bw")
    repository = hub_cache / "models--org--rs-marian-fw-bw"
    newer = COMMIT[::-1]
    shutil.copytree(repository / "snapshots" / COMMIT, repository / "snapshots" / newer, symlinks=True)
    for name in REMOTE_CODE_FILES:
        file = repository / "snapshots" / newer / name
        text = file.read_text()
        file.unlink()
        file.write_text(f"{text}\n# newer\n")
    (repository / "refs" / "main").write_text(newer)
    if not there:
        (repository / "snapshots" / COMMIT / "pipeline_rs_marian.py").unlink()
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(hub_cache))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    reference, name = "configuration_rs_marian.RSMarianConfig", "org/rs-marian-fw-bw"
    config_class = get_class_from_dynamic_module(reference, name, revision=COMMIT, cache_dir=str(hub_cache))
    config = config_class.from_pretrained(name, name_or_path=name, revision=COMMIT, cache_dir=str(hub_cache))
    config.save_pretrained(tmp_path / "saved")
    saved = sorted(file.name for file in (tmp_path / "saved").glob("*.py"))
    assert saved == [name for name in REMOTE_CODE_FILES if there or name != "pipeline_rs_marian.py"]
    for name in saved:
        assert (tmp_path / "saved" / name).read_text() == (ROOT / "src" / "rs_transformer" / name).read_text()
    config_class().save_pretrained(tmp_path / "from nowhere")
    assert (tmp_path / "from nowhere" / "config.json").is_file()


def test_every_option_of_depth_computes_the_same_where_the_package_cannot_be_imported(tmp_path):
    options = {"encoder_unique_layers": 3, "encoder_layer_sharing": "sandwich", "decoder_layer_sharing": "cycle_rev"}
    steps = {"step_embeddings": True, "step_layer_norms": True, "deepnorm": True, "decoder_unique_layers": 3}
    steps |= {"step_biases": True, "step_adapter_rank": 2, "tie_encoder_decoder_layers": True}
    model = rs_model(**options, **steps, marian_positions=True)
    model.save_pretrained(tmp_path / "model")
    inputs = batch()
    torch.save(inputs, tmp_path / "inputs.pt")
    snippet = """
import sys, torch
from transformers import AutoModelForSeq2SeqLM
model = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1] + "/model", trust_remote_code=True)
inputs = torch.load(sys.argv[1] + "/inputs.pt")
outputs = [model(**inputs).logits, model(**inputs, encoder_depth=4, decoder_depth=3).logits]
del inputs["labels"]
outputs += [model.generate(**inputs, max_new_tokens=12, decoder_depth=depth) for depth in (None, 3)]
outputs += [model.generate(**inputs, max_new_tokens=12, draft_decoder_depth=4)]
torch.save([output.detach() for output in outputs], sys.argv[1] + "/outputs.pt")
"""
    run(sys.executable, "-c", WITHOUT_PACKAGE + snippet, tmp_path, cwd=tmp_path)
    with torch.no_grad():
        expected_outputs = [model(**inputs).logits, model(**inputs, encoder_depth=4, decoder_depth=3).logits]
    del inputs["labels"]
    expected_outputs += [model.generate(**inputs, max_new_tokens=12, decoder_depth=depth) for depth in (None, 3)]
    expected_outputs += [expected_outputs[2]]
    for output, wanted in zip(torch.load(tmp_path / "outputs.pt"), expected_outputs, strict=True):
        torch.testing.assert_close(output, wanted, rtol=0, atol=1e-6)
