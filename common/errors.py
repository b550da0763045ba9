"""The errors that a user can cause. Their text is all that the user sees: what, where, and what to do."""


class PipelineError(Exception):
    """The work cannot be done (exit code 1)."""

    exit_code = 1


class StaleArtefact(PipelineError):
    """A finished file does not match the settings or the inputs of this run."""


class ConfigError(PipelineError):
    """The arguments or the configuration cannot be used (exit code 2)."""

    exit_code = 2


class Stopped(Exception):
    """SIGTERM or SIGUSR2 arrived, and everything that is finished has been saved (exit code 85)."""
