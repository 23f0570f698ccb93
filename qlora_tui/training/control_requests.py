"""Requests to a running trainer: files in ``control/``, and the signals SIGTERM and SIGINT."""

from __future__ import annotations

import signal

from qlora_tui.runs import control
from qlora_tui.runs.control import ControlRequest, Kind
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.events import RequestReceived
from qlora_tui.runs.holds import Hold
from qlora_tui.training.distributed import DistributedContext
from qlora_tui.training.reporter import Reporter


class ControlRequests:
    """Requests to a running trainer. All wait for the end of the step, except an immediate stop or pause."""

    def __init__(self, run: RunDir, reporter: Reporter, dist: DistributedContext) -> None:
        self._run = run
        self._dist = dist
        self._reporter = reporter
        self._pending: list[ControlRequest] = []
        self._terminated = False
        self.is_terminated = False
        """Whether a termination signal has arrived. It stays True after the signal has become a request."""

    def listen_to_signals(self) -> None:
        """Treat SIGTERM and SIGINT as requests to stop; if a signal is repeated, it ends the process at once.

        In a Slurm job these signals end the job but not the run. They request a pause that does not wait for
        the end of the step, and repeated signals are ignored. SIGHUP is always ignored.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def poll(self) -> None:
        """Read new requests and report them as events. All processes of a run must call this together."""
        new = self._dist.broadcast(self._read_new() if self._dist.is_main_process else [])
        for request in new:
            self._reporter.emit(RequestReceived(request=request.kind, value=request.value))
            self._reporter.log(
                f"requested: {request.kind}{'' if request.value is None else f' {request.value:g}'}"
            )
        self._pending += new

    @property
    def hold(self) -> Hold | None:
        """Return why a pause is pending; None if the user requested the pause, or if none is pending."""
        pauses = [request for request in self._pending if request.kind in ("pause", "pause_now")]
        return pauses[-1].hold if pauses and all(request.hold for request in pauses) else None

    @property
    def ends_now(self) -> bool:
        """Return whether a request is pending that ends the run without finishing the step or evaluation."""
        return any(request.kind in ("stop_now", "pause_now") for request in self._pending)

    def take(self, kind: Kind) -> ControlRequest | None:
        """Remove and return the last pending request of a kind; earlier ones of that kind are dropped."""
        matching = [request for request in self._pending if request.kind == kind]
        self._pending = [request for request in self._pending if request.kind != kind]
        return matching[-1] if matching else None

    def stop_kind(self) -> Kind | None:
        """Return ``stop`` if a stop is pending, otherwise ``pause`` if a pause is pending; None without
        either. The request is not removed.
        """
        kinds = {request.kind for request in self._pending}
        pauses = {"pause", "pause_now"} & kinds
        return "stop" if {"stop", "stop_now"} & kinds else "pause" if pauses else None

    def poll_if_alone(self) -> None:
        """Poll if the run has a single process; several processes would have to call this together."""
        if self._dist.world_size == 1:
            self.poll()

    def raise_if_stop_now(self) -> None:
        """Raise StepAbandoned if a pending request ends the run without finishing the step.

        With several processes, a new request takes effect only after the next common poll, because all
        processes must leave the step at the same place.
        """
        self.poll_if_alone()
        if self.ends_now:
            raise StepAbandoned

    def raise_if_stop_requested(self) -> None:
        """Poll, and raise StopRequested if a stop or pause is pending; used before the first step."""
        self.poll()
        kind = self.stop_kind()
        if kind is not None:
            raise StopRequested(kind)

    def _read_new(self) -> list[ControlRequest]:
        requests = control.take_requests(self._run)
        if self._terminated:
            self._terminated = False
            if self._run.slurm_path.exists():
                requests.append(ControlRequest(kind="pause_now", hold=Hold(cause="limit")))
            else:
                requests.append(ControlRequest(kind="stop"))
        return requests

    def _on_signal(self, number: int, frame: object) -> None:
        self._terminated = self.is_terminated = True
        # On a cluster Slurm and torchrun may each send a signal.
        signal.signal(number, signal.SIG_IGN if self._run.slurm_path.exists() else signal.SIG_DFL)


class StepAbandoned(Exception):
    """Raised if a requested stop or pause does not wait for the end of the step or evaluation."""


class StopRequested(Exception):
    """Raised if a stop or pause was requested before the first step."""

    def __init__(self, kind: Kind) -> None:
        super().__init__(kind)
        self.kind = kind
