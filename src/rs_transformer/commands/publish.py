"""Put a finished model's folder on the Hugging Face Hub, with its card.

    rs-transformer publish runs/tanaka_rs6 --repo org/rs-marian-ja-en --card true --dry_run true
    rs-transformer publish runs/tanaka_rs6 --repo org/rs-marian-ja-en
    rs-transformer publish runs/tanaka_rs6 --repo org/rs-marian-ja-en --output_dir published --dtype float16
    rs-transformer publish runs/tanaka_rs6 --repo org/rs-web --space web

The first command writes the card and shows what would be uploaded, the second one uploads it, in one commit, which
also deletes what an earlier publishing has left there of weights and records. The third one lays the repository out in
a folder, here with weights in half precision. The last one makes a static Space: a page that translates with the model
in the browser.
"""

import json
import os
import re
import shlex
import shutil
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import load_file, save_file
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .. import __version__
from ..checkpoints import load_parent
from ..configuration_rs_marian import REMOTE_CODE_FILES
from ..model_card import (
    CARD,
    EVAL_RESULTS,
    card_disagreements,
    card_facts,
    keep_own_lines,
    replace_card,
    weight_files,
    write_card,
)
from ..training.run_folder import LINEAGE, check_scores, restate_weights
from ..utils.files import check_output, staged_folder
from ..utils.processes import run
from ..utils.recipes import RecipeParser

TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (TOKENIZER_CONFIG, "source.spm", "target.spm", "vocab.json")
RECORDS = (
    "recipe.yaml",
    "run.json",
    "results.json",
    *LINEAGE,
    "distillation.json",
    "depth_sweep.json",
    "comparison.json",
    EVAL_RESULTS,
    "card.yaml",
    "target_vocab.json",
    "special_tokens_map.json",
)
# In one file or in shards, and their index.
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
PACKAGE = Path(__file__).parents[1]
DTYPES = ("float16", "bfloat16")
SPACES = ("web",)


@dataclass
class PublishArguments:
    """What to put on the Hub, and where."""

    folder: str = field(metadata={"help": "A finished run, or another folder with a model; may stand first."})
    repo: str = field(metadata={"help": "The repository, org/name; made if it is not there."})
    card: bool = field(default=False, metadata={"help": "Write the model card anew before, for this repository."})
    private: bool | None = field(default=None, metadata={"help": "If the repository is made: who may see it."})
    revision: str | None = field(default=None, metadata={"help": "The branch to upload to; default: main."})
    commit_message: str = field(default="Upload the model", metadata={"help": "Of the one commit."})
    dry_run: bool = field(default=False, metadata={"help": "Check the folder, show what would be uploaded, and stop."})
    output_dir: str | None = field(
        default=None,
        metadata={"help": "Lay the repository out in this new folder, with a new card, and upload nothing."},
    )
    space: str | None = field(
        default=None,
        metadata={
            "help": "Make a Space instead, with a page that translates with the model in the browser.",
            "choices": list(SPACES),
        },
    )
    other_models: list[str] | None = field(
        default=None,
        metadata={
            "help": "With space: models that the page offers beside it, of other languages, such as the one of the "
            "other direction.",
            "nargs": "+",
        },
    )
    quantization: str = field(default="int8", metadata={"help": "With space: of the models that the page loads."})
    decoder_depths: list[int] | None = field(
        default=None,
        metadata={"help": "With space: the decoder depths that it offers; default: each model's own.", "nargs": "+"},
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "With output_dir: the type in which the weights are stored. They are read as the type of before.",
            "choices": list(DTYPES),
        },
    )

    def __post_init__(self) -> None:
        if self.dtype is not None and self.output_dir is None:
            raise ValueError("dtype stores other weights than those of the folder: give output_dir too, a new folder")
        if self.space is not None and (self.card or self.dtype is not None):
            raise ValueError("a Space has no model card and no weights for transformers: leave out card and dtype")
        for name in ("other_models", "decoder_depths"):
            if self.space is None and getattr(self, name):
                raise ValueError(f"{name} says what a page offers: give space=web too")
        if self.repo.count("/") != 1:
            raise ValueError(f"repo must be org/name, got {self.repo!r}")
        validate_repo_id(self.repo)


