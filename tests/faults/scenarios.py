"""Everything that users do in the fault suite, and what is left of the tables of the state machines."""

from __future__ import annotations

from collections.abc import Mapping

from tests.faults.scenario import Scenario, assert_ran, counting
from tests.faults.scenarios_buffers import BUFFERS
from tests.faults.scenarios_jobs import JOBS
from tests.faults.scenarios_transfers import TRANSFERS

__all__ = ["NOT_PLAYED", "SCENARIOS", "Scenario", "assert_ran", "counting"]

SCENARIOS: list[Scenario] = [*JOBS, *BUFFERS, *TRANSFERS]

NOT_PLAYED: Mapping[str, str] = {
    # Each of our backends tells that a job ran before it tells that it ended well.
    "JobRecord QUEUED COMPLETED": "test_a_backend_that_only_tells_of_the_end_has_completed_a_job",
}
"""The moves in whose middle nothing is killed here, and the test of `test_faults_control` that makes them."""
