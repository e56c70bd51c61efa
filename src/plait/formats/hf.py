"""Hugging Face folders: config.json, safetensors, and the names of the families in `families/`.

What we write is the spelling that every reader takes, old and new.
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from plait.formats.error import CheckpointError
from plait.formats.families import FAMILIES
from plait.formats.families.family import Family
from plait.formats.families.fields import Fields
from plait.formats.folder import carried, copy_file
from plait.formats.format import Contents, Format
from plait.formats.packed import from_packed, to_packed
from plait.formats.rules import to_ours, to_theirs
from plait.formats.safetensors import files_of, open_folder
from plait.formats.shards import Progress, write_tensors, write_text
from plait.formats.tensors import LazyTensor
from plait.model.config import ModelConfig
from plait.precision import RECIPES

log = logging.getLogger("plait.formats")

CONFIG = "config.json"
GENERATION = "generation_config.json"
# the recipe of packed BitNet folders
PACKED = "ternary-packed"
_WORDS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "float64"}


def _detect(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def _json(path: Path) -> dict[str, object]:
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}); fetch it again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, expected a table of settings")
    return data


def read_config(folder: Path) -> ModelConfig:
    """The config of a Hugging Face folder, without a look at its tensors.

    Raises: CheckpointError for an unknown model type, a missing, wrong or misspelled field, or a setting that would
    change the result and is not supported.
    """
    fields = Fields(_json(folder / CONFIG), folder / CONFIG)
    family = _family(fields)
    _check_quantisation(fields)
    try:
        config = family.read(fields)
    except CheckpointError:
        raise
    except (ValueError, ArithmeticError, MemoryError) as error:
        # a field under another name may be why the default does not fit
        fields.check_spelling()
        raise CheckpointError(f"{fields.path}: {error}") from error
    fields.check_spelling()
    name = fields.value("_name_or_path")
    config = replace(config, name=name if isinstance(name, str) and "/" not in name else folder.resolve().name)
    if (folder / GENERATION).is_file():
        # chat models stop at more tokens than their config says
        more = Fields(_json(folder / GENERATION), folder / GENERATION).tokens("eos_token_id")
        config = replace(config, eos_ids=tuple(dict.fromkeys(config.eos_ids + more)))
    return config


def _family(fields: Fields) -> Family:
    kind = fields.value("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise CheckpointError(f"{fields.path}: model_type = {kind!r} is not read; known: {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def _check_quantisation(fields: Fields) -> None:
    table = fields.table("quantization_config")
    if table is None:
        if fields.value("model_type") == "bitnet":
            log.info("%s: no quantization_config; weights are taken as masters of a ternary model", fields.path)
        return
    method = table.value("quant_method")
    if method != "bitnet" or fields.value("model_type") != "bitnet":
        raise CheckpointError(
            f"{fields.path}: weights are quantised by {method!r}, which is not read yet; "
            "take the checkpoint in bfloat16"
        )
    table.only("quantization_mode", "online", "offline", why="masters are online, packed weights offline")
    kind = table.value("linear_class")
    if table.value("quantization_mode") == "online" and kind != "autobitlinear":
        raise CheckpointError(
            f"{fields.path}: linear_class = {kind!r} with quantization_mode = 'online' is not supported; only "
            "'autobitlinear' rounds masters as the model runs"
        )
    table.only("linear_class", "autobitlinear", "bitlinear", why="they differ in what a scale means")
    table.only("use_rms_norm", False, why="its linear layers have no norm of their own")
    table.only("modules_to_not_convert", ["lm_head"], [], why="all linear layers of the blocks are ternary")


def _divides(folder: Path) -> bool:
    """Whether a packed model's scales are the reciprocals of ours."""
    table = Fields(_json(folder / CONFIG), folder / CONFIG).table("quantization_config")
    return table is not None and table.value("linear_class") != "autobitlinear"


def _read(folder: Path) -> Contents:
    config = read_config(folder)
    stored = open_folder(folder)
    names = FAMILIES[config.family].names
    if config.ties_embeddings:
        stored = _without_copy(stored, names.rules[""][0].theirs, folder)
    if config.recipe == PACKED:
        tensors = from_packed(names, config, stored, str(folder), divides=_divides(folder))
    else:
        tensors = to_ours(names, config, stored, str(folder))
    return Contents(
        config=config,
        tensors=tensors,
        files=carried(folder),
        provenance={
            "format": "hf",
            "files": {name: {"bytes": (folder / name).stat().st_size} for name in (CONFIG, *files_of(folder))},
            "licence": _licence(folder),
        },
    )


