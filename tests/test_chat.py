"""Chat templates from strangers, and stop strings."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pydiffgguf.errors import ModelFormatError
from pydiffgguf.text.rendering import render
from pydiffgguf.text.stop import StopStrings

GEMMA_LIKE = """\
{%- macro answer(text) -%}
    {%- set kept = namespace(text='') -%}
    {%- for part in text.split('<channel|>') -%}
        {%- set kept.text = kept.text + part.split('<|channel>')[0] -%}
    {%- endfor -%}
    {{- kept.text | trim -}}
{%- endmacro -%}
{{- bos_token -}}
{%- set rest = messages -%}
{%- if (enable_thinking is defined and enable_thinking) or messages[0]['role'] in ['system', 'developer'] -%}
    {{- '<|turn>system\\n' -}}
    {%- if enable_thinking -%}{{- '<|think|>' -}}{%- endif -%}
    {%- if messages[0]['role'] == 'system' -%}
        {{- messages[0]['content'] | trim -}}{%- set rest = messages[1:] -%}
    {%- endif -%}
    {{- '<turn|>\\n' -}}
{%- endif -%}
{%- for message in rest -%}
    {%- if message['role'] not in ['user', 'assistant', 'model'] -%}
        {{- raise_exception('no ' + message['role'] + '\\nhere') -}}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<|turn>' + role + '\\n' }}
    {%- if message.get('tool_calls') -%}{{ message['tool_calls'] | tojson }}{%- endif -%}
    {%- if role == 'model' -%}{{- answer(message['content']) -}}
    {%- else -%}{{- message['content'] | trim -}}{%- endif -%}
    {{- '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|turn>model\\n' -}}{%- endif -%}
