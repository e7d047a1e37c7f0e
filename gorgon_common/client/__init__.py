"""Adapter: the wire models of /v1 and its HTTP client, shared by the server, the CLI and the dashboard."""
