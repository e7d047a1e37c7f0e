"""Benchmarks: each is one command that prints its figures, with the machine and the versions, and fails where a target
is missed.  See bench/README.md.
"""
