"""The methods of fine-tuning: `method` is the protocol, `registry` finds the methods, and each method is one file.

The folders that the environment variable LORA_FROM_SCRATCH_METHODS names are searched too, as if their files were here.
"""

import os

__path__ += [folder for folder in os.environ.get("LORA_FROM_SCRATCH_METHODS", "").split(os.pathsep) if folder]
