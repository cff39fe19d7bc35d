"""Generation, tasks and answers, metrics, pictures."""
