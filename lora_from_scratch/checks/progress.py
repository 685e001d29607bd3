"""What a learner has done. (first version; owned by the notebook helper)"""

from __future__ import annotations

from lora_from_scratch.checks.verdict import Verdict


class Progress:
    @classmethod
    def load(cls) -> Progress:
        return cls()

    def record(self, verdict: Verdict) -> None: ...

    def open_hint(self, name: str, of: int) -> int:
        return 1
