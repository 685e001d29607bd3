"""Loading and saving language models: the GPT-2 of this package, or any causal language model of transformers."""