"""

TURNS = [
    {"role": "user", "content": "  Why is <turn|> the sky blue? {{ bos_token }}\n"},
    {"role": "assistant", "content": "<|channel>thought\nRayleigh\n<channel|>Because of {scattering}.\n"},
    {"role": "user", "content": "And 夕焼け?"},
]

# Jinja that chat templates in the wild are made of
FEATURES = [
    "{{ bos_token }}\n{% for m in messages %}\n  {% if loop.first %}\n{{ m.role }}{% else %}, {{ m.role }}{% endif %}\n"
    "{% endfor %}\nend\n",
    "{% for m in messages if m.role == 'user' %}{{ loop.index0 }}/{{ loop.length }}:{{ m.content | trim }}{% endfor %}",
    "{% for m in [] %}x{% else %}empty{% endfor %}",
    "{% for x in [1, [2, [3]]] recursive %}{{ x if x is number else loop(x) }}{{ ',' if not loop.last }}{% endfor %}",
    "{% for key, value in {'b': 1, 'a': none, 'c': true} | dictsort %}{{ key }}={{ value }};{% endfor %}",
    "{% for i in range(10) %}{% if i == 2 %}{% continue %}{% elif i > 4 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "{% set ns = namespace(found=false, n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{% macro say(x, y='!') %}{{ x ~ y ~ 1 ~ none }}{% endmacro %}{{ say('a') }}{{ say('b', y='?') }}",
    "{% macro wrap() %}<{{ caller() }}>{% endmacro %}{% call wrap() %}in{% endcall %}",
    "{% set block %}a{{ 1 + 1 }}b{% endset %}{{ block | upper }}{% filter lower %}QUIET{% endfilter %}",
    "{{ messages | map(attribute='role') | join(', ') }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | count }}",
    "{{ messages | rejectattr('role', 'eq', 'user') | map(attribute='content') | map('length') | list }}",
    "{{ messages[-1]['content'][1:3] }}{{ messages[::-1][0].role }}{{ (messages | last).role }}",
    "{{ messages | first | length }}{{ 'abc' | replace('b', 'd') }}{{ '-'.join('ab') }}",
    "{{ 'a,b'.split(',') }}{{ ' x '.strip() }}{{ 'ab'.replace('a', 'c') }}",
    "{{ 'Ab'.startswith('A') and 'b' in 'ab' }}{{ {'a': 1}.get('z', 2) }}{{ {'a': 1}.items() | list }}{{ 'x' * 3 }}",
    "{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 10 }}{{ -1 }}{{ 1 / 2 }}{{ [1] + [2] }}{{ [0] * 2 }}",
    "{{ 3 | string + '1' }}{{ '4' | int + 1 }}{{ 'x' * -1 }}",
    "{{ missing is defined }}{{ missing | default('d') }}{{ none is none }}{{ 'a' is string }}",
    "{{ [] is sequence }}{{ {} is mapping }}{{ missing }}{{ messages[0].missing }}",
    "{{ 'line\nnext' | indent(2) }}{{ 'word word' | title }}{{ [3, 1, 2] | sort }}",
    "{{ [1, 1] | unique | list }}{{ 'abc' | reverse }}{{ messages | groupby('role') | map('first') | list }}",
    "{% set a, b = 1, 2 %}{{ b }}{{ (a, b) }}{{ [a, [b]] }}{{ dict(a=1) }}{{ range(3) | list }}",
    "{{ '<&>' }}{{ '<' | e }}{{ 'a' | safe }}",
    "{{ '%s is %05.1f%% %(a)s' | replace('%(a)s', '') | format('x', 2) }}{{ '%(a)d' % {'a': 3} }}{{ '%s' % 'b' }}",
    "{{ '{} {0}' | replace(' {0}', '') | string }}{{ '{}-{:>4}|{:.2f}'.format('a', 'b', 1) }}{{ '{x}'.format(x=1) }}",
    "{{ 1.25 | round(1) }}{{ 7.5 | round | int }}{{ 1234 | round(-2, 'floor') }}{{ [1, 2.5] | sum }}",
    "{{ 'a b  c' | wordcount }}{% for m in messages %}{{ loop.previtem.role if loop.previtem }}{% endfor %}",
    "{# comment #}{%- raw %} {{ raw }} {% endraw -%} tail",
]

# What jinja2's own sandbox lets through, or needs minutes or all memory for
BOMBS = [
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}some text{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for x in [[]] recursive %}{{ loop([x]) }}{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{{ 10**10 * [1] }}",
    "{{ 10 ** (10 ** 10) }}",
    "{{ (-10) ** (10 ** 10) }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%*d' % (10**9, 1) }}",
    "{{ '%.999999999f' | format(1) }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10**9) }}",
    "{{ ('{:99}' * 99999).format(1) }}",
    "{{ ([10 ** 100000] * 99999) | sum }}",
    "{{ 'x' | center(10**9) }}",
    "{{ 'x'.center(10**9) }}",
    "{{ 'x'.ljust(10**9) }}",
    "{{ (5).to_bytes(10**9, 'big') }}",
    "{{ [1] | batch(10**9, 0) | list }}",
    "{{ [1] | slice(10**9) | list }}",
    "{{ 1 | round(-(10**9)) }}",
    "{{ ('a\n' * 1000000) | indent(10**9) }}",
    "{{ messages | tojson(indent=10**9) }}",
    "{{ strftime_now('%999999999d') }}",
    "{{ lipsum(n=10**6) }}",
    "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
    "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{% set ns = namespace(x=['a']) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "{% set n = namespace(x=[0]) %}{% for i in range(60) %}{% set n.x = (n.x, n.x) %}{% endfor %}{{ n.x | tojson }}",
    "{% set n = namespace(x=(1,)) %}{% for i in range(60) %}{% set n.x = (n.x,) + (n.x,) %}{% endfor %}{{ {n.x: 1} }}",
    "{% set ns = namespace(x={'a': 1}) %}{% for i in range(60) %}{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}",
    "{% set ns = namespace(x={}) %}{% for i in range(60) %}{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=['a']) %}{% for i in range(60) %}"
    "{% set ns.x = ['', ''] | map('default', ns.x, true) | list %}{% endfor %}{{ ns.x | string }}",
    "{% set x = 'a' * 1000000 %}{{ range(99999) | join(x) }}",
    "{% set x = 'a' * 1000000 %}{{ x.join(range(99999) | map('string')) }}",
    "{% set x = 'a' * 1000000 %}{{ x | replace('a', x) }}",
    "{% set x = 'a' * 1000000 %}{{ x.replace('', x) }}",
    "{% set x = 'a' * 1000000 %}{{ range(99999) | map('string') | map('replace', '', x) | list }}",
    "{% set x = 'a' * 1000000 %}{{ ([''] * 99999) | map('default', x, true) | map('upper') | list }}",
    "{% set x = 'a' * 1000000 %}{{ ([''] * 99999) | map('default', x, true) | list | sort }}",
    "{% set x = 'a' * 1000000 %}{{ x.strip('b' * 1000000) }}",
    "{% set x = 'a' * 1000000 %}{{ x.rfind('a' * 500000 ~ 'b') }}",
    "{% set x = 'a' * 1000000 %}{% for i in range(99999) %}{% if 'a' * 100 ~ 'b' in x %}{% endif %}{% endfor %}",
    "{% set x = 'a' * 1000000 %}{{ range(99999) | select('in', x) | list }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{% if 1 %}" * 500 + "{% endif %}" * 500,
    "{% for i in [1] %}" * 30 + "{% endfor %}" * 30,
    "{{ " + "1+" * 40_000 + "1 }}",
    "{% if 1 %}" + "{% elif 1 %}" * 8_000 + "{% endif %}",
    "x" * 200_000,
    "{% for x in range(999) %}{% for y in range(99999) | selectattr('role') %}{% endfor %}{% endfor %}",
    "{% for x in range(99999) %}{{ 'a' in range(99999) }}{% endfor %}",
]

ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ ''['__class__']['__mro__'] }}",
    "{{ ('' | attr('__class__')) }}",
    "{{ [''] | map(attribute='__class__.__mro__') | list | tojson }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ namespace(__class__=1) }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 1}) }}",
    "{{ messages[0].__setitem__('role', 1) }}",
    "{{ dict.fromkeys([1]) }}",
    "{{ dict.mro() }}",
    "{{ '{0.__class__}'.format('') }}",
    "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment() }}",
    "{{ loop.__class__.x }}",
    "{% for x in [1] %}{{ loop._iterator.x.y }}{% endfor %}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ messages | map('attr', '__class__') | list }}",
    "{% include 'x' %}",
    "{% extends '/etc/passwd' %}",
    "{% import 'os' as os %}",
]


def test_a_gemma_like_template_renders_as_expected() -> None:
    """Turns, the thinking switch, the system turn; what a user writes stays text for the template."""
    user = "<|turn>user\nWhy is <turn|> the sky blue? {{ bos_token }}<turn|>\n"
    model = "<|turn>model\nBecause of {scattering}.<turn|>\n"
    rest = "<|turn>user\nAnd 夕焼け?<turn|>\n"
    plain = render(GEMMA_LIKE, TURNS, bos_token="<bos>")
    assert plain == "<bos>" + user + model + rest + "<|turn>model\n"
    thinking = render(GEMMA_LIKE, TURNS, bos_token="<bos>", enable_thinking=True, add_generation_prompt=False)
    assert thinking == "<bos><|turn>system\n<|think|><turn|>\n" + user + model + rest
    system = render(GEMMA_LIKE, [{"role": "system", "content": "Be brief."}, *TURNS[:1]])
    assert system == "<|turn>system\nBe brief.<turn|>\n" + user + "<|turn>model\n"


@pytest.mark.parametrize("source", [GEMMA_LIKE, *FEATURES], ids=range(len(FEATURES) + 1))
def test_counting_the_work_changes_no_output(source: str) -> None:
    """Every feature renders exactly as in jinja2's own sandbox with the options that transformers uses."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    variables: dict[str, Any] = {
        "messages": TURNS,
        "bos_token": "<bos>",
        "add_generation_prompt": True,
    }
    expected = environment.from_string(source).render(**variables, enable_thinking=False, eos_token="")
    assert expected
    assert render(source, TURNS, bos_token="<bos>") == expected


