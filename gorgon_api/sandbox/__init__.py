"""Simulated model providers over HTTP, for running the real SDKs offline.

Started as a process of its own (`python -m gorgon_api.sandbox`) and importing nothing of the rest, so that it cannot
share a mistake with what it is used to test.  docs/sandbox.md says how to use it.
"""
