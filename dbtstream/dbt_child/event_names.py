"""Which of dbt's events become log lines, which never do, which always.

Names are those of protobuf classes: `callback` looks an event's type up here once. Events that
have a frame of their own are listed in its table and not here.
"""

from __future__ import annotations

LEVELS = {"debug": 10, "test": 10, "info": 20, "warn": 30, "error": 40}
NO_LEVEL = 20

QUIET = frozenset(
    {
        "AdapterEventDebugMsg",
        "CacheActionMsg",
        "CacheDumpGraphMsg",
        "CacheMissMsg",
        "CodeExecutionMsg",
        "CodeExecutionStatusMsg",
        "ColTypeChangeMsg",
        "ConnectionClosedMsg",
        "ConnectionClosedInCleanupMsg",
        "ConnectionLeftOpenMsg",
        "ConnectionLeftOpenInCleanupMsg",
        "ConnectionReusedMsg",
        "ConnectionUsedMsg",
        "FormattingMsg",
        "JinjaLogDebugMsg",
        "ListRelationsMsg",
        "MainReportArgsMsg",
        "MicrobatchExecutionDebugMsg",
        "NewConnectionMsg",
        "NewConnectionOpeningMsg",
        "NodeExecutingMsg",
        "RollbackMsg",
        "SQLCommitMsg",
        "SQLQueryMsg",
        "SQLQueryStatusMsg",
        "SchemaCreationMsg",
        "SchemaDropMsg",
        "SystemExecutingCmdMsg",
        "TimingInfoCollectedMsg",
        "WritingInjectedSQLForNodeMsg",
    }
)
"""Never above info, and many: their level is not even read unless debug lines are wanted."""

TOLD = frozenset(
    {
        "CheckNodeTestFailureMsg",
        "CommandCompletedMsg",
        "EndOfRunSummaryMsg",
        "EndRunResultMsg",
        "LogFreshnessResultMsg",
        "LogFunctionResultMsg",
        "LogModelResultMsg",
        "LogNodeNoOpResultMsg",
        "LogNodeResultMsg",
        "LogOverloadResultMsg",
        "LogSeedResultMsg",
        "LogSkipBecauseErrorMsg",
        "LogSnapshotResultMsg",
        "LogStartOverloadMsg",
        "LogTestResultMsg",
        "MarkSkippedChildrenMsg",
        "ResourceReportMsg",
        "RunResultErrorMsg",
        "RunResultErrorNoMessageMsg",
        "RunResultFailureMsg",
        "RunResultWarningMsg",
        "RunResultWarningMessageMsg",
    }
)
"""All they say is in `node_finish` or `result`: never a log line, though some are errors."""

OUTPUT = frozenset(
    {
        "CompiledNodeMsg",
        "JinjaLogInfoMsg",
        "ListCmdOutMsg",
        "NoNodesForSelectionCriteriaMsg",
        "NoNodesSelectedMsg",
        "NothingToDoMsg",
        "PrintEventMsg",
        "ShowNodeMsg",
    }
)
"""What the caller asked to see: forwarded whatever the log level."""
