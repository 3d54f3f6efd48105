"""Files on the disk: written whole or not at all, the shapes and tensors in them, and their names."""

__all__: list[str] = []
