"""Runs steps: the worker process, and the one that `gorgon run` embeds."""
