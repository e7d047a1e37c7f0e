"""The limiter: decides for all processes together when a call to a provider may be made.  See docs/limits.md.

`limiter.lua` decides in Redis; `decisions` decides in Python, for SQLite and for a worker without Redis.  One suite
of tests checks that both give the same answers.
"""