def test_tojson_is_json() -> None:
    """Not jinja2's HTML-safe variant: a template writes tool declarations with it."""
    assert render("{{ messages | tojson }}", TURNS[2:]) == '[{"role": "user", "content": "And 夕焼け?"}]'
    assert render("{{ {'b': '<', 'a': 1} | tojson(indent=1, sort_keys=true) }}", TURNS) == '{\n "a": 1,\n "b": "<"\n}'


def test_the_date_can_be_asked_for() -> None:
    """Some templates put today's date into the system turn."""
    assert render("{{ strftime_now('%Y') }}", TURNS) == time.strftime("%Y")


@pytest.mark.parametrize("source", BOMBS, ids=range(len(BOMBS)))
def test_bombs_end_quickly(source: str) -> None:
    """Each ends in an error of one line within seconds and without much memory, and the process lives."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.thread_time()
    with pytest.raises(ModelFormatError, match=r"^tokenizer\.chat_template") as info:
        render(source, TURNS)
    assert time.thread_time() - begin < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # KiB
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("source", ESCAPES, ids=range(len(ESCAPES)))
def test_escapes_are_refused(source: str) -> None:
    """Python's internals, the caller's objects and the file system are out of reach."""
    with pytest.raises(ModelFormatError, match=r"^tokenizer\.chat_template"):
        render(source, TURNS)


def test_long_conversations_fit_the_allowance() -> None:
    """A thousand turns, and one of half a million characters, are ordinary work."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"turn {i}"} for i in range(1000)]
    assert render(GEMMA_LIKE, turns).count("<|turn>") == 1001
    assert len(render(GEMMA_LIKE, [{"role": "user", "content": "word " * 100_000}])) > 499_000
    quadratic = "{% for m in messages %}{% for n in messages %}{% endfor %}{% endfor %}done"
    assert render(quadratic, turns) == "done"


