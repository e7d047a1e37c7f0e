"""What is known of the providers, for the command line and the API.  Needs no database."""

from __future__ import annotations

from gorgon_common.operations.providers import MODEL_PROVIDERS, PROVIDERS, SERVERS

__all__ = ["MODEL_PROVIDERS", "PROVIDERS", "SERVERS"]
