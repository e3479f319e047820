"""The errors a user is meant to read: one line that names the file, key or value and how to mend it."""


class OspError(Exception):
    """An error in the user's files or machine; the command ends with exit code 1."""

    exit_code = 1


class UsageError(OspError):
    """An error in the user's command or configuration; the command ends with exit code 2."""

    exit_code = 2


class Stopped(OspError):
    """Somebody ended the work before it was done; nothing is wrong, and what worked on it can be used again."""


class DataError(OspError):
    """A file or folder that cannot be read, or holds nothing that can."""


class NotFiniteError(OspError):
    """A model gives numbers that are not finite, of which nothing can be made."""
