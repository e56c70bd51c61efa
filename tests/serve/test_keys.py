"""Who is let in."""

from pathlib import Path

import httpx
import pytest

from plait.serve.error import RequestError
from plait.serve.keys import Keys


def test_without_keys_everybody_may() -> None:
    Keys().check(None)
    assert not Keys().are_needed


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "Bearer two ", "Basic one", "Bearer ONE", "Bearer ö"]
)
def test_a_wrong_key_is_refused(header: str | None) -> None:
    with pytest.raises(RequestError) as caught:
        Keys(["one", "other"]).check(header)
    assert caught.value.status == 401 and "one" not in caught.value.message


def test_each_key_opens() -> None:
    keys = Keys(["one", "other"])
    keys.check("Bearer one")
    keys.check("bearer other")


def test_a_file_holds_one_a_line(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\none\n\n  two  # of a friend\n")
    keys = Keys.open("three", file)
    for key in ("one", "two", "three"):
        keys.check(f"Bearer {key}")
    file.write_text("# none\n")
    with pytest.raises(ValueError, match="holds no key"):
        Keys.open(None, file)
    with pytest.raises(ValueError, match="API key 1"):
        Keys([""])


def test_keys_guard_all_but_the_page_and_the_probes(fake) -> None:
    running, _ = fake(keys=Keys(["secret"]))
    url = running.url
    ask = {"prompt": "the", "max_tokens": 1}
    assert httpx.get(f"{url}/").status_code in (200, 404)
    assert [httpx.get(f"{url}/{path}").status_code for path in ("health", "ready")] == [200, 200]
    for path in ("v1/models", "metrics", "openapi.json", "nothing"):
        assert httpx.get(f"{url}/{path}").status_code == 401
    refused = httpx.post(f"{url}/v1/completions", json=ask)
    assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
    header = {"authorization": "Bearer secret"}
    assert httpx.post(f"{url}/v1/completions", json=ask, headers=header).status_code == 200
    assert "plait_requests_total" in httpx.get(f"{url}/metrics", headers=header).text
