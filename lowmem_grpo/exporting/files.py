"""A model's safetensors, of which one tensor is read and written at a time."""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.utils import filter_repo_objects
from safetensors import safe_open
from torch import Tensor

from lowmem_grpo.errors import InputError, in_a_line
from lowmem_grpo.report.reading import FILES_OF_A_RUN

INDEX, ONE_FILE = "model.safetensors.index.json", "model.safetensors"
# How a file's header names the types that a merge writes.
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Ends of files that hold weights, in any of the forms that a model's folder may have them in.
OF_WEIGHTS = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".h5", ".onnx",
)  # fmt: skip
NEEDED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "LICENSE*"]  # of a model
# What trainings leave beside a model, which may name folders of the machine.
OF_TRAININGS = [*FILES_OF_A_RUN, "plan.json", "trainer_state.json", "*_results.json", ".*"]
# What some have there besides: the same weights once more, in folders such as original/, or for another program.
NOT_NEEDED = ["*/*", "consolidated*"]


class Stored(NamedTuple):
    """A tensor as its file's header describes it."""

    file: str  # within the folder
    dtype: str  # such as "BF16"
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its numbers."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8), **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}  # fmt: skip


def model_folder(name: str, revision: str | None) -> Path:
    """The folder of a model, which is downloaded where it is a hub id that is not on this machine.

    Raises:
        InputError: the hub does not give it.
    """
    if os.path.isdir(name):
        return Path(name)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=NEEDED, ignore_patterns=NOT_NEEDED))
    except Exception as error:  # of the hub or the network
        raise InputError(f"the base {name!r} cannot be fetched from the hub: {in_a_line(error)}") from error


class Tensors:
    """The tensors in a model's folder by name, of which read() brings one at a time into memory.

    Raises:
        InputError: the folder has no safetensors, or other types than are known here.
    """

    def __init__(self, folder: Path):
        self.folder, self._open = folder, ("", None)
        self.stored: dict[str, Stored] = {}
        for file in self._files():
            with safe_open(folder / file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    of = opened.get_slice(name)
                    self.stored[name] = Stored(file, of.get_dtype(), tuple(of.get_shape()))
        other = next((one.dtype for one in self.stored.values() if one.dtype not in ITEM_BYTES), None)
        if other is not None:
            raise InputError(f"{folder} has tensors of the type {other}, which is not merged here; take a 16-bit form")

    def _files(self) -> list[str]:
        if (self.folder / ONE_FILE).is_file():  # which is loaded where there is an index too
            return [ONE_FILE]
        if (self.folder / INDEX).is_file():
            return sorted(set(json.loads((self.folder / INDEX).read_bytes())["weight_map"].values()))
        raise InputError(
            f"{self.folder} has no safetensors, which a merge reads one tensor at a time; write them with "
            "AutoModelForCausalLM.from_pretrained(NAME).save_pretrained(FOLDER), and set base_model_name_or_path in "
            "the adapter's adapter_config.json to that folder"
        )

    def read(self, name: str) -> Tensor:
        """A tensor, on the CPU."""
        file = self.stored[name].file
        if self._open[0] != file:
            self._open = file, safe_open(self.folder / file, "pt")
        opened: Any = self._open[1]
        return opened.get_tensor(name)

    def metadata(self) -> dict[str, Any]:
        """Entries of the index that are about all tensors."""
        if (self.folder / ONE_FILE).is_file():
            return {}
        return json.loads((self.folder / INDEX).read_bytes()).get("metadata") or {}


def write_tensors(
    folder: Path, layout: Mapping[str, Stored], tensor_of: Callable[[str], Tensor], metadata: Any
) -> None:
    """Write tensors into the files that a layout says, one after another, with an index where there are several.

    The format is https://huggingface.co/docs/safetensors: the length of a header, the header, the numbers.

    Raises:
        OSError: the disk refused.
    """
    files: dict[str, list[str]] = {}
    # The largest numbers first, so that each tensor begins at a multiple of its numbers' size.
    for name, of in sorted(layout.items(), key=lambda item: (-ITEM_BYTES[item[1].dtype], item[0])):
        files.setdefault(of.file, []).append(name)
    for file in sorted(files):
        with (folder / file).open("wb") as out:
            out.write(_header({name: layout[name] for name in files[file]}))
            for name in files[file]:
                values, of = tensor_of(name), layout[name]
                assert tuple(values.shape) == of.shape, name
                data = values.contiguous().flatten().view(torch.uint8).numpy()
                assert data.nbytes == of.num_bytes, name
                out.write(data.data)
                del values, data
    if [*files] != [ONE_FILE]:
        total = sum(of.num_bytes for of in layout.values())
        index = {
            "metadata": {**metadata, "total_size": total},
            "weight_map": {name: of.file for name, of in sorted(layout.items())},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _header(layout: Mapping[str, Stored]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, of in layout.items():
        entries[name] = {"dtype": of.dtype, "shape": of.shape, "data_offsets": [begin, begin + of.num_bytes]}
        begin += of.num_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def other_files(folder: Path) -> list[Path]:
    """The files of a model's folder that are read beside its weights; a card, logs and notes are left out."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.endswith(OF_WEIGHTS))
    found = set(filter_repo_objects([path.name for path in files], allow_patterns=NEEDED, ignore_patterns=OF_TRAININGS))
    return [path for path in files if path.name in found]
