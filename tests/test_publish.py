"""`training/publish.py`: what is refused, what is shown, and what reaches a server that speaks the Hub's calls."""

import base64
import json
import os
import re
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import torch
import yaml
from conftest import RECIPE, ROOT, run, script, task_options
from forked import fork
from huggingface_hub import HfApi, ModelCard
from oracle import rs_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, pipeline
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from rs_transformer.commands import publish as commands_publish
from rs_transformer.commands.publish import PublishArguments, files_to_publish
from rs_transformer.commands.publish import publish as publish_command
from rs_transformer.configuration_rs_marian import REMOTE_CODE_FILES
from rs_transformer.model_card import write_card
from rs_transformer.training.arguments import TranslationTrainingArguments
from rs_transformer.training.model import config_from_tokenizer
from rs_transformer.training.run_folder import write_run_record
from rs_transformer.training.trainer import TranslationTrainer

publish = script("publish")
REPO = "org/rs-fw-bw"
SECRET = "secret-of-the-tests"


class Hub(BaseHTTPRequestHandler):
    """Create, list, preupload and commit, as `huggingface_hub` calls them; every file is taken within the commit."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.calls.append((self.path, self.headers.get("Authorization")))
        if self.path == "/api/repos/create":
            answer = {"url": f"{self.server.address}/{REPO}", "id": REPO}
        elif self.path == f"/api/models/{REPO}/branch/next":
            answer = {}
        elif self.path == "/api/validate-yaml":
            answer = {"errors": [], "warnings": []}
        elif self.path.startswith(f"/api/models/{REPO}/preupload/"):
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            answer = {"files": [{"path": path, **modes} for path in paths]}
        elif self.path.startswith(f"/api/models/{REPO}/commit/"):
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                elif entry["key"] == "deletedFile":
                    del self.server.files[entry["value"]["path"]]
                else:
                    self.server.commits.append(entry["value"]["summary"])
            commit = "0" * 40
            answer = {"commitUrl": f"{self.server.address}/{REPO}/commit/{commit}", "commitOid": commit}
        else:
            self.send_error(404)
            return
        self.reply(answer)

    def do_GET(self):
        if self.path == "/api/whoami-v2":
            self.reply({"type": "user", "name": "org", "orgs": [], "auth": {"accessToken": {"role": "write"}}})
        elif self.path.startswith(f"/api/models/{REPO}/tree/"):
            kind = {"type": "file", "oid": "0" * 40}
            self.reply([{"path": path, "size": len(content), **kind} for path, content in self.server.files.items()])
        elif self.path.startswith(f"/{REPO}/resolve/"):
            self.resolve()
        else:
            self.send_error(404)

    def do_HEAD(self):
        self.resolve()

    def resolve(self):
        content = self.server.files[self.path.split("/", 5)[5]]
        self.send_response(200)
        for name, value in (("ETag", '"0"'), ("X-Repo-Commit", "0" * 40), ("Content-Length", str(len(content)))):
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def reply(self, answer):
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    """A server, and the environment that makes it the Hub of a process."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.calls, server.files, server.commits = [], {}, []
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.environment = {**os.environ, "HF_ENDPOINT": server.address, "HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "0"}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of a finished run, checkpoints and logs included."""
    return shutil.copytree(trained, tmp_path / "run")


def test_a_finished_folder_reaches_the_hub_in_one_commit_and_translates_from_there(folder, hub, tmp_path):
    options = ["--repo", REPO, "--card", "--revision", "next"]
    done = run(sys.executable, "training/publish.py", folder, *options, env=hub.environment)
    assert hub.commits == ["Upload the model"]
    asked = [path for path, _ in hub.calls]
    branch, commit = (f"/api/models/{REPO}/{what}/next" for what in ("branch", "commit"))
    assert asked.index("/api/repos/create") < asked.index(branch) < asked.index(commit)
    assert {authorization for _, authorization in hub.calls} == {"Bearer hf_test"}
    assert f"{hub.address}/{REPO}/commit/" in done.stdout
    assert not [name for name in hub.files if "checkpoint" in name or "events" in name or name.endswith(".bin")]
    for name, content in hub.files.items():
        assert content == (folder / name).read_bytes()
        assert f"MB  {name}\n" in done.stdout
    assert f'model="{REPO}"' in hub.files["README.md"].decode()
    clone = tmp_path / "clone"
    clone.mkdir()
    for name, content in hub.files.items():
        (clone / name).write_bytes(content)
    code = (
        "import sys; sys.modules['rs_transformer'] = None\n"
        "from transformers import pipeline\n"
        "print(pipeline('translation', model=sys.argv[1], trust_remote_code=True)('a b c'))\n"
    )
    assert fork("-c", code, clone).stdout.endswith("[{'translation_text': 'c b a'}]\n")


def test_what_somebody_has_put_into_the_card_on_the_hub_is_kept(folder, hub):
    write_card(folder, REPO)
    card = (folder / "README.md").read_text("utf-8")
    hub.files["README.md"] = card.replace("## Limits", "## Limits\n\nSomebody's own line.").encode()
    done = run(sys.executable, "training/publish.py", folder, "--repo", REPO, env=hub.environment)
    assert 'lacks lines that it had, as "Somebody\'s own line."' in done.stderr
    assert "Somebody's own line." in (folder / "README.before.md").read_text("utf-8")
    assert hub.files["README.md"].decode() == card
    (folder / "README.before.md").unlink()
    run(sys.executable, "training/publish.py", folder, "--repo", REPO, env=hub.environment)
    assert not (folder / "README.before.md").exists()


def test_a_folder_of_the_clone_is_published_with_the_source_that_it_links_to(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(commands_publish, "HfApi", lambda: HfApi(endpoint=hub.address, token="hf_test"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    folder = shutil.copytree(ROOT / "hub_cards" / "marian-ja-en", tmp_path / "marian", symlinks=False)
    for name in REMOTE_CODE_FILES:
        (folder / name).unlink()
        (folder / name).symlink_to(ROOT / "src" / "rs_transformer" / name)
    publish(folder, "--repo", REPO, "--card", "--dry_run")
    assert "MB  model.safetensors" in capsys.readouterr().out
    assert not hub.calls
    publish(folder, "--repo", REPO)
    assert hub.files.keys() == set(files_to_publish(folder))
    for name, content in hub.files.items():
        assert content == (folder / name).read_bytes()
    # What an earlier publishing has left goes in the same commit; what is somebody else's stays.
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    hub.files |= dict.fromkeys([*shards, "depth_sweep.json", ".eval_results/comparison.yaml"], b"stale")
    hub.files |= dict.fromkeys([".gitattributes", "notes.md", "onnx/model.safetensors"], b"theirs")
    publish(folder, "--repo", REPO)
    assert hub.files.keys() == {*files_to_publish(folder), ".gitattributes", "notes.md", "onnx/model.safetensors"}
    assert hub.commits == ["Upload the model"] * 2
    assert "deleted there  depth_sweep.json" in capsys.readouterr().out


def test_training_with_push_to_hub_uploads_the_card_of_the_results(trained, task, hub, tmp_path):
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    options = ["--max_steps", 2, "--eval_strategy", "no", "--model_name_or_path", trained]
    target = ["--output_dir", tmp_path / "run", "--push_to_hub", "--hub_model_id", REPO, "--hub_token", SECRET]
    command = [*accelerate, "training/train.py", RECIPE, *task_options(task), *options, *target]
    run(*command, env=hub.environment)
    # It is used for every push, and stands in no file.
    assert hub.commits[0].startswith("Training in progress")
    assert {authorization for _, authorization in hub.calls} == {f"Bearer {SECRET}"}
    written = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert {file.name for file in written} >= {"training_args.bin", "run.json", "recipe.yaml"}
    assert not [file for file in written if SECRET.encode() in file.read_bytes()]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["command"][-1] == "<secret>"
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert json.loads(hub.files["results.json"]) == results
    card = hub.files["README.md"].decode()
    assert f"{results['test']['bleu']:.2f}" in card
    assert f'model="{REPO}"' in card


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "README.md").unlink(), r"there is no README\.md: .*--card true writes it"),
        (lambda folder: (folder / "modeling_rs_marian.py").unlink(), r"there is no modeling_rs_marian\.py"),
        (lambda folder: (folder / "source.spm").unlink(), "has no complete tokenizer"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no safetensors weights"),
        (lambda folder: os.truncate(folder / "model.safetensors", 5000), "truncated or damaged"),
        (lambda folder: change_bleu(folder), r"results\.json disagree: test bleu: \S+ in README\.md, 1\.0 in"),
        (lambda folder: None, "does not say how to load 'org/rs-fw-bw'"),
        (
            lambda folder: change(folder / "README.md", "encoder 2, decoder 2", "encoder 2, decoder 3"),
            r"the files say '\| depth \| encoder 2, decoder 2 \|', README\.md does not",
        ),
        (lambda folder: link(folder / "results.json"), r"results\.json is a link or otherwise no regular file: put"),
        (lambda folder: link(folder / "model.safetensors"), r"model\.safetensors is a link"),
        (
            lambda folder: (folder / "run.json").unlink() or os.mkfifo(folder / "run.json"),
            r"run\.json is a link or other",
        ),
        (
            lambda folder: change(folder / "modeling_rs_marian.py", "import torch", "import os, torch"),
            r"modeling_rs_marian\.py is not the one of rs-transformer \S+:.* Renew it: cp /\S+/modeling_rs_marian\.py",
        ),
        (
            lambda folder: change(folder / "config.json", '"modeling_rs_marian.RSMarianModel"', '"org/evil--x.Model"'),
            "config.json has 'org/evil--x.Model' loaded, source that is not uploaded",
        ),
        (
            lambda folder: shard(folder, "../other/model-1.safetensors"),
            r"names '\.\./other/model-1\.safetensors', which",
        ),
    ],
)
def test_incomplete_folders_and_cards_that_disagree_are_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        publish(folder, "--repo", REPO)


def change(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def link(file):
    """Put a link in the place of a file, which goes outside."""
    outside = file.parent.with_name(f"outside {file.name}")
    file.rename(outside)
    file.symlink_to(outside)


def shard(folder, name):
    """Have the folder's weights in a file of this name, with an index."""
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / "model.safetensors").rename(folder / name)
    weight_map = dict.fromkeys(load_file(folder / name), name)
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_of_the_weights_those_that_the_model_is_loaded_from_are_published(folder):
    (folder / "optimizer.safetensors").write_bytes(b"foreign")
    assert "optimizer.safetensors" not in files_to_publish(folder)
    shard(folder, "model[1]*.safetensors")  # a name, and no pattern
    (folder / "model11.safetensors").write_bytes(b"foreign")
    write_card(folder, REPO)
    files = publish_command(PublishArguments(str(folder), REPO, dry_run=True))
    weights = [name for name in files if "safetensors" in name]
    assert weights == ["model[1]*.safetensors", SAFE_WEIGHTS_INDEX_NAME]


def test_the_card_takes_the_place_of_a_link_and_does_not_follow_it(folder, tmp_path):
    write_card(folder, base_model="org/large", tags=["letters"])
    link(folder / "README.md")
    before = (tmp_path / "outside README.md").read_text()
    publish(folder, "--repo", REPO, "--card", "--dry_run")
    assert (tmp_path / "outside README.md").read_text() == before
    assert not (folder / "README.md").is_symlink()
    # What it said beside the folder's files is said again, unless it cannot be read.
    data = ModelCard.load(folder / "README.md").data
    assert (data.base_model, data.tags) == ("org/large", ["translation", "marian", "recurrent-stacking", "letters"])
    for damaged, kept in (("---\nlicense: [mit\n---\n", None), ("---\nlicense: mit\ntags: letters\n---\n", "mit")):
        (folder / "README.md").write_text(damaged)
        publish(folder, "--repo", REPO, "--card", "--dry_run")
        assert ModelCard.load(folder / "README.md").data.license == kept


def test_what_somebody_has_put_into_the_card_is_kept_beside_the_new_one(folder):
    write_card(folder, "me/another")
    publish(folder, "--repo", REPO, "--card", "--dry_run")
    assert f'model="{REPO}"' in (folder / "README.md").read_text()
    assert not (folder / "README.before.md").exists()
    (folder / "README.md").write_text(f"{(folder / 'README.md').read_text()}\nNot for poems.\n")
    publish(folder, "--repo", REPO, "--card", "--dry_run")
    assert "Not for poems." not in (folder / "README.md").read_text()
    assert "Not for poems." in (folder / "README.before.md").read_text()


def change_bleu(folder):
    results = json.loads((folder / "results.json").read_text())
    results["test"]["bleu"] = 1.0
    (folder / "results.json").write_text(json.dumps(results))


def test_scores_of_other_weights_are_refused(folder):
    """As a run that was extended leaves them when it is killed in its final evaluation."""
    weights = load_file(folder / "model.safetensors")
    weights["final_logits_bias"] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for options in ([], ["--card"], ["--output_dir", folder.with_name("new")]):
        with pytest.raises(ValueError, match=r"results\.json has the scores of other weights .*go on with"):
            publish(folder, "--repo", REPO, *options)


def test_weights_of_another_configuration_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"encoder_unique_layers": 2}))
    with pytest.raises(ValueError, match=r"lack model\.encoder\.layers\.1"):
        publish(folder, "--repo", REPO)


