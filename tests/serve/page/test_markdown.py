"""Markdown in the browser: what becomes of each construct, of a text that comes piece by piece, and of hostile text."""

import json
import random

from tests.serve.page.browser import Tab

CASES = {
    "# One\ntext": "<h2>One</h2><p>text</p>",
    "###### Six #": "<h6>Six</h6>",
    "#no heading": "<p>#no heading</p>",
    "a *b* **c** ***d*** ~~e~~ `f`": "<p>a <em>b</em> <strong>c</strong> <strong><em>d</em></strong> <del>e</del> "
    "<code>f</code></p>",
    "**a *b***": "<p><strong>a <em>b</em></strong></p>",
    "snake_case_name and 2 * 3 * 4": "<p>snake_case_name and 2 * 3 * 4</p>",
    "_a_ but **open": "<p><em>a</em> but **open</p>",
    "`` a`b ``": "<p><code>a`b</code></p>",
    "one\ntwo": "<p>one<br>two</p>",
    "one\n\ntwo": "<p>one</p><p>two</p>",
    r"\*a\* 1\. \\": r"<p>*a* 1. \</p>",
    "- a\n- b": "<ul><li>a</li><li>b</li></ul>",
    "3. a\n4. b": '<ol start="3"><li>a</li><li>b</li></ol>',
    "1. a\n   - b\n     c\n2. d": "<ol><li>a<ul><li>b<br>c</li></ul></li><li>d</li></ol>",
    "1. a\n  - b": "<ol><li>a<ul><li>b</li></ul></li></ol>",
    "- a\n\n- b": '<ul class="loose"><li><p>a</p></li><li><p>b</p></li></ul>',
    "- a\n\ntext": "<ul><li>a</li></ul><p>text</p>",
    "- [x] a\n- [ ] b": '<ul><li class="task"><input type="checkbox" disabled="" checked=""> a</li>'
    '<li class="task"><input type="checkbox" disabled=""> b</li></ul>',
    "> a\n> b\n>> c": "<blockquote><p>a<br>b</p><blockquote><p>c</p></blockquote></blockquote>",
    "---": "<hr>",
    "a\n***\nb": "<p>a</p><hr><p>b</p>",
    "|a|b|\n|-|:-:|\n|1|`x|y`|\n|2|3|4|": '<div class="wide"><table><thead><tr><th>a</th><th class="middle">b</th></tr>'
    '</thead><tbody><tr><td>1</td><td class="middle"><code>x|y</code></td></tr><tr><td>2</td><td class="middle">3</td>'
    "</tr></tbody></table></div>",
    "a|b\nno": "<p>a|b<br>no</p>",
    "$x_1 * y_2 * z$ but $5 and $6": '<p><span class="math">$x_1 * y_2 * z$</span> but $5 and $6</p>',
    r"\(a_b\) \[c\]": r'<p><span class="math">\(a_b\)</span> <span class="math">\[c\]</span></p>',
    "$$\na*b*c\n$$\nend": '<div class="math">$$\na*b*c\n$$</div><p>end</p>',
    "a<br>b < c & d": "<p>a<br>b &lt; c &amp; d</p>",
}


def html(tab: Tab, text: str) -> str:
    return tab.js(f"(() => {{ const d = make('div'); d.append(render({json.dumps(text)})); return d.innerHTML; }})()")


def test_each_construct_becomes_what_it_means(tab: Tab) -> None:
    found = {text: html(tab, text) for text in CASES}
    assert found == CASES


def test_code_is_coloured_and_copied_as_it_is(tab: Tab) -> None:
    found = html(tab, '```python\nif x == 1:  # "no"\n    return "<b>"\n```\nend')
    assert (
        '<span class="word">if</span> x == <span class="number">1</span>:  <span class="comment"># "no"</span>' in found
    )
    assert '<span class="string">"&lt;b&gt;"</span>' in found and found.endswith("</figure><p>end</p>")
    tab.allow("clipboardReadWrite", "clipboardSanitizedWrite")
    tab.js("document.querySelector('#turns').append(render('~~~~sh\\na  <b>\\n~~~\\n~~~~'))")
    tab.click(".copy")
    tab.until("document.querySelector('.copy.done') && document.getElementById('status').textContent === 'Copied'")
    assert tab.js("navigator.clipboard.readText()") == "a  <b>\n~~~"


LINKS = {
    "[a](https://x.org/?q=1&r=(2))": "https://x.org/?q=1&r=(2)",
    '[a *b*](http://x.org "title")': "http://x.org/",
    "<https://x.org/y>": "https://x.org/y",
    "see https://x.org/y_(z).": "https://x.org/y_(z)",
    "(https://x.org)": "https://x.org/",
    "![a cat](https://x.org/cat.png)": "https://x.org/cat.png",
}


def test_links_lead_to_http_and_open_elsewhere(tab: Tab) -> None:
    tab.js(f"for (const text of {json.dumps([*LINKS])}) document.querySelector('#turns').append(render(text))")
    assert tab.js("[...document.querySelectorAll('#turns a')].map(a => [a.href, a.target, a.rel, a.title])") == [
        [address, "_blank", "noopener noreferrer nofollow", address] for address in LINKS.values()
    ]
    assert tab.js("document.querySelectorAll('#turns img').length") == 0


