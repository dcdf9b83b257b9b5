"""export(): a trained adapter as a model that others load: merged, checked, in GGUF, on the hub."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.errors import InputError, NotSavedError, counted, in_a_line
from lowmem_grpo.exporting.asked import new_path, outputs_of
from lowmem_grpo.exporting.check import Difference, Share, Text, by_model, by_policy, texts_of
from lowmem_grpo.exporting.files import model_folder
from lowmem_grpo.exporting.gguf import convert
from lowmem_grpo.exporting.merge import MergePlan, MergeSettings, merge
from lowmem_grpo.lookup import has_score_head, is_adapter
from lowmem_grpo.model.adapter_folder import read_adapter_config
from lowmem_grpo.model.find import OTHER_FILES, find_model, read_config
from lowmem_grpo.model.load import load_policy, load_tokenizer, run_device
from lowmem_grpo.model.quantizer import BITSANDBYTES, quantized_by
from lowmem_grpo.out_of_memory import let_go
from lowmem_grpo.output.folder import write_file, write_folder
from lowmem_grpo.output.hub import upload
from lowmem_grpo.output.lock import lock_file, releasing_locks
from lowmem_grpo.output.places import public_name
from lowmem_grpo.output.saved import read_object
from lowmem_grpo.paths import expanded
from lowmem_grpo.progress_bars import without_progress_bars
from lowmem_grpo.run.card import card_of
from lowmem_grpo.run.interruption import Interruption
from lowmem_grpo.run.room import free_bytes, in_mib, refusal
from lowmem_grpo.warn import warn

OF_RUNS = ("grpo_config.json", "sft_config.json")  # where a run's folder has its settings
# A merged model is refused where its log-probabilities differ by more than this share of what training changed, and by
# more than two computations of one model in 16 bits do; so is one that is nearer to the base, by two standard errors.
SHARE, NOISE = 0.25, 0.05
# Of those settings: what says which numbers the base had.
AS_TRAINED = ("load_in_4bit", "load_head_in_8bit", "bf16", "fp16", "model_init_kwargs")


@dataclass(frozen=True)
class Checked:
    """The differences of a merged model, and for scale of the base alone, from the trained policy."""

    num_texts: int
    num_tokens: int
    merged: Difference
    base: Difference
    share: Share


@dataclass(frozen=True)
class ExportResult:
    """The result of export()."""

    merged: Path | None
    onto: str | None  # "original" or "nf4"
    num_bytes: int  # of the merged weights
    checked: Checked | None
    gguf: Path | None
    url: str | None  # of the hub's repository


NOTHING = ExportResult(None, None, 0, None, None, None)


@without_progress_bars
def export(
    model: str,
    merge_to: str | None = None,
    *,
    onto: str | None = None,
    dtype: str | None = None,
    num_texts: int = 8,
    gguf: str | None = None,
    llama_cpp: str | None = None,
    push: str | None = None,
    private: bool | None = None,
    use_cpu: bool = False,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> ExportResult:
    """Write the model of a trained adapter and its base, and test that both say the same.

    Args:
        model: folder of an adapter, such as run/adapter or run/best.
        merge_to: folder to write, which must not be there yet.
        onto: "nf4", the weights that training saw, or "original", the base's own; by default as the run trained.
        dtype: float32, bfloat16 or float16; by default that of the base's files.
        num_texts: how many completions are compared; 0 for no comparison.
        gguf: file to write by llama.cpp's converters; without merge_to, of the adapter alone.
        llama_cpp: folder of a checkout of llama.cpp.
        push: repository of the hub, user/name, to upload the merged model to; private, if it is made for it.
        use_cpu: compute on the CPU, with a GPU at hand too.
        trust_remote_code: run modelling code that comes with the base.
        say: called with each line of as_text() as soon as that is done, also where what follows is refused.

    Raises:
        InputError: bad input, or what was written says something else than what was trained; nothing is left of it.
        NotSavedError: the disk refused.
        NotUploadedError: the hub did not take the merged model, which is there.
    """
    out, file, converter = outputs_of(
        model, merge_to, onto=onto, dtype=dtype, num_texts=num_texts, gguf=gguf, llama_cpp=llama_cpp, push=push,
        private=private,
    )  # fmt: skip
    model = expanded(model)
    saved = _settings_of(_run_of(model))
    config = _as_trained(saved, use_cpu, trust_remote_code)
    _refuse_model(model, config)
    if out is not None and not saved:
        warn(
            f"{model} is taken to be trained on a base in 4 bits, since there is no {OF_RUNS[0]} beside that folder; "
            'if it was not, write {"load_in_4bit": false} into such a file'
        )
    given = read_adapter_config(model)
    revision = (config.model_init_kwargs or {}).get("revision") or given.revision
    base = model_folder(str(given.base_model_name_or_path), revision)
    result = NOTHING
    with Interruption(), releasing_locks():  # SIGTERM leaves no half a model either
        _keep(out, file)
        if out is not None:
            result = _merged(model, base, out, config, onto, dtype, num_texts, push)
            _tell(result, say)
        if converter is not None and file is not None:
            if out is None:
                convert(converter, Path(model), file, "--base", str(base))
            else:
                convert(converter, out, file)
            result = replace(result, gguf=file)
            _tell(replace(NOTHING, gguf=file), say)
        if push is not None and out is not None:
            result = replace(result, url=upload(out, push, private=private))
            _tell(replace(NOTHING, url=result.url), say)
    return result


def _keep(out: Path | None, file: Path | None) -> None:
    """Keep what an export writes from others, to the end of the releasing_locks() around it.

    Raises:
        InputError: another export is writing there, or has meanwhile.
    """
    for path in (out, file):
        if path is None or (out is not None and out.absolute() in path.absolute().parents):  # kept with that folder
            continue
        with contextlib.suppress(OSError):  # which is told where it is written
            path.parent.mkdir(parents=True, exist_ok=True)
        lock_file(path)
        new_path(str(path))


def _tell(done: ExportResult, say: Callable[[str], None]) -> None:
    for line in as_text(done):
        say(line)


def as_text(result: ExportResult) -> list[str]:
    """Lines that tell a person what export() has written."""
    lines = []
    if result.merged is not None:
        lines.append(f"merged onto {result.onto}: {result.merged} ({in_mib(result.num_bytes)})")
    if result.checked is not None:
        found = result.checked
        lines += [
            f"log-probabilities of {counted(found.num_tokens, 'token')} of {counted(found.num_texts, 'completion')}, "
            "against the trained policy's:",
            f"  {'':<28}{'mean |d|':>10}{'largest':>10}{'KL':>10}",
        ]
        for name, of in (("merged, by transformers", found.merged), ("base without the adapter", found.base)):
            lines.append(f"  {name:<28}{of.mean:>10.4f}{of.largest:>10.3f}{of.kl:>10.5f}")
        lines.append(_of_share(found.share))
    if result.gguf is not None:
        lines.append(f"GGUF: {result.gguf}")
    if result.url is not None:
        lines.append(f"uploaded: {result.url}")
    return lines


def _of_share(share: Share) -> str:
    """A sentence on whether a merged model is nearer to the trained policy or to its base."""
    if not abs(share.value - 0.5) > 2 * share.error:  # of no change at all it is NaN
        return "training has changed too little of these completions to tell the merged model from its base"
    of = "trained policy than to its base" if share.value > 0.5 else "base than to the trained policy"
    return f"the merged model is nearer to the {of}: {100 * share.value:.0f} % (+- {200 * share.error:.0f}) of the way"


def _run_of(adapter: str) -> Path:
    """The folder of the run that an adapter is of, where it is still in that."""
    return Path(adapter).absolute().parent


def _settings_of(run: Path) -> dict[str, Any]:
    """The settings that a training has left in its folder; none where there is no such file."""
    return next((found for name in OF_RUNS if (found := read_object(run / name))), {})


def _as_trained(saved: Mapping[str, Any], use_cpu: bool, trust_remote_code: bool) -> GRPOConfig:
    """The settings that load an adapter's base as in its run, which has saved its own."""
    fields = {name: saved[name] for name in AS_TRAINED if name in saved}
    return GRPOConfig(use_cpu=use_cpu, trust_remote_code=trust_remote_code, gradient_checkpointing=False, **fields)