def publish(args: PublishArguments) -> list[str]:
    """Check a folder, show what is uploaded of it, and upload that in one commit.

    Weights, tokenizer, generation configuration, remote code, card and the records of the run are uploaded;
    checkpoints, logs and whatever else lies there are not. Weights and records that are in the repository and not in
    the folder are deleted there. A new card keeps what the one before said and `card.yaml` does not.

    Returns:
        The names of the files.

    Raises:
        ValueError: the folder is incomplete, its scores are those of other weights, its weights do not fit its
            configuration, a file is a link or a source file not this package's, or its card says other figures than
            its files or names another repository.
        FileExistsError: `output_dir` is there already.
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses, for want of a token (`hf auth login`) or of rights.
    """
    folder = Path(args.folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {args.folder!r}")
    for each in (args.folder, *(args.other_models or [])):
        if Path(each).is_dir():
            check_scores(Path(each))
    if args.space is not None:
        return publish_page(args)
    if args.output_dir is not None:
        lay_out(folder, Path(args.output_dir), args.repo, args.dtype, **said_before(folder))
        folder = Path(args.output_dir)
    elif args.card:
        replace_card(folder, args.repo, **said_before(folder))
    files = files_to_publish(folder)
    check_card(folder, args.repo)
    print_files(args.repo, folder, files)
    if args.dry_run or args.output_dir is not None:
        return files
    api = HfApi()
    api.create_repo(args.repo, private=args.private, exist_ok=True)
    create_branch(api, args)
    keep_card_of_the_hub(api, args, folder)
    # The package's own source, to which a folder of a clone links.
    paths = {name: PACKAGE / name if name in REMOTE_CODE_FILES else folder / name for name in files}
    commit = api.create_commit(
        args.repo,
        [
            *(CommitOperationAdd(name, path) for name, path in paths.items()),
            *deletions(api, args, files, lambda name: name in RECORDS or bool(WEIGHTS.fullmatch(name))),
        ],
        revision=args.revision,
        commit_message=args.commit_message,
    )
    print(commit.commit_url, flush=True)
    return files


def publish_page(args: PublishArguments) -> list[str]:
    """Lay out a page that translates with models in the browser, and upload it as a static Space in one commit.

    Returns:
        The names of the files.

    Raises:
        ValueError: as `export.web.lay_out_page`; or ONNX Runtime is not installed.
        FileExistsError: `output_dir` is there already.
    """
    try:
        from ..export.web import lay_out_page
    except ImportError as error:
        raise ValueError(f'space={args.space} needs: pip install "rs-transformer[onnx]" ({error})') from error
    with TemporaryDirectory() as temporary:
        output = Path(args.output_dir if args.output_dir is not None else f"{temporary}/page")
        check_output(output)
        with staged_folder(output) as staging:
            models = [args.folder, *(args.other_models or [])]
            lay_out_page(models, staging, args.quantization, args.decoder_depths)
        files = sorted(str(file.relative_to(output)) for file in output.rglob("*") if file.is_file())
        print_files(args.repo, output, files)
        if not args.dry_run and args.output_dir is None:
            api = HfApi()
            space = {"repo_type": "space", "space_sdk": "static"}
            api.create_repo(args.repo, private=args.private, exist_ok=True, **space)
            create_branch(api, args, repo_type="space")
            commit = api.create_commit(
                args.repo,
                [
                    *(CommitOperationAdd(name, output / name) for name in files),
                    *deletions(api, args, files, lambda name: name.startswith("models/"), repo_type="space"),
                ],
                repo_type="space",
                revision=args.revision,
                commit_message=args.commit_message,
            )
            print(commit.commit_url, flush=True)
    return files


def create_branch(api: HfApi, args: PublishArguments, **kind: str) -> None:
    """The branch that is uploaded to, unless it is there, or is a pull request."""
    if args.revision is not None and not args.revision.startswith("refs/"):
        api.create_branch(args.repo, branch=args.revision, exist_ok=True, **kind)


def keep_card_of_the_hub(api: HfApi, args: PublishArguments, folder: Path) -> None:
    """Keep the card that is on the Hub beside the new one, if it has lines that this one lacks: edits, maybe."""
    if CARD not in api.list_repo_files(args.repo, revision=args.revision):
        return
    with TemporaryDirectory() as temporary:
        there = api.hf_hub_download(args.repo, CARD, revision=args.revision, local_dir=temporary)
        before = Path(there).read_text("utf-8", errors="replace")
    keep_own_lines(before, (folder / CARD).read_text("utf-8").splitlines(), folder / CARD)


def said_before(folder: Path) -> dict[str, Any]:
    """What a folder's card says that no file of it does, but for the repository, as `build_card` takes it."""
    return {name: value for name, value in card_facts(folder).items() if name != "repository"}


def deletions(
    api: HfApi, args: PublishArguments, names: Sequence[str], is_ours: Callable[[str], bool], **kind: str
) -> list[CommitOperationDelete]:
    """What a commit deletes in a repository: the files of an earlier publishing that are not among the new ones.

    Args:
        names: the new ones.
        is_ours: whether a file can be one that was published; others are somebody's and stay.
        kind: `repo_type`, where it is no model.
    """
    there = api.list_repo_files(args.repo, revision=args.revision, **kind)
    stale = [name for name in there if name not in names and is_ours(name)]
    for name in stale:
        print(f"  deleted there  {name}", flush=True)
    return [CommitOperationDelete(name) for name in stale]


def print_files(repo: str, folder: Path, files: Sequence[str]) -> None:
    """Print what is uploaded."""
    print(f"{repo}:")
    for name in files:
        print(f"  {(folder / name).stat().st_size / 1e6:8.2f} MB  {name}")
    print(f"  {sum((folder / name).stat().st_size for name in files) / 1e6:8.2f} MB in {len(files)} files", flush=True)


def lay_out(folder: Path, output: Path, repo: str, dtype: str | None = None, **said: Any) -> None:
    """Write what belongs on the Hub of a folder, and a card for the repository, into a new folder.

    Args:
        dtype: of the stored weights, one of `DTYPES`; default: as they are. `config.json` keeps the type in which
            transformers loads and computes, so that halves save space and cost no speed.
        said: for the card, as `build_card`.

    Raises:
        ValueError: as `files_to_publish`.
        FileExistsError: the folder is there already.
    """
    check_output(output)
    names = files_to_publish(folder, carded=False)
    with staged_folder(output) as staging:
        for name in names:
            (staging / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, staging / name)
            if dtype is not None and name.endswith(".safetensors"):
                tensors = load_file(folder / name)
                halves = {
                    key: tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
                    for key, tensor in tensors.items()
                }
                save_file(halves, staging / name, metadata={"format": "pt"})
        if dtype is not None:
            restate_weights(staging, dtype)
        write_card(staging, repo, **said)


def files_to_publish(folder: Path, carded: bool = True) -> list[str]:
    """What belongs on the Hub of a folder, in order: this list and nothing else, whatever lies there.

    Args:
        carded: the card is one of them, and has to be there.

    Raises:
        ValueError: something is missing, no regular file or not this package's, or the model does not load as it is;
            says what.
    """
    model, _ = load_parent(str(folder))  # says what is wrong with weights, configuration or tokenizer
    needed = [*([CARD] if carded else []), CONFIG_NAME, GENERATION_CONFIG_NAME, *TOKENIZER_FILES]
    if model.config.model_type == "rs_marian":
        needed += REMOTE_CODE_FILES
    if missing := [name for name in needed if not (folder / name).is_file()]:
        mend = "training/publish.py … --card true writes it" if missing == [CARD] else "save the model again"
        raise ValueError(f"{folder} is incomplete, there is no {', '.join(missing)}: {mend}")
    weights = weight_files(folder)
    if weights != [SAFE_WEIGHTS_NAME]:
        weights.append(SAFE_WEIGHTS_INDEX_NAME)
    names = [*needed, *weights, *(name for name in RECORDS if os.path.lexists(folder / name))]
    for name in names:
        if name in REMOTE_CODE_FILES:
            check_source(folder / name)
        elif not stat.S_ISREG((folder / name).lstat().st_mode):
            raise ValueError(f"{folder / name} is a link or otherwise no regular file: put the file itself there")
    for name in (CONFIG_NAME, TOKENIZER_CONFIG):
        check_references(folder / name, names)
    return names


def check_source(file: Path) -> None:
    """Raise `ValueError` unless a source file is, line by line, this package's, which whoever loads it will run."""
    own = PACKAGE / file.name
    if file.read_bytes().splitlines() != own.read_bytes().splitlines():
        raise ValueError(
            f"{file} is not the one of rs-transformer {__version__}: it was saved by another version, or changed. "
            f"Renew it: cp {shlex.quote(str(own))} {shlex.quote(str(file))}"
        )


def check_references(file: Path, names: Sequence[str]) -> None:
    """Raise `ValueError` if a configuration has whoever loads it run source that is not among the files beside it."""
    config = json.loads(file.read_text("utf-8"))
    references = list((config.get("auto_map") or {}).values())
    references += [task.get("impl") for task in (config.get("custom_pipelines") or {}).values()]
    for reference in references:
        for name in reference if isinstance(reference, list) else [reference]:
            if name is not None and f"{name.rpartition('.')[0]}.py" not in names:
                raise ValueError(f"{file} has {name!r} loaded, source that is not uploaded: save the model again")


def check_card(folder: Path, repo: str) -> None:
    """Raise `ValueError` unless a folder's card has the figures of `results.json` and the name of the repository."""
    if disagreements := card_disagreements(folder):
        raise ValueError(
            f"the card of {folder} and its results.json disagree: {'; '.join(disagreements)}. "
            "training/publish.py … --card true writes it anew"
        )
    if f'"{repo}"' not in (folder / CARD).read_text("utf-8"):
        raise ValueError(f"the card of {folder} does not say how to load {repo!r}; --card true writes it for it")


def main(argv: list[str] | None = None) -> None:
    parser = RecipeParser((PublishArguments,), positional="folder", description=__doc__)
    publish(*parser.parse_recipe(argv))


if __name__ == "__main__":
    run(main)