def test_a_repository_laid_out_in_half_precision_computes_in_single_precision(folder, tmp_path):
    output = tmp_path / "org" / "rs-fw-bw"
    (folder / "card.yaml").write_text("license: mit\n")
    (folder / "README.md").unlink()
    publish(folder, "--repo", REPO, "--output_dir", tmp_path / "new", "--card", "true")  # which needs no card there
    assert f'model="{REPO}"' in (tmp_path / "new" / "README.md").read_text()
    write_card(folder, "org/before", base_model="org/large")
    publish(folder, "--repo", REPO, "--output_dir", output, "--dtype", "float16")
    sizes = [(each / "model.safetensors").stat().st_size for each in (output, folder)]
    assert sizes[0] < 0.6 * sizes[1]
    model, original = (AutoModelForSeq2SeqLM.from_pretrained(each) for each in (output, folder))
    stored = load_file(output / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    for name in stored:
        expected = original.state_dict()[name].half().float()
        torch.testing.assert_close(model.state_dict()[name], expected, rtol=0, atol=0)
    assert not list(output.glob("checkpoint-*"))
    card = (output / "README.md").read_text()
    assert "| weights | F16, " in re.sub(" +", " ", card)
    assert "license: mit" in card
    assert "base_model: org/large" in card
    assert f'model="{REPO}"' in card
    assert files_to_publish(output) == files_to_publish(folder)
    publish(output, "--repo", REPO, "--dry_run")  # the scores are still those of its weights
    translator = pipeline("translation", model=str(output))
    assert translator("a b c") == [{"translation_text": "c b a"}]


def test_other_weights_are_never_stored_in_the_folder_itself(folder):
    with pytest.raises(ValueError, match="give output_dir too"):
        publish(folder, "--repo", REPO, "--dtype", "float16")
    with pytest.raises(FileExistsError, match="is there already and not empty"):
        publish(folder, "--repo", REPO, "--output_dir", folder)


def test_what_a_page_offers_needs_a_page(folder):
    for options in (["--other_models", "a"], ["--decoder_depths", 2]):
        with pytest.raises(ValueError, match="says what a page offers: give space=web too"):
            script("publish")(folder, "--repo", "org/rs6", *options)


def test_a_command_line_is_recorded_without_its_secrets(tmp_path, monkeypatch):
    address = f"https://me:{SECRET}@hub.example/org/a"
    forms = ["--hub_token", SECRET, f"--hub-token={SECRET}", f"HF_TOKEN={SECRET}", "--wandb_api_key", SECRET]
    monkeypatch.setattr(sys, "argv", ["train.py", *forms, "--model_name_or_path", address, "--max_tokens", "7"])
    write_run_record(tmp_path, {"model_name_or_path": address, "hub_token": SECRET, "max_tokens": 7, "seed": None})
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text()) == {
        "model_name_or_path": "https://me:<secret>@hub.example/org/a",
        "max_tokens": 7,
    }
    command = json.loads((tmp_path / "run.json").read_text())["command"]
    assert SECRET not in " ".join(command)
    assert command[1:5] == ["--hub_token", "<secret>", "--hub-token=<secret>", "HF_TOKEN=<secret>"]
    assert command[-2:] == ["--max_tokens", "7"]


def test_an_adapter_is_pushed_with_the_trainers_card(tokenizer, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.address)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # made once a process, for what was the endpoint then
    model = get_peft_model(rs_model(**config_from_tokenizer(tokenizer)), LoraConfig(r=2, target_modules=["q_proj"]))
    options = {"hub_model_id": REPO, "hub_token": SECRET, "report_to": [], "use_cpu": True}
    args = TranslationTrainingArguments(output_dir=str(tmp_path), **options)
    TranslationTrainer(model, args, processing_class=tokenizer).push_to_hub()
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "source.spm"} <= hub.files.keys()
    assert "library_name: peft" in hub.files["README.md"].decode()


@pytest.mark.parametrize("repo", ["rs-fw-bw", "a/b/c"])
def test_a_repository_has_an_owner_and_a_name(trained, repo):
    with pytest.raises(ValueError, match="repo must be org/name"):
        publish(trained, "--repo", repo)
