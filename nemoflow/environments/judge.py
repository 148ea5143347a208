"""The judge: rewards of answers, by a process of its own for each environment.

A verifier may raise, hang, or give no number. What becomes of such an answer is the environment's `on_error`: the run
stops with one clear line, or the answer is left unjudged, and counted. It is never a silent zero. A hanging verifier is
killed and started anew.
"""

import ctypes
import math
import multiprocessing
import multiprocessing.connection
import signal
import time
from collections import Counter, deque
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from nemoflow.environments import Environment, check_settings, verifier
from nemoflow.errors import NemoflowError
from nemoflow.progress import seconds

START_SECONDS = 120.0
"""For a process to start and to import its verifier."""


class Judge:
    """Environments with their processes; to be closed.

    environments: agent -> {"verifier", "settings", "timeout", "on_error", "max_skipped"}, the defaults of `Environment`
    left out. skipped: agent -> answers left unjudged so far.

    Raises NemoflowError for a verifier that is not there, or does not take its settings.
    """

    def __init__(self, environments: dict[str, dict]):
        self.environments = {
            agent: Environment.model_validate({"agent": agent} | settings) for agent, settings in environments.items()
        }
        for agent, environment in self.environments.items():
            try:
                check_settings(verifier(environment.verifier), environment.settings)
            except NemoflowError as error:
                raise NemoflowError(f"environment of {agent}: {error}") from None
        self.skipped: Counter[str] = Counter()
        self._workers = {agent: _Worker(environment) for agent, environment in self.environments.items()}

    def __enter__(self) -> "Judge":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers.values():
            worker.kill()

    def rewards(self, answers: Sequence[str], rows: Sequence[dict]) -> list[float | None]:
        """The reward of each answer to its row; None where it was left unjudged. The environments work side by side.

        Raises NemoflowError naming environment, prompt and answer where the run has to stop.
        """
        rewards: list[float | None] = [None] * len(rows)
        waiting: dict[str, deque[int]] = {}
        for i, row in enumerate(rows):
            waiting.setdefault(row["agent_ref"]["name"], deque()).append(i)
        skipped: dict[str, list[str]] = {}
        under_way: dict[Any, tuple[str, int, float]] = {}

        def ask(agent: str) -> None:
            if waiting[agent]:
                i, worker = waiting[agent].popleft(), self._workers[agent]
                worker.send(answers[i], rows[i])
                under_way[worker.connection] = agent, i, time.monotonic() + worker.timeout

        for agent in waiting:
            ask(agent)
        while under_way:
            first = min(deadline for _, _, deadline in under_way.values())
            ready = multiprocessing.connection.wait(list(under_way), max(0.0, first - time.monotonic()))
            now = time.monotonic()
            for connection in ready or [c for c, (_, _, deadline) in under_way.items() if deadline <= now]:
                agent, i, _ = under_way.pop(connection)
                worker = self._workers[agent]
                rewards[i], wrong = worker.receive() if ready else worker.hung()
                if wrong:
                    skipped.setdefault(agent, []).append(wrong)
                    if self.environments[agent].on_error == "stop":
                        raise NemoflowError(
                            f"environment of {agent}: {wrong}, when it judged the answer {_shown(answers[i])} to "
                            f"{_shown(rows[i]['responses_create_params']['input'][-1].get('content'))}; mend it, or "
                            "write on_error: skip"
                        )
                ask(agent)
        for agent, wrongs in skipped.items():
            self.skipped[agent] += len(wrongs)
            allowed = Fraction(self.environments[agent].max_skipped)
            if len(wrongs) > allowed * len(rows):
                raise NemoflowError(
                    f"environment of {agent}: could not judge {len(wrongs)} of the {len(rows)} answers of a step, more "
                    f"than max_skipped allows ({allowed}); the last time: {wrongs[-1]}"
                )
        return rewards


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


class _Worker:
    """The process of one environment."""

    def __init__(self, environment: Environment):
        self.environment = environment
        self.timeout = seconds(environment.timeout)
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        arguments = theirs, self.environment.verifier, self.environment.settings
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.ready = False

    def send(self, answer: str, row: dict) -> None:
        if not self.ready:
            try:
                if not self.connection.poll(START_SECONDS):
                    raise EOFError
                self.connection.recv()
            except EOFError:
                self.kill()
                raise NemoflowError(
                    f"environment of {self.environment.agent}: the process of its verifier could not be started"
                ) from None
            self.ready = True
        self.connection.send((answer, row))

    def receive(self) -> tuple[float | None, str | None]:
        """The reward, or None and what went wrong."""
        try:
            value, wrong = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(5)
            code = self.process.exitcode
            self.kill()
            self._start()
            return None, f"its process died ({'signal' if code and code < 0 else 'exit code'} {abs(code or 0)})"
        return value, wrong

    def hung(self) -> tuple[None, str]:
        """What to say of a verifier that took too long; it is started anew."""
        self.kill()
        self._start()
        return None, f"it took more than {self.environment.timeout}"

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(connection: Any, name: str, settings: dict) -> None:
    """The process: judges what comes until the other end is gone, and does not outlive it."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):  # Linux: also while it hangs
        libc.prctl(1, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    judge = verifier(name)
    connection.send("ready")
    while True:
        try:
            answer, row = connection.recv()
        except EOFError:
            return
        try:
            value = judge(answer, row, **settings)
            if isinstance(value, int | float) and math.isfinite(value):
                connection.send((float(value), None))
            else:
                connection.send((None, f"it gave {_shown(value)}, no finite number"))
        except Exception as error:
            connection.send((None, f"it raised {type(error).__name__}: {_shown(str(error))}"))
