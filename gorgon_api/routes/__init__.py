"""One module for each resource of /v1."""
