"""The page: text stays text, nothing is fetched, every figure says where it comes from."""

from html.parser import HTMLParser
from pathlib import Path

import pytest

from plait.cli.page.blocks import Block, Chart, Commands, Passage, Patterns, Pieces, Prose, Section, Table
from plait.cli.page.render import page, write_whole

WHERE = {"command": "plait demo --x", "seed": 3, "device": "an abacus", "commit": None}
EVIL = "<script>alert(1)</script>"
BLOCKS: list[Block] = [
    Prose(text=EVIL),
    Table(caption=EVIL, head=("a", EVIL), rows=((EVIL, "1"),)),
    Patterns(models=((EVIL, "M*-E", EVIL),), legend=(("M", EVIL),)),
    Pieces(caption=EVIL, pieces=(EVIL, "b")),
    Passage(where=EVIL, prompt=EVIL, answers=((EVIL, EVIL),)),
    Commands(lines=((EVIL, EVIL),)),
    Chart(title=EVIL, svg="<svg></svg>"),
]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.kind)
def test_no_text_becomes_markup(block: Block) -> None:
    html = page(EVIL, EVIL, [block], [Section(name="s", title=EVIL, blocks=(block,))], WHERE)
    assert "<script" not in html and "&lt;script&gt;" in html


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.kind in ("table", "chart", "pieces", "passage")])
def test_every_figure_says_where_it_comes_from(block: Block) -> None:
    html = page("t", "s", [], [Section(name="s", title="t", blocks=(block,))], WHERE)
    figure = html[html.index("<figure") : html.index("</figure>")]
    assert "plait demo --x" in figure and "seed 3" in figure and "an abacus" in figure


def test_the_page_fetches_nothing_and_fits_a_phone() -> None:
    html = page("t", "s", BLOCKS, [Section(name="s", title="t", blocks=tuple(BLOCKS))], WHERE)
    found: list[str] = []

    class Links(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.extend(value or "" for name, value in attrs if name in ("src", "href", "srcset", "action"))
            assert tag not in ("script", "iframe", "img", "object")

    Links().feed(html)
    assert found == ["data:,"] and "http" not in html and "url(" not in html and "@import" not in html
    assert 'name="viewport" content="width=device-width' in html and "prefers-color-scheme: dark" in html


def test_charts_beside_each_other_share_a_row() -> None:
    chart = BLOCKS[-1]
    html = page("t", "s", [chart, chart, BLOCKS[0], chart], [], WHERE)
    assert html.count('<div class="charts">') == 2
    assert html.count("<div") == html.count("</div>")


def test_files_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    write_whole(tmp_path / "a.html", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "a.html", "\ud800")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.html", "new")]
