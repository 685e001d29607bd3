"""The door through which every command gets its language model: our GPT-2, or any causal model of transformers."""
