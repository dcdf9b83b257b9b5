"""Ctrl-C and SIGTERM, held back while the policy is between two consistent states."""

import signal
import threading


class Interruption:
    """While entered, SIGINT raises KeyboardInterrupt and SIGTERM SystemExit(143), but not between hold and release.

    A signal that arrives there is raised by release(); a second one is raised at once. Outside the main thread, where
    Python handles no signals, nothing is changed.
    """

    def __init__(self):
        self.holding = False
        self.pending: BaseException | None = None

    def __enter__(self) -> "Interruption":
        self.previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number, frame) -> None:
        error = KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
        if not self.holding or self.pending:
            raise error
        self.pending = error

    def hold(self) -> None:
        self.holding = True

    def release(self) -> None:
        self.holding = False
        if self.pending:
            raise self.pending
