import time

import pytest

from plait.text import sandbox
from plait.text.sandbox import render_template

DOUBLING = "{% set n = namespace(s=START) %}{% for i in range(60) %}{% set n.s = NEXT %}{% endfor %}{{ n.s LAST }}"
HOSTILE = {
    "class of a text": "{{ ''.__class__.__mro__ }}",
    "globals of a helper": "{{ cycler.__init__.__globals__ }}",
    "attribute by filter": "{{ ('' | attr('__class__')).__mro__ }}",
    "attribute by format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "change of what is given": "{{ messages.append(1) }}",
    "a file": "{% include '/etc/passwd' %}",
    "long range": "{% for i in range(10**9) %}{% endfor %}",
    "long list": "{{ range(10**9) | list }}",
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "nested filters": "{% for a in range(99999) %}{% for b in range(999) if b < 0 %}{% endfor %}{% endfor %}",
    "endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "branching macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "endless loop": "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "long text": "{{ 'a' * 10**10 }}",
    "text from the left": "{{ 10**10 * 'a' }}",
    "long number": "{{ 9**(9**9) }}",
    "padding": "{{ 'a'.ljust(10**9) }}",
    "format method": "{{ '{:>9999999999}'.format(1) }}",
    "format operator": "{{ '%999999999d' % 1 }}",
    "format filter": "{{ '%999999999d' | format(1) }}",
    "indentation": "{{ 'a\nb' | indent(10**9) }}",
    "indented json": "{{ [1] | tojson(indent=10**9) }}",
    "replacement": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "replacing filter": "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    "joining": "{{ ('b' * 99999).join(['a'] * 99999) }}",
    "joining filter": "{{ (['a'] * 99999) | join('b' * 99999) }}",
    "blind text": "{{ lipsum(n=10**9) }}",
    "doubled by tilde": DOUBLING.replace("START", "'ab'").replace("NEXT", "n.s ~ n.s").replace("LAST", ""),
    "doubled by plus": DOUBLING.replace("START", "'ab'").replace("NEXT", "n.s + n.s").replace("LAST", ""),
    "doubled lists": DOUBLING.replace("START", "[1]").replace("NEXT", "[n.s, n.s]").replace("LAST", ""),
    "doubled lists as json": DOUBLING.replace("START", "[1]").replace("NEXT", "[n.s, n.s]").replace("LAST", "| tojson"),
    "doubled lists as text": DOUBLING.replace("START", "[1]").replace("NEXT", "[n.s, n.s]").replace("LAST", "| string"),
    "doubled blocks": "{% set x = 'a' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60 + "{{ x }}",
    "constant text in loops": "{% for i in range(99999) %}" + "x" * 100_000 + "{% endfor %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_with_an_error(name, monkeypatch):
    monkeypatch.setattr(sandbox, "_SECONDS", 0.5)
    start = time.thread_time()
    with pytest.raises(ValueError, match="the chat template (failed|is not allowed)"):
        render_template(HOSTILE[name], {"messages": [{"role": "user", "content": "x"}]})
    assert time.thread_time() - start < 2


def test_ordinary_work_is_far_from_the_limits():
    messages = [{"role": "user", "content": "word " * 200}] * 2000
    template = "{% for m in messages %}{% set t = '<' ~ m.role ~ '>' + m.content %}{{ t | trim | tojson }}{% endfor %}"
    assert len(render_template(template, {"messages": messages})) > 2_000_000


def test_a_template_that_refuses_says_why():
    with pytest.raises(ValueError, match="roles must alternate"):
        render_template("{{ raise_exception('roles must alternate') }}", {})


@pytest.mark.parametrize("template", ["{% if %}", "{{ a.b.c }}", "{{ none + 'x' }}", "{{ 1 / 0 }}", "{{ [] | nope }}"])
def test_a_wrong_template_is_one_clear_error(template):
    with pytest.raises(ValueError, match="chat template failed"):
        render_template(template, {})


def test_what_is_set_in_a_generation_block_stays_there():
    template = "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"
    assert render_template(template, {}) == "21"
