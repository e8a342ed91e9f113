"""What the checks of a run said, as evidence for its release."""

from dataclasses import dataclass
from typing import Any

import dagster as dg

from assets.checks import LAKE_VERSION


@dataclass(frozen=True, slots=True)
class Evidence:
    """Every check of a run with its verdict, and the oldest lake version that expectations saw."""

    run_id: str
    checks: dict[str, bool]
    lake_version: int

    def as_json(self) -> dict[str, Any]:
        """What a release keeps."""
        return {"run_id": self.run_id, "checks": self.checks}


def evidence_of_run(context: dg.AssetExecutionContext) -> Evidence:
    """Read the evaluations that this run has stored so far."""
    records = context.instance.get_records_for_run(
        context.run.run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION
    ).records
    evaluations = [
        event.asset_check_evaluation_data
        for record in records
        if (event := record.event_log_entry.dagster_event) is not None
    ]
    versions = [
        int(str(evaluation.metadata[LAKE_VERSION].value))
        for evaluation in evaluations
        if LAKE_VERSION in evaluation.metadata
    ]
    if not versions:
        raise dg.Failure(
            "nothing is released: no expectation was checked in this run; "
            "select the checks together with `released`, as the job does"
        )
    checks = {f"{each.asset_key.to_user_string()}:{each.check_name}": each.passed for each in evaluations}
    return Evidence(context.run.run_id, dict(sorted(checks.items())), min(versions))
