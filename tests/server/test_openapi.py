"""The server's description of itself: it says what the field checks do, and every path is in it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Running, running

#: Of each JSON type, a value that is of no other.
VALUES: dict[str, Any] = {
    "string": "none",
    "integer": 2**63,
    "number": 0.5,
    "boolean": True,
    "array": [{"zz": [1]}],
    "object": {"zz": [1]},
}


@pytest.fixture(scope="module")
def document(server: Running) -> dict[str, Any]:
    found: dict[str, Any] = server.client.get("/openapi.json").json()
    return found


def bodies(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(path, schema) of each kind of body that is an object."""
    seen = []
    for path, operations in document["paths"].items():
        content = operations.get("post", {}).get("requestBody", {}).get("content", {})
        schema = content.get("application/json", {}).get("schema", {})
        if schema.get("type") == "object" and schema not in seen:
            seen.append(schema)
            yield path, schema


def test_every_path_is_described(document: dict[str, Any]) -> None:
    """As docs/SERVER.md lists them, with a line of what each does."""
    page = (Path(__file__).parents[2] / "docs" / "SERVER.md").read_text(encoding="utf-8")
    listed = page.partition("## Endpoints")[2].partition("\n\n| method, path")[2].partition("\n\n")[0]
    names = {word.strip("`") for row in listed.splitlines() for word in row.replace(",", " ").split() if "`/" in word}
    assert {name.replace("ID", "{name}") for name in names} == set(document["paths"])
    for operations in document["paths"].values():
        assert all(operation["summary"] for operation in operations.values())


def test_the_examples_are_answered(server: Running, document: dict[str, Any]) -> None:
    """Each body that the description shows."""
    for path, schema in bodies(document):
        [example] = schema["examples"]
        answer = server.post(path, example)
        assert answer.status_code == 200 and "x-ignored-params" not in answer.headers, (path, answer.text)


def test_what_is_described_is_checked(server: Running, document: dict[str, Any]) -> None:
    """A value of a type that a field cannot be, and one beyond its bounds, are refused with the field's name."""
    tried = 0
    for path, schema in bodies(document):
        for name, value in wrong(schema):
            body = put(schema["examples"][0], name, value)
            answer = server.client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
            assert answer.status_code in (400, 422), (path, name, value, answer.text)
            # The typed reads' clients want words of their own.
            assert name.rpartition(".")[2] in answer.text or path == "/v1/systemone", (path, name, answer.text)
            tried += 1
    assert tried > 250


def wrong(schema: dict[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    """(field, a value that it cannot have)."""
    for name, form in schema["properties"].items():
        path = f"{where}{name}"
        if "properties" in form:
            yield from wrong(form, f"{path}.")
        kinds = form.get("type", [])
        kinds = {kinds} if isinstance(kinds, str) else set(kinds)
        if kinds:
            taken = kinds | ({"integer"} if "number" in kinds else set())
            yield from ((path, value) for kind, value in VALUES.items() if kind not in taken)
        for bound, step in (("minimum", -1), ("maximum", 1)):
            if isinstance(form.get(bound), int):
                yield path, form[bound] + step
        if "enum" in form:
            yield path, "no such value"


def put(body: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(body)
    *outer, last = name.split(".")
    place = changed
    for part in outer:
        place = place.setdefault(part, {})
    place[last] = value
    return changed


def test_what_is_not_described_has_no_effect() -> None:
    """With --strict-params, a described field is read and any other refused."""
    with running(strict_params=True) as server:
        for path, schema in bodies(server.client.get("/openapi.json").json()):
            example = schema["examples"][0]
            if "diffusion" in schema["properties"]:
                example["diffusion"] = {"max_steps": 1}
            assert server.post(path, {**example, "unheard_of": 1}).status_code == 400, path
            for name in schema["properties"]:
                answer = server.post(path, {**example, name: {"zz": 1}})
                assert "has no effect" not in answer.text, (path, name)


def test_a_key_is_needed_for_it() -> None:
    """And it says so."""
    from pydiffgguf.server.settings import digest

    with running(key_digests=(digest("k"),)) as server:
        assert server.client.get("/openapi.json").status_code == 401
        document = server.client.get("/openapi.json", headers={"Authorization": "Bearer k"}).json()
        assert document["security"] == [{"key": []}]
