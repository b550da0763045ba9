"""Errors that a user can cause. Their message is all the user sees: what is wrong, where, and what to do."""


class PipelineError(Exception):
    """The run cannot succeed (exit code 1)."""

    exit_code = 1


class StaleArtefact(PipelineError):
    """A finished file does not match the settings or the inputs of this run."""


class ConfigError(PipelineError):
    """Invalid arguments or configuration (exit code 2)."""

    exit_code = 2


class Stopped(Exception):
    """SIGTERM or SIGUSR2 arrived, and all finished work is saved (exit code 85)."""
