"""Errors a user can act on: each message says what was expected, what came and how to fix it."""

from __future__ import annotations


class Svd2Error(Exception):
    """Base of all errors raised on purpose; the command line prints its message as one line."""


class ConfigError(Svd2Error):
    """A setting is unknown, out of range or contradicts another one."""


class ConversionError(Svd2Error):
    """A checkpoint cannot be read or does not hold what the model needs."""


class CheckpointError(Svd2Error):
    """A converted checkpoint is missing, unfinished or of another format."""


class MediaError(Svd2Error):
    """A video, a picture or a report cannot be read or written."""


class SessionError(Svd2Error):
    """A session was given something it cannot take (wrong frame shape, empty prompt, closed session)."""


class EngineError(Svd2Error):
    """The device side failed."""
