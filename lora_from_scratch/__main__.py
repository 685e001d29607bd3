"""`python -m lora_from_scratch` runs the command `lora-from-scratch`."""

import sys

from lora_from_scratch.cli import main

sys.exit(main())
