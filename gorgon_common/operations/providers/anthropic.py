"""Anthropic."""

from __future__ import annotations

import re

from gorgon_common import queues
from gorgon_common.operations.dimensions import DAY, Counts, Dimension, Header
from gorgon_common.operations.effects import Effect
from gorgon_common.operations.providers.descriptor import Models, Provider, Server


def _header(word: str) -> Header:
    stem = f"anthropic-ratelimit-{word}"
    return Header(f"{stem}-limit", f"{stem}-remaining", f"{stem}-reset", moment=True)


ANTHROPIC = Provider(
    name="anthropic",
    title="Anthropic",
    queue=queues.ANTHROPIC,
    client="gorgon_worker.providers.anthropic:AnthropicProvider",
    server=Server(
        host="anthropic.com",
        key_setting="anthropic_api_key",
        key_variable="ANTHROPIC_API_KEY",
        url_setting="anthropic_base_url",
        url_variable="ANTHROPIC_BASE_URL",
        example="https://…, without /v1",
        headers=("anthropic-ratelimit-",),
    ),
    # The headers also report `tokens`: the sum of the two limits that are reported themselves.
    dimensions=(
        Dimension("requests", whole=1, header=_header("requests")),
        Dimension("requests_per_day", DAY, whole=1),
        Dimension("tokens", counts=Counts.TOKENS),
        Dimension("input_tokens", counts=Counts.UNCACHED_INPUT, header=_header("input-tokens")),
        Dimension("output_tokens", counts=Counts.OUTPUT, header=_header("output-tokens")),
    ),
    tier="1",
    # As published.  They need not be exact: the headers of the first reply correct them.
    tiers={
        "1": {
            "*haiku*": {"requests": 50, "input_tokens": 50_000, "output_tokens": 10_000},
            "*": {"requests": 50, "input_tokens": 30_000, "output_tokens": 8000},
        },
        "2": {"*": {"requests": 1000, "input_tokens": 450_000, "output_tokens": 90_000}},
        "3": {
            "*haiku*": {"requests": 2000, "input_tokens": 1_000_000, "output_tokens": 200_000, "concurrency": 128},
            "*": {"requests": 2000, "input_tokens": 800_000, "output_tokens": 160_000, "concurrency": 128},
        },
        "4": {
            "*haiku*": {"requests": 4000, "input_tokens": 4_000_000, "output_tokens": 800_000, "concurrency": 256},
            "*": {"requests": 4000, "input_tokens": 2_000_000, "output_tokens": 400_000, "concurrency": 256},
        },
    },
    sandbox={"requests": 600_000, "input_tokens": 400_000_000, "output_tokens": 100_000_000, "concurrency": 1000},
    # Every name is in the model list of the SDK and has a price; tests/unit/roles/test_models.py checks both.
    # Last reviewed: 2026-11-22.
    models=Models(
        tiers={
            "fast": "claude-haiku-5-5",  # $0.10 in, $0.50 out per million tokens (short prompts)
            "standard": "claude-sonnet-5-5",  # $2 / $10
            "strong": "claude-opus-5-5",  # $4 / $20
        },
        aliases={
            "claude": "claude-sonnet-5-5",
            "claude-haiku": "claude-haiku-5-5",
            "claude-sonnet": "claude-sonnet-5-5",
            "claude-opus": "claude-opus-5-5",
            "claude-fable": "claude-fable-5-2",  # $8 / $40: for the hardest work only
        },
        pattern=re.compile("claude"),
        prices="anthropic",
    ),
    operations={Effect.READ: "summarize"},
    step_types=("claude_code", "claude", "anthropic"),
)
