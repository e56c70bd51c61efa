"""Fifth chapter: the hybrid as a Hugging Face folder, read back bit for bit, and its memory of a text as one file."""

import importlib.util
import math
from pathlib import Path

import torch

from plait.cli.chapters.story import HYBRID, TWIN, Story
from plait.cli.drawing import size
from plait.cli.page.blocks import Prose, Section, Table
from plait.data.shards import Dataset
from plait.engine.engine import Engine
from plait.engine.request import Sampling
from plait.engine.session import Session
from plait.formats.checkpoint import load, save
from plait.model.hybrid import Hybrid

SESSION_TOKENS = 1000


def tell(story: Story) -> Section:
    """Export, read back, compare with transformers where it is installed, and save a session."""
    folder = story.out / "hybrid-hf"
    story.say(f"exporting the hybrid to {folder}")
    model = story.models[HYBRID]
    save(model, folder, format="hf", tokenizer=story.tokenizer)
    n_bytes = sum(file.stat().st_size for file in folder.iterdir())
    back = load(folder, device="cpu", dtype="float32", recipe="fp32")
    differing = differences(model, back)
    report = story.report
    report.add("exported folder", n_bytes, "bytes")
    report.add("tensors that differ after reading back", len(differing))
    if differing:
        raise RuntimeError(f"{folder}: read back, {', '.join(differing[:3])} differ from what was written")
    ids = _held_out(story)
    theirs = difference_to_transformers(folder, back, ids)
    rows = [("folder", size(n_bytes)), ("read back by Plait", "bitwise equal")]
    if theirs is None:
        rows.append(("read by transformers", "not installed here"))
    else:
        report.add("largest logit difference to transformers", theirs)
        rows.append(("read by transformers", f"logits within {theirs:.1e}"))
    file = story.out / "hybrid-session.safetensors"
    sizes = session_bytes(story, ids, file)
    for name, found in sizes.items():
        report.add(f"{name} session after {len(ids)} tokens", found, "bytes")
    rows.append((f"session after {len(ids):,} tokens", size(sizes[HYBRID])))
    rows.append((f"the {TWIN}'s, for comparison", size(sizes[TWIN])))
    words = (
        f"The hybrid now lies in {folder} as a Nemotron-H checkpoint: safetensors, config and tokenizer in the "
        "spelling of Hugging Face. A session is what the model remembers of a text; saved to a file, it goes on where "
        "it was without reading the text again."
    )
    table = Table(
        caption="What leaves the demo.",
        head=("", ""),
        rows=tuple(rows),
        note="logits compared in float32, without transformers' lower clamp of the time step"
        if theirs is not None
        else "",
    )
    return Section(name="export", title="Out into the world", blocks=(Prose(text=words), table))


def differences(a: Hybrid, b: Hybrid) -> list[str]:
    """Names of tensors that are not bitwise equal."""
    theirs = b.state_dict()
    return [
        name
        for name, tensor in a.state_dict().items()
        if name not in theirs or not torch.equal(tensor.cpu().view(torch.uint8), theirs[name].cpu().view(torch.uint8))
    ]


@torch.inference_mode()
def difference_to_transformers(folder: Path, model: Hybrid, ids: list[int]) -> float | None:
    """Largest difference of logits between an exported folder in transformers and our model; None if not installed.

    transformers bounds the time step from below by a setting that only shapes fresh weights everywhere else; the bound
    is taken out, as Megatron-LM trains without it.
    """
    if importlib.util.find_spec("transformers") is None:
        return None
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for module in theirs.modules():
        if hasattr(module, "time_step_limit"):
            object.__setattr__(module, "time_step_limit", (0.0, math.inf))
    tokens = torch.tensor([ids[:256]])
    return float((theirs(tokens).logits - model(tokens).logits).abs().max())


def session_bytes(story: Story, ids: list[int], file: Path) -> dict[str, int]:
    """Bytes of both models' sessions after reading these ids; the hybrid's stays in `file`."""
    sizes = {}
    for name in (TWIN, HYBRID):
        model, session = story.models[name], Session()
        stream = Engine(model).stream(ids, Sampling(max_tokens=1, temperature=0.0, ignore_eos=True), session)
        for _ in stream:
            pass
        sizes[name] = session.save(file, model)
    return sizes


def _held_out(story: Story) -> list[int]:
    """The first tokens of held-out text, at most SESSION_TOKENS of them."""
    data = Dataset.open(story.valid_data)
    ids: list[int] = []
    for index in range(data.n_documents):
        ids += [int(token) for token in data.document(index)[: SESSION_TOKENS - len(ids)]]
    return ids[:SESSION_TOKENS]
