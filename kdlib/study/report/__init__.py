"""From the numbers of finished runs to tables, figures and verdicts."""
