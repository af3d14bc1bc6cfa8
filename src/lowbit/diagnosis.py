"""What the doctor (doctor.py) says: findings about a checkpoint, and a verdict per consumer."""

from collections.abc import Iterable
from dataclasses import dataclass, field

CONSUMERS = ("transformers", "vLLM", "SGLang", "llama.cpp")
SERVERS = ("vLLM", "SGLang")
READERS = ("transformers", *SERVERS)
_SHOWN = 3


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong or worth knowing. hurts: the consumers that fail or go wrong; fixable: by doctor.fix."""

    words: str
    hurts: tuple[str, ...] = ()
    fixable: bool = False


@dataclass
class Diagnosis:
    """All findings about a checkpoint, and what each consumer makes of it."""

    name: str
    method: str
    findings: list[Finding] = field(default_factory=list)
    verdicts: dict[str, str] = field(default_factory=dict)
    surplus: list[str] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        return not any(finding.hurts for finding in self.findings)


def some(names: Iterable[str]) -> str:
    """The first three names, and how many more there are."""
    listed = list(names)
    return ", ".join(listed[:_SHOWN]) + (f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else "")
