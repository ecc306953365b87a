"""The one exception that a user is meant to read."""


class UserError(Exception):
    """Something the user can mend: the message names the thing and the mend, on one line.

    It ends the program with exit code 2 and without a traceback. Anything else that is raised is
    a defect of megamed and keeps its traceback.

    Args:
        message: one line; what is wrong, where, and what to do.
        everywhere: every rank runs into the same error (a wrong config key, say), so one rank's
            line is enough. Otherwise each failing rank says its own.
    """

    def __init__(self, message: str, *, everywhere: bool = False):
        super().__init__(" ".join(message.split()))
        self.everywhere = everywhere
