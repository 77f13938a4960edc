"""What can go wrong, drawn as one tree.

An exception means "could not judge". A bad judgement is a value (`parity.verdict.Verdict`), never an exception.

ParityError
├── ConfigError         the user's files or options are wrong
├── ProvisionError      an environment or a model could not be provided
├── EngineError         the engine could not run: crash, hang, out of memory, wrong answer format
├── RecordingError      a recording cannot be read: truncated, edited, newer schema
├── IncomparableError   two recordings must not be compared
└── GoldenMissingError  there is nothing to compare with

Every message is one sentence: what, where, both values, what to do. The command line prints it and exits with 2.
"""


class ParityError(Exception):
    """Anything that keeps parity from judging."""


class ConfigError(ParityError):
    """The user's files or options are wrong."""


class ProvisionError(ParityError):
    """An environment or a model could not be provided."""


class EngineError(ParityError):
    """The engine could not run."""


class RecordingError(ParityError):
    """A recording cannot be read."""


class IncomparableError(ParityError):
    """Two recordings must not be compared."""


class GoldenMissingError(ParityError):
    """There is nothing to compare with."""
