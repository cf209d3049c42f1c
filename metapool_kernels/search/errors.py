"""Mistakes that one line can explain."""


class UserError(Exception):
    """Something the user can mend: the command line prints it on one line and exits with 2."""


class OwnError(UserError):
    """One that only this of several processes has met, and so has to tell by itself."""


class ToldError(UserError):
    """One that the main process tells for all."""
