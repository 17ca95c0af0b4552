"""The root of the exceptions that say, in one sentence, what is wrong with what was given."""


class InputError(ValueError):
    """Something given to the package cannot be used; the message says why and what to do.

    The command line prints it as one line and ends with exit code 2.
    """
