"""Values that are registered are found in every form, and what looks like credentials by where it stands."""

from __future__ import annotations

import base64
import html
import json
import random
import shlex
import string
import textwrap
import threading
from urllib.parse import quote, quote_plus

import pytest

from gorgon_common.masking import MASK, SHORTEST, Secrets, redact

SIGNS = string.ascii_letters + string.digits + "+/=-_ .%&?#'\"\\<>éß€"


@pytest.fixture
def secrets() -> Secrets:
    return Secrets()


WAYS = {
    "plain": lambda value: value,
    "inside a word": lambda value: f"xx{value}yy",
    "json": json.dumps,
    "json, not ascii": lambda value: json.dumps(value, ensure_ascii=False),
    "json in json": lambda value: json.dumps(json.dumps([value])),
    "repr": repr,
    "ascii": ascii,
    "bytes": lambda value: repr(value.encode()),
    "percent": lambda value: quote(value, safe=""),
    "percent, lower": lambda value: quote(value, safe="").lower() if value.islower() else quote(value, safe=""),
    "path": quote,
    "form": quote_plus,
    "html": html.escape,
    "shell": shlex.quote,
    "hex": lambda value: value.encode().hex(),
    "HEX": lambda value: value.encode().hex().upper(),
    "base64": lambda value: base64.b64encode(value.encode()).decode(),
    "base64 of more": lambda value: base64.b64encode(b"me:" + value.encode() + b"@h").decode(),
    "base64 for URLs": lambda value: base64.urlsafe_b64encode(b"x" + value.encode()).decode(),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_value_is_found_in_every_form(secrets: Secrets, way: str) -> None:
    """Random values; at either end base64 may leave a sign that depends on what stands beside it."""
    for seed in range(200):
        chance = random.Random(seed)
        value = "".join(chance.choice(SIGNS) for _ in range(chance.randint(10, 60)))
        secrets.clear()
        secrets.add("X", value)
        written = WAYS[way](value)
        masked = secrets.mask(f"before {written} after")
        assert MASK in masked, (value, written)
        assert len(masked) <= len(f"before {MASK} after") + 12, (value, masked)


def test_nothing_is_left_where_values_overlap(secrets: Secrets) -> None:
    secrets.add("A", "abcdefghij")
    secrets.add("B", "ghijklmnop")
    secrets.add("C", "defghijk")
    assert secrets.mask("-abcdefghijklmnop-") == f"-{MASK}-"
    assert secrets.mask("abcdefghijabcdefghij") == MASK


@pytest.mark.parametrize("fold", ["\n", "\r\n", "\n      ", "\\n"])
def test_a_value_is_found_across_lines(secrets: Secrets, fold: str) -> None:
    value = "abcdefghijklmnopqrstuvwxyz" * 4
    secrets.add("X", value)
    folded = fold.join(textwrap.wrap(value, 30))
    encoded = fold.join(textwrap.wrap(base64.b64encode(b"me:" + value.encode()).decode(), 76))
    assert secrets.mask(f"first\n{folded} last\n") == f"first\n{MASK} last\n"
    assert "Z2hpamtsbW5vcHFyc3R1" not in secrets.mask(encoded).replace(fold, "")
    assert secrets.mask("one\ntwo\nthree") == "one\ntwo\nthree"


def test_parts_of_keys_and_accounts_are_secrets_too(secrets: Secrets) -> None:
    secrets.add("KEY", "-----BEGIN KEY-----\nMIIEvQIBADANBgkq\nhkiG9w0BAQEFAASC\n-----END KEY-----\n")
    secrets.add("ACCOUNT", json.dumps({"type": "service_account", "auth": {"client_secret": "very-secret"}}))
    assert secrets.mask("> hkiG9w0BAQEFAASC") == f"> {MASK}"
    assert secrets.mask("very-secret service_account") == f"{MASK} service_account"
    assert secrets.mask("-----BEGIN KEY-----") == "-----BEGIN KEY-----"


def test_json_stays_json(secrets: Secrets) -> None:
    secrets.add("NUMBER", "1234567890")
    secrets.add("NAME", "field-name")
    text = json.dumps({"field-name": [1234567890, 12345678901.5, True, None, {"x": "field-name é"}], "other": 1})
    assert json.loads(secrets.mask_json(text)) == {MASK: [MASK, MASK, True, None, {"x": f"{MASK} é"}], "other": 1}
    assert secrets.mask_json('{"a": 1}') == '{"a": 1}'


def test_short_and_public_values_are_not_masked(secrets: Secrets) -> None:
    assert not secrets.add("PIN", "x" * (SHORTEST - 1))
    assert secrets.add("KEY", "x" * SHORTEST)
    assert secrets.add("DATABASE", "postgres")
    assert secrets.mask("xxxxxxx postgres") == "xxxxxxx postgres"
    assert secrets.add("DECLARED", "postgres", declared=True)
    assert secrets.mask("postgres") == MASK
    assert secrets.found("about postgres") == "DECLARED"


def test_urls_have_passwords(secrets: Secrets) -> None:
    assert secrets.add_url("DB", "postgresql://me:p%40ssword1@h:5432/db?sslpassword=other-secret&application=visible")
    assert secrets.add_url("SAME", "postgresql://gorgonuser:gorgonuser@h/db")
    assert not secrets.add_url("SHORT", "redis://:abc@h/0")
    secrets.add_url("BROKEN", "http://[::1")
    told = secrets.mask("p@ssword1 p%40ssword1 other-secret visible gorgonuser")
    assert told == f"{MASK} {MASK} {MASK} visible gorgonuser"


def test_the_environment_is_searched_by_names(secrets: Secrets) -> None:
    secrets.add_environment(
        {
            "OPENAI_API_KEY": "simplekey",
            "MY_SERVICE_TOKEN": "abc123def456ghi7",
            "TOKENIZERS_PARALLELISM": "false-positive-0123456789",
            "KEY_FILE": "/run/secrets/key-0123456789",
            "SOME_PASSWORD": "correct horse 0123456789",
            "HTTPS_PROXY": "http://me:proxy-pass@h:8080",
            "EMPTY_TOKEN": None,
        }
    )
    masked = secrets.mask("simplekey abc123def456ghi7 false-positive-0123456789 /run/secrets/key-0123456789 proxy-pass")
    assert masked == f"{MASK} {MASK} false-positive-0123456789 /run/secrets/key-0123456789 {MASK}"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:pw@h/db", f"postgresql://me:{MASK}@h/db"),
        ("see https://ghp_abcdefghijklmnop@github.com/x", f"see https://{MASK}@github.com/x"),
        ("GET /x?api_key=abcd1234&b=1", f"GET /x?api_key={MASK}&b=1"),
        ("Authorization: Bearer abcd.efgh", f"Authorization: Bearer {MASK}"),
        ("{'authorization': 'Basic YWJjZA=='}", f"{{'authorization': 'Basic {MASK}'}}"),
        ('"x-api-key": "abcd1234"', f'"x-api-key": "{MASK}"'),
        ("Cookie: session=abcdefgh1234", f"Cookie: session={MASK}"),
        ("https://example.org/a:b@c", "https://example.org/a:b@c"),
        ("me@example.org: a key=value pair", "me@example.org: a key=value pair"),
    ],
)
def test_credentials_are_masked_by_where_they_stand(text: str, shown: str) -> None:
    assert redact(text) == shown


@pytest.mark.parametrize("unit", ["a.b-c://", "://a:", "?key", "authorization: ", "cookie: a", "a" * 50])
def test_hostile_text_is_not_slow(unit: str) -> None:
    """Bounded work for each sign: twenty times the text takes about twenty times the steps, not four hundred."""
    text = unit * (400_000 // len(unit))
    assert isinstance(redact(text), str)


def test_values_are_added_from_many_threads(secrets: Secrets) -> None:
    threads = [
        threading.Thread(target=lambda n=n: [secrets.add(f"T{n}", f"value-{n}-{i}") for i in range(30)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert secrets.mask(" ".join(f"value-{n}-{i}" for n in range(4) for i in range(30))).count("value") == 0
