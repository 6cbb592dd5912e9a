"""Preemption: a scheduler sends SIGTERM, the run saves itself and says so."""

import os
import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils

# EX_TEMPFAIL of sysexits.h, "try again later": the run is saved, and the same command
# goes on with it. An error ends with 1, as in any Python program.
EXIT_CODE = os.EX_TEMPFAIL


class Preempted(SystemExit):
    """The run was asked to end and is saved; uncaught, the process exits with 75."""

    def __init__(self, step: int):
        super().__init__(EXIT_CODE)
        self.step = step


class Watch:
    """Notices SIGTERM between entering and leaving the context.

    With one process, its signal handler is replaced meanwhile. With several, JAX
    listens since they joined, and lets them agree on the step after which all stop:
    the scheduler may warn one of them alone.
    """

    def __init__(self):
        self._asked = False
        self._former: object = None
        in_main_thread = threading.current_thread() is threading.main_thread()
        self._listens = jax.process_count() == 1 and in_main_thread

    def __enter__(self) -> "Watch":
        if self._listens:
            self._former = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(self, *exception) -> None:
        if self._listens:
            signal.signal(signal.SIGTERM, self._former)  # pyright: ignore

    def _notice(self, signum: int, frame: FrameType | None) -> None:
        del signum, frame
        self._asked = True

    def must_stop(self, step: int) -> bool:
        """Tell whether to stop after this step; ask after every one, everywhere."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked
