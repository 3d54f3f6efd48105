"""Models inside peft's `PeftModel`: the model without its adapters, and the cut base saved beside them."""

from hf_compressm.peft.wrapping import (
    effective_weight,
    innermost_module,
    is_wrapped,
    plain_modules,
    underlying,
    wrapped_module,
)


__all__ = ["effective_weight", "innermost_module", "is_wrapped", "plain_modules", "underlying", "wrapped_module"]
