"""Models inside peft's `PeftModel`: what they are without adapters, and the cut base saved beside these."""

from hf_compressm.peft.wrapping import (
    effective_weight,
    innermost_module,
    is_wrapped,
    plain_modules,
    underlying,
    wrapped_module,
)


__all__ = ["effective_weight", "innermost_module", "is_wrapped", "plain_modules", "underlying", "wrapped_module"]
