"""The base of the trainer's errors: a module of its own, so that the command line knows them without torch."""


class TrainerError(Exception):
    """An error whose message says what to do: the command line shows it without a traceback."""


class TrainingError(TrainerError):
    """A training that cannot go on."""


class InterruptedTrainingError(TrainingError):
    """A training that somebody stopped: what is kept of it, and how to go on."""

    def __init__(self, kept: str, how: str = "go on with --resume") -> None:
        super().__init__(f"interrupted; {how} ({kept})")
        self.kept = kept
