"""The bank of wrong and right answers, one file a unit. `lora_from_scratch.checks.bank` says how to add to it."""
