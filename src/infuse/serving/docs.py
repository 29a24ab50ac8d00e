"""The page that describes the API: plain HTML without scripts, made of the OpenAPI description."""

import base64
import hashlib
import json
import re
from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#1d2731, #e4e9ee); --faint: light-dark(#5c6a78, #9fadba);
  --paper: light-dark(#fff, #12171c); --card: light-dark(#f5f7f9, #1b2229); --line: light-dark(#d6dce2, #35404a);
  --accent: light-dark(#1f6fb2, #6db3ee); }
body { margin: 0 auto; padding: 1.5rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 60rem; color: var(--ink);
  background: var(--paper); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.8rem; } h2 { font-size: 1.1rem; } h3 { margin: 1rem 0 .3rem; font-size: .95rem; }
a { color: var(--accent); } .faint { color: var(--faint); }
section { margin: 1rem 0; padding: .2rem 1rem 1rem; border: 1px solid var(--line); border-radius: .5rem;
  background: var(--card); }
table { width: 100%; border-collapse: collapse; font-size: .9rem; }
th, td { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; border-top: 1px solid var(--line); }
pre { overflow-x: auto; padding: .6rem .8rem; border: 1px solid var(--line); border-radius: .5rem; font-size: .85rem; }
"""
_ITEM = {"adapter": "banking", "texts": ["where is my card?"], "top_k": 3}


def page(api: dict[str, Any]) -> str:
    """The page of an OpenAPI description."""
    schemas = api.get("components", {}).get("schemas", {})
    routes = [
        _route(method, path, about, schemas)
        for path, methods in api["paths"].items() for method, about in methods.items()
    ]  # fmt: skip
    objects = [_object(name, about) for name, about in schemas.items() if "properties" in about and name in _SHOWN]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(api['info']['title'])}: API</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(api['info']['title'])} {escape(api['info']['version'])}</h1>"
        f"<p>{escape(api['info'].get('description', ''))}</p>"
        '<p><a href="/">Try adapters</a> · <a href="/openapi.json">the same for programs (OpenAPI)</a></p>'
        f"<main>{''.join(routes)}<h2>Bodies</h2>{''.join(objects)}</main></body></html>\n"
    )


def policy(page: str) -> dict[str, str]:
    """Headers under which a page runs and shows nothing but what is in it, and asks its own server alone."""
    scripts, styles = _hashes(page, "script"), _hashes(page, "style")
    return {
        "Content-Security-Policy": f"default-src 'none'; script-src {scripts}; style-src {styles}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }


_SHOWN = ("Item", "Answered", "Answer", "Scored", "Adapter", "Adapters", "Status", "Error")


def _route(method: str, path: str, about: dict[str, Any], schemas: dict[str, Any]) -> str:
    rows = [
        (p["name"], f"in the {p['in']}", p.get("description", "")) for p in about.get("parameters", [])
    ]  # fmt: skip
    kinds = about.get("requestBody", {}).get("content", {})
    rows += [("body", kind, _kind(content.get("schema", {}))) for kind, content in kinds.items()]
    answers = [
        (status, _kind(next(iter(answer.get("content", {"": {}}).values())).get("schema", {})),
         answer.get("description", ""))
        for status, answer in about.get("responses", {}).items()
    ]  # fmt: skip
    return (
        f"<section><h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(about.get('description', ''))}</p>"
        f"{_table('It takes', rows)}{_example(method, path, about, kinds)}{_table('It answers', answers)}</section>"
    )


def _example(method: str, path: str, about: dict[str, Any], kinds: dict[str, Any]) -> str:
    words = ["curl", "-X", "DELETE"] if method == "delete" else ["curl"]
    if "security" in about:
        words += ["-H", '"Authorization: Bearer $INFUSE_ADMIN_TOKEN"']
    words.append(f'"http://HOST:PORT{path.replace("{name}", "banking")}"')
    if "application/json" in kinds:
        words += ["-H", "'Content-Type: application/json'", "-d", f"'{json.dumps(_ITEM)}'"]
    elif kinds:
        words += ["--data-binary", "@adapter_model.safetensors"]
    return f"<pre>{escape(' '.join(words))}</pre>"


def _object(name: str, about: dict[str, Any]) -> str:
    required = about.get("required", [])
    rows = [
        (key, _kind(value) + ("" if key in required else ", may be left out"), value.get("description", ""))
        for key, value in about["properties"].items()
    ]
    description = escape(about.get("description", ""))
    return f'<section id="{escape(name)}"><h2>{escape(name)}</h2><p>{description}</p>{_table("", rows)}</section>'


def _kind(schema: dict[str, Any]) -> str:
    """What a schema holds, in a few words."""
    if "$ref" in schema:
        return schema["$ref"].rsplit("/", 1)[-1]
    if "anyOf" in schema:
        return " or ".join(_kind(each) for each in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    return str(schema.get("type", "anything"))


def _table(title: str, rows: list[tuple[str, str, str]]) -> str:
    if not rows:
        return ""
    lines = "".join(f"<tr><th>{escape(a)}</th><td>{escape(b)}</td><td>{escape(c)}</td></tr>" for a, b, c in rows)
    return (f"<h3>{title}</h3>" if title else "") + f"<table>{lines}</table>"


def _hashes(page: str, tag: str) -> str:
    """Sources of a content security policy: the page's own inline elements and no others."""
    inline = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", page, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in inline]
    return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
