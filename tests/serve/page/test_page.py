"""The page as one uses it: ask, watch, stop, edit, ask again, come back tomorrow; keys, settings, colours, failures."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.serve.page.browser import Browser, Tab
from tests.serve.page.fake import Fake, Piece, Script, says

ANSWERS = "[...document.querySelectorAll('.turn.assistant > .prose')].map(e => e.innerText)"
ASKED = "[...document.querySelectorAll('.turn.user > .prose')].map(e => e.innerText)"
IDLE = "running.size === 0"


def ask(tab: Tab, text: str) -> None:
    tab.js("document.getElementById('text').focus()")
    tab.write(text)
    tab.press("Enter")
    tab.until(f"{IDLE} && document.getElementById('text').value === ''")


def endless(begun: threading.Event) -> Script:
    def script(_: dict[str, Any]) -> Iterator[Piece]:
        for n in range(3000):
            yield {"content": f"word{n} "}
            begun.set()
            time.sleep(0.01)

    return script


def test_a_question_is_answered_with_facts_and_memory(tab: Tab, fake: Fake) -> None:
    fake.script = says("Constant ", "**state**", ".", reasoning=("Let me ", "think."), last_after_s=1.0)
    ask(tab, "What is a hybrid?")
    assert tab.js(ASKED) == ["What is a hybrid?"] and tab.js(ANSWERS) == ["Constant state."]
    assert tab.js("document.querySelector('.turn.assistant strong').innerText") == "state"
    facts = tab.js("document.querySelector('.turn.assistant .facts').innerText")
    assert "5 tokens" in facts and "tokens/s" in facts and "7 of 20 prompt tokens reused" in facts
    assert tab.js("document.getElementById('memory').innerText.replace(/\\s+/g, ' ')").strip() == (
        "1.5 MiB constant 5.0 KiB growing 25 of 4,096 tokens"
    )
    assert tab.js("document.getElementById('memory').getAttribute('aria-label')").startswith("Context: 25 of 4,096")
    # reasoning is folded; opened, it is there
    assert tab.js("document.querySelector('.reasoning').open") is False
    tab.click(".reasoning summary")
    tab.until("document.querySelector('.thoughts').innerText === 'Let me think.'")
    assert tab.js("document.querySelector('.reasoning summary').innerText") == "Reasoning, 3 tokens"
    assert tab.js("document.title") == "What is a hybrid? · Plait"


def test_requests_carry_the_talk_and_the_settings(tab: Tab, fake: Fake) -> None:
    ask(tab, "One")
    (first,) = fake.requests
    assert first["messages"] == [{"role": "user", "content": "One"}] and first["model"] == "tiny-hybrid"
    assert first["stream"] is True and first["stream_options"] == {"include_usage": True}
    assert first["chat_template_kwargs"] == {"enable_thinking": True}
    assert not {"temperature", "top_p", "max_tokens", "seed", "stop", "thinking_token_budget"} & first.keys()
    tab.js("document.getElementById('budget').focus()")
    tab.write("64")
    tab.click("#open-settings")
    values = {"system": "Be brief.", "temperature": "0.3", "top_k": "5", "max_tokens": "99", "seed": "0", "top_p": "7"}
    for name, value in values.items():
        tab.js(f"document.getElementById('{name}').focus()")
        tab.write(value)
    tab.js(
        "const stops = document.getElementById('stops'); stops.value = 'END\\n\\nHalt';"
        "stops.dispatchEvent(new Event('input'))"
    )
    tab.press("Escape")
    tab.until("!document.getElementById('settings').open")
    ask(tab, "Two")
    second = fake.requests[1]
    assert [message["role"] for message in second["messages"]] == ["system", "user", "assistant", "user"]
    assert second["messages"][0]["content"] == "Be brief." and second["messages"][2]["content"] == "Hello."
    wanted = {"temperature": 0.3, "top_k": 5, "max_tokens": 99, "seed": 0, "stop": ["END", "Halt"]}
    assert {name: second[name] for name in wanted} == wanted and second["thinking_token_budget"] == 64
    # 7 is no probability: it is shown as wrong and not sent
    assert "top_p" not in second and tab.js("document.getElementById('top_p').matches(':invalid')")
    tab.click("#thinking")
    ask(tab, "Three")
    assert fake.requests[2]["chat_template_kwargs"] == {"enable_thinking": False}
    assert "thinking_token_budget" not in fake.requests[2]
    # settings outlive the page, and can be put back
    tab.reload()
    assert tab.js("document.getElementById('temperature').value") == "0.3"
    tab.click("#open-settings")
    tab.click("#defaults")
    assert tab.js("[document.getElementById('temperature').value, 'temperature' in store.settings()]") == ["", False]


def test_escape_stops_an_answer_and_the_server_learns_of_it(tab: Tab, fake: Fake) -> None:
    begun = threading.Event()
    fake.script = endless(begun)
    tab.write("Go on for ever")
    tab.press("Enter")
    assert begun.wait(20)
    tab.until("document.querySelector('.turn.assistant > .prose').innerText.includes('word2')")
    assert tab.js("getComputedStyle(document.getElementById('send')).display") == "none"
    tab.press("Escape")
    tab.until(IDLE)
    assert fake.left.wait(20)
    said = tab.js(ANSWERS)[0]
    assert said.startswith("word0 word1") and "stopped" in tab.js(
        "document.querySelector('.turn.assistant .facts').innerText"
    )
    # what there is of it stays, and is part of the talk
    fake.script = says("Fine.")
    ask(tab, "Enough")
    assert fake.requests[1]["messages"][1]["content"].strip() == said.strip()


def test_a_conversation_is_there_after_a_reload(tab: Tab, fake: Fake) -> None:
    ask(tab, "First talk")
    tab.click("#new")
    assert tab.js(ASKED) == [] and tab.js("document.getElementById('welcome').hidden") is False
    fake.script = says("# Title\n", "text")
    ask(tab, "Second talk")
    tab.reload()
    tab.until("model !== null")
    assert tab.js(ASKED) == ["Second talk"] and tab.js("document.querySelector('.turn h2').innerText") == "Title"
    names = "[...document.querySelectorAll('#conversations .open')].map(e => e.innerText)"
    assert tab.js(names) == ["Second talk", "First talk"]
    tab.click("#conversations li:nth-child(2) .open")
    assert tab.js(ASKED) == ["First talk"] and tab.js(ANSWERS) == ["Hello."]
    assert "7 of 20 prompt tokens reused" in tab.js("document.querySelector('.facts:not(:empty)').innerText")


def test_a_question_can_be_edited_and_an_answer_made_again(tab: Tab, fake: Fake) -> None:
    ask(tab, "Nmae a river")
    fake.script = says("The Aare.")
    tab.click(".turn.user [aria-label='Edit this message']")
    assert tab.js("document.activeElement.value") == "Nmae a river"
    tab.js("document.activeElement.select()")
    tab.write("Name a river")
    tab.press("Enter")
    tab.until(f"{IDLE} && document.querySelectorAll('.turn.assistant').length === 1")
    assert tab.js(ASKED) == ["Name a river"] and tab.js(ANSWERS) == ["The Aare."]
    assert fake.requests[1]["messages"] == [{"role": "user", "content": "Name a river"}]
    fake.script = says("The Po.")
    tab.click(".turn.assistant [aria-label='Answer again']")
    tab.until(f"{IDLE} && {ANSWERS}[0] === 'The Po.'")
    assert fake.requests[2]["messages"] == fake.requests[1]["messages"]
    # nothing is lost: both answers, and both questions with theirs
    tab.click(".turn.assistant [aria-label='Earlier version']")
    assert tab.js(ANSWERS) == ["The Aare."]
    tab.click(".turn.user [aria-label='Earlier version']")
    assert tab.js(ASKED) == ["Nmae a river"] and tab.js(ANSWERS) == ["Hello."]
    tab.click(".turn.user [aria-label='Edit this message']")
    tab.press("Escape")
    assert tab.js(ASKED) == ["Nmae a river"]


def test_keys_do_what_they_are_known_for(tab: Tab, fake: Fake) -> None:
    tab.js("document.activeElement.blur()")
    tab.press("/")
    assert tab.js("document.activeElement.id") == "text" and tab.js("document.getElementById('text').value") == ""
    tab.write("one")
    tab.press("Enter", shift=True)
    tab.write("two / three")
    assert tab.js("document.getElementById('text').value") == "one\ntwo / three" and not fake.requests
    tab.js(
        "document.getElementById('text').dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', isComposing: true}))"
    )
    assert tab.js("document.getElementById('text').value") == "one\ntwo / three" and not fake.requests
    tab.press("Enter")
    tab.until(IDLE)
    assert len(fake.requests) == 1
    tab.press("Enter")
    assert len(fake.requests) == 1, "an empty message is none"


def test_conversations_are_deleted_and_exported(tab: Tab, fake: Fake, downloads: Path, browser: Browser) -> None:
    browser.call(
        "Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads), browserContextId=tab.person
    )
    fake.script = says("Yes: `x`.", reasoning=("Hm.",))
    ask(tab, "Keep/this?")
    tab.js("window.confirm = () => true")
    tab.click("#export")
    tab.js("save_markdown(chat.id)")
    ends = time.monotonic() + 20
    while len(found := [path for path in downloads.iterdir() if path.suffix in (".md", ".json")]) < 2:
        assert time.monotonic() < ends
        time.sleep(0.05)
    markdown, whole = sorted(found, key=lambda path: path.suffix, reverse=True)
    assert markdown.name == "Keepthis.md"
    assert markdown.read_text().startswith("# Keep/this?\n\n**You**\n\nKeep/this?\n\n<details>")
    assert markdown.read_text().endswith("**tiny-hybrid**\n\nYes: `x`.\n")
    exported = json.loads(whole.read_text())
    assert exported["chats"][0]["turns"][0]["turns"][0]["content"] == "Yes: `x`."
    tab.click("#new")
    ask(tab, "Another")
    tab.click("#conversations li:nth-child(1) [aria-label='Delete']")
    assert tab.js("[...document.querySelectorAll('#conversations .open')].map(e => e.innerText)") == ["Keep/this?"]
    assert tab.js(ASKED) == [], "the deleted one is not shown any more"
    tab.click("#clear")
    assert tab.js("Object.keys(localStorage).filter(name => !name.endsWith('settings'))") == []


def test_a_deleted_conversation_is_not_written_back_by_its_answer(tab: Tab, fake: Fake) -> None:
    begun = threading.Event()
    fake.script = endless(begun)
    tab.js("window.confirm = () => true")
    tab.write("Go on")
    tab.press("Enter")
    assert begun.wait(20)
    tab.js("remove(chat.id)")
    tab.until(IDLE)
    assert tab.js("store.list().length") == 0 and fake.left.wait(20)


def test_two_conversations_are_answered_at_the_same_time(tab: Tab, fake: Fake) -> None:
    begun, rest = threading.Event(), threading.Event()

    def slow(_: dict[str, Any]) -> Iterator[Piece]:
        yield {"content": "slow "}
        begun.set()
        assert rest.wait(20)
        yield {"content": "end"}

    fake.script = slow
    tab.write("Slow one")
    tab.press("Enter")
    assert begun.wait(20)
    tab.click("#new")
    fake.script = says("quick")
    tab.write("Quick one")
    tab.press("Enter")
    tab.until("running.size === 1")
    assert tab.js(ANSWERS) == ["quick"]
    rest.set()
    tab.until(IDLE)
    tab.click("#conversations li:nth-child(1) .open")
    assert tab.js(ANSWERS) == ["slow end"]


def test_failures_are_told_and_can_be_tried_again(tab: Tab, fake: Fake) -> None:
    def fails(_: dict[str, Any]) -> Iterator[Piece]:
        yield {"status": 400, "message": "top_k: <b>no</b>"}

    fake.script = fails
    ask(tab, "Well?")
    assert "top_k: <b>no</b>" in tab.js("document.querySelector('.failure').innerText")

    def breaks(_: dict[str, Any]) -> Iterator[Piece]:
        yield {"content": "Half an "}
        yield {"error": {"message": "out of memory", "code": 500}}

    fake.script = breaks
    tab.click(".failure button")
    tab.until(f"{IDLE} && document.querySelector('.failure').innerText.includes('out of memory')")
    assert tab.js(ANSWERS) == ["Half an"]

    def cut(_: dict[str, Any]) -> Iterator[Piece]:
        yield {"content": "Cut "}
        yield {"cut": True}

    fake.script = cut
    tab.click(".failure button")
    tab.until(f"{IDLE} && document.querySelector('.failure').innerText.includes('ended before')")
    fake.script = says("At last.")
    tab.click(".failure button")
    tab.until(f"{IDLE} && {ANSWERS}[0] === 'At last.'")
    assert tab.js("document.querySelector('.failure').hidden")
    assert {len(request["messages"]) for request in fake.requests} == {1}


def test_a_full_server_is_asked_again_when_it_says(tab: Tab, fake: Fake) -> None:
    answers = iter([{"status": 429, "message": "full", "headers": {"Retry-After": "1"}}, {"content": "Now."}])
    fake.script = lambda _: iter([next(answers)])
    tab.write("Room?")
    tab.press("Enter")
    tab.until("document.getElementById('notice').innerText.includes('asking again in 1 s')")
    tab.until(f"{IDLE} && {ANSWERS}[0] === 'Now.'")
    assert tab.js("document.getElementById('notice').hidden")


def test_a_key_is_asked_for_and_kept_for_this_tab_only(browser: Browser, fake: Fake) -> None:
    fake.key = "secret"
    browser.events.clear()
    tab = browser.open(fake.url, browser.person())
    tab.until("document.getElementById('notice').innerText.includes('API key')")
    tab.click("#open-settings")
    tab.js("document.getElementById('key').focus()")
    tab.write("secret")
    tab.press("Escape")
    tab.until("model !== null")
    ask(tab, "May I?")
    assert tab.js(ANSWERS) == ["Hello."] and fake.headers[0]["Authorization"] == "Bearer secret"
    assert "secret" not in tab.js("JSON.stringify(localStorage)")
    tab.close()


def test_a_browser_that_keeps_nothing_says_so_and_goes_on(tab: Tab, fake: Fake) -> None:
    tab.js("Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); }")
    ask(tab, "Still there?")
    assert tab.js(ANSWERS) == ["Hello."]
    assert "does not keep this conversation" in tab.js("document.getElementById('notice').innerText")


def test_broken_history_is_passed_over(tab: Tab, fake: Fake) -> None:
    tab.js(
        "localStorage.setItem('plait.title.aa', '{');"
        'localStorage.setItem(\'plait.title.bb\', \'{"title":"x","time":1}\');'
        "localStorage.setItem('plait.chat.bb', '[1]'); localStorage.setItem('plait.settings', '7')"
    )
    tab.reload()
    tab.until("model !== null")
    tab.click("#conversations .open")
    ask(tab, "Hello?")
    assert tab.js(ANSWERS) == ["Hello."]


def test_the_page_is_light_or_dark_as_the_system_or_the_user_says(tab: Tab) -> None:
    shade = "getComputedStyle(document.body).backgroundColor"
    tab.colours("light")
    light = tab.js(shade)
    tab.colours("dark")
    dark = tab.js(shade)
    assert light == "rgb(253, 252, 249)" and dark == "rgb(22, 23, 26)"
    tab.click("#open-settings")
    tab.click("#theme input[value=light]")
    assert tab.js(shade) == light
    tab.reload()
    assert tab.js(shade) == light


def test_ink_stands_out_from_paper_in_both_colours(tab: Tab) -> None:
    luminance = """(name) => {
      const probe = document.body.appendChild(document.createElement('i'));
      probe.className = 'probe'; const sheet = new CSSStyleSheet(); sheet.replaceSync(`.probe { color: var(${name}) }`);
      document.adoptedStyleSheets = [sheet];
      const [r, g, b] = getComputedStyle(probe).color.match(/[\\d.]+/g).slice(0, 3).map(Number)
        .map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
      probe.remove();
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    }"""
    for scheme in ("light", "dark"):
        tab.colours(scheme)
        shades = {
            n: tab.js(f"({luminance})('--{n}')")
            for n in "ink soft accent wrong word string number paper wash deep on-accent".split()
        }

        def contrast(a: str, b: str, shades: dict[str, float] = shades) -> float:
            high, low = sorted((shades[a], shades[b]), reverse=True)
            return (high + 0.05) / (low + 0.05)

        # WCAG AA for text
        for ink in ("ink", "soft", "accent", "wrong", "word", "string", "number"):
            for paper in ("paper", "wash", "deep"):
                assert contrast(ink, paper) >= 4.5, (scheme, ink, paper, contrast(ink, paper))
        assert contrast("on-accent", "accent") >= 4.5


def test_a_phone_shows_everything_in_one_column(tab: Tab, fake: Fake) -> None:
    tab.size(360, 700)
    fake.script = says(
        "```py\n" + "x = 1; " * 60 + "\n```\n\n|" + "wide column|" * 20 + "\n|" + "-|" * 20 + "\n\n" + "unbroken" * 60
    )
    ask(tab, "A" * 300)
    assert tab.js("[document.documentElement.scrollWidth, innerWidth]") == [360, 360]
    assert tab.js("document.getElementById('composer').getBoundingClientRect().bottom <= innerHeight")
    tab.until("getComputedStyle(document.getElementById('history')).visibility === 'hidden'")
    tab.click("#open-history")
    tab.until("getComputedStyle(document.getElementById('history')).visibility === 'visible'")
    assert tab.js("document.getElementById('open-history').getAttribute('aria-expanded')") == "true"
    tab.press("Escape")
    tab.until("getComputedStyle(document.getElementById('history')).visibility === 'hidden'")
    # fingers are wide, and small letters make a phone zoom
    assert tab.js("parseFloat(getComputedStyle(document.getElementById('text')).fontSize)") >= 16


def test_everything_that_can_be_pressed_has_a_name(tab: Tab, fake: Fake) -> None:
    ask(tab, "Hello")
    tab.call("Accessibility.enable")
    for _ in range(2):
        nodes = tab.call("Accessibility.getFullAXTree")["nodes"]
        roles = {"button", "textbox", "spinbutton", "radio", "link", "dialog", "list", "navigation", "form"}
        named = {"button", "textbox", "spinbutton", "radio", "link", "dialog", "navigation"}
        seen = [
            (n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if not n["ignored"] and "role" in n
        ]
        assert [one for one in seen if one[0] in named and not one[1]] == []
        assert roles & {role for role, _ in seen} >= {"button", "textbox"}
        tab.click("#open-settings")
    names = [name for _, name in seen]
    assert "Temperature" in names and "Settings" in names


def test_the_newest_text_stays_in_sight_unless_one_reads_above(tab: Tab, fake: Fake) -> None:
    fake.script = says("line\n\n" * 100)
    ask(tab, "Much")
    bottom = (
        "(() => { const t = document.getElementById('talk'); return t.scrollHeight - t.scrollTop - t.clientHeight; })()"
    )
    assert tab.js(bottom) < 5
    tab.js("document.getElementById('talk').scrollTop = 0")
    tab.until("!document.getElementById('down').hidden")
    tab.js("paint({turn: chat.turns[0].turns[0], chat, begin: 0, pieces: 1, saved: Infinity})")
    assert tab.js("document.getElementById('talk').scrollTop") == 0
    tab.click("#down")
    assert tab.js(bottom) < 5
