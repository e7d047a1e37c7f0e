"""The limiter: who may call a provider, when, for all processes together.  See docs/limits.md.

`limiter.lua` decides in Redis, `gate` in Python for SQLite and for a worker on its own; one suite holds both to the
same answers.
"""
