"""The only package that contains SQL: SQLite and PostgreSQL behind one store."""

from gorgon_common.persistence.migrate import upgrade

__all__ = ["upgrade"]
