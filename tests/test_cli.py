"""`rs-transformer COMMAND`, and a command as a module under `accelerate launch`."""

import re
import resource
import runpy
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run, script
from safetensors.torch import save_file

import rs_transformer_cli
from rs_transformer import __version__
from rs_transformer.commands.train import TrainOptions
from rs_transformer.configuration_rs_marian import layer_map
from rs_transformer.utils.errors import say, short_errors
from rs_transformer.utils.files import check_output, check_output_file, staged_folder
from rs_transformer.utils.recipes import RecipeParser

PROGRAM = Path(sys.executable).with_name("rs-transformer")


def test_help_lists_every_script_without_importing_torch():
    code = "import sys, rs_transformer_cli; rs_transformer_cli.main([]); print('torch' in sys.modules)"
    *lines, torch = run(sys.executable, "-c", code).stdout.splitlines()
    listed = {line.split()[0].replace("-", "_") for line in lines if line.startswith("  ")}
    assert listed == {file.stem for file in (ROOT / "training").glob("*.py")}
    assert torch == "False"


def test_a_command_runs_what_its_script_runs(trained, task, tmp_path):
    options = ["--model_name_or_path", trained, "--output_file", tmp_path / "out.txt"]
    (tmp_path / "in.txt").write_text("a b c d\ne f g\n")
    done = run(PROGRAM, "translate", *options, "--input_file", tmp_path / "in.txt")
    assert (tmp_path / "out.txt").read_text() == "d c b a\ng f e\n"
    assert "Loading weights" not in done.stderr  # a bar, which is for terminals


def test_an_unknown_command_is_named_with_the_nearest(capsys):
    assert rs_transformer_cli.main(["trian"]) == 2
    assert "there is no command 'trian'; did you mean train or trim?" in capsys.readouterr().err
    assert rs_transformer_cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize("option", ["--help", "--help-all"])
def test_help_shows_options_by_group_and_the_trainers_where_asked_for(option, capsys):
    with pytest.raises(SystemExit) as stopped:
        RecipeParser(TrainOptions.types(), description="An example:\n\n    train.py  recipe.yaml").parse_recipe(
            [option]
        )
    assert not stopped.value.code
    shown = capsys.readouterr().out
    assert "\n    train.py  recipe.yaml\n" in shown  # as it is typed
    assert "\nHow to decode:\n" in shown
    assert "--max_tokens" in shown
    assert "--help-all" in shown
    assert ("--learning_rate" in shown) == (option == "--help-all")


def test_a_command_without_its_packages_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert rs_transformer_cli.main(["train", "--help"]) == 2
    assert 'rs-transformer train needs accelerate: pip install "rs-transformer[train]"' in capsys.readouterr().err


def test_options_that_help_leaves_out_are_taken_all_the_same(tmp_path):
    *_, training = RecipeParser(TrainOptions.types()).parse_recipe(
        ["--source_lang", "a", "--target_lang", "b", "--output_dir", str(tmp_path), "--learning_rate", "0.5"]
    )
    assert training.learning_rate == 0.5


# What a user is told


def fails(capsys, error: BaseException) -> tuple[int, str]:
    """Exit status and line of a command that ends with an error."""
    with pytest.raises(SystemExit) as stopped, short_errors("go on so"):
        raise error
    return stopped.value.code, capsys.readouterr().err


