"""What every room may use: processes, checks of values, random generators, threads, and names imported lazily."""

__all__: list[str] = []
