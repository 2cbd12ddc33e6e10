"""A command in a process of its own, started in a moment: forked from a server that has imported and loaded everything.

A fork of a process with threads may wait for ever: its OpenMP counts on workers that the child does not have, and a lock
may be held by nobody. So the suites' own process, whatever ran in it, is never forked. The server is a process started
from nothing that computes with one thread, and refuses to fork with more; its children have the usual number.
"""

import contextlib
import faulthandler
import io
import os
import pickle
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import tqdm

from minidiffedit import StableDiffusion, cli

LONGEST = 180  # seconds of a child, after which it ends with its stack on stderr


class Server:
    """root: a folder with the sound `model`, loaded once, and `in.png`; usual: the arguments of a command on them."""

    def __init__(self, root: Path, usual: Sequence[str]):
        self.socket, theirs = socket.socketpair()
        threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
        job = f"serve({theirs.fileno()}, {str(root)!r}, {list(usual)!r}, {threads})"
        code = f"import sys; sys.path[:] = {sys.path!r}; from fuzz.forked import serve; {job}"
        command = [sys.executable, "-c", code]
        # Out of the terminal's reach: a Ctrl-C is for the suite, whose end the server sees.
        apart = {"start_new_session": True, "stdin": subprocess.DEVNULL, "pass_fds": [theirs.fileno()], "cwd": root}
        alone = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
        self.process = subprocess.Popen(command, env=os.environ | alone, **apart)
        theirs.close()
        self.pipe = self.socket.makefile("rwb")
        self.answer()

    def answer(self) -> int:
        return pickle.load(self.pipe)  # EOFError: the server has said on stderr why it ended

    def start(self, job: object, streams: Sequence[int]) -> int:
        """Process id of a child that does the job: arguments, surroundings, both of what can be pickled."""
        socket.send_fds(self.socket, [b"."], streams)
        pickle.dump(job, self.pipe)
        self.pipe.flush()
        return self.answer()

    def close(self) -> None:
        self.pipe.close()
        self.socket.close()
        self.process.wait()


class Child:
    """argv run by a forked child of the server, its streams through pipes; surroundings: called in it first."""

    def __init__(self, server: Server, argv: Sequence[str], surroundings: Callable[[], object] = os.getpid):
        (out, child_out), (err, child_err) = os.pipe(), os.pipe()
        self.server, self.out, self.err = server, out, err
        self.pid = server.start((os.getcwd(), list(argv), surroundings), (child_out, child_err))
        os.close(child_out)
        os.close(child_err)

    def wait(self) -> tuple[int, str, str]:
        """Exit code (below 0: the signal that ended it), stdout, stderr; a little of each, so no pipe fills up."""
        said = []
        for end in (self.out, self.err):
            with open(end, "rb") as pipe:
                said.append(pipe.read().decode(errors="replace"))
        return self.server.answer(), *said


def serve(number: int, root: str, usual: list[str], threads: int) -> None:
    """One job at a time: its process id is answered, then, when it has ended, its exit code."""
    from .harness import one_model

    tqdm.tqdm.monitor_interval = 0  # its bars start no thread
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # for a child that is not yet the command
    model, work = Path(root) / "model", Path(root) / "server"
    work.mkdir()
    os.link(f"{root}/in.png", work / "in.png")
    os.chdir(work)
    with one_model(model, StableDiffusion.load(model, device="cpu")):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
            # What it imports when it needs it, a child that may read nothing could not.
            assert cli.main(usual) == 0, said.getvalue()
            cli.main(["edit", "in.png", "--target", "a", "--model", "a/b", "--cache-dir", "hub"])  # the hub's imports
        connection = socket.socket(fileno=number)
        with connection, connection.makefile("rwb") as pipe:
            answer(pipe, 0)
            while (request := socket.recv_fds(connection, 1, 2))[0]:
                job, streams = pickle.load(pipe), request[1]
                if sys.platform == "linux" and (many := len(os.listdir("/proc/self/task"))) != 1:
                    raise RuntimeError(f"the server has {many} threads: its children might wait for ever")
                if not (pid := os.fork()):
                    connection.detach()
                    run(job, streams, number, threads)
                for end in streams:
                    os.close(end)
                answer(pipe, pid)
                answer(pipe, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def answer(pipe: io.BufferedRWPair, value: int) -> None:
    pickle.dump(value, pipe)
    pipe.flush()


def run(job: tuple[str, list[str], Callable[[], object]], streams: list[int], number: int, threads: int) -> None:
    """In the child, which does not come back."""
    code = 99
    try:
        for place, end in enumerate(streams, 1):
            os.dup2(end, place)
        for end in (*streams, number):
            os.close(end)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        faulthandler.dump_traceback_later(LONGEST, exit=True)
        torch.set_num_threads(threads)
        folder, argv, surroundings = job
        os.chdir(folder)
        surroundings()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # as Python starts
        code = cli.main(argv)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 98
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
