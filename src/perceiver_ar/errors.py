"""The one exception for wrong input; the command line turns it into one clear line and exit status 2."""


class InputError(ValueError):
    """The user's input cannot work. The message names the value, the place and the remedy, in one line."""


def require(ok: bool, message: str) -> None:
    """Raises InputError with `message` unless `ok`."""
    if not ok:
        raise InputError(message)
