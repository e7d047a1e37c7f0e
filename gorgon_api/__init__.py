"""The REST API, and the sandbox that simulates providers."""