def _refuse_model(model: str, config: GRPOConfig) -> None:
    """Raise InputError for a model that is no adapter which writes texts, or whose base cannot be merged into."""
    if has_score_head(model):
        raise InputError(
            f"adapter {model!r} scores texts and writes none, so that it is not merged; give it as one of the "
            "reward_funcs, or load it with PEFT's AutoPeftModelForSequenceClassification"
        )
    find_model(model, config)
    if not is_adapter(model):
        raise InputError(f"model {model!r} is no adapter's folder, and is whole already; name a run's adapter")
    others = set(OTHER_FILES) & set(config.model_init_kwargs or {})
    if others:
        raise InputError(f"the run's model_init_kwargs has {min(others)}, and only a base's own safetensors are merged")


def _merged(
    model: str, base: Path, out: Path, config: GRPOConfig, onto: str | None, dtype: str | None, num_texts: int,
    push: str | None,
) -> ExportResult:  # fmt: skip
    """Merge an adapter into a folder, and compare. Its card calls it as it is uploaded, or by the folder.

    Raises:
        InputError: it cannot be merged so, or the result says something else than the policy.
        NotSavedError: the disk refused.
    """
    onto, device = _onto(model, config, onto), run_device(config)
    settings = MergeSettings(
        onto, None if dtype is None else getattr(torch, dtype), getattr(torch, config.compute_dtype), device,
        config.trust_remote_code,
    )  # fmt: skip
    plan = MergePlan(model, base, settings)
    num_bytes = sum(of.num_bytes for of in plan.layout.values())
    free = free_bytes(out.parent)
    if free is not None and free < num_bytes:
        raise InputError(
            f"the disk of {out} has {in_mib(free)} free, and the merged model takes {in_mib(num_bytes)}; make room, or "
            "choose another folder"
        )
    texts, policy, without = _by_policy(model, config, out, num_texts)
    checked: list[Checked] = []

    def write(folder: Path) -> None:
        merge(plan, folder)
        if texts:
            by_merged = by_model(folder, texts, device, config.trust_remote_code)
            found = Checked(
                len(texts), len(policy), Difference.between(policy, by_merged), Difference.between(policy, without),
                Share.of(policy, by_merged, without),
            )  # fmt: skip
            _refuse_difference(found, plan, in_4bit=config.load_in_4bit)
            checked.append(found)
        _write_card(folder, model, push or public_name(str(out.absolute())), onto, checked)

    try:
        write_folder(out, write)
    except OSError as error:
        raise NotSavedError(f"the merged model cannot be written to {out} ({refusal(error)})") from error
    return ExportResult(out, onto, num_bytes, checked[0] if checked else None, None, None)


