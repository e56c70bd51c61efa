"""Puts the chat page together: one response that needs nothing else, and a policy that forbids it everything else.

The browser runs the scripts and applies the style sheet that have these very hashes, connects to the server the page
came from, and loads nothing. Trusted types without a policy make it refuse every attempt to turn text into markup.
"""

import base64
import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

SCRIPTS = ("markdown.js", "highlight.js", "store.js", "wire.js", "view.js", "settings.js", "chat.js", "start.js")
"""In the order in which the browser runs them; they share one scope."""

_HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A response. body: HTML in UTF-8. headers: all that belong to it."""

    body: bytes
    headers: dict[str, str]


@functools.cache
def page() -> Page:
    """The chat page, read from its files once."""
    style = _read("chat.css")
    scripts = [f'"use strict";\n{_read(name)}' for name in SCRIPTS]
    html = _read("index.html").replace("{{ style }}", style)
    html = html.replace("{{ scripts }}", "\n".join(f"<script>{script}</script>" for script in scripts))
    policy = [
        "default-src 'none'",
        f"script-src {' '.join(map(_hash, scripts))}",
        # widths of the gauge and heights of fields are set by script, which this does not forbid
        f"style-src {_hash(style)}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
    headers = {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": "; ".join(policy),
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
        # a new version of the server brings a new page
        "Cache-Control": "no-cache",
    }
    return Page(body=html.encode(), headers=headers)


def _read(name: str) -> str:
    text = (_HERE / name).read_text(encoding="utf-8")
    for end in ("</script", "</style"):
        # it would end the element that the file is put into
        assert end not in text.lower() or name == "index.html", f"{name} contains {end}"
    return text


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
