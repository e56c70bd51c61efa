"""The assembled page: one response, its policy allows exactly its own scripts and style, and nothing is loaded."""

import base64
import hashlib
import re
from collections import Counter
from pathlib import Path

import pytest

import plait.serve.page.assemble as assemble
from plait.serve.page.assemble import SCRIPTS, page

FOLDER = Path(assemble.__file__).parent


def sha256(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_the_policy_names_each_script_and_the_style_and_nothing_else() -> None:
    html, policy = page().body.decode(), page().headers["Content-Security-Policy"]
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    styles = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    assert len(scripts) == len(SCRIPTS) and len(styles) == 1
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["script-src"].split() == [sha256(script) for script in scripts]
    assert rules["style-src"].split() == [sha256(style) for style in styles]
    assert rules["default-src"] == rules["frame-ancestors"] == rules["base-uri"] == "'none'"
    assert rules["connect-src"] == "'self'" and rules["img-src"] == "data:"
    assert "unsafe" not in policy and "*" not in policy


def test_the_page_needs_nothing_from_elsewhere() -> None:
    html = page().body.decode()
    assert not re.search(r"<(?:script|img|iframe|object|embed)\s[^>]*\b(?:src|data)=", html)
    assert re.findall(r'<link[^>]*href="([^"]{0,5})', html) == ["data:"]
    assert not re.search(r"@import|url\(", html)
    assert not re.search(r'\son[a-z]+="|\sstyle="|javascript:', html), "the policy would refuse it"
    assert "{{" not in html


@pytest.mark.parametrize(
    "word", ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function("]
)
def test_no_script_turns_text_into_markup_or_code(word: str) -> None:
    assert not [name for name in SCRIPTS if re.search(rf"(?<!\w){re.escape(word)}", (FOLDER / name).read_text())]


def test_scripts_share_a_scope_and_no_name_is_taken_twice() -> None:
    names = Counter[str]()
    for name in SCRIPTS:
        text = (FOLDER / name).read_text()
        names.update(re.findall(r"^(?:async )?(?:function\*?|const|let|class) +([\w$]+)", text, re.MULTILINE))
    assert [name for name, n in names.items() if n > 1] == []
    assert {path.name for path in FOLDER.glob("*.js")} == set(SCRIPTS)


def test_every_element_that_a_script_asks_for_is_there_once() -> None:
    html = (FOLDER / "index.html").read_text()
    wanted = {name for script in SCRIPTS for name in re.findall(r'\$\("([\w-]+)"\)', (FOLDER / script).read_text())}
    ids = Counter(re.findall(r'\bid="([\w-]+)"', html))
    # the fields of sampling are made by script, under the names of the protocol
    assert wanted <= ids.keys()
    assert max(ids.values()) == 1
    drawn = set(re.findall(r'href="#(i-\w+)"', html))
    drawn |= {f"i-{name}" for name in re.findall(r'(?:icon|button)\("(\w+)"', (FOLDER / "view.js").read_text())}
    assert drawn <= ids.keys()
