"""Training: the run, its iterations, density control, schedules, evaluation and reports."""
