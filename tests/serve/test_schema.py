"""JSON into dataclasses: what fits, what does not, and that the schema says the same."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.serve.error import RequestError
from plait.serve.protocol import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from plait.serve.responses import ResponsesBody
from plait.serve.schema import Limit, parse, read, schema

BODIES = [ChatBody, CompletionBody, ResponsesBody, TokenizeBody, DetokenizeBody]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    """Within."""

    OPEN: ClassVar[bool] = True
    a: Annotated[int, Limit(low=0, high=9)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    """Around it."""

    x: Annotated[float, Limit(above=0, high=2)] = 1.0
    words: Annotated[str, Limit(least=1, most=4)] | Annotated[tuple[str, ...], Limit(most=2)] = ()
    inner: tuple[Inner, ...] = ()
    kind: Literal["a", "b"] = "a"
    flag: bool = False
    free: dict[str, object] = field(default_factory=dict)
    ids: Annotated[tuple[Annotated[int, Limit(low=0, high=5)], ...], Limit(most=4)] = ()


def found(data: object) -> Outer:
    return read(Outer, data)


def test_what_fits_is_read_with_its_type() -> None:
    assert found(
        {"x": 2, "inner": [{"a": 3, "else": 1}], "words": ["p", "q"], "flag": True, "free": {"k": [None]}}
    ) == (Outer(x=2.0, inner=(Inner(a=3),), words=("p", "q"), flag=True, free={"k": [None]}))
    assert isinstance(found({"x": 2}).x, float)
    assert found({"x": None, "kind": None}) == Outer()
    assert found({"inner": [{"a": 4.0}]}).inner[0].a == 4


@pytest.mark.parametrize(
    ("data", "param"),
    [
        ([], None),
        ({"x": "1"}, "x"),
        ({"x": True}, "x"),
        ({"x": 0}, "x"),
        ({"x": 2.5}, "x"),
        ({"x": 10**400}, "x"),
        ({"words": ""}, "words"),
        ({"words": "12345"}, "words"),
        ({"words": ["a", "b", "c"]}, "words"),
        ({"words": ["a", 1]}, "words[1]"),
        ({"words": {"a": 1}}, "words"),
        ({"inner": [{"a": 1}, {}]}, "inner[1].a"),
        ({"inner": [{"a": -1}]}, "inner[0].a"),
        ({"inner": [1]}, "inner"),
        ({"kind": "c"}, "kind"),
        ({"kind": True}, "kind"),
        ({"flag": 1}, "flag"),
        ({"free": []}, "free"),
        ({"ids": [1, 6]}, "ids[1]"),
        ({"ids": [1, True]}, "ids[1]"),
        ({"wrods": "a"}, "wrods"),
    ],
)
def test_what_does_not_fit_is_named(data: object, param: str | None) -> None:
    with pytest.raises(RequestError) as caught:
        found(data)
    assert caught.value.param == param and caught.value.status == 400


def test_a_misspelt_field_is_told_its_neighbour() -> None:
    with pytest.raises(RequestError, match="did you mean 'words'"):
        found({"wrods": "a"})


@pytest.mark.parametrize(
    "body", [b"", b"{", b'{"x": NaN}', b'{"x": -Infinity}', b'{"x": 1e999}', b"[" * 100_000, b'"\xff"', b"9" * 5000]
)
def test_what_is_no_json_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError):
        parse(body)


@pytest.mark.parametrize("body", BODIES)
def test_the_schema_is_a_schema(body: type) -> None:
    components: dict[str, object] = {}
    whole = schema(body, components) | {"components": {"schemas": components}}
    assert not jsonschema_rs.validator_for(whole).is_valid([])


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 12)
    | st.floats(-3, 12, width=16)
    | st.sampled_from(["", "a", "b", "abcde"]),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(["a", "b"]), inner, max_size=2),
    max_leaves=6,
)


def test_reader_and_schema_agree(n_shapes: int) -> None:
    components: dict[str, object] = {}
    validator = jsonschema_rs.validator_for(schema(Outer, components) | {"components": {"schemas": components}})

    @settings(max_examples=n_shapes * 10, deadline=None)
    @given(st.dictionaries(st.sampled_from([*Outer.__dataclass_fields__, "other"]), JSON, max_size=2))
    def check(data: dict[str, object]) -> None:
        try:
            found(data)
            is_read = True
        except RequestError:
            is_read = False
        assert is_read == validator.is_valid(data)

    check()
