"""What there is to do, composed from the configuration. The command line and Dagster both call this.

| function   | when it returns                                                            |
|------------|----------------------------------------------------------------------------|
| `check`    | everything that keeps a source from being captured, or archived, is listed |
| `capture`  | everything committed before the call is in the change log                  |
| `process`  | the app has seen the log as of the call; its documents are in its sinks    |
| `reprocess` | the app made documents of some keys anew, though nothing changed            |
| `dump`     | existing rows were read and are in the log: of tables, of keys, of a condition |
| `load`     | the lake holds a log's state at its end, in one commit                     |
| `verify_log` | the log was checked against what its reader saw                          |
| `mend_log` | what cannot be read of a log is a named gap, which capture dumps again          |
| `audit`    | every hop was compared with the one before; what is lost is an incident     |
| `repair`   | the keys of every open incident were dumped again                          |
| `replay`   | an app was run over the log again, and compared with what its sinks hold      |
| `verify`   | source and lake were compared row by row at one position                   |
| `expect`   | suites of expectations were run on one version of the lake                 |
| `release`  | the views of `prod` show the version that was checked                      |
| `list_logs`, `list_segments`, `find_group`, `newest_groups` | what is in the logs is known: headers, no row data |
| `begin_lake`, `begin_app` | a new reader begins in a log that was shortened, with a dump |
| `restore_log` | a log whose folder was lost is there again, from its archive          |
| `retire_log` | the segments of a log that need not be kept are removed         |
| `history`  | schema changes and gaps of a source are read out of its log                |
| `tables_met` | the tables that capture has met are read out of its log                    |
| `behind`   | it is known whether there is anything to load                              |

`capture` and `process` do the work in this process when no service is running. When one is, it
holds the lease, and two would be one too many: they wait until the service has got there.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from deltaworks.operate.archiving import archive_log, archiving
from deltaworks.operate.dump import (
    Dumped,
    DumpFailedError,
    DumpPausedError,
    DumpStatus,
    OnDumpProgress,
    TableProgress,
    ask,
    dump,
    dumps,
    parse_keys,
    want,
)
from deltaworks.operate.history import History, history, tables_met
from deltaworks.operate.inspecting import find_group, group_rows, list_logs, list_segments, newest_groups
from deltaworks.operate.lease import ServiceSlowError
from deltaworks.operate.log import Captured, capture, check, follow_capture, least_role
from deltaworks.operate.metrics import MetricsPortInUseError, app_metrics_server, metrics_server
from deltaworks.operate.proof import verify_log
from deltaworks.operate.retiring import retiring
from deltaworks.operate.sources import capture_status, capture_statuses

if TYPE_CHECKING:
    from deltaworks.operate.app import (
        Processed,
        document_lineage,
        follow_process,
        lake_tables_of,
        pause,
        process,
        resume,
        tables_read_by,
    )
    from deltaworks.operate.asking import (
        Answered,
        NotAnsweredError,
        RequestRefusedError,
        parse_asked,
        reprocess,
    )
    from deltaworks.operate.audit_mark import unaudited
    from deltaworks.operate.auditing import Audit, audit, incidents
    from deltaworks.operate.beginning import Begun, begin_app, begin_lake
    from deltaworks.operate.dead import (
        DeadSummary,
        NoDeadLetterError,
        dead_letters,
        dead_rows,
        dead_summary,
        drop,
        letters_elsewhere,
        retry,
    )
    from deltaworks.operate.lake import (
        LakeMovedError,
        Loaded,
        LoadedTable,
        expect,
        is_released,
        load,
        open_lake,
        release,
        released,
        verify,
    )
    from deltaworks.operate.mending import Mended, NotMendableError, mend_log
    from deltaworks.operate.models import Model, describe_models
    from deltaworks.operate.progress import Behind, StatusRow, behind, status
    from deltaworks.operate.repairing import RepairError, repair
    from deltaworks.operate.replaying import Replayed, ReplayError, parse_start, replay
    from deltaworks.operate.restoring import RestoredLog, restore_log
    from deltaworks.operate.retention import read_up_to, retire_log

__all__ = [
    "Answered",
    "Audit",
    "Begun",
    "Behind",
    "Captured",
    "DeadSummary",
    "DumpFailedError",
    "DumpPausedError",
    "DumpStatus",
    "Dumped",
    "History",
    "LakeMovedError",
    "Loaded",
    "LoadedTable",
    "Mended",
    "MetricsPortInUseError",
    "Model",
    "NoDeadLetterError",
    "NotAnsweredError",
    "NotMendableError",
    "OnDumpProgress",
    "Processed",
    "RepairError",
    "ReplayError",
    "Replayed",
    "RequestRefusedError",
    "RestoredLog",
    "ServiceSlowError",
    "StatusRow",
    "TableProgress",
    "app_metrics_server",
    "archive_log",
    "archiving",
    "ask",
    "audit",
    "begin_app",
    "begin_lake",
    "behind",
    "capture",
    "capture_status",
    "capture_statuses",
    "check",
    "dead_letters",
    "dead_rows",
    "dead_summary",
    "describe_models",
    "document_lineage",
    "drop",
    "dump",
    "dumps",
    "expect",
    "find_group",
    "follow_capture",
    "follow_process",
    "group_rows",
    "history",
    "incidents",
    "is_released",
    "lake_tables_of",
    "least_role",
    "letters_elsewhere",
    "list_logs",
    "list_segments",
    "load",
    "mend_log",
    "metrics_server",
    "newest_groups",
    "open_lake",
    "parse_asked",
    "parse_keys",
    "parse_start",
    "pause",
    "process",
    "read_up_to",
    "release",
    "released",
    "repair",
    "replay",
    "reprocess",
    "restore_log",
    "resume",
    "retire_log",
    "retiring",
    "retry",
    "status",
    "tables_met",
    "tables_read_by",
    "unaudited",
    "verify",
    "verify_log",
    "want",
]

_LATE = {
    "app": (
        "Processed",
        "document_lineage",
        "follow_process",
        "lake_tables_of",
        "pause",
        "process",
        "resume",
        "tables_read_by",
    ),
    "audit_mark": ("unaudited",),
    "auditing": ("Audit", "audit", "incidents"),
    "lake": (
        "LakeMovedError",
        "Loaded",
        "LoadedTable",
        "expect",
        "is_released",
        "load",
        "open_lake",
        "release",
        "released",
        "verify",
    ),
    "repairing": ("RepairError", "repair"),
    "replaying": ("ReplayError", "Replayed", "parse_start", "replay"),
    "mending": ("Mended", "NotMendableError", "mend_log"),
    "models": ("Model", "describe_models"),
    "progress": ("Behind", "StatusRow", "behind", "status"),
    "beginning": ("Begun", "begin_app", "begin_lake"),
    "restoring": ("RestoredLog", "restore_log"),
    "retention": ("read_up_to", "retire_log"),
    "dead": (
        "DeadSummary",
        "NoDeadLetterError",
        "dead_letters",
        "dead_rows",
        "dead_summary",
        "drop",
        "letters_elsewhere",
        "retry",
    ),
    "asking": (
        "Answered",
        "NotAnsweredError",
        "RequestRefusedError",
        "parse_asked",
        "reprocess",
    ),
}
"""By module, what is imported when it is first asked for: capture, which runs all the time, must not pay with
its memory for the lake, the steps of apps and the parser of SQL."""


def __getattr__(name: str) -> object:
    for module, names in _LATE.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
