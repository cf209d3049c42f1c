"""Mistakes that one line can explain."""


class UserError(Exception):
    """Something the user can mend: the command line prints it on one line and exits with 2."""
