"""The one exception meant for people: its text is the whole message, and no traceback is shown."""


class NemoflowError(Exception):
    """Bad input or an impossible request: names the file, key or line, what is wrong and what would be right."""
