"""The one exception for what a user can mend; the scripts turn it into one line on stderr and exit status 2."""


class InputError(ValueError):
    """Something given to us is wrong. The message says what, where, and how to mend it, in one line."""
