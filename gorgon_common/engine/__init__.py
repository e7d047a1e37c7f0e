"""Executes plans.  Imports no broker, database or network library: those are ports."""
