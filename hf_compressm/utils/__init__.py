"""Helpers that every room may use: processes, checks of values, random generators, threads and lazy imports."""

__all__: list[str] = []
