"""Constraints: what comes out matches them, in any vocabulary; hostile ones are refused in bounded time."""

import json
import random
import re
import threading
import time
from collections.abc import Iterator

import jsonschema_rs
import pytest
import torch

from plait.engine import constraint as constraint_module
from plait.engine.constraint import DEEPEST, LONGEST, Constraint, Grammars, of_choices, of_schema
from plait.engine.request import Sampling
from plait.engine.sampler import Draw, sample
from plait.engine.thinking import Thoughts
from plait.text.bpe import train_bpe
from plait.text.reasoning import Marks
from plait.text.tokenizer import Tokenizer, continuation

N_IDS = 400
WORDS = 'the quick "brown": fox, {"jumps": [1, 2.5, true, null]} über 你好 🦊 ' * 3


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([WORDS], 360)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Iterator[Grammars]:
    made = Grammars(tokenizer, N_IDS, tokenizer.eos_ids)
    yield made
    made.close()


def completed(
    tokenizer: Tokenizer, grammars: Grammars, constraint: Constraint, seed: int, thoughts: Thoughts | None = None
) -> str | None:
    """An answer of a model that knows nothing, None where it did not end in time."""
    s = Sampling(seed=seed, temperature=1.0)
    ends = frozenset(tokenizer.eos_ids)
    grammar = grammars.compile(constraint)
    draw = Draw(s, [1], N_IDS, torch.device("cpu"), end_ids=ends, thoughts=thoughts, grammar=grammar)
    ids: list[int] = []
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2000):
        (token_id,) = sample(torch.randn(1, N_IDS, generator=generator), [draw])
        assert draw.failure is None
        draw.note(token_id)
        if token_id in ends:
            return tokenizer.decode(ids, skip_special=False)
        ids.append(token_id)
        if draw.done:
            return tokenizer.decode(ids, skip_special=False)
    return None


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, object]:
    """A schema whose answers are short."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "pattern"]
    kind = rng.choice(kinds + ["object", "array", "anyOf"] * (3 if depth < 3 else 0))
    if kind == "string":
        return {"type": "string", "minLength": rng.randrange(3), "maxLength": 3 + rng.randrange(20)}
    if kind == "integer":
        low = rng.randrange(-50, 50)
        return {"type": "integer", "minimum": low, "maximum": low + rng.randrange(1000)}
    if kind == "number":
        return {"type": "number", "minimum": rng.randrange(-5, 5), "maximum": 10 + rng.randrange(90)}
    if kind == "enum":
        return {"enum": rng.sample([1, "two", None, True, [3], {"four": 4}, 'q"uo\\te', "ü🦊"], 3)}
    if kind == "const":
        return {"const": rng.choice(["x", 7, {"deep": [1, {"er": False}]}])}
    if kind == "pattern":
        return {"type": "string", "pattern": rng.choice(["^[a-c]{2,5}$", "^(yes|no)$", r"^\d{4}-\d\d$"])}
    if kind == "object":
        names = rng.sample(["a", "name", "über", "x y", "list", 'q"'], rng.randrange(4))
        properties = {name: random_schema(rng, depth + 1) for name in names}
        required = [name for name in names if rng.random() < 0.6]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    if kind == "array":
        return {"type": "array", "items": random_schema(rng, depth + 1), "maxItems": 3, "minItems": rng.randrange(2)}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth + 1) for _ in range(2)]}
    return {"type": kind}


def test_every_answer_to_a_random_schema_parses_and_validates(
    tokenizer: Tokenizer, grammars: Grammars, n_shapes: int
) -> None:
    rng = random.Random(0)
    ended = 0
    for seed in range(n_shapes):
        schema = random_schema(rng)
        text = completed(tokenizer, grammars, of_schema(schema), seed)
        # digits after the point may go on forever
        if text is not None:
            jsonschema_rs.validator_for(schema).validate(json.loads(text))
            ended += 1
    assert ended > 0.9 * n_shapes


@pytest.mark.parametrize("pattern", ["(yes|no), [a-f]{3,7}!", r"\d{1,3}(\.\d{1,3}){3}", "[äöü]{4}", "a{0,3}b?"])
def test_every_answer_matches_its_regular_expression(tokenizer: Tokenizer, grammars: Grammars, pattern: str) -> None:
    for seed in range(5):
        text = completed(tokenizer, grammars, Constraint("regex", pattern), seed)
        assert text is not None and re.fullmatch(pattern, text)


def test_grammars_and_choices_are_followed(tokenizer: Tokenizer, grammars: Grammars) -> None:
    nested = Constraint("lark", 'start: "(" start ")" | /[0-9]{1,2}/')
    texts = [completed(tokenizer, grammars, nested, seed) for seed in range(5)]
    assert all(text is not None and re.fullmatch(r"(\(*)\d{1,2}(\)*)", text) for text in texts)
    assert all(text is not None and text.count("(") == text.count(")") for text in texts)
    choices = ["yes", 'no "x"', "ü\n2", "a\\b"]
    answers = {completed(tokenizer, grammars, of_choices(choices), seed) for seed in range(30)}
    assert answers <= set(choices) and len(answers) > 2


@pytest.mark.parametrize("marks_are_tokens", [True, False])
@pytest.mark.parametrize("is_open", [True, False])
def test_reasoning_is_free_and_the_answer_alone_obeys(marks_are_tokens: bool, is_open: bool) -> None:
    tokenizer = train_bpe([WORDS], 360) if marks_are_tokens else train_bpe([WORDS], 360, ["<|eos|>"])
    grammars = Grammars(tokenizer, N_IDS, tokenizer.eos_ids)
    thought = 0
    for seed in range(12):
        thoughts = Thoughts(tokenizer, Marks(), is_open=is_open, budget=30, strict=True)
        text = completed(tokenizer, grammars, Constraint("regex", "(yes|no)[0-9]{5}"), seed, thoughts)
        assert text is not None
        reasoning, _, answer = text.rpartition("</think>\n\n")
        assert re.fullmatch("(yes|no)[0-9]{5}", answer)
        thought += bool(reasoning)
        assert thoughts.n_tokens <= 530
    assert thought == 12 if is_open else thought < 12
    grammars.close()


@pytest.mark.parametrize("name", ["bpe-4096", "published/phi-3", "published/falcon", "published/phi-2"])
def test_published_vocabularies_can_write_what_is_asked(shared, name: str) -> None:
    tokenizer = Tokenizer.open(shared / "data/tokenizers" / name)
    grammars = Grammars(tokenizer, tokenizer.vocab_size + 3, tokenizer.eos_ids)
    text = '{"a": "ü🦊 x\\n", "b": [1, 2]}'
    properties = {"a": {"type": "string"}, "b": {"type": "array", "items": {"type": "integer"}}}
    schema = {"type": "object", "properties": properties, "required": ["a", "b"], "additionalProperties": False}
    grammar = grammars.compile(of_schema(schema))
    for token_id in continuation(tokenizer, text):
        assert not grammar.is_complete
        allowed = grammar.allowed()
        assert allowed is not None and allowed.shape == (tokenizer.vocab_size + 3,)
        assert allowed[token_id], tokenizer.token_of(token_id)
        assert not any(allowed[i] for i in range(tokenizer.vocab_size) if tokenizer.is_special(i))
        grammar.note(token_id)
    assert grammar.is_complete
    grammars.close()


def test_a_fork_goes_its_own_way(tokenizer: Tokenizer, grammars: Grammars) -> None:
    one = grammars.compile(Constraint("regex", "ab|ac"))
    a, b, c = (tokenizer.encode(letter)[0] for letter in "abc")
    one.note(a)
    two = one.fork()
    one.note(b)
    assert one.is_complete and not two.is_complete
    allowed = two.allowed()
    assert allowed is not None and allowed[c] and allowed[b]


@pytest.mark.parametrize(
    ("constraint", "says"),
    [
        (lambda: of_schema("x"), "a JSON schema is an object, this is a str"),
        (lambda: of_schema({"a": float("nan")}), "cannot be written"),
        (lambda: of_schema(json.loads("[" * 0 + '{"items":' * 99 + "{}" + "}" * 99)), f"more than {DEEPEST} levels"),
        (lambda: of_schema({"enum": ["x" * LONGEST]}), f"allowed are {LONGEST}"),
        (lambda: Constraint("regex", ""), "regex = ''"),
        (lambda: Constraint("peg", "x"), "kind='peg' is unknown"),  # pyright: ignore[reportArgumentType]
        (lambda: of_choices([]), "choices"),
        (lambda: Constraint("json", '{"a'), "is no JSON schema"),
        (lambda: of_schema({"type": "foo"}), "Invalid type: foo"),
        (lambda: of_schema({"$ref": "file:///etc/passwd"}), "the json cannot be used"),
        (lambda: of_schema({"$ref": "http://localhost:1/x"}), "the json cannot be used"),
        (lambda: Constraint("regex", "(?=a)b"), "look-around"),
        (lambda: Constraint("regex", "(a|b"), "unclosed group"),
        (lambda: Constraint("regex", "(" * 3000 + "a" + ")" * 3000), "the regex cannot be used"),
        (lambda: Constraint("lark", "start: x"), 'unknown name: "x"'),
        (lambda: Constraint("lark", "%import /etc/passwd\nstart: x"), "the lark cannot be used"),
        (lambda: of_schema({"type": "integer", "multipleOf": 999983}), "takes more than 1 s"),
    ],
    ids=str,
)
def test_a_bad_constraint_is_refused_with_its_reason(grammars: Grammars, constraint, says: str) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^constraint: ") as caught:
            grammars.compile(constraint())
        assert says in str(caught.value)


def test_a_hostile_grammar_leaves_known_ones_undisturbed(tokenizer: Tokenizer, grammars: Grammars) -> None:
    known = of_schema({"type": "integer"})
    grammars.compile(known)
    hostile = threading.Thread(target=lambda: _refused(grammars), daemon=True)
    hostile.start()
    time.sleep(0.2)
    for _ in range(20):
        grammars.compile(known)
    assert hostile.is_alive()
    hostile.join(60)
    assert not hostile.is_alive()
    # and the process that it ended is replaced
    assert grammars.compile(Constraint("regex", "fresh")).allowed() is not None


def _refused(grammars: Grammars) -> None:
    with pytest.raises(ValueError, match="takes more than"):
        grammars.compile(of_schema({"type": "integer", "multipleOf": 999979}))


@pytest.mark.parametrize(
    "pattern", ["(a|aa)+b", "(.{1,300}){1,300}", "(x|y)*x(x|y){25}", ".*a.{20}b", r"(\p{L}\p{N}){1,200}"]
)
def test_costly_patterns_end_as_answers_or_as_failures_soon(grammars: Grammars, pattern: str) -> None:
    begun = time.thread_time()
    try:
        grammar = grammars.compile(Constraint("regex", pattern))
    except ValueError:
        return
    rng = random.Random(0)
    for _ in range(100):
        allowed = grammar.allowed()
        if allowed is None or grammar.is_complete:
            break
        grammar.note(rng.choice(allowed.nonzero()[:, 0].tolist()))
    # bounds of the library, not of this machine: a hundred tokens of its largest steps
    assert time.thread_time() - begun < 30


def test_what_is_in_use_is_not_pushed_out_by_what_comes(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraint_module, "_KEPT", 3)
    made = []
    grammars = Grammars(tokenizer, tokenizer.vocab_size, tokenizer.eos_ids)
    make = grammars._made
    monkeypatch.setattr(grammars, "_made", lambda constraint: (made.append(constraint.text), make(constraint))[1])
    for text in ("a", "b", "a", "c", "a", "d", "a", "e", "a"):
        grammars.compile(Constraint("regex", text))
    grammars.close()
    assert made == ["a", "b", "c", "d", "e"]