def _without_copy(stored: Mapping[str, LazyTensor], embedding: str, folder: Path) -> dict[str, LazyTensor]:
    """Drop a head that repeats the tied embedding; a head that differs is a contradiction."""
    rest = dict(stored)
    head = rest.pop("lm_head.weight", None)
    if head is None:
        return rest
    table = next((t for name, t in rest.items() if name.endswith(embedding.split(".", 1)[1])), None)
    if table is None or table.shape != head.shape:
        return dict(stored)
    if not all(torch.equal(a, b) for a, b in zip(table.blocks(), head.blocks(), strict=True)):
        raise CheckpointError(
            f"{folder}: tie_word_embeddings is true, but lm_head.weight is not the embedding; set it to false"
        )
    return rest


def _licence(folder: Path) -> str | None:
    """The licence that the model card's front matter names."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    with card.open(encoding="utf-8", errors="replace") as file:
        found = re.match(r"---\n.*?^license(?:_name)?:[ \t]*(\S+)", file.read(1 << 16), re.DOTALL | re.MULTILINE)
    return found[1].strip("'\"") if found else None


def family_for(config: ModelConfig) -> tuple[Family, dict[str, object]]:
    """The family that a model is written as, and its fields of config.json.

    It is the config's own family where that can express the model, else the first that can.

    Raises: CheckpointError with the reason of the config's own family, if none can.
    """
    own = FAMILIES.get(config.family)
    is_packed = config.recipe == PACKED and config.family == "bitnet"
    if config.recipe not in RECIPES:
        raise CheckpointError(
            "Hugging Face folders cannot say that some of a model's layers are ternary or held as codes and others are "
            "not; save as native"
        )
    if RECIPES[config.recipe].weight_only and not is_packed:
        raise CheckpointError(
            f"recipe {config.recipe!r}: no reader of Hugging Face folders knows these codes; save as native"
        )
    if config.recipe == "ternary" and config.family != "bitnet":
        raise CheckpointError(
            f"a {config.family or 'nameless'} model of ternary weights is not read by others; save as native"
        )
    reasons: list[CheckpointError] = []
    for family in ([own] if own else []) + [
        row for row in FAMILIES.values() if row is not own and row.name != "bitnet"
    ]:
        try:
            written = family.write(config)
        except CheckpointError as error:
            reasons.append(error)
            continue
        if own and family is not own:
            log.info("written as %s: %s", family.name, reasons[0])
        return family, written
    raise reasons[0] if own else CheckpointError("no Hugging Face family can express this model; save as native")


def write_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, object]:
    """The fields of config.json for a model stored in a dtype; errors are those of `family_for`."""
    family, fields = family_for(config)
    return {"architectures": [family.architecture], "model_type": family.name, **fields, "torch_dtype": _WORDS[dtype]}


def _plan(contents: Contents) -> dict[str, LazyTensor]:
    family, _ = family_for(contents.config)
    config = replace(contents.config, family=family.name)
    tensors = (to_packed if config.recipe == PACKED else to_theirs)(family.names, config, contents.tensors)
    if config.ties_embeddings and family.copies_tied_head:
        tensors["lm_head.weight"] = contents.tensors["embed.weight"]
    return tensors


def _write(
    contents: Contents, tensors: Mapping[str, LazyTensor], folder: Path, max_shard: int, progress: Progress | None
) -> None:
    sizes: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        # of packed weights, the dtype of what is not
        sizes[tensor.dtype] += tensor.n_bytes if tensor.dtype.is_floating_point else 0
    config = write_config(contents.config, sizes.most_common(1)[0][0])
    write_text(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_tensors(folder, tensors, max_shard_bytes=max_shard, progress=progress)
    for file in contents.files:
        copy_file(file, folder)
    if not (folder / GENERATION).exists():
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        written = {key: value for key, value in ids.items() if value is not None}
        write_text(folder / GENERATION, json.dumps({"_from_model_config": True} | written, indent=2) + "\n")


FORMAT = Format(name="hf", detect=_detect, read=_read, plan=_plan, write=_write, verify=None)
