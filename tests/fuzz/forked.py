"""A command in a process of its own, started in a moment: forked from this one, where torch is imported already."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence

from minidiffedit import cli


class Child:
    """argv run by a forked child, its streams through pipes; surroundings: called in it first."""

    def __init__(self, argv: Sequence[str], surroundings: Callable[[], object] = lambda: None):
        (out, child_out), (err, child_err) = os.pipe(), os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            for number, end in ((1, child_out), (2, child_err)):
                os.dup2(end, number)
            for end in (out, err, child_out, child_err):
                os.close(end)
            self.run(argv, surroundings)
        os.close(child_out)
        os.close(child_err)
        self.out, self.err = out, err

    def run(self, argv: Sequence[str], surroundings: Callable[[], object]) -> None:
        code = 99
        try:
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
            surroundings()
            code = cli.main(list(argv))
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 98
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def wait(self) -> tuple[int, str, str]:
        """Exit code (below 0: the signal that ended it), stdout, stderr; a little of each, so no pipe fills up."""
        said = []
        for end in (self.out, self.err):
            with open(end, "rb") as pipe:
                said.append(pipe.read().decode(errors="replace"))
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), *said
