"""The dashboard: a client of the API for people who never write YAML."""
