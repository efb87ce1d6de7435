"""A model in the form of bergamot, the engine of Firefox Translations: int8, without Marian's own converter.

    python benchmarks/bergamot_model.py hub_cards/rs-marian-ja-en-tanaka rs-bergamot --shortlist lex.s2t

Writes `model.bin`, `source.spm`, `target.spm` and, of a shortlist in Marian's form (that of `benchmarks/shortlist.py
--output`), `lex.bin`. They are for `gemm-precision: int8shiftAll`, by which the engine scales each input as it comes;
Firefox's own models have scales that were counted beforehand (`int8shiftAlphaAll`). The file has each step of a shared
encoder layer, for Marian cannot tie them; decoder layers are tied.
"""

import argparse
import re
import struct
import tempfile
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rs_transformer.export import marian
from rs_transformer.shortlist import Shortlist
from rs_transformer.tokenization import vocabulary

PRECISION = "int8shiftAll"
SIDES = {"source": "encoder", "target": "decoder"}
FLOAT32, INT8, INTGEMM8 = 0x404, 0x101, 0x4101  # of the engine's types
ALIGNMENT = 256  # bytes
SHORTLIST_MAGIC = 0xF11A48D5013417F5
NEVER = -1e4  # bias of entries that the model does not have

Item = tuple[str, int, tuple[int, ...], bytes]


def write(model: str, folder: Path, shortlist: str | None = None) -> list[Path]:
    """Write a model's files into a folder, and return them: the model's, the vocabularies' and the shortlist's.

    The vocabulary is that of SentencePiece, which the engine has the ids from, one file where both sides have one.

    Args:
        model: of this package or stock Marian, on the Hub or in a folder; its width is a multiple of 64.
        shortlist: in Marian's form, of the model's vocabulary.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        marian.convert(model, temporary)
        tokenizer = AutoTokenizer.from_pretrained(temporary)
        with np.load(Path(temporary, "model.npz")) as file:
            tensors = dict(file)
    options = yaml.safe_load(tensors.pop(marian.CONFIG_KEY).tobytes().rstrip(b"\0"))
    if options["dim-emb"] % 64:
        raise SystemExit(f"the engine takes widths of multiples of 64, {model} has {options['dim-emb']}")
    proto = {side: getattr(tokenizer, f"spm_{side}").serialized_model_proto() for side in SIDES}
    names = [side for side in SIDES if side == "source" or proto[side] != proto["source"]]
    files = [folder / "model.bin", *(folder / f"{side}.spm" for side in names)]
    for side, file in zip(names, files[1:], strict=True):
        file.write_bytes(proto[side])
    _renumber(tensors, options, tokenizer, shared=len(names) == 1)
    meta = yaml.safe_dump(options).encode() + b"\0"
    items = [_item(name, tensor) for name, tensor in sorted(tensors.items())]
    _write_items([*items, (marian.CONFIG_KEY, INT8, (len(meta),), meta)], files[0])
    if shortlist:
        files.append(folder / "lex.bin")
        _write_shortlist(Shortlist.load(shortlist, tokenizer), tokenizer, files[-1])
    return files


def _piece_ids(tokenizer: PreTrainedTokenizerBase, side: str) -> list[int | None]:
    """For each piece of SentencePiece's the token id, if it has one."""
    pieces: SentencePieceProcessor = getattr(tokenizer, f"spm_{side}")
    entries = vocabulary(tokenizer, side)
    return [entries.get(pieces.id_to_piece(index)) for index in range(pieces.get_piece_size())]


def _renumber(
    tensors: dict[str, np.ndarray], options: dict[str, Any], tokenizer: PreTrainedTokenizerBase, shared: bool
) -> None:
    """Put embeddings and the output's bias into the order of SentencePiece's pieces, filled up to a multiple of 8."""
    whole = tensors.pop("Wemb", None)
    sizes = []
    for side, part in SIDES.items():
        embedding = whole if whole is not None else tensors.pop(f"{part}_Wemb")
        rows = {index: row for row, index in enumerate(vocabulary(tokenizer, side).values())}
        ids = _piece_ids(tokenizer, side)
        ids += [None] * (-len(ids) % 8)
        known = [rows.get(index, rows[tokenizer.unk_token_id]) for index in ids]
        tensors["Wemb" if shared else f"{part}_Wemb"] = embedding[known]
        sizes.append(len(ids))
    bias = tensors["decoder_ff_logit_out_b"][:, known]
    bias[:, [index is None for index in ids]] = NEVER
    tensors["decoder_ff_logit_out_b"] = bias
    options |= {"dim-vocabs": sizes, "tied-embeddings-all": shared, "tied-embeddings": not shared}


def _item(name: str, tensor: np.ndarray) -> Item:
    """A matrix in int8 with the multiplier behind it, all else in float32."""
    if not re.search(r"_W\w?$|Wemb$", name):
        return name, FLOAT32, tensor.shape, tensor.astype(np.float32).tobytes()
    multiplier = np.float32(127 / np.abs(tensor).max())
    matrix = tensor if name.endswith("Wemb") else tensor.T  # so the engine has them
    return name, INTGEMM8, tensor.shape, np.rint(matrix * multiplier).astype(np.int8).tobytes() + multiplier.tobytes()


def _write_items(items: list[Item], file: Path) -> None:
    """Write Marian's binary format, version 1: counts, headers, names, shapes, then the data, aligned."""
    items = [(name, kind, shape, data + bytes(-len(data) % ALIGNMENT)) for name, kind, shape, data in items]
    head = struct.pack("<QQ", 1, len(items))
    head += b"".join(
        struct.pack("<4Q", len(name) + 1, kind, len(shape), len(data)) for name, kind, shape, data in items
    )
    head += b"".join(name.encode() + b"\0" for name, *_ in items)
    head += b"".join(struct.pack(f"<{len(shape)}i", *shape) for _, _, shape, _ in items)
    gap = -(len(head) + 8) % ALIGNMENT
    file.write_bytes(head + struct.pack("<Q", gap) + bytes(gap) + b"".join(item[-1] for item in items))


def _write_shortlist(shortlist: Shortlist, tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Write the engine's binary form: where the candidates of each source piece begin, and the candidates."""
    sources, targets = (_piece_ids(tokenizer, side) for side in SIDES)
    places = {index: place for place, index in enumerate(targets) if index is not None}
    rows = [
        sorted(places[index] for index in shortlist.candidates.get(source, ()) if index in places)
        for source in sources
    ]
    offsets = np.cumsum([0, *map(len, rows)], dtype="<u8")
    # No checksum, which the engine is not to look at; no entries that all sentences have but those of their end.
    head = struct.pack("<6Q", SHORTLIST_MAGIC, 0, 0, max(map(len, rows)), len(offsets), offsets[-1])
    file.write_bytes(head + offsets.tobytes() + np.array(list(chain(*rows)), "<u4").tobytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="A model of this package or stock Marian.")
    parser.add_argument("folder", type=Path, help="Where to write the files.")
    parser.add_argument("--shortlist", help="A shortlist in Marian's form.")
    args = parser.parse_args()
    for file in write(args.model, args.folder, args.shortlist):
        print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
