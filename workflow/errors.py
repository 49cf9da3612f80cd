"""Every error that `workflow` raises on purpose.

    WorkflowError
      StepFailed        (step, type_name, message, attempts) a step failed for good; the same live and on replay
      OutcomeUnknown    (step) a step that may not be repeated was begun, and nobody knows whether it ended
      Fatal             raised by a step or a flow: do not try again
      Diverged          (id, reason) the code does not do what the record says it did
      RunFailed         (id, status, type_name, message) what `Run.result()` raises for a run that did not end well
      Conflict          (id) the id belongs to a run with other input
      Refused           (id, reason) a request that the owner did not accept
      NotJSON           (what, reason) a value that cannot be recorded
      BadId             (id) not a usable id
      MissingObject     (sha256, where) bytes that a record refers to are gone
      Unreadable        (path, reason) an instance file is damaged, foreign, or from a newer version
      FolderInUse       (folder) another engine owns it
      HostInUse         (host, url, owner, until) an engine elsewhere runs this host's runs
      NotOwner          (what, why) this engine may not go on: the lease is over, or a run is another host's
      Elsewhere         (id, owner) a run is another host's
      NeedsReplica      (what) durability="replicated" without a replica
      ForkRefused       (id, reason)
    Cancelled           BaseException: the run was cancelled; raised once
    Parked              BaseException: the run leaves memory until what it waits for is there

The last two are no `Exception`s, so that `except Exception` in a flow does not swallow them. Facts are attributes, `hint` says what to do next.
"""

from __future__ import annotations

__all__ = [
    "BadId",
    "Cancelled",
    "Conflict",
    "Diverged",
    "Elsewhere",
    "Fatal",
    "FolderInUse",
    "ForkRefused",
    "HostInUse",
    "MissingObject",
    "NeedsReplica",
    "NotJSON",
    "NotOwner",
    "OutcomeUnknown",
    "Parked",
    "Refused",
    "RunFailed",
    "StepFailed",
    "Unreadable",
    "WorkflowError",
]


class WorkflowError(Exception):
    """Base of all."""

    hint = ""


class StepFailed(WorkflowError):
    """A step failed for good. `__cause__` is the original error, when this is raised live and not on replay."""

    def __init__(self, step: str, type_name: str, message: str, attempts: int) -> None:
        self.step, self.type_name, self.message, self.attempts = step, type_name, message, attempts
        super().__init__(f"step {step} failed after {attempts} attempt{'s' if attempts != 1 else ''}: {type_name}: {message}")

    def __reduce__(self) -> tuple[type[StepFailed], tuple[str, str, str, int]]:
        return StepFailed, (self.step, self.type_name, self.message, self.attempts)


class OutcomeUnknown(WorkflowError):
    """A step with `repeat=False` was begun, and timed out, was cancelled, or its process died. Raised on every replay."""

    def __init__(self, step: str, why: str) -> None:
        self.step, self.why = step, why
        super().__init__(f"outcome of step {step} is unknown: {why}")


class Fatal(WorkflowError):
    """Raise it in a step to end its retries, or in a flow to end the run as failed."""


class Diverged(WorkflowError):
    """The code did something else than the record says. Nothing was run past that point."""

    hint = "run the code that made the record, guard the change with patched(), or fork the run"

    def __init__(self, id: str, reason: str) -> None:
        self.id, self.reason = id, reason
        super().__init__(f"run {id} diverged from its record: {reason}")


class RunFailed(WorkflowError):
    """A run ended otherwise than by returning: `status` is failed, cancelled, diverged or quarantined."""

    def __init__(self, id: str, status: str, type_name: str, message: str) -> None:
        self.id, self.status, self.type_name, self.message = id, status, type_name, message
        super().__init__(f"run {id} {status}" + (f": {type_name}: {message}" if type_name else ""))


class Conflict(WorkflowError):
    """The id is that of another run."""

    hint = "the same id means the same flow with the same input; choose another id"

    def __init__(self, id: str) -> None:
        self.id = id
        super().__init__(f"id {id} belongs to a run with another flow or input")


