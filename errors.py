"""The one exception that ends in a line for the user instead of a traceback."""


class NeuronMergingError(Exception):
    """Something the user can mend: one line that says what is wrong and what to do. `main.py` prints it and exits with 2."""
