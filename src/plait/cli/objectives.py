"""What `plait train` minimises, opened from a recipe: next tokens, answers of conversations, a teacher's distributions.

`tokens` and `conversations` read the data and say how large a vocabulary it needs; what they return first gives the
objective once the model's sizes are known, after seeing that both fit.
"""

import logging
from collections.abc import Callable

import torch

from plait.cli.recipe import DistillTable, SFTTable, TrainRecipe, vocab_size
from plait.config import ConfigError, to_dict
from plait.data.conversations import Conversations, read_conversations
from plait.data.loader import Batch, Loader
from plait.data.shards import Dataset
from plait.formats.checkpoint import Checkpoint
from plait.model.config import ModelConfig
from plait.text.tokenizer import Tokenizer
from plait.train.distill import Distill
from plait.train.objective import Objective
from plait.train.pretrain import NextToken
from plait.tune.sft import SFT

log = logging.getLogger(__name__)

# given the model's sizes, the objective
Make = Callable[[ModelConfig], Objective[Batch]]


def tokens(recipe: TrainRecipe) -> tuple[Make, int]:
    """Next-token prediction over token shards.

    Returns: what makes the objective, and the ids of the vocabulary.
    """
    datasets = {name: source.open() for name, source in recipe.data.sources.items()}

    def make(config: ModelConfig) -> Objective[Batch]:
        recipe.check_tokens(config, datasets)
        return _next_token(recipe, datasets)

    return make, max(map(vocab_size, datasets.values()))


def conversations(recipe: TrainRecipe) -> tuple[Make, int]:
    """Supervised fine-tuning on files of conversations; see `tokens`.

    Raises: ConfigError for a missing file or tokenizer; SourceError for a line that is no conversation.
    """
    settings, data = recipe.sft or SFTTable(), recipe.data
    for name, source in data.sources.items():
        if not source.path.is_file():
            raise ConfigError(
                f'data.sources.{name}.path={source.path}: there is no such file; objective="sft" reads JSON lines with '
                '"messages"'
            )
    folder = recipe.tokenizer()
    if folder is None:
        raise ConfigError("sft.tokenizer is missing and the model brings none; set it to a folder with tokenizer.json")
    tokenizer = Tokenizer.open(folder)
    start = recipe.model.checkpoint
    if start is not None and folder != start and (start / "tokenizer.json").is_file():
        if Tokenizer.open(start).vocabulary_hash != tokenizer.vocabulary_hash:
            raise ConfigError(f"sft.tokenizer={folder} and model.checkpoint={start} have different vocabularies")

    def make(config: ModelConfig) -> Objective[Batch]:
        if tokenizer.vocab_size > config.vocab_size:
            raise ConfigError(
                f"the tokenizer in {folder} has {tokenizer.vocab_size} tokens, the model's embedding "
                f"{config.vocab_size} rows; take the model's own"
            )
        return _sft(recipe, settings, tokenizer)

    return make, tokenizer.vocab_size


def taught(
    recipe: TrainRecipe, table: DistillTable, objective: Objective[Batch], config: ModelConfig, device: torch.device
) -> Distill:
    """An objective with a teacher in it.

    Raises: ConfigError or CheckpointError for a teacher that cannot be read or speaks another vocabulary.
    """
    source = Checkpoint.open(table.teacher)
    if source.config.vocab_size != config.vocab_size:
        raise ConfigError(
            f"distill.teacher={table.teacher} has a vocabulary of {source.config.vocab_size}, the model one of "
            f"{config.vocab_size}; a teacher must know the same tokens"
        )
    ours = recipe.tokenizer()
    if ours is not None and (table.teacher / "tokenizer.json").is_file():
        if Tokenizer.open(ours).vocabulary_hash != Tokenizer.open(table.teacher).vocabulary_hash:
            raise ConfigError(
                f"distill.teacher={table.teacher} has other tokens than {ours}; take one that was trained on them"
            )
    # the teacher computes as the student does, in half of float32's memory where that is bfloat16
    teacher = source.model(table.recipe, device=device, dtype=recipe.precision.compute)
    return Distill(objective, teacher, share=table.share, temperature=table.temperature, name=str(table.teacher))


def _sft(recipe: TrainRecipe, settings: SFTTable, tokenizer: Tokenizer) -> SFT:
    data = recipe.data
    paths = [source.path for source in data.sources.values()]
    read = read_conversations(paths, tokenizer, seq_len=data.seq_len, held_out=settings.held_out)
    left = ", ".join(f"{n:,} left out, {reason}" for reason, n in read.skipped.items())
    log.info("%s conversations, %s to validate on%s", f"{len(read.train):,}", len(read.held_out), left and f"; {left}")
    if settings.reduction != "mean" and recipe.run.optim.clip:
        log.warning(
            "sft.reduction=%r makes gradients as large as there are tokens, and run.optim.clip=%g cuts them all; "
            "set run.optim.clip=0, or to a norm of that size",
            *(settings.reduction, recipe.run.optim.clip),
        )
    pad = tokenizer.pad_id if tokenizer.pad_id is not None else (tokenizer.eos_ids or (0,))[0]
    train = Conversations(read.train, batch_size=data.batch_size, seq_len=data.seq_len, seed=recipe.seed, pad_id=pad)
    valid = None
    if read.held_out:
        rows = data.batch_size // data.accumulate
        valid = Conversations(
            read.held_out, batch_size=rows, seq_len=data.seq_len, seed=recipe.seed, pad_id=pad, repeat=False
        )
    return SFT(
        train,
        reduction=settings.reduction,
        accumulate=data.accumulate,
        validation=valid,
        validation_batches=data.validation_batches,
        identity={"seq_len": data.seq_len, "batch_size": data.batch_size, "seed": recipe.seed},
    )


def _next_token(recipe: TrainRecipe, datasets: dict[str, Dataset]) -> NextToken:
    data = recipe.data
    loader = Loader(
        datasets,
        data.blend(datasets),
        batch_size=data.batch_size,
        seq_len=data.seq_len,
        seed=recipe.seed,
        steps=recipe.run.steps,
    )
    held_out = {name: found for name, source in data.sources.items() if (found := source.held_out()) is not None}
    held_out = {name: found for name, found in held_out.items() if found.n_tokens}
    valid = None
    if held_out:
        rows = data.batch_size // data.accumulate
        valid = Loader(held_out, batch_size=rows, seq_len=data.seq_len, seed=recipe.seed, repeat=False)
    identity: dict[str, object] = {
        "sources": {name: [shard["tokens_sha256"] for shard in _shards(found)] for name, found in datasets.items()},
        "blend": to_dict(data.blend(datasets)),
        "seq_len": data.seq_len,
        "batch_size": data.batch_size,
        "seed": recipe.seed,
    }
    if any(phase.until <= 1 for phase in data.phases[:-1]):
        # phases that end at a share of the run move when its length does
        identity["steps"] = recipe.run.steps
    return NextToken(
        loader,
        accumulate=data.accumulate,
        validation=valid,
        validation_batches=data.validation_batches,
        identity=identity,
        bad_batches=data.bad_batches,
    )


def _shards(data: Dataset) -> list[dict[str, object]]:
    shards = data.record["shards"]
    assert isinstance(shards, list)
    return shards
