"""The base of the trainer's errors: a module of its own, so that the command line knows them without torch."""


class TrainerError(Exception):
    """An error whose message says what to do: the command line shows it without a traceback."""
