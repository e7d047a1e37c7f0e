"""Reads for people and programs: runs, steps, costs, and why a run waits.  They return data; `application` words it."""
