"""The errors a user can mend. Each message names the offending key, file or shard and says what to do."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user gave is wrong; the command line prints the message without a traceback."""


class ConfigError(UserError):
    """A recipe or an override is wrong."""


class DataError(UserError):
    """A shard, a sample or a caption is wrong, or there are none."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, unsafe, or belongs to another recipe."""


class TrainingError(UserError):
    """Training cannot go on: a non-finite loss, or no space left for a checkpoint."""


class LostError(TrainingError):
    """Another process is gone. Nothing is wrong with what the user gave: run again."""


class ExportError(UserError):
    """A checkpoint cannot be brought to another library, or came out different there."""
