"""Which of the generated tasks are kept."""
