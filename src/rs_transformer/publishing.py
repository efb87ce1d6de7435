"""Put a finished model's folder on the Hub: what `training/publish.py` does."""

from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from .collapsing import load_parent
from .configuration_rs_marian import REMOTE_CODE_FILES
from .model_card import CARD, card_disagreements, write_card

TOKENIZER_FILES = ("tokenizer_config.json", "source.spm", "target.spm", "vocab.json")
RECORDS = (
    "recipe.yaml",
    "run.json",
    "results.json",
    "collapse.json",
    "distillation.json",
    "depth_sweep.json",
    "target_vocab.json",
    "special_tokens_map.json",
    SAFE_WEIGHTS_INDEX_NAME,
)


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

    def __post_init__(self) -> None:
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
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses, for want of a token (`hf auth login`) or of rights.
    """
    folder = Path(args.folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {args.folder!r}")
    if args.card:
        write_card(folder, args.repo)
    files = files_to_publish(folder)
    check_card(folder, args.repo)
    print(f"{args.repo}:")
    for name in files:
        print(f"  {(folder / name).stat().st_size / 1e6:8.2f} MB  {name}")
    print(f"  {sum((folder / name).stat().st_size for name in files) / 1e6:8.2f} MB in {len(files)} files", flush=True)
    if args.dry_run:
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
