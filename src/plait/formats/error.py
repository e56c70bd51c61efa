"""The one error of this room: a checkpoint that cannot be read or written as asked."""


class CheckpointError(ValueError):
    """A checkpoint is broken, incomplete or inexpressible; the message names file, tensor or field, and the fix."""
