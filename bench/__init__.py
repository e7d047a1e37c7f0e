"""Benchmarks.  Each is one command that prints its figures, with the machine and the versions, and fails if a target is
missed.  See bench/README.md.
"""