def test_an_expected_error_is_one_line_and_status_2(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["training/train.py", "--seed", "1"])
    with pytest.raises(SystemExit) as stopped, short_errors():
        RecipeParser(TrainOptions.types()).parse_recipe(["--d_model", "eight"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "train.py: error: argument --d_model/--d-model: invalid int value: 'eight'\n"
    with pytest.raises(SystemExit) as stopped, short_errors():
        layer_map(6, 8, "cycle")
    assert stopped.value.code == 2
    assert re.fullmatch(r"train.py: error: .+\n", capsys.readouterr().err)
    code, line = fails(capsys, FileNotFoundError("there is no\n  such file"))
    assert (code, line) == (2, "train.py: error: there is no such file (--debug shows where)\n")


@pytest.mark.parametrize("library", ["safetensors", "torch"])
def test_a_disk_that_is_full_is_one_line_that_names_the_folder(tmp_path, library):
    save = {"safetensors": lambda tensor, file: save_file({"a": tensor}, file), "torch": torch.save}[library]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_on_a_full_disk():
        with staged_folder(tmp_path / "model") as staging:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
            try:
                save(torch.zeros(100_000), staging / "weights")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with pytest.raises(OSError, match="model could not be written: the disk is full") as refused:
        save_on_a_full_disk()
    assert not isinstance(refused.value.__cause__, OSError)
    assert not (tmp_path / "model").exists()
    with pytest.raises(RuntimeError, match="of another kind"), staged_folder(tmp_path / "model"):
        raise RuntimeError("of another kind")


def test_an_output_is_a_file_or_what_a_link_names_and_no_device(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "there")
    assert check_output_file(tmp_path / "link") == tmp_path / "there"
    with pytest.raises(ValueError, match="'/dev/null' is a device or a pipe, which would be replaced"):
        check_output_file("/dev/null")


def test_the_folder_in_which_a_command_runs_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileExistsError, match=r"output_dir: \. is where this runs"):
        check_output(Path("."))


def test_debug_shows_the_traceback_and_other_errors_always_do(monkeypatch):
    with pytest.raises(KeyError), short_errors():
        raise KeyError("a fault of the program")
    monkeypatch.setattr(sys, "argv", ["train.py", "--debug", "--seed", "1"])
    with pytest.raises(ValueError, match="told in full"), short_errors():
        raise ValueError("told in full")
    assert sys.argv == ["train.py", "--seed", "1"]
    monkeypatch.setattr(sys, "argv", ["train.py", "--debug", "underflow_overflow"])
    with pytest.raises(SystemExit), short_errors():
        raise ValueError("transformers' own option is left to it")
    assert sys.argv == ["train.py", "--debug", "underflow_overflow"]


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"]
)
def test_a_stop_is_one_line_that_says_how_to_go_on(number, status, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may ignore it
    with pytest.raises(SystemExit) as stopped, short_errors("go on so"):
        signal.raise_signal(number)
    assert stopped.value.code == status
    assert re.fullmatch(r"train.py: stopped by (SIGTERM|Ctrl-C); go on so\n", capsys.readouterr().err)


@pytest.mark.parametrize("name", sorted(file.stem for file in (ROOT / "training").glob("*.py")))
def test_a_script_says_what_its_command_says_after_a_stop(name, monkeypatch):
    said = []
    monkeypatch.setattr("rs_transformer.utils.processes.run", lambda main, *go_on: said.append(go_on))
    runpy.run_path(str(ROOT / "training" / f"{name}.py"), run_name="__main__")
    runpy.run_module(f"rs_transformer.commands.{name}", run_name="__main__")
    assert said[0] == said[1]
    assert bool(said[0]) == (name in ("compare", "compress", "distill", "synthesize", "train", "translate"))


def test_of_several_processes_one_speaks(tmp_path, capsys, monkeypatch):
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / str(rank) / "error.json"))
        say(f"process {rank}")
    assert capsys.readouterr().err == "process 0\n"


def test_a_command_lists_no_option_that_it_ignores_and_refuses_its_use(capsys):
    with pytest.raises(SystemExit):
        script("evaluate")("--help")
    shown = capsys.readouterr().out
    assert "--test_file" in shown
    assert "--max_source_length" not in shown
    with pytest.raises(SystemExit):
        script("evaluate")("--systems", "a", "--source_lang", "a", "--target_lang", "b", "--max_source_length", 5)
    assert "there is no use for max_source_length here" in capsys.readouterr().err
