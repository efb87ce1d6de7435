"""Put a finished model's folder on the Hugging Face Hub, with its card.

    rs-transformer publish runs/tanaka_rs6 --repo org/rs-marian-ja-en --card true --dry_run true
    rs-transformer publish runs/tanaka_rs6 --repo org/rs-marian-ja-en
    rs-transformer publish runs/tanaka_rs6 --repo org/rs-marian-ja-en --output_dir published --dtype float16

The first command writes the card and shows what would be uploaded, the second one uploads it, in one commit. The third
one lays the repository out in a folder, here with weights in half precision.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import load_file, save_file
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from ..checkpoints import load_parent
from ..configuration_rs_marian import REMOTE_CODE_FILES
from ..model_card import CARD, card_disagreements, write_card
from ..utils.files import check_output, staged_folder
from ..utils.processes import run
from ..utils.recipes import RecipeParser

TOKENIZER_FILES = ("tokenizer_config.json", "source.spm", "target.spm", "vocab.json")
RECORDS = (
    "recipe.yaml",
    "run.json",
    "results.json",
    "collapse.json",
    "distillation.json",
    "depth_sweep.json",
    "card.yaml",
    "target_vocab.json",
    "special_tokens_map.json",
    SAFE_WEIGHTS_INDEX_NAME,
)
DTYPES = ("float16", "bfloat16")


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
        if self.repo.count("/") != 1:
            raise ValueError(f"repo must be org/name, got {self.repo!r}")
        validate_repo_id(self.repo)


def publish(args: PublishArguments) -> list[str]:
    """Check a folder, show what is uploaded of it, and upload that in one commit.

    Weights, tokenizer, generation configuration, remote code, card and the records of the run are uploaded;
    checkpoints, logs and whatever else lies there are not.

    Returns:
        The names of the files.

    Raises:
        ValueError: the folder is incomplete, its weights do not fit its configuration, or its card says other figures
            than `results.json` or names another repository.
        FileExistsError: `output_dir` is there already.
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses, for want of a token (`hf auth login`) or of rights.
    """
    folder = Path(args.folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {args.folder!r}")
    if args.output_dir is not None:
        lay_out(folder, Path(args.output_dir), args.repo, args.dtype)
        folder = Path(args.output_dir)
    elif args.card:
        write_card(folder, args.repo)
    files = files_to_publish(folder)
    check_card(folder, args.repo)
    print(f"{args.repo}:")
    for name in files:
        print(f"  {(folder / name).stat().st_size / 1e6:8.2f} MB  {name}")
    print(f"  {sum((folder / name).stat().st_size for name in files) / 1e6:8.2f} MB in {len(files)} files", flush=True)
    if args.dry_run or args.output_dir is not None:
        return files
    api = HfApi()
    api.create_repo(args.repo, private=args.private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=args.repo,
        folder_path=folder,
        allow_patterns=files,
        revision=args.revision,
        commit_message=args.commit_message,
    )
    print(commit.commit_url, flush=True)
    return files


def lay_out(folder: Path, output: Path, repo: str, dtype: str | None = None) -> None:
    """Write what belongs on the Hub of a folder, and a card for the repository, into a new folder.

    Args:
        dtype: of the stored weights, one of `DTYPES`; default: as they are. `config.json` keeps the type in which
            transformers loads and computes, so that halves save space and cost no speed.

    Raises:
        ValueError: as `files_to_publish`.
        FileExistsError: the folder is there already.
    """
    check_output(output)
    names = files_to_publish(folder)
    with staged_folder(output) as staging:
        for name in names:
            shutil.copyfile(folder / name, staging / name)
            if dtype is not None and name.endswith(".safetensors"):
                tensors = load_file(folder / name)
                halves = {
                    key: tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
                    for key, tensor in tensors.items()
                }
                save_file(halves, staging / name, metadata={"format": "pt"})
        write_card(staging, repo)


def files_to_publish(folder: Path) -> list[str]:
    """What belongs on the Hub of a folder, in order.

    Raises:
        ValueError: something is missing, or the model does not load as it is; says what.
    """
    model, _ = load_parent(str(folder))  # says what is wrong with weights, configuration or tokenizer
    needed = [CARD, CONFIG_NAME, GENERATION_CONFIG_NAME, *TOKENIZER_FILES]
    if model.config.model_type == "rs_marian":
        needed += REMOTE_CODE_FILES
    if missing := [name for name in needed if not (folder / name).is_file()]:
        mend = "training/publish.py … --card true writes it" if missing == [CARD] else "save the model again"
        raise ValueError(f"{folder} is incomplete, there is no {', '.join(missing)}: {mend}")
    weights = sorted(file.name for file in folder.glob("*.safetensors"))
    return [*needed, *weights, *(name for name in RECORDS if (folder / name).is_file())]


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
