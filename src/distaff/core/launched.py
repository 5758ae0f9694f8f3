"""The environment that describes one of several processes; `distaff launch` sets it."""

from __future__ import annotations

COORDINATOR = "DISTAFF_COORDINATOR_ADDRESS"
"""Host and port of process 0, where all processes meet."""

COUNT = "DISTAFF_NUM_PROCESSES"
"""Number of processes of the job."""

INDEX = "DISTAFF_PROCESS_ID"
"""Index of this process, from 0."""

LOCAL_COUNT = "DISTAFF_LOCAL_PROCESSES"
"""Number of processes on this machine, which share its GPUs. `distaff launch` sets it."""

HEARTBEAT = "DISTAFF_HEARTBEAT"
"""Seconds without a heartbeat after which a process counts as dead."""

START_TIMEOUT = "DISTAFF_START_TIMEOUT"
"""Seconds in which all processes must have joined."""

END_STALLED = "DISTAFF_END_STALLED"
"""Whether a process ends once it has reported a stall: "1" for yes."""

STALLED = 124
"""Exit status of a process that ends because of a stall, as of the command `timeout`."""
