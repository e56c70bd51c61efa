"""A browser for all tests of the page; for each a user without a past, and a server that says what it is told."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.serve.page.browser import CHROMIUM, Browser, Tab
from tests.serve.page.fake import Fake


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on PATH: the page is not tried in a browser")
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture
def fake() -> Iterator[Fake]:
    server = Fake()
    yield server
    server.close()


@pytest.fixture(scope="session")
def window(browser: Browser) -> Tab:
    return browser.open("about:blank#", browser.person())


@pytest.fixture
def tab(browser: Browser, window: Tab, fake: Fake) -> Iterator[Tab]:
    """The page, loaded; at the end it must have had no error of its own."""
    browser.events.clear()
    window.size(1200, 800)
    window.colours("light")
    # each server has a port of its own, and with it the page has storage of its own
    window.go(fake.url)
    window.until("model !== null")
    yield window
    complaints = [words for words in window.complaints() if "status of 4" not in words]
    window.go("about:blank#")
    assert not complaints


@pytest.fixture
def downloads(browser: Browser, tmp_path: Path) -> Path:
    """Where files go that the page saves."""
    browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    return tmp_path
