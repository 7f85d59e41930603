"""The root of all errors that the person at the keyboard can mend."""


class InputError(ValueError):
    """Something given to the program (a file, a field, a checkpoint) cannot be used; the message says which and why."""


class Interrupted(InputError):
    """Ctrl-C; the message says what had been done, and where it is kept."""


class WeightsError(InputError):
    """A file of weights that cannot be used; the message names it and everything in it that does not fit."""
