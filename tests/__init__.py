"""The tests mirror the package: `tests/numerics` tests `hf_compressm/numerics`, and so on."""
