"""One cut of a live model: everything is prepared first, and then put in place at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_compressm.families import AttributeChange, LayerCut, SSMLayer
from hf_compressm.models import adopt
from hf_compressm.peft import underlying
from hf_compressm.peft.saved_base import keep_base_beside
from hf_compressm.surgery.caches import refuse_stale_caches
from hf_compressm.surgery.compiled import forget_compiled_graphs
from hf_compressm.surgery.configuration import Copies
from hf_compressm.surgery.mapping import carry_gradients
from hf_compressm.surgery.optimizer import OptimizerPlan, commit_optimizer, prepare_optimizer
from hf_compressm.surgery.parameters import (
    Addition,
    Replacement,
    commit_replacements,
    prepare_additions,
    prepare_replacements,
)


@dataclass(frozen=True, eq=False)
class Operation:
    """New parameters, moments and attributes of a model, checked but not yet in place.

    Attributes:
        model: the model to cut.
        layers: the layers to cut.
        replacements: parameters about to be replaced.
        additions: parameters about to appear.
        attributes: plain attributes and buffers that follow.
        optimizer: what its optimizer becomes; None without an optimizer.
    """

    model: nn.Module
    layers: tuple[SSMLayer, ...]
    replacements: list[Replacement]
    additions: list[Addition]
    attributes: list[AttributeChange]
    optimizer: OptimizerPlan | None

    @classmethod
    def prepare(
        cls, model: nn.Module, cuts: Sequence[tuple[SSMLayer, LayerCut]], optimizer: Any = None, policy: str = "carry"
    ) -> "Operation":
        """Build every new tensor without touching model or optimizer.

        Args:
            model: the model that the layers belong to.
            cuts: the layers, each with what its cut writes.
            optimizer: the optimizer that trains the model, if any.
            policy: `"carry"` the moments of cut parameters over, or `"reset"` them.

        Raises:
            ValueError: as in `prepare_replacements`, `prepare_additions` and `prepare_optimizer`.
        """
        replacements = prepare_replacements(model, [change for _, cut in cuts for change in cut.changes])
        carry_gradients(replacements)
        additions = prepare_additions([addition for _, cut in cuts for addition in cut.additions])
        plan = prepare_optimizer(optimizer, model, replacements, policy, additions) if optimizer else None
        attributes = [attribute for _, cut in cuts for attribute in cut.attributes]
        return cls(model, tuple(layer for layer, _ in cuts), replacements, additions, attributes, plan)

    def new_tensors(self) -> list[Tensor]:
        """Parameters and moments about to be put in place, in an order that is the same in all processes."""
        moments = self.optimizer.new_tensors() if self.optimizer is not None else []
        return [*(item.new for item in self.replacements), *(item.new for item in self.additions), *moments]

    def commit(self, configs: Copies | None = None, adopts: bool = False) -> None:
        """Put everything in place; a `Snapshot` from before can undo it.

        Args:
            configs: the model's configurations with their new sizes; None leaves the present ones unchanged.
            adopts: whether a stock model moves into this package's class.
        """
        if self.layers:
            keep_base_beside(self.model)
        if configs is not None:
            configs.commit()
        if adopts:
            adopt(underlying(self.model))
        commit_replacements(self.replacements, self.attributes, self.additions)
        if self.optimizer is not None:
            commit_optimizer(self.optimizer)
        for layer in self.layers:
            refuse_stale_caches(layer)
        if self.layers:
            forget_compiled_graphs()
