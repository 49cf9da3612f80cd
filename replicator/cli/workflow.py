"""`pyrepl wf`: the command line of the workflow layer, which lives in a package of its own and is loaded when this runs."""

from __future__ import annotations

import importlib

from replicator.cli.output import fail
from replicator.cli.parse import Command, UsageError

__all__ = ["COMMAND"]


def run(flags: dict[str, str], arguments: list[str]) -> int:
    cli, errors = importlib.import_module("workflow.cli"), importlib.import_module("workflow.errors")
    try:
        return int(cli.main(flags, arguments))
    except cli.Usage as error:
        raise UsageError(str(error)) from None
    except errors.WorkflowError as error:
        return fail(str(error), error.hint)
    except ImportError as error:
        return fail(f"cannot import the flows: {error}", "give the name of a module that is found from here")


COMMAND = Command(
    "pyrepl wf list|show|timeline|calls|decisions|send|cancel|pause|resume|fork|verify|gc|run|fleet|host FOLDER|URL [ID ...] [-json]",
    "Look at durable workflows in a folder, or straight in a bucket, and ask their engine for something.\n\n"
    "  list [-status S]; show, timeline, calls, decisions ID; send [-id I] [-sender S] ID TYPE [JSON]; cancel, pause, resume ID;\n"
    "  fork ID STEP [NEW-ID]; verify [ID]; gc [-keep-days N]; run -flows MODULE ID: run one to its next wait or its end.\n"
    "  -host H: the host of a bucket for gc and run, which must be free; main, or the run's own, when not given.\n"
    "  fleet [-live [-poll D]]: the hosts of a bucket, their runs, leases and takeovers.\n"
    "  host -flows MODULE [-host H] [-folder F] [-resources gpu=1,...] [-concurrency N] [-lease-ttl D] [-poll D] [-inbox-poll D] [-stop-timeout D]: be one.",
    ("json", "live"),
    (
        "status",
        "id",
        "sender",
        "keep-days",
        "flows",
        "host",
        "folder",
        "resources",
        "concurrency",
        "lease-ttl",
        "poll",
        "inbox-poll",
        "stop-timeout",
    ),
    run,
)
