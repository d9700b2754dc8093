"""Models and tokenizers: loading, sampling, merging adapters."""
