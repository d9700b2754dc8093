"""Models and tokenizers: loading, sampling from them, merging adapters."""
