"""The one exception that ends in a line for the user instead of a traceback."""


class NeuronMergingError(Exception):
    """Something the user can mend: one line that says what is wrong and what to do. `main.py` prints it and exits with 2."""


def reason(error: Exception) -> str:
    """What an exception of other code says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]
