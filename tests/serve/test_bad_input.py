"""What is wrong is refused in OpenAI's form, with the field's name, soon, and without disturbing others."""

import contextlib
import json
import threading
import time

import httpx
import pytest

from plait.serve.limits import Limits

CHAT = {"messages": [{"role": "user", "content": "the"}], "max_tokens": 2}
TEXT = {"prompt": "the", "max_tokens": 2}
DEEP: object = {}
for _ in range(200):
    DEEP = {"properties": {"a": DEEP}}


@pytest.fixture(scope="module")
def url(live) -> str:
    return live.url


def refused(answer: httpx.Response, status: int = 400) -> dict[str, object]:
    assert answer.status_code == status, answer.text[:300]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert "/src/" not in error["message"] and "Traceback" not in error["message"]
    return error


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": "hello"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/"}}]}]},
            "messages[0].content[0].type",
        ),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"repetition_penalty": 5e-324}, "repetition_penalty"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 100}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"max_tokens": 100_000}, "max_tokens"),
        ({"top_logprobs": 5}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": ["x" * 300]}, "stop[0]"),
        ({"seed": 1.5}, "seed"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"a": [1]}}, "chat_template_kwargs.a"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"thinking_token_budget": -1}, "thinking_token_budget"),
        ({"temprature": 1}, "temprature"),
        ({"session": "sess_0"}, "session"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value)[:40],
)
def test_a_wrong_field_is_named(url: str, change: dict[str, object], param: str) -> None:
    answer = httpx.post(f"{url}/v1/chat/completions", content=json.dumps(CHAT | change), headers=JSON)
    assert refused(answer, 404 if param == "session" else 400)["param"] == param


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [383, 384]}, "prompt"),
        ({"prompt": ["a"] * 17}, "prompt"),
        ({"prompt": [5] * 1100}, "prompt"),
        ({"prompt": "the " * 5000}, "prompt"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"echo": True, "logprobs": 1}, "echo"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value)[:40],
)
def test_a_wrong_completion_is_named(url: str, change: dict[str, object], param: str) -> None:
    assert refused(httpx.post(f"{url}/v1/completions", json=TEXT | change))["param"] == param


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"nul", b'{"prompt": NaN}', b'{"prompt": 1e999}', b"[" * 50_000, b"\xff\xfe", b"9" * 5000],
)
def test_what_is_no_json_is_refused(url: str, body: bytes) -> None:
    refused(httpx.post(f"{url}/v1/completions", content=body, headers=JSON))


def test_an_unknown_model_path_and_method_are_told(url: str) -> None:
    assert refused(httpx.post(f"{url}/v1/completions", json=TEXT | {"model": "gpt"}), 404)["code"] == "model_not_found"
    refused(httpx.get(f"{url}/v1/nothing"), 404)
    refused(httpx.get(f"{url}/v1/completions"), 405)
    refused(httpx.post(f"{url}/v1/completions", content=b"prompt=the", headers={"content-type": "text/plain"}), 415)


def test_a_hundred_megabytes_are_refused_while_others_are_served(url: str) -> None:
    def pieces():
        for _ in range(100):
            yield b" " * (1 << 20)

    served: list[int] = []
    over = threading.Event()

    def others() -> None:
        while not over.is_set():
            served.append(httpx.post(f"{url}/v1/completions", json=TEXT).status_code)

    thread = threading.Thread(target=others)
    thread.start()
    began = time.monotonic()
    try:
        told = httpx.post(f"{url}/v1/completions", content=b" " * (100 << 20), headers=JSON | {"connection": "close"})
        refused(told, 413)
        # the server may also hang up on who goes on sending, before the answer is read
        with contextlib.suppress(httpx.WriteError):
            refused(httpx.post(f"{url}/v1/completions", content=pieces(), headers=JSON), 413)
        assert time.monotonic() - began < 20
    finally:
        over.set()
        thread.join()
    assert served and set(served) == {200}
    assert httpx.post(f"{url}/v1/completions", json=TEXT).status_code == 200


def test_a_slow_body_is_given_up(fake) -> None:
    running, _ = fake(limits=Limits(context=512, body_s=0.2))

    def pieces():
        yield b"{"
        time.sleep(0.6)
        yield b"}"

    refused(httpx.post(f"{running.url}/v1/completions", content=pieces(), headers=JSON), 408)


@pytest.mark.parametrize(
    "outputs",
    [
        {"regex": "("},
        {"regex": "(?=a)b"},
        {"json": {"type": "nothing"}},
        {"json": DEEP},
        {"json": "not json"},
        {"grammar": "start: start start"},
        {"choice": []},
        {"regex": "a", "choice": ["b"]},
        {},
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_hostile_constraint_is_refused_in_time(url: str, outputs: dict[str, object]) -> None:
    pytest.importorskip("llguidance")
    began = time.monotonic()
    error = refused(httpx.post(f"{url}/v1/completions", json=TEXT | {"structured_outputs": outputs}, timeout=30))
    assert str(error["param"]).startswith("structured_outputs") and time.monotonic() - began < 20


def test_a_huge_constraint_costs_bounded_time(url: str) -> None:
    pytest.importorskip("llguidance")
    began = time.monotonic()
    outputs = {"regex": "(a{1,1000}){1,1000}{1,1000}"}
    answer = httpx.post(f"{url}/v1/completions", json=TEXT | {"structured_outputs": outputs}, timeout=30)
    assert answer.status_code in (200, 400) and time.monotonic() - began < 20


def test_a_prompt_that_cannot_fit_is_refused_before_it_is_read(url: str) -> None:
    for change in ({"prompt": "a" * (1 << 20)}, {"prompt": [1] * 100_000}, {"prompt": [[]] * 100_000}):
        error = refused(httpx.post(f"{url}/v1/completions", json=TEXT | change, timeout=30))
        assert str(error["param"]).startswith("prompt")
    tool = {"type": "function", "function": {"name": "f", "parameters": {"x": ["y"] * 20_000}}}
    assert refused(httpx.post(f"{url}/v1/chat/completions", json=CHAT | {"tools": [tool]}))["param"] == "tools"


def test_the_smallest_numbers_that_are_allowed_give_answers(url: str) -> None:
    for change in ({"temperature": 5e-324}, {"top_p": 5e-324}, {"min_p": 5e-324}, {"repetition_penalty": 0.01}):
        assert httpx.post(f"{url}/v1/completions", json=TEXT | change).status_code == 200
