"""OpenAI, and servers that speak its API."""

from __future__ import annotations

import re

from gorgon_common import queues
from gorgon_common.operations.dimensions import DAY, Counts, Dimension, Header
from gorgon_common.operations.effects import Effect
from gorgon_common.operations.providers.descriptor import Models, Provider, Server


def _header(word: str) -> Header:
    return Header(f"x-ratelimit-limit-{word}", f"x-ratelimit-remaining-{word}", f"x-ratelimit-reset-{word}")


OPENAI = Provider(
    name="openai",
    title="OpenAI",
    queue=queues.OPENAI,
    client="gorgon_worker.providers.openai:OpenAIProvider",
    server=Server(
        host="openai.com",
        key_setting="openai_api_key",
        key_variable="OPENAI_API_KEY",
        url_setting="openai_base_url",
        url_variable="OPENAI_BASE_URL",
        keyless=True,
        sandbox_path="/v1",
        example="https://…/v1",
        headers=("x-ratelimit-",),
    ),
    dimensions=(
        Dimension("requests", whole=1, header=_header("requests")),
        Dimension("requests_per_day", DAY, whole=1),
        Dimension("tokens", counts=Counts.TOKENS, header=_header("tokens")),
        Dimension("input_tokens", counts=Counts.INPUT),
        Dimension("output_tokens", counts=Counts.OUTPUT),
    ),
    tier="1",
    # As published.  They need not be exact: the headers of the first reply correct them.
    tiers={
        "1": {
            "gpt-*-nano*": {"requests": 500, "tokens": 200_000},
            "gpt-*-mini*": {"requests": 500, "tokens": 500_000},
            "text-embedding-*": {"requests": 3000, "tokens": 1_000_000},
            "*": {"requests": 500, "tokens": 500_000},
        },
        "2": {
            "gpt-*-mini*": {"requests": 5000, "tokens": 2_000_000},
            "gpt-*-nano*": {"requests": 5000, "tokens": 2_000_000},
            "text-embedding-*": {"requests": 5000, "tokens": 1_000_000},
            "*": {"requests": 5000, "tokens": 1_000_000},
        },
        "3": {
            "gpt-*-mini*": {"requests": 5000, "tokens": 4_000_000},
            "gpt-*-nano*": {"requests": 5000, "tokens": 4_000_000},
            "*": {"requests": 5000, "tokens": 2_000_000, "concurrency": 128},
        },
        "4": {
            "gpt-*-mini*": {"requests": 10_000, "tokens": 10_000_000, "concurrency": 256},
            "gpt-*-nano*": {"requests": 10_000, "tokens": 10_000_000, "concurrency": 256},
            "*": {"requests": 10_000, "tokens": 4_000_000, "concurrency": 256},
        },
        "5": {
            "gpt-*-mini*": {"requests": 30_000, "tokens": 180_000_000, "concurrency": 512},
            "gpt-*-nano*": {"requests": 30_000, "tokens": 180_000_000, "concurrency": 512},
            "*": {"requests": 15_000, "tokens": 40_000_000, "concurrency": 512},
        },
    },
    sandbox={"requests": 600_000, "tokens": 600_000_000, "concurrency": 1000},
    # Every name is in the model list of the SDK and has a price; tests/unit/roles/test_models.py checks both.
    # Last reviewed: 2026-11-22.
    models=Models(
        tiers={
            "fast": "gpt-6-luna",  # $0.10 in, $0.50 out per million tokens
            "standard": "gpt-6.1-terra",  # $1 / $5
            "strong": "gpt-6.1-sol",  # $2 / $10
        },
        aliases={
            "gpt-6": "gpt-6.1-sol",
            "gpt-luna": "gpt-6-luna",
            "gpt-terra": "gpt-6.1-terra",
            "gpt-sol": "gpt-6.1-sol",
            "gpt-astra": "gpt-6-astra",  # $10 / $50: for the hardest work only
        },
        pattern=re.compile(r"gpt|chatgpt|o\d|codex|text-"),
        prices="openai",
    ),
    operations={Effect.READ: "summarize embed"},
    step_types=("openai",),
)