def _write_card(folder: Path, model: str, name: str, onto: str, checked: Sequence[Checked]) -> None:
    """Write the merged model's card. What keeps it from being written is a warning."""
    notes = [
        f"of {one.num_tokens} tokens, its log-probabilities differ from the trained policy's by {one.merged.mean:.4f} "
        f"in the mean, and those of the base without the adapter by {one.base.mean:.4f}; {_of_share(one.share)}"
        for one in checked
    ]
    try:
        write_file(folder / "README.md", str(card_of(Path(model), name=name, onto=onto, notes=notes)))
    except Exception as error:  # no card is worth a merge
        warn(f"the merged model has no card, which cannot be written ({in_a_line(error)})")


def _onto(model: str, config: GRPOConfig, onto: str | None) -> str:
    """Return what an adapter is merged onto: as asked, or by default the weights that it was trained on."""
    method = quantized_by(read_config(model, config)).get("quant_method")
    if onto is None:
        return "nf4" if config.load_in_4bit else "original"
    if onto == "nf4" and not config.load_in_4bit:
        raise InputError("the run had load_in_4bit=False, and its base was never in NF4; merge onto original")
    if onto == "original" and method == BITSANDBYTES:
        raise InputError(
            "the base is a checkpoint in 4 bits, which has no others to merge onto; merge onto nf4, or set "
            "base_model_name_or_path in adapter_config.json to the model that it was made from"
        )
    return onto


def _by_policy(
    model: str, config: GRPOConfig, out: Path, num_texts: int
) -> tuple[Sequence[Text], torch.Tensor, torch.Tensor]:
    """Texts, and the log-probabilities of their completions by the trained policy and by its base."""
    if not num_texts:
        return [], torch.empty(0), torch.empty(0)
    policy = load_policy(model, load_tokenizer(model, config), config, is_found=True)
    texts = texts_of(policy, _run_of(model), config, num_texts)
    found = texts, by_policy(policy, texts), by_policy(policy, texts, as_base=True)
    del policy
    let_go()
    return found


def _refuse_difference(found: Checked, plan: MergePlan, *, in_4bit: bool) -> None:
    """Raise InputError where the merged model is too far from the policy for what training changed."""
    bound = max(NOISE, SHARE * found.base.mean)
    lacks = found.share.value + 2 * found.share.error < 0.5
    if found.merged.mean <= bound and math.isfinite(found.merged.mean) and not lacks:
        return
    remedy = "write it with dtype float32, " if plan.dtype != torch.float32 else ""
    remedy = "merge onto nf4, " if in_4bit and plan.settings.onto == "original" else remedy
    raise InputError(
        f"the merged model is not what was trained: of {found.num_tokens} tokens, log-probabilities differ by "
        f"{found.merged.mean:.3f} in the mean, where the base without the adapter differs by {found.base.mean:.3f}, "
        f"and {_of_share(found.share)}; "
        f"{remedy}serve the adapter beside its base, or take it unchecked with check 0"
    )