HOSTILE = [
    "<script>window.hit=1</script>",
    "<img src=x onerror=window.hit=1>",
    "<svg onload=window.hit=1>",
    "[a](javascript:window.hit=1)",
    "[a](JaVaScRiPt:window.hit=1)",
    "[a](data:text/html,<script>window.hit=1</script>)",
    '[a](https://x.org" onmouseover="window.hit=1)',
    "<javascript:window.hit=1>",
    "![a](javascript:window.hit=1)",
    "[a](vbscript:x) [b](file:///etc/passwd) [c](//evil.org) [d](/v1/models) [e](#x)",
    "```<img src=x onerror=window.hit=1>\n</code></pre><script>window.hit=1</script>\n```",
    '```"><script>\nx\n```',
    "|<script>window.hit=1</script>|b|\n|-|-|\n|<img src=x onerror=window.hit=1>|2|",
    "# <iframe srcdoc='<script>parent.hit=1</script>'>",
    "`<b onclick=window.hit=1>`",
    "- [x] <details ontoggle=window.hit=1 open>",
    "$<script>window.hit=1</script>$",
    "&lt;script&gt;window.hit=1&lt;/script&gt; &#106;avascript:",
    "<style>*{display:none}</style><base href=https://evil.org><form action=https://evil.org><meta http-equiv=refresh>",
    "https://x.org/<script>window.hit=1</script>",
]


def test_hostile_text_stays_text(tab: Tab) -> None:
    tab.js(f"for (const text of {json.dumps(HOSTILE)}) document.querySelector('#turns').append(render(text))")
    names = set(tab.js("[...new Set([...document.querySelectorAll('#turns *')].map(e => e.localName))]"))
    assert names <= set("p br code pre figure div span button table thead tbody tr th td h2 ul li input a em".split())
    attributes = tab.js("[...new Set([...document.querySelectorAll('#turns *')].flatMap(e => e.getAttributeNames()))]")
    assert not [name for name in attributes if name.startswith("on") or name in ("src", "style", "srcdoc", "action")]
    addresses = tab.js("[...document.querySelectorAll('#turns a')].map(a => a.protocol)")
    assert set(addresses) <= {"http:", "https:"}
    tab.js("for (const e of document.querySelectorAll('#turns *')) { e.click?.(); }")
    assert tab.js("typeof window.hit") == "undefined"
    # what was refused is shown as it was written
    assert "[a](javascript:window.hit=1)" in tab.js("document.querySelector('#turns').textContent")


def test_the_browser_itself_refuses_markup_from_text(tab: Tab) -> None:
    found = tab.js(
        "(() => { try { document.body.innerHTML = '<b>x</b>'; return 'set'; } catch (e) { return e.name; } })()"
    )
    assert found == "TypeError"
    tab.browser.events.clear()


def test_a_text_letter_by_letter_looks_like_the_whole(tab: Tab) -> None:
    # beginnings of these look like something else: a number like a paragraph, a row of a table like text
    texts = [
        "1. a\n\n2. b",
        "- a\n\n- b\n\ntext",
        "a\n\n|b|c|\n|-|-|\n|1|2|",
        "> a\n\n> b\n---\n# h",
        "$$\na\n$$\n~~~\nb",
    ]
    text = "\n\n".join([*texts, *CASES, *HOSTILE])
    same = tab.js(
        f"""(() => {{
          const text = {json.dumps(text)}, grown = make("div"), growing = new Growing(grown);
          for (let i = 1; i <= text.length; i += 1) {{
            growing.show(text.slice(0, i));
            if (i % 97 && i < text.length) continue;
            const whole = make("div", {{}}, render(text.slice(0, i)));
            if (whole.innerHTML !== grown.innerHTML) return [text.slice(0, i), whole.innerHTML, grown.innerHTML];
          }}
          return true;
        }})()"""
    )
    assert same is True


def test_a_text_in_pieces_looks_like_the_whole(tab: Tab, n_shapes: int) -> None:
    random.seed(1)
    parts = [
        *CASES,
        *HOSTILE,
        "```py\ncode\n\n# more\n```",
        "    indented",
        "1) one\n2) two",
        "- \n-",
        "* * *",
        "text",
        "> q\nlazy",
    ]
    for _ in range(n_shapes):
        text = random.choice(["\n", "\n\n"]).join(random.sample(parts, 5))
        cuts = sorted(random.sample(range(len(text) + 1), min(len(text), 30)))
        same = tab.js(
            f"""(() => {{
              const text = {json.dumps(text)}, whole = make("div"), grown = make("div");
              whole.append(render(text));
              const growing = new Growing(grown);
              for (const cut of {json.dumps([*cuts, len(text)])}) growing.show(text.slice(0, cut));
              return whole.innerHTML === grown.innerHTML || [whole.innerHTML, grown.innerHTML];
            }})()"""
        )
        assert same is True, f"{text!r} cut at {cuts}: {same}"


ENDLESS = [
    # as long as a paragraph may be that is looked at, and longer
    *(
        text * (n // len(text))
        for n in (39_999, 99_999)
        for text in ("*a ", "[a](", "> ", "- ", "$a ", "~~~\n", "\\(", "_a", "**a *b ", "a|", "`a", "``a`")
    ),
    *(text * 40000 for text in ("<", "[", "`", "\n", "http://", "- a\n\n", "1. a\n  ", "\\")),
    "|" * 20000 + "\n" + "|-" * 20000 + "\n|" * 20000,
    "* " * 9 + "a\n" * 20000,
    "```c\n" + "/*" * 9000 + "\n```",
    "[a](http://x.org/" + "(" * 9000,
]


def test_hostile_text_is_cheap(tab: Tab) -> None:
    took = tab.js(
        f"{json.dumps(ENDLESS)}.map((text) => {{ const begin = performance.now(); render(text);"
        " return [Math.round(performance.now() - begin), text.slice(0, 9)]; })"
    )
    # without bounds each takes minutes or overflows the stack; the limit only has to tell that apart on a busy machine
    assert max(took)[0] < 10_000, max(took)
    print(sorted(took)[-5:])
