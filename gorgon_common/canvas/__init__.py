"""Sends steps through Celery: the application, and plans as chains, groups and chords.  Tasks are named only."""
