"""The exceptions meant for people: their text is the whole message, and no traceback is shown."""

UNFINISHED_PREFIX = "nemoflow: unfinished: "
"""How a trainer marks the one line that says why it left before its end, with nothing wrong."""


class NemoflowError(Exception):
    """Bad input or an impossible request: names the file, key or line, what is wrong and what would be right."""


class Unfinished(NemoflowError):
    """Work that left in time and can be gone on with: nothing is wrong, and the same command does it."""


class Died(NemoflowError):
    """A program that came to an end nobody asked for and gave no reason a person could mend: it may go on.

    outcome: "died" or "hung". exclude: nodes that it should not go on on.
    """

    def __init__(self, message: str, outcome: str = "died", exclude: tuple[str, ...] = ()):
        super().__init__(message)
        self.outcome, self.exclude = outcome, exclude


class NotLocked(NemoflowError):
    """A source that no lock file pins yet."""
