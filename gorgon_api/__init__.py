"""The way in: the REST API, and the sandbox of simulated providers."""
