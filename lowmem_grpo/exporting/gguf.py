"""GGUF files by the converters of a llama.cpp checkout, which know each family's layout, tokenizer and template."""

import contextlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

from lowmem_grpo.errors import InputError, NotSavedError, in_a_line, printable
from lowmem_grpo.output.folder import BEING_WRITTEN
from lowmem_grpo.paths import expanded

OF_MODEL, OF_ADAPTER = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"


def find_converter(llama_cpp: str | None, name: str, gguf: str, source: str) -> Path:
    """The converter of a llama.cpp checkout.

    Raises:
        InputError: none is named, or the folder has none; the sentence has the two commands that do it by hand.
    """
    by_hand = (
        f"`git clone https://github.com/ggml-org/llama.cpp`, and `python llama.cpp/{name} {shlex.quote(source)} "
        f"--outfile {shlex.quote(gguf)}`"
    )
    if llama_cpp is None:
        raise InputError(f"gguf needs llama_cpp, the folder of a llama.cpp checkout; or run the two commands {by_hand}")
    script = Path(expanded(llama_cpp)) / name
    if not script.is_file():
        raise InputError(f"llama_cpp is {llama_cpp!r}, which has no {name}; name a whole checkout, or run {by_hand}")
    return script


def convert(script: Path, source: Path, gguf: Path, *more: str) -> None:
    """Write a GGUF file of a model's or an adapter's folder, which is there whole or not at all.

    Raises:
        InputError: the converter failed; the sentence has the last that it said.
        NotSavedError: the disk refused.
    """
    temporary = gguf.with_name(f"{gguf.name}{BEING_WRITTEN}")
    command = [sys.executable, str(script), str(source), "--outfile", str(temporary), *more]
    try:
        gguf.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
        if done.returncode or not temporary.is_file():
            said = done.stderr.decode(errors="replace").strip().splitlines() or ["nothing"]
            by_hand = shlex.join(["python", str(script), str(source), "--outfile", str(gguf), *more])
            raise InputError(
                f"{script.name} of llama.cpp failed, and said last: {printable(said[-1])[:300]}; with its "
                f"requirements.txt installed, `{by_hand}` does it of {source}, which is there"
            )
        os.replace(temporary, gguf)
    except OSError as error:
        raise NotSavedError(f"{gguf} cannot be written ({in_a_line(error)}); {source} is there") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
