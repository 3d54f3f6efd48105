"""Files on the disk: atomic writing, the shapes and tensors of saved models, and file names."""

__all__: list[str] = []
