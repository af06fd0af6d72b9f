"""XLA's flags of tests, which compile for long what runs for milliseconds. Imports no JAX."""

# Half the time without LLVM's efforts
XLA_FLAGS = "--xla_llvm_disable_expensive_passes=true --xla_backend_optimization_level=0"
