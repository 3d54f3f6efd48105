"""Saving a model together with its code, as the Mamba and Mamba-2 classes of this package do."""

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers.modeling_utils import PreTrainedModel


class ExportedWithCode(PreTrainedModel):
    """Base of models whose saved directory loads through every Auto class that their code serves."""

    # Which class of the exported file each Auto class loads; written to config.json beside the code.
    _exported_classes: ClassVar[Mapping[str, str]] = {}

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save weights, configuration and code, so that the directory loads anywhere with `trust_remote_code=True`.

        Takes the arguments of [`~transformers.PreTrainedModel.save_pretrained`].
        """
        if self.is_remote_code():
            self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **self._exported_classes}
        super().save_pretrained(*args, **kwargs)


__all__ = ["ExportedWithCode"]
