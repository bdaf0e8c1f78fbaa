"""What a user can put right, in a message rather than a traceback."""


class UsageError(Exception):
    """Something the user can put right: the tools show it as one message."""


class CheckpointError(UsageError):
    """A checkpoint that cannot be found, downloaded or read safely."""
