"""The two errors a user can meet; the commands turn them into one line and an exit code."""


class UserError(Exception):
    """Bad input or a failed run (exit code 1). The message is one line naming file, record, field or flag."""


class UsageError(UserError):
    """A wrong flag or config key, type or value (exit code 2). The message names it and what was expected."""