class Refused(WorkflowError):
    """The owner of a run did not accept a request; the refusal is recorded."""

    def __init__(self, id: str, reason: str) -> None:
        self.id, self.reason = id, reason
        super().__init__(f"request for run {id} refused: {reason}")


class NotJSON(WorkflowError):
    """A value that cannot be recorded."""

    hint = "use JSON values, dataclasses, enums, dates; for bytes Artifact.of(...)"

    def __init__(self, what: str, reason: str) -> None:
        self.what, self.reason = what, reason
        super().__init__(f"{what} cannot be recorded: {reason}")


class BadId(WorkflowError):
    """An id that could not be a file name everywhere."""

    hint = "1 to 120 letters, digits, '-', '_' and '.', beginning with a letter or digit"

    def __init__(self, id: str) -> None:
        self.id = id
        super().__init__(f"not a usable id: {id[:200]!r}")


class MissingObject(WorkflowError):
    """Bytes that a record refers to are not where they were put."""

    def __init__(self, sha256: str, where: str) -> None:
        self.sha256, self.where = sha256, where
        super().__init__(f"object {sha256} is missing or damaged: {where}")


class Unreadable(WorkflowError):
    """An instance file is damaged, foreign, or from a newer version. It is left as it is."""

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"cannot read {path}: {reason}")


class FolderInUse(WorkflowError):
    """Two engines on one folder would run everything twice."""

    hint = "stop the other engine, or talk to it with Client(folder)"

    def __init__(self, folder: str) -> None:
        self.folder = folder
        super().__init__(f"another engine owns {folder}")


class HostInUse(WorkflowError):
    """An engine elsewhere runs this host's runs. `until`: ISO 8601, when its lease ends unless it renews it; a hint, by its clock."""

    hint = "stop it, or give this engine another host=; when it dies, an engine of the same host takes over after the lease's time"

    def __init__(self, host: str, url: str, owner: str, until: str) -> None:
        self.host, self.url, self.owner, self.until = host, url, owner, until
        super().__init__(f"host {host} of {url} is run by {owner or 'somebody'}, until {until} and for as long as it renews its lease")

    def __reduce__(self) -> tuple[type[HostInUse], tuple[str, str, str, str]]:
        return HostInUse, (self.host, self.url, self.owner, self.until)


class NotOwner(WorkflowError):
    """This engine may not go on with `what`, and records nothing more of it."""

    hint = "what it had recorded and not replicated stays in its folder; start it again to go on as the owner, or to be refused"

    def __init__(self, what: str, why: str) -> None:
        self.what, self.why = what, why
        super().__init__(f"not the owner of {what}: {why}")


class Elsewhere(NotOwner):
    """A run belongs to another host, which created or claimed it first. `winner`: flow and input digest of that run; `is_over`: it has ended there."""

    def __init__(self, id: str, owner: str, winner: tuple[str, str], is_over: bool = False) -> None:
        self.id, self.owner, self.winner, self.is_over = id, owner, winner, is_over
        super().__init__(f"run {id}", f"host {owner} is")

    def __reduce__(self) -> tuple[type[Elsewhere], tuple[str, str, tuple[str, str], bool]]:
        return Elsewhere, (self.id, self.owner, self.winner, self.is_over)


class NeedsReplica(WorkflowError):
    """Something asks for durability="replicated", and there is nowhere to replicate to."""

    hint = 'give Engine(..., replica="s3://bucket/path")'

    def __init__(self, what: str) -> None:
        self.what = what
        super().__init__(f'{what} wants durability="replicated", but the engine has no replica')


class ForkRefused(WorkflowError):
    """A run cannot be forked there."""

    def __init__(self, id: str, reason: str) -> None:
        self.id, self.reason = id, reason
        super().__init__(f"cannot fork {id}: {reason}")


class Cancelled(BaseException):
    """The run was cancelled. Raised once, at a step's end or in a wait; steps in `finally` may run for the flow's `grace`."""


class Parked(BaseException):
    """The run leaves memory. `finally` and context exits outside steps run, and run again when it comes back: that is the price of parking."""
