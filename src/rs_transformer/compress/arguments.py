"""What a compression is told: the parent, the goals, the shape, the training, and what is shipped."""

from dataclasses import dataclass, field

from ..calibration import UPDATES
from ..corpus import OptionalCorpusArguments
from ..decoding import DecodingArguments
from ..export import TARGETS
from ..utils.ranges import check_range
from ..utils.recipes import ArgumentGroups


@dataclass
class CompressArguments:
    """What to compress, and where to."""

    model_name_or_path: str = field(
        metadata={
            "help": "The parent: a Marian or RSMarian model, on the Hub or in a folder; may stand first, without its "
            "name."
        }
    )
    output_dir: str = field(metadata={"help": "The folder for all stages; the same command goes on in it."})
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the parent."})
    allow_pickle: bool = field(
        default=False, metadata={"help": "Read pytorch_model.bin too, which can run code of whoever made it."}
    )
    monolingual_file: str | None = field(
        default=None,
        metadata={
            "help": "Text of the source language, which the parent translates: plain text, a sentence a line, or "
            "jsonl, csv, tsv, parquet with text_column. Beside train_file, or in its place."
        },
    )
    text_column: str = field(default="text", metadata={"help": "Text column of a monolingual_file that has columns."})
    teacher_num_beams: int = field(default=5, metadata={"help": "Beam size of the parent, for that text."})
    dry_run: bool = field(default=False, metadata={"help": "Print the plan, with sizes and times, and stop."})

    def __post_init__(self) -> None:
        check_range(self, "teacher_num_beams", least=1)


@dataclass
class GoalArguments:
    """What the child has to be; each goal chooses something."""

    budget_minutes: float | None = field(
        default=None,
        metadata={"help": "Minutes for everything, which choose the updates; an update is timed before."},
    )
    target_size: float | None = field(
        default=None,
        metadata={
            "help": "Megabytes (10^6 bytes) of the weights in CTranslate2's int8 at most, which choose the vocabulary "
            "or, where all of it fits, the stored layers."
        },
    )
    target_speedup: float | None = field(
        default=None,
        metadata={
            "help": "Times the parent's speed on single sentences at least, which choose the decoder's depth: in "
            "CTranslate2's int8 on one thread with num_beams, or in PyTorch where it is not installed."
        },
    )
    max_bleu_loss: float | None = field(
        default=None,
        metadata={
            "help": "BLEU on validation data that the child may lie behind the parent, which chooses the decoder's "
            "depth: the least of them that is within it, in a student that was trained for all."
        },
    )

    def __post_init__(self) -> None:
        check_range(self, "budget_minutes", "target_size", "target_speedup", above=0)
        check_range(self, "max_bleu_loss", least=0)


@dataclass
class ShapeArguments:
    """What the child is, where no goal chooses it."""

    decoder_layers: int | None = field(
        default=None, metadata={"help": "Depth of the decoder; default: 2, or what a goal chooses."}
    )
    encoder_unique_layers: int | None = field(
        default=None, metadata={"help": "Stored encoder layers; default: 1, or what target_size chooses."}
    )
    decoder_unique_layers: int | None = field(
        default=None, metadata={"help": "Stored decoder layers; default: 1, or what target_size chooses."}
    )
    step_layer_norms: bool = field(default=False, metadata={"help": "Each step keeps the parent's LayerNorms."})
    step_biases: bool = field(default=False, metadata={"help": "Each step keeps the parent's biases."})
    max_vocabulary: int | None = field(
        default=None,
        metadata={"help": "Entries of a vocabulary at most; default: all that the text needs, or as target_size has."},
    )

    def __post_init__(self) -> None:
        layers = ("decoder_layers", "encoder_unique_layers", "decoder_unique_layers")
        check_range(self, *layers, "max_vocabulary", least=1)


@dataclass
class StudentArguments:
    """How the child is trained; the defaults are those of the recipes in training/recipes."""

    updates: int | None = field(
        default=None,
        metadata={
            "help": "Updates of the child after its calibration; default: ten epochs, or what budget_minutes chooses."
        },
    )
    calibration_updates: int | None = field(
        default=None,
        metadata={"help": f"Updates of the collapse's calibration; default: {UPDATES}, fewer in a short budget."},
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": "Its peak; default: 1e-3 at d_model 128, less by the root of the width."}
    )
    max_tokens: int = field(default=1280, metadata={"help": "Token budget of a batch, in each process."})
    word_weight: float | None = field(
        default=None, metadata={"help": "Weight of the parent's distributions beside the targets; default: 0.5."}
    )
    dropout: float = field(default=0.1, metadata={"help": "In the child's trainings."})
    bf16: bool | None = field(
        default=None, metadata={"help": "Train in bfloat16; default: where it is faster, which is timed."}
    )
    seed: int = field(default=1, metadata={"help": "Of everything that is drawn."})

    def __post_init__(self) -> None:
        check_range(self, "updates", "calibration_updates", "max_tokens", least=1)
        check_range(self, "learning_rate", above=0)
        check_range(self, "word_weight", least=0, most=1)
        check_range(self, "dropout", least=0, below=1)
        check_range(self, "seed", least=0)


@dataclass
class ShippingArguments:
    """What is shipped."""

    engines: list[str] | None = field(
        default=None,
        metadata={
            "help": f"To export to, of {', '.join(TARGETS)}; default: ctranslate2 if it is installed.",
            "nargs": "+",
        },
    )
    quantization: str = field(
        default="int8", metadata={"help": "Of the exported weights; an engine that has none such gets float32."}
    )
    shortlist: bool = field(
        default=True, metadata={"help": "Write a lexical shortlist for engines that take one (ctranslate2, marian)."}
    )
    min_same: float = field(
        default=0.5, metadata={"help": "Share of an export's translations that must be PyTorch's."}
    )
    report: bool = field(
        default=True,
        metadata={
            "help": "Compare child and parent at the end, on the test split, else on the validation split, else on "
            "text without references; needs matplotlib."
        },
    )
    repo: str | None = field(
        default=None, metadata={"help": "The repository that the card is for, org/name; default: the folder itself."}
    )

    def __post_init__(self) -> None:
        check_range(self, "min_same", least=0, most=1)
        for engine in self.engines or []:
            if engine not in TARGETS:
                raise ValueError(f"there is no engine {engine!r}; engines: {', '.join(TARGETS)}")


@dataclass
class CompressOptions(ArgumentGroups):
    """What a compression is told."""

    compress: CompressArguments
    goal: GoalArguments
    shape: ShapeArguments
    student: StudentArguments
    shipping: ShippingArguments
    corpus: OptionalCorpusArguments
    decoding: DecodingArguments
