"""Last chapter: what to paste next."""

import shlex

from plait.cli.chapters.story import Story
from plait.cli.page.blocks import Commands, Prose, Section


def tell(story: Story) -> Section:
    """Commands that go on from what the demo made."""
    model, ternary, data = (shlex.quote(str(story.out / name)) for name in ("hybrid-hf", "hybrid-ternary", "data"))
    lines = (
        (f"plait generate {model} 'def main():'", "let the hybrid write"),
        (f"plait generate {ternary} 'def main():'", "let its ternary form write"),
        (f"plait info {model} --context 128k", "its layers, bytes and cost"),
        ("plait info nemotron-h-8b --context 128k", "the same for a published model"),
        (f"plait convert {model} my-model --to native", "another format"),
        ("plait demo --text path/to/my/folder", "this story on your own text"),
        (f"plait demo --minutes 30 --out {shlex.quote(str(story.out) + '-longer')}", "train longer"),
        ("plait doctor", "what would make this machine faster"),
    )
    words = f"Everything the demo made lies in {story.out}; the token shards are in {data}."
    return Section(name="onward", title="What next", blocks=(Prose(text=words), Commands(lines=lines)))
