"""A run's folder: which checkpoints are its own, what its records say, and whose scores it holds."""

import json
import shutil

import pytest
import yaml
from datasets import Dataset
from oracle import rs_model
from safetensors.torch import load_file, save_file

from rs_transformer.training.run_folder import (
    check_scores,
    checkpoint_to_resume,
    complete_checkpoints,
    data_digest,
    is_finished,
    is_same_place,
    make_way,
    mark_complete,
    named_checkpoint,
    remove_old_checkpoints,
    restate_weights,
    set_later_aside,
    weights_digest,
    write_finished,
    write_run_record,
)


def make_checkpoint(run_dir, name, complete=True):
    folder = run_dir / name
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    (folder / "trainer_state.json").write_text('{"global_step": 1}')
    (folder / "rng_state_0.pth").write_bytes(b"x")
    if complete:
        mark_complete(folder)
    return folder


def names(run_dir):
    return sorted(folder.name for folder in run_dir.iterdir())


# Checkpoints


def test_incomplete_and_shortened_checkpoints_do_not_count_and_are_moved_aside(tmp_path):
    for step in (10, 20, 30):
        make_checkpoint(tmp_path, f"checkpoint-{step}")
    make_checkpoint(tmp_path, "checkpoint-40", complete=False)
    (tmp_path / "checkpoint-30" / "model.safetensors").write_bytes(b"x" * 50)
    assert [folder.name for folder in complete_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-20"]
    assert checkpoint_to_resume(tmp_path) == str(tmp_path / "checkpoint-20")
    set_later_aside(tmp_path, checkpoint_to_resume(tmp_path))
    aside = ["_checkpoint-30-aside", "_checkpoint-40-aside"]
    assert names(tmp_path) == [*aside, "checkpoint-10", "checkpoint-20"]
    make_checkpoint(tmp_path, "checkpoint-30", complete=False)
    set_later_aside(tmp_path, checkpoint_to_resume(tmp_path))
    assert "_checkpoint-30-aside-2" in names(tmp_path)


def test_a_resume_leaves_alone_what_is_not_the_runs_own(tmp_path):
    make_checkpoint(tmp_path, "checkpoint-20")
    foreign = ["checkpoint-best", "checkpoint-10-keep", "checkpoint-5", "checkpoint-x", "kept"]
    for name in foreign:
        make_checkpoint(tmp_path, name, complete=False)
    (tmp_path / "checkpoint-99").write_text("a file")
    assert checkpoint_to_resume(tmp_path) == str(tmp_path / "checkpoint-20")
    set_later_aside(tmp_path, checkpoint_to_resume(tmp_path))
    for limit in (1, 2):
        remove_old_checkpoints(tmp_path, limit, None)
    assert names(tmp_path) == sorted([*foreign, "checkpoint-20", "checkpoint-99"])


@pytest.mark.parametrize("damage", ["", "{", "[1]", "null", "{}"])
def test_a_damaged_marker_makes_a_checkpoint_incomplete_and_stops_nothing(tmp_path, damage):
    make_checkpoint(tmp_path, "checkpoint-10")
    marker = make_checkpoint(tmp_path, "checkpoint-20") / "checkpoint_complete.json"
    marker.write_text(damage)
    assert checkpoint_to_resume(tmp_path) == str(tmp_path / "checkpoint-10")


def test_a_checkpoint_with_an_edited_json_file_is_complete(tmp_path):
    folder = make_checkpoint(tmp_path, "checkpoint-20")
    (folder / "trainer_state.json").write_text('{"global_step": 1, "by": "hand"}')
    assert complete_checkpoints(tmp_path) == [folder]
    (folder / "trainer_state.json").write_text('{"global_step": 1, "by"')
    assert complete_checkpoints(tmp_path) == []


def test_going_on_from_a_named_checkpoint_moves_later_ones_aside(tmp_path):
    for step in (10, 20, 30):
        make_checkpoint(tmp_path / "run", f"checkpoint-{step}")
    named = named_checkpoint(tmp_path / "run/checkpoint-10", tmp_path / "run")
    assert named == str(tmp_path / "run/checkpoint-10")
    set_later_aside(tmp_path / "run", named)
    assert [folder.name for folder in complete_checkpoints(tmp_path / "run")] == ["checkpoint-10"]
    assert named_checkpoint(tmp_path / "run/checkpoint-10", tmp_path / "other").endswith("checkpoint-10")
    make_checkpoint(tmp_path / "other", "checkpoint-5")
    with pytest.raises(ValueError, match=r"holds a run already, and .*checkpoint-10 is of another one"):
        named_checkpoint(tmp_path / "run/checkpoint-10", tmp_path / "other")
    (tmp_path / "finished").mkdir()
    (tmp_path / "finished" / "results.json").write_text('{"test": {}}')
    with pytest.raises(ValueError, match="finished holds a run already"):
        named_checkpoint(tmp_path / "run/checkpoint-10", tmp_path / "finished")
    with pytest.raises(ValueError, match="checkpoint-20 is not a complete checkpoint"):
        named_checkpoint(tmp_path / "run/checkpoint-20", tmp_path / "run")


def test_no_run_goes_on_from_weights_alone(tmp_path):
    make_checkpoint(tmp_path, "checkpoint-10")
    newest = make_checkpoint(tmp_path, "checkpoint-20", complete=False)
    (newest / "rng_state_0.pth").unlink()
    mark_complete(newest)
    assert len(complete_checkpoints(tmp_path)) == 2  # they are averaged, and deleted in their turn
    for go_on in (lambda: checkpoint_to_resume(tmp_path), lambda: named_checkpoint(newest, tmp_path)):
        with pytest.raises(ValueError, match=r"checkpoint-20 has weights alone .* by --model_name_or_path"):
            go_on()
    assert named_checkpoint(tmp_path / "checkpoint-10", tmp_path) == str(tmp_path / "checkpoint-10")


def test_what_is_in_the_way_of_a_checkpoint_is_moved_aside_unless_it_is_one(tmp_path):
    own, foreign = (
        make_checkpoint(tmp_path, "checkpoint-10"),
        make_checkpoint(tmp_path, "checkpoint-20", complete=False),
    )
    for folder in (own, foreign, tmp_path / "checkpoint-30"):
        make_way(folder)
    assert names(tmp_path) == ["_checkpoint-20-aside", "checkpoint-10"]
    assert complete_checkpoints(tmp_path) == []  # not until it has been written over


def test_old_checkpoints_go_and_the_best_and_the_newest_stay(tmp_path):
    for step in (10, 20, 30, 40, 100):
        make_checkpoint(tmp_path, f"checkpoint-{step}")
    make_checkpoint(tmp_path, "_checkpoint-5-removed")  # left by a process that was killed while deleting
    remove_old_checkpoints(tmp_path, 3, str(tmp_path / "checkpoint-20"))
    assert names(tmp_path) == ["checkpoint-100", "checkpoint-20", "checkpoint-40"]
    remove_old_checkpoints(tmp_path, 1, str(tmp_path / "checkpoint-20"))
    assert names(tmp_path) == ["checkpoint-100", "checkpoint-20"]
    remove_old_checkpoints(tmp_path, None, None)
    assert names(tmp_path) == ["checkpoint-100", "checkpoint-20"]


# Records


def test_what_changes_when_a_run_goes_on_is_recorded(tmp_path, caplog):
    begun = {"seed": 3, "dropout": 0.1, "num_train_epochs": 6, "logging_steps": 20, "max_tokens": None}
    write_run_record(tmp_path, begun, {"training_data": "aa"})
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["resumed"] == []
    assert record["finished"] is False
    changed = begun | {"seed": 4, "dropout": 0.3, "logging_steps": 1, "max_tokens": 512}
    write_run_record(tmp_path, changed, {"training_data": "bb"}, tmp_path / "checkpoint-10")
    write_finished(tmp_path)
    record = json.loads((tmp_path / "run.json").read_text())
    (resumed,) = record["resumed"]
    assert resumed["update"] == 10
    wanted = {"seed": [3, 4], "dropout": [0.1, 0.3], "max_tokens": [None, 512], "training_data": ["aa", "bb"]}
    assert resumed["changed"] == wanted
    assert record["finished"] is True
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["seed"] == 4
    assert "# from update 10 on seed 4, before 3\n" in (tmp_path / "recipe.yaml").read_text()


def test_a_resume_of_which_nothing_is_left_is_not_recorded(tmp_path):
    write_run_record(tmp_path, {"seed": 1}, {"processes": 1})
    write_run_record(tmp_path, {"seed": 2}, {"processes": 2}, tmp_path / "checkpoint-10")
    write_run_record(tmp_path, {"seed": 2}, {"processes": 2}, tmp_path / "checkpoint-20")
    assert [part["changed"] for part in json.loads((tmp_path / "run.json").read_text())["resumed"]] == [
        {"seed": [1, 2], "processes": [1, 2]},
        {},
    ]
    write_run_record(tmp_path, {"seed": 1}, {"processes": 1}, tmp_path / "checkpoint-10")
    (resumed,) = json.loads((tmp_path / "run.json").read_text())["resumed"]
    assert (resumed["update"], resumed["changed"]) == (10, {})
    assert not (tmp_path / "recipe.yaml").read_text().startswith("#")


@pytest.mark.parametrize("file", ["recipe.yaml", "run.json"])
@pytest.mark.parametrize("damage", ["", "[", "- a\n"])
def test_a_damaged_record_stops_no_resume(tmp_path, file, damage):
    write_run_record(tmp_path, {"seed": 1}, {"processes": 1})
    (tmp_path / file).write_text(damage)
    write_run_record(tmp_path, {"seed": 1}, {"processes": 1}, tmp_path / "checkpoint-10")
    (resumed,) = json.loads((tmp_path / "run.json").read_text())["resumed"]
    assert resumed["changed"] == {}


def test_the_digest_of_the_data_is_that_of_the_chosen_pairs_in_order():
    rows = {"input_ids": [[1, 2], [3], [4]], "labels": [[5], [6, 7], [8]], "length": [2, 2, 1]}
    pairs = Dataset.from_dict(rows)
    digest = data_digest(pairs)
    assert digest == data_digest(Dataset.from_dict(rows).remove_columns("length")) != data_digest(pairs.select([0, 1]))
    assert data_digest(pairs.select([2, 0, 1]).select([1, 2, 0])) == digest != data_digest(pairs.select([1, 0, 2]))
    moved = Dataset.from_dict({"input_ids": [[1], [2, 3], [4]], "labels": [[5], [6, 7], [8]]})
    assert data_digest(moved) != digest


# Scores


@pytest.fixture
def scored(tmp_path):
    """A folder with a model and its scores."""
    rs_model().save_pretrained(tmp_path)
    write_run_record(tmp_path, {"seed": 1})
    (tmp_path / "results.json").write_text(
        json.dumps({"test": {"bleu": 3}, "weights": {"sha256": weights_digest(tmp_path)}})
    )
    write_finished(tmp_path)
    return tmp_path


def test_scores_are_those_of_the_weights_beside_them(scored):
    assert is_finished(scored)
    rs_model().save_pretrained(scored, max_shard_size="20KB")  # the same tensors in several files
    assert is_finished(scored)
    rs_model(seed=1).save_pretrained(scored)
    assert not is_finished(scored)
    with pytest.raises(ValueError, match=r"results\.json has the scores of other weights"):
        check_scores(scored)


def test_a_run_that_was_extended_is_not_finished_until_it_is(scored):
    write_run_record(scored, {"seed": 1}, None, scored / "checkpoint-10")
    assert not is_finished(scored)
    with pytest.raises(
        ValueError, match=r"has not finished, its results\.json is of an earlier one: go on with the run"
    ):
        check_scores(scored)


@pytest.mark.parametrize("damage", ["", "{", "[]"])
def test_damaged_scores_are_none(scored, damage):
    (scored / "results.json").write_text(damage)
    assert not is_finished(scored)
    with pytest.raises(ValueError, match=r"results\.json is empty or damaged"):
        check_scores(scored)


def test_weights_that_are_gone_or_cut_short_are_not_finished(scored):
    weights = scored / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert not is_finished(scored)
    weights.unlink()
    assert not is_finished(scored)


def test_scores_of_an_earlier_version_are_believed(scored):
    (scored / "results.json").write_text('{"test": {"bleu": 3}}')
    (scored / "run.json").write_text('{"command": [], "versions": {}}')
    assert is_finished(scored)


def test_a_copy_in_half_precision_keeps_the_digest_of_what_was_scored(scored, tmp_path):
    origin = weights_digest(scored)
    half = tmp_path / "half"
    half.mkdir()
    for name in ("results.json", "run.json"):
        shutil.copyfile(scored / name, half / name)
    tensors = {name: tensor.half() for name, tensor in load_file(scored / "model.safetensors").items()}
    save_file(tensors, half / "model.safetensors")
    assert not is_finished(half)
    restate_weights(half, "float16")
    assert is_finished(half)
    weights = json.loads((half / "results.json").read_text())["weights"]
    assert (weights["scored_sha256"], weights["stored_as"]) == (origin, "float16")


def test_a_file_is_the_same_by_another_name_and_in_a_folder_that_was_moved(tmp_path):
    before, after, other = tmp_path / "before", tmp_path / "after", tmp_path / "other.jsonl"
    before.mkdir()
    for file in (before / "a.jsonl", other):
        file.touch()
    (tmp_path / "link").symlink_to(before)

    def same(then, now):
        return is_same_place(then, now, before, after)

    assert same(str(before / "a.jsonl"), str(tmp_path / "link" / "a.jsonl"))
    assert not same(str(before / "a.jsonl"), str(other))
    before.rename(after)
    assert same([str(before / "a.jsonl"), str(other)], [str(after / "a.jsonl"), str(other)])
    assert not same(str(before / "a.jsonl"), str(other))
    assert not same("3", "4")
    assert not same(3, 4)
    assert not same("a" * 300, "b" * 300)
