"""A model in which some layers are already as cuts make them, while it is itself left as it is."""

from collections.abc import Iterator
from contextlib import contextmanager

from hf_compressm.families.family import LayerCut, SSMLayer
from hf_compressm.families.running import with_cut


@contextmanager
def standing_in(layer: SSMLayer, cut: LayerCut) -> Iterator[None]:
    """Let a layer give what it would give after a cut meanwhile; none of its parameters changes.

    Args:
        layer: the layer, whose model is run inside.
        cut: what the cut would write.
    """
    module = layer.module
    own = {name: value for name, value in vars(module).items() if name == "forward"}  # where somebody has replaced it
    module.forward = with_cut(layer, cut).module.forward
    try:
        yield
    finally:
        del module.forward
        vars(module).update(own)
