"""Pictures of runs and analyses; they need matplotlib, an optional dependency."""

__all__: list[str] = []
