"""Which run a start resumes."""
