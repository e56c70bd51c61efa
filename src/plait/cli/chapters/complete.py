"""Fourth chapter: both models continue held-out text, beside how it really goes on."""

import re

from plait.cli.chapters.story import HYBRID, TWIN, Story
from plait.cli.page.blocks import Block, Passage, Prose, Section
from plait.data.shards import Dataset
from plait.engine.engine import Engine
from plait.engine.request import Sampling
from plait.text.tokenizer import Tokenizer

PROMPT_TOKENS = 256
TEMPERATURE, TOP_P = 0.6, 0.95
# where a continuation is interesting: after a line that opens a block of code
_OPENING = re.compile(r"\n[ \t]*(?:def|class|for|while|if|with|try)\b[^\n]*:[ \t]*\n")


def tell(story: Story) -> Section:
    """Choose prompts from held-out documents and complete them."""
    tokenizer = Tokenizer.open(story.tokenizer)
    found = passages(Dataset.open(story.valid_data), tokenizer, story)
    if not found:
        words = "There is too little held-out text to take a prompt from."
        return Section(name="complete", title="Completions", blocks=(Prose(text=words),))
    story.say(f"completing {len(found)} held-out passages")
    sampling = Sampling(
        max_tokens=story.scale.completion_tokens,
        temperature=TEMPERATURE,
        top_p=TOP_P,
        seed=story.seed,
        ignore_eos=True,
    )
    prompts = [ids for ids, _ in found]
    answers = {
        name: [c.text for c in Engine(story.models[name], tokenizer).generate(prompts, sampling)]
        for name in (HYBRID, TWIN)
    }
    intro = Prose(
        text="Both were given the same beginnings from documents that they have not seen. Models this small, trained "
        "for minutes, learn the shape of the text long before its sense."
    )
    note = f"temperature {TEMPERATURE}, top-p {TOP_P}, {story.scale.completion_tokens} tokens"
    blocks: list[Block] = [intro]
    for i, (ids, truth) in enumerate(found):
        continued = (("as written", truth), *((name, answers[name][i]) for name in (HYBRID, TWIN)))
        prompt = tokenizer.decode(ids)
        blocks.append(Passage(where=f"Passage {i + 1}", prompt=_last_lines(prompt), answers=continued, note=note))
        story.report.add(f"completion {i + 1}: {HYBRID}", answers[HYBRID][i])
        story.report.add(f"completion {i + 1}: {TWIN}", answers[TWIN][i])
    return Section(name="complete", title="Completions", blocks=tuple(blocks))


def passages(data: Dataset, tokenizer: Tokenizer, story: Story) -> list[tuple[list[int], str]]:
    """Prompts as ids and their true continuations, from the longest held-out documents."""
    n_new = story.scale.completion_tokens
    found = []
    for index in sorted(range(data.n_documents), key=lambda i: -int(data.lengths[i]))[: story.scale.passages]:
        ids = [int(token) for token in data.document(index)[:-1]]
        if len(ids) < 16:
            continue
        at = _cut(ids, tokenizer, n_new)
        found.append((ids[max(0, at - PROMPT_TOKENS) : at], tokenizer.decode(ids[at : at + n_new])))
    return found


def _cut(ids: list[int], tokenizer: Tokenizer, n_new: int) -> int:
    """Where to cut: after a line that opens a block, a third into the document; else there, wherever it is."""
    begin = len(ids) // 3
    # the tokenizer keeps a line's indentation in tokens of their own, so a cut at a line's end is one between tokens
    window = ids[begin : max(begin + 1, min(begin + 512, len(ids) - n_new))]
    opening = _OPENING.search(tokenizer.decode(window))
    if opening is None:
        return begin + 1
    wanted, seen = len(opening.string[: opening.end()].encode()), 0
    for i, token in enumerate(window):
        seen += len(tokenizer.decode([token]).encode())
        if seen >= wanted:
            return begin + i + 1
    return begin + 1


def _last_lines(text: str, n: int = 12) -> str:
    lines = text.split("\n")
    return "\n".join(lines[-n:]) if len(lines) > n else text
