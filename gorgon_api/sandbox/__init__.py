"""Simulated model providers over HTTP, for running the real SDKs offline.

The sandbox is a separate process (`python -m gorgon_api.sandbox`) and imports nothing of the rest of Gorgon, so that it
cannot share a mistake with the code that it is used to test.  docs/sandbox.md describes its use.
"""
