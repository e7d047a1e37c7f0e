"""Runs steps: the worker process, and the worker that `gorgon run` embeds."""
