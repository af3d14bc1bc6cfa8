"""lowbit's exceptions.

LowbitError(ValueError)
|-- InputError         the user gave something that cannot work; the message says what to do   (exit code 2)
|   |-- MethodError    a method that does not apply to the model at hand
|   |-- SchemeError    a scheme's text or its fit to a layer
|   `-- CheckpointError  a file that is missing, truncated or holds the wrong thing
|-- TrainingError      training diverged; the last good checkpoint is named                     (exit code 2)
`-- GateError          everything ran, and a limit that was asked for does not hold            (exit code 3)
"""


class LowbitError(ValueError):
    """The root of lowbit's exceptions."""


class InputError(LowbitError):
    """Something that the user gave cannot work."""


class MethodError(InputError):
    """A method that does not apply to the model at hand; it may be left half changed."""


class SchemeError(InputError):
    """A scheme that does not parse or does not fit a layer."""


class CheckpointError(InputError):
    """A checkpoint that is missing, truncated or holds the wrong thing."""


class GateError(LowbitError):
    """A limit that was asked for does not hold."""


class TrainingError(LowbitError):
    """Training diverged; what was saved before stays."""
