"""What users measure: workloads, the machine's limits beside every time, reports."""
