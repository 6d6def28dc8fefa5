"""Errors that end a program with an exit code and one sentence on stderr. Any other exception keeps its traceback."""

import errno
import sys

# errors of a file that may not be read or written, and of a full disk
REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT}


class Exit(Exception):
    """Ends a program. str(error): the sentence; code: the exit code."""

    code = 1


class UserError(Exit):
    """A flag or an input is wrong. The sentence names it, and says what would be right."""

    code = 2


class NotFinite(Exit):
    """A loss, a gradient or a weight is NaN or infinite; nothing was updated or saved."""

    code = 3


class NoCheckpoint(Exit):
    """There were checkpoints, and none of them can be used."""

    code = 4


class Disagreement(Exit):
    """The ranks are not doing the same thing, or one is lost; nothing was updated."""

    code = 5


class Stopped(Exit):
    """A signal ended the run; its state is saved."""

    code = 75


def guard(name, main):
    """Call main() as the command `name`. An Exit becomes its sentence on stderr and its exit code. A file that may not
    be read or written and a full disk end it with one sentence and 2, Ctrl-C with 130."""
    try:
        return main()
    except Exit as error:
        code, sentence = error.code, str(error)
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        code, sentence = UserError.code, f"{error.filename or 'the disk'}: {error.strerror}"
    except KeyboardInterrupt:
        code, sentence = 130, "interrupted"
    print(f"{name if name.endswith('.py') else f'python -m {name}'}: {sentence}", file=sys.stderr)
    sys.exit(code)