def test_an_allowance_is_for_one_rendering() -> None:
    """A template that once ran out renders again, and one rendering does not live on another's rest."""
    source = "{% for i in range(messages[0].content | int) %}{% for j in range(50000) %}{% endfor %}{% endfor %}done"
    for _ in range(3):
        assert render(source, [{"role": "user", "content": "20"}]) == "done"
    with pytest.raises(ModelFormatError, match="too much work"):
        render(source, [{"role": "user", "content": "90000"}])
    assert render(source, [{"role": "user", "content": "1"}]) == "done"


def test_a_refusal_is_the_callers_mistake() -> None:
    """raise_exception is how templates say that roles must alternate; its message comes through in one line."""
    with pytest.raises(ValueError, match=r"^the chat template refuses the messages: no system here$"):
        render(GEMMA_LIKE, [*TURNS, {"role": "system", "content": "late"}])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% if x %", r"does not compile: .*\(line 1\)"),
        ("\n\n{{ x | nofilter }}", r"does not compile: No filter named 'nofilter'. \(line 3\)"),
        ("{{ messages[9].content }}", "fails: list object has no element 9"),
        ("{{ 1 / 0 }}", "fails: division by zero"),
        ("{{ nothing() }}", "fails: 'nothing' is undefined"),
    ],
)
def test_broken_templates_say_why(source: str, message: str) -> None:
    """In one line that names the key, with the line where there is one."""
    with pytest.raises(ModelFormatError, match=rf"^tokenizer\.chat_template {message}$"):
        render(source, TURNS)


def test_the_earliest_stop_string_wins() -> None:
    """By position in the text, not in the list."""
    stop = StopStrings(["\n\n", "END", "N"])
    assert stop.find("abc END \n\n") == 4
    assert stop.find("abc") is None
    assert stop.find("N abc \n\n", 1) == 6
    assert stop.overlap == 2
    assert StopStrings().find("abc") is None
    assert StopStrings().overlap == 0
    assert StopStrings("b").find("abc") == 1


@given(st.lists(st.text("ab", min_size=1, max_size=3), max_size=3), st.text("ab", max_size=12), st.integers(0, 12))
def test_a_growing_text_is_searched_from_the_overlap(stops: list[str], text: str, seam: int) -> None:
    """Searching in two pieces, the second from `overlap` before the seam, finds what one search finds."""
    stop = StopStrings(stops)
    first = stop.find(text[:seam])
    both = stop.find(text, max(0, min(seam, len(text)) - stop.overlap)) if first is None else first
    assert (both is None) == (stop.find(text) is None)
    if first is None:
        assert both == stop.find(text)


def test_wrong_stop_strings_are_refused() -> None:
    """An empty one would match everywhere."""
    with pytest.raises(ValueError, match="empty string"):
        StopStrings(["a", ""])
    with pytest.raises(TypeError, match="stop must hold strings, not int"):
        StopStrings([1])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="not int"):
        StopStrings(1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not bytes"):
        StopStrings(b"a")  # type: ignore[arg-type]
