"""Chat templates of strangers: what they may do, what they may cost, and the text they make."""

import time

import pytest
from interloom.models.received_template import ReceivedTemplate
from jinja2.sandbox import ImmutableSandboxedEnvironment

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def grown(expression):
    return (
        "{% set box = namespace(x='aaaa') %}{% for i in range(99) %}{% set box.x = "
        + expression
        + " %}{% endfor %}"
    )


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in [1] recursive %}{{ loop(range(99999)) }}{% endfor %}",
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'a' * 10 ** 9 }}",
        "{{ 9 ** 9 ** 9 ** 9 }}",
        "{{ ('a' * 9999) * 99999 }}",
        "{{ 'a'.center(10 ** 9) }}",
        "{{ 'a'.ljust(999999999) }}",
        "{{ 'a'|center(999999999) }}",
        "{{ '{:999999999}'.format(1) }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '%999999999d'|format(1) }}",
        "{{ 'a\nb'|indent(999999999) }}",
        "{{ messages|tojson(indent=999999999) }}",
        grown("box.x ~ box.x"),
        grown("box.x + box.x"),
        grown("box.x.replace('a', 'aa')"),
        grown("box.x|replace('a', 'aa')"),
        grown("[box.x, box.x]|join"),
        grown("box.x.join([box.x, box.x])"),
        grown("[box.x, box.x]") + "{{ box.x }}",
        grown("[box.x, box.x]") + "{{ box.x|tojson }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ raise_exception('refused') }}",
        "{{ nothing.at.all }}",
        "{{ messages[7].content + 'a' }}",
        "{{ 1 / 0 }}",
    ],
)
def test_what_a_template_may_not_do_is_one_sentence(source):
    begun = time.monotonic()
    with pytest.raises(ValueError, match="chat template of T") as caught:
        ReceivedTemplate(source, "T").render([dict(turn) for turn in TURNS])
    assert "\n" not in str(caught.value)
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize(
    "source",
    [
        "{% include 'a' %}",
        "{% import 'a' as b %}",
        "{% from 'a' import b %}",
        "{% extends 'a' %}",
        "{% for",
        "{{ a|nope }}",
    ],
)
def test_what_is_no_template_is_told_at_once(source):
    with pytest.raises(ValueError, match="chat template of T cannot be read"):
        ReceivedTemplate(source, "T")


def test_a_template_may_not_be_huge():
    with pytest.raises(ValueError, match="expected at most 1,048,576"):
        ReceivedTemplate("a" * (2**20 + 1), "T")


def test_the_text_is_that_of_plain_jinja():
    source = (
        "{{ bos }}{%- for m in messages if m.role != 'tool' %}\n  {%- set x = m['content'] | trim -%}\n"
        "{{ loop.index0 ~ m.role.upper() + ':' + x.strip() }}{{ '|' if not loop.last }}{% if loop.index > 5 %}"
        "{% break %}{% endif %}{% endfor %}{% for a, b in {'k': [1, 2.5, none, true]}.items() %}{{ a }}{{ b }}"
        "{{ b|tojson }}{% endfor %}{{ [3, 1, 2]|sort|join(',') }}{{ messages|map(attribute='role')|list }}"
        "{{ '%d' if false else 'é' }}{{ 7 // 2 + 2 * 3 - 5 % 3 }}\n"
        "{% macro f(a, b='q') %}<{{ a }}{{ b }}>{% endmacro %}"
        "{{ f(1) }}{{ namespace(z=1).z }}{{ range(3)|list }}\n"
    )
    oracle = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    import json

    oracle.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    turns = [*TURNS, {"role": "tool", "content": "c"}, {"role": "user", "content": " d\n"}]
    wanted = oracle.from_string(source).render(messages=turns, bos="<s>")
    assert ReceivedTemplate(source, "T").render(turns, bos="<s>") == (wanted, [])


def test_marks_are_those_of_the_template_alone():
    template = ReceivedTemplate(
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}", "T"
    )
    turns = [{"role": "assistant", "content": "a\ufdd0b\ufdd1"}, {"role": "assistant", "content": ""}]
    text, spans = template.render(turns)
    assert text == "a\ufffdb\ufffd;;"
    assert spans == [(0, 4)]
